"""Which parameters of a model neither train nor have an adapter."""

import dataclasses
import math

from keras_geolora.layers.factor import factor_of
from keras_geolora.layers.tree import adapted_layers


@dataclasses.dataclass(frozen=True)
class Reach:
    """What the adapters of a model do not reach.

    Attributes:
        total: Int, the parameters of the model, without its adapters.
        left: Dict from the path of a variable to its number of parameters, of
            those that neither train nor have an adapter, the largest first.
    """

    total: int
    left: dict

    @classmethod
    def of(cls, model):
        """Returns the `Reach` of a model."""
        kernels = {
            id(kernel)
            for layer in adapted_layers(model).values()
            for kernel in layer.kernels()
        }
        total, left = 0, {}
        for variable in model.weights:
            if factor_of(variable) is None:
                size = math.prod(variable.shape)
                total += size
                if id(variable) not in kernels and not variable.trainable:
                    left[variable.path] = left.get(variable.path, 0) + size
        largest = sorted(left.items(), key=lambda item: -item[1])
        return cls(total, dict(largest))

    @property
    def share(self):
        """Float in [0, 1], the share of the parameters that is left."""
        return sum(self.left.values()) / max(self.total, 1)

    def sentence(self, count=3):
        """Returns a sentence with the share and the largest of what is left.

        Args:
            count: Int, how many variables to name. Defaults to 3.
        """
        if not self.left:
            return "Every parameter trains or has an adapter."
        some = [f"{path} ({n:,})" for path, n in self.left.items()][:count]
        many = len(self.left) > count
        more = f", ... ({len(self.left)} in all)" if many else ""
        return (
            f"No adapter reaches {self.share:.1%} of the {self.total:,} "
            f"parameters of the model. The largest: {', '.join(some)}{more}."
        )
