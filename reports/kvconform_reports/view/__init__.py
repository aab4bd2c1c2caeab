"""What the renderers share: rows, charts and words made from results and records."""
