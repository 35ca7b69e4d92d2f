"""How callbacks read a model that trains."""

import keras


class IntervalCallback(keras.callbacks.Callback):
    """Reads something now and then while `fit` runs.

    Before the first batch, every `interval` batches, and at the end of every
    epoch. What is read before and after the cut of an epoch has the same
    step.
    """

    def __init__(self, interval):
        super().__init__()
        check_interval(interval)
        self.interval = interval
        self._begins = False
        self._next = interval

    def read(self, step):
        """Reads; `step` is the number of updates so far."""
        raise NotImplementedError

    def on_train_begin(self, logs=None):
        """Other callbacks may load a checkpoint now: it is read later."""
        self._begins = True

    def on_epoch_begin(self, epoch, logs=None):
        """Reads before the first batch."""
        self._next = self.interval
        if self._begins:
            self.read(updates_of(self.model))
        self._begins = False

    def on_train_batch_end(self, batch, logs=None):
        """Reads every `interval` batches."""
        # `batch` moves in strides where Keras does several steps at once.
        done = batch + 1
        if done >= self._next:
            self._next = (done // self.interval + 1) * self.interval
            self.read(updates_of(self.model))

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
    return int(keras.ops.convert_to_numpy(model.optimizer.iterations))


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
