"""The base classes of all layers with adapters."""

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
from keras_geolora.layers.adapter_bank import bank_of, is_routed
from keras_geolora.layers.adapter_state import AdapterState, TrainableFlags
from keras_geolora.layers.factor import check_values
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
from keras_geolora.layers.prepared import prepared_product_of
from keras_geolora.layers.products import (
    is_sparse,
    may_train,
    merging_pays,
    one_product_pays,
)

# The name of an adapter unless the user chooses one.
DEFAULT = "default"


class KernelNorm:
    """The Frobenius norm of a layer's kernel, as a float where possible.

    Of several matrices it is an array, with one number for each.

    Inside a compiled function variables cannot be read; this then returns the
    norm from when the adapter was added.
    """

    def __init__(self, layer):
        self.layer = layer
        self.known = None
        self.known = self()

    def __call__(self):
        try:
            norm = np.array(ops.convert_to_numpy(self.layer.kernel_norm()))
            return norm if norm.ndim else float(norm)
        except (NotImplementedError, TypeError):
            return self.known


class AdaptedLayer:
    """Mixin that adds low-rank adapters to a Keras layer with a kernel.

    Without an adapter the layer behaves exactly like the Keras layer it
    extends. Adapters are added by constructor arguments, for a layer of a new
    model, or by `adapt`, which changes the class of a built, pretrained layer
    in place. A layer may carry several named adapters, of which one is active.

    A subclass sets `plain_class` to the Keras class it extends, and defines in
    `view_of` how to view the kernel of such a layer as a matrix.
    """

    adapter_state = None

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
        self.adapter_state = AdapterState(options, train_bias)
        if self.built:  # as an `Embedding` with initial weights is
            self._add_adapter_of_options()

    def build(self, input_shape=None):
        super().build(input_shape)
        self._add_adapter_of_options()

    def _add_adapter_of_options(self):
        state = self.adapter_state
        # A layer that gets its weights is built before there is a state.
        if state is not None and state.options:
            check_without_lora(self)
            self._add_adapter(DEFAULT, state.options)

    @property
    def trainable(self):
        """Settable boolean, as on any layer, but the kernel stays frozen.

        On a layer with adapters, `False` freezes the active one and all else
        that trains; `True` makes the same variables train again. To train
        another variable as well, set its own flag:
        `layer.kernel.trainable = True`.
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
            self.adapter_state.paused.restore()
        set_own_trainable(self, bool(value))
        self.activate_adapter(self.adapter_state.active)

    def _pause(self):
        """Freezes the Keras layer's trainable variables and remembers them."""
        state = self.adapter_state
        own = [v for v, _ in state.trainable_before.flags if v.trainable]
        state.paused = TrainableFlags(own)
        for variable in own:
            variable.trainable = False

    def quantize(self, mode=None, type_check=True, config=None):
        """Like the Keras method; refuses a layer with an adapter."""
        if self._adapters:
            raise ValueError(
                "Quantize a layer before it is adapted; the adapter then "
                "trains in float32 on top of the quantized kernel. Received: "
                f"layer '{self.name}', which is adapted"
            )
        # Keras quantizes only its own classes; ours count as such.
        ours = "plain_class" in vars(type(self))
        self._plain_quantize(mode, type_check and not ours, config)

    def _plain_quantize(self, mode, type_check, config):
        super().quantize(mode, type_check=type_check, config=config)

    def enable_lora(self, *args, **kwargs):
        """Like the Keras method; refuses a layer with an adapter."""
        if self._adapters:
            raise ValueError(
                "A layer can have an adapter or Keras' own LoRA, not both. "
                "Merge the adapter first, with `merge_geolora()` of the model "
                f"or `merge()` of the layer. Received: layer '{self.name}', "
                "which is adapted"
            )
        super().enable_lora(*args, **kwargs)

    @classmethod
    def adapt(cls, layer, name=DEFAULT, train_bias=False, **options):
        """Adds an adapter to a built layer, in place, and activates it.

        Args:
            layer: Built layer of the class `cls.plain_class`, or of `cls`.
            name: String, the name of the adapter.
            train_bias: Bool, whether the bias keeps training.
            **options: As in `LowRankAdapter`.

        Returns:
            The same layer, now of class `cls`.
        """
        if type(layer) not in (cls, cls.plain_class):
            raise TypeError(
                f"`{cls.__name__}.adapt` takes a `{cls.plain_class.__name__}`."
                f" Received: {layer!r} (of type {type(layer).__name__})"
            )
        check_adaptable(layer, name)
        plain, active = type(layer), None
        try:
            if plain is cls:
                active = layer.adapter_state.active
            else:
                layer.adapter_state = AdapterState(options, train_bias)
                become_adapted(layer, cls)
            with name_scopes_of(layer):
                layer._add_adapter(name, options)
        except BaseException:  # including interrupts
            if plain is cls:
                layer._give_up_adapter(name, active)
            elif type(layer) is cls:
                layer.detach_adapters()
            else:
                forget_attributes(layer, ["adapter_state"])
            raise
        return layer

    def _give_up_adapter(self, name, active):
        """Removes an adapter that was not completed."""
        self._hold_adapters(without(self._adapters, name))
        if not self._adapters:
            self.adapter_state.trainable_before.restore()
        self.activate_adapter(active)

    def _new_adapter(self, name, options):
        input_dim, output_dim = self.kernel_view.matrix_shape
        with apart_from_map(self.adapter_layouts(name)):
            adapter = LowRankAdapter(
                input_dim,
                output_dim,
                **options,
                count=self.kernel_view.count,
                # Adapters must not get the policy of a quantized layer.
                dtype=self.compute_dtype,
                name=adapter_name(name),
            )
            settle(adapter.variables)
        adapter.kernel_norm = KernelNorm(self)
        return adapter

    def adapter_layouts(self, name):
        """Returns the layouts of the factors of an adapter, by path.

        Args:
            name: String, the name of an existing or new adapter.
        """
        return adapter_layouts(self, self.kernel_view, name)

    def _add_adapter(self, name, options):
        adapter = self._new_adapter(name, options)
        if not self._adapters:
            before = TrainableFlags(self._plain_variables())
            self.adapter_state.trainable_before = before
            self._freeze()
        self._hold_adapters({**self._adapters, name: adapter})
        self.activate_adapter(name)

    def _plain_variables(self):
        """Returns the variables of the Keras layer, without adapters."""
        return self.variables

    def _freeze(self):
        """Freezes the Keras layer, except the bias if `train_bias` is set."""
        for variable, _ in self.adapter_state.trainable_before.flags:
            variable.trainable = False
        if getattr(self, "bias", None) is not None:
            self.bias.trainable = self.adapter_state.train_bias
        if not self.trainable:
            self._pause()

    def _hold_adapters(self, adapters):
        """Replaces the adapters of the layer, in the given order."""
        touched = [*self._adapters.values(), *adapters.values()]
        unlist_attributes(self, ["_adapters"])
        with unlocked(self) as tracker:
            # A new dict, because TensorFlow does not save mutated ones; and set
            # first, in case of an interrupt.
            if adapters:
                self._adapters = dict(adapters)
            for adapter in touched:
                tracker.untrack(adapter)
            for adapter in adapters.values():
                tracker.track(adapter)
        if not adapters:
            forget_attributes(self, ["_adapters"])
        renew_torch_parameters(self)

    # Keras saves attributes in alphabetical order, each object once; the
    # underscore makes it find adapters in this dict first.
    _adapters = types.MappingProxyType({})

    @property
    def adapter(self):
        """The active `LowRankAdapter`, or `None`."""
        if not self._adapters:
            return None
        return self._adapters.get(self.adapter_state.active)

    @property
    def is_adapted(self):
        """Bool, whether an adapter is active."""
        return self.adapter is not None

    @property
    def adapter_names(self):
        """List of the names of all adapters."""
        return list(self._adapters)

    def adapters_by_name(self):
        """Returns a dict from name to adapter, active or not."""
        return dict(self._adapters)

    def options_of(self, name):
        """Returns the `AdapterOptions` of an adapter."""
        return AdapterOptions.of(self._adapters[name])

    def set_weights(self, weights):
        """Like the Keras method; refuses factors off the manifold."""
        check_values(self.weights, weights)
        super().set_weights(weights)

    def activate_adapter(self, name):
        """Activates one adapter, which trains if the layer does.

        Args:
            name: String. If no adapter has this name, none is active.
        """
        self.adapter_state.active = name
        for other, adapter in self._adapters.items():
            adapter.trainable = self.trainable and other == name

    def resize_adapter(self, name, max_rank):
        """Changes the width of an adapter's buffers, and nothing else.

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
        new.assign_factors(U[..., :rank], S[..., :rank, :rank], V[..., :rank])
        random_states = zip(
            new.dropout.variables, old.dropout.variables, strict=True
        )
        for state, value in random_states:
            state.assign(value)
        new.trainable = old.trainable
        if self.adaptation is None:  # the layer's config holds the options
            self.adapter_state.options = {
                **self.adapter_state.options,
                "rank": options.rank,
                "max_rank": options.max_rank,
                "min_rank": options.min_rank,
            }
        self._hold_adapters({**self._adapters, name: new})

    def delete_adapter(self, name):
        """Removes an adapter; without any, this is the Keras layer again."""
        if self.adapter_names == [name]:
            self.detach_adapters()
        else:
            self._hold_adapters(without(self._adapters, name))

    def detach_adapters(self):
        """Removes all adapters and turns back into the Keras layer.

        Returns:
            What `attach_adapters` needs to restore them.
        """
        kept = type(self), self.adapter_state, dict(self._adapters)
        try:
            self._take_off_adapters()
        except BaseException:  # including interrupts
            AdaptedLayer.attach_adapters(self, kept)
            raise
        return kept

    def _take_off_adapters(self):
        self._hold_adapters({})
        self.adapter_state.trainable_before.restore()
        forget_attributes(self, ["adapter_state"])
        become_plain(self)
        if not self.trainable:
            keras.layers.Layer.trainable.fset(self, False)

    @staticmethod
    def attach_adapters(layer, kept):
        """Restores the adapters that `detach_adapters` removed."""
        cls, state, adapters = kept
        layer.adapter_state = state
        become_adapted(layer, cls)
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
        """Adds the active update to the kernel; `sign=-1` subtracts it."""
        for kernel, update in zip(self.kernels(), self._updates(), strict=True):
            merged = sum_of(kernel, update, sign)
            kernel.assign(ops.cast(merged, kernel.dtype))

    def check_mergeable(self):
        """Refuses to add an update to a quantized kernel."""
        if self.quantization_mode is not None:
            raise ValueError(
                "Adding an update to a quantized kernel would round most of "
                "it away. Serve the model with its adapter, or merge the "
                "adapter into the floating-point model and quantize the "
                f"result. Received: layer '{self.name}' with "
                f"quantization_mode='{self.quantization_mode}'"
            )

    @property
    def rank(self):
        """Int, the rank of the active update, the largest of all matrices."""
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
    def adaptation(self):
        """The `Adaptation` that added the adapters, or `None`."""
        return self.adapter_state and self.adapter_state.adaptation

    @property
    def _acting_adapter(self):
        if self.adaptation is not None and self.adaptation.suspended:
            return None
        if is_routed():  # every row has its own
            return bank_of(self)
        return self.adapter

    def kernels(self):
        """Returns the list of the variables that merging changes."""
        with reading_itself(self):
            return [getattr(self, name) for name in self.kernel_names]

    @property
    def kernel_names(self):
        """Names of the attributes that hold the kernels."""
        return [self.kernel_view.name]

    def _shown(self, name, kernel):
        """Returns a kernel as its current reader should see it.

        Args:
            name: String, one of `kernel_names`.
            kernel: The variable, or a stand-in for it.

        Returns:
            A tensor, the sum of kernel and update, for another layer that reads
            it during a call. The kernel itself for this layer, for code outside
            of calls, and if it is quantized.
        """
        if (
            self._acting_adapter is None
            or id(self) in READERS.get()
            or self.quantization_mode is not None
            or not in_layer_call()
        ):
            return kernel
        if is_routed():
            raise ValueError(
                "Another layer reads the kernel of an adapted layer, and there "
                "is no single kernel where every row of a batch has its own "
                "adapter. Serve every adapter by itself: "
                "`export(model, path, adapters='all')`. Received: layer "
                f"'{self.name}'"
            )
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

    def prepare(self, at_rest):
        """Returns a function from inputs to product, for many calls.

        It has the weights of now, and no training. `None` if nothing can be
        prepared.

        Args:
            at_rest: Bool, whether `P` and `Q` are known to be zero.
        """
        return None

    def _updates(self):
        """Returns what merging adds to each of the kernels."""
        return [self.delta()]

    def kernel_norm(self):
        """Returns the Frobenius norm of the kernel, a scalar tensor.

        Of several matrices it has one number for each.
        """
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
        state = self.adapter_state
        if state.options:
            config.update(state.options, train_bias=state.train_bias)
        return config


class AdaptedProduct(AdaptedLayer):
    """Mixin for layers that compute `activation(inputs * kernel + bias)`.

    A subclass defines the product of inputs and kernel in `_kernel_product`,
    and that of inputs and update in `_update_product`.
    """

    @property
    def kernel(self):
        """The kernel variable, without the update.

        Another layer that reads it in its own `call`, such as a tied decoder,
        gets a tensor with the update, so that merging changes nothing.
        """
        return self._shown("kernel", super().kernel)

    # True where the kernel is shared, so that no update is added to it.
    keeps_update_apart = False

    @property
    def _stays_apart(self):
        # In lower precision, adding the update to the kernel would round it.
        return (
            self.keeps_update_apart
            or self.compute_dtype != "float32"
            or is_routed()
        )

    def _adapted_call(self, inputs, product):
        """Computes the layer with one of the products below."""
        if self._acting_adapter is None:
            return super().call(inputs)
        prepared = prepared_product_of(self)
        if prepared is not None:
            return self._finished(prepared(inputs))
        with reading_itself(self):
            x = product(inputs)
        return self._finished(x, biased=product == self._product_of_few)

    def _finished(self, x, biased=False):
        """Adds the bias to a product, and applies the activation."""
        if self.bias is not None and not biased:
            x = ops.add(x, self._shaped_bias())
        if self.activation is not None:
            x = self.activation(x)
        return x

    def _choose_product(self, inputs, training):
        """Returns the fastest product of linear layers."""
        if self._acting_adapter is None or prepared_product_of(self):
            return None  # and the call knows what to do
        if self._stays_apart:
            return self._product_apart
        # When torch recomputes a call for the backward pass, it omits
        # `training`.
        anew = training is None and is_computed_again(self)
        sizes = self._count_rows(inputs), *self.kernel_view.matrix_shape
        if not (anew or may_train(training)):
            many = merging_pays(*sizes)
            if many or is_sparse(inputs) or self._is_fused:
                return self._product_with_sum
            return self._product_of_few
        (kernel,) = self.kernels()
        if self.adapter.dropout.rate or kernel.trainable or is_sparse(inputs):
            return self._product_apart
        many = merging_pays(*sizes, self.adapter.max_rank)
        return self._merged_product if many else self._product_apart

    def _count_rows(self, inputs):
        """Returns the number of input vectors; unknown sizes are infinite."""
        sizes = [float("inf") if n is None else n for n in inputs.shape]
        return math.prod(sizes) / self.kernel_view.input_dim

    def _product_apart(self, inputs):
        x = self._kernel_product(inputs, self.kernel)
        return self._with_update(x, inputs)

    def _with_update(self, x, inputs):
        x = ops.add(x, self._update_product(inputs))
        bank = bank_of(self)
        return x if bank is None else bank.with_bias(x)

    @property
    def _is_fused(self):
        """Whether product, bias and activation are one operation.

        In TensorFlow's graphs they are, and this one has other last bits than
        several.
        """
        linear = self.activation in (None, keras.activations.linear)
        return keras.backend.backend() == "tensorflow" and not linear

    def _product_of_few(self, inputs):
        # The bias first: TensorFlow fuses it with the product, too.
        x = self._kernel_product(inputs, self.kernel)
        if self.bias is not None:
            x = ops.add(x, self._shaped_bias())
        factors = self.adapter.thin_factors()
        return ops.add(x, self._thin_product(inputs, *factors))

    def _product_with_sum(self, inputs):
        # The same operations as in the Keras layer, so that compilers fuse them
        # alike: a fresh adapter changes no bit.
        kernel = ops.add(self.kernel, self.delta())
        return self._kernel_product(inputs, kernel)

    def _merged_product(self, inputs):
        raise NotImplementedError

    def prepare(self, at_rest):
        if self._acting_adapter is None or self.quantization_mode is not None:
            return None
        (kernel,) = self.kernels()
        A, B = self.adapter.thin_factors(at_rest)
        if one_product_pays() and not self._stays_apart:
            total = self.kernel_view.to_kernel(A @ B)
            total += kernel.value  # in place, where tensors can be changed
            return lambda inputs: self._kernel_product(inputs, total)

        def product(inputs):
            x = self._kernel_product(inputs, kernel)
            return ops.add(x, self._thin_product(inputs, A, B))

        return product

    def quantized_call(self, inputs, training=None):
        if self._acting_adapter is None:
            return super().quantized_call(inputs, training=training)
        with set_aside(self, "activation") as activation, reading_itself(self):
            x = super().quantized_call(inputs)
        x = self._with_update(x, inputs)
        return x if activation is None else activation(x)

    def _kernel_product(self, inputs, kernel):
        raise NotImplementedError

    def _update_product(self, inputs):
        raise NotImplementedError

    def _thin_product(self, inputs, A, B):
        """Returns the product of inputs with the update `A @ B`."""
        raise NotImplementedError

    def _rows_to_inputs(self, rows):
        """Reshapes rows `(n, input_dim)` to the shape of inputs."""
        return rows

    def _shaped_bias(self):
        return self.bias

    @property
    def added_bias_shape(self):
        """Tuple, the shape in which the bias is added to outputs."""
        return tuple(self._shaped_bias().shape)

    def kernel_norm(self):
        if self.quantization_mode is None:
            return super().kernel_norm()
        # The mean of `||z @ kernel||^2` over vectors z of random signs is
        # `||kernel||^2`; 64 of them suffice for a bound.
        rng = np.random.default_rng(0)
        signs = rng.choice([-1.0, 1.0], (64, self.kernel_view.input_dim))
        x = self._rows_to_inputs(ops.cast(signs, self.compute_dtype))
        with set_aside(self, "activation"):
            y = super().quantized_call(x)
            y = y - super().quantized_call(ops.zeros_like(x))
        return ops.sqrt(ops.sum(ops.square(ops.cast(y, "float32"))) / 64)


def adapter_name(name):
    """Returns the name of the Keras layer that holds an adapter."""
    return "adapter" if name == DEFAULT else f"adapter_{name}"


def adapter_layouts(layer, view, name):
    """Returns the layouts of the factors of an adapter, by path.

    Args:
        layer: Layer, adapted or not.
        view: Its `KernelView`.
        name: String, the name of an existing or new adapter.
    """
    with reading_itself(layer):
        kernel = getattr(layer, view.name)
    axes = view.rows, view.columns
    return factor_layouts(layer.path, adapter_name(name), kernel, axes)


def shape_of_kernel(layer):
    """Returns the kernel shape of a layer, adapted or not."""
    with reading_itself(layer):
        return tuple(layer.kernel.shape)


def sum_of(kernel, update, sign=1):
    """Adds an update to a kernel without loss; `sign=-1` subtracts it."""
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
            "Every adapter of a layer needs its own name. Merge the adapter "
            "with `model.merge_geolora()`, or choose another `name`. "
            f"Received: name='{name}', layer '{layer.name}', which already "
            "has an adapter of that name"
        )
    check_without_lora(layer)
    if layer.quantization_mode not in (None, "int8", "int4", "gptq", "awq"):
        raise ValueError(
            "The frozen kernel of an adapted layer must be in floating point, "
            "or quantized to int8 or int4, with GPTQ or with AWQ. Received: "
            f"layer '{layer.name}' with "
            f"quantization_mode='{layer.quantization_mode}'"
        )


def check_without_lora(layer):
    """Refuses a layer that uses Keras' own LoRA."""
    if getattr(layer, "lora_enabled", False):  # some layers have no LoRA
        raise ValueError(
            "A layer with Keras' own LoRA cannot be adapted. "
            f"Received: layer '{layer.name}' with lora_enabled=True"
        )
