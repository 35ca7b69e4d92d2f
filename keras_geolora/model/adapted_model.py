"""The class of adapted models, its parts, and its checks."""

import contextlib
import dataclasses
import functools
import inspect
import json
import warnings

import keras
import numpy as np

from keras_geolora.adapted_model import unpickle
from keras_geolora.callbacks import EpochCut, RankLogger, SilentFailureGuard
from keras_geolora.distribution import tf_replicas
from keras_geolora.keras_internals import (
    own_trainable,
)
from keras_geolora.layers.factor import check_layers, check_values, factor_of
from keras_geolora.layers.in_place import become_adapted, become_plain
from keras_geolora.layers.options import AdapterOptions
from keras_geolora.layers.raw_weights import with_raw_weights
from keras_geolora.layers.registry import adapted_class
from keras_geolora.layers.tree import (
    inside,
    layers_with_adapters,
    owners_of_weights,
    stable_paths,
)
from keras_geolora.model.adaptation import Adaptation
from keras_geolora.model.buffers import resize_buffers
from keras_geolora.model.checks import (
    check_not_suspended,
    check_optimizer,
    check_optimizer_is_new,
)
from keras_geolora.model.compiled_functions import after_a_change, forget_traces
from keras_geolora.model.compiled_state import drop_unfit, fits
from keras_geolora.model.forgotten import (
    check_tokenizer,
    complete_configs,
    input_quantizers,
    restore_input_quantizers,
)
from keras_geolora.model.generation import generation_of
from keras_geolora.model.parts import adapted_parts, backbone_of, plain_class_of
from keras_geolora.optimizer.geolora import (
    find_geolora,
    renewed,
    take_attributes,
)
from keras_geolora.optimizer.of_model import trains_as_keras
from keras_geolora.viewing.reach import Reach

# Keys in files of weights, beside the numbers that Keras uses as keys.
PREFIX = "geolora_"
SIGNATURE = "geolora_signature"
BUFFERS = "geolora_buffers"
RANDOM = "geolora_random_"
# The share of the parameters without an adapter of which `fit` tells.
MUCH = 0.01
# Keras prints this when it cannot find the class in a file.
TO_LOAD = "This model has adapters: `import keras_geolora` before loading it."
BELONGS = "The adapters of this backbone belong to the task that was adapted."


class WeightsRefused(BaseException):
    """Stops `load_weights`, which continues after any `Exception`."""


class PausesAsAWhole:
    """Mixin for a model, or its backbone, that is partly frozen.

    Keras' `trainable = True` would unfreeze all of it.
    """

    @property
    def trainable(self):
        """Settable boolean; `True` restores what trained before `False`."""
        return own_trainable(self)

    @trainable.setter
    def trainable(self, value):
        owner = self.geolora_owner
        (owner.resume if value else owner.pause)(self)


