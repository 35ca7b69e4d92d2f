"""Whole models: adapting, refusing, merging."""

import functools
import sys

import keras
import numpy as np
import pytest
from keras import ops
from moving import move, take_a_step

import keras_geolora
from keras_geolora import GeoLoRA, GeoLoRADense, GeoLoRAEinsumDense
from keras_geolora.layers.factor import TRAINED_ROLES, factor_of
from keras_geolora.layers.tree import adapted_layers


def random(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def functional(width=8, outputs=8):
    inputs = keras.Input((8,))
    x = keras.layers.Dense(width, activation="relu", name="hidden")(inputs)
    mix = keras.layers.EinsumDense(
        "ab,bc->ac", width, bias_axes="c", name="mix"
    )
    return keras.Model(inputs, keras.layers.Dense(outputs, name="head")(mix(x)))


def of_three_shapes():
    return functional(12, 3)


def sequential():
    return keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(8, name="hidden"),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(8, name="head"),
        ]
    )


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.blocks = [keras.layers.Dense(8), keras.layers.Dense(8)]
        self.head = keras.layers.Dense(8, name="head")

    def call(self, x):
        for block in self.blocks:
            x = x + ops.relu(block(x))
        return self.head(x)


def subclassed():
    model = Subclassed()
    model(np.zeros((1, 8), "float32"))
    return model


def nested():
    return keras.Sequential(
        [keras.Input((8,)), functional(), keras.layers.Dense(8, name="top")]
    )


def shared():
    inputs = keras.Input((8,))
    layer = keras.layers.Dense(8, name="shared")
    outputs = keras.layers.Dense(8, name="head")(layer(layer(inputs)))
    return keras.Model(inputs, outputs)


MODELS = [functional, sequential, subclassed, nested, shared]


def compiled(model):
    model.compile(GeoLoRA("sgd"), loss="mse")
    return model


def train(model, epochs=2):
    x, y = random((32, 8)), random((32, 8), 1)
    return compiled(model).fit(x, y, epochs=epochs, verbose=0)


@functools.cache
def trained():
    """A model, only to look at, what it predicted, and how it was trained."""
    model = functional()
    before = model.predict(random((5, 8)), verbose=0)
    model.enable_geolora(rank=2)
    return model, before, train(model).history


@pytest.mark.parametrize("create", MODELS)
def test_a_fresh_adapter_leaves_predictions_bit_identical(create):
    model, x = create(), random((5, 8))
    before = model.predict(x, verbose=0)
    assert model.enable_geolora(rank=2, seed=0) is model
    np.testing.assert_array_equal(model.predict(x, verbose=0), before)


@pytest.mark.parametrize("create", MODELS)
def test_merging_keeps_predictions_and_restores_the_model(create):
    model, x = create(), random((5, 8))
    kind, names = type(model), [v.path for v in model.variables]
    trained = [v.path for v in model.trainable_variables]
    before = model.predict(x, verbose=0)
    model.enable_geolora(rank=2, seed=0)
    assert isinstance(model, kind)
    move(compiled(model))
    adapted = model.predict(x, verbose=0)
    assert np.abs(adapted - before).max() > 1e-4
    model.merge_geolora()
    merged = model.predict(x, verbose=0)
    error = np.linalg.norm(merged - adapted) / np.linalg.norm(adapted)
    assert error < 1e-5
    assert type(model) is kind
    assert [v.path for v in model.variables] == names
    assert [v.path for v in model.trainable_variables] == trained
    assert not adapted_layers(model)


@pytest.mark.parametrize("create", MODELS)
def test_only_the_factors_move(create):
    model = create()
    model.enable_geolora(rank=2, seed=0)
    frozen = [
        v
        for v in model.non_trainable_variables
        if "seed" not in v.name and factor_of(v) is None
    ]
    before = [ops.convert_to_numpy(v) for v in frozen]
    train(model)
    assert {v.name for v in model.trainable_variables} == set(TRAINED_ROLES)
    for variable, value in zip(frozen, before, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(variable), value)


def test_a_shared_layer_is_adapted_once():
    model = shared()
    model.enable_geolora(rank=2)
    assert list(adapted_layers(model)) == ["shared", "head"]


