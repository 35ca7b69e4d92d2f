"""Averages what several clients learned, for federated training."""

import os

import keras
import numpy as np

from keras_geolora.files.adapter_file import adaptation_to_save
from keras_geolora.files.adapter_format import AdapterFileError, read_adapter
from keras_geolora.files.fit import Fit
from keras_geolora.geometry import manifold
from keras_geolora.geometry.low_rank_sum import svd_of_sum
from keras_geolora.layers.adapter import check_rank
from keras_geolora.layers.factor import (
    by_matrix,
    each_trimmed,
    factor_of,
    fit_together,
    stacked,
)
from keras_geolora.layers.tree import (
    carries_adapters,
    inside,
    is_leaf,
)
from keras_geolora.model.checks import check_model, check_not_suspended
from keras_geolora.model.compiled_functions import after_other_factors
from keras_geolora.model.substitution import value_of


def average_geolora(model, clients, weights=None, rank=None):
    """Gives the active adapter the weighted mean of what clients learned.

    Averaging the factors themselves would be meaningless. This averages the
    updates `U S V.T`, truncated to the best approximation of a rank, without
    forming them. Biases, `modules_to_save`, heads and whatever else trained are
    averaged directly.

    Compile the model again before further training: the state of the optimizer
    belongs to other bases. Also a method of every `keras.Model`:
    `model.average_geolora(clients)`.

    Args:
        model: `keras.Model` on which `enable_geolora` was called.
        clients: List with an entry per client: the path of a file of
            `save_geolora`, or the list of arrays from `get_weights` of a model
            that was adapted in the same way. Ranks and buffer widths may
            differ.
        weights: List of a number of at least 0 per client, such as its number
            of examples. Only their proportions matter. Defaults to equal
            weights.
        rank: Int, the rank to truncate means to, capped at `max_rank`. Defaults
            to `None`, which means `max_rank`.

    Returns:
        The model itself.

    Raises:
        TypeError: If `model` is not a `keras.Model`, or `rank` not an integer.
        ValueError: If a client does not fit the model, its factors are invalid,
            or a weight is below 0. The model is unchanged then.
        OSError: If there is no such file.

    Example:

    ```python
    import keras
    import numpy as np
    import keras_geolora

    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    model.enable_geolora(rank=2)
    x = np.random.default_rng(0).normal(size=(64, 8)).astype("float32")
    start, clients, updates = model.get_weights(), [], []
    for part in (slice(0, 32), slice(32, 64)):
        model.set_weights(start)
        model.compile(keras_geolora.GeoLoRA("adam"), loss="mse")
        model.fit(x[part], x[part, :4], verbose=0)
        clients.append(model.get_weights())
        updates.append(keras.ops.convert_to_numpy(model.layers[0].delta()))
    model.average_geolora(clients, weights=[1, 3])
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(model.layers[0].delta()),
        0.25 * updates[0] + 0.75 * updates[1],
        atol=1e-6,
    )
    ```
    """
    check_model(model)
    adaptation = adaptation_to_save(model)
    check_not_suspended([adaptation])
    shares = shares_of(clients, weights)
    if rank is not None:
        check_rank("rank", rank, 1, float("inf"))
    read = [read_client(model, i, client) for i, client in enumerate(clients)]
    adapters = {
        path: layer.adapters_by_name()[adaptation.active]
        for path, layer in adaptation.adapters[adaptation.active].layers.items()
    }
    # Everything that can fail comes first.
    factors = {
        path: mean_factors(
            adapter, [client.factors[path] for client in read], shares, rank
        )
        for path, adapter in adapters.items()
    }
    values = mean_values([client.values for client in read], shares)

    for path, adapter in adapters.items():
        adapter.assign_factors(*factors[path])
    for variable, value in values:
        variable.assign(value)
    after_other_factors(model)
    return model


class Client:
    """What a client learned.

    Attributes:
        factors: Dict from the path of a layer to `U`, `S` and `V`. Given
            with `P` and `Q`, too, where they come from weights.
        values: List of pairs of a variable other than factors and its value.
    """

    def __init__(self, factors, values, name):
        self.values = values
        for arrays in factors.values():
            if not fit_together(*arrays):
                raise ValueError(
                    "The shapes of a client's factors must fit together. "
                    f"{name}"
                )
        for path, arrays in factors.items():
            manifold.check_factors(
                by_matrix(path, arrays), f"{name} Nothing was averaged."
            )
        self.factors = {
            path: arrays if len(arrays) == 3 else each_trimmed(arrays)
            for path, arrays in factors.items()
        }


def read_client(model, index, client):
    """Returns the `Client` for a path or a list of arrays."""
    if isinstance(client, (str, os.PathLike)):
        return client_of_file(model, client)
    return client_of_weights(model, index, client)


def client_of_file(model, path):
    """Reads a client from a file of `save_geolora`."""
    description, tensors = read_adapter(path)
    name = model.geolora_adaptation.active
    fit = Fit(model, name, description, tensors, any_rank=True)
    if fit.differences:
        listed = "\n".join(f"- {line}" for line in fit.differences)
        raise AdapterFileError(
            f"'{path}' does not fit adapter '{name}' of model '{model.name}':\n"
            f"{listed}\nNothing was averaged."
        )
    factors = {
        layer_path: [tensors[f"{layer_path}.{role}"] for role in "USV"]
        for layer_path in fit.layers
    }
    return Client(factors, fit.weights, f"These factors come from '{path}'.")


