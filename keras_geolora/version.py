"""The version of the library, for itself and for its files."""

__version__ = "0.2.0.dev0"
