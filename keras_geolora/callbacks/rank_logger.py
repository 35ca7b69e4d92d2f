"""What adapters do, as metrics of `fit`."""

import keras

from keras_geolora.callbacks.reading import IntervalCallback
from keras_geolora.layers.tree import adapted_layers
from keras_geolora.optimizer.of_model import geolora_optimizers


class RankLogger(IntervalCallback):
    """Adds the mean rank and what became of steps to the logs of `fit`.

    `fit` of a model with `enable_geolora` adds it automatically. Add it
    yourself if the adapted model is only a part of the model that you train:
    `model.fit(..., callbacks=[keras_geolora.callbacks.RankLogger()])`.

    After every epoch, the logs contain three more entries, which `History`,
    the progress bar and later callbacks see:

    - `mean_rank`: the mean over all adapted layers and experts,
    - `skipped_steps`: the number of steps so far in which at least one adapter
      kept its factors, because its step was not finite,
    - `step_scale`: the mean factor, at most 1, by which `max_update_ratio`
      scales the steps. A small one slows the training down like a small
      learning rate; raise `max_update_ratio` if little is learned.

    Args:
        interval: Int, number of batches between two updates of the mean rank
            in the progress bar. Each waits for the device. Defaults to 20.

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
    assert history.history["step_scale"] == [1.0]  # SGD has no bound
    ```
    """

    def __init__(self, interval=20):
        super().__init__(interval)
        self._mean_rank = None

    def read(self, step):
        """Reads the mean rank."""
        ranks = [
            rank
            for layer in adapted_layers(self.model).values()
            for rank in layer.adapter.ranks.tolist()
        ]
        self._mean_rank = sum(ranks) / len(ranks) if ranks else 0.0

    def on_train_batch_end(self, batch, logs=None):
        """Adds the mean rank, at most `interval` batches old."""
        super().on_train_batch_end(batch, logs)
        if logs is not None:
            logs["mean_rank"] = self._mean_rank

    def on_epoch_end(self, epoch, logs=None):
        """Adds the mean rank, the skipped steps and the scale of steps."""
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
            scales = [
                scale
                for layer in adapted_layers(self.model).values()
                for optimizer in optimizers
                if (scale := optimizer.step_scale(layer.adapter)) is not None
            ]
            logs["step_scale"] = sum(scales) / len(scales) if scales else 1.0
