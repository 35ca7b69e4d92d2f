"""EinsumDense layer with a low-rank adapter."""

import keras
from keras import ops

from keras_geolora.layers.adapted import AdaptedProduct, shape_of_kernel
from keras_geolora.layers.kernel_view import KernelView


@keras.saving.register_keras_serializable(package="keras_geolora")
class GeoLoRAEinsumDense(AdaptedProduct, keras.layers.EinsumDense):
    """`keras.layers.EinsumDense` with a frozen kernel and a low-rank update.

    The kernel is viewed as a matrix of *contracted axes* x *kept axes*: for the
    query of an eight-head attention, `"abc,cde->abde"`, rank 4 is that of the
    matrix from `c` to `(d, e)`. Without a `rank` this is a plain
    `keras.layers.EinsumDense`.

    Args:
        equation: String, as in `keras.layers.EinsumDense`. Equations with an
            axis that inputs, kernel and output share (a batch of matrices), or
            that only the inputs have (a sum), cannot carry an adapter.
        output_shape: As in `keras.layers.EinsumDense`.
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
        **kwargs: As in `keras.layers.EinsumDense`.

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

    @staticmethod
    def view_of(layer):
        # A quantized kernel has a different shape.
        shape = getattr(layer, "original_kernel_shape", None)
        shape = tuple(shape or shape_of_kernel(layer))
        einsum = einsum_of(layer.equation)
        return KernelView("kernel", shape, einsum.rows, einsum.columns)

    def call(self, inputs, training=None):
        product = self._choose_product(inputs, training)
        return self._adapted_call(inputs, product)

    def _kernel_product(self, inputs, kernel):
        return ops.einsum(self.equation, inputs, kernel)

    def _merged_product(self, inputs):
        einsum, view = einsum_of(self.equation), self.kernel_view
        kernel = view.to_matrix(self.kernel)
        rows = einsum.inputs_to_rows(inputs, view)
        y = self.adapter.merged_call(rows, kernel)
        return einsum.rows_to_outputs(y, view)

    def _thin_product(self, inputs, A, B):
        einsum, view = einsum_of(self.equation), self.kernel_view
        rows = einsum.inputs_to_rows(ops.cast(inputs, A.dtype), view)
        y = ops.matmul(ops.matmul(rows, A), B)
        return einsum.rows_to_outputs(y, view)

    def _update_product(self, inputs):
        einsum, view = einsum_of(self.equation), self.kernel_view
        # The adapter would read integers as row numbers.
        x = ops.cast(inputs, self.compute_dtype)
        y = self._acting_adapter(einsum.inputs_to_rows(x, view))
        return einsum.rows_to_outputs(y, view)

    def _rows_to_inputs(self, rows):
        return einsum_of(self.equation).rows_to_inputs(rows, self.kernel_view)


# Every call of a layer asks, and parsing takes longer than looking up. It is no
# `functools.cache`, because torch.compile warns of one.
einsums = {}


def einsum_of(equation):
    """Returns the `Einsum` of an equation."""
    if equation not in einsums:
        einsums[equation] = Einsum(equation)
    return einsums[equation]


class Einsum:
    """An equation `inputs, kernel -> outputs` that is a product of matrices.

    Every axis of the kernel is either contracted with the inputs or kept in
    the outputs, and every other axis of the inputs is kept.

    Args:
        equation: String, as in `keras.layers.EinsumDense`.

    Attributes:
        rows: Tuple of the axes of the kernel that are contracted.
        columns: Tuple of the axes of the kernel that are kept.

    Raises:
        ValueError: If the equation is not of this kind.
    """

    def __init__(self, equation):
        # "0" stands for all axes under the ellipsis.
        inputs, outputs = equation.replace("...", "0").split("->")
        self.inputs, self.kernel = inputs.split(",")
        self.outputs = outputs
        labels = self.inputs + self.kernel + self.outputs
        others = sorted({a for a in labels if labels.count(a) != 2})
        if others:
            raise ValueError(
                "An adapter needs an equation that is a matrix product: every "
                "axis must appear in exactly two of inputs, kernel and "
                f"outputs. Received: equation='{equation}', where {others} do "
                "not"
            )
        places = range(len(self.kernel))
        self.rows = tuple(i for i in places if self.kernel[i] in self.inputs)
        self.columns = tuple(i for i in places if i not in self.rows)
        self.contracted = [self.kernel[i] for i in self.rows]
        self.kept = [self.kernel[i] for i in self.columns]
        self.batch = [a for a in self.inputs if a not in self.kernel]

    def inputs_to_rows(self, inputs, view):
        """Reshapes inputs to `(..., input_dim)`."""
        rank = len(inputs.shape)
        x = permute(inputs, self.inputs, self.batch + self.contracted, rank)
        rows = ops.shape(x)[: rank - len(self.contracted)]
        return ops.reshape(x, (*rows, view.input_dim))

    def rows_to_inputs(self, rows, view):
        """Reshapes rows `(n, input_dim)` to the shape of inputs."""
        batch = [-1] + [1] * (len(self.batch) - 1)
        lengths = [view.shape[i] for i in self.rows]
        x = ops.reshape(rows, (*batch, *lengths))
        return permute(x, self.batch + self.contracted, self.inputs)

    def rows_to_outputs(self, rows, view):
        """Reshapes rows `(..., output_dim)` to the shape of outputs."""
        batch = ops.shape(rows)[:-1]
        x = ops.reshape(rows, (*batch, *(view.shape[i] for i in self.columns)))
        return permute(x, self.batch + self.kept, self.outputs, len(x.shape))


def batched_axes(equation):
    """Returns the batch, rows and columns of a kernel of several matrices.

    Args:
        equation: String, as in `keras.layers.EinsumDense`.

    Returns:
        Tuple of three tuples of axes of the kernel, or `None` if the equation
        is not a product of several matrices with several inputs.
    """
    inputs, outputs = equation.replace("...", "0").split("->")
    inputs, kernel = inputs.split(",")
    both = set(kernel) & set(inputs) & set(outputs)
    if not both or (set(inputs) - set(kernel) - set(outputs)):
        return None
    of = {
        axis: (label in inputs, label in outputs)
        for axis, label in enumerate(kernel)
    }
    batch, rows, columns = (
        tuple(axis for axis, places in of.items() if places == wanted)
        for wanted in ((True, True), (True, False), (False, True))
    )
    complete = len(batch + rows + columns) == len(kernel)
    return (batch, rows, columns) if complete else None


def permute(x, source, target, rank=None):
    """Transposes `x` from the axis order `source` to `target`.

    Of `rank` axes, the label "0" stands for those without another label.
    """
    elided = 0 if rank is None else rank - len(source) + 1
    positions, position = {}, 0
    for label in source:
        width = elided if label == "0" else 1
        positions[label] = range(position, position + width)
        position += width
    axes = [axis for label in target for axis in positions[label]]
    return x if axes == sorted(axes) else ops.transpose(x, axes)
