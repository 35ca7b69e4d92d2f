"""PyTorch: DistributedDataParallel, with gloo."""

import os

import numpy as np
import torch
import torch.distributed as dist

from engines.single import Single
from keras_geolora.optimizer import find_geolora


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
        train(model, x, y, batch)

    def replicas(self, variable):
        return {dist.get_rank(): variable.value.detach().numpy()}

    def exchanged(self, model, x, y, batch):
        raise NotImplementedError

    def close(self):
        dist.destroy_process_group()


def train(model, x, y, batch):
    """Takes one pass over rows, each process on its share of a batch."""
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    optimizer, variables = model.optimizer, model.trainable_variables
    count, rank = dist.get_world_size(), dist.get_rank()
    for first in range(0, len(x), batch):
        own = np.arange(first, first + batch).reshape(count, -1)[rank]
        loss = torch.nn.functional.mse_loss(
            parallel(torch.tensor(x[own])), torch.tensor(y[own])
        )
        model.zero_grad()
        optimizer.scale_loss(loss).backward()  # and averages the gradients
        with torch.no_grad():
            optimizer.apply([v.value.grad for v in variables], variables)
    find_geolora(optimizer).cut()  # as `fit` does at the end of an epoch


ENGINES = {"single": Single, "ddp": DDP}
