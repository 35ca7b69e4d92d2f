"""How well an adapter file fits a model."""

import keras

from keras_geolora.files.adapter_format import some
from keras_geolora.files.base_weights import HEAD, fingerprint, keyed_variables
from keras_geolora.layers.raw_weights import with_raw_weights
from keras_geolora.layers.registry import kernel_shape, kernel_view
from keras_geolora.model.parts import backbone_of


class Fit:
    """Which parts of an adapter file fit a model.

    Attributes:
        layers: Dict from path to layer, of layers with a fitting adapter.
        saved_layers: List of the layers in `modules_to_save`.
        weights: List of pairs of a variable and its new value.
        differences: List of sentences about what does not fit. With `any_rank`,
            ranks may exceed the buffers of the model.
    """

    def __init__(self, model, name, description, tensors, any_rank=False):
        self.model = model
        self.any_rank = any_rank
        self.plan = description["adapter"]
        self.tensors = tensors
        self.differences = []
        axes = self.plan.get("weight_axes", {})  # early files have none
        self.paths = with_raw_weights(backbone_of(model), axes)
        self.existing = None
        adaptation = getattr(model, "geolora_adaptation", None)
        if adaptation is not None:
            self.existing = adaptation.adapters.get(name)
        self.layers = self._find_layers(name)
        self.saved_layers = self._saved_layers()
        self.weights = self._weights()
        self._compare_base(description["base"])

    def _find_layers(self, name):
        layers, absent = {}, []
        for path, options in self.plan["layers"].items():
            layer = self.paths.get(path)
            shape = kernel_shape(layer)
            if shape is None:
                absent.append(path)
                continue
            U, V = self.tensors[f"{path}.U"], self.tensors[f"{path}.V"]
            room = options["max_rank"]
            if self.existing is not None:
                if name not in getattr(layer, "adapter_names", ()):
                    self._note(f"the model's adapter is not on '{path}'")
                    continue
                adapter = layer.adapters_by_name()[name]
                if not self.any_rank:
                    room = adapter.max_rank
                if adapter.scale != options["scale"]:
                    self._note(
                        f"scale of '{path}': {options['scale']} in the file, "
                        f"{adapter.scale} in the model"
                    )
                    continue
            shape = (*batch_of(layer), *shape)
            found = (*U.shape[:-1], V.shape[-2])
            if found != shape:
                self._note(
                    f"shape of '{path}': {found} in the file, {shape} in the "
                    "model"
                )
            elif not options["rank"] <= room <= min(shape[-2:]):
                self._note(
                    f"rank of '{path}': {options['rank']} in the file, room "
                    f"for {room} in the model"
                )
            else:
                layers[path] = layer
        if absent:
            self._note(
                "the model has no layer that can be adapted at "
                f"{some(absent)}; it has {some(self._candidates())}"
            )
        if self.existing is not None:
            mine = {id(layer) for layer in self.existing.layers.values()}
            extra = mine - {id(self.paths.get(p)) for p in self.plan["layers"]}
            if extra:
                places = [p for p, x in self.paths.items() if id(x) in extra]
                self._note(f"the file has no adapter for {some(places)}")
        return layers

    def _saved_layers(self):
        saved = self.plan["modules_to_save"]
        absent = [path for path in saved if path not in self.paths]
        if absent:
            self._note(f"the model has no layer {some(absent)} to train")
        return [self.paths[path] for path in saved if path in self.paths]

    def _weights(self):
        expected = self._expected()
        factors = {f"{p}.{r}" for p in self.plan["layers"] for r in "USV"}
        given = set(self.tensors) - factors
        pairs = []
        for key in sorted(given):
            value, variable = self.tensors[key], expected.get(key)
            if variable is None:
                self._note(f"the model has no variable '{key}' to train")
            elif tuple(variable.shape) != value.shape:
                self._note(
                    f"shape of '{key}': {value.shape} in the file, "
                    f"{tuple(variable.shape)} in the model"
                )
            elif is_float(variable.dtype) != is_float(str(value.dtype)):
                self._note(
                    f"type of '{key}': {value.dtype} in the file, "
                    f"{variable.dtype} in the model"
                )
            else:
                pairs.append((variable, value))
        # An adapter of a backbone leaves the head of a task unchanged.
        headless = not any(key.startswith(HEAD) for key in given)
        missing = [
            key
            for key in expected
            if key not in given and not (headless and key.startswith(HEAD))
        ]
        if missing:
            self._note(f"the file has no values for {some(missing)}")
        return pairs

    def _expected(self):
        """Returns a dict from key to variable of what may be co-trained."""
        keyed = keyed_variables(self.model)
        if self.existing is not None:
            train = {id(v) for v in self.existing.co_trained}
        else:
            train = {
                id(v) for layer in self.saved_layers for v in layer.weights
            }
            if self.plan["train_bias"]:
                layers = self.layers.values()
                train |= {id(getattr(layer, "bias", None)) for layer in layers}
        return {
            key: variable
            for key, variable in keyed.items()
            if id(variable) in train
            or (self.existing is None and key.startswith(HEAD))
        }

    def _compare_base(self, base):
        mine = fingerprint(self.model, self.plan["layers"])
        other = [p for p in self.layers if mine[p] != base[p]]
        if other:
            self._note(
                f"the pretrained kernels of {len(other)} of "
                f"{len(self.layers)} layers differ from those that the "
                f"adapter was trained on: {some(other)}"
            )
        elif len(self.layers) == len(self.plan["layers"]) and (
            mine[""] != base[""]
        ):
            self._note(
                "pretrained weights outside of the adapted layers differ from "
                "those that the adapter was trained on"
            )

    def _candidates(self):
        return [p for p, x in self.paths.items() if kernel_shape(x) is not None]

    def _note(self, sentence):
        self.differences.append(sentence)


def batch_of(layer):
    """Returns `(count,)` for a layer with several matrices, or else `()`."""
    count = kernel_view(layer).count
    return () if count is None else (count,)


def is_float(dtype):
    """Returns whether a dtype holds real numbers."""
    return keras.backend.is_float_dtype(dtype)
