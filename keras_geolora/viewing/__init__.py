"""Ranks as a table, a heat map and data."""
