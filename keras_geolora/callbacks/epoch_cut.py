"""Cuts ranks before validation and checkpoints."""

import keras

from keras_geolora.callbacks.reading import updates_of
from keras_geolora.optimizer.of_model import geolora_optimizers

# As many updates give new directions time to grow.
ENOUGH = 20


class EpochCut(keras.callbacks.Callback):
    """Cuts all adapters to the ranks they need, at the end of every epoch.

    Ranks grow between two cuts of the optimizer. With this callback, the model
    that is validated, saved and returned has no directions that the next cut
    would remove. `fit` of a model with `enable_geolora` adds it automatically.

    New directions need time to grow. So an epoch ends with a cut only if the
    number of all updates passes a multiple of 20 in it, or of `cut_interval` if
    that is smaller. After other epochs adapters only return to the manifold
    (`optimizer.settle()`). There is no second cut if the last step was one.

    Example:

    ```python
    import keras
    import numpy as np
    import keras_geolora

    part = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    part.enable_geolora(rank=2)
    model = keras.Sequential([part, keras.layers.Dense(1)])
    optimizer = keras_geolora.GeoLoRA("sgd", tolerance=0.9, cut_interval=3)
    model.compile(optimizer, loss="mse")
    cut = keras_geolora.callbacks.EpochCut()
    x, y = np.ones((8, 8)), np.ones((8, 1))
    model.fit(x, y, batch_size=2, callbacks=[cut], verbose=0)
    assert part.layers[0].rank == 1
    ```
    """

    def __init__(self):
        super().__init__()
        self._updates_before = None

    def on_epoch_begin(self, epoch, logs=None):
        """Records the number of updates so far."""
        self._updates_before = updates_of(self.model)

    def on_test_begin(self, logs=None):
        """Cuts before the validation at the end of an epoch."""
        self._cut()

    def on_epoch_end(self, epoch, logs=None):
        """Cuts if there was no validation."""
        self._cut()

    def _cut(self):
        if self._updates_before is None:
            return  # not in training, or just cut
        updates, before = updates_of(self.model), self._updates_before
        self._updates_before = None
        for optimizer in geolora_optimizers(self.model):
            interval = optimizer.cut_interval
            if updates % interval == 0:
                continue  # the last step was a cut
            enough = min(interval, ENOUGH)
            if updates // enough > before // enough:
                optimizer.cut()
            else:
                optimizer.settle()
