"""Unmerging, disabling, removing, and several adapters on one model."""

import keras
import numpy as np
import pytest
from keras import ops
from moving import move

from keras_geolora import GeoLoRA
from keras_geolora.layers.factor import TRAINED_ROLES
from keras_geolora.layers.tree import adapted_layers, layers_with_adapters

# Some of these tests freeze the head, and know it.
pytestmark = pytest.mark.filterwarnings("ignore:The last layer")

X = np.random.default_rng(0).normal(size=(16, 8)).astype("float32")
Y = np.random.default_rng(1).normal(size=(16, 8)).astype("float32")


def functional():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8,))
    x = keras.layers.Dense(8, activation="relu", name="hidden")(inputs)
    x = keras.layers.BatchNormalization(name="norm")(x)
    return keras.Model(inputs, keras.layers.Dense(8, name="head")(x))


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.part = functional()
        self.top = keras.layers.Dense(8, name="top")

    def call(self, x, training=None):
        return self.top(self.part(x, training=training))


def subclassed():
    model = Subclassed()
    model(X)
    return model


def nested():
    return keras.Sequential([keras.Input((8,)), functional()])


def holding():
    """A model that holds a part which was adapted by itself."""
    part = functional()
    part.enable_geolora(rank=2, seed=0, train_bias=True)
    return keras.Sequential([keras.Input((8,)), part])


def adapted(create, **options):
    model = create()
    if create is not holding:
        model.enable_geolora(rank=2, seed=0, **options)
    return model


def compiled(model):
    model.compile(GeoLoRA(keras.optimizers.Adam(0.05)), loss="mse")
    return model


def fit(model, epochs=2):
    model.fit(X, Y, epochs=epochs, batch_size=8, verbose=0)
    return model


def train(model):
    return fit(compiled(model))


def moved(model):
    """As after a training, of adapters and of modules that are saved."""
    move(model)
    for layer in model._flatten_layers():
        if layer.name == "norm" and layer.trainable_variables:
            for variable in layer.weights:
                variable.assign(ops.convert_to_numpy(variable) + 0.25)
    return model


def predict(model):
    return model.predict(X, verbose=0)


def state(model):
    return {v.path: ops.convert_to_numpy(v).copy() for v in model.weights}


def assert_equal(these, those):
    assert set(these) == set(those)
    for path, value in these.items():
        np.testing.assert_array_equal(value, those[path], err_msg=path)


CREATE = [functional, subclassed, nested, holding]


@pytest.mark.parametrize("create", CREATE)
def test_unmerging_restores_every_byte(create):
    model = compiled(moved(adapted(create)))
    before, outputs = state(model), predict(model)
    trainable = [v.path for v in model.trainable_variables]
    classes = [type(x) for x in layers_with_adapters(model).values()]
    model.merge_geolora()
    assert not layers_with_adapters(model)
    np.testing.assert_allclose(predict(model), outputs, atol=1e-5)
    model.unmerge_geolora()
    assert_equal(state(model), before)
    np.testing.assert_array_equal(predict(model), outputs)
    assert [v.path for v in model.trainable_variables] == trainable
    assert [type(x) for x in layers_with_adapters(model).values()] == classes
    fit(model)
    assert not np.array_equal(predict(model), outputs)
    model.merge_geolora()


def test_what_was_learned_after_merging_is_not_unmerged():
    model = moved(adapted(functional))
    model.merge_geolora()
    model.compile("sgd", loss="mse")
    model.fit(X, Y, verbose=0)
    before = state(model)
    with pytest.raises(ValueError, match="'hidden', whose kernel has changed"):
        model.unmerge_geolora()
    assert_equal(state(model), before)


def test_unmerging_needs_what_merging_kept():
    model = adapted(functional)
    with pytest.raises(ValueError, match="can be unmerged"):
        model.unmerge_geolora()
    model.merge_geolora(reversible=False)
    with pytest.raises(ValueError, match="reversible=False"):
        model.unmerge_geolora()


def test_a_merged_model_that_was_adapted_again_is_not_unmerged():
    model = adapted(functional)
    model.merge_geolora()
    model.enable_geolora(rank=3)
    with pytest.raises(ValueError, match="remove_geolora"):
        model.unmerge_geolora()
    model.remove_geolora()
    model.unmerge_geolora()
    assert model.get_layer("hidden").rank == 2


OPTIONS = {"train_bias": True, "modules_to_save": "norm"}


