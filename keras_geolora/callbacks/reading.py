"""How callbacks read a model during training."""

import keras

from keras_geolora.optimizer.of_model import geolora_optimizers


class IntervalCallback(keras.callbacks.Callback):
    """Reads something at intervals while `fit` runs.

    Before the first batch, every `interval` batches, and at the end of every
    epoch. Like updates, batches are counted across epochs, so that readings can
    coincide with the cuts of `GeoLoRA`. Readings before and after the cut at
    the end of an epoch have the same step.
    """

    def __init__(self, interval):
        super().__init__()
        check_interval(interval)
        self.interval = interval
        self._begins = False
        self._done = 0  # batches, in all and in this epoch
        self._done_in_epoch = 0
        self._next = interval

    def read(self, step):
        """Reads; `step` is the number of updates so far."""
        raise NotImplementedError

    def on_train_begin(self, logs=None):
        """Defers the first reading: other callbacks may load a checkpoint."""
        self._begins = True

    def on_epoch_begin(self, epoch, logs=None):
        """Reads before the first batch."""
        self._done_in_epoch = 0
        if self._begins:
            step = updates_of(self.model)
            self._count(step)
            self.read(step)
        self._begins = False

    def on_train_batch_end(self, batch, logs=None):
        """Reads every `interval` batches."""
        # `batch` skips numbers if Keras executes several steps at once.
        done = self._done + batch + 1 - self._done_in_epoch
        self._done_in_epoch = batch + 1
        due = done >= self._next
        self._count(done)
        if due:
            self.read(updates_of(self.model))

    def _count(self, done):
        self._done = done
        self._next = (done // self.interval + 1) * self.interval

    def on_epoch_end(self, epoch, logs=None):
        """Reads after the cut at the end of the epoch."""
        self.read(updates_of(self.model))


def synchronize(model):
    """Brings the weights up to date.

    Between two batches, the JAX trainer does not write to the variables.
    """
    if hasattr(model, "jax_state_sync"):
        model.jax_state_sync()


def updates_of(model):
    """Returns how many updates the optimizer of a model has done."""
    synchronize(model)
    optimizers = geolora_optimizers(model) or [model.optimizer]
    return max(
        int(keras.ops.convert_to_numpy(optimizer.iterations))
        for optimizer in optimizers
    )


def check_interval(interval):
    """Refuses an interval that is not a positive integer."""
    if (
        not isinstance(interval, int)
        or isinstance(interval, bool)
        or interval < 1
    ):
        raise ValueError(
            "`interval` counts the batches between two readings, so it must "
            "be an integer of at least 1; each reading waits for the device. "
            f"Received: interval={interval!r}. A usual choice is 20."
        )
