"""A model whose rows have adapters of their own: equal to one at a time."""

import keras
import numpy as np
import pytest
import small_models
from moving import move

import keras_geolora
from keras_geolora.keras_internals import all_layers
from keras_geolora.layers.adapter import LowRankAdapter
from keras_geolora.layers.adapter_bank import check_rows
from keras_geolora.layers.factor import factor_of

RNG = np.random.default_rng(0)


def answers(model, x, names):
    """Returns the outputs of the model with each adapter, and without any."""
    found = {}
    for name in names:
        model.activate_geolora(name)
        found[name] = model.predict(x, verbose=0)
    with model.geolora_disabled():
        found[""] = model.predict(x, verbose=0)
    return found


def check(routed, x, found, mix, atol=1e-5):
    """Compares every row of a mixed batch with the model of its adapter."""
    expected = np.stack([found[name][i] for i, name in enumerate(mix)])
    got = routed.predict(x, adapters=mix, verbose=0)
    np.testing.assert_allclose(got, expected, atol=atol)


@pytest.fixture(scope="module")
def classifier():
    """A classifier whose adapters differ in rank, layers and what trains."""
    model = small_models.classifier()
    model.enable_geolora(rank=1, name="linear")
    move(model)
    norm = "embeddings_layer_norm"
    model.enable_geolora(
        rank=2,
        name="norm",
        targets="all",
        exclude="position_embedding",
        modules_to_save=norm,
    )
    move(model)
    model.enable_geolora(rank=3, name="bias", train_bias=True, scale=0.5)
    move(model)
    return model


@pytest.fixture(scope="module")
def routed(classifier):
    return classifier.route_geolora(capacity=5, max_rank=6)


@pytest.fixture(scope="module")
def asked(classifier):
    x = small_models.tokens(8, 6, RNG)
    return x, answers(classifier, x, ["linear", "norm", "bias"])


def test_every_row_is_that_of_its_adapter(routed, asked):
    x, found = asked
    check(routed, x, found, ["linear", "norm", "bias", ""] * 2)
    check(routed, x, found, ["bias"] * 8)
    effect = [np.abs(y - found[""]).max() for y in found.values()]
    assert min(effect[:3]) > 1e-3  # the adapters do something


def test_plain_rows_are_those_of_the_base(routed, asked):
    x, found = asked
    got = routed.predict(x, adapters="", verbose=0)
    np.testing.assert_allclose(got, found[""], atol=1e-6)


def test_another_mix_needs_no_new_trace(classifier, routed, asked, tmp_path):
    x, found = asked
    routed.predict(x, adapters="linear", verbose=0)
    before, calls = routed.predict_function, []
    call = routed.call
    vars(routed)["call"] = lambda inputs: calls.append(inputs) or call(inputs)
    try:
        classifier.save_geolora(tmp_path / "norm.safetensors", name="norm")
        routed.add("later", tmp_path / "norm.safetensors")
        mix = ["later", "", "bias", "later", "norm", "", "bias", "linear"]
        check(routed, x, {**found, "later": found["norm"]}, mix)
        routed.remove("later")
        check(routed, x, found, ["norm", "bias"] * 4)
    finally:
        del vars(routed)["call"]
    assert routed.predict_function is before
    if keras.backend.backend() != "torch":  # which runs the call every time
        assert not calls


def test_calls_are_given_no_adapters_of_the_model(classifier, routed):
    assert any(factor_of(v) for v in classifier.variables)
    assert not any(factor_of(v) for v in routed.variables)
    own = {id(v) for v in routed.variables}
    assert {id(v) for bank in routed.banks for v in bank.variables} <= own
    assert {id(v) for v in classifier.get_layer("logits").variables} <= own


def test_calls_look_through_no_adapters_of_the_model(classifier, routed):
    def count(model):
        return sum(isinstance(x, LowRankAdapter) for x in all_layers(model))

    assert count(classifier) and not count(routed)
    assert len(all_layers(routed)) == len(set(map(id, all_layers(routed))))
    assert routed.banks[0] in all_layers(routed)


