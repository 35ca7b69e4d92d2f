"""Adapters of a weight that belongs to no layer of its own.

The experts of a mixture are such weights, and what a user's layer makes with
`add_weight`. The layer that owns the weight keeps its code. While it is called,
reading the weight gives the sum of the weight and the update.
"""

import contextlib
import contextvars
import dataclasses
import functools
import types

import keras
from keras import ops

from keras_geolora.distribution.layouts import factor_layouts
from keras_geolora.keras_internals import (
    become_plain_variable,
    become_shown,
    direct_layers,
    in_layer_call,
    renew_torch_parameters,
    training_now,
    unlocked,
)
from keras_geolora.layers.adapted import (
    DEFAULT,
    AdaptedLayer,
    adapter_name,
    check_adaptable,
)
from keras_geolora.layers.adapter_bank import is_routed
from keras_geolora.layers.einsum_products import (
    Labels,
    einsum_product,
    sum_pays,
)
from keras_geolora.layers.in_place import (
    READERS,
    become_adapted,
    become_plain,
    name_scopes_of,
    reading_itself,
)
from keras_geolora.layers.kernel_view import KernelView
from keras_geolora.layers.linked import linked
from keras_geolora.layers.prepared import prepared_product_of
from keras_geolora.layers.products import may_train, transposed

