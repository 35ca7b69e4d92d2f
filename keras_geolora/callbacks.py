"""Callbacks that show how the adapters of a model do while it trains."""

import warnings

import keras
import numpy as np

from keras_geolora.optimizer import find_geolora
from keras_geolora.targeting import adapted_layers


class EpochCut(keras.callbacks.Callback):
    """Cuts all adapters to the ranks they need, at the end of every epoch.

    Ranks grow between two cuts of the optimizer. With this callback the model
    that is validated, saved and handed over has no directions that the next
    cut would take away. `fit` of a model with `enable_geolora` adds it by
    itself.

    Epochs of fewer updates than the `cut_interval` of the optimizer end
    without a cut: new directions would not have had the time to grow.

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
        """Notes how many updates there were."""
        self._updates_before = self._updates()

    def on_test_begin(self, logs=None):
        """Cuts before the validation at the end of an epoch."""
        self._cut()

    def on_epoch_end(self, epoch, logs=None):
        """Cuts where nothing was validated."""
        self._cut()

    def _cut(self):
        if self._updates_before is None:
            return  # not in training, or just cut
        updates = self._updates() - self._updates_before
        optimizer = find_geolora(self.model.optimizer)
        if optimizer is not None and updates >= optimizer.cut_interval:
            optimizer.cut()
        self._updates_before = None

    def _updates(self):
        synchronize(self.model)
        return int(keras.ops.convert_to_numpy(self.model.optimizer.iterations))


class EpochCompaction(keras.callbacks.Callback):
    """Cuts the buffers of adapters to their ranks, at the end of epochs.

    Training then goes on with smaller adapters, exactly where it was. What is
    compiled compiles anew, so it happens only where it saves enough.
    Checkpoints of before and after fit a model with either buffers.

    Args:
        multiple: Int, as in `keras_geolora.compact_geolora`. Defaults to 8.
        min_saving: Float in [0, 1), the smallest share of the buffers for
            which it is done. Defaults to 0.25.
        verbose: 0 or 1, whether to say so. Defaults to 0.

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
        """Compacts, after the cut of the epoch."""
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


class SilentFailureGuard(keras.callbacks.Callback):
    """Warns after the first epoch of `fit` if nothing was learned.

    `fit` of a model with `enable_geolora` adds it by itself. It says so, in
    one sentence with the likely cause, when

    - an adapter has not moved,
    - the last layer, a `Dense`, is frozen and not adapted,
    - the loss has not changed.

    Example:

    ```python
    import warnings

    import keras
    import numpy as np
    import keras_geolora

    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    model.enable_geolora(rank=2)
    model.compile(keras_geolora.GeoLoRA(keras.optimizers.SGD(0.0)), loss="mse")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(np.ones((8, 8)), np.ones((8, 4)), verbose=0)
    assert any("learning rate" in str(w.message) for w in caught)
    ```
    """

    def __init__(self):
        super().__init__()
        self._cores = None
        self._first_loss = None

    def on_train_begin(self, logs=None):
        """Remembers where the adapters stand."""
        synchronize(self.model)
        self._cores = {
            path: core_of(layer)
            for path, layer in adapted_layers(self.model).items()
        }

    def on_train_batch_end(self, batch, logs=None):
        """Remembers the loss of the first batch."""
        if batch == 0 and self._cores is not None and logs:
            self._first_loss = float(logs.get("loss", np.nan))

    def on_epoch_end(self, epoch, logs=None):
        """Compares, once."""
        if self._cores is None:
            return
        synchronize(self.model)
        layers = adapted_layers(self.model)
        still = [
            path
            for path, core in self._cores.items()
            if path in layers and is_same(core, core_of(layers[path]))
        ]
        moved = len(self._cores) - len(still)
        batches = (self.params or {}).get("steps") or 0
        loss = (logs or {}).get("loss", np.nan)
        for message in (
            self._about_adapters(still, moved),
            self._about_the_head(),
            self._about_the_loss(loss, batches) if moved else None,
        ):
            if message:
                warnings.warn(message, stacklevel=2)
        self._cores = None

    def _about_adapters(self, still, moved):
        if not still:
            return None
        if not moved:
            return (
                f"None of the {len(still)} adapters has moved in the first "
                "epoch: look at the learning rate, at `skipped_steps` in the "
                "logs (steps that were not finite), and whether the loss "
                "depends on the adapted layers."
            )
        return (
            f"{len(still)} of {len(still) + moved} adapters have not moved in "
            f"the first epoch ({', '.join(still[:3])}"
            f"{', ...' if len(still) > 3 else ''}): the loss does not seem to "
            "depend on these layers, which `exclude` would leave out."
        )

    def _about_the_head(self):
        for output in getattr(self.model, "outputs", None) or []:
            layer = output._keras_history.operation
            if (
                isinstance(layer, keras.layers.Dense)
                and not layer.trainable_variables
                and not getattr(layer, "is_adapted", False)
            ):
                return (
                    f"The last layer, '{layer.name}', is frozen and not "
                    "adapted: if it is a new head, name it in "
                    "`enable_geolora(modules_to_save=...)`."
                )
        return None

    def _about_the_loss(self, loss, batches):
        if batches < 2 or self._first_loss is None:
            return None
        if not np.isclose(loss, self._first_loss, rtol=1e-6, atol=0):
            return None
        return (
            f"The loss has not changed in the first epoch (it is {loss:.6g}): "
            "look whether the labels vary, and whether `from_logits` of the "
            "loss fits the last activation."
        )


def synchronize(model):
    """Brings the weights up to date.

    The JAX trainer keeps the weights to itself between two batches.
    """
    if hasattr(model, "jax_state_sync"):
        model.jax_state_sync()


def core_of(layer):
    """Returns `S` of an adapted layer as an array."""
    return np.array(keras.ops.convert_to_numpy(layer.adapter.S))


def is_same(core, other):
    """Says whether two cores differ by rounding errors only."""
    return np.linalg.norm(other - core) <= 1e-6 * np.linalg.norm(core)
