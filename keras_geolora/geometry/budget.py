"""Divides a budget of ranks or parameters among all layers.

Pure functions of arrays, like the integrator.
"""

from typing import NamedTuple

from keras import ops

from keras_geolora.geometry.integrator import count


class RankRequest(NamedTuple):
    """What all adapters of one shape ask for.

    | name       | shape    | meaning                                      |
    | ---------- | -------- | -------------------------------------------- |
    | `sigma`    | (n, r)   | singular values of the updates, descending   |
    | `wanted`   | (n, 1)   | the rank asked for, int                      |
    | `min_rank` | (n, 1)   | the guaranteed rank, int                     |
    | `cost`     | int      | the cost of a rank: 1, or its parameters     |
    """

    sigma: object
    wanted: object
    min_rank: object
    cost: int


def spend(budget, requests):
    """Keeps the most valuable singular values of all layers within a budget.

    The ranks that `min_rank` guarantees come first, then the largest values of
    `sigma ** 2 / cost`, as far as the budget goes. Ties are resolved column by
    column, so that layers whose updates are still zero share evenly.

    Args:
        budget: Int scalar, the largest allowed sum of `rank * cost` over all
            layers. It covers at least the guaranteed ranks.
        requests: List of `RankRequest`s.

    Returns:
        List of int arrays `(n, 1)`, the ranks of the layers of each request.
    """
    width = max(request.sigma.shape[-1] for request in requests)
    largest = ops.max(ops.stack([ops.max(x.sigma) for x in requests]))
    largest = ops.where(largest > 0, largest, 1.0)
    cheapest = min(request.cost for request in requests)
    values, costs = [], []
    for sigma, wanted, min_rank, cost in requests:
        column = ops.arange(sigma.shape[-1], dtype="int32")
        value = ops.square(sigma / largest) * (cheapest / cost)
        value = ops.where(column < min_rank, 2.0, value)
        value = ops.where(column < wanted, value, -1.0)
        padding = [(0, 0), (0, width - sigma.shape[-1])]
        values.append(ops.pad(value, padding, constant_values=-1.0))
        costs.append(ops.full(values[-1].shape, cost, dtype="int32"))
    # By columns: sorting is stable.
    values = ops.reshape(ops.transpose(ops.concatenate(values)), (-1,))
    costs = ops.reshape(ops.transpose(ops.concatenate(costs)), (-1,))
    asked = values >= 0
    order = ops.argsort(-values)
    costs = ops.where(asked, costs, 0)
    within = ops.cumsum(ops.take(costs, order)) <= budget
    kept = ops.logical_and(ops.take(within, ops.argsort(order)), asked)
    ranks = count(ops.transpose(ops.reshape(kept, (width, -1))))
    sizes = [request.sigma.shape[0] for request in requests]
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [
        ranks[end - size : end] for size, end in zip(sizes, ends, strict=True)
    ]
