"""Adapts whole models in place, and undoes it."""

import hashlib

from keras import ops

from keras_geolora.layers.adapted import DEFAULT, AdaptedLayer
from keras_geolora.layers.clipping import clipped
from keras_geolora.layers.factor import check_layers
from keras_geolora.layers.options import AdapterOptions
from keras_geolora.layers.raw_weights import biases_beside
from keras_geolora.layers.tree import adapted_layers, layers_with_adapters
from keras_geolora.model.adapted_model import (
    add_adapter,
    make_adapted,
    make_plain,
    warn_of_what_stays,
)
from keras_geolora.model.checks import (
    check_adapted_and_enabled,
    check_can_adapt,
    check_model,
    check_name,
)
from keras_geolora.model.compiled_functions import after_a_change, forget_traces
from keras_geolora.model.parts import adaptations_of, adapted_parts, backbone_of
from keras_geolora.model.substitution import value_of
from keras_geolora.model.targeting import Layers, is_weight


def enable_geolora(
    model,
    rank=8,
    *,
    max_rank=None,
    min_rank=1,
    targets="all-linear",
    exclude=None,
    rank_pattern=None,
    weight_axes=None,
    modules_to_save=None,
    scale=1.0,
    dropout=0.0,
    train_bias=False,
    seed=None,
    name=DEFAULT,
):
    """Adapts a model in place: freezes it and adds low-rank adapters.

    Every matched layer keeps its place, its kernel and its bias, and becomes a
    `GeoLoRADense`, `GeoLoRAEinsumDense`, `GeoLoRAEmbedding`, `GeoLoRAConv2D`
    and so on. Outputs stay bit-identical until training moves the adapters. In
    a KerasHub task, that is a model with a `backbone`, only the backbone is
    frozen and adapted; the head trains in full.

    Also a method of every `keras.Model`: `model.enable_geolora(rank=8)`.
    Compile the model afterwards, with the optimizer wrapped in `GeoLoRA`.

    Patterns, here and below, are a layer's name, its path (names joined by
    `/`), a regular expression for the whole path, a layer class, a callable
    `(path, layer) -> bool`, or a list of these. A pattern that matches a layer
    with layers inside includes all of them; one that matches nothing is
    refused. Weights that belong to no layer of their own, such as experts, are
    chosen like layers, by the path of their layer and their name; a callable
    gets the variable.

    Args:
        model: Built `keras.Model`.
        rank: Int, the initial rank of every adapter. Training changes it; the
            result hardly depends on it. The rank of an update cannot exceed the
            smaller side of its kernel, so this and the ranks below are clipped
            to that; `geolora_summary` shows where. Defaults to 8.
        max_rank: Int or `None`, the largest rank, which sizes the buffers.
            Defaults to `2 * rank`.
        min_rank: Int, the smallest rank. Defaults to 1.
        targets: Patterns, or one of the words `"all-linear"` (the default:
            every `Dense`, `EinsumDense` and expert), `"attention"` (those
            inside a layer with "attention" in its class name), `"experts"` and
            `"all"` (embeddings, convolutions and all else that can carry an
            adapter). Layers that cannot carry an adapter are skipped, and
            refused if nothing else matches.
        exclude: Patterns of layers not to adapt; they stay frozen. Defaults
            to `None`.
        rank_pattern: Dict from pattern to rank, where it differs from `rank`;
            the first matching pattern counts. Defaults to `None`.
        weight_axes: Dict from pattern to the axes of a weight that belongs to
            no layer of its own, where they are not obvious: a letter for each,
            `"r"` for those that become the rows of a matrix, `"c"` for columns
            and `"b"` for those along which there are several matrices, such as
            `{".*/kernels": "brc"}`. Defaults to `None`.
        modules_to_save: Patterns of layers that train in full, such as heads
            and norms, and belong to the adapter. Defaults to `None`.
        scale: Float, constant strength of the updates. Defaults to 1.
        dropout: Float in [0, 1), dropout on the inputs of the updates.
            Defaults to 0.
        train_bias: Bool, whether the biases of adapted layers train.
            Defaults to `False`.
        seed: Int or `None`. An int makes the random bases reproducible; they
            differ between layers.
        name: String, the name of the adapter. A model may get several adapters
            under different names; the newest becomes the active one. Defaults
            to `"default"`.

    Returns:
        The model itself.

    Raises:
        TypeError: If `model` is not a `keras.Model`, a rank not an integer, or
            another argument of the wrong type.
        ValueError: If the model is not built or has an adapter of this name, if
            a rank is below 1 or ranks contradict each other, or if a pattern
            matches nothing.

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
    layers = Layers(backbone_of(model), model, weight_axes)
    saved = {}
    if modules_to_save is not None:
        saved = layers.named(modules_to_save, "modules_to_save")
    chosen = layers.to_adapt(targets, exclude)
    chosen = {path: x for path, x in chosen.items() if path not in saved}
    if not chosen:
        raise ValueError(
            "`modules_to_save` must leave at least one layer to adapt. "
            f"Received: modules_to_save={modules_to_save!r}, which matches "
            "all targets"
        )
    if rank_pattern is not None and not isinstance(rank_pattern, dict):
        raise TypeError(
            "`rank_pattern` must be a dict from pattern to rank, for example "
            f"`{{'query': 4}}`. Received: rank_pattern={rank_pattern!r}"
        )
    if not isinstance(train_bias, bool):
        raise TypeError(
            "`train_bias` must be `True` or `False`. Received: "
            f"train_bias={train_bias!r}"
        )
    if train_bias:
        check_biases(chosen)
    ranks = dict.fromkeys(chosen, rank)
    for pattern, other in reversed((rank_pattern or {}).items()):
        found = layers.named(pattern, "rank_pattern")
        if not set(found) & set(chosen):
            raise ValueError(
                "Every pattern in `rank_pattern` must match an adapted layer. "
                f"Received: rank_pattern={rank_pattern!r}, where {pattern!r} "
                "matches none of them"
            )
        ranks.update((path, other) for path in found if path in chosen)

    options, asked = {}, {}
    for index, (path, layer) in enumerate(chosen.items()):
        wanted = AdapterOptions(
            rank=ranks[path],
            max_rank=max_rank,
            min_rank=min_rank,
            scale=scale,
            dropout=dropout,
            # Two seeds for the two bases of every layer.
            seed=None if seed is None else seed + 2 * index,
        )
        options[path], asked[path] = clipped(wanted, layer)
    saved = list(saved.values())
    add_adapter(model, name, chosen, options, saved, train_bias, asked)
    return model


def merge_geolora(model, reversible=True):
    """Adds every update to its kernel and restores plain Keras layers.

    The model has its former class, layers and trainable weights again, no
    adapters, and the outputs of the adapted model up to rounding. Of several
    adapters the active one is merged. What `compile` set was for other
    variables and is removed: compile the model again before you evaluate or
    train it, and compile other models that contain it before you use them.

    Also a method of every `keras.Model`: `model.merge_geolora()`.

    Args:
        model: `keras.Model` with adapted layers.
        reversible: Bool, whether to keep what `unmerge_geolora` needs: the
            adapters, and a copy of the kernels in host memory. Defaults to
            `True`.

    Returns:
        The model itself.

    Raises:
        TypeError: If `model` is not a `keras.Model`.
        ValueError: If no layer of the model is adapted, an update is not
            finite, or a kernel is quantized. The model is unchanged then, and
            after an interrupt, except for rounding with `reversible=False`,
            which keeps no copy of the kernels.

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
    check_adapted_and_enabled(model, "merged")
    for path, layer in adapted_layers(model).items():
        layer.check_mergeable()
        if not bool(ops.all(ops.isfinite(layer.adapter.delta()))):
            raise ValueError(
                "Merging adds every update to its kernel, so all updates must "
                f"be finite. Received: a non-finite update of layer '{path}'. "
                "Nothing was merged."
            )
    check_layers(layers_with_adapters(model).values(), "Nothing was merged.")
    merged = Merged(model, reversible)
    vars(model).pop("geolora_merged", None)
    if reversible:
        model.geolora_merged = merged
    return model