def client_of_weights(model, index, arrays):
    """Reads a client from what `get_weights` returned."""
    adaptation = model.geolora_adaptation
    variables = model.weights
    if not isinstance(arrays, (list, tuple)) or len(arrays) != len(variables):
        raise ValueError(
            "Each client must be the path of a file written by "
            f"`save_geolora`, or the list of the {len(variables)} arrays that "
            "`get_weights` returns for a model adapted like this one. "
            "Received: "
            + (
                f"{len(arrays)} arrays"
                if isinstance(arrays, (list, tuple))
                else f"{arrays!r} (of type {type(arrays).__name__})"
            )
            + f" as client {index}"
        )
    arrays = [np.asarray(x) for x in arrays]
    place = {id(v): i for i, v in enumerate(variables)}
    factors = {}
    for path, layer in adaptation.adapters[adaptation.active].layers.items():
        adapter = layer.adapters_by_name()[adaptation.active]
        factors[path] = [arrays[place[id(v)]] for v in adapter.factors]
    learned = what_learns(model)
    values = []
    for variable, value in zip(variables, arrays, strict=True):
        if factor_of(variable):
            continue
        if value.shape != tuple(variable.shape):
            raise ValueError(
                "The weights of a client must have the same shapes as those "
                f"of the model. Received: {value.shape} for '{variable.path}' "
                f"of shape {tuple(variable.shape)}, from client {index}"
            )
        if id(variable) in learned:
            values.append((variable, value))
        elif not np.array_equal(value, value_of(variable)):
            raise ValueError(
                "Updates can only be averaged if they belong to the same "
                "frozen weights. Received: different values of "
                f"'{variable.path}' from client {index}"
            )
    return Client(factors, values, f"These factors come from client {index}.")


def what_learns(model):
    """Returns the ids of the variables that training changes, factors aside."""
    adaptation = model.geolora_adaptation
    learned = {id(v) for v in model.trainable_variables}
    learned |= {
        id(v) for v in adaptation.adapters[adaptation.active].co_trained
    }
    for layer in inside(model):
        # Statistics of a layer that the user made trainable.
        if is_leaf(layer) and layer.trainable and not carries_adapters(layer):
            learned |= {id(v) for v in layer.weights}
    return learned


def mean_factors(adapter, factors, shares, rank):
    """Returns `U`, `S` and `V` of the weighted mean of updates.

    Args:
        adapter: `LowRankAdapter` that will hold them.
        factors: List of `(U, S, V)` of the clients.
        shares: List of floats whose sum is 1.
        rank: Int or `None`.
    """
    shape = (*adapter.U.shape[:-1], adapter.output_dim)
    for U, _, V in factors:
        found = (*U.shape[:-1], V.shape[-2])
        if found != shape:
            raise ValueError(
                "The updates of a client must have the same shapes as those "
                f"of the model. Received: {found} for '{adapter.U.path}', "
                f"where the model has {shape}"
            )
    largest = adapter.max_rank if rank is None else min(rank, adapter.max_rank)

    def mean(factors):
        U, sigma, V = svd_of_sum(
            [
                (U, share * np.asarray(S, "float64"), V)
                for share, (U, S, V) in zip(shares, factors, strict=True)
            ],
            largest,
            adapter.min_rank,
        )
        return U, np.diag(sigma), V

    if adapter.count is None:
        return mean(factors)
    return stacked(
        [
            mean([[x[i] for x in arrays] for arrays in factors])
            for i in range(adapter.count)
        ]
    )


def mean_values(clients, shares):
    """Returns pairs of a variable and the weighted mean of its values.

    Args:
        clients: List of lists of such pairs.
        shares: List of floats whose sum is 1.
    """
    sums, variables = {}, {}
    for share, pairs in zip(shares, clients, strict=True):
        for variable, value in pairs:
            variables[id(variable)] = variable
            part = share * np.asarray(value, "float64")
            sums[id(variable)] = sums.get(id(variable), 0.0) + part
    return [
        (
            v,
            sums[key]
            if keras.backend.is_float_dtype(v.dtype)
            else np.rint(sums[key]),
        )
        for key, v in variables.items()
    ]


def shares_of(clients, weights):
    """Returns the shares of the clients in a mean."""
    if not isinstance(clients, (list, tuple)) or not clients:
        raise ValueError(
            "`clients` must be a list that holds, for each client, the path "
            "of a file written by `save_geolora` or the arrays of "
            f"`get_weights`. Received: clients={clients!r}"
        )
    if weights is None:
        weights = [1.0] * len(clients)
    numbers = np.asarray(weights)
    if (
        numbers.shape != (len(clients),)
        or numbers.dtype.kind not in "iuf"
        or not np.isfinite(numbers).all()
        or numbers.min() < 0
        or not numbers.any()
    ):
        raise ValueError(
            "`weights` must hold a number of at least 0 for each client, and "
            f"not all may be 0. Received: weights={weights!r} for "
            f"{len(clients)} clients"
        )
    return (numbers / numbers.sum()).tolist()
