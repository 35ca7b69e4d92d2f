"""Adapts whole models in place, and turns them back."""

import functools

import keras

from keras_geolora.callbacks import RankLogger
from keras_geolora.optimizer import GeoLoRA
from keras_geolora.targeting import (
    ADAPTED_CLASSES,
    adapted_layers,
    find_targets,
    matches,
    walk,
)


def enable_geolora(
    model,
    rank=8,
    *,
    max_rank=None,
    min_rank=1,
    targets="all-linear",
    exclude=None,
    scale=1.0,
    dropout=0.0,
    train_bias=False,
    seed=None,
):
    """Adapts a model in place: freezes it and adds low-rank adapters.

    Every matched layer keeps its place, its kernel and its bias, and becomes
    a `GeoLoRADense` or `GeoLoRAEinsumDense`. Outputs stay bit-identical until
    training moves the adapters. On a KerasHub task, that is a model with a
    `backbone`, only the backbone is frozen and adapted: the head trains as it
    is. Elsewhere what `exclude` names trains as it is.

    Also a method of every `keras.Model`: `model.enable_geolora(rank=8)`.
    Compile the model afterwards, with the optimizer wrapped in `GeoLoRA`.

    Args:
        model: Built `keras.Model`.
        rank: Int, rank of every adapter at the start. Training changes it;
            the result hardly depends on it. Defaults to 8.
        max_rank: Int or `None`, the largest rank, which sizes the buffers.
            Defaults to `2 * rank`, clipped to the smaller side of each
            kernel.
        min_rank: Int, the smallest rank. Defaults to 1.
        targets: Which layers: `"all-linear"` (the default: every `Dense` and
            `EinsumDense`), a layer's name, its path (names joined by `/`), a
            regular expression for the whole path, a layer class, a callable
            `(path, layer) -> bool`, or a list of these.
        exclude: As `targets`: which layers not to adapt, and not to freeze
            either, nor anything inside them. Defaults to `None`.
        scale: Float, constant strength of the updates. Defaults to 1.
        dropout: Float in [0, 1), dropout on the inputs of the updates.
            Defaults to 0.
        train_bias: Bool, whether the biases of adapted layers train.
            Defaults to `False`.
        seed: Int or `None`. An int makes the random bases repeatable; they
            differ between layers.

    Returns:
        The model itself.

    Raises:
        TypeError: If `model` is no `keras.Model`, or a rank no integer.
        ValueError: If the model is not built or adapted already, a rank does
            not fit, or no layer matches.

    Example:

    ```python
    import keras
    import numpy as np
    import keras_geolora

    model = keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(16, activation="relu", name="hidden"),
            keras.layers.Dense(2, name="head"),
        ]
    )
    x = np.ones((4, 8), "float32")
    before = model.predict(x, verbose=0)
    model.enable_geolora(rank=2, exclude="head")
    np.testing.assert_array_equal(model.predict(x, verbose=0), before)
    ```
    """
    check_model(model)
    check_unadapted(model)
    scope = getattr(model, "backbone", None)
    if not isinstance(scope, keras.layers.Layer):
        scope = model
    chosen = find_targets(scope, targets, exclude)
    frozen = Frozen(scope, exclude)
    adapted = []
    try:
        for index, layer in enumerate(chosen.values()):
            # Two seeds for the two bases of every layer.
            layer_seed = None if seed is None else seed + 2 * index
            ADAPTED_CLASSES[type(layer)].adapt(
                layer,
                train_bias=train_bias,
                rank=rank,
                max_rank=max_rank,
                min_rank=min_rank,
                scale=scale,
                dropout=dropout,
                seed=layer_seed,
            )
            adapted.append(layer)
    except Exception:
        for layer in adapted:
            layer.merge()
        frozen.thaw()
        raise
    model._geolora_frozen = frozen
    model.__class__ = adapted_class(type(model))
    forget_traces(model)
    return model


def merge_geolora(model):
    """Adds every update to its kernel and gives back plain Keras layers.

    The inverse of `enable_geolora`: the model has its former class, layers
    and trainable weights again, no adapters, and the outputs of the adapted
    model up to rounding. Compile it again before you train it further, and
    compile other models that contain it before you use them.

    Also a method of every `keras.Model`: `model.merge_geolora()`.

    Args:
        model: `keras.Model` with adapted layers.

    Returns:
        The model itself.

    Raises:
        TypeError: If `model` is no `keras.Model`.
        ValueError: If no layer of the model is adapted, or an update is not
            finite; the model is unchanged then.

    Example:

    ```python
    import keras
    import numpy as np
    import keras_geolora

    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    model.enable_geolora(rank=2)
    model.compile(keras_geolora.GeoLoRA("sgd"), loss="mse")
    x, y = np.ones((8, 8), "float32"), np.ones((8, 4), "float32")
    model.fit(x, y, verbose=0)
    adapted = model.predict(x, verbose=0)
    model.merge_geolora()
    np.testing.assert_allclose(model.predict(x, verbose=0), adapted, rtol=1e-5)
    assert type(model.layers[0]) is keras.layers.Dense
    ```
    """
    check_model(model)
    layers = adapted_layers(model)
    if not layers:
        raise ValueError(
            "Only a model with adapted layers can be merged; adapt it with "
            f"`model.enable_geolora()`. Received: model '{model.name}' "
            "without an adapted layer"
        )
    for path, layer in layers.items():
        if not bool(keras.ops.all(keras.ops.isfinite(layer.delta()))):
            raise ValueError(
                "Merging adds every update to its kernel, so all must be "
                f"finite. Received: a non-finite update of layer '{path}'. "
                "Nothing was merged."
            )
    for layer in layers.values():
        layer.merge()
    for part in [model, *(layer for _, layer in walk(model))]:
        if isinstance(part, AdaptedModel):
            part.__class__ = part.plain_class
            part._geolora_frozen.thaw()
            del part._geolora_frozen
            forget_traces(part)
    forget_traces(model)
    return model