@keras.saving.register_keras_serializable("keras_geolora")
class AdaptedModel(PausesAsAWhole):
    """Mixin for the class of a model that carries adapters."""

    # Whether `compile` chose `jit_compile` automatically.
    geolora_auto_compiled = False

    def compile(self, *args, **kwargs):
        """Like `keras.Model.compile`; an optimizer must be a `GeoLoRA`.

        On TensorFlow `jit_compile` defaults to `False`: XLA is many times
        slower at small singular value decompositions than TensorFlow itself
        (`benchmarks/decompositions.py`).
        """
        self.geolora_adaptation.take_in_changes()
        optimizer = argument(super().compile, "optimizer", args, kwargs)
        if optimizer not in (None, "auto") and trains_as_keras(self):
            check_optimizer(optimizer)
        self.geolora_auto_compiled = kwargs.get("jit_compile", "auto") == "auto"
        super().compile(*args, **kwargs)
        on_tensorflow = keras.backend.backend() == "tensorflow"
        if self.geolora_auto_compiled and on_tensorflow:
            self.jit_compile = False

    def export(self, filepath, *args, **kwargs):
        """Refused: the graph would multiply by every adapter separately."""
        raise ValueError(
            "Export an adapted model with `keras_geolora.export(model, "
            f"{filepath!r})`, which writes a SavedModel in the form that "
            "serves fastest. For other formats, merge first: "
            "`model.merge_geolora()`, `model.export(...)`, "
            f"`model.unmerge_geolora()`. Received: adapted model '{self.name}'"
        )

    def get_compile_config(self):
        """Like `keras.Model.get_compile_config`; `None` without `GeoLoRA`."""
        has_geolora = find_geolora(getattr(self, "optimizer", None)) is not None
        if not has_geolora or not fits(self):
            return None  # a file with it could not be loaded
        config = super().get_compile_config()
        # Includes the loss scaling that the policy `mixed_float16` adds: the
        # model may be loaded under another policy.
        config["optimizer"] = keras.saving.serialize_keras_object(
            self.optimizer
        )
        if self.geolora_auto_compiled:
            config["jit_compile"] = "auto"  # other backends choose anew
        return config

    def compile_from_config(self, config):
        """Like `keras.Model.compile_from_config`, also for KerasHub tasks.

        Keras skips classes with their own `compile`, so the state of the
        optimizer would be lost.
        """
        try:
            inspect.signature(super().compile).bind(**config)
        except TypeError:
            return super().compile_from_config(config)
        self.compile(**keras.saving.deserialize_keras_object(config))
        self._build_optimizer()

    def get_config(self):
        """Returns the configuration of the plain model and of the adapters."""
        check_not_suspended([self.geolora_adaptation])
        self.geolora_adaptation.take_in_changes()
        if len(adapted_parts(self)) > 1:
            raise ValueError(
                "A model whose parts were adapted separately cannot be saved "
                "as a whole. Adapt all of it with one `enable_geolora`, or "
                f"save only the weights. Received: model '{self.name}' with "
                "separately adapted parts: "
                f"{[x.name for x in adapted_parts(self)[1:]]}"
            )
        check_tokenizer(self)
        with as_plain(self), complete_configs(self):
            base = keras.saving.serialize_keras_object(self)
        base.pop("compile_config", None)  # this model has its own
        return {
            "to_load": TO_LOAD,
            "base": base,
            "input_quantizers": input_quantizers(self),
            "plan": self.geolora_adaptation.plan(),
            "trainable": self.trainable,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """Creates the plain model and adapts it by its configuration."""
        model = keras.saving.deserialize_keras_object(
            config["base"], custom_objects=custom_objects
        )
        # Files of version 0.1.0 have none.
        restore_input_quantizers(model, config.get("input_quantizers", {}))
        adapt_by_plan(model, config["plan"])
        if not config.get("trainable", True):  # early versions had none
            model.trainable = False
        return model

    def save(self, filepath, *args, **kwargs):
        """Like `keras.Model.save`, but a refusal keeps an existing file.

        Whole models in HDF5 are refused.

        Keras does not call `save_own_variables` of models there, so inactive
        adapters and random states would be lost.
        """
        if str(filepath).endswith((".h5", ".hdf5")):
            raise ValueError(
                "The legacy HDF5 format for whole models cannot store all of "
                "an adapted model. Write `model.save('model.keras')`, or "
                "`model.save_weights('model.weights.h5')` for the weights "
                f"alone. Received: filepath='{filepath}'"
            )
        check_layers(
            layers_with_adapters(self).values(),
            f"'{filepath}' was not written.",
        )
        # Raises before Keras empties the file, if something cannot be saved.
        keras.saving.serialize_keras_object(self)
        super().save(filepath, *args, **kwargs)

    def save_weights(self, filepath, *args, **kwargs):
        """Like `keras.Model.save_weights`; refuses invalid factors."""
        check_layers(
            layers_with_adapters(self).values(),
            f"'{filepath}' was not written.",
        )
        super().save_weights(filepath, *args, **kwargs)

    def __reduce__(self):
        """Like `keras.Model.__reduce__`, through a function with a name."""
        _, arguments = super().__reduce__()
        return unpickle, arguments

    def save_own_variables(self, store):
        """Also saves the values of inactive adapters."""
        adaptation = self.geolora_adaptation
        check_not_suspended([adaptation])
        adaptation.take_in_changes()
        self._build_optimizer()
        super().save_own_variables(store)
        said = json.dumps([adaptation.active, adaptation.signature()])
        store[SIGNATURE] = np.frombuffer(said.encode(), "uint8")
        said = json.dumps(adaptation.buffers())
        store[BUFFERS] = np.frombuffer(said.encode(), "uint8")
        for key, value in adaptation.stored_values().items():
            store[PREFIX + key] = value
        for index, state in enumerate(random_states(self)):
            store[f"{RANDOM}{index}"] = state

    def load_own_variables(self, store):
        """Loads what `save_own_variables` saved."""
        adaptation = self.geolora_adaptation
        check_not_suspended([adaptation])
        adaptation.take_in_changes()
        arrays = {key: store[key] for key in store.keys()}
        ours = {k: arrays.pop(k) for k in list(arrays) if k.startswith(PREFIX)}
        if SIGNATURE not in ours:
            self._refuse_weights(
                "These weights do not come from an adapted model. Load them "
                "into the plain model, before `enable_geolora` or after "
                f"`remove_geolora`. Received: weights for model '{self.name}'"
            )
        active, signature = json.loads(ours[SIGNATURE].tobytes())
        if signature != adaptation.signature():
            self._refuse_weights(
                "The weights must come from a model with the same adapters, "
                "in the same order, on the same layers, with the same "
                "`modules_to_save` and `train_bias`. Received: weights of "
                f"adapters {[name for name, *_ in signature]} for model "
                f"'{self.name}' with {list(adaptation.adapters)}"
            )
        if BUFFERS in ours:  # files of early versions have none
            resize_buffers(
                self,
                adaptation.with_buffers(json.loads(ours[BUFFERS].tobytes())),
            )
        super().load_own_variables(arrays)
        if active != adaptation.active:
            adaptation.activate(active)
            forget_traces(self)
            self._renew_optimizer()
        adaptation.restore_values(
            {key.removeprefix(PREFIX): x for key, x in ours.items()}
        )
        states = random_states(self)
        if len(states) != sum(key.startswith(RANDOM) for key in ours):
            warnings.warn(
                "The random states of dropout and similar layers were not "
                "loaded, because the file has them for a different number of "
                "layers. Training continues with other random numbers.",
                stacklevel=2,
            )
            return
        for index, state in enumerate(states):
            state.assign(ours[f"{RANDOM}{index}"])

    def load_weights(self, *args, **kwargs):
        """Like `keras.Model.load_weights`, with the optimizer's state."""
        self._build_optimizer()
        self.geolora_adaptation.refusal = WeightsRefused
        try:
            super().load_weights(*args, **kwargs)
        except WeightsRefused as error:
            raise ValueError(str(error)) from None
        finally:
            self.geolora_adaptation.refusal = ValueError

    def set_weights(self, weights):
        """Like `keras.Model.set_weights`; buffer widths may differ."""
        check_values(self.weights, weights)
        pairs = list(zip(self.weights, weights, strict=False))
        if len(pairs) == len(weights) == len(self.weights):
            resize_buffers(
                self,
                {
                    id(factor.adapter): np.shape(value)[-1]
                    for variable, value in pairs
                    if (factor := factor_of(variable))
                    and factor.role == "S"
                    and np.ndim(value) == len(variable.shape)
                },
            )
        super().set_weights(weights)

    def _refuse_weights(self, message):
        raise self.geolora_adaptation.refusal(message)

    def _tell_what_is_left(self):
        """Says once what the adapters do not reach, if that is much."""
        adaptation = self.geolora_adaptation
        if adaptation.said_what_is_left:
            return
        adaptation.said_what_is_left = True
        reach = Reach.of(self)
        if reach.share >= MUCH:
            print(reach.sentence())

    def _build_optimizer(self):
        # Keras does not load into an optimizer that is not built.
        optimizer = getattr(self, "optimizer", None)
        if find_geolora(optimizer) is None or not trains_as_keras(self):
            return
        if not optimizer.built:
            with tf_replicas.strategy_scope_of(self):
                optimizer.build(self.trainable_variables)

    def _build_optimizer_before_steps(self):
        # TensorFlow traces a step twice if it creates variables.
        optimizer = getattr(self, "optimizer", None)
        if optimizer is None or optimizer.built or not self.compiled:
            return  # before a look at all layers, which no step can afford
        if all(layer.built for layer in inside(self)):
            self._build_optimizer()

    def _renew_optimizer(self):
        """Builds the optimizer for the adapter whose state is loaded next."""
        if fits(self):
            return
        optimizer = getattr(self, "optimizer", None)
        if find_geolora(optimizer) is None or not trains_as_keras(self):
            drop_unfit(self)
            return
        new = renewed(optimizer)
        new.build(self.trainable_variables)
        take_attributes(optimizer, new)

    def quantize(self, *args, **kwargs):
        """Refused: a model is quantized before it is adapted."""
        raise ValueError(
            "Quantize a model before it is adapted; the adapters then train "
            "in float32 on top of the quantized kernels. Or merge first: "
            f"`model.merge_geolora()`. Received: adapted model '{self.name}'"
        )

    def fit(self, *args, **kwargs):
        """Like `keras.Model.fit`; cuts at epoch ends and shows the ranks.

        The first time it also says which share of the parameters no adapter
        reaches, if that is more than one percent and `verbose` is not 0.
        """
        check_not_suspended([self.geolora_adaptation])
        self.geolora_adaptation.take_in_changes()
        if self.compiled and trains_as_keras(self):
            optimizer = getattr(self, "optimizer", None)
            check_optimizer(optimizer)
            check_optimizer_is_new(optimizer, self.trainable_variables)
            self._build_optimizer_before_steps()
        parameters = inspect.signature(super().fit).parameters
        # KerasHub tasks have other positional arguments.
        names = list(parameters)
        by_position = dict(zip(names, args, strict=False))
        if {**by_position, **kwargs}.get("verbose", "auto"):
            self._tell_what_is_left()
        if "callbacks" in by_position:
            at = names.index("callbacks")
            args = (*args[:at], own_callbacks(args[at]), *args[at + 1 :])
        elif "callbacks" in names or takes_any(parameters):
            kwargs["callbacks"] = own_callbacks(kwargs.get("callbacks"))
        return super().fit(*args, **kwargs)

    def train_on_batch(self, *args, **kwargs):
        """Like `keras.Model.train_on_batch`."""
        self._build_optimizer_before_steps()
        return super().train_on_batch(*args, **kwargs)


class AdaptedScope(PausesAsAWhole):
    """Mixin for the class of a backbone that was adapted with its task."""

    def get_config(self):
        """Refused: adapters and their state belong to the task."""
        raise ValueError(
            f"{BELONGS} Save the task, or merge first: "
            f"`task.merge_geolora()`. Received: backbone '{self.name}'"
        )

    def save_weights(self, *args, **kwargs):
        """Refused: adapters and their state belong to the task."""
        self.get_config()

    def save_to_preset(self, *args, **kwargs):
        """Refused: adapters and their state belong to the task."""
        self.get_config()

    def export_to_transformers(self, *args, **kwargs):
        """Refused: adapters and their state belong to the task."""
        self.get_config()


def argument(function, name, args, kwargs):
    """Returns the value of one argument of a call, or `None`.

    Args:
        function: The function, which may be the user's.
        name: String, the name of the argument.
        args: Tuple, the positional arguments of the call.
        kwargs: Dict, the keyword arguments.
    """
    if name in kwargs:
        return kwargs[name]
    try:
        given = inspect.signature(function).bind(*args, **kwargs).arguments
    except TypeError:  # the call itself raises the better error
        return None
    return given.get(name)


def takes_any(parameters):
    """Returns whether a function takes any keyword arguments.

    Args:
        parameters: Mapping of `inspect.signature`.
    """
    kinds = [parameter.kind for parameter in parameters.values()]
    return inspect.Parameter.VAR_KEYWORD in kinds


def own_callbacks(callbacks):
    """Returns the callbacks of `fit`, with ours in front.

    Those that the user passed move there, too: what they log reaches all
    others.
    """
    if isinstance(callbacks, keras.callbacks.CallbackList):
        return callbacks
    if callbacks is None:
        callbacks = []
    elif not isinstance(callbacks, (list, tuple)):
        callbacks = [callbacks]
    front = []
    for own in (EpochCut, RankLogger, SilentFailureGuard):
        front += [c for c in callbacks if isinstance(c, own)] or [own()]
    return [*front, *(c for c in callbacks if c not in front)]


@functools.cache
def adapted_model_class(plain_class):
    """Returns the class of an adapted model of class `plain_class`."""
    members = {"plain_class": plain_class, "__module__": __name__}
    for refused in (save_to_preset, export_to_transformers):
        if hasattr(plain_class, refused.__name__):  # of KerasHub
            members[refused.__name__] = refused
    members |= generation_of(plain_class)
    if hasattr(plain_class, "backbone_cls"):
        # KerasHub's `from_preset` finds subclasses by their backbone.
        members["backbone_cls"] = None
    cls = type(
        f"GeoLoRA{plain_class.__name__}", (AdaptedModel, plain_class), members
    )
    # All are saved under one name, so that a fresh process finds it: they share
    # `from_config`.
    register = keras.saving.register_keras_serializable
    return register("keras_geolora", "AdaptedModel")(cls)


@functools.cache
def adapted_scope_class(plain_class):
    """Returns the class of a backbone that was adapted with its task."""
    return type(
        f"GeoLoRA{plain_class.__name__}",
        (AdaptedScope, plain_class),
        {"plain_class": plain_class, "__module__": __name__},
    )


def export_to_transformers(self, *args, **kwargs):
    """Refused: KerasHub writes plain models."""
    raise ValueError(
        "KerasHub can only export a plain model. Merge first, export, and "
        "unmerge: `model.merge_geolora()`, "
        "`model.export_to_transformers(...)`, `model.unmerge_geolora()`. Or "
        "export the adapter alone with `keras_geolora.export_peft(model, "
        f"folder)`. Received: adapted model '{self.name}'"
    )


def save_to_preset(self, *args, **kwargs):
    """Refused: a preset is a plain model."""
    raise ValueError(
        "A preset can only store a plain model. Merge first, save, and "
        "unmerge: `model.merge_geolora()`, `model.save_to_preset(...)`, "
        "`model.unmerge_geolora()`. Or save the adapted model with "
        f"`model.save('model.keras')`. Received: adapted model '{self.name}'"
    )


def add_adapter(
    model, name, layers, options, saved_layers, train_bias, asked=None
):
    """Adds a named adapter to a model, in place, and activates it.

    Args:
        model: Built `keras.Model`.
        name: String, the name of the adapter.
        layers: Dict from path to layer to adapt.
        options: Dict from path to `AdapterOptions`.
        saved_layers: List of layers that train in full.
        train_bias: Bool, whether the biases of the layers train.
        asked: Dict from path to the requested ranks that are larger than those
            in `options`, or `None`.

    Raises:
        ValueError: If an option does not fit a layer, or the model is frozen as
            a whole. The model is unchanged then, and after an interrupt.
    """
    adaptation = getattr(model, "geolora_adaptation", None)
    first = adaptation is None
    if first:
        adaptation = Adaptation(model, backbone_of(model))
    else:
        active, changes = adaptation.active, adaptation.manual_changes()
    try:
        if not first:
            adaptation.resume()
            others = adaptation.manual_changes(
                but=[*layers.values(), *saved_layers]
            )
        with tf_replicas.strategy_scope_of(model):
            for path, layer in layers.items():
                adapted_class(layer).adapt(
                    layer,
                    name,
                    train_bias=train_bias,
                    **dataclasses.asdict(options[path]),
                )
        adaptation.add(name, list(layers.values()), saved_layers, train_bias)
        adapter = adaptation.adapters[name]
        adapter.clipped = {
            place: asked[path]
            for place, path in zip(adapter.layers, layers, strict=True)
            if asked and asked.get(path)
        }
        if first:
            make_adapted(model, adaptation)
        else:
            adaptation.repeat_changes(others)
        after_a_change(model)
    except BaseException as error:
        for layer in layers.values():
            if name in getattr(layer, "adapter_names", []):
                layer.delete_adapter(name)
        if first:
            make_plain(model, adaptation)
            adaptation.frozen.thaw()
        else:
            adaptation.give_up(name, active)
            adaptation.repeat_changes(changes)
        forget_traces(model)
        if isinstance(error, ValueError):
            raise ValueError(
                f"{error} This concerns layer '{path}'; set its rank with "
                "`rank_pattern`, or leave it out with `exclude`."
            ) from error
        raise


def adapt_by_plan(model, plan):
    """Adapts a plain model by an `Adaptation.plan`."""
    if not model.built:
        raise ValueError(
            "To load an adapted model, Keras must be able to build the plain "
            "model first. Give its class a `build_from_config`, or give its "
            f"layers their input shapes. Received: model '{model.name}', "
            "which is not built"
        )
    scope = backbone_of(model)
    for path, layer in {"": scope, **stable_paths(scope)}.items():
        layer.trainable = path not in plan["frozen"]
    axes = {}
    for adapter in plan["adapters"]:
        axes.update(adapter.get("weight_axes", {}))  # early files have none
    paths = with_raw_weights(scope, axes)
    for adapter in plan["adapters"]:
        options = adapter["layers"]
        named = [*options, *adapter["modules_to_save"]]
        missing = [path for path in named if path not in paths]
        if missing:
            raise ValueError(
                "The model must have every layer that was adapted or listed "
                f"in `modules_to_save`. Received: model '{model.name}' "
                f"without {missing}"
            )
        add_adapter(
            model,
            adapter["name"],
            {path: paths[path] for path in options},
            {path: AdapterOptions(**x) for path, x in options.items()},
            [paths[path] for path in adapter["modules_to_save"]],
            adapter["train_bias"],
            adapter.get("clipped"),  # early files have none
        )
    model.geolora_adaptation.activate(plan["active"])
    model.geolora_adaptation.repeat_changes(plan["by_hand"])


def warn_of_what_stays(adaptations, stacklevel):
    """Warns of variables that keep their trained values."""
    thawed = [v.path for a in adaptations for v in a.thawed_variables()]
    if thawed:
        more = ", ..." if len(thawed) > 5 else ""
        warnings.warn(
            "Only variables that `enable_geolora` made trainable get their "
            "previous values back. For variables that you made trainable "
            "afterwards, list their layers in `modules_to_save` of "
            "`enable_geolora`. Left as they are: "
            f"{', '.join(thawed[:5])}{more}",
            stacklevel=stacklevel,
        )


def random_states(model):
    """Returns the states of random generators, which Keras does not save."""
    saved = {id(v) for v in model.weights}
    return [v for v in model.variables if id(v) not in saved]


@contextlib.contextmanager
def as_plain(model):
    """Gives a model and its layers their former classes for a block."""
    scope = model.geolora_adaptation.scope
    parts = [model] if scope is model else [model, scope]
    adapted = [
        *layers_with_adapters(model).values(),
        *owners_of_weights(model),
        *parts,
    ]
    classes = [type(layer) for layer in adapted]
    for layer in adapted:
        become_plain(layer)
    try:
        yield
    finally:
        for layer, cls in zip(adapted, classes, strict=True):
            become_adapted(layer, cls)


def make_adapted(part, adaptation):
    """Gives a model, and its backbone, their adapted classes."""
    part.geolora_adaptation = adaptation
    scope = adaptation.scope
    for model in (part, scope):
        model.geolora_owner = adaptation
    become_adapted(part, adapted_model_class(plain_class_of(part)))
    if scope is not part:
        become_adapted(scope, adapted_scope_class(plain_class_of(scope)))


def make_plain(part, adaptation):
    """Gives an adapted model, and its backbone, their former classes."""
    for model in {id(x): x for x in (part, adaptation.scope)}.values():
        become_plain(model)
        if hasattr(model, "geolora_owner"):
            del model.geolora_owner
    if hasattr(part, "geolora_adaptation"):
        del part.geolora_adaptation
    forget_traces(part)
