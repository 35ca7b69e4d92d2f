"""The mean rank, where Keras shows its metrics."""

import keras

from keras_geolora.callbacks.reading import check_interval, synchronize
from keras_geolora.optimizer import find_geolora
from keras_geolora.targeting import adapted_layers


class RankLogger(keras.callbacks.Callback):
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
        super().__init__()
        check_interval(interval)
        self.interval = interval
        self._mean_rank = None

    def on_train_begin(self, logs=None):
        """Reads the ranks at the start."""
        self._read_ranks()

    def on_train_batch_end(self, batch, logs=None):
        """Adds the mean rank, at most `interval` batches old."""
        if logs is None:
            return
        if batch % self.interval == 0:
            self._read_ranks()
        logs["mean_rank"] = self._mean_rank

    def on_epoch_end(self, epoch, logs=None):
        """Adds the mean rank and the number of skipped steps."""
        if logs is None:
            return
        self._read_ranks()
        logs["mean_rank"] = self._mean_rank
        optimizer = find_geolora(self.model.optimizer)
        if optimizer is not None:
            steps = keras.ops.convert_to_numpy(optimizer.skipped_steps)
            logs["skipped_steps"] = int(steps)

    def _read_ranks(self):
        synchronize(self.model)
        ranks = [layer.rank for layer in adapted_layers(self.model).values()]
        self._mean_rank = sum(ranks) / len(ranks) if ranks else 0.0
