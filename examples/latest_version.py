"""The latest version of a SavedModel, in a folder that TF Serving watches."""

import contextlib
import pathlib
import threading
import time

import tensorflow as tf

# Knows the operations of graphs that take strings; others do without.
with contextlib.suppress(ImportError):
    import tensorflow_text  # noqa: F401


class LatestVersion:
    """Loads the latest version, and each newer one, as TF Serving does.

    It looks into the folder once a second, and loads before it switches.

    Args:
        folder: Path of the folder of the model, with a folder per version.
        poll_seconds: Float, how long to wait between two looks.

    Attributes:
        loaded: Pair of a version and its model. It is exchanged as a whole:
            whoever reads it once has both of one version.
    """

    def __init__(self, folder, poll_seconds=1.0):
        self.folder = pathlib.Path(folder)
        self.loaded = 0, None
        self.load()
        threading.Thread(
            target=self.watch, args=[poll_seconds], daemon=True
        ).start()

    def load(self):
        """Loads the latest version, unless it is the loaded one."""
        names = [x.name for x in self.folder.iterdir()]
        version = max((int(x) for x in names if x.isdecimal()), default=None)
        if version is None:
            raise FileNotFoundError(f"There is no version in '{self.folder}'.")
        if version != self.loaded[0]:
            model = tf.saved_model.load(str(self.folder / str(version)))
            self.loaded = version, model

    def watch(self, seconds):
        """Takes up newer versions, as long as the process lives."""
        while True:
            time.sleep(seconds)
            # A version may be deleted while it is looked at.
            with contextlib.suppress(OSError):
                self.load()
