"""An adapted model: what is adapted, what trains, and what may change."""
