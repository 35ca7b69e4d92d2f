"""Serves a SavedModel by KServe's model server, in TF Serving's REST shape.

    python examples/kserve_server.py serving/movies/1 --model_name=movies

Runs in an environment with `kserve` and `tensorflow`; `serve_rest.py` makes
one and starts this.
"""

import argparse

import kserve
import numpy as np
import tensorflow as tf


class SavedModel(kserve.Model):
    """Answers `{"instances": [row, ...]}` with `{"predictions": [...]}`."""

    def __init__(self, name, folder):
        super().__init__(name)
        self.loaded = tf.saved_model.load(folder)
        self.signature = self.loaded.signatures["serving_default"]
        self.ready = True

    def predict(self, payload, headers=None):
        """Answers one request, columns of TF Serving's "row format"."""
        rows = payload["instances"]
        _, inputs = self.signature.structured_input_signature
        columns = {
            name: tf.constant(
                np.array([row[name] for row in rows]), dtype=spec.dtype
            )
            for name, spec in inputs.items()
        }
        (output,) = self.signature(**columns).values()
        return {"predictions": output.numpy().tolist()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(parents=[kserve.model_server.parser])
    parser.add_argument("folder", help="the folder of one version")
    args, _ = parser.parse_known_args()
    kserve.ModelServer().start([SavedModel(args.model_name, args.folder)])
