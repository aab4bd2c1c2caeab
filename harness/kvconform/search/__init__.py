"""Searches the programs of one clause for a failure, shrinks it and stores it."""
