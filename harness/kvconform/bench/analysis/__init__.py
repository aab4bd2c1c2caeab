"""What follows from the raw rounds of a bench record: intervals, ratios, rooflines and exponents."""
