"""Ranks and the health of adapters in TensorBoard."""

import os
import time

import keras
import numpy as np

from keras_geolora.callbacks.reading import IntervalCallback, updates_of
from keras_geolora.layers.tree import adapted_layers
from keras_geolora.optimizer.geolora import find_geolora
from keras_geolora.viewing.summary import describe


class RankTensorBoard(IntervalCallback):
    """Writes ranks and the health of adapters for TensorBoard.

    It writes to the folder `geolora` of `log_dir`, beside `train` and
    `validation` of `keras.callbacks.TensorBoard`:

    - before the first batch, every `interval` batches and at the end of every
      epoch: `geolora/mean_rank`, `geolora/total_rank`, `geolora/parameters`
      at these ranks, `geolora/skipped_steps`, and `rank/` of every layer,
    - at the end of every epoch, for every layer: `discarded_share/`, the share
      of the norm of its update that the last truncation discarded, and
      `orthogonality_error/`, which should stay below 1e-5,
    - every `histogram_freq` epochs: histograms of `singular_values/` of
      every layer.

    The step is the number of updates. Training that is resumed continues in
    the same folder; later steps that another run wrote are hidden.

    The files are written by `tensorboardX`, which needs no backend:
    `pip install "keras_geolora[tensorboard]"`. View them with
    `tensorboard --logdir logs`.

    Args:
        log_dir: String or path of a folder, that of
            `keras.callbacks.TensorBoard` for example. Defaults to `"logs"`.
        interval: Int, number of batches between two readings. Each of them
            waits for the device and copies a basis of every layer. Defaults
            to 20, the most steps for which `GeoLoRA` keeps ranks by default.
        histogram_freq: Int, number of epochs between two histograms; 0 for
            none. Defaults to 1.

    Example:

    ```python
    import keras
    import numpy as np
    import keras_geolora

    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    model.enable_geolora(rank=2)
    model.compile(keras_geolora.GeoLoRA("adam"), loss="mse")
    board = keras_geolora.callbacks.RankTensorBoard("logs")
    model.fit(np.ones((8, 8)), np.ones((8, 4)), callbacks=[board], verbose=0)
    ```
    """

    def __init__(self, log_dir="logs", interval=20, histogram_freq=1):
        super().__init__(interval)
        if not isinstance(histogram_freq, int) or histogram_freq < 0:
            raise ValueError(
                "`histogram_freq` counts the epochs between two histograms, "
                "so it must be a positive integer, or 0 for none. "
                f"Received: histogram_freq={histogram_freq!r}"
            )
        summary_writer()
        self.log_dir = log_dir
        self.histogram_freq = histogram_freq
        self._writer = None

    def on_train_begin(self, logs=None):
        """Starts a new file, also after an interrupted training."""
        super().on_train_begin(logs)
        self._close()

    def read(self, step):
        """Writes the ranks."""
        writer = self._writer_at(step)
        layers = adapted_layers(self.model)
        # Of experts there are several in a layer.
        ranks = {path: layer.adapter.ranks for path, layer in layers.items()}
        parameters = sum(
            int(ranks[path].sum()) * layer.adapter.parameters_per_rank
            for path, layer in layers.items()
        )
        total = sum(int(x.sum()) for x in ranks.values())
        count = sum(map(len, ranks.values()))
        writer.add_scalar("geolora/mean_rank", total / max(count, 1), step)
        writer.add_scalar("geolora/total_rank", total, step)
        writer.add_scalar("geolora/parameters", parameters, step)
        optimizer = find_geolora(self.model.optimizer)
        if optimizer is not None and optimizer.built:
            skipped = keras.ops.convert_to_numpy(optimizer.skipped_steps)
            writer.add_scalar("geolora/skipped_steps", int(skipped), step)
        for path, found in ranks.items():
            writer.add_scalar(f"rank/{path}", float(found.mean()), step)

    def on_epoch_end(self, epoch, logs=None):
        """Writes the ranks, and the values that are slower to read."""
        super().on_epoch_end(epoch, logs)
        step = updates_of(self.model)
        writer = self._writer_at(step)
        histograms = self.histogram_freq and epoch % self.histogram_freq == 0
        optimizer = find_geolora(self.model.optimizer)
        for path, layer in adapted_layers(self.model).items():
            row = describe(path, layer.adapter, optimizer)
            for name in ("discarded_share", "orthogonality_error"):
                if row[name] is not None:
                    writer.add_scalar(f"{name}/{path}", row[name], step)
            if histograms:
                sigma = np.array(row["singular_values"])
                writer.add_histogram(f"singular_values/{path}", sigma, step)
        writer.flush()

    def on_train_end(self, logs=None):
        """Closes the file."""
        self._close()

    def _writer_at(self, step):
        if self._writer is None:
            self._writer = summary_writer()(
                os.path.join(self.log_dir, "geolora"),
                purge_step=step,
                # Two files of the same second need different names.
                filename_suffix=f".{time.time_ns()}",
            )
        return self._writer

    def _close(self):
        if self._writer is not None:
            self._writer.close()
        self._writer = None


def summary_writer():
    """Returns the class that writes event files."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ModuleNotFoundError(
            "Files for TensorBoard are written by tensorboardX. Run: "
            '`pip install "keras_geolora[tensorboard]"`'
        ) from error
    return SummaryWriter