@pytest.mark.parametrize("create", CREATE)
def test_disabling_gives_the_pretrained_outputs_bit_for_bit(create):
    pretrained = predict(create())
    model = moved(adapted(create, train_bias=True))
    outputs, before = predict(model), state(model)
    assert not np.array_equal(outputs, pretrained)
    for _ in range(2):
        with model.geolora_disabled():
            np.testing.assert_array_equal(predict(model), pretrained)
            with model.geolora_disabled():
                np.testing.assert_array_equal(predict(model), pretrained)
            np.testing.assert_allclose(
                ops.convert_to_numpy(model(X)), pretrained, atol=1e-6
            )
        np.testing.assert_array_equal(predict(model), outputs)
    assert_equal(state(model), before)


def test_disabling_ends_when_the_block_fails():
    pretrained = predict(functional())
    model = train(adapted(functional, **OPTIONS))
    outputs = predict(model)
    with pytest.raises(KeyError), model.geolora_disabled():
        np.testing.assert_array_equal(predict(model), pretrained)
        raise KeyError
    np.testing.assert_array_equal(predict(model), outputs)


def test_compiled_functions_are_kept_while_disabled():
    model = compiled(moved(adapted(functional)))
    predict(model)
    with model.geolora_disabled():
        predict(model)
        disabled = model.predict_function
    enabled = model.predict_function
    with model.geolora_disabled():
        assert model.predict_function is disabled
    assert model.predict_function is enabled


def test_a_compilation_while_disabled_holds_afterwards():
    model = compiled(moved(adapted(functional)))
    with model.geolora_disabled():
        model.compile(GeoLoRA(keras.optimizers.SGD(0.0)), loss="mse")
        model.evaluate(X, Y, verbose=0)
    before = predict(model)
    with pytest.warns(UserWarning, match="has moved"):  # the rate is zero
        model.fit(X, Y, batch_size=8, verbose=0)
    np.testing.assert_allclose(predict(model), before, atol=1e-6)
    assert int(model.optimizer.iterations) == len(X) // 8


def test_a_compilation_drops_functions_of_the_disabled_model():
    model = compiled(moved(adapted(functional)))
    with model.geolora_disabled():
        squared = model.evaluate(X, Y, verbose=0)
    model.compile(GeoLoRA("adam"), loss="mae")
    with model.geolora_disabled():
        absolute = model.evaluate(X, Y, verbose=0)
        expected = np.abs(model.predict(X, verbose=0) - Y).mean()
    assert absolute == pytest.approx(expected, rel=1e-4)
    assert absolute != pytest.approx(squared, rel=1e-2)


def test_while_disabled_nothing_is_changed():
    model = adapted(functional)
    with model.geolora_disabled():
        for change in (
            model.merge_geolora,
            model.remove_geolora,
            lambda: model.enable_geolora(rank=2, name="other"),
            lambda: model.activate_geolora("default"),
        ):
            with pytest.raises(ValueError, match="adapters disabled"):
                change()


@pytest.mark.parametrize("create", CREATE[:3])
def test_removing_gives_back_the_model_as_it_was(create):
    plain = create()
    before, outputs = state(plain), predict(plain)
    trainable = [v.name for v in plain.trainable_variables]
    model = create()
    model.enable_geolora(rank=2, **OPTIONS)
    train(model) if create is functional else moved(model)
    assert model.remove_geolora() is model
    assert [v.name for v in model.trainable_variables] == trainable
    for old, new in zip(before.values(), state(model).values(), strict=True):
        np.testing.assert_array_equal(old, new)
    np.testing.assert_array_equal(predict(model), outputs)


@pytest.mark.parametrize("what", ["model", "layer", "variable"])
def test_what_was_frozen_before_is_so_afterwards(what):
    model = functional()
    frozen = {
        "model": model,
        "layer": model.get_layer("hidden"),
        "variable": model.get_layer("norm").gamma,
    }[what]
    frozen.trainable = False
    flags = [v.trainable for v in model.weights]
    model.enable_geolora(rank=2)
    assert len(model.trainable_variables) == 2 * len(TRAINED_ROLES)
    before = predict(model)
    train(model)
    assert not np.array_equal(predict(model), before)
    model.remove_geolora()
    assert not frozen.trainable
    assert [v.trainable for v in model.weights] == flags