def test_losses_of_layers_are_those_of_the_last_call():
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(2, activity_regularizer="l2")]
    )
    model.enable_geolora(rank=1)
    routed = model.route_geolora()
    x = {"inputs": np.ones((2, 3), "float32"), "adapter": np.zeros(2, "int32")}
    found = []
    for _ in range(2):
        routed(x)
        found.append([float(loss) for loss in routed.losses])
    assert len(found[0]) == 1 and found[0] == found[1]


def test_an_adapter_is_replaced_by_what_it_has_learned_since(routed, asked):
    x, found = asked
    model = routed.model
    model.activate_geolora("linear")
    layer = model.backbone.get_layer("pooled_dense")
    layer.adapter.S.assign(
        2 * np.array(keras.ops.convert_to_numpy(layer.adapter.S))
    )
    changed = model.predict(x, verbose=0)
    check(routed, x, found, ["linear"] * 8)
    routed.add("linear")
    check(routed, x, {"linear": changed}, ["linear"] * 8)
    layer.adapter.S.assign(
        0.5 * np.array(keras.ops.convert_to_numpy(layer.adapter.S))
    )
    routed.add("linear")


def test_the_model_is_as_before_outside_of_routed_calls(classifier, asked):
    x, found = asked
    for name in ("linear", "norm", "bias"):
        classifier.activate_geolora(name)
        again = classifier.predict(x, verbose=0)
        np.testing.assert_array_equal(again, found[name])
    head = classifier.get_layer("logits")
    assert "call" not in vars(head)


def test_evaluate_takes_adapters_as_well(routed, asked):
    x, found = asked
    mix = ["linear", "norm", "bias", ""] * 2
    y = np.stack([found[name][i] for i, name in enumerate(mix)])
    routed.compile(loss="mse")
    right = routed.evaluate(x, y, adapters=mix, verbose=0)
    wrong = routed.evaluate(x, y, adapters=mix[::-1], verbose=0)
    assert right < 1e-10 < wrong


def images():
    return keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            keras.layers.Conv2D(4, 3, strides=2, padding="same"),
            keras.layers.Flatten(),
            keras.layers.Dense(3),
        ]
    )


def series():
    return keras.Sequential(
        [
            keras.Input((7, 3)),
            keras.layers.Conv1D(4, 3, padding="causal", activation="relu"),
            keras.layers.EinsumDense(
                "abc,cde->abde", (None, 2, 4), bias_axes="de"
            ),
            keras.layers.Flatten(),
        ]
    )


def in_and_out():
    embedding = keras.layers.ReversibleEmbedding(20, 4, logit_soft_cap=3.0)
    ids = keras.Input((5,), dtype="int32")
    return keras.Model(ids, embedding(embedding(ids), reverse=True))


def quantized():
    model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(8)])
    model.quantize("int8")
    return model


def lower_precision():
    dense = keras.layers.Dense(8, dtype="mixed_bfloat16")
    return keras.Sequential([keras.Input((16,)), dense])


@pytest.mark.parametrize(
    "create", [images, series, in_and_out, quantized, lower_precision]
)
def test_every_kind_of_layer(create):
    keras.utils.set_random_seed(0)
    model = create()
    for rank, name in enumerate("ab", start=1):
        model.enable_geolora(
            rank=rank, name=name, targets="all", train_bias=name == "b"
        )
        move(model)
    shape = (4, *model.input_shape[1:])
    x = RNG.normal(size=shape).astype("float32")
    if create is in_and_out:
        x = RNG.integers(20, size=shape).astype("int32")
    found = answers(model, x, "ab")
    coarse = create in (quantized, lower_precision)
    check(
        model.route_geolora(),
        x,
        found,
        ["a", "", "b", "b"],
        atol=0.05 if coarse else 1e-5,
    )
    assert np.abs(found["a"] - found["b"]).max() > 0.03


def adapted(*layers, **options):
    model = keras.Sequential(layers)
    model.enable_geolora(rank=1, targets="all", **options)
    return model