# Sums of weights and updates in the running calls of this thread, by the ids of
# variables.
SUMS = contextvars.ContextVar(
    "keras_geolora_sums", default=types.MappingProxyType({})
)
# Weights in these calls whose sums are not formed beforehand, by the same ids.
APART = contextvars.ContextVar(
    "keras_geolora_apart", default=types.MappingProxyType({})
)


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a weight is; Keras does not look for layers and variables here.

    Attributes:
        owner: The layer that holds the variable, or runs the cell that does.
        variable: The variable.
        view: The `KernelView` of the variable.
        axes: String that the user gave for the view, or `None`.
    """

    owner: keras.layers.Layer
    variable: keras.Variable
    view: KernelView
    axes: str | None = None


class AdaptedWeight(AdaptedLayer, keras.layers.Layer):
    """A weight that belongs to no layer of its own, and its adapters.

    A layer inside the owner of the weight, for as long as it has adapters.
    The gradient of the sum of weight and update is formed, as large as the
    weight, and projected at once onto the factors.

    Args:
        source: `Source`.
        name: String, unique among the weights of the owner.
    """

    def __init__(self, source, name):
        super().__init__(name=name, dtype=source.owner.compute_dtype)
        self.source = source
        with name_scopes_of(source.owner):
            self.build()

    def build(self, input_shape=None):
        self.built = True

    @classmethod
    def adapt(cls, layer, name=DEFAULT, train_bias=False, **options):
        """Adds an adapter to a weight and activates it.

        Args:
            layer: `AdaptedWeight`.
            name: String, the name of the adapter.
            train_bias: Bool, without effect here.
            **options: As in `LowRankAdapter`.

        Returns:
            The same object.
        """
        check_adaptable(layer, name)
        check_options(layer, options)
        active = layer.adapter_state.active
        try:
            with name_scopes_of(layer):
                layer._add_adapter(name, options)
        except BaseException:  # including interrupts
            layer._give_up_adapter(name, active)
            raise
        return layer

    @property
    def variable(self):
        """The `keras.Variable` of the owner."""
        return self.source.variable

    @property
    def trainable(self):
        """Settable boolean, as on any layer, but the weight stays frozen."""
        return AdaptedLayer.trainable.fget(self)

    @trainable.setter
    def trainable(self, value):
        AdaptedLayer.trainable.fset(self, value)
        if self._adapters:  # the owner has just made it trainable
            self.variable.trainable = False

    @staticmethod
    def view_of(layer):
        return layer.source.view

    def kernels(self):
        return [self.variable]

    def adapter_layouts(self, name):
        view = self.kernel_view
        axes = [view.rows, view.columns, *([view.batch] if view.batch else [])]
        return factor_layouts(
            self.path, adapter_name(name), self.variable, axes
        )

    def kernel_norm(self):
        matrix = self.kernel_view.to_matrix(ops.cast(self.variable, "float32"))
        norms = ops.sqrt(ops.sum(ops.square(matrix), axis=(-2, -1)))
        return ops.reshape(norms, (-1,)) if self.kernel_view.batch else norms

    def sum(self):
        """Returns the sum of weight and update, as the owner computes with it.

        It is rounded only once, to the dtype of the weight.
        """
        with reading_itself(self):
            kernel = self.variable.value
        dtype = keras.backend.standardize_dtype(kernel.dtype)
        wide = "float64" if dtype == "float64" else "float32"
        update = ops.cast(self.delta(), wide)
        return ops.cast(ops.add(ops.cast(kernel, wide), update), dtype)

    def prepare(self, at_rest):
        """Returns the sum, which stays the same for many calls."""
        return self.sum() if self.acts else None

    def shown(self):
        """Returns what the owner, or another layer, reads in a call.

        Returns:
            Tensor, the sum, or `None`, the weight itself.
        """
        key = id(self.variable)
        found = SUMS.get().get(key)
        called = key in APART.get() or in_layer_call()
        if found is None and self.acts and called:
            found = self.sum()
        return found

    @property
    def has_rule(self):
        """Bool, whether `einsum` applies to this weight in training."""
        return (
            bool(self.kernel_view.batch)
            and self.acts
            and not is_routed()
            and self.adapter.P is not None
            and not self.variable.trainable
            and prepared_product_of(self) is None
        )

    def einsum(self, equation, x):
        """Returns `ops.einsum(equation, x, weight + update)`, for training.

        The gradient of the sum is not formed, and the sum only where it pays.

        Args:
            equation: String.
            x: Tensor.

        Returns:
            Tensor, or `None` if there is no rule for these.
        """
        found = Labels.of(equation, self.kernel_view)
        if found is None or isinstance(x, keras.KerasTensor):
            return None
        labels, is_transposed = found
        x = ops.convert_to_tensor(x)
        dtype = keras.backend.standardize_dtype(x.dtype)
        if dtype != self.compute_dtype or len(x.shape) != len(labels.inputs):
            return None
        factors, view = self.adapter._factors(), self.kernel_view
        if is_transposed:
            factors = transposed(*factors)
        with reading_itself(self):
            kernel = ops.stop_gradient(ops.cast(self.variable.value, x.dtype))
        merged = self.compute_dtype == "float32" and sum_pays(
            labels.count_rows(x.shape), *view.matrix_shape
        )
        return einsum_product(
            labels, x, kernel, factors, self.adapter.scale, merged
        )

    @property
    def acts(self):
        """Bool, whether an adapter is active and not suspended."""
        return self._acting_adapter is not None

    @property
    def is_read_by_itself(self):
        """Bool, whether reading the weight gives it as it is stored."""
        return id(self) in READERS.get()

    def _plain_variables(self):
        return [self.variable]

    def _freeze(self):
        super()._freeze()
        self._enter_owner()

    def _give_up_adapter(self, name, active):
        super()._give_up_adapter(name, active)
        if not self._adapters:
            self._leave_owner()

    def _take_off_adapters(self):
        self._hold_adapters({})
        self.adapter_state.trainable_before.restore()
        self._leave_owner()

    def _enter_owner(self):
        owner = self.source.owner
        become_shown(self.variable, self)
        if not isinstance(owner, AdaptedOwner):
            become_adapted(owner, owner_class(type(owner)))
        with unlocked(owner):
            setattr(owner, attribute_of(self), self)
        renew_torch_parameters(owner)

    def _leave_owner(self):
        owner = self.source.owner
        if self in weights_in(owner):
            with unlocked(owner) as tracker:
                tracker.untrack(self)
                delattr(owner, attribute_of(self))
            renew_torch_parameters(owner)
        if isinstance(owner, AdaptedOwner) and not weights_in(owner):
            become_plain(owner)
        become_plain_variable(self.variable)


class AdaptedOwner:
    """Mixin for the class of a layer that owns adapted weights."""

    def get_config(self):
        """Refused: adapters belong to the model that was adapted."""
        names = [weight.name for weight in weights_in(self)]
        raise ValueError(
            "The adapters of a layer belong to the model on which "
            "`enable_geolora` was called. Save that model, or merge it first. "
            f"Received: layer '{self.name}' with adapted weights {names}"
        )


@functools.cache
def owner_class(plain):
    """Returns the class of an owner, given that of the plain layer."""
    with_rules = linked(plain.call, rule_of)

    @functools.wraps(plain.call)
    def call(self, *args, **kwargs):
        weights, apart, function = weights_in(self), [], plain.call
        if with_rules is not None and may_train(training_now()):
            apart = [weight for weight in weights if weight.has_rule]
            function = with_rules if apart else function
        with sums_of(weights, apart):
            return function(self, *args, **kwargs)

    members = {"plain_class": plain, "__module__": __name__, "call": call}
    return type(f"GeoLoRA{plain.__name__}", (AdaptedOwner, plain), members)


def rule_of(operand):
    """Returns the `AdaptedWeight` that multiplies by a variable, or `None`."""
    return APART.get().get(id(operand))


@contextlib.contextmanager
def sums_of(weights, apart=()):
    """Makes reading weights give the sums with their updates, for a block.

    Also where Keras knows of no call: in the backward pass of a layer that is
    computed again there.

    Args:
        weights: List of `AdaptedWeight`s.
        apart: List of those among them whose sums are not formed beforehand.
    """
    sums = {
        id(w.variable): sum_now(w) for w in weights if w.acts and w not in apart
    }
    tokens = (
        SUMS.set({**SUMS.get(), **sums}),
        APART.set({**APART.get(), **{id(w.variable): w for w in apart}}),
    )
    try:
        yield
    finally:
        SUMS.reset(tokens[0])
        APART.reset(tokens[1])


def sum_now(weight):
    """Returns the sum of a weight and its update, which may be prepared."""
    prepared = prepared_product_of(weight)
    return weight.sum() if prepared is None else prepared


def weights_in(owner):
    """Returns the `AdaptedWeight`s of a layer, which is their owner."""
    return [x for x in direct_layers(owner) if isinstance(x, AdaptedWeight)]


def attribute_of(weight):
    """Returns the attribute of its owner that holds an `AdaptedWeight`."""
    return f"geolora_{weight.name}"


def check_options(weight, options):
    """Refuses a dropout: the inputs of the update are not known."""
    if options.get("dropout"):
        raise ValueError(
            "The adapter of a weight that belongs to no layer of its own "
            "changes the weight and does not see its inputs, so it has no "
            "`dropout`. Write `dropout=0.0`. Received: "
            f"dropout={options['dropout']}, weight '{weight.path}'"
        )
