"""Convolution layers with a low-rank adapter."""

import keras
from keras import ops

from keras_geolora.layers.adapted import AdaptedProduct, shape_of_kernel
from keras_geolora.layers.adapter_bank import bank_of
from keras_geolora.layers.kernel_view import KernelView


class AdaptedConv(AdaptedProduct):
    """Mixin for convolutions.

    The kernel is viewed as a matrix of *positions and input channels* x *output
    channels*. With `groups` a row stands for an input channel of each group, as
    in the kernel itself.
    """

    @property
    def rank(self):
        """Int, the rank of the update; without one, the spatial dimensions.

        Keras' convolutions store the number of spatial dimensions as `rank`,
        and read it where no adapter acts.
        """
        if self._acting_adapter is not None:
            return self.adapter.rank
        if "rank" not in vars(self):
            raise AttributeError("rank")
        return vars(self)["rank"]

    @rank.setter
    def rank(self, spatial_dimensions):
        vars(self)["rank"] = spatial_dimensions

    @staticmethod
    def view_of(layer):
        shape = shape_of_kernel(layer)
        *rows, columns = range(len(shape))
        return KernelView("kernel", shape, tuple(rows), (columns,))

    def call(self, inputs):
        apart = self.is_adapted and (
            self._stays_apart or self.adapter.dropout.rate > 0
        )
        apart = apart or bank_of(self) is not None
        product = self._product_apart if apart else self._product_with_sum
        return self._adapted_call(inputs, product)

    def prepare(self, at_rest):
        return None  # it multiplies many rows in every call

    def _kernel_product(self, inputs, kernel):
        return self.convolution_op(inputs, kernel)

    def _update_product(self, inputs):
        bank = bank_of(self)
        if bank is not None:
            return bank.convolve(
                inputs,
                self._kernel_product,
                self.data_format == "channels_first",
            )
        update = ops.cast(self.delta(), self.compute_dtype)
        return self._kernel_product(self.adapter.dropout(inputs), update)

    def _shaped_bias(self):
        if self.data_format == "channels_last":
            return self.bias
        return ops.reshape(self.bias, (-1, *[1] * len(self.kernel_size)))


@keras.saving.register_keras_serializable(package="keras_geolora")
class GeoLoRAConv1D(AdaptedConv, keras.layers.Conv1D):
    """`keras.layers.Conv1D` with a frozen kernel and a low-rank update.

    The kernel is viewed as a matrix of *positions and input channels* x *output
    channels*; with `groups` a row stands for an input channel of each group.
    Without a `rank` this is a plain `keras.layers.Conv1D`.

    Args:
        filters: Int, the number of output channels.
        kernel_size: Int or tuple of ints.
        rank: Int or `None`, the initial rank. `None`, the default, means no
            adapter. The attribute `rank` is the rank of the update if there is
            one, and the number of spatial dimensions otherwise.
        dropout: Float in [0, 1) or `None`, dropout on the inputs of the
            update, which costs a second convolution. Defaults to 0.
        **kwargs: The other options of the adapter, as in `GeoLoRADense`, and of
            the layer, as in `keras.layers.Conv1D`.

    Example:

    ```python
    import numpy as np
    from keras_geolora import GeoLoRAConv1D

    layer = GeoLoRAConv1D(16, 3, rank=2)
    assert layer(np.ones((1, 9, 8))).shape == (1, 7, 16)
    assert layer.delta().shape == layer.kernel.shape
    ```
    """

    plain_class = keras.layers.Conv1D

    def _kernel_product(self, inputs, kernel):
        if self.padding != "causal":
            return super()._kernel_product(inputs, kernel)
        past = self.dilation_rate[0] * (self.kernel_size[0] - 1)
        padding = [[0, 0], [past, 0], [0, 0]]
        if self.data_format == "channels_first":
            padding = [[0, 0], [0, 0], [past, 0]]
        return ops.conv(
            ops.pad(inputs, padding),
            kernel,
            strides=list(self.strides),
            padding="valid",
            dilation_rate=self.dilation_rate,
            data_format=self.data_format,
        )


@keras.saving.register_keras_serializable(package="keras_geolora")
class GeoLoRAConv2D(AdaptedConv, keras.layers.Conv2D):
    """`keras.layers.Conv2D` with a frozen kernel and a low-rank update.

    The kernel is viewed as a matrix of *positions and input channels* x *output
    channels*; with `groups` a row stands for an input channel of each group.
    Without a `rank` this is a plain `keras.layers.Conv2D`.

    Args:
        filters: Int, the number of output channels.
        kernel_size: Int or tuple of ints.
        rank: Int or `None`, the initial rank. `None`, the default, means no
            adapter. The attribute `rank` is the rank of the update if there is
            one, and the number of spatial dimensions otherwise.
        dropout: Float in [0, 1) or `None`, dropout on the inputs of the
            update, which costs a second convolution. Defaults to 0.
        **kwargs: The other options of the adapter, as in `GeoLoRADense`, and of
            the layer, as in `keras.layers.Conv2D`.

    Example:

    ```python
    import numpy as np
    from keras_geolora import GeoLoRAConv2D

    layer = GeoLoRAConv2D(16, 3, rank=2)
    assert layer(np.ones((1, 9, 9, 8))).shape == (1, 7, 7, 16)
    assert layer.delta().shape == layer.kernel.shape
    ```
    """

    plain_class = keras.layers.Conv2D


@keras.saving.register_keras_serializable(package="keras_geolora")
class GeoLoRAConv3D(AdaptedConv, keras.layers.Conv3D):
    """`keras.layers.Conv3D` with a frozen kernel and a low-rank update.

    The kernel is viewed as a matrix of *positions and input channels* x *output
    channels*; with `groups` a row stands for an input channel of each group.
    Without a `rank` this is a plain `keras.layers.Conv3D`.

    Args:
        filters: Int, the number of output channels.
        kernel_size: Int or tuple of ints.
        rank: Int or `None`, the initial rank. `None`, the default, means no
            adapter. The attribute `rank` is the rank of the update if there is
            one, and the number of spatial dimensions otherwise.
        dropout: Float in [0, 1) or `None`, dropout on the inputs of the
            update, which costs a second convolution. Defaults to 0.
        **kwargs: The other options of the adapter, as in `GeoLoRADense`, and of
            the layer, as in `keras.layers.Conv3D`.

    Example:

    ```python
    import numpy as np
    from keras_geolora import GeoLoRAConv3D

    layer = GeoLoRAConv3D(16, 3, rank=2)
    assert layer(np.ones((1, 5, 5, 5, 8))).shape == (1, 3, 3, 3, 16)
    assert layer.delta().shape == layer.kernel.shape
    ```
    """

    plain_class = keras.layers.Conv3D
