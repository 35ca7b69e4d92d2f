"""Parts of a model on several devices, and its adapters beside them."""

import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import distribution

import keras_geolora
from keras_geolora import GeoLoRA, GeoLoRADense
from keras_geolora.distribution.layouts import stacked_layout
from keras_geolora.layers.tree import adapted_layers

DEVICES = 8
LIMIT = 240  # seconds
ON_JAX = keras.backend.backend() == "jax"
# The tests run in a process of their own, where JAX sees eight devices.
HERE = ON_JAX and distribution.get_device_count("cpu") == DEVICES
on_devices = pytest.mark.skipif(
    not HERE, reason="runs on JAX, in a process with eight devices"
)
RNG = np.random.default_rng(0)


@pytest.mark.skipif(not ON_JAX, reason="only JAX has `ModelParallel`")
@pytest.mark.skipif(HERE, reason="is what runs this")
def test_parts_on_eight_devices():
    flag = f"--xla_force_host_platform_device_count={DEVICES}"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            __file__,
        ],
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "PJRT_NPROC": str(4 * DEVICES),
            "OPENBLAS_NUM_THREADS": "1",
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flag}",
            "PYTHONPATH": str(pathlib.Path(__file__).parents[2]),
        },
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stdout[-6000:]


@pytest.fixture(autouse=True)
def nothing_is_left_spread():
    yield
    assert distribution.distribution() is None


def spread(layouts):
    """Returns a distribution over eight devices, four for a model."""
    mesh = distribution.DeviceMesh((2, 4), ["batch", "model"])
    layout_map = distribution.LayoutMap(mesh)
    layout_map.update(layouts)
    return distribution.ModelParallel(layout_map=layout_map)


def axes(variable):
    """Returns how the value of a variable is really spread."""
    spec = tuple(variable.value.sharding.spec)
    return spec + (None,) * (len(variable.shape) - len(spec))


def factor_axes(layer):
    return {role: axes(getattr(layer.adapter, role)) for role in "USV"}


def one_layer(layer, shape, dtype="float32"):
    return keras.Sequential(
        [keras.Input(shape, dtype=dtype), layer], name="net"
    )


LAYERS = keras.layers
MODEL, WHOLE = ("model", None), (None, None)
# Layer, shape of inputs, layout of the kernel, layouts of U and V.
SPREAD = {
    "columns": (LAYERS.Dense(16), (8,), (None, "model"), WHOLE, MODEL),
    "rows": (LAYERS.Dense(16), (8,), ("model", None), MODEL, WHOLE),
    "rows, by less": (LAYERS.Dense(16), (8,), ("model",), MODEL, WHOLE),
    "batch": (
        LAYERS.Dense(16),
        (8,),
        ("batch", "model"),
        ("batch", None),
        MODEL,
    ),
    "nothing": (LAYERS.Dense(16), (8,), (None, None), WHOLE, WHOLE),
    "heads": (
        LAYERS.EinsumDense("abc,cde->abde", (None, 4, 6)),
        (3, 8),
        (None, "model", None),
        WHOLE,
        MODEL,
    ),
    "inside of heads": (
        LAYERS.EinsumDense("abc,cde->abde", (None, 3, 4)),
        (3, 8),
        (None, None, "model"),
        WHOLE,
        WHOLE,
    ),
    "from heads": (
        LAYERS.EinsumDense("abcd,cde->abe", (None, 8)),
        (3, 4, 6),
        ("model", None, None),
        MODEL,
        WHOLE,
    ),
    "turned": (
        LAYERS.EinsumDense("abc,dc->abd", (None, 12)),
        (3, 8),
        ("model", None),
        WHOLE,
        MODEL,
    ),
    "words": (LAYERS.Embedding(16, 8), (3,), ("model", None), MODEL, WHOLE),
    "features": (LAYERS.Embedding(16, 8), (3,), (None, "model"), WHOLE, MODEL),
    "channels": (
        LAYERS.Conv2D(8, 3),
        (5, 5, 4),
        (None, None, None, "model"),
        WHOLE,
        MODEL,
    ),
    "inputs": (
        LAYERS.Conv2D(8, 3),
        (5, 5, 4),
        (None, None, "model", None),
        WHOLE,
        WHOLE,
    ),
    "pixels": (
        LAYERS.Conv2D(8, 1),
        (5, 5, 4),
        (None, None, "model", None),
        MODEL,
        WHOLE,
    ),
}