def test_layers_stay_what_they_are():
    model = functional()
    model.enable_geolora(rank=2)
    hidden, mix = model.get_layer("hidden"), model.get_layer("mix")
    assert type(hidden) is GeoLoRADense
    assert isinstance(hidden, keras.layers.Dense)
    assert type(mix) is GeoLoRAEinsumDense
    assert hidden.is_adapted and hidden.rank == 2
    assert tuple(hidden.delta().shape) == tuple(hidden.kernel.shape)


def test_modules_to_save_train_as_they_are():
    model = functional()
    model.enable_geolora(rank=2, modules_to_save="head")
    head = model.get_layer("head")
    assert type(head) is keras.layers.Dense
    assert len(head.trainable_variables) == 2
    assert not model.get_layer("hidden").bias.trainable


def test_biases_train_on_request():
    model = functional()
    model.enable_geolora(rank=2, train_bias=True)
    assert model.get_layer("mix").bias.trainable
    assert not model.get_layer("mix").kernel.trainable


@pytest.mark.parametrize(
    "targets, expected",
    [
        ("hidden", ["hidden"]),
        ("h.*", ["hidden", "head"]),
        (keras.layers.EinsumDense, ["mix"]),
        (["mix", "head"], ["mix", "head"]),
        (lambda path, layer: layer.bias.shape[0] == 3, ["head"]),
        ("all-linear", ["hidden", "mix", "head"]),
        ("all", ["hidden", "mix", "head"]),
    ],
)
def test_targets_name_layers_in_many_ways(targets, expected):
    model = of_three_shapes()
    model.enable_geolora(rank=2, targets=targets)
    assert list(adapted_layers(model)) == expected


def test_a_target_that_matches_nothing_lists_what_could():
    model = functional()
    with pytest.raises(ValueError, match=r"targets='attn'") as error:
        model.enable_geolora(targets="attn")
    assert "'mix' (EinsumDense), 'head' (Dense) (3 in all)" in str(error.value)
    assert len(model.trainable_variables) == 6


def transformer():
    tokens = keras.Input((6,), dtype="int32")
    x = keras.layers.Embedding(20, 8, name="embed")(tokens)
    attention = keras.layers.MultiHeadAttention(2, 4, name="attend")
    x = keras.layers.LayerNormalization(name="norm")(x + attention(x, x))
    x = keras.layers.Dense(16, activation="gelu", name="up")(x)
    x = keras.layers.Conv1D(8, 3, padding="causal", name="conv")(x)
    x = keras.layers.DepthwiseConv1D(3, padding="same", name="depth")(x)
    return keras.Model(tokens, keras.layers.Dense(20, name="head")(x))


ATTENTION = [
    f"attend/{name}" for name in ("query", "key", "value", "attention_output")
]


@pytest.mark.parametrize(
    "targets, exclude, expected",
    [
        ("all-linear", None, [*ATTENTION, "up", "head"]),
        ("attention", None, ATTENTION),
        ("attention", "key", [p for p in ATTENTION if "key" not in p]),
        ("attend", None, ATTENTION),  # all that is inside
        ("all-linear", "attend", ["up", "head"]),
        (keras.layers.MultiHeadAttention, None, ATTENTION),
        (["conv", keras.layers.Embedding], None, ["embed", "conv"]),
        ("all", "head", ["embed", *ATTENTION, "up", "conv"]),
        (".*", ["attention", "head"], ["embed", "up", "conv"]),
    ],
)
def test_words_and_outer_layers_mean_what_is_inside(targets, exclude, expected):
    model = transformer()
    tokens = np.arange(12).reshape(2, 6)
    before = model.predict(tokens, verbose=0)
    model.enable_geolora(rank=2, targets=targets, exclude=exclude, seed=0)
    assert sorted(adapted_layers(model)) == sorted(expected)
    np.testing.assert_array_equal(model.predict(tokens, verbose=0), before)
    assert len(model.trainable_variables) == len(TRAINED_ROLES) * len(expected)


@pytest.mark.parametrize(
    "targets, reason",
    [
        ("depth", "mixes no channels"),
        (keras.layers.LayerNormalization, "no adapter for LayerNormalization"),
        (["up", "norm"], "no adapter for LayerNormalization"),
    ],
)
def test_a_layer_without_an_adapter_is_refused_when_named(targets, reason):
    model = transformer()
    with pytest.raises(ValueError, match=reason):
        model.enable_geolora(rank=2, targets=targets)
    assert not adapted_layers(model)