def unmerge_geolora(model):
    """Undoes `merge_geolora` and restores the kernels bit for bit.

    The adapters are restored, and so are all `trainable` flags, manual changes
    included, and what `compile` had set before merging: training continues
    exactly.

    Also a method of every `keras.Model`: `model.unmerge_geolora()`.

    Args:
        model: `keras.Model` on which `merge_geolora` was called.

    Returns:
        The model itself.

    Raises:
        TypeError: If `model` is not a `keras.Model`.
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
            "Only the same model on which `model.merge_geolora()` was called, "
            "without `reversible=False`, can be unmerged. Received: model "
            f"'{model.name}'"
        )
    if layers_with_adapters(model):
        raise ValueError(
            "A merged model that was adapted again cannot be unmerged: its "
            "new adapters belong to the merged kernels. First remove them "
            f"with `model.remove_geolora()`. Received: model '{model.name}'"
        )
    merged.undo()
    del model.geolora_merged
    return model


def remove_geolora(model):
    """Removes all adapters: the model is as it was before adapting.

    Kernels were never changed. What trained beside the adapters, such as
    biases, `modules_to_save` and the head of a KerasHub task, gets its values
    from before `enable_geolora`. Variables that you made trainable since keep
    theirs, with a warning. Compile the model again before you evaluate or train
    it.

    Also a method of every `keras.Model`: `model.remove_geolora()`.

    Args:
        model: `keras.Model` with adapted layers.

    Returns:
        The model itself.

    Raises:
        TypeError: If `model` is not a `keras.Model`.
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
    check_adapted_and_enabled(model, "stripped of adapters")
    warn_of_what_stays(adaptations_of(model), stacklevel=3)
    for layer in layers_with_adapters(model).values():
        layer.detach_adapters()
    for part in adapted_parts(model):
        adaptation = part.geolora_adaptation
        adaptation.reset_co_trained()
        make_plain(part, adaptation)
        adaptation.frozen.thaw()
    after_a_change(model)
    return model


