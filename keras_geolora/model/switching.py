"""Disables, activates, deletes and combines the adapters of a model."""

import contextlib

import numpy as np

from keras_geolora.distribution import tf_replicas
from keras_geolora.geometry import low_rank_sum
from keras_geolora.layers.adapter import check_rank
from keras_geolora.layers.factor import each_trimmed, stacked
from keras_geolora.layers.tree import layers_with_adapters
from keras_geolora.model.adapted_model import warn_of_what_stays
from keras_geolora.model.checks import (
    check_adapted,
    check_model,
    check_name,
    check_not_suspended,
)
from keras_geolora.model.compiled_functions import (
    after_a_change,
    swap_functions,
)
from keras_geolora.model.parts import adaptations_of
from keras_geolora.model.substitution import is_traced


@contextlib.contextmanager
def geolora_disabled(model):
    """Restores the pretrained model for the length of a `with` block.

    Outputs are those of the model before `enable_geolora`, bit for bit:
    adapters are disabled, and what trained beside them has its former values.
    This covers calls, `predict` and `evaluate` of the model on which it is
    called. Variables that you made trainable after `enable_geolora` keep their
    values, with a warning. After the block everything is as it was.

    Also a method of every `keras.Model`: `with model.geolora_disabled():`.

    Args:
        model: `keras.Model` with adapters of `enable_geolora`, its own or those
            of models inside.

    Raises:
        TypeError: If `model` is not a `keras.Model`.
        ValueError: If no part of the model was adapted by `enable_geolora`.

    Example:

    ```python
    import keras
    import numpy as np
    import keras_geolora

    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    x = np.ones((4, 8), "float32")
    pretrained = model.predict(x, verbose=0)
    model.enable_geolora(rank=2)
    model.compile(keras_geolora.GeoLoRA("adam"), loss="mse")
    model.fit(x, np.ones((4, 4)), verbose=0)
    with model.geolora_disabled():
        np.testing.assert_array_equal(model.predict(x, verbose=0), pretrained)
    assert not np.array_equal(model.predict(x, verbose=0), pretrained)
    ```
    """
    check_model(model)
    adaptations = find_adaptations(model)
    awake = [a for a in adaptations if not a.suspended]
    # The context manager is between this function and its caller.
    warn_of_what_stays(awake, stacklevel=4)
    with contextlib.ExitStack() as stack:
        for adaptation in adaptations:
            stack.enter_context(adaptation.suspension())
        if not in_a_trace(model):
            stack.enter_context(functions_of_the_pretrained(model))
        yield model


def in_a_trace(model):
    """Returns whether a function of a model is being traced."""
    layer = next(iter(layers_with_adapters(model).values()))
    adapter = next(iter(layer.adapters_by_name().values()))
    return is_traced(adapter.S)


@contextlib.contextmanager
def functions_of_the_pretrained(model):
    """Exchanges compiled functions for those of the pretrained model."""
    if getattr(model, "geolora_is_disabled", False):
        yield
        return
    others = vars(model).pop("geolora_disabled_traces", None)
    traced = swap_functions(model, others.functions if others else {})
    # If these stayed alive, JAX would mistake them for those made next.
    del others
    model.geolora_is_disabled = True
    try:
        yield
    finally:
        del model.geolora_is_disabled
        functions = swap_functions(model, traced)
        model.geolora_disabled_traces = Traces(functions)


class Traces:
    """Hides compiled functions from the backend's tracking.

    Args:
        functions: Dict of `swap_functions`.
    """

    def __init__(self, functions):
        self.functions = functions


def geolora_adapters(model):
    """Returns the names of all adapters, the active one first.

    Also a method of every `keras.Model`: `model.geolora_adapters()`.

    Args:
        model: `keras.Model`.

    Returns:
        List of strings; empty for a model that is not adapted.

    Example:

    ```python
    import keras
    import keras_geolora

    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    model.enable_geolora(rank=2, name="french")
    model.enable_geolora(rank=2, name="german")
    assert model.geolora_adapters() == ["german", "french"]
    ```
    """
    check_model(model)
    adaptations = adaptations_of(model)
    active = [adaptation.active for adaptation in adaptations]
    others = [
        name for adaptation in adaptations for name in adaptation.adapters
    ]
    return list(dict.fromkeys(active + others))


