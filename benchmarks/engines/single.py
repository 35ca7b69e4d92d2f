"""Training on one replica, which needs no engine."""

import contextlib

from keras import ops


class Single:
    """One replica, in one process."""

    def __init__(self, args):
        del args

    @staticmethod
    def processes(replicas):
        if replicas != 1:
            raise SystemExit("Engine 'single' has one replica.")
        return 1

    def scope(self):
        return contextlib.nullcontext()

    def fit(self, model, x, y, batch):
        model.fit(x, y, batch, shuffle=False, verbose=0)

    def replicas(self, variable):
        return {0: ops.convert_to_numpy(variable.value)}

    def exchanged(self, model, x, y, batch):
        del model, x, y, batch
        return []

    def close(self):
        pass
