"""TF."""

from engines.single import Single

ENGINES = {"single": Single}
