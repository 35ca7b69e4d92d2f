"""How callbacks read a model that trains."""

import keras

from keras_geolora.optimizer.of_model import geolora_optimizers


class IntervalCallback(keras.callbacks.Callback):
    """Reads something now and then while `fit` runs.

    Before the first batch, every `interval` batches, and at the end of every
    epoch. Batches are counted through all epochs, as updates are, so that an
    interval that is the `cut_interval` of `GeoLoRA` meets its cuts. What is
    read before and after the cut of an epoch has the same step.
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
        """Other callbacks may load a checkpoint now: it is read later."""
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
        # `batch` moves in strides where Keras does several steps at once.
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
        """Reads what the cut of the epoch has left."""
        self.read(updates_of(self.model))


def synchronize(model):
    """Brings the weights up to date.

    The JAX trainer keeps the weights to itself between two batches.
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
    """Refuses what cannot count batches."""
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
