"""What of an adapter goes into other formats: products of factors."""

import dataclasses

from keras_geolora.files.adapter_file import (
    adaptation_to_save,
    chosen_adapter,
    plain_class_name,
)
from keras_geolora.files.adapter_format import some
from keras_geolora.files.base_weights import keyed_variables
from keras_geolora.files.peft_names import family_of
from keras_geolora.layers.factor import check_layers
from keras_geolora.layers.registry import kernel_shape
from keras_geolora.layers.tree import stable_paths
from keras_geolora.layers.weight import AdaptedWeight


@dataclasses.dataclass
class Exported:
    """An adapter without its model, as it is read from one or from a file.

    Attributes:
        updates: Dict from path to `(U, S, V, scale)`.
        classes: Dict from path to the name of the Keras layer's class.
        family: String, the name of the backbone's class in `FAMILIES`, or
            `None`.
        left: List of strings, what trained beside the factors.
        is_task: Bool, whether it is the adapter of a task, not of a backbone.
        model_class: String, the name of the model's class.
        shapes: Dict from path to the shape of a kernel as a matrix, of all
            layers of the model, adapted or not; a file does not know them.
    """

    updates: dict
    classes: dict
    family: str | None
    left: list
    is_task: bool
    model_class: str
    shapes: dict = dataclasses.field(default_factory=dict)


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
    check_are_layers(layers, path)
    updates = {}
    for place, layer in layers.items():
        adapter = layer.adapters_by_name()[name]
        updates[place] = (*adapter.trimmed(), adapter.scale)
    co_trained = {id(v) for v in adaptation.adapters[name].co_trained}
    variables = keyed_variables(model).items()
    shapes = {place: kernel_shape(layer) for place, layer in paths.items()}
    return Exported(
        updates,
        classes={p: plain_class_name(x) for p, x in layers.items()},
        family=family_of(model),
        left=[key for key, v in variables if id(v) in co_trained],
        is_task=adaptation.scope is not model,
        model_class=plain_class_name(model),
        shapes={p: shape for p, shape in shapes.items() if shape is not None},
    )


def check_are_layers(layers, path):
    """Refuses adapters of weights that belong to no layer of their own.

    Args:
        layers: Dict from path to layer or `AdaptedWeight`.
        path: String or path of the file, for messages.
    """
    weights = [p for p, x in layers.items() if isinstance(x, AdaptedWeight)]
    if weights:
        raise ValueError(
            "Only adapters of layers can be written in the formats of other "
            "libraries, not those of experts and other weights that belong to "
            "no layer of their own. Write `model.save_geolora(path)`, or merge "
            "the model and convert it as a whole. Or leave them out when you "
            f"adapt: `enable_geolora(exclude={weights[:2]})`. '{path}' was not "
            f"written. Received: {len(weights)} such weights: {some(weights)}"
        )
