"""Problems whose answer is known, and the ways to descend on them.

Each asks for a matrix of rank 6, `target`. All losses are quadratic, with a
minimum of zero at `target`:

- `regression`: `x @ target` is known for 512 inputs whose covariance has
  eigenvalues from 1 to 0.1; the loss is half the squared error per input.
  The singular values of `target` run from 1 to 0.1.
- `stiff regression`: the same, with singular values from 10 to 0.1.
- `completion`: 60 % of the entries of a square matrix are known, with
  singular values from 1 to 0.1; the loss is half their squared error, divided
  by 0.6. Rows are selected by one-hot inputs.
"""

import pathlib
import sys

import keras
import measuring
import numpy as np
from keras import ops

import keras_geolora

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))
import reference

# Shape, largest and smallest singular value.
PROBLEMS = {
    "regression": ((96, 64), 1, 0.1),
    "stiff regression": ((96, 64), 10, 0.1),
    "completion": ((64, 64), 1, 0.1),
}
TRUE_RANK, INPUTS, KNOWN = 6, 512, 0.6


class Problem:
    """Inputs, labels and the loss of a problem, and the matrix asked for.

    Args:
        name: One of `PROBLEMS`.
        seed: Int.
    """

    def __init__(self, name, seed):
        rng = np.random.default_rng(seed)
        self.shape, largest, smallest = PROBLEMS[name]
        input_dim, output_dim = self.shape
        sigma = np.geomspace(largest, smallest, TRUE_RANK)
        U, S, V = reference.random_factors(rng, *self.shape, sigma)
        self.target = U @ S @ V.T
        if name == "completion":
            x = np.eye(input_dim)
            # The loss is a mean over rows.
            weights = (rng.random(self.shape) < KNOWN) * input_dim / KNOWN
        else:
            x = np.linalg.qr(rng.normal(size=(INPUTS, input_dim)))[0]
            x *= np.sqrt(INPUTS * np.geomspace(1, 0.1, input_dim))
            weights = np.ones((INPUTS, output_dim))
        self.x = x.astype("float32")
        y = np.stack([x @ self.target, weights], axis=-1)
        self.y = y.astype("float32")

    def batches(self):
        """Yields the full batch for ever."""
        while True:
            yield self.x, self.y

    def error(self, delta):
        """Returns the relative distance of a matrix to the one asked for."""
        difference = np.linalg.norm(delta - self.target)
        return float(difference / np.linalg.norm(self.target))

    def loss(self, delta):
        """Returns the loss of a matrix."""
        y, weights = self.y[..., 0], self.y[..., 1]
        squares = weights * (self.x @ delta - y) ** 2
        return float(0.5 * np.mean(np.sum(squares, axis=-1)))

    def descent_left(self, delta, rank):
        """Returns the gradient among matrices of a rank, by that at zero.

        It is the norm of the orthogonal projection of the gradient on the
        tangent space at the closest matrix of this rank: zero where no step
        among matrices of this rank lowers the loss.
        """
        U, sigma, Vt = np.linalg.svd(delta)
        U, sigma, V = U[:, :rank], sigma[:rank], Vt[:rank].T
        G = self.gradient(U * sigma @ V.T)
        start = np.linalg.norm(self.gradient(np.zeros(self.shape)))
        projected = reference.tangent_projection(U, V, G)
        return float(np.linalg.norm(projected) / start)

    def gradient(self, delta):
        """Returns the gradient of the loss."""
        y, weights = self.y[..., 0], self.y[..., 1]
        residual = weights * (self.x @ delta - y)
        return self.x.T.astype("float64") @ residual / len(self.x)


def half_squared_error(y, prediction):
    """Half the squared error, by the weights that come with the labels."""
    squares = y[..., 1] * ops.square(y[..., 0] - prediction)
    return 0.5 * ops.sum(squares, axis=-1)


class Factors(keras.layers.Layer):
    """A product of two or three plain matrices, which all train at once.

    `U @ S @ V.T` starts as the adapter of the library does, with orthonormal
    bases and `S = 0`; `A @ B` as LoRA, with He's uniform initializer and
    `B = 0`.
    """

    def __init__(self, units, rank, core, seed):
        super().__init__()
        self.units, self.rank, self.core, self.seed = units, rank, core, seed

    def build(self, input_shape):
        rank, seed = self.rank, self.seed
        if self.core:
            orthogonal = keras.initializers.Orthogonal
            left, right = orthogonal(seed=seed), orthogonal(seed=seed + 1)
            shapes = [(input_shape[-1], rank), (rank, rank), (self.units, rank)]
            starts = [left, "zeros", right]
        else:
            left = keras.initializers.HeUniform(seed=seed)
            shapes = [(input_shape[-1], rank), (self.units, rank)]
            starts = [left, "zeros"]
        self.factors = [
            self.add_weight(shape, initializer=start)
            for shape, start in zip(shapes, starts, strict=True)
        ]

    def call(self, x):
        *left, right = self.factors
        for factor in left:
            x = ops.matmul(x, factor)
        return ops.matmul(x, ops.transpose(right))

    def delta(self):
        *left, right = (ops.convert_to_numpy(f) for f in self.factors)
        return np.linalg.multi_dot([*left, right.T])


def adapted(units, rank, max_rank, seed):
    """Returns a layer of the library, of zeros but for its adapter."""
    return keras_geolora.GeoLoRADense(
        units,
        use_bias=False,
        kernel_initializer="zeros",
        rank=rank,
        max_rank=max_rank,
        seed=seed,
    )


class Trainer:
    """A model of one layer that is compiled once and trained many times.

    Args:
        shape: Tuple of the numbers of inputs and outputs.
        make_layer: Function of a seed.
        optimizer: Keras optimizer.
    """

    def __init__(self, shape, make_layer, optimizer):
        self.input_dim, self.make_layer = shape[0], make_layer
        self.model = self.new_model(0)
        self.model.compile(optimizer, loss=half_squared_error)
        optimizer.build(self.model.trainable_variables)
        self.initial = measuring.remember(optimizer.variables)

    def new_model(self, seed):
        inputs = keras.Input((self.input_dim,))
        return keras.Sequential([inputs, self.make_layer(seed)])

    def train(self, problem, rate, seed, epochs, steps, start=None):
        """Trains anew; yields the matrix before, and after every epoch.

        Args:
            problem: `Problem`.
            rate: Float, the learning rate.
            seed: Int, for the factors at the start.
            epochs: Int.
            steps: Int, the steps of an epoch.
            start: Tuple of factors to start with, or `None`.
        """
        optimizer = self.model.optimizer
        self.model.set_weights(self.new_model(seed).get_weights())
        measuring.restore(self.initial)
        optimizer.learning_rate = rate
        layer = self.model.layers[0]
        if start is not None:
            assign(layer.adapter, start)
        batches = problem.batches()
        yield ops.convert_to_numpy(layer.delta())
        for _ in range(epochs):
            self.model.fit(batches, steps_per_epoch=steps, verbose=0)
            yield ops.convert_to_numpy(layer.delta())


def assign(adapter, factors):
    """Assigns factors without padding to those of an adapter."""
    adapter.assign_factors(*factors)
