"""Serves a SavedModel by KServe's model server, in TF Serving's REST shape.

    python examples/kserve_server.py serving/movies --model_name=movies

Serves the latest version in the folder, and takes up newer ones. Runs in an
environment with `kserve` and `tensorflow`; `serve_rest.py` makes one and starts
this.
"""

import argparse

import kserve
import numpy as np
import tensorflow as tf
from latest_version import LatestVersion


class SavedModel(kserve.Model):
    """Answers `{"instances": [row, ...]}` with `{"predictions": [...]}`."""

    def __init__(self, name, folder):
        super().__init__(name)
        self.latest = LatestVersion(folder)
        self.ready = True

    def predict(self, payload, headers=None):
        """Answers one request, columns of TF Serving's "row format"."""
        rows = payload["instances"]
        _, model = self.latest.loaded
        signature = model.signatures["serving_default"]
        _, inputs = signature.structured_input_signature
        columns = {
            name: tf.constant(
                np.array([row[name] for row in rows]), dtype=spec.dtype
            )
            for name, spec in inputs.items()
        }
        (output,) = signature(**columns).values()
        return {"predictions": output.numpy().tolist()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(parents=[kserve.model_server.parser])
    parser.add_argument("folder", help="the folder with the versions")
    args, _ = parser.parse_known_args()
    kserve.ModelServer().start([SavedModel(args.model_name, args.folder)])
