"""Buffers that shrink while `fit` runs."""

import keras

from keras_geolora.callbacks.reading import synchronize
from keras_geolora.layers.tree import adapted_layers


class EpochCompaction(keras.callbacks.Callback):
    """Cuts the buffers of adapters to their ranks, at the end of epochs.

    Training continues where it was, with smaller adapters. Compiled
    functions are compiled again, so buffers are cut only if that saves enough.
    A model on which `enable_geolora` was called loads checkpoints from before
    and after, whatever the size of its buffers.

    Args:
        multiple: Int, as in `keras_geolora.compact_geolora`. Defaults to 8.
        min_saving: Float in [0, 1), the smallest share of the buffers that is
            worth cutting. Defaults to 0.25.
        verbose: 0 or 1, whether to print the savings. Defaults to 0.

    Example:

    ```python
    import keras
    import numpy as np
    import keras_geolora

    model = keras.Sequential([keras.Input((32,)), keras.layers.Dense(16)])
    model.enable_geolora(rank=2, max_rank=16)
    optimizer = keras_geolora.GeoLoRA("sgd", tolerance=0.9, cut_interval=4)
    model.compile(optimizer, loss="mse")
    compaction = keras_geolora.callbacks.EpochCompaction(multiple=4)
    x, y = np.ones((8, 32)), np.ones((8, 16))
    model.fit(x, y, batch_size=2, callbacks=[compaction], verbose=0)
    assert model.layers[0].adapter.max_rank == 4
    ```
    """

    def __init__(self, multiple=8, min_saving=0.25, verbose=0):
        super().__init__()
        self.multiple = multiple
        self.min_saving = min_saving
        self.verbose = verbose

    def on_epoch_end(self, epoch, logs=None):
        """Compacts, after the cut at the end of the epoch."""
        synchronize(self.model)
        before = self._count()
        self.model.compact_geolora(self.multiple, min_saving=self.min_saving)
        after = self._count()
        if self.verbose and after < before:
            print(
                f"\nEpoch {epoch + 1}: the buffers of the adapters shrink "
                f"from {before:,} to {after:,} parameters."
            )

    def _count(self):
        layers = adapted_layers(self.model).values()
        return sum(layer.adapter.count_params() for layer in layers)
