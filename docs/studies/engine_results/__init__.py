"""The page of engines: what each was judged by, and what was found."""
