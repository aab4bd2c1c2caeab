"""Judges serving engines, which are reached by requests: a server at a URL, or an engine in this process."""
