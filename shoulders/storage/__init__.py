"""Atomic writes, file locks, and the rows of ``results.json``."""
