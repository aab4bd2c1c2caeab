"""The soak: malformed inputs, processes that are killed, and a long run. ``nox -s soak``; figures in
docs/reliability.md."""
