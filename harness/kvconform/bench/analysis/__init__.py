"""What follows from the raw rounds of a bench record: intervals, ratios, costs, rooflines and exponents."""
