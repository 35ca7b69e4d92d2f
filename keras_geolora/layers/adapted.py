"""What every layer with an adapter shares."""

import contextlib

import keras
from keras import ops

from keras_geolora.layers.adapter import LowRankAdapter, check_rank


class KernelNorm:
    """The Frobenius norm of a kernel, as a number wherever that is possible.

    Inside a compiled function a variable has no value to read; the norm is
    then the one at the time the adapter was added.
    """

    def __init__(self, kernel):
        self.kernel = kernel
        self.known = None
        self.known = self()

    def __call__(self):
        kernel = ops.cast(self.kernel, "float32")
        norm = ops.sqrt(ops.sum(ops.square(kernel)))
        try:
            return float(ops.convert_to_numpy(norm))
        except (NotImplementedError, TypeError):
            return self.known


class TrainableFlags:
    """Remembers which variables were trainable."""

    def __init__(self, *variables):
        self.flags = [(v, v.trainable) for v in variables if v is not None]

    def restore(self):
        for variable, trainable in self.flags:
            variable.trainable = trainable


class AdaptedLayer:
    """Mixin that gives a Keras layer with a kernel a low-rank adapter.

    Without an adapter a class of this kind *is* the Keras layer it extends.
    Adapters come two ways: by arguments of the constructor, for a layer in a
    new model, or by `adapt`, for a built layer of a pretrained one, which
    changes its class in place.

    A subclass names the Keras class it extends in `plain_class` and says how
    its kernel is seen as a matrix: `kernel_matrix_shape`,
    `matrix_to_kernel`, `_kernel_product` and `_adapter_product`.
    """

    @classmethod
    def adapt(cls, layer, train_bias=False, **options):
        """Gives a built layer of `plain_class` an adapter, in place.

        Args:
            layer: Built layer of exactly the class `cls.plain_class`.
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
        cls._check_adaptable(layer)
        plain = type(layer)
        layer.__class__ = cls
        try:
            layer.train_bias = train_bias
            with contextlib.ExitStack() as scopes:
                # Variables get the paths that building the layer would give.
                for name in layer.path.split("/"):
                    scopes.enter_context(keras.name_scope(name))
                layer._add_adapter(options)
        except Exception:
            layer.__class__ = plain
            raise
        return layer

    @staticmethod
    def _check_adaptable(layer):
        if not layer.built:
            raise ValueError(
                "Only a built layer has a kernel to adapt. Call the model on "
                "a batch of data, or build it, first. "
                f"Received: layer '{layer.name}', which is not built"
            )
        if getattr(layer, "is_adapted", False):
            raise ValueError(
                "A layer carries one adapter. Merge it with "
                "`model.merge_geolora()` before you add another. "
                f"Received: layer '{layer.name}', which is adapted"
            )
        if layer.lora_enabled or layer.quantization_mode is not None:
            raise ValueError(
                "A layer with Keras' own LoRA or a quantized kernel cannot "
                f"be adapted. Received: layer '{layer.name}' with "
                f"lora_enabled={layer.lora_enabled}, "
                f"quantization_mode={layer.quantization_mode!r}"
            )

    def _init_adapter(self, train_bias=False, rank=None, **options):
        options = {k: v for k, v in options.items() if v is not None}
        if rank is None and (options or train_bias):
            raise ValueError(
                "The options of an adapter need a `rank`, for example "
                "`rank=8`. Received: rank=None, "
                f"{dict(options, train_bias=train_bias)}"
            )
        if rank is not None:
            check_rank("rank", rank, 1, float("inf"))
        self.train_bias = train_bias
        self.adapter_options = (
            None if rank is None else {"rank": rank, **options}
        )

    def build(self, input_shape):
        super().build(input_shape)
        if self.adapter_options:
            self._add_adapter(self.adapter_options)

    def _add_adapter(self, options):
        input_dim, output_dim = self.kernel_matrix_shape
        adapter = LowRankAdapter(
            input_dim,
            output_dim,
            **options,
            dtype=self.dtype_policy,
            name="adapter",
        )
        # Keras locks a layer once it is built. A layer may unlock itself.
        self._tracker.unlock()
        self.adapter_options = options
        self.adapter = adapter
        self._tracker.lock()
        adapter.kernel_norm = KernelNorm(self.kernel)
        self._trainable_before = TrainableFlags(self.kernel, self.bias)
        self.kernel.trainable = False
        if self.bias is not None:
            self.bias.trainable = self.train_bias

    def merge(self):
        """Adds the update to the kernel and turns back into the Keras layer.

        Returns:
            The same layer, now of class `plain_class`.
        """
        self._check_is_adapted()
        self.kernel.assign(
            ops.cast(
                ops.cast(self.kernel, "float32") + self.delta(),
                self.kernel.dtype,
            )
        )
        self._layers.remove(self.adapter)
        self._trainable_before.restore()
        del self.adapter, self.adapter_options, self._trainable_before
        del self.train_bias
        self.__class__ = self.plain_class
        return self

    @property
    def is_adapted(self):
        """Bool, whether the layer carries an adapter."""
        # Not a class attribute: it would hide the submodule from torch.
        return getattr(self, "adapter", None) is not None

    @property
    def rank(self):
        """Int, the rank of the update."""
        self._check_is_adapted()
        return self.adapter.rank

    def delta(self):
        """Returns the update, `scale` included, in the kernel's shape."""
        self._check_is_adapted()
        return self.matrix_to_kernel(self.adapter.delta())

    def _check_is_adapted(self):
        if not self.is_adapted:
            raise ValueError(
                "This needs a layer with an adapter: write "
                f"`{type(self).__name__}(..., rank=8)` and build it, or call "
                "`model.enable_geolora()`. "
                f"Received: layer '{self.name}' without an adapter"
            )

    def call(self, inputs, training=None):
        if not self.is_adapted:
            return super().call(inputs, training=training)
        if training or self.compute_dtype != "float32":
            x = self._kernel_product(inputs, self.kernel)
            x = ops.add(x, self._adapter_product(inputs, training))
        else:
            # The operations of the Keras layer, so that a compiler fuses
            # them as it does there: a fresh adapter changes no bit.
            kernel = ops.add(self.kernel, self.delta())
            x = self._kernel_product(inputs, kernel)
        if self.bias is not None:
            x = ops.add(x, self.bias)
        if self.activation is not None:
            x = self.activation(x)
        return x

    def get_config(self):
        config = super().get_config()
        if self.adapter_options:
            config.update(self.adapter_options, train_bias=self.train_bias)
        return config
