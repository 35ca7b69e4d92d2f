"""What a layer shows to others, and what Keras and a backend keep of it."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_geolora
from keras_geolora import GeoLoRA, GeoLoRADense
from keras_geolora.layers import adapted
from keras_geolora.layers.registry import adapted_class

BACKEND = keras.backend.backend()
X = np.random.default_rng(0).normal(size=(32, 8)).astype("float32")
IDS = np.arange(12, dtype="int32").reshape(3, 4) % 5


def trained(model, x, y, **options):
    model.enable_geolora(rank=2, seed=0, **options)
    model.compile(GeoLoRA(keras.optimizers.Adam(1e-2)), loss="mse")
    model.fit(x, y, epochs=3, verbose=0)
    return model


def predict(model, x):
    return model.predict(x, verbose=0)


class Reader(keras.layers.Layer):
    """Computes with the kernel of another layer, as tied layers do."""

    def __init__(self, other, attribute="kernel", **kwargs):
        super().__init__(**kwargs)
        self.other, self.attribute = other, attribute

    def call(self, x):
        kernel = getattr(self.other, self.attribute)
        columns = ops.shape(kernel)[-1]
        return ops.matmul(x, ops.transpose(ops.reshape(kernel, (-1, columns))))


def tied(layer, shape, attribute="kernel", dtype=None):
    """A model of a layer, and of another that reads its kernel."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input(shape, dtype=dtype)
    return keras.Model(inputs, Reader(layer, attribute)(layer(inputs)))


def embedding():
    return keras.layers.ReversibleEmbedding(5, 6, tie_weights=False)


TIED = {
    "dense": (lambda: keras.layers.Dense(4), X, "kernel"),
    "einsum": (
        lambda: keras.layers.EinsumDense("ab,bc->ac", (4,)),
        X,
        "kernel",
    ),
    "convolution": (
        lambda: keras.layers.Conv1D(4, 3),
        X.reshape(8, 4, 8),
        "kernel",
    ),
    "embedding": (embedding, IDS, "embeddings"),
    "bfloat16": (lambda: keras.layers.Dense(4, dtype="bfloat16"), X, "kernel"),
}


@pytest.mark.parametrize("name", TIED)
def test_a_layer_that_reads_a_kernel_gets_the_update(name):
    create, x, attribute = TIED[name]
    layer = create()
    model = tied(layer, x.shape[1:], attribute, x.dtype)
    fresh = predict(model, x)
    model.enable_geolora(rank=2, seed=0, targets="all")
    # Torch multiplies equal matrices at other addresses in another order.
    np.testing.assert_allclose(predict(model, x), fresh, atol=1e-6)
    layer.adapter.S.assign(np.diag([1.0, 0.5] + [0, 0]))
    before = predict(model, x)
    assert np.abs(before - fresh).max() > 0.1
    with model.geolora_disabled():
        np.testing.assert_allclose(predict(model, x), fresh, atol=1e-6)
    model.merge_geolora()
    tolerance = 0.05 if name == "bfloat16" else 1e-5
    scale = np.abs(before).max()
    np.testing.assert_allclose(
        predict(model, x), before, atol=tolerance * scale
    )


def test_an_untied_reverse_matrix_is_read_with_its_update():
    layer = embedding()
    layer.build()

    class Matrix(keras.layers.Layer):
        def call(self, x):
            return ops.matmul(x, layer.reverse_embeddings)

    plain = ops.convert_to_numpy(layer.reverse_embeddings)
    keras_geolora.GeoLoRAReversibleEmbedding.adapt(layer, rank=2, seed=0)
    layer.adapter.S.assign(np.diag([1.0, 0.5, 0, 0]))
    update = ops.convert_to_numpy(layer.delta()).T
    seen = Matrix()(np.eye(6, dtype="float32"))
    np.testing.assert_allclose(
        ops.convert_to_numpy(seen), plain + update, atol=1e-6
    )
    assert isinstance(layer.reverse_embeddings, keras.Variable)
    layer.merge()
    np.testing.assert_allclose(
        ops.convert_to_numpy(layer.reverse_embeddings), plain + update
    )


def test_reading_trains_the_factors():
    """The encoder is never called: all the gradient comes by reading."""
    encoder = keras.layers.Dense(8)
    encoder.build((None, 8))

    class Decoder(keras.Model):
        def __init__(self):
            super().__init__()
            self.encoder, self.reader = encoder, Reader(encoder)

        def call(self, x):
            return self.reader(x)

    model = Decoder()
    model(X)
    trained(model, X, X)
    before = predict(model, X)
    assert np.abs(ops.convert_to_numpy(encoder.delta())).max() > 1e-3
    model.merge_geolora()
    np.testing.assert_allclose(predict(model, X), before, atol=1e-5)


@pytest.mark.parametrize("name", TIED)
def test_a_layer_does_not_show_its_kernel_to_itself(name, monkeypatch):
    """The sum would be formed for nothing, or the update added twice."""
    create, x, _ = TIED[name]
    layer = create()
    layer(x)
    adapted_class(layer).adapt(layer, rank=2)
    called = []
    monkeypatch.setattr(adapted, "in_layer_call", lambda: called.append(1))
    for training in (True, False):
        layer(x, training=training)
    layer.delta(), layer.kernel_norm()
    assert not called


