"""From recorded steps and expected values to a verdict."""