def test_adapters_have_names_and_companions_of_their_own():
    model = functional()
    pretrained = predict(model)
    model.enable_geolora(rank=2, name="a", seed=0, train_bias=True)
    moved(model)
    a = predict(model)
    model.enable_geolora(
        rank=3, name="b", seed=1, targets="hidden", modules_to_save="norm"
    )
    np.testing.assert_array_equal(predict(model), pretrained)
    assert sorted(adapted_layers(model)) == ["hidden"]
    assert len(model.trainable_variables) == len(TRAINED_ROLES) + 2
    assert not model.get_layer("hidden").bias.trainable
    moved(model)
    b = predict(model)
    assert model.geolora_adapters() == ["b", "a"]
    for name, expected in [("a", a), ("b", b), ("b", b), ("a", a)]:
        assert model.activate_geolora(name) is model
        np.testing.assert_array_equal(predict(model), expected)
        with model.geolora_disabled():
            np.testing.assert_array_equal(predict(model), pretrained)
    assert model.get_layer("hidden").bias.trainable
    assert not model.get_layer("norm").trainable
    with pytest.raises(ValueError, match=r"name='c'; .* are \['a', 'b'\]"):
        model.activate_geolora("c")
    with pytest.raises(ValueError, match=r"activate_geolora\('b'\)"):
        model.delete_geolora("a")
    model.delete_geolora("b")
    assert model.geolora_adapters() == ["a"]
    np.testing.assert_array_equal(predict(model), a)
    with pytest.raises(ValueError, match="remove_geolora"):
        model.delete_geolora("a")
    model.remove_geolora()
    np.testing.assert_array_equal(predict(model), pretrained)


def test_the_optimizer_of_another_adapter_is_given_up():
    model = compiled(adapted(functional, name="a"))
    model.optimizer.build(model.trainable_variables)
    model.enable_geolora(rank=2, name="b")
    with pytest.raises(ValueError, match=r"You must call `compile\(\)`"):
        model.fit(X, Y, verbose=0)


def test_adapters_of_a_part_are_switched_from_outside():
    model = compiled(moved(adapted(holding)))
    outputs = predict(model)
    part = model.layers[0]
    part.enable_geolora(rank=2, name="other")
    model.compile()
    model.activate_geolora("default")
    np.testing.assert_array_equal(predict(model), outputs)
    assert model.geolora_adapters() == ["default", "other"]


def test_a_weighted_sum_adds_up_the_updates():
    model = functional()
    pretrained = state(model)
    updates, biases = {}, {}
    for name, rank in [("a", 2), ("b", 3)]:
        model.enable_geolora(
            rank=rank, name=name, seed=rank, scale=rank / 2, train_bias=True
        )
        moved(model)
        hidden = model.get_layer("hidden")
        hidden.bias.assign(rank * ops.convert_to_numpy(hidden.bias))
        updates[name] = ops.convert_to_numpy(hidden.delta())
        biases[name] = ops.convert_to_numpy(hidden.bias).copy()
    model.combine_geolora("sum", {"a": 0.5, "b": -2.0})
    hidden = model.get_layer("hidden")
    expected = 0.5 * updates["a"] - 2.0 * updates["b"]
    np.testing.assert_allclose(
        ops.convert_to_numpy(hidden.delta()), expected, atol=1e-6
    )
    before = pretrained[hidden.bias.path]
    np.testing.assert_allclose(
        ops.convert_to_numpy(hidden.bias),
        before + 0.5 * (biases["a"] - before) - 2.0 * (biases["b"] - before),
        atol=1e-6,
    )
    model.combine_geolora("short", {"a": 0.5, "b": -2.0}, rank=2)
    assert model.get_layer("hidden").rank == 2
    P, sigma, Qt = np.linalg.svd(expected)
    best = (P[:, :2] * sigma[:2]) @ Qt[:2]
    np.testing.assert_allclose(
        ops.convert_to_numpy(model.get_layer("hidden").delta()), best, atol=1e-6
    )
    train(model)


def test_an_adapter_survives_being_a_saved_module_of_another():
    model = functional()
    model.enable_geolora(rank=2, name="a", targets="hidden")
    moved(model)
    a = predict(model)
    model.enable_geolora(
        rank=2, name="b", targets="head", modules_to_save="hidden"
    )
    train(model)
    model.activate_geolora("a")
    np.testing.assert_array_equal(predict(model), a)


def test_nothing_is_the_name_of_no_adapter():
    model = functional()
    model.enable_geolora(rank=2)
    for call in (
        lambda: model.activate_geolora(None),
        lambda: model.delete_geolora(None),
        lambda: model.combine_geolora("sum", {None: 1.0}),
    ):
        with pytest.raises(ValueError, match=r"name=None.*\['default'\]"):
            call()


