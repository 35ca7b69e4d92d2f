"""What an adapted model is: its class, its parts, and what it refuses."""

import functools
import inspect

import keras

from keras_geolora.callbacks import EpochCut, RankLogger, SilentFailureGuard
from keras_geolora.layers.adapted import become_adapted, become_plain
from keras_geolora.optimizer import GeoLoRA
from keras_geolora.targeting import carriers, inside

# Attributes in which Keras and KerasHub keep compiled functions.
FUNCTIONS = (
    "train_function",
    "test_function",
    "predict_function",
    "generate_function",
)


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


def adapted_parts(model):
    """Returns the model and the models inside that `enable_geolora` saw."""
    return [x for x in (model, *inside(model)) if isinstance(x, AdaptedModel)]


def adaptations_of(model):
    """Returns what was done to the model and to the models inside."""
    return [part.geolora_adaptation for part in adapted_parts(model)]


def make_adapted(part, adaptation):
    """Gives a model the class of an adapted one."""
    part.geolora_adaptation = adaptation
    become_adapted(part, adapted_model_class(type(part)))


def make_plain(part):
    """Gives an adapted model its former class."""
    become_plain(part)
    del part.geolora_adaptation
    forget_traces(part)


def swap_functions(model, functions):
    """Gives a model other compiled functions; returns those it had."""
    before = {n: getattr(model, n) for n in FUNCTIONS if hasattr(model, n)}
    for name in before:
        setattr(model, name, functions.get(name))
    return before


def forget_traces(model):
    """Drops what was remembered of the layers as they were.

    Compiled functions hold the old computation, and torch's modules a list of
    the old parameters.
    """
    for part in (model, *inside(model)):
        if hasattr(part, "_torch_params"):
            part._track_variables()
        if isinstance(part, keras.Model):
            swap_functions(part, {})
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


def check_adapted(model, what):
    """Refuses a model without adapters, or with those of another model."""
    layers = carriers(model)
    if not layers:
        raise ValueError(
            f"Only a model with adapted layers can be {what}; adapt it with "
            f"`model.enable_geolora()`. Received: model '{model.name}' "
            "without an adapted layer"
        )
    mine = adaptations_of(model)
    for layer in layers.values():
        owner = layer.adaptation
        if owner is not None and owner not in mine:
            raise ValueError(
                f"The adapters of this model belong to '{owner.model_name}', "
                "on which `enable_geolora` was called. Call the method there. "
                f"Received: model '{model.name}'"
            )


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


def check_at_rest(model, what):
    """Refuses what is no model, has no adapters, or has them disabled."""
    check_model(model)
    check_adapted(model, what)
    check_not_suspended(adaptations_of(model))


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
