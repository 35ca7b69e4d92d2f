"""Adapter files, in this library's format and in others."""