def test_a_rank_pattern_gives_ranks_to_some():
    model = transformer()
    patterns = {"attend/query": 4, "attention": 1, "up": 5}
    model.enable_geolora(rank=2, rank_pattern=patterns)
    ranks = {path: x.rank for path, x in adapted_layers(model).items()}
    assert ranks["attend/query"] == 4 and ranks["attend/key"] == 1
    assert ranks["up"] == 5 and ranks["head"] == 2
    assert adapted_layers(model)["up"].adapter.max_rank == 8


def test_a_rank_pattern_must_mean_something():
    for pattern in ("quary", "embed"):
        with pytest.raises(ValueError, match=f"rank_pattern.*{pattern}"):
            transformer().enable_geolora(rank=2, rank_pattern={pattern: 1})


@pytest.mark.parametrize(
    "options, received",
    [
        ({"rank_pattern": ["head"]}, r"rank_pattern=\['head'\]"),
        ({"train_bias": "all"}, "train_bias='all'"),
    ],
)
def test_options_of_another_kind_are_refused(options, received):
    model = functional()
    with pytest.raises(TypeError, match=f"Received: {received}"):
        model.enable_geolora(rank=2, **options)
    assert not adapted_layers(model)


def test_ranks_above_a_kernel_are_clipped_and_told(tmp_path):
    model = of_three_shapes()
    model.enable_geolora(
        rank=4, max_rank=10, min_rank=4, rank_pattern={"mix": 6}
    )
    adapters = {p: x.adapter for p, x in adapted_layers(model).items()}
    assert {
        path: (a.min_rank, a.rank, a.max_rank) for path, a in adapters.items()
    } == {"hidden": (4, 4, 8), "mix": (4, 6, 10), "head": (3, 3, 3)}
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for found in (model, loaded):
        lines = []
        rows = found.geolora_summary(print_fn=lines.append)
        assert [row["asked_ranks"] for row in rows] == [
            {"max_rank": 10},
            {},
            {"min_rank": 4, "rank": 4, "max_rank": 10},
        ]
        assert lines[-1].endswith(
            "hidden (max_rank 10: now 8), "
            "head (min_rank 4, rank 4, max_rank 10: now 3)."
        )
    take_a_step(compiled(loaded), random((32, 8)), random((32, 3), 1))


def test_a_rank_by_default_has_room_in_a_layer_of_two_outputs():
    model = keras.Sequential(
        [keras.Input((32,)), keras.layers.Dense(16), keras.layers.Dense(2)]
    )
    model.enable_geolora(rank_pattern={"dense_?.*": 20})
    assert [layer.rank for layer in model.layers] == [16, 2]
    (first, _) = model.geolora_summary(print_fn=None)
    assert first["asked_ranks"] == {"rank": 20}


def test_ranks_that_contradict_each_other_name_the_layer():
    with pytest.raises(ValueError, match="max_rank=4.*'hidden'.*rank_pattern"):
        functional().enable_geolora(rank=5, max_rank=4)


@pytest.mark.parametrize(
    "rank, error", [(0, ValueError), (-2, ValueError), (1.5, TypeError)]
)
def test_a_wrong_rank_is_refused_and_nothing_changes(rank, error):
    model, x = functional(), random((5, 8))
    before = model.predict(x, verbose=0)
    with pytest.raises(error, match=f"rank={rank}"):
        model.enable_geolora(rank=rank)
    assert not adapted_layers(model)
    assert len(model.trainable_variables) == 6
    assert all(layer.trainable for layer in model.layers)
    np.testing.assert_array_equal(model.predict(x, verbose=0), before)
    model.enable_geolora(rank=3)


def test_a_model_has_one_adapter_of_a_name():
    model = functional()
    model.enable_geolora(rank=2)
    with pytest.raises(ValueError, match=r"name='default'.*\['default'\]"):
        model.enable_geolora(rank=2)
    for name in ("a/b", "v1.0", "", 3):
        with pytest.raises(ValueError, match=f"name={name!r}"):
            model.enable_geolora(rank=2, name=name)


def test_a_broken_regular_expression_is_named():
    with pytest.raises(ValueError, match="not a valid regular"):
        functional().enable_geolora(targets="(")


def test_fit_takes_its_arguments_by_position():
    model = functional()
    model.enable_geolora(rank=2)
    x, y = random((16, 8)), random((16, 8))
    with pytest.raises(ValueError, match=r"You must call `compile\(\)`"):
        model.fit(x, y)
    model.compile(GeoLoRA("sgd"), loss="mse")
    history = model.fit(x, y, 8, 2, 0, [])
    assert len(history.history["mean_rank"]) == 2


