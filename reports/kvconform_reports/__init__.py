"""Renderers of results; they make no decisions, and only entry points import them.

``html`` writes the report, ``markdown`` the job summary, ``junit`` XML for CI systems, ``terminal`` a table for the
terminal.
"""
