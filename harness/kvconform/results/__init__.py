"""Results files: reading, merging, comparing with a baseline, known failures."""
