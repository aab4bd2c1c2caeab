"""Planted faults: which clauses detect them, and which wrong models each clause rejects."""
