"""Products with a stack of matrices and its updates, written as an einsum.

A layer of experts computes `ops.einsum("th,ehm->etm", x, kernel)`, all rows by
all matrices. Here the same product is taken with `kernel + update`, and its
gradients for the factors come from those of the output: the gradient of the
sum, as large as the kernel, is never formed.
"""

import dataclasses
import functools
import math
import re

import keras
from keras import ops

from keras_geolora.layers.products import (
    geometric,
    nothing,
    transposed,
    wide_factors,
    with_gradients,
)


@dataclasses.dataclass(frozen=True)
class Labels:
    """The letters of an einsum of inputs and a stack of matrices.

    Attributes:
        inputs: String, for example `"th"`.
        kernel: String, `"ehm"`.
        outputs: String, `"etm"`.
        left: String, of the factor that inputs are multiplied by, `"ehz"`.
        right: String, of the other one, `"emz"`.
        hidden: String, of what is between the factors, `"etz"`.
        backward: Bool, whether the product is one of a backward pass.
    """

    inputs: str
    kernel: str
    outputs: str
    left: str
    right: str
    hidden: str
    backward: bool = False

    @classmethod
    def of(cls, equation, view):
        """Returns the letters of a product, or `None` if it is of another form.

        Args:
            equation: String, as in `ops.einsum`, of inputs and kernel.
            view: `KernelView` of the kernel.

        Returns:
            Pair of `Labels` and a bool, whether the matrices are transposed;
            or `None`.
        """
        axes = view.batch, view.rows, view.columns
        return cls._read(equation, axes)

    @classmethod
    @functools.cache
    def _read(cls, equation, axes):
        """Does so for the axes of a view, once for each equation."""
        letters = re.fullmatch(r"(\w+),(\w+)->(\w+)", equation.replace(" ", ""))
        if letters is None or [len(a) for a in axes] != [1, 1, 1]:
            return None
        inputs, kernel, outputs = letters.groups()
        if len(kernel) != 3 or any(
            len(set(x)) < len(x) for x in (inputs, kernel, outputs)
        ):
            return None
        each, row, column = (kernel[axis] for (axis,) in axes)
        transposed = row in outputs
        if transposed:
            row, column = column, row
        tokens = [x for x in outputs if x not in (each, column)]
        known = (
            set(inputs) - {each} == {*tokens, row}
            and column in outputs
            and row not in outputs
            and column not in inputs
            and each in inputs + outputs
        )
        if not known:
            return None
        used = set(inputs + kernel + outputs)
        rank = next(x for x in "zyxwvutsrqponmlkjihgfedcba" if x not in used)
        left, right = each + row + rank, each + column + rank
        hidden = "".join([each, *tokens, rank])
        labels = cls(inputs, kernel, outputs, left, right, hidden)
        return labels, transposed

    @property
    def transposed(self):
        """The letters of the gradient of the inputs."""
        return dataclasses.replace(
            self,
            inputs=self.outputs,
            outputs=self.inputs,
            left=self.right,
            right=self.left,
            backward=not self.backward,
        )

    @property
    def product(self):
        """The equation."""
        return f"{self.inputs},{self.kernel}->{self.outputs}"

    def count_rows(self, shape):
        """Returns how many inputs a matrix gets; unknown sizes are infinite.

        Args:
            shape: Tuple of ints and `None`s, the shape of the inputs.
        """
        sizes = [
            float("inf") if size is None else size
            for letter, size in zip(self.inputs, shape, strict=True)
            if letter not in self.kernel
        ]
        return math.prod(sizes)


