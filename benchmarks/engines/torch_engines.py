"""PyTorch: DistributedDataParallel, with gloo."""

import os

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import (
    allreduce_hook,
)

from engines.single import Single
from keras_geolora.optimizer.geolora import find_geolora


class DDP(Single):
    """One process for each replica, which reads its share of every batch."""

    def __init__(self, args):
        host, port = args.address.split(":")
        os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": port}
        dist.init_process_group(
            "gloo", rank=args.process, world_size=args.replicas
        )
        torch.set_num_threads(1)

    @staticmethod
    def processes(replicas):
        return replicas

    def fit(self, model, x, y, batch):
        optimizer, variables = model.optimizer, model.trainable_variables
        for loss in losses(model, x, y, batch):
            model.zero_grad()
            # Averages the gradients of all processes.
            optimizer.scale_loss(loss).backward()
            gradients = [v.value.grad for v in variables]
            with torch.no_grad():
                optimizer.apply(gradients, variables)
        find_geolora(optimizer).cut()  # as `fit` does after an epoch

    def replicas(self, variable):
        return {dist.get_rank(): variable.value.detach().numpy()}

    def exchanged(self, model, x, y, batch):
        sizes = []

        def count(state, bucket):
            sizes.append(bucket.buffer().nbytes)
            return allreduce_hook(state, bucket)

        steps = losses(model, x, y, batch, hook=count)
        next(steps).backward()  # while `steps` keeps what reduces
        model.zero_grad()
        return sizes

    def close(self):
        dist.destroy_process_group()


def losses(model, x, y, batch, hook=None):
    """Yields the loss of each batch on the rows of this process."""
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    if hook is not None:
        parallel.register_comm_hook(None, hook)
    count, rank = dist.get_world_size(), dist.get_rank()
    for first in range(0, len(x), batch):
        own = np.arange(first, first + batch).reshape(count, -1)[rank]
        predicted = parallel(torch.tensor(x[own]))
        yield torch.nn.functional.mse_loss(predicted, torch.tensor(y[own]))


ENGINES = {"single": Single, "ddp": DDP}
