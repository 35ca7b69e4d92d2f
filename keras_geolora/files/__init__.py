"""Adapters in files: the format of this library, and those of others."""