@on_devices
@pytest.mark.parametrize("case", SPREAD)
def test_factors_are_spread_as_their_kernel(case):
    layer, shape, layout, U, V = SPREAD[case]
    config = {**layer.get_config(), "name": "layer"}
    words = isinstance(layer, LAYERS.Embedding)
    x = (
        RNG.integers(0, 16, (4, *shape))
        if words
        else RNG.normal(size=(4, *shape))
    )

    def adapted():
        layer = type(SPREAD[case][0]).from_config(config)
        model = one_layer(layer, shape, "int32" if words else "float32")
        model.enable_geolora(rank=2, max_rank=3, targets="all", seed=0)
        return model

    # A key that somebody wrote who did not think of adapters.
    key = "(?!.*(bias|output)).*layer.*"
    with spread({key: layout}).scope():
        model = adapted()
        assert factor_axes(model.layers[-1]) == {"U": U, "S": WHOLE, "V": V}
        assert axes(model.layers[-1].kernels()[0])[: len(layout)] == layout
        model.layers[-1].adapter.S.assign(np.diag([2.0, 1.0, 0.0]))
        outputs = np.array(model(x))
    alone = adapted()
    alone.set_weights(model.get_weights())
    np.testing.assert_allclose(
        outputs, np.array(alone(x)), rtol=1e-4, atol=1e-4
    )


def pretrained():
    dense = keras.layers.Dense
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((12,)),
            dense(32, "tanh", name="first"),
            dense(32, "tanh", name="second"),
            dense(32, "tanh", name="third"),
            dense(4, name="logits"),
        ],
        name="net",
    )


GREEDY = {
    "(?!.*(bias|output)).*(first|third).*": (None, "model"),
    "(?!.*(bias|output)).*(second|logits).*": ("model", None),
}


@on_devices
@pytest.mark.parametrize("key", ["net/first/adapter/V", ".*/adapter/[USV]"])
def test_a_key_for_adapters_comes_first(key):
    others = {} if key.startswith(".") else GREEDY
    with spread({**others, key: (None, None)}).scope():
        model = pretrained()
        model.enable_geolora(rank=2, targets="first")
        assert factor_axes(model.layers[0])["V"] == WHOLE


@on_devices
def test_layouts_may_be_asked_for_and_changed():
    parts = spread(GREEDY)
    with parts.scope():
        model = pretrained()
        first = model.layers[0]
        layouts = keras_geolora.adapter_layouts(first)
        assert type(first) is keras.layers.Dense
        assert {path: x.axes for path, x in layouts.items()} == {
            "net/first/adapter/U": WHOLE,
            "net/first/adapter/S": WHOLE,
            "net/first/adapter/V": MODEL,
            "net/first/adapter/P": WHOLE,
            "net/first/adapter/Q": MODEL,
        }
        (path,) = keras_geolora.adapter_layouts(first, "other").keys() - {
            "net/first/adapter_other/S",
            "net/first/adapter_other/V",
            "net/first/adapter_other/P",
            "net/first/adapter_other/Q",
        }
        assert path == "net/first/adapter_other/U"
        model.enable_geolora(rank=2, targets="first")
        assert keras_geolora.adapter_layouts(first).keys() == layouts.keys()


@on_devices
def test_keys_that_hinder_each_other_are_refused():
    with spread({**GREEDY, ".*/adapter/U": (None, None)}).scope():
        model = pretrained()
        with pytest.raises(ValueError, match=r"\['net/first/adapter/U'\] = "):
            model.enable_geolora(rank=2, targets="first")


def test_layouts_without_parts_are_refused():
    layer = one_layer(keras.layers.Dense(4), (8,)).layers[0]
    with pytest.raises(ValueError, match="distribution=None"):
        keras_geolora.adapter_layouts(layer)


@on_devices
def test_layouts_of_what_has_no_adapter_are_refused():
    with spread({}).scope():
        with pytest.raises(ValueError, match="no adapter for Flatten"):
            keras_geolora.adapter_layouts(keras.layers.Flatten())


def rows():
    x = RNG.normal(size=(160, 12)).astype("float32")
    return x, np.tanh(x @ RNG.normal(size=(12, 4))).astype("float32")


def trainable(inner="Adam", **options):
    model = pretrained()
    model.enable_geolora(rank=2, max_rank=6, modules_to_save="logits", seed=0)
    inner = getattr(keras.optimizers, inner)(1e-2)
    model.compile(GeoLoRA(inner, **options), loss="mse")
    return model


