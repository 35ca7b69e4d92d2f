"""EinsumDense layer with a low-rank adapter."""

import math

import keras
from keras import ops

from keras_geolora.layers.adapted import AdaptedProduct, reading_itself


@keras.saving.register_keras_serializable(package="keras_geolora")
class GeoLoRAEinsumDense(AdaptedProduct, keras.layers.EinsumDense):
    """`keras.layers.EinsumDense` with a frozen kernel and a low-rank update.

    The kernel is seen as a matrix of *contracted axes* x *kept axes*: rank 4
    of the query of an eight-head attention, `"abc,cde->abde"`, is rank 4 of
    the matrix from `c` to `(d, e)`. Without a `rank` it is
    `keras.layers.EinsumDense`.

    Args:
        equation: String, as in `keras.layers.EinsumDense`. An axis that
            inputs, kernel and output share would make a batch of matrices
            of the kernel, and one that only the inputs have a sum; such an
            equation cannot carry an adapter.
        output_shape: As in `keras.layers.EinsumDense`.
        rank: Int or `None`, the rank at the start. `None`, the default, means
            no adapter.
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
        **kwargs: As `keras.layers.EinsumDense`.

    Example:

    ```python
    import numpy as np
    from keras_geolora import GeoLoRAEinsumDense

    query = GeoLoRAEinsumDense("abc,cde->abde", (None, 2, 4), rank=2)
    assert query(np.ones((1, 3, 8))).shape == (1, 3, 2, 4)
    assert query.delta().shape == query.kernel.shape == (8, 2, 4)
    ```
    """

    plain_class = keras.layers.EinsumDense

    @property
    def kernel_matrix_shape(self):
        view = matrix_view(self)
        return math.prod(view.contracted_shape), math.prod(view.kept_shape)

    @property
    def kernel_matrix_axes(self):
        view = matrix_view(self)
        return [
            [view.kernel.index(a) for a in axes]
            for axes in (view.contracted, view.kept)
        ]

    def matrix_to_kernel(self, matrix):
        return matrix_view(self).matrix_to_kernel(matrix)

    def call(self, inputs, training=None):
        product = self._choose_product(inputs, training)
        return self._adapted_call(inputs, product)

    def _kernel_product(self, inputs, kernel):
        return ops.einsum(self.equation, inputs, kernel)

    def _merged_product(self, inputs):
        view = matrix_view(self)
        kernel = view.kernel_to_matrix(self.kernel)
        rows = view.inputs_to_rows(inputs)
        return view.rows_to_outputs(self.adapter.merged_call(rows, kernel))

    def _update_product(self, inputs):
        view = matrix_view(self)
        # Integers would mean rows of the update.
        x = ops.cast(inputs, self.compute_dtype)
        return view.rows_to_outputs(self.adapter(view.inputs_to_rows(x)))

    def _rows_to_inputs(self, rows):
        return matrix_view(self).rows_to_inputs(rows)


def matrix_view(layer):
    """Returns the `MatrixView` of a built `EinsumDense`."""
    # A quantized kernel has another shape.
    shape = getattr(layer, "original_kernel_shape", None)
    with reading_itself(layer):
        return MatrixView(layer.equation, shape or layer.kernel.shape)


class MatrixView:
    """An einsum `inputs, kernel -> outputs` seen as a product of matrices.

    Every axis of the kernel is either contracted with the inputs or kept in
    the outputs, and every other axis of the inputs is kept.
    """

    def __init__(self, equation, kernel_shape):
        # "0" stands for all axes under the ellipsis.
        inputs, outputs = equation.replace("...", "0").split("->")
        self.inputs, self.kernel = inputs.split(",")
        self.outputs = outputs
        labels = self.inputs + self.kernel + self.outputs
        others = sorted({a for a in labels if labels.count(a) != 2})
        if others:
            raise ValueError(
                "An adapter needs an equation that is a product of matrices: "
                "every axis is in two of inputs, kernel and outputs. "
                f"Received: equation='{equation}', where {others} is not"
            )
        lengths = dict(zip(self.kernel, kernel_shape, strict=True))
        self.contracted = [a for a in self.kernel if a in self.inputs]
        self.kept = [a for a in self.kernel if a in self.outputs]
        self.batch = [a for a in self.inputs if a not in self.kernel]
        self.contracted_shape = [lengths[a] for a in self.contracted]
        self.kept_shape = [lengths[a] for a in self.kept]

    def matrix_to_kernel(self, matrix):
        tensor = ops.reshape(matrix, self.contracted_shape + self.kept_shape)
        return permute(tensor, self.contracted + self.kept, self.kernel)

    def kernel_to_matrix(self, kernel):
        tensor = permute(kernel, self.kernel, self.contracted + self.kept)
        rows = math.prod(self.contracted_shape)
        return ops.reshape(tensor, (rows, math.prod(self.kept_shape)))

    def inputs_to_rows(self, inputs):
        rank = len(inputs.shape)
        x = permute(inputs, self.inputs, self.batch + self.contracted, rank)
        batch_rank = rank - len(self.contracted)
        rows = ops.shape(x)[:batch_rank]
        return ops.reshape(x, (*rows, math.prod(self.contracted_shape)))

    def rows_to_inputs(self, rows):
        batch = [-1] + [1] * (len(self.batch) - 1)
        x = ops.reshape(rows, (*batch, *self.contracted_shape))
        return permute(x, self.batch + self.contracted, self.inputs)

    def rows_to_outputs(self, rows):
        batch = ops.shape(rows)[:-1]
        x = ops.reshape(rows, (*batch, *self.kept_shape))
        return permute(x, self.batch + self.kept, self.outputs, len(x.shape))


def permute(x, source, target, rank=None):
    """Transposes `x` from the axis order `source` to `target`.

    The label "0" stands for as many axes as `rank` leaves over.
    """
    elided = 0 if rank is None else rank - len(source) + 1
    positions, position = {}, 0
    for label in source:
        width = elided if label == "0" else 1
        positions[label] = range(position, position + width)
        position += width
    axes = [axis for label in target for axis in positions[label]]
    return x if axes == sorted(axes) else ops.transpose(x, axes)