def activate_geolora(model, name):
    """Activates an adapter: it acts and trains, the others do not.

    What trained beside the adapters, such as biases, `modules_to_save` and
    the head of a KerasHub task, belongs to each adapter and changes with it.
    What `compile` set for another adapter is removed: compile the model again
    before you evaluate or train it.

    Also a method of every `keras.Model`: `model.activate_geolora(name)`.

    Args:
        model: `keras.Model` with adapters.
        name: String, the name of an adapter.

    Returns:
        The model itself.

    Raises:
        TypeError: If `model` is not a `keras.Model`.
        ValueError: If there is no adapter of this name.

    Example:

    ```python
    import keras
    import keras_geolora

    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    model.enable_geolora(rank=2, name="french")
    model.enable_geolora(rank=3, name="german")
    model.activate_geolora("french")
    assert model.layers[0].rank == 2
    ```
    """
    check_model(model)
    adaptations = adaptations_with(model, name)
    check_not_suspended(adaptations)
    for adaptation in adaptations:
        adaptation.activate(name)
    after_a_change(model)
    return model


def delete_geolora(model, name):
    """Deletes an adapter that is not active.

    Also a method of every `keras.Model`: `model.delete_geolora(name)`.

    Args:
        model: `keras.Model` with adapters.
        name: String, the name of an adapter.

    Returns:
        The model itself.

    Raises:
        TypeError: If `model` is not a `keras.Model`.
        ValueError: If there is no adapter of this name, or it is active.

    Example:

    ```python
    import keras
    import keras_geolora

    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    model.enable_geolora(rank=2, name="french")
    model.enable_geolora(rank=2, name="german")
    model.delete_geolora("french")
    assert model.geolora_adapters() == ["german"]
    ```
    """
    check_model(model)
    adaptations = adaptations_with(model, name)
    check_not_suspended(adaptations)
    for adaptation in adaptations:
        if adaptation.active == name:
            others = sorted(set(adaptation.adapters) - {name})
            raise ValueError(
                "The active adapter cannot be deleted. "
                + (
                    f"Activate one of {others} first: "
                    f"`model.activate_geolora('{others[0]}')`. "
                    if others
                    else "It is the only one; remove it with "
                    "`model.remove_geolora()`. "
                )
                + f"Received: name='{name}'"
            )
    for adaptation in adaptations:
        adaptation.delete(name)
    after_a_change(model)
    return model


def combine_geolora(model, name, weights, rank=None):
    """Adds a weighted sum of adapters as a new one, and activates it.

    The update of every layer is the best approximation, of the given rank, of
    the weighted sum of its updates; the sum itself is never formed. What
    trained beside the adapters is summed in the same way, as differences from
    the pretrained values; statistics, such as moving variances, are averaged.

    Also a method of every `keras.Model`.

    Args:
        model: `keras.Model` with adapters.
        name: String, the name of the new adapter.
        weights: Dict from the names of adapters to floats.
        rank: Int or `None`, the rank to truncate to. `None`, the default,
            keeps the sum exactly, as far as kernels allow.

    Returns:
        The model itself.

    Raises:
        TypeError: If `model` is not a `keras.Model`.
        ValueError: If an adapter does not exist, the new name is taken, or a
            weight is not finite.

    Example:

    ```python
    import keras
    import keras_geolora

    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    model.enable_geolora(rank=2, name="french")
    model.enable_geolora(rank=2, name="german")
    model.combine_geolora("swiss", {"french": 0.3, "german": 0.7}, rank=2)
    assert model.geolora_adapters()[0] == "swiss"
    ```
    """
    check_model(model)
    check_name(name)
    check_weights(weights)
    if rank is not None:
        check_rank("rank", rank, 1, float("inf"))
    adaptations = [adaptations_with(model, other) for other in weights]
    if any(found != adaptations[0] for found in adaptations):
        raise ValueError(
            "Only adapters on the same parts of a model can be combined. "
            f"Received: weights={weights!r}"
        )
    check_not_suspended(adaptations[0])
    for adaptation in adaptations[0]:
        if name in adaptation.adapters:
            raise ValueError(
                "Every adapter of a model needs its own name. Choose another "
                "`name`, or delete the existing adapter with "
                f"`model.delete_geolora('{name}')`. Received: name='{name}'"
            )
    with tf_replicas.strategy_scope_of(model):
        for adaptation in adaptations[0]:
            combine(adaptation, name, weights, rank)
    after_a_change(model)
    return model