def einsum_product(labels, x, kernel, factors, scale, merged, known=None):
    """Computes the product of inputs with matrices and their updates.

    Args:
        labels: `Labels`.
        x: Tensor, the inputs.
        kernel: Tensor, the matrices, of the dtype of `x`. A constant.
        factors: Tuple of the five factors of a batched adapter. For the
            product with transposed matrices, those of the transpose.
        scale: Float.
        merged: Bool, whether to form the sum of matrices and updates. Else the
            product with the updates is apart.
        known: Tensor, the product of `x` with the wide left factor, if known.
            Defaults to `None`.

    Returns:
        Tensor with the dtype of `x`. Its gradient for `x` is exact, the factors
        get the geometric ones. All can be differentiated again.
    """
    to_hidden = f"{labels.inputs},{labels.left}->{labels.hidden}"

    def forward(x, kernel, *factors):
        A, B = wide_factors(*factors)
        if merged:
            update = ops.einsum(
                f"{labels.left},{labels.right}->{labels.kernel}", A * scale, B
            )
            total = ops.add(kernel, ops.cast(update, kernel.dtype))
            return kernel_product(labels, x, total), None
        hidden = known
        if hidden is None:
            hidden = ops.einsum(to_hidden, x, ops.cast(A, x.dtype))
        update = ops.einsum(
            f"{labels.hidden},{labels.right}->{labels.outputs}",
            hidden,
            ops.cast(B * scale, x.dtype),
        )
        y = kernel_product(labels, x, kernel)
        y += update  # in place, where tensors can be changed
        return y, basis_part(hidden)

    def backward(g, xU, x, kernel, *factors):
        other, gA = transposed(*factors), None
        # On JAX the function may use nothing but its arguments.
        if not merged and keras.backend.backend() != "jax":
            A, _ = wide_factors(*map(ops.stop_gradient, other))
            gA = ops.einsum(
                f"{labels.outputs},{labels.right}->{labels.hidden}",
                g,
                ops.cast(A, g.dtype),
            )
        grad_x = einsum_product(
            labels.transposed, g, kernel, other, scale, merged, gA
        )
        gV = None if gA is None else basis_part(gA)
        grads = einsum_gradients(labels, x, g, factors, scale, xU, gV)
        return grad_x, nothing(kernel), *grads

    return with_gradients(forward, backward, x, kernel, factors=factors)


def kernel_product(labels, x, kernel):
    """Returns the product of inputs with matrices.

    Torch would copy all matrices for a product that adds up over them, as the
    gradient of inputs does that all of them see. A product of the layer itself
    is computed as the layer does it, to the last bit.
    """
    each = labels.hidden[0]
    adds_up = each not in labels.outputs
    if not (adds_up and labels.backward) or not is_torch():
        return ops.einsum(labels.product, x, kernel)
    product = f"{labels.inputs},{labels.kernel}->{each}{labels.outputs}"
    return ops.sum(ops.einsum(product, x, kernel), axis=0)


def sum_pays(rows, input_dim, output_dim):
    """Returns whether forming the sum is likely faster than two products.

    A compiler that joins operations adds while it multiplies; elsewhere the sum
    of all matrices is written and read twice (`benchmarks/experts.py`).

    Args:
        rows: Number of inputs of a matrix.
        input_dim: Int.
        output_dim: Int.
    """
    price = 1 if keras.backend.backend() == "jax" else 4
    return rows * (input_dim + output_dim) >= price * input_dim * output_dim


def is_torch():
    """Returns whether operations run at once, one by one."""
    return keras.backend.backend() == "torch"


def einsum_gradients(labels, x, g, factors, scale, xU, gV):
    """Returns the geometric gradients of the factors of a batched adapter.

    Args:
        labels: `Labels`.
        x: Tensor, the inputs.
        g: Tensor, the gradient for the outputs.
        factors: Tuple of tensors.
        scale: Float.
        xU: Tensor, the product of `x` with `U`, or `None`.
        gV: Tensor, that of `g` with `V`, or `None`.
    """
    U, _, V, *_ = factors

    def times_basis(y, letters, basis, factor):
        basis = ops.stop_gradient(ops.cast(basis, y.dtype))
        return ops.einsum(f"{letters},{factor}->{labels.hidden}", y, basis)

    def gradient(y, letters, hidden, factor):
        K = ops.einsum(f"{letters},{labels.hidden}->{factor}", y, hidden)
        return ops.cast(K, U.dtype) * scale

    if gV is None:
        gV = times_basis(g, labels.outputs, V, labels.right)
    grad_K = gradient(x, labels.inputs, gV, labels.left)
    # Torch kept a constant, which cannot be differentiated.
    if xU is None or getattr(grad_K, "requires_grad", False):
        xU = times_basis(x, labels.inputs, U, labels.left)
    grad_L = gradient(g, labels.outputs, xU, labels.right)
    return geometric(grad_K, grad_L, factors)


def basis_part(hidden):
    """Returns the part of a product with wide factors that belongs to `U`."""
    return hidden[..., hidden.shape[-1] // 2 :]
