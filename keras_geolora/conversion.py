"""Adapts whole models in place, and turns them back."""

import functools
import hashlib
import inspect

import keras
from keras import ops

from keras_geolora.adaptation import Adaptation, value_of
from keras_geolora.callbacks import (
    EpochCut,
    RankLogger,
    SilentFailureGuard,
)
from keras_geolora.layers.adapted import DEFAULT, AdaptedLayer
from keras_geolora.optimizer import GeoLoRA
from keras_geolora.targeting import (
    Layers,
    adapted_class,
    adapted_layers,
    carriers,
    walk,
)

# Attributes in which Keras and KerasHub keep compiled functions.
FUNCTIONS = (
    "train_function",
    "test_function",
    "predict_function",
    "generate_function",
)


def enable_geolora(
    model,
    rank=8,
    *,
    max_rank=None,
    min_rank=1,
    targets="all-linear",
    exclude=None,
    rank_pattern=None,
    modules_to_save=None,
    scale=1.0,
    dropout=0.0,
    train_bias=False,
    seed=None,
    name=DEFAULT,
):
    """Adapts a model in place: freezes it and adds low-rank adapters.

    Every matched layer keeps its place, its kernel and its bias, and becomes
    a `GeoLoRADense`, `GeoLoRAEinsumDense`, `GeoLoRAEmbedding` or
    `GeoLoRAConv2D` and so on. Outputs stay bit-identical until training moves
    the adapters. On a KerasHub task, that is a model with a `backbone`, only
    the backbone is frozen and adapted: the head trains as it is.

    Also a method of every `keras.Model`: `model.enable_geolora(rank=8)`.
    Compile the model afterwards, with the optimizer wrapped in `GeoLoRA`.

    Patterns, here and below, are a layer's name, its path (names joined by
    `/`), a regular expression for the whole path, a layer class, a callable
    `(path, layer) -> bool`, or a list of these. A pattern that means a layer
    with layers inside means all of them; one that means nothing is refused.

    Args:
        model: Built `keras.Model`.
        rank: Int, rank of every adapter at the start. Training changes it;
            the result hardly depends on it. Defaults to 8.
        max_rank: Int or `None`, the largest rank, which sizes the buffers.
            Defaults to `2 * rank`, clipped to the smaller side of each
            kernel.
        min_rank: Int, the smallest rank. Defaults to 1.
        targets: Patterns, or one of the words `"all-linear"` (the default:
            every `Dense` and `EinsumDense`), `"attention"` (those inside a
            layer whose class is called so) and `"all"` (embeddings and
            convolutions as well). Layers of a kind that cannot carry an
            adapter are passed over, and refused if nothing else is meant.
        exclude: Patterns of layers not to adapt; they stay frozen. Defaults
            to `None`.
        rank_pattern: Dict from pattern to rank, where it differs from
            `rank`; the first pattern that matches counts. Defaults to `None`.
        modules_to_save: Patterns of layers that train as they are, such as
            heads and norms, and that belong to the adapter. Defaults to
            `None`.
        scale: Float, constant strength of the updates. Defaults to 1.
        dropout: Float in [0, 1), dropout on the inputs of the updates.
            Defaults to 0.
        train_bias: Bool, whether the biases of adapted layers train.
            Defaults to `False`.
        seed: Int or `None`. An int makes the random bases repeatable; they
            differ between layers.
        name: String, the name of the adapter. A model that is adapted takes
            another adapter under another name, which becomes the active one.
            Defaults to `"default"`.

    Returns:
        The model itself.

    Raises:
        TypeError: If `model` is no `keras.Model`, or a rank no integer.
        ValueError: If the model is not built, or has an adapter of this name,
            a rank does not fit, or a pattern matches nothing.

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
    model.enable_geolora(rank=2, exclude="head", modules_to_save="head")
    np.testing.assert_array_equal(model.predict(x, verbose=0), before)
    ```
    """
    check_model(model)
    check_name(name)
    check_can_adapt(model, name)
    scope = scope_of(model)
    layers = Layers(scope)
    saved = {}
    if modules_to_save is not None:
        saved = layers.named(modules_to_save, "modules_to_save")
    chosen = layers.to_adapt(targets, exclude)
    chosen = {path: x for path, x in chosen.items() if path not in saved}
    if not chosen:
        raise ValueError(
            "No layer is left to adapt. Received: "
            f"modules_to_save={modules_to_save!r}, which means all targets"
        )
    ranks = dict.fromkeys(chosen, rank)
    for pattern, other in reversed((rank_pattern or {}).items()):
        found = layers.named(pattern, "rank_pattern")
        if not set(found) & set(chosen):
            raise ValueError(
                "`rank_pattern` gives ranks to layers that are adapted. "
                f"Received: rank_pattern={rank_pattern!r}, where {pattern!r} "
                "means none of them"
            )
        ranks.update((path, other) for path in found if path in chosen)

    adaptation = getattr(model, "geolora_adaptation", None)
    first = adaptation is None
    if first:
        adaptation = Adaptation(model, scope)
    adapted = []
    try:
        for index, (path, layer) in enumerate(chosen.items()):
            # Two seeds for the two bases of every layer.
            layer_seed = None if seed is None else seed + 2 * index
            adapted_class(layer).adapt(
                layer,
                name,
                train_bias=train_bias,
                rank=ranks[path],
                max_rank=max_rank,
                min_rank=min_rank,
                scale=scale,
                dropout=dropout,
                seed=layer_seed,
            )
            adapted.append(layer)
    except Exception as error:
        for layer in adapted:
            layer.delete_adapter(name)
        if first:
            adaptation.frozen.thaw()
        else:
            adaptation.activate_layers()
        if isinstance(error, ValueError):
            raise ValueError(
                f"{error} This is about layer '{path}'; give it a rank of its "
                "own by `rank_pattern`, or leave it out by `exclude`."
            ) from error
        raise
    saved = list(saved.values())
    companions = adaptation.companions(chosen, saved, train_bias)
    adaptation.add(name, chosen, saved, companions)
    if first:
        make_adapted(model, adaptation)
    forget_traces(model)
    return model


