"""What every layer with an adapter shares."""

import dataclasses
import math
import types

import keras
import numpy as np
from keras import ops

from keras_geolora.distribution.layouts import (
    apart_from_map,
    factor_layouts,
    settle,
)
from keras_geolora.geometry.manifold import check_values
from keras_geolora.keras_internals import (
    in_layer_call,
    is_computed_again,
    own_trainable,
    renew_torch_parameters,
    set_own_trainable,
    unlist_attributes,
    unlocked,
)
from keras_geolora.layers.adapter import LowRankAdapter, check_rank
from keras_geolora.layers.in_place import (
    READERS,
    become_adapted,
    become_plain,
    forget_attributes,
    name_scopes_of,
    reading_itself,
    set_aside,
)
from keras_geolora.layers.options import AdapterOptions
from keras_geolora.layers.products import (
    is_sparse,
    may_train,
    merging_pays,
)

# The name of the adapter where nobody gave it one.
DEFAULT = "default"
# What an adapted layer knows beyond what the Keras layer does.
OWN_ATTRIBUTES = (
    "_adapters",
    "_active_adapter",
    "_adapter_options",
    "_trainable_before",
    "_paused_flags",
    "adaptation",
    "train_bias",
)


class KernelNorm:
    """The Frobenius norm of a layer's kernel, as a number where possible.

    Inside a compiled function a variable has no value to read; the norm is
    then the one at the time the adapter was added.
    """

    def __init__(self, layer):
        self.layer = layer
        self.known = None
        self.known = self()

    def __call__(self):
        try:
            return float(ops.convert_to_numpy(self.layer.kernel_norm()))
        except (NotImplementedError, TypeError):
            return self.known


class TrainableFlags:
    """Remembers which variables were trainable."""

    def __init__(self, variables):
        self.flags = [(v, v.trainable) for v in variables]

    def restore(self):
        for variable, trainable in self.flags:
            variable.trainable = trainable


