"""Dense layer with a low-rank adapter."""

import keras
from keras import ops

from keras_geolora.layers.adapted import AdaptedProduct
from keras_geolora.layers.kernel_view import KernelView


@keras.saving.register_keras_serializable(package="keras_geolora")
class GeoLoRADense(AdaptedProduct, keras.layers.Dense):
    """`keras.layers.Dense` with a frozen kernel and a low-rank update.

    Computes `activation(x @ kernel + scale * x @ U @ S @ V.T + bias)`, where
    only `U`, `S` and `V` train (and the bias on request). The optimizer,
    wrapped in `keras_geolora.GeoLoRA`, also finds the rank. Without a `rank`
    this is a plain `keras.layers.Dense`.

    Args:
        units: Int, the size of the output.
        rank: Int or `None`, the initial rank. `None`, the default, means no
            adapter.
        max_rank: Int or `None`, the largest rank. Defaults to `2 * rank`,
            clipped to the smaller side of the kernel.
        min_rank: Int or `None`, the smallest rank. Defaults to 1.
        scale: Float or `None`, constant strength of the update. Defaults
            to 1.
        dropout: Float in [0, 1) or `None`, dropout on the inputs of the
            update. Defaults to 0.
        train_bias: Bool, whether the bias of an adapted layer trains too.
            Defaults to `False`.
        seed: Int or `None`, for the random bases and the dropout.
        **kwargs: As in `keras.layers.Dense`.

    Input shape:
        `(batch, ..., input_dim)`.

    Output shape:
        `(batch, ..., units)`.

    Example:

    ```python
    import numpy as np
    from keras_geolora import GeoLoRADense

    layer = GeoLoRADense(4, rank=2)
    layer(np.ones((1, 8)))
    assert layer.rank == 2
    names = {v.name for v in layer.trainable_variables}
    assert names >= {"U", "S", "V"} and not names & {"kernel", "bias"}
    ```
    """

    plain_class = keras.layers.Dense

    @staticmethod
    def view_of(layer):
        # A quantized kernel has a different shape.
        shape = layer.input_spec.axes[-1], layer.units
        return KernelView("kernel", shape, rows=(0,), columns=(1,))

    def call(self, inputs, training=None):
        product = self._choose_product(inputs, training)
        return self._adapted_call(inputs, product)

    def _kernel_product(self, inputs, kernel):
        return ops.matmul(inputs, kernel)

    def _merged_product(self, inputs):
        return self.adapter.merged_call(inputs, self.kernel)

    def _thin_product(self, inputs, A, B):
        return ops.matmul(ops.matmul(ops.cast(inputs, A.dtype), A), B)

    def _update_product(self, inputs):
        # The adapter would read integers as row numbers.
        return self._acting_adapter(ops.cast(inputs, self.compute_dtype))