def test_what_cannot_differ_between_rows_is_refused():
    groups = keras.layers.Conv1D(4, 3, groups=2, name="grouped")
    with pytest.raises(ValueError, match="'grouped', and .* in 2 groups"):
        adapted(keras.Input((8, 4)), groups).route_geolora()
    model = adapted(
        keras.Input((4,)),
        keras.layers.Dense(4, name="first"),
        keras.layers.Dense(4, name="second"),
        name="one",
    )
    model.enable_geolora(name="two", modules_to_save="first")
    with pytest.raises(ValueError, match="'first', and another adapter trains"):
        model.route_geolora()


class Tied(keras.Model):
    """A model in which one layer reads the kernel of another."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(4)

    def build(self, shape):
        self.dense.build(shape)

    def call(self, x):
        kernel = keras.ops.transpose(self.dense.kernel)
        return keras.ops.matmul(self.dense(x), kernel)


def test_a_kernel_that_another_layer_reads_is_refused():
    model = Tied()
    model.build((None, 3))
    model.enable_geolora(rank=1)
    routed = model.route_geolora()
    with pytest.raises(ValueError, match="no single kernel.*'dense"):
        routed.predict(np.ones((2, 3)), adapters="default", verbose=0)


def test_an_axis_before_that_of_the_batch_is_refused():
    check_rows(np.zeros((1, 3)), np.zeros(5))  # all rows share it
    with pytest.raises(ValueError, match=r"shape \(4, 3\) for 5 rows"):
        check_rows(np.zeros((4, 3)), np.zeros(5))


def test_arguments_are_checked(routed, classifier, tmp_path):
    with pytest.raises(ValueError, match=r"Received: \['french'\]"):
        routed.ids(["linear", "french"])
    with pytest.raises(ValueError, match="2 names for 3 rows"):
        routed.ids(["linear", ""], 3)
    with pytest.raises(ValueError, match="name='french'"):
        routed.remove("french")
    with pytest.raises(ValueError, match="name='french'"):
        routed.add("french")
    with pytest.raises(ValueError, match=r"adapters=\['french'\]"):
        classifier.route_geolora(["french"])
    with pytest.raises(ValueError, match="capacity=2 for 3"):
        classifier.route_geolora(capacity=2)
    with pytest.raises(ValueError, match="max_rank=2"):
        classifier.route_geolora(max_rank=2)
    with pytest.raises(ValueError, match="without an adapted layer"):
        keras_geolora.route_geolora(
            keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        )
    with pytest.raises(ValueError, match="only predicts"):
        routed.fit()
    with pytest.raises(ValueError, match="cannot be saved"):
        routed.save(tmp_path / "routed.keras")


def test_adapters_that_do_not_fit_are_refused(tmp_path):
    def create(units=4, seed=0):
        keras.utils.set_random_seed(seed)
        return keras.Sequential(
            [
                keras.Input((8,)),
                keras.layers.Dense(8, name="hidden"),
                keras.layers.Dense(units, name="out"),
            ]
        )

    def saved(name, model, **options):
        model.enable_geolora(**options)
        model.save_geolora(tmp_path / name)
        return tmp_path / name

    model = create()
    model.enable_geolora(rank=2, name="mine", exclude="hidden")
    routed = model.route_geolora()
    small = saved("small", create(), rank=1, exclude="hidden")
    with pytest.raises(ValueError, match="adapter 'other'.*capacity of 1"):
        routed.add("other", small)
    files = {
        r"max_rank=4": saved("big", create(), rank=4, exclude="hidden"),
        r"no place .* layer 'hidden'": saved("more", create(), rank=1),
        "8 x 5": saved("wide", create(5), rank=1, exclude="hidden"),
        "other pretrained weights": saved(
            "elsewhere", create(seed=1), rank=1, exclude="hidden"
        ),
        r"other values of 'out/bias'": saved(
            "biased", create(), rank=1, exclude="hidden", train_bias=True
        ),
    }
    for match, file in files.items():
        with pytest.raises(ValueError, match=match):
            routed.add("mine", file)
    routed.add("mine", small)