class AdaptedModel:
    """Mixin for the class of a model that carries adapters."""

    def compile(self, *args, **kwargs):
        """As `keras.Model.compile`; an optimizer must be a `GeoLoRA`.

        On TensorFlow `jit_compile` defaults to `False`: XLA takes 20 times as
        long for a small singular value decomposition as TensorFlow itself
        (36 matrices of 32 x 32 on two CPU cores: 136 ms against 6 ms).
        """
        if keras.backend.backend() == "tensorflow":
            kwargs.setdefault("jit_compile", False)
        optimizer = args[0] if args else kwargs.get("optimizer")
        if optimizer is not None and optimizer != "auto":
            check_optimizer(optimizer)
        super().compile(*args, **kwargs)

    def fit(self, *args, callbacks=None, **kwargs):
        """As `keras.Model.fit`; the logs also show the mean rank."""
        check_optimizer(self.optimizer)
        if not isinstance(callbacks, keras.callbacks.CallbackList):
            if callbacks is None:
                callbacks = []
            elif not isinstance(callbacks, (list, tuple)):
                callbacks = [callbacks]
            if not any(isinstance(c, RankLogger) for c in callbacks):
                callbacks = [RankLogger(), *callbacks]
        return super().fit(*args, callbacks=callbacks, **kwargs)


@functools.cache
def adapted_class(plain_class):
    """Returns the class of an adapted model of class `plain_class`."""
    return type(
        f"GeoLoRA{plain_class.__name__}",
        (AdaptedModel, plain_class),
        {"plain_class": plain_class, "__module__": __name__},
    )


class Frozen:
    """Freezes a model, except what is excluded, and can undo it.

    Frozen variables do not train. Frozen layers, which are those without
    layers inside, also stop to update statistics, as batch normalization
    does.
    """

    def __init__(self, model, exclude):
        kept = set()
        for path, layer in walk(model):
            if exclude is not None and matches(exclude, path, layer):
                kept.update(id(v) for v in layer.variables)
                kept.update(id(sub) for _, sub in [(path, layer), *walk(layer)])
        self.variables = [
            v for v in model.variables if v.trainable and id(v) not in kept
        ]
        self.layers = [
            layer
            for _, layer in walk(model)
            if layer.trainable
            and id(layer) not in kept
            and type(layer) not in ADAPTED_CLASSES
            and not any(True for _ in walk(layer))
        ]
        for layer in self.layers:
            layer.trainable = False
        for variable in self.variables:
            variable.trainable = False

    def thaw(self):
        """Makes trainable again what was trainable before."""
        for layer in self.layers:
            layer.trainable = True
        for variable in self.variables:
            variable.trainable = True


def forget_traces(model):
    """Drops what was remembered of the layers as they were.

    Compiled functions hold the old computation, and torch's modules a list of
    the old parameters.
    """
    for part in [model, *(layer for _, layer in walk(model))]:
        if hasattr(part, "_torch_params"):
            part._track_variables()
    for name in ("train_function", "test_function", "predict_function"):
        if hasattr(model, name):
            setattr(model, name, None)


def check_model(model):
    """Refuses what is no model."""
    if not isinstance(model, keras.Model):
        raise TypeError(
            "`model` must be a `keras.Model`. Received: "
            f"model={model!r} (of type {type(model).__name__})"
        )


def check_unadapted(model):
    """Refuses a model that is not built, or adapted."""
    if not model.built:
        raise ValueError(
            "Only a built model has kernels to adapt. Call it on a batch of "
            "data, or `model.build(input_shape)`, first. "
            f"Received: model '{model.name}', which is not built"
        )
    adapted = adapted_layers(model)
    if adapted:
        raise ValueError(
            "A model is adapted once. Merge the adapters with "
            "`model.merge_geolora()` before you add new ones. "
            f"Received: model '{model.name}' with {len(adapted)} adapted "
            "layers"
        )


def check_optimizer(optimizer):
    """Refuses to train adapters with anything but `GeoLoRA`."""
    wrapped = getattr(optimizer, "inner_optimizer", None)
    if isinstance(optimizer, GeoLoRA) or isinstance(wrapped, GeoLoRA):
        return
    raise ValueError(
        "Adapters are trained by GeoLoRA, around any Keras optimizer: "
        "`model.compile(optimizer=keras_geolora.GeoLoRA("
        "keras.optimizers.AdamW(3e-4)), ...)`. "
        f"Received: optimizer={optimizer!r}"
    )
