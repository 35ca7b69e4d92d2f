"""An adapter as other formats need it: products of factors by path."""

import dataclasses

import keras
from keras import ops

from keras_geolora.files.adapter_file import (
    adaptation_to_save,
    chosen_adapter,
    plain_class_name,
)
from keras_geolora.files.adapter_format import as_saved
from keras_geolora.files.base_weights import keyed_variables
from keras_geolora.files.peft_names import family_of
from keras_geolora.files.torch_layout import (
    in_torch,
    is_convolution,
    layout_of,
    layouts_in,
)
from keras_geolora.layers.factor import check_layers
from keras_geolora.layers.registry import kernel_shape, kernel_view
from keras_geolora.layers.tree import stable_paths


@dataclasses.dataclass
class Exported:
    """An adapter without its model, as it is read from one or from a file.

    Attributes:
        updates: Dict from path to `(U, S, V, scale)`. Those of experts have one
            more axis in front.
        classes: Dict from path to the name of the Keras layer's class.
        family: String, the name of the backbone's class in `FAMILIES`, or
            `None`.
        left: List of the keys of what trained beside the factors.
        is_task: Bool, whether it is the adapter of a task, not of a backbone.
        model_class: String, the name of the model's class.
        beside: Dict from path to a dict from parameter to array: what trained
            beside the factors, as PyTorch has it.
        unplaced: List of those in `left` that are not in `beside`.
        shapes: Dict from path to the shape of a kernel as a matrix, of all
            layers of the model, adapted or not; a file does not know them.
        biases: Dict from path to array, the pretrained biases of all layers; a
            file does not know them.
        convolutions: Dict from path to `Convolution`; a file knows none.
    """

    updates: dict
    classes: dict
    family: str | None
    left: list
    is_task: bool
    model_class: str
    beside: dict = dataclasses.field(default_factory=dict)
    unplaced: list = dataclasses.field(default_factory=list)
    shapes: dict = dataclasses.field(default_factory=dict)
    biases: dict = dataclasses.field(default_factory=dict)
    convolutions: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Convolution:
    """What a matrix does not say of the kernel of a convolution.

    Attributes:
        window: Tuple of ints, the positions along each axis.
        channels: Int, the input channels of a group.
        groups: Int, the number of groups.
        dilated: Bool, whether positions are apart.
    """

    window: tuple
    channels: int
    groups: int
    dilated: bool

    @classmethod
    def of(cls, layer):
        """Returns that of a layer."""
        *window, channels, _ = kernel_view(layer).shape
        dilated = any(rate != 1 for rate in layer.dilation_rate)
        return cls(tuple(window), channels, layer.groups, dilated)


def exported(model, path, name=None):
    """Returns the `Exported` of a model's adapter.

    Args:
        model: `keras.Model` on which `enable_geolora` was called.
        path: String or path of the file, for messages.
        name: String, the adapter. Defaults to the active one.
    """
    adaptation = adaptation_to_save(model)
    name = chosen_adapter(adaptation, name)
    paths = stable_paths(adaptation.scope)
    layers = {
        place: layer
        for place, layer in paths.items()
        if name in getattr(layer, "adapter_names", ())
    }
    check_layers(layers.values(), f"'{path}' was not written.", name)
    updates = {}
    for place, layer in layers.items():
        adapter = layer.adapters_by_name()[name]
        updates[place] = (*adapter.trimmed(), adapter.scale)
    values = adaptation.values(name)
    trained = {
        key: as_saved(values[id(v)])
        for key, v in keyed_variables(model).items()
        if id(v) in values
    }
    layouts = {key: layout for key, (_, layout) in layouts_in(model).items()}
    beside, unplaced = in_torch(trained, layouts)
    shapes = {place: kernel_shape(layer) for place, layer in paths.items()}
    return Exported(
        updates,
        classes={p: plain_class_name(x) for p, x in layers.items()},
        family=family_of(model),
        left=list(trained),
        is_task=adaptation.scope is not model,
        model_class=plain_class_name(model),
        beside=beside,
        unplaced=unplaced,
        shapes={p: shape for p, shape in shapes.items() if shape is not None},
        biases=biases_of(paths, adaptation),
        convolutions={
            p: Convolution.of(x) for p, x in layers.items() if is_convolution(x)
        },
    )


def biases_of(layers, adaptation):
    """Returns a dict from path to the pretrained bias of a layer.

    Args:
        layers: Dict from path to layer.
        adaptation: `Adaptation` of their model.

    Returns:
        Dict from path to array, as PyTorch has it.
    """
    biases = {p: getattr(layer, "bias", None) for p, layer in layers.items()}
    return {
        path: ops.convert_to_numpy(
            adaptation.pretrained(bias)
            if adaptation.is_companion(bias)
            else bias
        ).reshape(-1)
        for path, bias in biases.items()
        if isinstance(bias, keras.Variable)
    }


def exported_file(description, tensors, updates, left, family):
    """Returns the `Exported` of an adapter file.

    Args:
        description: Dict, as `read_adapter` returns it.
        tensors: Dict from key to array.
        updates: Dict from path to `(U, S, V, scale)`.
        left: List of the keys of what trained beside the factors.
        family: String or `None`, as in `Exported`.
    """
    values = {key: tensors[key] for key in left}
    layouts = {
        key: layout_of(key.rpartition("/")[2], x.shape)
        for key, x in values.items()
    }
    beside, unplaced = in_torch(values, layouts)
    return Exported(
        updates,
        classes=description["classes"],
        family=family,
        left=left,
        is_task=description["model"] != description["backbone"],
        model_class=description["model"],
        beside=beside,
        unplaced=unplaced,
    )
