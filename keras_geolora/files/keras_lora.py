"""Files of KerasHub's own LoRA."""

import h5py
import numpy as np

from keras_geolora.files.adapter_format import CONTRADICTIONS, AdapterFileError
from keras_geolora.files.products import add_products
from keras_geolora.keras_internals import all_layers
from keras_geolora.layers.adapted import DEFAULT
from keras_geolora.layers.registry import kernel_shape, kernel_view
from keras_geolora.layers.tree import stable_paths
from keras_geolora.model.checks import check_can_adapt, check_model, check_name
from keras_geolora.model.parts import backbone_of


def import_keras_lora(model, path, name=DEFAULT):
    """Loads a file of KerasHub's `save_lora_weights` into a model, exactly.

    Keras factors a kernel with three axes along the last one only, so its rank
    as a matrix can be higher than the rank in the file.

    Args:
        model: Built KerasHub backbone, or task with one, without Keras' own
            LoRA.
        path: String or path, ending in `.lora.h5`.
        name: String, the name of the adapter. Defaults to `"default"`.

    Returns:
        The model itself.

    Raises:
        TypeError: If `model` is not a `keras.Model`.
        OSError: If there is no such file, or it is not an HDF5 file.
        ValueError: If the file does not fit the model. The model is unchanged
            then.

    Example:

    ```python
    import tempfile

    import keras_hub
    import keras_geolora

    def pretrained():
        return keras_hub.models.BertBackbone(
            vocabulary_size=32,
            num_layers=1,
            num_heads=2,
            hidden_dim=16,
            intermediate_dim=32,
        )

    other = pretrained()
    other.enable_lora(rank=2)
    model = pretrained()
    with tempfile.TemporaryDirectory() as folder:
        other.save_lora_weights(f"{folder}/mine.lora.h5")
        keras_geolora.import_keras_lora(model, f"{folder}/mine.lora.h5")
    assert model.geolora_adapters() == ["default"]
    ```
    """
    check_model(model)
    check_name(name)
    check_can_adapt(model, name)
    scope = backbone_of(model)
    # KerasHub numbers the layers that have weights.
    counted = [x for x in all_layers(scope)[1:] if x.weights]
    path_of = {id(layer): p for p, layer in stable_paths(scope).items()}
    shapes = {
        index: kernel_view(layer).shape
        for index, layer in enumerate(counted)
        if kernel_shape(layer) is not None and hasattr(layer, "kernel")
    }
    layers, updates = {}, {}
    for index, (a, b) in read_keras_lora(path, shapes).items():
        layer = counted[index]
        place = path_of[id(layer)]
        layers[place] = layer
        matrix = kernel_view(layer).to_matrix(np.tensordot(a, b, 1))
        updates[place] = matrix, np.eye(matrix.shape[1])
    add_products(model, name, layers, updates)
    return model


def read_keras_lora(path, shapes):
    """Returns a dict from the number of a layer to its two factors.

    Args:
        path: String or path.
        shapes: Dict from the number of a layer to the shape of its kernel.
    """
    pairs = {}
    with h5py.File(path, "r") as file:
        try:
            for key, group in file["lora"].items():
                if key.isdecimal():
                    a, b = (group["vars"][f"lora_kernel_{x}"] for x in "ab")
                    # A file may declare any size: check before reading.
                    found = (*a.shape[:-1], b.shape[1])
                    rank = min(np.prod(found[:-1]), found[-1])
                    if (
                        found != shapes.get(int(key))
                        or not a.shape[-1] == b.shape[0] <= rank
                        or (a.dtype.kind, b.dtype.kind) != ("f", "f")
                    ):
                        raise AdapterFileError(
                            f"'{path}' has factors of shapes {a.shape} and "
                            f"{b.shape} for layer {key}, counting only layers "
                            "with weights, but the kernel of that layer has "
                            f"shape {shapes.get(int(key))}. The file belongs "
                            "to another model. Nothing was loaded."
                        )
                    pairs[int(key)] = np.array(a), np.array(b)
        except AdapterFileError:
            raise
        except (*CONTRADICTIONS, IndexError) as error:
            raise AdapterFileError(
                f"'{path}' was not written by KerasHub's `save_lora_weights`."
            ) from error
    if not pairs:
        raise AdapterFileError(f"'{path}' has no LoRA weights.")
    for index, factors in pairs.items():
        if not all(np.isfinite(x).all() for x in factors):
            raise AdapterFileError(
                f"Layer {index} has values that are not finite."
            )
    return pairs