class MergedLayer:
    """Merges the adapters of a layer, and can undo it."""

    def __init__(self, layer):
        self.layer = layer
        self.kernels = layer.kernels()
        self.before = [value_of(kernel) for kernel in self.kernels]
        self.after = None
        self.kept = None

    def merge(self, reversible):
        """Adds the active update to the kernel and removes all adapters.

        Args:
            reversible: Bool, whether to keep a copy of the former kernels.
        """
        if self.layer.is_adapted:
            self.layer.merge_kernels()
        if reversible:
            self.after = [digest(kernel) for kernel in self.kernels]
        self.kept = self.layer.detach_adapters()
        if not reversible:
            self.before = None

    def has_changed(self):
        """Returns whether a kernel has changed since merging."""
        return [digest(kernel) for kernel in self.kernels] != self.after

    def put_back(self):
        """Restores the adapters and the former kernels.

        Without a copy of the kernels it subtracts the update, which rounds.
        """
        if self.kept is not None:
            AdaptedLayer.attach_adapters(self.layer, self.kept)
        if self.before is not None:
            for kernel, value in zip(self.kernels, self.before, strict=True):
                kernel.assign(value)
        elif self.layer.is_adapted:
            self.layer.merge_kernels(sign=-1)


class Merged:
    """Merges the adapters of a model, and can undo it."""

    def __init__(self, model, reversible):
        self.model = model
        self.layers, self.compiled = [], []
        self.parts = [
            (
                part,
                part.geolora_adaptation,
                part.geolora_adaptation.manual_changes(),
            )
            for part in adapted_parts(model)
        ]
        try:
            for layer in layers_with_adapters(model).values():
                self.layers.append(MergedLayer(layer))
                self.layers[-1].merge(reversible)
            for part, adaptation, _ in self.parts:
                make_plain(part, adaptation)
                adaptation.frozen.thaw()
            self.compiled = after_a_change(model)
        except BaseException:  # including interrupts
            self._put_back()
            raise

    def undo(self):
        """Restores everything."""
        for merged in self.layers:
            if merged.has_changed():
                raise ValueError(
                    "Unmerging restores the kernels from before the merge, so "
                    "anything learned since would be lost. Received: layer "
                    f"'{merged.layer.path}', whose kernel has changed since "
                    "`merge_geolora`. Nothing was unmerged."
                )
        self._put_back()

    def _put_back(self):
        for merged in self.layers:
            merged.put_back()
        for part, adaptation, changes in self.parts:
            adaptation.frozen.thaw_all()
            make_adapted(part, adaptation)
            adaptation.freeze()
            adaptation.repeat_changes(changes)
        for state in self.compiled:
            state.put_back()
        forget_traces(self.model)


def digest(variable):
    """Returns a hash of the bytes of a variable."""
    return hashlib.sha256(value_of(variable).tobytes()).digest()


def check_biases(chosen):
    """Refuses `train_bias` where a bias is beside a weight without a layer.

    Args:
        chosen: Dict from path to layer or `AdaptedWeight`.
    """
    beside = {
        path: names
        for path, layer in chosen.items()
        if is_weight(layer) and (names := biases_beside(layer))
    }
    if beside:
        path, names = next(iter(beside.items()))
        raise ValueError(
            "`train_bias=True` trains the biases of layers with a kernel, not "
            "those beside weights that belong to no layer of their own. Leave "
            "these weights out with `exclude`, or train their whole layer with "
            f"`modules_to_save`. Received: train_bias=True, '{path}' beside "
            f"{names}" + (f", ... ({len(beside)} in all)" * (len(beside) > 1))
        )
