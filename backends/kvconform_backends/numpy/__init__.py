"""Reference caches in numpy."""
