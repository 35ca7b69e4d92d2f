"""Embedding layers with a low-rank adapter."""

import keras
from keras import ops

from keras_geolora.layers.adapted import AdaptedLayer
from keras_geolora.layers.in_place import reading_itself, set_aside
from keras_geolora.layers.kernel_view import KernelView


@keras.saving.register_keras_serializable(package="keras_geolora")
class GeoLoRAEmbedding(AdaptedLayer, keras.layers.Embedding):
    """`keras.layers.Embedding` with frozen rows and a low-rank update.

    Looks up rows of `embeddings + scale * U @ S @ V.T`; the product of the
    factors is never formed. Without a `rank` this is a plain
    `keras.layers.Embedding`.

    Args:
        input_dim: Int, the size of the vocabulary.
        output_dim: Int, the length of a row.
        rank: Int or `None`, the initial rank. `None`, the default, means no
            adapter.
        max_rank: Int or `None`, the largest rank. Defaults to `2 * rank`,
            clipped to the smaller side of the kernel.
        min_rank: Int or `None`, the smallest rank. Defaults to 1.
        scale: Float or `None`, constant strength of the update. Defaults
            to 1.
        dropout: Float in [0, 1) or `None`, the share of looked-up rows that
            get no update in training. Defaults to 0.
        seed: Int or `None`, for the random bases and the dropout.
        **kwargs: As in `keras.layers.Embedding`.

    Example:

    ```python
    import numpy as np
    from keras_geolora import GeoLoRAEmbedding

    layer = GeoLoRAEmbedding(100, 8, rank=2)
    assert layer(np.array([[3, 7, 7]])).shape == (1, 3, 8)
    assert layer.delta().shape == (100, 8)
    ```
    """

    plain_class = keras.layers.Embedding

    @staticmethod
    def view_of(layer):
        shape = layer.input_dim, layer.output_dim
        return KernelView("embeddings", shape, rows=(0,), columns=(1,))

    @property
    def embeddings(self):
        """The variable that holds all rows, without the update.

        Another layer that reads it in its own `call`, such as a tied head, gets
        a tensor with the update, so that merging changes nothing.
        """
        return self._shown("embeddings", super().embeddings)

    def kernel_norm(self):
        if self.quantization_mode is None:
            return super().kernel_norm()
        # Evenly spaced rows suffice for a bound.
        step = max(self.input_dim // 64, 1)
        ids = ops.arange(0, self.input_dim, step, dtype="int32")
        rows = ops.cast(super().quantized_call(ids), "float32")
        return ops.sqrt(self.input_dim * ops.mean(ops.sum(rows**2, axis=-1)))

    def call(self, inputs):
        with reading_itself(self):
            x = super().call(inputs)
        return self._add_rows(x, inputs)

    def quantized_call(self, inputs):
        with reading_itself(self):
            x = super().quantized_call(inputs)
        return self._add_rows(x, inputs)

    def _add_rows(self, x, inputs):
        if self._acting_adapter is None:
            return x
        # Missing entries of sparse ids are 0, as in Keras.
        ids = ops.convert_to_tensor(inputs, sparse=False)
        return ops.add(x, self._acting_adapter(ops.cast(ids, "int32")))


@keras.saving.register_keras_serializable(package="keras_geolora")
class GeoLoRAReversibleEmbedding(
    keras.layers.ReversibleEmbedding, GeoLoRAEmbedding
):
    """`keras.layers.ReversibleEmbedding` with a low-rank update.

    The update acts in both directions: it is added to the rows that are looked
    up, and its transpose to the matrix of the reverse projection, even if that
    is a separate one (`tie_weights=False`). Without a `rank` this is a plain
    `keras.layers.ReversibleEmbedding`.

    Args:
        input_dim: Int, the size of the vocabulary.
        output_dim: Int, the length of a row.
        rank: Int or `None`, the initial rank. `None`, the default, means no
            adapter.
        **kwargs: As in `GeoLoRAEmbedding` and
            `keras.layers.ReversibleEmbedding`.

    Example:

    ```python
    import numpy as np
    from keras_geolora import GeoLoRAReversibleEmbedding

    layer = GeoLoRAReversibleEmbedding(100, 8, rank=2)
    states = layer(np.array([[3, 7, 7]]))
    assert layer(states, reverse=True).shape == (1, 3, 100)
    ```
    """

    plain_class = keras.layers.ReversibleEmbedding

    def build(self, input_shape=None):
        # The adapter comes last, once both matrices exist.
        with set_aside(self, "adapter_state"):
            super().build(input_shape)
        self._add_adapter_of_options()

    # The Keras class sets an attribute of this name if nothing is tied.
    @property
    def reverse_embeddings(self):
        """The variable of the reverse projection; reads like `embeddings`."""
        if "reverse_embeddings" not in vars(self):
            raise AttributeError("reverse_embeddings")
        kernel = vars(self)["reverse_embeddings"]
        return self._shown("reverse_embeddings", kernel)

    @reverse_embeddings.setter
    def reverse_embeddings(self, variable):
        vars(self)["reverse_embeddings"] = variable

    @reverse_embeddings.deleter
    def reverse_embeddings(self):
        del vars(self)["reverse_embeddings"]

    @property
    def kernel_names(self):
        if self.tie_weights:
            return super().kernel_names
        return [*super().kernel_names, "reverse_embeddings"]

    def _updates(self):
        if self.tie_weights:
            return super()._updates()
        return [*super()._updates(), ops.transpose(self.delta())]

    def quantize(self, mode=None, type_check=True, config=None):
        # In this class `AdaptedLayer` comes after the Keras class.
        AdaptedLayer.quantize(self, mode, type_check, config)

    def _plain_quantize(self, mode, type_check, config):
        keras.layers.ReversibleEmbedding.quantize(
            self, mode, type_check=type_check, config=config
        )

    def call(self, inputs, reverse=False):
        if not reverse:
            return super().call(inputs)
        return self._reverse(super().call, inputs)

    def quantized_call(self, inputs, reverse=False):
        if not reverse:
            return super().quantized_call(inputs)
        # Skips `GeoLoRAEmbedding`, which would look up rows.
        call = super(GeoLoRAEmbedding, self).quantized_call
        return self._reverse(call, inputs)

    def _reverse(self, call, inputs):
        if self._acting_adapter is None:
            return call(inputs, reverse=True)
        with set_aside(self, "logit_soft_cap") as cap, reading_itself(self):
            logits = call(inputs, reverse=True)
        update = self._acting_adapter(inputs, transpose=True)
        logits = ops.add(logits, ops.cast(update, logits.dtype))
        if cap is None:
            return logits
        return ops.multiply(ops.tanh(ops.divide(logits, cap)), cap)
