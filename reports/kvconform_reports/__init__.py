"""Verdicts to pictures, tables and files. Renderers only: they decide nothing, and nothing but an entry point imports
them.

``html`` writes the report, ``markdown`` the job summary, ``junit`` the XML that CI systems read, ``summary`` the table
for the terminal.
"""
