"""The process that a backend runs in, and the client that talks to it."""