def test_the_adapters_of_a_part_are_merged_where_they_were_made():
    inner = functional()
    outer = keras.Sequential([keras.Input((8,)), inner])
    outer.enable_geolora(rank=2)
    for name in ("merge_geolora", "remove_geolora"):
        with pytest.raises(ValueError, match=f"belong to '{outer.name}'"):
            getattr(inner, name)()
    with pytest.raises(ValueError, match="with 3 adapted layers"):
        inner.enable_geolora(rank=2, name="other")
    outer.merge_geolora()
    inner.enable_geolora(rank=2)
    outer.merge_geolora()
    assert not hasattr(inner, "plain_class")


def test_a_model_that_is_not_built_is_refused():
    with pytest.raises(ValueError, match="is not built"):
        Subclassed().enable_geolora(rank=2)


def test_only_models_are_adapted_and_merged():
    for function in (keras_geolora.enable_geolora, keras_geolora.merge_geolora):
        with pytest.raises(TypeError, match="model='bert'"):
            function("bert")


@pytest.mark.parametrize("name", ["merge_geolora", "geolora_summary"])
def test_without_adapters_there_is_nothing_to_do(name):
    with pytest.raises(ValueError, match="without an adapted layer"):
        getattr(functional(), name)()


def test_a_non_finite_update_is_not_merged():
    model = functional()
    model.enable_geolora(rank=2)
    kernels = [ops.convert_to_numpy(x.kernel) for x in model.layers[1:]]
    model.get_layer("mix").adapter.S.assign(np.full((4, 4), np.nan))
    with pytest.raises(ValueError, match="of layer 'mix'"):
        model.merge_geolora()
    for layer, kernel in zip(model.layers[1:], kernels, strict=True):
        np.testing.assert_array_equal(
            ops.convert_to_numpy(layer.kernel), kernel
        )


def test_ordinary_optimizers_are_refused_with_the_line_to_write():
    model = functional()
    model.enable_geolora(rank=2)
    with pytest.raises(ValueError, match="GeoLoRA(.*)optimizer='adam'"):
        model.compile(optimizer="adam", loss="mse")


def test_a_model_can_be_evaluated_without_geolora():
    model = functional()
    model.enable_geolora(rank=2)
    model.compile(loss="mse")
    assert model.evaluate(random((4, 8)), random((4, 8)), verbose=0) > 0
    with pytest.raises(ValueError, match="Adapters must be trained"):
        model.fit(random((4, 8)), random((4, 8)), verbose=0)


def test_adapting_after_predicting_does_not_serve_the_old_graph():
    model, before, _ = trained()
    after = model.predict(random((5, 8)), verbose=0)
    assert np.abs(after - before).max() > 1e-4


def test_equal_seeds_give_equal_adapters():
    deltas = []
    for _ in range(2):
        keras.utils.set_random_seed(0)  # `fit` shuffles
        model = functional()
        model.set_weights([random(w.shape, 2) for w in model.weights])
        model.enable_geolora(rank=2, seed=5)
        train(model, epochs=1)
        deltas.append(
            [
                ops.convert_to_numpy(layer.delta())
                for layer in adapted_layers(model).values()
            ]
        )
    for first, second in zip(*deltas, strict=True):
        np.testing.assert_array_equal(first, second)


def test_the_logs_hold_mean_rank_skipped_steps_and_the_scale_of_steps():
    model, _, history = trained()
    ranks = [layer.rank for layer in adapted_layers(model).values()]
    assert history["mean_rank"][-1] == np.mean(ranks)
    assert history["skipped_steps"] == [0, 0]
    scales = [
        model.optimizer.step_scale(layer.adapter)
        for layer in adapted_layers(model).values()
    ]
    np.testing.assert_allclose(history["step_scale"][-1], np.mean(scales))


def test_the_summary_shows_what_was_found(capsys):
    model, _, _ = trained()
    rows = model.geolora_summary()
    assert [row["path"] for row in rows] == ["hidden", "mix", "head"]
    for row, layer in zip(rows, model.layers[1:], strict=True):
        assert row["rank"] == layer.rank
        sigma = np.linalg.svd(
            ops.convert_to_numpy(layer.delta()), compute_uv=False
        )
        np.testing.assert_allclose(
            row["singular_values"], sigma[: layer.rank], atol=1e-5
        )
        assert row["orthogonality_error"] < 1e-5
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("hidden") and "8x8" in line for line in lines)
    assert any(line.startswith("3 adapters, mean rank") for line in lines)