def test_deleting_an_adapter_thaws_nothing():
    model = functional()
    model.enable_geolora(
        rank=2, name="a", targets="head", modules_to_save="hidden"
    )
    model.enable_geolora(rank=2, name="b", targets="hidden")
    model.enable_geolora(rank=2, name="c", targets="head")
    before = [v.path for v in model.trainable_variables]
    model.delete_geolora("b")
    assert [v.path for v in model.trainable_variables] == before


def test_models_that_share_a_part_are_disabled_each():
    part = functional()
    one = keras.Sequential([keras.Input((8,)), part])
    other = keras.Sequential([keras.Input((8,)), part])
    pretrained = predict(part)
    part.enable_geolora(rank=2)
    moved(part)
    adapted_outputs = predict(one)
    predict(other)
    with part.geolora_disabled(), one.geolora_disabled():
        np.testing.assert_array_equal(predict(one), pretrained)
        with other.geolora_disabled():
            np.testing.assert_array_equal(predict(other), pretrained)
        np.testing.assert_array_equal(predict(part), pretrained)
    np.testing.assert_array_equal(predict(one), adapted_outputs)
    part.enable_geolora(rank=2, name="other")
    predict(part)
    one.activate_geolora("default")
    np.testing.assert_array_equal(predict(part), adapted_outputs)


def test_what_is_disabled_does_not_train():
    model = compiled(moved(adapted(functional)))
    with model.geolora_disabled():
        with pytest.raises(ValueError, match="adapters disabled"):
            model.fit(X, Y, verbose=0)


def test_statistics_stay_statistics_in_a_sum():
    model = adapted(functional, name="a", modules_to_save="norm")
    norm = model.get_layer("norm")
    norm.moving_variance.assign(np.full(8, 3.0))
    moved(model)
    model.combine_geolora("negative", {"a": -1.0})
    variance = ops.convert_to_numpy(norm.moving_variance)
    assert (variance > 0).all() and np.isfinite(predict(model)).all()


@pytest.mark.parametrize("rank", [-1, 0, 1.5])
def test_a_sum_that_fails_changes_nothing(rank):
    model = moved(adapted(functional, name="a"))
    outputs = predict(model)
    with pytest.raises((ValueError, TypeError), match=f"rank={rank}"):
        model.combine_geolora("sum", {"a": 1.0}, rank=rank)
    adapter = model.get_layer("head").adapter
    adapter.S.assign(np.full(adapter.S.shape, np.nan))
    with pytest.raises(ValueError, match="non-finite update of layer"):
        model.combine_geolora("sum", {"a": 1.0})
    assert model.geolora_adapters() == ["a"]
    assert model.get_layer("hidden").adapter_names == ["a"]
    adapter.S.assign(np.zeros(adapter.S.shape))
    assert predict(model).shape == outputs.shape


@pytest.mark.parametrize(
    "weights, match",
    [
        ({}, "weights={}"),
        ({"a": np.nan}, "nan"),
        ({"a": "x"}, "'x'"),
        (["a"], "'a'"),
        ({"z": 1.0}, "name='z'"),
    ],
)
def test_a_sum_of_nothing_is_refused(weights, match):
    model = adapted(functional, name="a")
    with pytest.raises(ValueError, match=match):
        model.combine_geolora("sum", weights)
    with pytest.raises(ValueError, match="name='a'"):
        model.combine_geolora("a", {"a": 1.0})


def test_saved_modules_train_and_statistics_follow():
    model = functional()
    model.enable_geolora(rank=2, targets="hidden", modules_to_save="norm")
    norm = model.get_layer("norm")
    before = [ops.convert_to_numpy(w).copy() for w in norm.weights]
    train(model)
    for old, new in zip(before, norm.weights, strict=True):
        assert not np.array_equal(old, ops.convert_to_numpy(new)), new.path


def changed_by_hand():
    """Adapted at the head; the rest thawed and the head's bias frozen."""
    model = functional()
    model.enable_geolora(rank=2, targets="head", train_bias=True)
    for name in "hidden", "norm":
        model.get_layer(name).trainable = True
    model.get_layer("head").bias.trainable = False
    return model


def flags(model):
    layers = [(layer.name, layer.trainable) for layer in model.layers]
    return layers, {v.path: v.trainable for v in model.weights}


def test_unmerging_repeats_what_was_thawed_and_frozen_by_hand():
    model = changed_by_hand()
    before = flags(model)
    assert before[1]["hidden/kernel"] and not before[1]["head/bias"]
    model.merge_geolora()
    model.unmerge_geolora()
    assert flags(model) == before


