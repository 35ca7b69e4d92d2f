"""JAX."""

from engines.single import Single

ENGINES = {"single": Single}
