"""Ranks during training."""

import os
import pathlib

from keras_geolora.callbacks.reading import IntervalCallback
from keras_geolora.layers.tree import adapted_layers
from keras_geolora.viewing.heat_map import check_can_draw
from keras_geolora.viewing.rank_table import read_ranks, write_ranks
from keras_geolora.viewing.summary import plot_ranks


class RankHistory(IntervalCallback):
    """Records the rank of every layer, and draws it as a heat map.

    Ranks are read before the first batch, every `interval` batches and at the
    end of every epoch, after its cut. Files are written atomically at the end
    of every epoch, so that an interrupted run has them.

    A second `fit` continues the same history. Training that is resumed in
    another process, by `keras.callbacks.BackupAndRestore` for example,
    continues the file. Training that starts at an earlier step, from scratch
    or from an older checkpoint, replaces the history from that step on.

    Args:
        filename: String or path of a CSV file, with a line for each step
            and a column for each layer. Optional.
        heat_map: String or path of a PNG file, see
            `keras_geolora.plot_ranks`. Optional; needs `matplotlib`.
        interval: Int, number of batches between two readings. Each of them
            waits for the device and copies a basis of every layer. Defaults
            to 20, the most steps for which `GeoLoRA` keeps ranks by default.

    Attributes:
        steps: List of ints, the number of updates at each reading.
        ranks: Dict from the path of a layer to a list of ranks, one for each
            reading; `None` where the layer had no adapter.

    Example:

    ```python
    import keras
    import numpy as np
    import keras_geolora

    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    model.enable_geolora(rank=2)
    model.compile(keras_geolora.GeoLoRA("adam"), loss="mse")
    history = keras_geolora.callbacks.RankHistory("ranks.csv", interval=2)
    x, y = np.ones((8, 8)), np.ones((8, 4))
    model.fit(x, y, batch_size=2, callbacks=[history], verbose=0)
    assert history.steps == [0, 2, 4]
    assert history.ranks[model.layers[0].name][0] == 2
    history.plot("ranks.png")
    ```
    """

    def __init__(self, filename=None, heat_map=None, interval=20):
        super().__init__(interval)
        if filename is not None:
            check_folder("filename", filename)
        if heat_map is not None:
            check_folder("heat_map", heat_map)
            check_can_draw(heat_map)
        self.filename = filename
        self.heat_map = heat_map
        self.steps = []
        self.ranks = {}

    def on_train_begin(self, logs=None):
        """Refuses a model without adapters."""
        super().on_train_begin(logs)
        if not adapted_layers(self.model):
            raise ValueError(
                "`RankHistory` reads the ranks of adapters; add them with "
                "`model.enable_geolora()`. Received: model "
                f"'{self.model.name}' without an adapted layer"
            )

    def read(self, step):
        """Reads the rank of every layer."""
        resumed = step > 0 and not self.steps and self.filename is not None
        if resumed and os.path.exists(self.filename):
            self.steps, self.ranks = read_ranks(self.filename)
        self._forget_from(step)
        found = {p: x.rank for p, x in adapted_layers(self.model).items()}
        for path in found:
            self.ranks.setdefault(path, [None] * len(self.steps))
        self.steps.append(step)
        for path, ranks in self.ranks.items():
            ranks.append(found.get(path))

    def on_epoch_end(self, epoch, logs=None):
        """Reads the ranks and writes the files."""
        super().on_epoch_end(epoch, logs)
        if self.filename is not None:
            write_ranks(self.filename, self.steps, self.ranks)
        if self.heat_map is not None:
            self.plot(self.heat_map)

    def plot(self, filename, title=None):
        """Draws the heat map, as `keras_geolora.plot_ranks` does.

        Args:
            filename: String or path of the PNG file to write.
            title: String. Optional.
        """
        plot_ranks(self, filename, title)

    def _forget_from(self, step):
        kept = sum(known < step for known in self.steps)
        self.steps = self.steps[:kept]
        self.ranks = {p: ranks[:kept] for p, ranks in self.ranks.items()}


def check_folder(argument, filename):
    """Refuses early a file that could not be written after an epoch."""
    folder = pathlib.Path(filename).absolute().parent
    if not os.access(folder, os.W_OK) or not folder.is_dir():
        raise ValueError(
            f"`{argument}` must be in an existing, writable folder; create "
            f"it first. Received: {argument}='{filename}'"
        )