def test_what_is_thawed_by_hand_stays_so_under_other_adapters():
    model = changed_by_hand()
    before = flags(model)
    model.enable_geolora(rank=2, targets="head", name="other")
    thawed = {"hidden/kernel", "hidden/bias", "norm/gamma", "norm/beta"}

    def trains():
        return {v.path for v in model.trainable_variables}

    factors = {f"head/adapter_other/{role}" for role in TRAINED_ROLES}
    assert trains() == thawed | factors
    model.combine_geolora("sum", {"default": 0.5, "other": 0.5}, rank=2)
    assert thawed < trains() and len(trains()) == 5 + len(TRAINED_ROLES)
    model.activate_geolora("other")
    model.delete_geolora("sum")
    assert trains() == thawed | factors
    model.get_layer("head").bias.trainable = False
    model.activate_geolora("default")
    model.delete_geolora("other")
    model.get_layer("head").bias.trainable = False
    assert flags(model) == before


def test_a_new_adapter_does_not_inherit_the_flags_of_its_layers():
    model = changed_by_hand()
    model.get_layer("head").trainable = False
    model.enable_geolora(
        rank=2, targets=["hidden", "head"], modules_to_save="norm", name="new"
    )
    assert len(model.trainable_variables) == 2 * len(TRAINED_ROLES) + 2
    assert not model.get_layer("hidden").kernel.trainable


def test_what_trained_because_somebody_thawed_it_is_named():
    model = changed_by_hand()
    match = "Left as they are: hidden/kernel, hidden/bias, norm/gamma"
    with pytest.warns(UserWarning, match=match) as warned:
        with model.geolora_disabled(), model.geolora_disabled():
            pass
        model.remove_geolora()
    ours = [w for w in warned if w.category is UserWarning]
    assert [w.filename for w in ours] == [__file__] * 2


def test_an_adapter_frozen_by_hand_rests_until_somebody_thaws_it():
    model = functional()
    model.enable_geolora(rank=2, name="a")
    model.get_layer("hidden").adapter.trainable = False
    before = flags(model)
    assert len(model.trainable_variables) == len(TRAINED_ROLES)
    model.enable_geolora(rank=2, name="b")
    assert len(model.trainable_variables) == 2 * len(TRAINED_ROLES)
    model.activate_geolora("a")
    model.delete_geolora("b")
    model.merge_geolora()
    model.unmerge_geolora()
    assert flags(model) == before
    model.get_layer("hidden").adapter.trainable = True
    assert len(model.trainable_variables) == 2 * len(TRAINED_ROLES)


def toggle(layer):
    layer.trainable = False
    assert not layer.trainable_variables
    assert not any(v.trainable for v in layer.weights)
    layer.trainable = True


@pytest.mark.parametrize("by_hand", [True, False])
def test_a_model_that_rested_trains_what_it_trained(by_hand):
    model = changed_by_hand() if by_hand else adapted(functional)
    whole = keras.Sequential([keras.Input((8,)), model])
    if not by_hand:
        model.get_layer("hidden").adapter.trainable = False
    before = flags(model)
    for layer in (model, whole):
        toggle(layer)
        assert flags(model) == before
    model.trainable = True  # again
    assert flags(model) == before
    model.get_layer("norm").trainable = True
    assert model.get_layer("norm").gamma.trainable


def test_the_adapters_of_a_model_that_rests_can_be_changed():
    model = changed_by_hand()
    before = flags(model)
    model.enable_geolora(rank=2, targets="head", name="other")
    model.activate_geolora("default")
    model.get_layer("head").bias.trainable = False
    model.trainable = False
    model.activate_geolora("other")
    model.activate_geolora("default")
    model.delete_geolora("other")
    model.merge_geolora()
    model.unmerge_geolora()
    assert not any(v.trainable for v in model.weights)
    model.trainable = True
    assert flags(model)[0] == before[0]
    assert {v.path for v in model.trainable_variables} == {
        path for path, trains in before[1].items() if trains
    } | {"head/bias"}
    model.trainable = False
    model.enable_geolora(rank=2, targets="head", name="third")
    assert len(model.trainable_variables) == 4 + len(TRAINED_ROLES)


def test_a_model_that_rests_is_what_it_was_without_its_adapters():
    model = functional()
    before = flags(model)
    model.enable_geolora(rank=2)
    model.trainable = False
    model.remove_geolora()
    assert flags(model) == before and model.trainable


@pytest.mark.parametrize("create", [functional, nested])
def test_a_kernel_does_not_move_after_its_model_rested(create):
    model = adapted(create)
    toggle(model)
    before = state(model)
    train(model)
    after = state(model)
    moved = {p.split("/")[-1] for p in before if np.any(before[p] != after[p])}
    assert moved == {"U", "S", "V"}
