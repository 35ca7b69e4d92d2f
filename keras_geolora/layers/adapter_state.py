"""What an adapted layer knows beyond the Keras layer it was."""

import dataclasses


class TrainableFlags:
    """Remembers which variables were trainable."""

    def __init__(self, variables):
        self.flags = [(v, v.trainable) for v in variables]

    def restore(self):
        for variable, trainable in self.flags:
            variable.trainable = trainable


@dataclasses.dataclass
class AdapterState:
    """What an adapted layer knows besides its adapters.

    Keras and the backends look through the attributes of a layer for
    variables and layers, and find none here. The adapters themselves, which
    they must find, are in another attribute.

    Attributes:
        options: Dict, arguments of `LowRankAdapter` for the first adapter.
        train_bias: Bool, whether the bias of the layer trains.
        active: String, the name of the active adapter, or `None`.
        adaptation: The `Adaptation` that added the adapters and may suspend
            them, or `None` if the constructor did.
        trainable_before: The flags of the Keras layer's variables before it
            was adapted.
        paused: The flags of those that train again once the layer does.
    """

    options: dict
    train_bias: bool = False
    active: str | None = None
    adaptation: object = None
    trainable_before: TrainableFlags = TrainableFlags(())
    paused: TrainableFlags = TrainableFlags(())
