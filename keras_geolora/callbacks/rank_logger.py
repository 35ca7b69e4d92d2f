"""The mean rank, where Keras shows its metrics."""

import keras

from keras_geolora.callbacks.reading import IntervalCallback
from keras_geolora.layers.tree import adapted_layers
from keras_geolora.optimizer.of_model import geolora_optimizers


class RankLogger(IntervalCallback):
    """Puts the mean rank and the skipped steps into the logs of `fit`.

    `fit` of a model with `enable_geolora` adds it by itself. Add it by hand
    where an adapted model is a part of the model that you train:
    `model.fit(..., callbacks=[keras_geolora.callbacks.RankLogger()])`.

    After every epoch the logs, and with them `History`, the progress bar and
    the callbacks that come later, hold

    - `mean_rank`: the mean over all adapted layers,
    - `skipped_steps`: how many steps were not finite so far, so that at
      least one adapter kept its factors.

    Args:
        interval: Int, how many batches apart the progress bar gets a fresh
            mean rank. Reading it waits for the device. Defaults to 20.

    Example:

    ```python
    import keras
    import numpy as np
    import keras_geolora

    part = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    part.enable_geolora(rank=2)
    model = keras.Sequential([part, keras.layers.Dense(1)])
    model.compile(keras_geolora.GeoLoRA("sgd"), loss="mse")
    history = model.fit(
        np.ones((8, 8)),
        np.ones((8, 1)),
        callbacks=[keras_geolora.callbacks.RankLogger()],
        verbose=0,
    )
    assert history.history["skipped_steps"] == [0]
    ```
    """

    def __init__(self, interval=20):
        super().__init__(interval)
        self._mean_rank = None

    def read(self, step):
        """Reads the mean rank."""
        ranks = [layer.rank for layer in adapted_layers(self.model).values()]
        self._mean_rank = sum(ranks) / len(ranks) if ranks else 0.0

    def on_train_batch_end(self, batch, logs=None):
        """Adds the mean rank, at most `interval` batches old."""
        super().on_train_batch_end(batch, logs)
        if logs is not None:
            logs["mean_rank"] = self._mean_rank

    def on_epoch_end(self, epoch, logs=None):
        """Adds the mean rank and the number of skipped steps."""
        super().on_epoch_end(epoch, logs)
        if logs is None:
            return
        logs["mean_rank"] = self._mean_rank
        optimizers = [o for o in geolora_optimizers(self.model) if o.built]
        if optimizers:
            logs["skipped_steps"] = sum(
                int(keras.ops.convert_to_numpy(optimizer.skipped_steps))
                for optimizer in optimizers
            )
