"""The options of an adapter."""

import dataclasses
from typing import ClassVar


@dataclasses.dataclass(frozen=True)
class AdapterOptions:
    """The arguments of `LowRankAdapter`, without the sizes of the kernel.

    `LowRankAdapter` explains and checks them. Files hold them as a dict,
    `dataclasses.asdict(options)`.
    """

    rank: int
    max_rank: int | None = None
    min_rank: int = 1
    scale: float = 1.0
    dropout: float = 0.0
    seed: int | None = None

    # The types that files may hold.
    TYPES: ClassVar = {
        "rank": [int],
        "max_rank": [int],
        "min_rank": [int],
        "scale": [int, float],
        "dropout": [int, float],
        "seed": [int, type(None)],
    }

    @classmethod
    def of(cls, adapter):
        """Returns the options of a `LowRankAdapter`."""
        config = adapter.get_config()
        return cls(**{name: config[name] for name in cls.TYPES})

    def with_columns(self, max_rank):
        """Returns the same options for buffers of another width."""
        rank = min(self.rank, max_rank)
        return dataclasses.replace(
            self,
            rank=rank,
            max_rank=max_rank,
            min_rank=min(self.min_rank, rank),
        )
