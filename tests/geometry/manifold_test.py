"""Factors are what a training leaves, wherever they come from or go to."""

import keras
import numpy as np
import pytest
import reference
from keras import ops

import keras_geolora
from keras_geolora import GeoLoRA, GeoLoRADense
from keras_geolora.geometry import manifold
from keras_geolora.geometry.low_rank_sum import svd_of_sum
from keras_geolora.layers.factor import factors_of

RNG = np.random.default_rng(0)
X = RNG.normal(size=(32, 8)).astype("float32")
Y = np.tanh(X @ RNG.normal(size=(8, 3))).astype("float32")


def plain():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(6, activation="tanh", name="hidden"),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.Dense(3, name="head"),
        ]
    )


def adapted(**options):
    model = plain()
    model.enable_geolora(
        rank=2, seed=0, train_bias=True, modules_to_save="norm", **options
    )
    return model


def fit(model, x=X, y=Y, epochs=3):
    if not model.compiled:
        model.compile(GeoLoRA(keras.optimizers.Adam(1e-2)), loss="mse")
    model.fit(x, y, batch_size=8, epochs=epochs, verbose=0)
    return model


def moved(seed=0, **options):
    """A model with values as some training might leave them."""
    model, rng = adapted(**options), np.random.default_rng(seed)
    for name in ("hidden", "head"):
        layer = model.get_layer(name)
        adapter = getattr(layer, "adapter", None)
        if adapter is not None:
            shape = adapter.input_dim, adapter.output_dim
            factors = reference.random_factors(rng, *shape, [0.5, 0.2])
            reference.put_factors(adapter, *factors)
        layer.bias.assign(rng.normal(size=layer.bias.shape))
    for variable in model.get_layer("norm").weights:
        variable.assign(rng.uniform(1, 2, size=variable.shape))
    return model


def spoil(adapter, size=1e-2):
    """Moves the factors as an ordinary optimizer does."""
    rng = np.random.default_rng(1)
    for factor in adapter.factors:
        value = ops.convert_to_numpy(factor)
        noise = size * rng.normal(size=factor.shape)
        factor.assign(value + noise * (value != 0))


def spoiled():
    model = moved()
    spoil(model.get_layer("hidden").adapter)
    return model


def predict(model):
    return np.array(model.predict(X, verbose=0))


def delta(layer):
    return np.array(ops.convert_to_numpy(layer.delta()))


# The distance.


def factors():
    U, S, V = reference.random_factors(np.random.default_rng(0), 8, 6, [2, 1])
    columns = ((0, 0), (0, 2))
    return np.pad(U, columns), np.pad(S, (0, 2)), np.pad(V, columns)