def test_outside_of_a_call_a_kernel_is_the_variable():
    layer = GeoLoRADense(4, rank=2)
    layer(X)
    layer.adapter.S.assign(np.eye(4))
    assert isinstance(layer.kernel, keras.Variable)
    layer.kernel.assign(ops.zeros((8, 4)))
    assert not np.any(ops.convert_to_numpy(layer.kernel))


def test_a_layer_whose_kernel_another_one_holds_is_not_adapted():
    inner = keras.layers.Dense(4, name="inner")
    model = keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.SpectralNormalization(inner, name="wrapper"),
            keras.layers.Dense(3, name="head"),
        ]
    )
    for targets in ("inner", "wrapper"):
        with pytest.raises(ValueError, match="'wrapper' holds its kernel"):
            model.enable_geolora(targets=targets)
    model.enable_geolora(rank=2)
    assert [x.name for x in model.layers if hasattr(x, "rank")] == ["head"]


def tracked(layer):
    """What Keras and the backend keep of a layer, by names."""
    attributes = vars(layer)
    stores = layer._tracker.config.items()
    found = {
        "attributes": sorted(attributes),
        "tensorflow": attributes.get("_tracked"),
        "modules": sorted(attributes.get("_modules", {})),
        "parameters": [],
        "stores": {name: list(map(id, kept)) for name, (_, kept) in stores},
        "ids": {k: sorted(ids) for k, ids in layer._tracker.stored_ids.items()},
        "locked": layer._tracker.locked,
        "class": type(layer),
    }
    if BACKEND == "torch":
        found["parameters"] = [x for x, _ in layer.named_parameters()]
    if BACKEND == "tensorflow":
        children = layer._trackable_children()
        found["children"] = {k: id(v) for k, v in children.items()}
    return {k: list(v) if isinstance(v, list) else v for k, v in found.items()}


@pytest.mark.parametrize("leave", ["merge", "detach_adapters", "delete"])
def test_a_layer_keeps_no_trace_of_its_adapters(leave):
    for create in (lambda: keras.layers.Dense(4), embedding):
        layer = create()
        layer.build((None, 8))
        if BACKEND == "torch":
            layer.named_parameters()
        before = tracked(layer)
        cls = adapted_class(layer)
        for name in ("one", "two", "three"):
            cls.adapt(layer, name=name, rank=1)
        layer.resize_adapter("two", 1)
        layer.delete_adapter("three")
        if leave == "delete":
            layer.delete_adapter("one")
            layer.delete_adapter("two")
        else:
            layer.activate_adapter("one")
            getattr(layer, leave)()
        assert tracked(layer) == before


def test_adapters_that_were_exchanged_are_followed():
    layer = keras.layers.Dense(4)
    layer.build((None, 8))
    GeoLoRADense.adapt(layer, name="one", rank=1)
    GeoLoRADense.adapt(layer, name="two", rank=1)
    layer.resize_adapter("one", 1)
    layer.delete_adapter("two")
    adapter = layer.adapters_by_name()["one"]
    assert layer._layers == [adapter]
    factors = [id(v) for v in adapter.factors]
    assert [id(v) for v in layer.variables[2:7]] == factors
    if BACKEND == "torch":
        assert sum("adapter_one" in k for k, _ in layer.named_parameters()) >= 3


@pytest.mark.skipif(BACKEND != "tensorflow", reason="of TensorFlow")
@pytest.mark.parametrize("leave", ["merge_geolora", "remove_geolora"])
def test_a_model_that_was_adapted_is_exported_and_checkpointed(leave, tmp_path):
    import tensorflow as tf

    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8)])
    model.enable_geolora(rank=1, name="first")
    trained(model, X, X)
    getattr(model, leave)()
    model.compile("sgd", loss="mse")
    expected = predict(model, X)
    path = tf.train.Checkpoint(model=model).save(str(tmp_path / "checkpoint"))
    names = [name for name, _ in tf.train.list_variables(path)]
    assert not [name for name in names if "adapter" in name]
    model.export(str(tmp_path / "model"), verbose=False)
    served = tf.saved_model.load(str(tmp_path / "model"))
    np.testing.assert_allclose(served.serve(X), expected, atol=1e-5)


class HoldsKernel(keras.layers.Layer):
    def __init__(self, other):
        super().__init__()
        self.held = other.kernel
        self.built = True

    def call(self, x):
        return ops.matmul(x, ops.transpose(self.held))


class Task(keras.Model):
    """A backbone and a head, as a task of KerasHub."""

    def __init__(self):
        super().__init__()
        layers = [keras.layers.Dense(8, name=name) for name in ("one", "two")]
        self.backbone = keras.Sequential([keras.Input((6,)), *layers])
        self.head = HoldsKernel(layers[0])

    def call(self, x):
        return self.head(self.backbone(x))


def test_a_head_that_holds_a_kernel_of_the_backbone_is_noticed():
    task = Task()
    task(np.ones((2, 6)))
    with pytest.raises(ValueError, match="HoldsKernel(.*)holds its kernel"):
        task.enable_geolora(rank=2, targets="one")
    task.enable_geolora(rank=2)
    adapted_ones = [hasattr(x, "adapter") for x in task.backbone.layers]
    assert adapted_ones == [False, True]
