"""The adapter: its factors, and the only formula that applies them."""

import math
import numbers
import operator
import random

import keras
import numpy as np
from keras import ops

from keras_geolora.geometry import manifold
from keras_geolora.geometry.integrator import Block
from keras_geolora.keras_internals import unlocked
from keras_geolora.layers.factor import (
    TRAINED_ROLES,
    Factor,
    by_matrix,
    check_values,
    each_trimmed,
    fit_together,
    name_of,
)
from keras_geolora.layers.products import (
    is_known,
    is_sparse,
    low_rank_matrix,
    low_rank_product,
    low_rank_rows,
    may_train,
    merged_product,
    sparse_product,
    thin_factors,
    transposed,
    wide_factors,
)


class Orthonormal(keras.initializers.Initializer):
    """Random orthonormal columns, followed by columns of zeros."""

    def __init__(self, rank, seed=None):
        self.rank = rank
        self.orthogonal = keras.initializers.Orthogonal(seed=seed)
        self.normal = keras.initializers.RandomNormal(seed=seed)

    def __call__(self, shape, dtype=None):
        *count, dim, max_rank = shape
        if count:  # `Orthogonal` would make all bases orthogonal to each other
            basis, _ = ops.qr(self.normal((*count, dim, self.rank), dtype))
        else:
            basis = self.orthogonal((dim, self.rank), dtype)
        padding = ops.zeros((*count, dim, max_rank - self.rank), dtype)
        return ops.concatenate([basis, padding], axis=-1)