DAMAGES = {
    "a longer column": lambda U, S, V: np.multiply(U, 1.1, out=U),
    "columns that are not orthogonal": lambda U, S, V: V.__setitem__(
        (slice(None), 0), V[:, 0] + 0.01 * V[:, 1]
    ),
    "a hole": lambda U, S, V: U.__setitem__((slice(None), 0), 0.0),
    "more columns of one": lambda U, S, V: V.__setitem__((0, 2), 1e-6),
    "a core beyond the rank": lambda U, S, V: S.__setitem__((3, 3), 1e-6),
    "no column in use": lambda U, S, V: (U.fill(0), V.fill(0), S.fill(0)),
    "no number": lambda U, S, V: S.__setitem__((0, 0), np.nan),
    "infinite": lambda U, S, V: U.__setitem__((0, 0), np.inf),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_is_seen(damage):
    three = factors()
    assert manifold.distance(*three) < 1e-12
    DAMAGES[damage](*three)
    far = manifold.distance(*three)
    assert far > manifold.TOLERANCE
    assert np.isinf(far) == (damage in ("no number", "infinite"))


def test_the_size_of_an_update_is_no_damage():
    U, S, V = factors()
    for size in (0.0, 1e-30, 1e30):
        assert manifold.distance(U, S * size, V) < 1e-12


@pytest.mark.filterwarnings("ignore:The last layer")
def test_a_training_stays_far_below_what_is_allowed():
    model = fit(adapted(exclude="head"), epochs=20)
    found = factors_of([model.get_layer("hidden")])
    (three,) = found.values()
    assert manifold.distance(*map(ops.convert_to_numpy, three)) < 1e-5


# Where factors go.

WAYS_OUT = {
    "save": lambda m, path: m.save(f"{path}.keras"),
    "save_weights": lambda m, path: m.save_weights(f"{path}.weights.h5"),
    "save_geolora": lambda m, path: m.save_geolora(f"{path}.safetensors"),
    "export_peft": lambda m, path: keras_geolora.export_peft(
        m, path, names={"hidden": "a", "head": "b"}
    ),
    "export": lambda m, path: keras_geolora.export(m, path, verbose=False),
    "merge": lambda m, path: m.merge_geolora(),
}
NOT_DONE = "was not written|Nothing was (merged|exported)"


@pytest.mark.parametrize("way", WAYS_OUT)
def test_nothing_is_written_of_factors_that_are_none(tmp_path, way):
    model = spoiled()
    expected = predict(model)
    match = f"off by 0.*hidden/adapter'.*({NOT_DONE}).*combine_geolora"
    with pytest.raises(ValueError, match=match):
        WAYS_OUT[way](model, tmp_path / "file")
    assert not list(tmp_path.iterdir())
    np.testing.assert_array_equal(predict(model), expected)


@pytest.mark.parametrize("way", ["save", "save_weights", "save_geolora"])
def test_an_older_file_stays_whole(tmp_path, way):
    model = moved()
    WAYS_OUT[way](model, tmp_path / "file")
    (file,) = tmp_path.iterdir()
    before = file.read_bytes()
    spoil(model.get_layer("head").adapter)
    with pytest.raises(ValueError, match="head/adapter'.*was not written"):
        WAYS_OUT[way](model, tmp_path / "file")
    assert file.read_bytes() == before


def test_adapters_that_rest_are_looked_at_too(tmp_path):
    model = spoiled()
    model.enable_geolora(rank=1, name="other")
    with pytest.raises(ValueError, match="off by 0.*hidden/adapter'"):
        model.save(tmp_path / "model.keras")
    model.save_geolora(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="was not written"):
        model.save_geolora(tmp_path / "first.safetensors", name="default")


def test_a_model_around_and_a_layer_of_its_own_are_not_saved(tmp_path):
    whole = keras.Sequential([keras.Input((8,)), spoiled()])
    own = keras.Sequential([keras.Input((8,)), GeoLoRADense(4, rank=2)])
    spoil(own.layers[0].adapter)
    for model in (whole, own):
        with pytest.raises(ValueError, match="They were not saved"):
            model.save_weights(tmp_path / "model.weights.h5")
        with pytest.raises(ValueError, match="They were not saved"):
            model.save(tmp_path / "model.keras")


def test_the_update_is_kept_by_the_way_that_the_message_shows(tmp_path):
    model = spoiled()
    expected = predict(model)
    model.combine_geolora("mended", {"default": 1.0})
    model.delete_geolora("default")
    np.testing.assert_allclose(predict(model), expected, atol=1e-5)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(predict(loaded), predict(model))


def test_the_summary_warns():
    lines = []
    adapted().geolora_summary(print_fn=lines.append)
    assert not any("Warning" in line for line in lines)
    for style in ("text", "markdown"):
        rows = spoiled().geolora_summary(print_fn=lines.append, style=style)
        assert "Warning: factors that are off by 0." in lines[-1]
        assert "hidden/adapter'" in lines[-1] and "mended" in lines[-1]
        assert rows[0]["orthogonality_error"] > 1e-3


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_the_summary_shows_what_is_broken(value):
    model = adapted()
    adapter = model.get_layer("hidden").adapter
    for factor in adapter.factors:
        factor.assign(np.full(factor.shape, value))
    lines = []
    model.geolora_summary(print_fn=lines.append)
    assert "not finite" in lines[-1] or "off by 1 " in lines[-1]


# Where factors come from.


def mean_of_clients():
    """A model at its start, and the mean of the weights of two others."""
    model = adapted()
    clients = [moved(seed).get_weights() for seed in (1, 2)]
    return model, [np.mean(w, axis=0) for w in zip(*clients, strict=True)]


def test_a_mean_of_weights_is_refused_and_changes_nothing():
    model, mean = mean_of_clients()
    before = model.get_weights()
    layer = model.get_layer("hidden")
    adapter = layer.adapter
    of = {id(v): x for v, x in zip(model.weights, mean, strict=True)}
    for part in (model, layer, adapter):
        match = "off by .*Nothing was changed.*average_geolora"
        with pytest.raises(ValueError, match=match):
            part.set_weights([of[id(v)] for v in part.weights])
    for one, other in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(one, other)
    model.set_weights(before)
    with pytest.raises(ValueError, match="weight list of length 1"):
        model.set_weights(before[:1])


def test_files_of_factors_that_are_none_are_refused(tmp_path, monkeypatch):
    model = spoiled()
    whole = keras.Sequential([keras.Input((8,)), model])
    with monkeypatch.context() as patch:
        patch.setattr(manifold, "TOLERANCE", np.inf)  # as if there was no check
        model.save(tmp_path / "model.keras")
        model.save_weights(tmp_path / "model.weights.h5")
        model.save_geolora(tmp_path / "model.safetensors")
        whole.save_weights(tmp_path / "whole.weights.h5")
    good = adapted()
    before = ops.convert_to_numpy(good.get_layer("hidden").adapter.U)
    around = keras.Sequential([keras.Input((8,)), good])
    for load, file in (
        (keras.saving.load_model, "model.keras"),
        (good.load_weights, "model.weights.h5"),
        (good.load_geolora, "model.safetensors"),
        (plain().load_geolora, "model.safetensors"),
        (around.load_weights, "whole.weights.h5"),
    ):
        with pytest.raises(ValueError, match="off by 0.*average_geolora"):
            load(tmp_path / file)
    after = ops.convert_to_numpy(good.get_layer("hidden").adapter.U)
    np.testing.assert_array_equal(after, before)


# Means of updates.


def best(matrix, rank):
    P, sigma, Qt = np.linalg.svd(matrix, full_matrices=False)
    return (P[:, :rank] * sigma[:rank]) @ Qt[:rank]


@pytest.mark.parametrize("rank", [None, 1])
@pytest.mark.parametrize("source", ["arrays", "files"])
def test_the_mean_of_updates_is_what_it_says(tmp_path, source, rank):
    clients = [moved(seed, scale=0.5) for seed in (1, 2)]
    given = [client.get_weights() for client in clients]
    if source == "files":
        given = [tmp_path / "0.safetensors", str(tmp_path / "1.safetensors")]
        for client, path in zip(clients, given, strict=True):
            client.save_geolora(path)
    model = adapted(scale=0.5)
    assert model.average_geolora(given, weights=[1, 3], rank=rank) is model
    for name in ("hidden", "head"):
        one, other = (delta(c.get_layer(name)) for c in clients)
        layer = model.get_layer(name)
        expected = best(0.25 * one + 0.75 * other, rank or 4)
        np.testing.assert_allclose(delta(layer), expected, atol=1e-6)
        assert layer.rank <= (rank or layer.adapter.max_rank)
    for get in (
        lambda m: m.get_layer("head").bias,
        lambda m: m.get_layer("norm").gamma,
        lambda m: m.get_layer("norm").moving_variance,
    ):
        one, other = (ops.convert_to_numpy(get(c)) for c in clients)
        assert not np.array_equal(one, other)
        np.testing.assert_allclose(
            ops.convert_to_numpy(get(model)), 0.25 * one + 0.75 * other, 1e-5
        )
    model.save(tmp_path / "model.keras")


def test_rounds_of_averaging_learn():
    model = adapted()
    losses = []
    for _ in range(3):
        start, clients = model.get_weights(), []
        for part in (slice(0, 16), slice(16, 32)):
            model.set_weights(start)
            clients.append(fit(model, X[part], Y[part]).get_weights())
        model.average_geolora(clients)
        losses.append(float(np.square(predict(model) - Y).mean()))
    assert losses[2] < losses[1] < losses[0]


def test_clients_may_have_other_buffers():
    one, other = moved(1), moved(2)
    one.compact_geolora(multiple=1)
    model = adapted(max_rank=3)
    model.average_geolora([one.get_weights(), other.get_weights()])
    one, other, mean = (
        delta(m.get_layer("hidden")) for m in (one, other, model)
    )
    np.testing.assert_allclose(mean, best((one + other) / 2, 3), atol=1e-6)


def test_a_mean_of_nothing_keeps_the_least_rank():
    model = adapted(min_rank=2)
    model.average_geolora([model.get_weights()] * 2)
    assert model.get_layer("hidden").rank == 2
    assert not delta(model.get_layer("hidden")).any()


def test_what_was_made_trainable_by_hand_is_averaged():
    models = [adapted(exclude="head") for _ in range(3)]
    for size, model in enumerate(models):
        head = model.get_layer("head")
        head.trainable = True
        head.kernel.assign((2 * size + 1) * head.kernel)
    one, other, model = models
    model.average_geolora([one.get_weights(), other.get_weights()])
    np.testing.assert_allclose(
        ops.convert_to_numpy(model.get_layer("head").kernel),
        2 * ops.convert_to_numpy(one.get_layer("head").kernel),
        rtol=1e-5,
    )


def unlike(change):
    """Weights of a client, of which one entry is another."""
    weights = moved().get_weights()
    model = adapted()
    # Without the name of the model, which Keras counts up.
    paths = [v.path.partition("/")[2] for v in model.weights]
    change(weights, paths)
    return model, [model.get_weights(), weights]


@pytest.mark.parametrize(
    "key, value, match",
    [
        ("hidden/kernel", np.ones((8, 6)), "same frozen weights.*client 1"),
        ("head/bias", np.ones(2), r"\(2,\) for .*head/bias'.*client 1"),
        ("head/adapter/V", np.ones((3, 3)), "off by .*from client 1"),
        ("head/adapter/V", np.ones((3, 1)), "must fit.*client 1"),
    ],
)
def test_a_client_that_is_another_is_refused(key, value, match):
    def change(weights, paths):
        weights[paths.index(key)] = value

    model, clients = unlike(change)
    before = model.get_weights()
    with pytest.raises(ValueError, match=match):
        model.average_geolora(clients)
    for one, other in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_cannot_be_averaged_is_refused(tmp_path):
    model = adapted()
    weights = model.get_weights()
    for clients in ([], None, "file"):
        with pytest.raises(ValueError, match="clients="):
            model.average_geolora(clients)
    with pytest.raises(ValueError, match="Received: 2 arrays as client 0"):
        model.average_geolora([weights[:2]])
    with pytest.raises(ValueError, match="Received: 3 .*as client 1"):
        model.average_geolora([weights, 3])
    for wrong in ([1], [1, -1], [0, 0], [1, np.nan], ["a", "b"], [[1], [1]]):
        with pytest.raises(ValueError, match="Received: weights="):
            model.average_geolora([weights] * 2, weights=wrong)
    with pytest.raises(ValueError, match="rank=0"):
        model.average_geolora([weights], rank=0)
    with pytest.raises(ValueError, match="enable_geolora"):
        plain().average_geolora([weights])
    with pytest.raises(TypeError, match="model='x'"):
        keras_geolora.average_geolora("x", [weights])
    with pytest.raises(FileNotFoundError):
        model.average_geolora([tmp_path / "none.safetensors"])
    other = plain()
    other.enable_geolora(rank=2, targets="head")
    other.save_geolora(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="(?s)does not fit.*'hidden'.*Nothing"):
        model.average_geolora([tmp_path / "other.safetensors"])


@pytest.mark.parametrize("columns", [2, 9])
def test_a_sum_of_products_is_never_formed(columns):
    rng = np.random.default_rng(0)
    products = [
        [rng.normal(size=s) for s in ((8, columns), (columns, 2), (6, 2))]
        for _ in range(2)
    ]
    U, sigma, V = svd_of_sum(products)
    assert len(sigma) == 4
    for basis in (U, V):
        np.testing.assert_allclose(basis.T @ basis, np.eye(4), atol=1e-12)
    total = sum(A @ C @ B.T for A, C, B in products)
    np.testing.assert_allclose((U * sigma) @ V.T, total, atol=1e-12)
    assert len(svd_of_sum(products, rank=3)[1]) == 3
    zero = [(A, 0 * C, B) for A, C, B in products]
    assert len(svd_of_sum(zero)[1]) == 1
    assert len(svd_of_sum(zero, min_rank=3)[1]) == 3
