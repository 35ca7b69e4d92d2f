"""The width of the buffers of adapters."""

from keras_geolora.distribution import tf_replicas
from keras_geolora.keras_internals import variables_of
from keras_geolora.layers.tree import layers_with_adapters
from keras_geolora.model.checks import check_optimizer_is_new
from keras_geolora.model.compiled_functions import forget_traces
from keras_geolora.optimizer.geolora import find_geolora, rebuild, renewed
from keras_geolora.optimizer.of_model import optimizers_of


def settle(model, optimizer=None):
    """Returns the adapters that optimizers train to the manifold.

    Args:
        model: `keras.Model`.
        optimizer: As in `resize_buffers`.
    """
    for trainer in trainers_of(model, optimizer):
        find_geolora(trainer).settle()


def trainers_of(model, optimizer=None):
    """Returns the built optimizers that train the adapters of a model."""
    if optimizer is None:
        found = optimizers_of(model).values()
    else:
        check_optimizer_is_new(optimizer, model.trainable_variables)
        found = [optimizer]
    return [x for x in found if find_geolora(x) is not None and x.built]


def resize_buffers(model, max_ranks, optimizer=None):
    """Changes the widths of adapters' buffers and of their slots.

    Args:
        model: `keras.Model`.
        max_ranks: Dict from the ids of `LowRankAdapter`s to widths. Columns
            in use that do not fit are lost.
        optimizer: The optimizer that trains the model. Defaults to those of
            `compile`.
    """
    changes = [
        (layer, name, max_ranks[id(adapter)])
        for layer in layers_with_adapters(model).values()
        for name, adapter in layer.adapters_by_name().items()
        if max_ranks.get(id(adapter), adapter.max_rank) != adapter.max_rank
    ]
    if not changes:
        return
    found = trainers_of(model, optimizer)
    in_training = getattr(model, "train_function", None) is not None
    with tf_replicas.strategy_scope_of(model):
        optimizers = [(x, renewed(x)) for x in found]
        new_of = {}
        for layer, name, max_rank in changes:
            old = layer.adapters_by_name()[name]
            layer.resize_adapter(name, max_rank)
            new = layer.adapters_by_name()[name]
            new_of.update(
                (id(before), after)
                for before, after in zip(old.factors, new.factors, strict=True)
            )
        forget_traces(model)
        for optimizer, new in optimizers:
            known = variables_of(optimizer)
            rebuild(optimizer, new, [new_of.get(id(v), v) for v in known])
    if in_training:  # `fit` makes it before the first epoch only
        model.make_train_function(force=True)