@keras.saving.register_keras_serializable(package="keras_geolora")
class LowRankAdapter(keras.layers.Layer):
    """A low-rank update of a frozen linear map.

    Holds `U @ S @ V.T` with orthonormal bases `U` and `V` and a core `S`, and
    computes `scale * x @ U @ S @ V.T` from left to right, so that the product
    of the factors is never formed. A fresh adapter has `S = 0`, so its update
    is exactly zero.

    During training, steps between two retractions add `P @ V.T + U @ Q.T`, with
    `P` and `Q` orthogonal to `U` and `V`. After a retraction `P` and `Q` are
    zero, and `S` is diagonal. (On JAX these two are trainable variables,
    because its trainer lets an optimizer change no others.)

    The factors have `max_rank` columns, of which the first `rank` are in use
    and the others zero, so the rank can change during training while shapes
    stay the same. The factors are float32 whatever the dtype policy; the
    products are computed in the compute dtype.

    **Gradients are those of the geometric step.** With `G` the gradient with
    respect to `delta`, backpropagation delivers `G @ V` for `U`, `U.T @ G @ V`
    for `S` and `G.T @ U` for `V`: the gradients for `K = U S`, `S` and
    `L = V S.T`. They are exact even where `S` is zero, and `G` is never formed.
    The same holds if the loss contains derivatives of the output with respect
    to the input, of any order. (On JAX, training calls support reverse mode up
    to order 6; `training=False` also supports `jax.jvp` and `jax.hessian`, at
    the cost of the full gradient of the kernel.) Train the factors with
    `keras_geolora.GeoLoRA`; other optimizers are refused.

    **A batched adapter** updates `count` matrices of one shape, such as the
    experts of a layer. Its factors have one more axis, the first, and every
    matrix has a rank of its own; all else holds for each matrix. It cannot be
    called: its layer computes with the sum of kernels and `delta()`.

    Args:
        input_dim: Int, rows of the kernel.
        output_dim: Int, columns of the kernel.
        rank: Int in [1, max_rank], the initial rank.
        max_rank: Int, the largest rank, at most
            `min(input_dim, output_dim)`. Defaults to `2 * rank`, clipped to
            that bound.
        min_rank: Int in [1, rank], the smallest rank. Defaults to 1.
        scale: Float, constant strength of the update. It does not depend on the
            rank, so that changing the rank does not change the output. Defaults
            to 1.
        dropout: Float in [0, 1), share of the update's inputs to drop in
            training. Defaults to 0.
        seed: Int or `None`, for the bases and the dropout.
        count: Int, the number of matrices of a batched adapter. Defaults to
            `None`, an ordinary adapter of one matrix.

    Input shape:
        `(..., input_dim)`, or integers `(...)`, which stand for one-hot
        vectors and select rows of the update, as in an embedding.

    Output shape:
        `(..., output_dim)`.

    Call arguments:
        inputs: Tensor.
        transpose: Bool, whether to apply the transpose of the update, from
            `(..., output_dim)` to `(..., input_dim)`. Defaults to `False`.

    Example:

    ```python
    import numpy as np
    from keras_geolora import LowRankAdapter

    adapter = LowRankAdapter(16, 8, rank=2)
    adapter(np.ones((3, 16))).shape  # (3, 8), all zero: S = 0
    assert adapter.rank == 2 and adapter.max_rank == 4
    ```

    References:
        Schotthöfer et al. 2024, GeoLoRA, arXiv 2410.18720.
    """

    # The error about the factors of the last file, if any.
    _refused = None

    def __init__(
        self,
        input_dim,
        output_dim,
        rank,
        max_rank=None,
        min_rank=1,
        scale=1.0,
        dropout=0.0,
        seed=None,
        count=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.supports_masking = True
        largest = min(input_dim, output_dim)
        check_rank("rank", rank, 1, largest)
        if max_rank is None:
            max_rank = min(2 * rank, largest)
        check_rank("max_rank", max_rank, rank, largest)
        check_rank("min_rank", min_rank, 1, rank)
        for option, value in {"dropout": dropout, "scale": scale}.items():
            if not isinstance(value, numbers.Real):
                raise TypeError(
                    f"`{option}` must be a number. Received: {option}={value!r}"
                )
        if not 0 <= dropout < 1:
            raise ValueError(
                "`dropout` is the share of inputs that the adapter drops in "
                f"training, so it must lie in [0, 1). Received: "
                f"dropout={dropout}"
            )
        if not (math.isfinite(scale) and scale != 0):
            raise ValueError(
                "`scale` multiplies the update, so it must be finite and not "
                f"zero. Received: scale={scale}. The default is 1."
            )
        # Files are JSON, which cannot hold NumPy numbers.
        self.input_dim = input_dim
        self.output_dim = output_dim
        self.count = None if count is None else operator.index(count)
        self.initial_rank = operator.index(rank)
        self.max_rank = operator.index(max_rank)
        self.min_rank = operator.index(min_rank)
        self.scale = float(scale)
        self.seed = None if seed is None else operator.index(seed)
        # Without a seed torch would use a global generator, whose state is not
        # saved.
        dropout_seed = random.randrange(2**31) if seed is None else self.seed
        self.dropout = keras.layers.Dropout(
            float(dropout), seed=dropout_seed, dtype=self.dtype_policy
        )
        self.build()

    def build(self, input_shape=None):
        if self.built:
            return
        seeds = [self.seed, None if self.seed is None else self.seed + 1]
        basis = [Orthonormal(self.initial_rank, seed) for seed in seeds]
        self.U = self._add_factor("U", self.input_dim, basis[0])
        self.S = self._add_factor("S", self.max_rank, "zeros")
        self.V = self._add_factor("V", self.output_dim, basis[1])
        self.P = self._add_factor("P", self.input_dim, "zeros")
        self.Q = self._add_factor("Q", self.output_dim, "zeros")
        self.built = True

    @property
    def _axes(self):
        """Tuple, the sizes of the axes before those of a matrix."""
        return () if self.count is None else (self.count,)

    def _add_factor(self, role, dim, initializer):
        return self.add_weight(
            name=role,
            shape=(*self._axes, dim, self.max_rank),
            initializer=initializer,
            dtype="float32",
            autocast=False,
            trainable=role in TRAINED_ROLES,
            constraint=Factor(self, role),
        )

    def call(self, inputs, transpose=False, training=None):
        if self.count is not None:
            raise ValueError(
                "An adapter of several matrices cannot be called, because it "
                "does not know which of them acts on an input. Add its "
                "`delta()` to the kernels. Received: adapter "
                f"'{self.path}' of {self.count} matrices"
            )
        factors = self._factors()
        if transpose:
            factors = transposed(*factors)
        input_dim, output_dim = factors[0].shape[0], factors[2].shape[0]
        shape = ops.shape(inputs)
        if keras.backend.is_int_dtype(inputs.dtype):
            # Dropout on a one-hot vector keeps or drops its only entry.
            kept = ops.ones((*shape, 1), dtype=self.compute_dtype)
            kept = self.drop(kept, training)
            ids = ops.reshape(inputs, (-1,))
            y = low_rank_rows(ids, factors, self.scale, self.compute_dtype)
            return ops.reshape(y, (*shape, output_dim)) * kept
        if is_sparse(inputs):
            return self._sparse_call(inputs, factors, training)
        x = ops.reshape(self.drop(inputs, training), (-1, input_dim))
        y = low_rank_product(x, factors, self.scale)
        return ops.reshape(y, (*shape[:-1], output_dim))

    def _sparse_call(self, x, factors, training):
        if self.dropout.rate and may_train(training):
            x = ops.convert_to_tensor(x, sparse=False)
            x = self.drop(x, training)
        return sparse_product(x, factors, self.scale)

    def drop(self, x, training):
        """Applies the dropout; `training` may be a traced bool."""
        if not self.dropout.rate:
            return x
        if is_known(training):
            return self.dropout(x, training=training)
        return ops.where(training, self.dropout(x, training=True), x)

    def merged_call(self, inputs, kernel):
        """Returns `inputs @ (kernel + scale * U @ S @ V.T)`, for training.

        Forms the sum, which for many rows is faster than two products, but
        never its gradient. The kernel gets no gradient, and there is no
        dropout.

        Args:
            inputs: Tensor of shape `(..., input_dim)`.
            kernel: Tensor of shape `(input_dim, output_dim)`.

        Returns:
            Tensor of shape `(..., output_dim)`.
        """
        shape = ops.shape(inputs)
        x = ops.cast(inputs, self.compute_dtype)
        x = ops.reshape(x, (-1, self.input_dim))
        kernel = ops.stop_gradient(ops.cast(kernel, self.compute_dtype))
        y = merged_product(x, kernel, self._factors(), self.scale)
        return ops.reshape(y, (*shape[:-1], self.output_dim))

    def compute_output_shape(self, input_shape, transpose=False):
        dim = self.input_dim if transpose else self.output_dim
        return (*input_shape[:-1], dim)

    def delta(self):
        """Returns the update, float32, `(input_dim, output_dim)`.

        That of a batched adapter is `(count, input_dim, output_dim)`.
        """
        return low_rank_matrix(self._factors(), self.scale)

    def thin_factors(self, at_rest=False):
        """Returns `A` and `B`, of which `A @ B` is the update, scaled.

        Args:
            at_rest: Bool, whether `P` and `Q` are known to be zero, and no
                gradients are needed. Otherwise the factors have twice as many
                columns and rows, and the geometric gradients. Defaults to
                `False`.

        Returns:
            Tensors `(input_dim, max_rank)` and `(max_rank, output_dim)` of the
            compute dtype.
        """
        factors = self._factors()
        if at_rest or self.P is None:
            A, B = wide_factors(*factors[:3])
            A = A * self.scale
        else:
            A, B = thin_factors(factors, self.scale)
        return tuple(
            ops.cast(x, self.compute_dtype) for x in (A, ops.transpose(B))
        )

    @property
    def is_at_rest(self):
        """Bool, whether `P` and `Q` are zero, as after a retraction."""
        moving = (v for v in (self.P, self.Q) if v is not None)
        return not any(ops.convert_to_numpy(v).any() for v in moving)

    @property
    def factors(self):
        """The `Block` of the variables `U`, `S`, `V`, `P` and `Q`."""
        return Block(self.U, self.S, self.V, self.P, self.Q)

    def _factors(self):
        """Returns the factors in the form that custom gradients accept.

        The cast turns variables of `tf.distribute` into tensors; on others it
        has no effect.
        """
        factors = (v for v in self.factors if v is not None)
        return tuple(ops.cast(v.value, v.dtype) for v in factors)

    def stop_training(self):
        """Gives up `P` and `Q`, which only training needs.

        They must be zero.
        """
        with unlocked(self) as tracker:
            for variable in (self.P, self.Q):
                tracker.untrack(variable)
            self.P = self.Q = None

    def trimmed(self):
        """Returns `U`, `S` and `V` as arrays, without unused columns.

        Between two retractions these are the factors that a retraction gives:
        the update without what exceeds `max_rank`. The factors of a batched
        adapter have as many columns as its largest rank; those of matrices
        with a smaller rank are padded with zeros.
        """
        return each_trimmed(
            self.factors_as_arrays(), self.max_rank, self.min_rank
        )

    def factors_as_arrays(self):
        """Returns the `Block` of the values of the factors, as arrays."""
        return Block(*(np.array(ops.convert_to_numpy(v)) for v in self.factors))

    def assign_factors(self, U, S, V):
        """Replaces the factors.

        Args:
            U: Array of shape `(input_dim, rank)`, columns orthonormal.
            S: Array of shape `(rank, rank)`, diagonal and nonnegative.
            V: Array of shape `(output_dim, rank)`, columns orthonormal.

        Those of a batched adapter have one more axis in front, as in `trimmed`.
        """
        values = {"U": U, "S": S, "V": V}
        for role, variable in zip(Block._fields, self.factors, strict=True):
            buffer = np.zeros(variable.shape, "float32")
            if role in values:
                value = np.asarray(values[role])
                buffer[tuple(slice(n) for n in value.shape)] = value
            variable.assign(buffer)

    def save_own_variables(self, store):
        """Like the Keras method; refuses factors that left the manifold."""
        manifold.check_factors(
            by_matrix(name_of(self.U), self.factors_as_arrays()),
            f"They were not saved. {manifold.MEND} {manifold.AVERAGE}",
        )
        moving = any(factor.any() for factor in self.factors_as_arrays()[3:])
        factors = self.factors if moving else self.factors[:3]
        for number, variable in enumerate(factors):
            store[str(number)] = ops.convert_to_numpy(variable)

    def load_own_variables(self, store):
        """Like the Keras method; refuses factors off the manifold.

        A file has no `P` and `Q` if they are zero.
        """
        given = [store[key] for key in sorted(store.keys())]
        if not given and self._refused is not None:
            # Keras tries again elsewhere in the file and shows the last error.
            raise ValueError(self._refused)
        self._refused = None
        try:
            if len(given) in (3, 5) and fit_together(*given):
                manifold.check_factors(
                    by_matrix(name_of(self.U), given),
                    "This adapter was left unchanged; other weights of the "
                    f"file may already have been loaded. {manifold.AVERAGE}",
                )
        except ValueError as error:
            self._refused = str(error)
            raise
        if len(given) == 3:
            given += [np.zeros(v.shape, "float32") for v in self.factors[3:]]
            store = {str(number): value for number, value in enumerate(given)}
        super().load_own_variables(store)

    def set_weights(self, weights):
        """Like the Keras method; refuses factors off the manifold."""
        check_values(self.weights, weights)
        super().set_weights(weights)

    @property
    def parameters_per_rank(self):
        """Int, parameters per rank of a matrix: two columns and a value."""
        return self.input_dim + self.output_dim + 1

    def kernel_norm(self):
        """Returns the norm of the updated kernel; zero if there is none.

        That of a batched adapter is an array `(count,)`.
        """
        return 0.0 if self.count is None else np.zeros(self.count, "float32")

    @property
    def is_active(self):
        """Bool, whether this is the active adapter of its layer."""
        layer = getattr(self.kernel_norm, "layer", None)
        if layer is None:  # it belongs to no layer
            return True
        # Not via properties, which a merged layer does not have.
        adapters = vars(layer).get("_adapters")
        if not adapters:
            return False
        return adapters.get(vars(layer)["adapter_state"].active) is self

    @property
    def rank(self):
        """Int, the number of columns in use, the largest of all matrices.

        Between two retractions the update has at most twice this rank.
        """
        return int(self.ranks.max())

    @property
    def ranks(self):
        """Array `(count,)`, the rank of every matrix; of one matrix `(1,)`."""
        if self.count is None:
            basis = ops.convert_to_numpy(self.U)
            return (basis != 0).any(axis=0).sum(keepdims=True)
        used = ops.any(ops.not_equal(self.U, 0), axis=-2)  # many to fetch
        return np.array(ops.convert_to_numpy(used)).sum(axis=-1)

    def get_config(self):
        return {
            **super().get_config(),
            "input_dim": self.input_dim,
            "output_dim": self.output_dim,
            "rank": self.initial_rank,
            "max_rank": self.max_rank,
            "min_rank": self.min_rank,
            "scale": self.scale,
            "dropout": self.dropout.rate,
            "seed": self.seed,
            **({} if self.count is None else {"count": self.count}),
        }


def check_columns(name, value):
    """Refuses a number of columns that is not an integer."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(
            f"`{name}` counts columns, so it must be an integer. "
            f"Received: {name}={value!r} (of type {type(value).__name__})"
        )


def check_rank(name, value, smallest, largest):
    """Refuses a rank that is not an integer in `[smallest, largest]`."""
    check_columns(name, value)
    if not smallest <= value <= largest:
        raise ValueError(
            f"`{name}` must lie in [{smallest}, {largest}]: a rank is at "
            "least 1 and at most the smaller side of the kernel, and "
            f"`min_rank <= rank <= max_rank`. Received: {name}={value}"
        )