def combine(adaptation, name, weights, rank):
    """Adds the weighted sum of adapters to an `Adaptation`."""
    adapters = [adaptation.adapters[other] for other in weights]
    train_bias = any(adapter.train_bias for adapter in adapters)
    layers, saved, co_trained = {}, {}, {}
    for adapter in adapters:
        layers.update(adapter.layers)
        saved.update((id(layer), layer) for layer in adapter.saved_layers)
        co_trained.update((id(v), v) for v in adapter.co_trained)
    # Everything that can fail comes first.
    sums = {
        path: weighted_sum(layer, weights, rank)
        for path, layer in layers.items()
    }
    known = {other: adaptation.values(other) for other in weights}
    values = {
        key: combined_value(adaptation, variable, known, weights)
        for key, variable in co_trained.items()
    }

    adaptation.resume()
    layers_of_sum, saved_layers = list(layers.values()), list(saved.values())
    with adaptation.keeping_manual_changes(but=[*layers_of_sum, *saved_layers]):
        for path, layer in layers.items():
            rank = sums[path][1].shape[-1]
            type(layer).adapt(layer, name, rank=rank, max_rank=rank, min_rank=1)
            layer.adapter.assign_factors(*sums[path])
        adaptation.add(name, layers_of_sum, saved_layers, train_bias)
    for key, variable in co_trained.items():
        variable.assign(values[key])


def combined_value(adaptation, variable, known, weights):
    """Returns the value of a co-trained variable in a weighted sum of adapters.

    This is its pretrained value plus the weighted sum of the changes.
    Statistics, which do not train, are averaged instead: a sum could make a
    variance negative.
    """
    pretrained = adaptation.pretrained(variable)
    pairs = [
        (weight, known[other][id(variable)])
        for other, weight in weights.items()
        if id(variable) in known[other]
    ]
    if adaptation.is_statistic(variable):
        shares = np.abs([weight for weight, _ in pairs])
        if shares.sum() == 0:
            return pretrained
        return np.average([v for _, v in pairs], axis=0, weights=shares)
    return pretrained + sum(w * (value - pretrained) for w, value in pairs)


def weighted_sum(layer, weights, rank):
    """Returns the factors of a weighted sum of updates, as arrays."""
    adapters = [
        (weight, layer.adapters_by_name()[other])
        for other, weight in weights.items()
        if other in layer.adapter_names
    ]
    products = []
    for weight, adapter in adapters:
        U, S, V = each_trimmed(adapter.factors_as_arrays())
        products.append((U, weight * adapter.scale * S.astype("float64"), V))
    if not all(np.isfinite(x).all() for product in products for x in product):
        raise ValueError(
            "Only finite updates can be combined. Received: a non-finite "
            f"update of layer '{layer.path}'. Nothing was combined."
        )

    def factors_of_sum(products):
        U, sigma, V = low_rank_sum.svd_of_sum(products, rank)
        return U, np.diag(sigma), V

    count = adapters[0][1].count
    if count is None:
        return factors_of_sum(products)
    return stacked(
        [
            factors_of_sum([[x[i] for x in product] for product in products])
            for i in range(count)
        ]
    )


def check_weights(weights):
    """Refuses weights that are not finite numbers for adapters."""
    numbers = list(weights.values()) if isinstance(weights, dict) else []
    if not numbers or not all(
        isinstance(w, (int, float)) and np.isfinite(w) for w in numbers
    ):
        raise ValueError(
            "`weights` must map adapter names to finite numbers, for example "
            f"`{{'a': 0.5, 'b': 0.5}}`. Received: weights={weights!r}"
        )


def find_adaptations(model):
    """Returns the `Adaptation`s of the parts of a model."""
    check_adapted(model, "switched between adapters")
    found = adaptations_of(model)
    if not found:
        raise ValueError(
            "Adapters created by layer constructors have no names and cannot "
            "be switched; only those of `model.enable_geolora()` can. "
            f"Received: model '{model.name}'"
        )
    return found


def adaptations_with(model, name):
    """Returns those of `find_adaptations` that have a given adapter."""
    found = find_adaptations(model)
    with_name = [a for a in found if name in a.adapters]
    if not with_name:
        known = sorted({n for a in found for n in a.adapters})
        raise ValueError(
            f"There is no adapter with this name. Received: name={name!r}; "
            f"the adapters of model '{model.name}' are {known}"
        )
    return with_name