def test_a_layer_that_was_frozen_trains_its_adapter():
    model = keras.Sequential(
        [keras.Input((8,)), keras.layers.Dense(8), keras.layers.Dense(4)]
    )
    model.layers[0].trainable = False
    model.enable_geolora(rank=2)
    trained = model.layers[0].trainable_variables
    assert len(trained) == len(TRAINED_ROLES)
    model.remove_geolora()
    assert not model.layers[0].trainable and model.layers[1].trainable


# The modules in which a model is changed.
CHANGING = [
    f"keras_geolora.{name}"
    for name in ("conversion", "adapted_model", "adaptation", "layers.adapted")
]


def interrupted(action, at):
    """Interrupts an action at a call inside of `CHANGING`; says if it did."""
    calls = 0

    def count(frame, event, _):
        nonlocal calls
        if event == "call" and frame.f_globals["__name__"] in CHANGING:
            calls += 1
            if calls == at:
                raise KeyboardInterrupt

    sys.setprofile(count)
    try:
        action()
    except KeyboardInterrupt:
        return True
    finally:
        sys.setprofile(None)
    return False


def everything(model):
    """All that adapting and merging change."""
    parts = [model, *model.layers]
    return (
        [type(part) for part in parts],
        [set(vars(layer)) for layer in model.layers],
        [part.trainable for part in parts],
        [(v.path, v.trainable) for v in model.variables],
        [ops.convert_to_numpy(v).tobytes() for v in model.variables],
        model.geolora_adapters(),
        [getattr(layer, "adapter_names", []) for layer in model.layers],
    )


def assert_that_interrupts_change_nothing(model, action):
    predict = model.predict_on_batch
    before, outputs, at = everything(model), predict(random((5, 8))), 1
    while interrupted(action, at):
        assert everything(model) == before, f"at call {at}"
        at += 1
    assert at > 20 and everything(model) != before
    return before, outputs


@pytest.mark.parametrize("train_bias", [True, False])
def test_an_interrupt_while_adapting_changes_nothing(train_bias):
    model = sequential()
    model.layers[0].trainable = False
    model.predict_on_batch(random((5, 8)))
    options = {"rank": 2, "train_bias": train_bias}
    before, outputs = assert_that_interrupts_change_nothing(
        model, lambda: model.enable_geolora(**options)
    )
    model.layers[1].trainable = True  # by hand
    assert_that_interrupts_change_nothing(
        model,
        lambda: model.enable_geolora(
            **options, name="other", modules_to_save="head"
        ),
    )
    model.layers[1].trainable = False
    model.remove_geolora()
    assert everything(model)[3:] == before[3:]
    np.testing.assert_array_equal(
        model.predict_on_batch(random((5, 8))), outputs
    )


def test_an_interrupt_while_merging_changes_nothing():
    model = sequential()
    model.enable_geolora(rank=2, targets="head", name="other")
    model.enable_geolora(rank=2, train_bias=True)
    model.layers[1].trainable = True  # by hand
    move(compiled(model))
    before, outputs = assert_that_interrupts_change_nothing(
        model, model.merge_geolora
    )
    model.unmerge_geolora()
    assert everything(model)[2:] == before[2:]
    np.testing.assert_array_equal(
        model.predict_on_batch(random((5, 8))), outputs
    )


def test_an_interrupt_of_a_final_merge_leaves_the_kernels_up_to_rounding():
    model = functional()
    model.enable_geolora(rank=2)
    move(compiled(model))
    weights, at = model.get_weights(), 1
    while interrupted(lambda: model.merge_geolora(reversible=False), at):
        assert len(adapted_layers(model)) == 3
        for now, before in zip(model.get_weights(), weights, strict=True):
            np.testing.assert_allclose(now, before, atol=1e-5)
        at += 1
    assert at > 20 and not adapted_layers(model)


def test_an_adapted_layer_takes_no_lora_of_keras():
    model = sequential()
    model.enable_geolora(rank=2)
    with pytest.raises(ValueError, match="layer 'head', which is adapted"):
        model.layers[-1].enable_lora(2)
    model.merge_geolora()
    model.layers[-1].enable_lora(2)
    layer = GeoLoRADense(4, rank=2, lora_rank=2, name="both")
    with pytest.raises(ValueError, match="'both' with lora_enabled=True"):
        layer.build((None, 8))