@on_devices
def test_the_state_is_spread_as_the_factors():
    # Somebody's keys for the state of an optimizer, or by accident.
    keys = {"(adam|geo).*": ("model",), ".*adapters.*": ("batch",)}
    with spread(GREEDY).scope():
        adam = keras.optimizers.Adam()
    with spread({**GREEDY, **keys}).scope():
        model = pretrained()
        model.enable_geolora(
            rank=2, max_rank=6, targets=["first", "second", "third"]
        )
        model.compile(GeoLoRA(adam), loss="mse")
        model.optimizer.build(model.trainable_variables)
    groups = model.optimizer.adapter_groups
    # The rows of the first, and both sides of the others, are spread.
    first, others = groups
    assert [a.output_dim for a in others.adapters] == [32, 32]
    for group, spread_K in ((first, None), (others, "model")):
        for store in (group.unknowns, *group.state()):
            K, S, L = (variables[0] for variables in store.variables)
            assert axes(K) == (None, spread_K, None)
            assert axes(S) == (None, None, None)
            assert axes(L) == (None, "model", None)
    own = [v for v in model.optimizer.variables if len(v.shape) < 2]
    assert len(own) > 6
    kinds = {axes(v) for v in own if "bias" not in v.path}
    assert kinds == {(), (None,)}


class Experts(keras.layers.Layer):
    """A mixture as KerasHub writes it: every expert sees every row."""

    def build(self, shape):
        self.maps = self.add_weight(name="maps", shape=(8, 12, 4))

    def call(self, x):
        return keras.ops.sum(keras.ops.einsum("ti,eio->eto", x, self.maps), 0)


def mixture(**options):
    keras.utils.set_random_seed(0)
    model = one_layer(Experts(name="experts"), (12,))
    model.enable_geolora(rank=2, max_rank=4, targets="experts", seed=0)
    (layer,) = adapted_layers(model).values()
    model.compile(GeoLoRA(keras.optimizers.Adam(1e-2), **options), loss="mse")
    return model, layer


# Layout of the experts, and those of their U, S and V.
SPREAD_EXPERTS = {
    "experts": (("model", None, None), *[("model", None, None)] * 3),
    "experts, by less": (("model",), *[("model", None, None)] * 3),
    "rows": ((None, "model", None), (None, "model", None), *[(None,) * 3] * 2),
    "columns": (
        (None, None, "model"),
        *[(None,) * 3] * 2,
        (None, "model", None),
    ),
    "both": (
        ("batch", None, "model"),
        *[("batch", None, None)] * 2,
        ("batch", "model", None),
    ),
    "nothing": ((None,) * 3, *[(None,) * 3] * 3),
}


@on_devices
@pytest.mark.parametrize("case", SPREAD_EXPERTS)
def test_experts_are_spread_as_their_kernels_and_train(case):
    layout, *expected = SPREAD_EXPERTS[case]
    x, y = rows()
    with spread({".*experts/maps": layout}).scope():
        model, layer = mixture(cut_interval=4)
        assert list(factor_axes(layer).values()) == expected
        model.fit(x[:64], y[:64], 16, shuffle=False, verbose=0)
        # It trains as it was spread.
        assert list(factor_axes(layer).values()) == expected
        (group,) = model.optimizer.adapter_groups
        K, S, L = (v[0] for v in group.unknowns.variables)
        assert [axes(v) for v in (K, S, L)] == expected
        delta = np.array(layer.delta())
    model, layer = mixture(cut_interval=4)
    model.fit(x[:64], y[:64], 16, shuffle=False, verbose=0)
    alone = np.array(layer.delta())
    assert np.linalg.norm(alone) > 1e-5
    assert np.linalg.norm(alone - delta) <= 1e-3 * np.linalg.norm(alone)


def test_a_stack_is_spread_along_itself_only_if_all_its_parts_are():
    class Layout:
        def __init__(self, *axes):
            self.axes, self.device_mesh = axes, None

    def stacked(*layouts):
        banks = [len(layout.axes) == 3 for layout in layouts]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                distribution, "TensorLayout", lambda axes, mesh: tuple(axes)
            )
            return stacked_layout(list(layouts), banks)

    bank, other = Layout("model", "batch", None), Layout("batch", None)
    assert stacked(bank, bank) == ("model", "batch", None)
    assert stacked(bank, other) == (None, "batch", None)
    assert stacked(bank, Layout(None, None, None)) == (None, "batch", None)
    assert stacked(other, other) == (None, "batch", None)
    assert stacked(bank, Layout("model", "model", None)) == (
        "model",
        "batch",
        None,
    )