def merge_geolora(model, reversible=True):
    """Adds every update to its kernel and gives back plain Keras layers.

    The model has its former class, layers and trainable weights again, no
    adapters, and the outputs of the adapted model up to rounding. Of several
    adapters the active one is merged. Compile the model again before you
    train it further, and compile other models that contain it before you use
    them.

    Also a method of every `keras.Model`: `model.merge_geolora()`.

    Args:
        model: `keras.Model` with adapted layers.
        reversible: Bool, whether to keep what `unmerge_geolora` needs: the
            adapters, and a copy of the kernels in the host's memory. Defaults
            to `True`.

    Returns:
        The model itself.

    Raises:
        TypeError: If `model` is no `keras.Model`.
        ValueError: If no layer of the model is adapted, an update is not
            finite, or a kernel is quantized; the model is unchanged then.

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
    check_adapted(model, "merged")
    check_not_suspended(x.geolora_adaptation for x in adapted_parts(model))
    for path, layer in adapted_layers(model).items():
        layer.check_mergeable()
        if not bool(ops.all(ops.isfinite(layer.adapter.delta()))):
            raise ValueError(
                "Merging adds every update to its kernel, so all must be "
                f"finite. Received: a non-finite update of layer '{path}'. "
                "Nothing was merged."
            )
    merged = Merged(model, keep_kernels=reversible)
    if reversible:
        model.geolora_merged = merged
    forget_traces(model)
    return model


def unmerge_geolora(model):
    """Undoes `merge_geolora`: the kernels have their former bytes again.

    The adapters are back as they were, and so is what was frozen. Compile the
    model before you train it further.

    Also a method of every `keras.Model`: `model.unmerge_geolora()`.

    Args:
        model: `keras.Model` on which `merge_geolora` was called.

    Returns:
        The model itself.

    Raises:
        TypeError: If `model` is no `keras.Model`.
        ValueError: If the model is not merged, or a kernel has changed since;
            the model is unchanged then.

    Example:

    ```python
    import keras
    import numpy as np
    import keras_geolora

    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    kernel = np.array(model.layers[0].kernel)
    model.enable_geolora(rank=2)
    model.merge_geolora()
    model.unmerge_geolora()
    assert model.layers[0].rank == 2
    np.testing.assert_array_equal(np.array(model.layers[0].kernel), kernel)
    ```
    """
    check_model(model)
    merged = getattr(model, "geolora_merged", None)
    if merged is None:
        raise ValueError(
            "Only what `model.merge_geolora()` merged, on this very model and "
            "without `reversible=False`, can be unmerged. "
            f"Received: model '{model.name}'"
        )
    if carriers(model):
        raise ValueError(
            "A merged model that was adapted again cannot be unmerged: its "
            "new adapters belong to the merged kernels. Remove them by "
            f"`model.remove_geolora()` first. Received: model '{model.name}'"
        )
    merged.undo()
    del model.geolora_merged
    forget_traces(model)
    return model


def remove_geolora(model):
    """Takes off all adapters: the model is what it was before adapting.

    Kernels were never changed. What trained beside the adapters, such as
    biases, `modules_to_save` and the head of a KerasHub task, gets the values
    it had before `enable_geolora`.

    Also a method of every `keras.Model`: `model.remove_geolora()`.

    Args:
        model: `keras.Model` with adapted layers.

    Returns:
        The model itself.

    Raises:
        TypeError: If `model` is no `keras.Model`.
        ValueError: If no layer of the model is adapted.

    Example:

    ```python
    import keras
    import keras_geolora

    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    model.enable_geolora(rank=2)
    model.remove_geolora()
    assert type(model.layers[0]) is keras.layers.Dense
    ```
    """
    check_model(model)
    check_adapted(model, "freed of adapters")
    check_not_suspended(x.geolora_adaptation for x in adapted_parts(model))
    for layer in carriers(model).values():
        layer.detach_adapters()
    for part in adapted_parts(model):
        adaptation = part.geolora_adaptation
        adaptation.restore_companions()
        adaptation.frozen.thaw()
        make_plain(part)
    forget_traces(model)
    return model


class Merged:
    """Merges the adapters of a model, and remembers how to undo it."""

    def __init__(self, model, keep_kernels):
        self.layers = []
        for layer in carriers(model).values():
            kernels = []
            for kernel in layer.kernels():
                kernels.append((kernel, value_of(kernel)))
            if layer.is_adapted:
                layer.merge_kernels()
            kept = layer.detach_adapters()
            if keep_kernels:
                kernels = [(k, value, digest(k)) for k, value in kernels]
                self.layers.append((layer, kernels, kept))
        self.parts = []
        for part in adapted_parts(model):
            adaptation = part.geolora_adaptation
            adaptation.frozen.thaw()
            make_plain(part)
            self.parts.append((part, adaptation))

    def undo(self):
        """Puts everything back."""
        for layer, kernels, _ in self.layers:
            if any(digest(kernel) != after for kernel, _, after in kernels):
                raise ValueError(
                    "Unmerging puts back the kernels from before merging, so "
                    "what was learned since would be lost. Received: layer "
                    f"'{layer.path}', whose kernel has changed since "
                    "`merge_geolora`. Nothing was unmerged."
                )
        for layer, kernels, kept in self.layers:
            for kernel, value, _ in kernels:
                kernel.assign(value)
            AdaptedLayer.attach_adapters(layer, kept)
        for part, adaptation in self.parts:
            make_adapted(part, adaptation)
            adaptation.freeze()


def digest(variable):
    """Returns a hash of the bytes of a variable."""
    return hashlib.sha256(value_of(variable).tobytes()).digest()


class AdaptedModel:
    """Mixin for the class of a model that carries adapters."""

    def compile(self, *args, **kwargs):
        """As `keras.Model.compile`; an optimizer must be a `GeoLoRA`.

        On TensorFlow `jit_compile` defaults to `False`: XLA takes many times
        as long for small singular value decompositions as TensorFlow itself
        (`benchmarks/decompositions.py`).
        """
        if keras.backend.backend() == "tensorflow":
            kwargs.setdefault("jit_compile", False)
        optimizer = args[0] if args else kwargs.get("optimizer")
        if optimizer is not None and optimizer != "auto":
            check_optimizer(optimizer)
        super().compile(*args, **kwargs)

    def quantize(self, *args, **kwargs):
        """Refused: a model is quantized first and adapted then."""
        raise ValueError(
            "Quantize a model before it is adapted; the adapters then train "
            "in float32 over the quantized kernels. Or merge first: "
            "`model.merge_geolora()`. "
            f"Received: adapted model '{self.name}'"
        )

    def fit(self, *args, **kwargs):
        """As `keras.Model.fit`; cuts at the end of epochs, shows the ranks."""
        check_not_suspended([self.geolora_adaptation])
        optimizer = getattr(self, "optimizer", None)
        check_optimizer(optimizer)
        check_optimizer_is_new(optimizer, self.trainable_variables)
        names = list(inspect.signature(super().fit).parameters)
        # KerasHub's tasks take other arguments by position.
        by_position = dict(zip(names, args, strict=False))
        if "callbacks" in by_position:
            at = names.index("callbacks")
            args = (*args[:at], own_callbacks(args[at]), *args[at + 1 :])
        else:
            kwargs["callbacks"] = own_callbacks(kwargs.get("callbacks"))
        return super().fit(*args, **kwargs)


def own_callbacks(callbacks):
    """Returns the callbacks of `fit`, with ours in front."""
    if isinstance(callbacks, keras.callbacks.CallbackList):
        return callbacks
    if callbacks is None:
        callbacks = []
    elif not isinstance(callbacks, (list, tuple)):
        callbacks = [callbacks]
    for own in (SilentFailureGuard, RankLogger, EpochCut):
        if not any(isinstance(c, own) for c in callbacks):
            callbacks = [own(), *callbacks]
    return callbacks


@functools.cache
def adapted_model_class(plain_class):
    """Returns the class of an adapted model of class `plain_class`."""
    return type(
        f"GeoLoRA{plain_class.__name__}",
        (AdaptedModel, plain_class),
        {"plain_class": plain_class, "__module__": __name__},
    )


def scope_of(model):
    """Returns the backbone of a KerasHub task, or else the model itself."""
    # Some backbones have another one inside, which is only a part of them.
    is_backbone = any(c.__name__ == "Backbone" for c in type(model).__mro__)
    backbone = getattr(model, "backbone", None)
    if is_backbone or not isinstance(backbone, keras.layers.Layer):
        return model
    return backbone


def adapted_parts(model):
    """Returns the model and the models inside that `enable_geolora` saw."""
    parts = [model, *(layer for _, layer in walk(model))]
    return [part for part in parts if isinstance(part, AdaptedModel)]


def make_adapted(part, adaptation):
    """Gives a model the class of an adapted one."""
    part.geolora_adaptation = adaptation
    part.__class__ = adapted_model_class(type(part))
    # Keras keeps a bound `quantize` with every model; ours refuses.
    adaptation.plain_quantize = vars(part).pop("quantize")


def make_plain(part):
    """Gives an adapted model its former class."""
    part.__class__ = part.plain_class
    part.quantize = part.geolora_adaptation.plain_quantize
    del part.geolora_adaptation
    forget_traces(part)


def forget_traces(model):
    """Drops what was remembered of the layers as they were.

    Compiled functions hold the old computation, and torch's modules a list of
    the old parameters.
    """
    for part in [model, *(layer for _, layer in walk(model))]:
        if hasattr(part, "_torch_params"):
            part._track_variables()
        if isinstance(part, keras.Model):
            for name in FUNCTIONS:
                if hasattr(part, name):
                    setattr(part, name, None)
            part.geolora_disabled_traces = {}


def check_model(model):
    """Refuses what is no model."""
    if not isinstance(model, keras.Model):
        raise TypeError(
            "`model` must be a `keras.Model`. Received: "
            f"model={model!r} (of type {type(model).__name__})"
        )


def check_name(name):
    """Refuses what cannot name an adapter."""
    if not isinstance(name, str) or not name or set(name) & set("/."):
        raise ValueError(
            "The `name` of an adapter becomes part of paths, so it must be a "
            "string that is not empty, without '/' and '.'. "
            f"Received: name={name!r}"
        )


def check_can_adapt(model, name):
    """Refuses a model that is not built, or adapted in another way."""
    if not model.built:
        raise ValueError(
            "Only a built model has kernels to adapt. Call it on a batch of "
            "data, or `model.build(input_shape)`, first. "
            f"Received: model '{model.name}', which is not built"
        )
    adaptation = getattr(model, "geolora_adaptation", None)
    strange = [
        layer
        for layer in carriers(model).values()
        if adaptation is None or layer.adaptation is not adaptation
    ]
    if strange:
        raise ValueError(
            "A part of the model is adapted already, by itself. Adapt it "
            "again there, or merge its adapters with `merge_geolora()`. "
            f"Received: model '{model.name}' with {len(strange)} adapted "
            "layers"
        )
    if adaptation is None:
        return
    if name in adaptation.adapters:
        raise ValueError(
            "A model has one adapter of a name. Choose another `name`, or "
            "merge with `model.merge_geolora()`, or remove with "
            f"`model.remove_geolora()`. Received: name='{name}', model "
            f"'{model.name}' with {sorted(adaptation.adapters)}"
        )
    check_not_suspended([adaptation])


def check_not_suspended(adaptations):
    """Refuses changes while the adapters are out of action."""
    for adaptation in adaptations:
        if adaptation.suspended:
            raise ValueError(
                "Inside `with model.geolora_disabled()` adapters rest; change "
                "them outside. "
                f"Received: model '{adaptation.model_name}' with its adapters "
                "disabled"
            )


def check_adapted(model, what):
    """Refuses a model without adapters, or with those of another model."""
    layers = carriers(model)
    if not layers:
        raise ValueError(
            f"Only a model with adapted layers can be {what}; adapt it with "
            f"`model.enable_geolora()`. Received: model '{model.name}' "
            "without an adapted layer"
        )
    mine = [part.geolora_adaptation for part in adapted_parts(model)]
    for layer in layers.values():
        owner = layer.adaptation
        if owner is not None and owner not in mine:
            raise ValueError(
                f"The adapters of this model belong to '{owner.model_name}', "
                "on which `enable_geolora` was called. Call the method there. "
                f"Received: model '{model.name}'"
            )


def check_optimizer_is_new(optimizer, variables):
    """Refuses an optimizer that was built on other variables."""
    known = getattr(optimizer, "_trainable_variables", [])
    if optimizer.built and {id(v) for v in known} != {id(v) for v in variables}:
        raise ValueError(
            "What trains has changed since the optimizer was built, by "
            "another adapter or another `trainable`. Compile the model "
            "again, with a new `GeoLoRA`. "
            f"Received: an optimizer of {len(known)} variables for "
            f"{len(variables)}"
        )


def check_optimizer(optimizer):
    """Refuses to train adapters with anything but `GeoLoRA`."""
    wrapped = getattr(optimizer, "inner_optimizer", None)
    if isinstance(optimizer, GeoLoRA) or isinstance(wrapped, GeoLoRA):
        return
    raise ValueError(
        "Adapters are trained by GeoLoRA, around any Keras optimizer: "
        "`model.compile(optimizer=keras_geolora.GeoLoRA("
        "keras.optimizers.AdamW(1e-3)), ...)`. "
        f"Received: optimizer={optimizer!r}"
    )
