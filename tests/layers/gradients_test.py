"""Gradients of the factors, also of losses that contain derivatives."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_geolora
from keras_geolora.layers import products

BACKEND = keras.backend.backend()
CORE = np.diag([0.8, 0.6, 0, 0]).astype("float32")
IDS = np.array([[1, 3, 3], [0, 4, 1]])


def random(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def dense(**options):
    return keras_geolora.GeoLoRADense(6, activation="tanh", **options)


def einsum(**options):
    return keras_geolora.GeoLoRAEinsumDense(
        "abc,cde->abde", (None, 2, 3), bias_axes="d", **options
    )


def embedding(**options):
    return keras_geolora.GeoLoRAEmbedding(5, 8, **options)


def reversible(**options):
    return keras_geolora.GeoLoRAReversibleEmbedding(5, 8, **options)


def convolution(**options):
    return keras_geolora.GeoLoRAConv1D(6, 3, **options)


def outputs(layer, x, training):
    return layer(x, training=training)


def looked_up(layer, x, training):
    return layer(IDS, training=training) * x


def reversed_rows(layer, x, training):
    return layer(x, reverse=True, training=training)


# Layer, how it is applied to `x`, and the shape of `x`. Of many rows the
# update is added to the kernel, of few it is apart.
LAYERS = {
    "dense, many rows": (dense, outputs, (16, 8)),
    "dense, few rows": (dense, outputs, (2, 8)),
    "einsum, many rows": (einsum, outputs, (4, 4, 8)),
    "einsum, few rows": (einsum, outputs, (1, 2, 8)),
    "embedding": (embedding, looked_up, (2, 3, 8)),
    "reversible embedding": (reversible, looked_up, (2, 3, 8)),
    "reverse direction": (reversible, reversed_rows, (3, 8)),
    "convolution": (convolution, outputs, (2, 5, 8)),
}


def value(f, x):
    return ops.sum(ops.sin(f(x)))


def slope(f, x):
    """As a gradient penalty."""
    return ops.sum(ops.square(derivative(lambda x: value(f, x), x)))


def curvature(f, x):
    """As an equation with second derivatives."""

    def slopes(x):
        return ops.sum(ops.sin(derivative(lambda x: value(f, x), x)))

    return ops.sum(ops.square(derivative(slopes, x)))


LOSSES = {1: value, 2: slope, 3: curvature}


def derivative(f, x):
    """The gradient of a scalar function, which can be derived again."""
    if BACKEND == "jax":
        import jax

        return jax.grad(f)(x)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(x)
            y = f(x)
        return tape.gradient(y, x)
    import torch

    several = isinstance(x, list)
    xs = x if several else [x]
    xs = [x if x.requires_grad else x.detach().requires_grad_() for x in xs]
    y = f(xs if several else xs[0])
    found = torch.autograd.grad(y, xs, create_graph=True)
    return list(found) if several else found[0]


def compiled(f):
    """The function as a training step has it."""
    if BACKEND == "jax":
        import jax

        return jax.jit(f)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.function(f)
    return f


def kernel_of(layer):
    """The variable that the Keras layer multiplies with."""
    if isinstance(layer, keras.layers.Embedding):
        return layer.embeddings
    return layer.kernel


def gradients(layer, variables, values, loss, step=lambda f: f):
    """Gradients of a loss for the values that variables take."""

    def of_values(values):
        pairs = list(zip(variables, values, strict=True))
        with keras.StatelessScope(state_mapping=pairs):
            return loss(layer)

    values = [ops.convert_to_tensor(x) for x in values]
    found = step(lambda values: derivative(of_values, values))(values)
    return [ops.convert_to_numpy(ops.stop_gradient(x)) for x in found]


def check(create, apply, shape, order, training=True, S=CORE, **how):
    """Compares with the gradient G for the update as a whole."""
    layer = create(rank=2, max_rank=4, scale=0.5, seed=0)
    x = ops.convert_to_tensor(random(shape))
    apply(layer, x, False)
    layer.adapter.S.assign(S)
    adapter = layer.adapter
    U, V = (ops.convert_to_numpy(factor) for factor in (adapter.U, adapter.V))

    def loss(layer):
        return LOSSES[order](lambda x: apply(layer, x, training), x)

    factors = [adapter.U, adapter.S, adapter.V]
    values = [v.value for v in factors]
    found = gradients(layer, factors, values, loss, **how)
    merged = ops.convert_to_numpy(kernel_of(layer) + layer.delta())
    plain = layer.plain_class.from_config(create().get_config())
    apply(plain, x, False)
    if getattr(layer, "bias", None) is not None:
        plain.bias.assign(layer.bias)
    (G,) = gradients(plain, [kernel_of(plain)], [merged], loss)
    G = 0.5 * G.reshape(layer.kernel_view.matrix_shape)
    for one, exact in zip(found, (G @ V, U.T @ G @ V, G.T @ U), strict=True):
        error = np.linalg.norm(one - exact)
        assert error < 1e-4 * np.linalg.norm(exact) + 1e-6


@pytest.mark.parametrize(
    "order, training", [(1, True), (2, True), (3, True), (2, False)]
)
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_geometric_to_any_order(name, order, training):
    check(*LAYERS[name], order, training)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("name", ["dense, few rows", "reverse direction"])
def test_a_fresh_adapter_has_the_gradients_too(name, order):
    check(*LAYERS[name], order, S=np.zeros((4, 4), "float32"))


@pytest.mark.skipif(BACKEND == "torch", reason="Keras compiles nothing there")
@pytest.mark.parametrize("name", ["dense, many rows", "reverse direction"])
def test_gradients_are_the_same_in_a_compiled_step(name):
    check(*LAYERS[name], 2, step=compiled)


@pytest.mark.skipif(BACKEND != "jax", reason="others know no limit")
def test_too_many_derivatives_are_refused(monkeypatch):
    monkeypatch.setattr(products, "ORDERS", 2)
    check(*LAYERS["dense, few rows"], 2)
    with pytest.raises(NotImplementedError, match="derivative of order 3"):
        check(*LAYERS["dense, few rows"], 3)


@pytest.mark.skipif(BACKEND != "jax", reason="jvp and hessian are of JAX")
def test_forward_mode_is_exact_or_refused():
    import jax

    layer = dense(rank=2, max_rank=4, seed=0)
    x = ops.convert_to_tensor(random((8,)))
    layer(x[None])
    layer.adapter.S.assign(CORE)
    kernel = layer.kernel + layer.delta()

    def f(x, training):
        return ops.sum(layer(x[None], training=training) ** 2)

    def plain(x):
        return ops.sum(ops.tanh(x @ kernel) ** 2)

    np.testing.assert_allclose(
        jax.hessian(f)(x, False), jax.hessian(plain)(x), atol=1e-5
    )
    with pytest.raises(TypeError, match="forward-mode"):
        jax.hessian(f)(x, True)