@on_devices
@pytest.mark.parametrize("inner", ["Adam", "Adafactor", "Muon"])
def test_training_in_parts_is_training(inner):
    x, y = rows()

    def trained():
        model = trainable(inner, cut_interval=4)
        model.fit(x, y, 16, shuffle=False, verbose=0)
        deltas = [layer.delta() for layer in model.layers[:3]]
        bounds = [
            np.array(group.max_change)
            for group in model.optimizer.adapter_groups
            if group.max_change is not None
        ]
        return [np.array(d) for d in deltas], np.concatenate([*bounds, [0]])

    alone, bounds = trained()
    with spread(GREEDY).scope():
        parts, others = trained()
    assert all(np.linalg.norm(delta) > 1e-5 for delta in alone)
    for delta, other in zip(alone, parts, strict=True):
        error = np.linalg.norm(delta - other)
        assert error <= 1e-3 * np.linalg.norm(delta)
    # Norms of kernels, of which no device has all.
    np.testing.assert_allclose(sorted(others), sorted(bounds), rtol=1e-5)


@on_devices
def test_changing_ranks_are_traced_once():
    x, y = rows()
    traces = []
    with spread(GREEDY).scope():
        model = trainable(tolerance=0.3, cut_interval=2)
        step = model.train_step

        def counted(state, data):
            traces.append(1)
            return step(state, data)

        model.train_step = counted
        ranks = [2, 2, 2]
        for _ in range(2):
            model.fit(x, y, 16, verbose=0)
        shardings = [factor_axes(layer) for layer in model.layers[:3]]
    assert [layer.rank for layer in model.layers[:3]] != ranks
    assert len(traces) == 1
    assert [s["V"] for s in shardings] == [MODEL, WHOLE, MODEL]


@on_devices
@pytest.mark.parametrize("threads, warns", [("8", True), ("9", False)])
def test_too_few_threads_for_devices_are_warned_of(
    monkeypatch, recwarn, threads, warns
):
    monkeypatch.setenv("PJRT_NPROC", threads)
    with spread(GREEDY).scope():
        model = trainable()
        model.optimizer.build(model.trainable_variables)
    found = [str(warning.message) for warning in recwarn]
    assert sum("8 devices" in text for text in found) == warns


@on_devices
def test_what_is_built_late_is_spread_as_well():
    class Late(keras.Model):
        def __init__(self):
            super().__init__(name="net")
            self.first = GeoLoRADense(32, rank=3, dropout=0.1, name="first")

        def call(self, x):
            return self.first(x)

    with spread(GREEDY).scope():
        model = Late()
        model.compile(GeoLoRA("adam"), loss="mse")
        model.fit(np.ones((16, 12)), np.ones((16, 32)), verbose=0)
    assert factor_axes(model.first) == {"U": WHOLE, "S": WHOLE, "V": MODEL}


@on_devices
def test_adapters_stay_spread_all_their_life(tmp_path):
    x, y = rows()
    with spread(GREEDY).scope():
        model = trainable(tolerance=0.3, cut_interval=2)
        model.fit(x, y, 16, verbose=0)
        first = model.layers[0]
        kernel = axes(first.kernel)
        outputs = model.predict(x, verbose=0)
        model.save(tmp_path / "model.keras")
        model.save_geolora(tmp_path / "adapter.safetensors")

        def check(model):
            assert factor_axes(model.layers[0])["V"] == MODEL
            assert factor_axes(model.layers[1])["U"] == MODEL
            found = model.predict(x, verbose=0)
            np.testing.assert_allclose(found, outputs, atol=1e-5)

        loaded = keras.saving.load_model(tmp_path / "model.keras")
        check(loaded)
        state = zip(
            loaded.optimizer.variables, model.optimizer.variables, strict=True
        )
        for one, other in state:
            assert axes(one) == axes(other), other.path
        other = pretrained()
        other.load_geolora(tmp_path / "adapter.safetensors")
        check(other)

        model.merge_geolora()
        assert axes(first.kernel) == kernel == (None, "model")
        found = model.predict(x, verbose=0)
        np.testing.assert_allclose(found, outputs, atol=1e-5)
        model.unmerge_geolora()
        check(model)

        loaded.compact_geolora(multiple=1)
        check(loaded)
        loaded.fit(x, y, 16, verbose=0)
        widths = {layer.adapter.max_rank for layer in loaded.layers[:3]}
        assert min(widths) < 6
    alone = keras.saving.load_model(tmp_path / "model.keras")
    found = alone.predict(x, verbose=0)
    np.testing.assert_allclose(found, outputs, atol=1e-5)
