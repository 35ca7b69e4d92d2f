"""The optimizer wrapper: groups of adapters that step together."""