class AdaptedLayer:
    """Mixin that gives a Keras layer with a kernel low-rank adapters.

    Without an adapter a class of this kind *is* the Keras layer it extends.
    Adapters come two ways: by arguments of the constructor, for a layer in a
    new model, or by `adapt`, for a built layer of a pretrained one, which
    changes its class in place. A layer may carry several adapters by name, of
    which one is active.

    A subclass names the Keras class it extends in `plain_class`, and says how
    the kernel of a layer of that class is seen as a matrix in `view_of`.
    """

    _adapter_options = None
    # How the variables of the Keras layer were before it was adapted, and
    # those that train again once the layer is no longer frozen as a whole.
    _trainable_before = TrainableFlags(())
    _paused_flags = TrainableFlags(())
    # Who gave the layer its adapters, and may switch them off.
    adaptation = None

    def __init__(
        self,
        *args,
        rank=None,
        max_rank=None,
        min_rank=None,
        scale=None,
        dropout=None,
        train_bias=False,
        seed=None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        options = {
            "max_rank": max_rank,
            "min_rank": min_rank,
            "scale": scale,
            "dropout": dropout,
            "seed": seed,
        }
        options = {k: v for k, v in options.items() if v is not None}
        if rank is None and (options or train_bias):
            raise ValueError(
                "The options of an adapter need a `rank`, for example "
                "`rank=8`. Received: rank=None, "
                f"{dict(options, train_bias=train_bias)}"
            )
        if rank is not None:
            check_rank("rank", rank, 1, float("inf"))
            options["rank"] = rank
        self._adapter_options = options
        self.train_bias = train_bias
        if self.built:  # by initial weights, as an `Embedding` may be
            self._add_adapter_of_options()

    def build(self, input_shape=None):
        super().build(input_shape)
        self._add_adapter_of_options()

    def _add_adapter_of_options(self):
        if self._adapter_options:
            check_without_lora(self)
            self._add_adapter(DEFAULT, self._adapter_options)

    @property
    def trainable(self):
        """Settable boolean, as of any layer, but the kernel stays frozen.

        With adapters `False` lets the active one rest, and what else trains;
        `True` lets the same train again. What is to train beside the adapter
        takes a `trainable` of its own: `layer.kernel.trainable = True`.
        """
        return own_trainable(self)

    @trainable.setter
    def trainable(self, value):
        if not self._adapters:
            keras.layers.Layer.trainable.fset(self, value)
            return
        before = own_trainable(self)
        if before and not value:
            self._pause()
        elif value and not before:
            self._paused_flags.restore()
        set_own_trainable(self, bool(value))
        self.activate_adapter(self._active_adapter)

    def _pause(self):
        """Freezes what trains of the Keras layer, and remembers it."""
        own = [v for v, _ in self._trainable_before.flags if v.trainable]
        self._paused_flags = TrainableFlags(own)
        for variable in own:
            variable.trainable = False

    def quantize(self, mode=None, type_check=True, config=None):
        """As the Keras layer; refused with an adapter."""
        if self._adapters:
            raise ValueError(
                "Quantize a layer before it is adapted; the adapter then "
                "trains in float32 over the quantized kernel. "
                f"Received: layer '{self.name}', which is adapted"
            )
        # Keras quantizes its own classes only, of which ours is one.
        ours = "plain_class" in vars(type(self))
        self._plain_quantize(mode, type_check and not ours, config)

    def _plain_quantize(self, mode, type_check, config):
        super().quantize(mode, type_check=type_check, config=config)

    def enable_lora(self, *args, **kwargs):
        """As the Keras layer; refused with an adapter."""
        if self._adapters:
            raise ValueError(
                "A layer has an adapter of this package or Keras' own LoRA, "
                "not both. Merge the adapter first: `merge_geolora()` of the "
                "model, or `merge()` of the layer. "
                f"Received: layer '{self.name}', which is adapted"
            )
        super().enable_lora(*args, **kwargs)

    @classmethod
    def adapt(cls, layer, name=DEFAULT, train_bias=False, **options):
        """Gives a built layer an adapter, in place, and activates it.

        Args:
            layer: Built layer of the class `cls.plain_class`, or of `cls`.
            name: String, the name of the adapter.
            train_bias: Bool, whether the bias keeps training.
            **options: As the arguments of `LowRankAdapter`.

        Returns:
            The same layer, now of class `cls`.
        """
        if type(layer) not in (cls, cls.plain_class):
            raise TypeError(
                f"`{cls.__name__}.adapt` takes a `{cls.plain_class.__name__}`."
                f" Received: {layer!r} (of type {type(layer).__name__})"
            )
        check_adaptable(layer, name)
        plain, active = type(layer), vars(layer).get("_active_adapter")
        try:
            if plain is not cls:
                become_adapted(layer, cls)
                layer._adapter_options = options
                layer.train_bias = train_bias
            with name_scopes_of(layer):
                layer._add_adapter(name, options)
        except BaseException:  # an interrupt as well
            if plain is cls:
                layer._give_up_adapter(name, active)
            elif type(layer) is cls:
                layer.detach_adapters()
            raise
        return layer

    def _give_up_adapter(self, name, active):
        """Forgets an adapter that was not finished."""
        self._hold_adapters(without(self._adapters, name))
        if not self._adapters:
            self._trainable_before.restore()
        self.activate_adapter(active)

    def _new_adapter(self, name, options):
        input_dim, output_dim = self.kernel_view.matrix_shape
        with apart_from_map(self.adapter_layouts(name)):
            adapter = LowRankAdapter(
                input_dim,
                output_dim,
                **options,
                # The policy of a quantized layer is not one for its adapter.
                dtype=self.compute_dtype,
                name=adapter_name(name),
            )
            settle(adapter.variables)
        adapter.kernel_norm = KernelNorm(self)
        return adapter

    def adapter_layouts(self, name):
        """Returns the layouts that the factors of an adapter get, by path.

        Args:
            name: String, the name of the adapter, which may be a new one.
        """
        return adapter_layouts(self, self.kernel_view, name)

    def _add_adapter(self, name, options):
        adapter = self._new_adapter(name, options)
        if not self._adapters:
            self._trainable_before = TrainableFlags(self.variables)
            self._freeze()
        self._hold_adapters({**self._adapters, name: adapter})
        self.activate_adapter(name)

    def _freeze(self):
        """Leaves nothing of the Keras layer trainable but, if asked, a bias."""
        for variable, _ in self._trainable_before.flags:
            variable.trainable = False
        if getattr(self, "bias", None) is not None:
            self.bias.trainable = self.train_bias
        if not self.trainable:
            self._pause()

    def _hold_adapters(self, adapters):
        """Holds adapters, in their order, instead of those that are held."""
        touched = [*self._adapters.values(), *adapters.values()]
        unlist_attributes(self, ["_adapters"])
        with unlocked(self) as tracker:
            # A new dict, since TensorFlow saves none that was mutated; and
            # first of all, for the sake of an interrupt.
            if adapters:
                self._adapters = dict(adapters)
            for adapter in touched:
                tracker.untrack(adapter)
            for adapter in adapters.values():
                tracker.track(adapter)
        if not adapters:
            forget_attributes(self, ["_adapters"])
        renew_torch_parameters(self)

    # Keras saves what it finds in attributes by alphabet, each object once:
    # with the underscore it finds adapters by name, not the active one first.
    _adapters = types.MappingProxyType({})

    @property
    def adapter(self):
        """The active `LowRankAdapter`, or `None`."""
        return self._adapters.get(vars(self).get("_active_adapter"))

    @property
    def is_adapted(self):
        """Bool, whether an adapter is active."""
        return self.adapter is not None

    @property
    def adapter_names(self):
        """List of the names of all adapters."""
        return list(self._adapters)

    def adapters_by_name(self):
        """Returns a dict from the names of all adapters to the adapters."""
        return dict(self._adapters)

    def options_of(self, name):
        """Returns the `AdapterOptions` of an adapter."""
        return AdapterOptions.of(self._adapters[name])

    def set_weights(self, weights):
        """As the Keras layer; refuses factors that are not on the manifold."""
        check_values(self.weights, weights)
        super().set_weights(weights)

    def activate_adapter(self, name):
        """Makes one adapter the one that acts, and trains if the layer does.

        Args:
            name: String. Without an adapter of this name none is active.
        """
        self._active_adapter = name
        for other, adapter in self._adapters.items():
            adapter.trainable = self.trainable and other == name

    def resize_adapter(self, name, max_rank):
        """Gives an adapter buffers of another width; nothing else changes.

        Args:
            name: String, the name of the adapter.
            max_rank: Int. Columns in use that do not fit are lost.
        """
        old = self._adapters[name]
        rank = min(old.rank, max_rank)
        options = self.options_of(name).with_columns(max_rank)
        with name_scopes_of(self):
            new = self._new_adapter(name, dataclasses.asdict(options))
        U, S, V = old.trimmed()
        for variable, value in ((new.U, U), (new.S, S[:rank]), (new.V, V)):
            buffer = np.zeros(variable.shape, "float32")
            buffer[: len(value), :rank] = value[:, :rank]
            variable.assign(buffer)
        random_states = zip(
            new.dropout.variables, old.dropout.variables, strict=True
        )
        for state, value in random_states:
            state.assign(value)
        new.trainable = old.trainable
        if self.adaptation is None:  # the layer's own, and so its config's
            self._adapter_options = {
                **self._adapter_options,
                "rank": options.rank,
                "max_rank": options.max_rank,
                "min_rank": options.min_rank,
            }
        self._hold_adapters({**self._adapters, name: new})

    def delete_adapter(self, name):
        """Forgets an adapter; without the last the Keras layer is left."""
        if self.adapter_names == [name]:
            self.detach_adapters()
        else:
            self._hold_adapters(without(self._adapters, name))

    def detach_adapters(self):
        """Takes off all adapters and turns back into the Keras layer.

        Returns:
            What `attach_adapters` needs to put them on again.
        """
        kept = {
            name: vars(self)[name]
            for name in OWN_ATTRIBUTES
            if name in vars(self)
        }
        kept["_adapters"] = dict(self._adapters)
        kept["__class__"] = type(self)
        try:
            self._take_off_adapters()
        except BaseException:  # an interrupt as well
            AdaptedLayer.attach_adapters(self, kept)
            raise
        return kept

    def _take_off_adapters(self):
        self._hold_adapters({})
        self._trainable_before.restore()
        forget_attributes(self, OWN_ATTRIBUTES)
        become_plain(self)
        if not self.trainable:
            keras.layers.Layer.trainable.fset(self, False)

    @staticmethod
    def attach_adapters(layer, kept):
        """Puts on the adapters that `detach_adapters` took off."""
        kept = dict(kept)
        become_adapted(layer, kept.pop("__class__"))
        adapters = kept.pop("_adapters")
        vars(layer).update(kept)
        layer._freeze()
        layer._hold_adapters(adapters)

    def merge(self):
        """Adds the active update to the kernel, and detaches all adapters.

        Returns:
            The same layer, now of class `plain_class`.
        """
        self._check_is_adapted()
        self.check_mergeable()
        self.merge_kernels()
        self.detach_adapters()
        return self

    def merge_kernels(self, sign=1):
        """Adds the active update to the kernel, or with -1 subtracts it."""
        for kernel, update in zip(self.kernels(), self._updates(), strict=True):
            merged = sum_of(kernel, update, sign)
            kernel.assign(ops.cast(merged, kernel.dtype))

    def check_mergeable(self):
        """Refuses to add an update to a quantized kernel."""
        if self.quantization_mode is not None:
            raise ValueError(
                "Adding an update to a quantized kernel would round most of "
                "it away. Serve the model with its adapter, or merge into "
                "the model in floating point and quantize that. Received: "
                f"layer '{self.name}' with "
                f"quantization_mode='{self.quantization_mode}'"
            )

    @property
    def rank(self):
        """Int, the rank of the active update."""
        self._check_is_adapted()
        return self.adapter.rank

    def delta(self):
        """Returns the update, `scale` included, in the kernel's shape."""
        self._check_is_adapted()
        return self.kernel_view.to_kernel(self.adapter.delta())

    def _check_is_adapted(self):
        if not self.is_adapted:
            raise ValueError(
                "This needs a layer with an adapter: write "
                f"`{type(self).__name__}(..., rank=8)` and build it, or call "
                "`model.enable_geolora()`. "
                f"Received: layer '{self.name}' without an adapter"
            )

    @property
    def _acting_adapter(self):
        if self.adaptation is not None and self.adaptation.suspended:
            return None
        return self.adapter

    def kernels(self):
        """List of the variables that merging changes."""
        with reading_itself(self):
            return [getattr(self, name) for name in self.kernel_names]

    @property
    def kernel_names(self):
        """Names of the attributes that hold the kernels."""
        return [self.kernel_view.name]

    def _shown(self, name, kernel):
        """Returns a kernel as who reads it now is to see it.

        Args:
            name: String, one of `kernel_names`.
            kernel: The variable, or what stands for it.

        Returns:
            Another layer that is being called gets the sum with the update,
            a tensor. The layer itself gets the kernel, and so does who reads
            outside of a call, and who reads what is quantized.
        """
        if (
            self._acting_adapter is None
            or id(self) in READERS.get()
            or self.quantization_mode is not None
            or not in_layer_call()
        ):
            return kernel
        with reading_itself(self):
            update = self._updates()[self.kernel_names.index(name)]
            return ops.cast(sum_of(kernel, update), self.compute_dtype)

    @staticmethod
    def view_of(layer):
        """Returns the `KernelView` of a built layer of the plain class."""
        raise NotImplementedError

    @property
    def kernel_view(self):
        """The `KernelView` of this layer."""
        return self.view_of(self)

    def _updates(self):
        """What merging adds to each of the kernels."""
        return [self.delta()]

    def kernel_norm(self):
        """Returns the Frobenius norm of the kernel, a scalar tensor."""
        kernel = ops.cast(self.kernels()[0], "float32")
        return ops.sqrt(ops.sum(ops.square(kernel)))

    def get_config(self):
        if self.adaptation is not None:
            raise ValueError(
                "The adapters of a layer belong to the model on which "
                "`enable_geolora` was called. Save that model, or merge it "
                "first. Received: layer "
                f"'{self.name}' of model '{self.adaptation.model_name}'"
            )
        config = super().get_config()
        if self._adapter_options:
            config.update(self._adapter_options, train_bias=self.train_bias)
        return config


class AdaptedProduct(AdaptedLayer):
    """Mixin for layers that compute `activation(inputs * kernel + bias)`.

    A subclass says what the product of inputs with a kernel is in
    `_kernel_product`, and that with the update in `_update_product`.
    """

    @property
    def kernel(self):
        """The kernel variable, without the update.

        To another layer that reads it in its own `call`, as a tied decoder
        does, it is a tensor with the update, so that merging changes nothing.
        """
        return self._shown("kernel", super().kernel)

    # Whether the update is never added to the kernel, which others share.
    keeps_update_apart = False

    @property
    def _stays_apart(self):
        # In lower precision the sum of kernel and update rounds the latter.
        return self.keeps_update_apart or self.compute_dtype != "float32"

    def _adapted_call(self, inputs, product):
        """Computes the layer, with one of the products below."""
        if self._acting_adapter is None:
            return super().call(inputs)
        with reading_itself(self):
            x = product(inputs)
        if self.bias is not None:
            x = ops.add(x, self._shaped_bias())
        if self.activation is not None:
            x = self.activation(x)
        return x

    def _choose_product(self, inputs, training):
        """Returns the fastest product of linear layers."""
        if self._acting_adapter is None:
            return None
        if self._stays_apart:
            return self._product_apart
        # What torch computes anew in the backward pass is not told `training`.
        anew = training is None and is_computed_again(self)
        if not (anew or may_train(training)):
            return self._product_with_sum
        (kernel,) = self.kernels()
        if self.adapter.dropout.rate or kernel.trainable or is_sparse(inputs):
            return self._product_apart
        rows = self._count_rows(inputs)
        if merging_pays(rows, *self.kernel_view.matrix_shape):
            return self._merged_product
        return self._product_apart

    def _count_rows(self, inputs):
        """The number of vectors in the inputs; unknown sizes count as many."""
        sizes = [float("inf") if n is None else n for n in inputs.shape]
        return math.prod(sizes) / self.kernel_view.input_dim

    def _product_apart(self, inputs):
        x = self._kernel_product(inputs, self.kernel)
        return ops.add(x, self._update_product(inputs))

    def _product_with_sum(self, inputs):
        # The operations of the Keras layer, so that a compiler fuses them as
        # it does there: a fresh adapter changes no bit.
        kernel = ops.add(self.kernel, self.delta())
        return self._kernel_product(inputs, kernel)

    def _merged_product(self, inputs):
        raise NotImplementedError

    def quantized_call(self, inputs, training=None):
        if self._acting_adapter is None:
            return super().quantized_call(inputs, training=training)
        with set_aside(self, "activation") as activation, reading_itself(self):
            x = super().quantized_call(inputs)
        x = ops.add(x, self._update_product(inputs))
        return x if activation is None else activation(x)

    def _kernel_product(self, inputs, kernel):
        raise NotImplementedError

    def _update_product(self, inputs):
        raise NotImplementedError

    def _rows_to_inputs(self, rows):
        """Brings rows `(n, input_dim)` into the shape of inputs."""
        return rows

    def _shaped_bias(self):
        return self.bias

    def kernel_norm(self):
        if self.quantization_mode is None:
            return super().kernel_norm()
        # The mean of `||z @ kernel||^2` over vectors z of random signs is
        # `||kernel||^2`; 64 of them are enough for a bound.
        rng = np.random.default_rng(0)
        signs = rng.choice([-1.0, 1.0], (64, self.kernel_view.input_dim))
        x = self._rows_to_inputs(ops.cast(signs, self.compute_dtype))
        with set_aside(self, "activation"):
            y = super().quantized_call(x)
            y = y - super().quantized_call(ops.zeros_like(x))
        return ops.sqrt(ops.sum(ops.square(ops.cast(y, "float32"))) / 64)


def adapter_name(name):
    """Returns what the layer of a named adapter is called."""
    return "adapter" if name == DEFAULT else f"adapter_{name}"


def adapter_layouts(layer, view, name):
    """Returns the layouts that the factors of an adapter get, by path.

    Args:
        layer: Layer, adapted or not.
        view: Its `KernelView`.
        name: String, the name of the adapter, which may be a new one.
    """
    with reading_itself(layer):
        kernel = getattr(layer, view.name)
    axes = view.rows, view.columns
    return factor_layouts(layer.path, adapter_name(name), kernel, axes)


def shape_of_kernel(layer):
    """Returns the shape of a kernel, also of a layer without adapters."""
    with reading_itself(layer):
        return tuple(layer.kernel.shape)


def sum_of(kernel, update, sign=1):
    """Adds an update to a kernel, or with -1 subtracts it, without loss."""
    wide = "float64" if kernel.dtype == "float64" else "float32"
    return ops.cast(kernel, wide) + sign * ops.cast(update, wide)


def without(adapters, name):
    """Returns the dict of all adapters but one."""
    return {other: x for other, x in adapters.items() if other != name}


def check_adaptable(layer, name=DEFAULT):
    """Refuses a layer that cannot carry another adapter."""
    if not layer.built:
        raise ValueError(
            "Only a built layer has a kernel to adapt. Call the model on "
            "a batch of data, or build it, first. "
            f"Received: layer '{layer.name}', which is not built"
        )
    if name in getattr(layer, "adapter_names", []):
        raise ValueError(
            "A layer carries one adapter of a name. Merge it with "
            "`model.merge_geolora()`, or choose another `name`. "
            f"Received: name='{name}', layer '{layer.name}', which has it"
        )
    check_without_lora(layer)
    if layer.quantization_mode not in (None, "int8", "int4", "gptq", "awq"):
        raise ValueError(
            "The kernel of an adapted layer is frozen: in floating point, or "
            "quantized to int8, int4, by GPTQ or by AWQ. Received: layer "
            f"'{layer.name}' with "
            f"quantization_mode='{layer.quantization_mode}'"
        )


def check_without_lora(layer):
    """Refuses a layer whose kernel is the sum that Keras' own LoRA makes."""
    if getattr(layer, "lora_enabled", False):  # some have no LoRA
        raise ValueError(
            "A layer with Keras' own LoRA cannot be adapted. "
            f"Received: layer '{layer.name}' with lora_enabled=True"
        )
