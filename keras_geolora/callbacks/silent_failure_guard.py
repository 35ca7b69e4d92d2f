"""Warnings if nothing is learned."""

import warnings

import keras
import numpy as np

from keras_geolora.callbacks.reading import synchronize
from keras_geolora.keras_internals import layer_of
from keras_geolora.layers.tree import adapted_layers


class SilentFailureGuard(keras.callbacks.Callback):
    """Warns after the first epoch of `fit` if nothing was learned.

    `fit` of a model with `enable_geolora` adds it automatically. It warns, in
    one sentence with the likely cause, if

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
        self._losses = 0
        self._waits = False

    def on_train_begin(self, logs=None):
        """Waits for the first epoch: other callbacks may load a checkpoint."""
        self._waits = True

    def on_epoch_begin(self, epoch, logs=None):
        """Records the singular values of the adapters, once."""
        if not self._waits:
            return
        self._waits = False
        synchronize(self.model)
        layers = adapted_layers(self.model)
        # Frozen adapters are not meant to move, unless all are frozen.
        train = {p: x for p, x in layers.items() if x.adapter.trainable}
        self._cores = {
            path: core_of(layer) for path, layer in (train or layers).items()
        }
        self._losses = 0

    def on_train_batch_end(self, batch, logs=None):
        """Records the first loss of the first epoch."""
        if self._cores is None or not logs:
            return
        self._losses += 1
        if self._losses == 1:
            self._first_loss = float(logs.get("loss", np.nan))

    def on_epoch_end(self, epoch, logs=None):
        """Compares and warns, once."""
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
        loss = (logs or {}).get("loss", np.nan)
        for message in (
            self._about_adapters(still, moved),
            self._about_the_head(),
            self._about_the_loss(loss) if moved else None,
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
                "epoch: check the learning rate, `skipped_steps` in the logs "
                "(steps that were not finite), and whether the loss depends "
                "on the adapted layers."
            )
        return (
            f"{len(still)} of {len(still) + moved} adapters have not moved in "
            f"the first epoch ({', '.join(still[:3])}"
            f"{', ...' if len(still) > 3 else ''}): the loss does not seem to "
            "depend on these layers. Leave them out with `exclude`."
        )

    def _about_the_head(self):
        for output in getattr(self.model, "outputs", None) or []:
            layer = layer_of(output)
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

    def _about_the_loss(self, loss):
        if self._losses < 2:
            return None
        if not np.isclose(loss, self._first_loss, rtol=1e-6, atol=0):
            return None
        return (
            f"The loss has not changed in the first epoch (it is {loss:.6g}): "
            "check whether the labels vary, and whether `from_logits` of the "
            "loss matches the last activation."
        )


def core_of(layer):
    """Returns the singular values of an adapted layer, or of each expert."""
    core = layer.adapter.trimmed()[1]
    return np.diagonal(core, axis1=-2, axis2=-1).copy()


def is_same(core, other):
    """Returns whether two cores differ by rounding errors only.

    Their widths may differ, if the buffers were resized.
    """
    width = max(core.shape[-1], other.shape[-1])
    core, other = (
        np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])
        for x in (core, other)
    )
    return np.linalg.norm(other - core) <= 1e-6 * np.linalg.norm(core)
