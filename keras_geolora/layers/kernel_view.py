"""The kernel of a layer, viewed as a matrix."""

import dataclasses
import math

import numpy as np
from keras import ops


@dataclasses.dataclass(frozen=True)
class KernelView:
    """How to turn a kernel into a matrix `(input_dim, output_dim)` and back.

    Each kind of layer defines this in `view_of`, with and without adapters;
    other code calls `registry.kernel_view(layer)`. Files, layouts and other
    formats need to know nothing else about a layer.

    Attributes:
        name: String, the attribute of the layer that holds the kernel.
        shape: Tuple of ints, the shape of the kernel in floating point, even if
            it is quantized and stored in another shape.
        rows: Tuple of the axes of the kernel that become the rows, in order.
        columns: Tuple of the axes that become the columns, in order.
        batch: Tuple of the axes along which there are several matrices, each
            with an update of its own. Defaults to `()`, one matrix.
    """

    name: str
    shape: tuple
    rows: tuple
    columns: tuple
    batch: tuple = ()

    def __post_init__(self):
        axes = sorted((*self.batch, *self.rows, *self.columns))
        if axes != list(range(len(self.shape))):
            raise ValueError(
                "Every axis of a kernel must be in exactly one of `batch`, "
                f"`rows` and `columns`. Received: shape={self.shape}, "
                f"batch={self.batch}, rows={self.rows}, columns={self.columns}"
            )

    @property
    def input_dim(self):
        """Int, the number of rows."""
        return self._size(self.rows)

    @property
    def output_dim(self):
        """Int, the number of columns."""
        return self._size(self.columns)

    @property
    def count(self):
        """Int, the number of matrices, or `None` for a single one."""
        return self._size(self.batch) if self.batch else None

    @property
    def matrix_shape(self):
        """Tuple `(input_dim, output_dim)`."""
        return self.input_dim, self.output_dim

    def to_matrix(self, kernel):
        """Reshapes a kernel to `(*batch, input_dim, output_dim)`.

        Args:
            kernel: Array or tensor of shape `shape`.

        Returns:
            Array or tensor, like `kernel`.
        """
        of = operations_of(kernel)
        order = (*self.batch, *self.rows, *self.columns)
        if order != tuple(range(len(order))):
            kernel = of.transpose(kernel, order)
        return of.reshape(
            kernel, (*self._sizes(self.batch), *self.matrix_shape)
        )

    def to_kernel(self, matrix):
        """Undoes `to_matrix`."""
        of = operations_of(matrix)
        order = (*self.batch, *self.rows, *self.columns)
        kernel = of.reshape(matrix, self._sizes(order))
        if order != tuple(range(len(order))):
            kernel = of.transpose(kernel, tuple(map(int, np.argsort(order))))
        return kernel

    def _sizes(self, axes):
        return tuple(self.shape[axis] for axis in axes)

    def _size(self, axes):
        return math.prod(self._sizes(axes))


def operations_of(x):
    """Returns NumPy for NumPy arrays, `keras.ops` for everything else."""
    return np if isinstance(x, np.ndarray) else ops
