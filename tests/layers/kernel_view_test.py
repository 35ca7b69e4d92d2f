"""Kernels seen as matrices: there and back, batches, and every layer."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_geolora.layers.kernel_view import KernelView
from keras_geolora.layers.registry import kernel_view

VIEWS = [
    KernelView("kernel", (4, 3), rows=(0,), columns=(1,)),
    KernelView("kernel", (2, 5, 3), rows=(0, 1), columns=(2,)),
    KernelView("kernel", (2, 5, 3), rows=(2, 0), columns=(1,)),
    KernelView("experts", (2, 5, 3), rows=(1,), columns=(2,), batch=(0,)),
    KernelView("experts", (2, 5, 3, 4), rows=(3,), columns=(0, 2), batch=(1,)),
]
LAYERS = [
    (keras.layers.Dense(3), (None, 4)),
    (keras.layers.EinsumDense("abc,cde->abde", (None, 2, 3)), (None, 5, 4)),
    (keras.layers.EinsumDense("abc,dec->abde", (None, 2, 3)), (None, 5, 4)),
    (keras.layers.EinsumDense("abcd,cde->abe", (None, 6)), (None, 5, 4, 3)),
    (keras.layers.Embedding(7, 3), (None,)),
    (keras.layers.ReversibleEmbedding(7, 3), (None,)),
    (keras.layers.Conv1D(3, 2), (None, 5, 4)),
    (keras.layers.Conv2D(6, 2, groups=2), (None, 5, 5, 4)),
]


@pytest.mark.parametrize("view", VIEWS, ids=str)
@pytest.mark.parametrize("tensors", [False, True])
def test_a_kernel_comes_back_from_its_matrix(view, tensors):
    kernel = np.arange(np.prod(view.shape), dtype="float32")
    kernel = kernel.reshape(view.shape)
    given = ops.convert_to_tensor(kernel) if tensors else kernel
    matrix = view.to_matrix(given)
    batch = tuple(view.shape[axis] for axis in view.batch)
    assert tuple(matrix.shape) == (*batch, *view.matrix_shape)
    back = view.to_kernel(matrix)
    assert isinstance(back, np.ndarray) is not tensors
    np.testing.assert_array_equal(ops.convert_to_numpy(back), kernel)


def test_each_matrix_of_a_batch_is_one_slice_of_the_kernel():
    view = VIEWS[3]
    kernel = np.random.default_rng(0).normal(size=view.shape)
    np.testing.assert_array_equal(view.to_matrix(kernel)[1], kernel[1])


def test_axes_that_are_missing_or_twice_are_refused():
    with pytest.raises(ValueError, match=r"shape=\(2, 3\).*rows=\(0, 0\)"):
        KernelView("kernel", (2, 3), rows=(0, 0), columns=(1,))


@pytest.mark.parametrize(
    "layer, shape", LAYERS, ids=[layer.name for layer, _ in LAYERS]
)
def test_a_layer_says_the_same_with_and_without_an_adapter(layer, shape):
    layer = type(layer).from_config(layer.get_config())
    layer.build(shape)
    plain = kernel_view(layer)
    assert plain.shape == tuple(getattr(layer, plain.name).shape)
    model = keras.Sequential([layer])
    model.build(shape)
    model.enable_geolora(rank=1, targets="all")
    assert kernel_view(layer) == layer.kernel_view == plain
    assert tuple(layer.delta().shape) == plain.shape
    adapter = layer.adapter
    assert (adapter.input_dim, adapter.output_dim) == plain.matrix_shape


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_quantized_kernel_is_seen_in_its_shape_in_floating_point(mode):
    for layer, shape in LAYERS[:2]:
        layer = type(layer).from_config(layer.get_config())
        layer.build(shape)
        before = kernel_view(layer)
        layer.quantize(mode)
        assert kernel_view(layer) == before


def test_a_layer_without_a_kernel_has_no_view():
    layer = keras.layers.LayerNormalization()
    layer.build((None, 4))
    assert kernel_view(layer) is None
    assert kernel_view(None) is None
