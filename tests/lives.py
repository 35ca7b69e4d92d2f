"""Random lives of small models: changed, saved and trained in any order.

    KERAS_BACKEND=jax python tests/lives.py --lives 200
    KERAS_BACKEND=jax python tests/lives.py --lives 200 --eager
    KERAS_BACKEND=jax python tests/lives.py --kind conv --seed 17 --lives 1

With `--eager` nothing is compiled, which takes most of the time.

After every step of a life it is checked what always holds: predictions are as
promised, factors are on their manifold, the optimizer fits or there is none,
and what is refused changes nothing. What is saved loads, and trains on as the
original does.
"""

import argparse
import contextlib
import pathlib
import pickle
import sys
import tempfile
import time
import traceback
import warnings
import zipfile

import keras
import numpy as np
from keras import ops

import keras_geolora  # noqa: F401
from keras_geolora import GeoLoRA
from keras_geolora.geometry.manifold import distance
from keras_geolora.layers.factor import by_matrix, factor_of
from keras_geolora.layers.tree import layers_with_adapters
from keras_geolora.model.compiled_state import fits

ROWS = 8
LENGTH = 5
WORDS = 12


def dense():
    x = inputs = keras.Input((6,))
    x = keras.layers.Dense(8, activation="tanh", name="one")(x)
    x = keras.layers.BatchNormalization(name="norm")(x)
    x = keras.layers.Dropout(0.2, seed=3)(x)
    return keras.Model(inputs, keras.layers.Dense(3, name="head")(x))


def einsum():
    x = inputs = keras.Input((LENGTH, 6))
    mix = keras.layers.EinsumDense
    x = mix("abc,cde->abde", (LENGTH, 2, 4), bias_axes="de", name="one")(x)
    x = mix("abde,def->abf", (LENGTH, 6), activation="tanh", name="two")(x)
    return keras.Model(inputs, keras.layers.Dense(3, name="head")(x))


def attention():
    ids = keras.Input((LENGTH,), dtype="int32")
    table = keras.layers.ReversibleEmbedding(WORDS, 8, name="one")
    x = table(ids)
    x = keras.layers.MultiHeadAttention(2, 4, name="two")(x, x)
    x = keras.layers.Dense(8, activation="tanh", name="head")(x)
    return keras.Model(ids, table(x, reverse=True))


def conv():
    x = inputs = keras.Input((6, 6, 2))
    x = keras.layers.Conv2D(4, 3, activation="tanh", name="one")(x)
    x = keras.layers.Conv2D(4, 2, strides=2, name="two")(x)
    x = keras.layers.Flatten()(x)
    return keras.Model(inputs, keras.layers.Dense(3, name="head")(x))


@keras.saving.register_keras_serializable("lives")
class Mixture(keras.layers.Layer):
    """Weights of its own: experts, a bias for each, and a matrix."""

    def build(self, shape):
        self.maps = self.add_weight(name="expert_maps", shape=(3, 6, 8))
        self.bias = self.add_weight(name="bias", shape=(3, 8))
        self.mix = self.add_weight(name="mix", shape=(8, 8))

    def call(self, x):
        chosen = ops.one_hot(ops.argmax(x, axis=-1) % 3, 3)
        y = ops.einsum("be,bi,eio->bo", chosen, x, self.maps)
        y = ops.tanh(y + ops.matmul(chosen, self.bias))
        return y + ops.matmul(y, self.mix)


def mixture():
    x = inputs = keras.Input((6,))
    x = Mixture(name="one")(x)
    x = keras.layers.LayerNormalization(name="norm")(x)
    return keras.Model(inputs, keras.layers.Dense(3, name="head")(x))


KINDS = {f.__name__: f for f in (dense, einsum, attention, conv, mixture)}


def pretrained(kind):
    """A model of a kind, the same every time."""
    keras.utils.set_random_seed(1)
    model = KINDS[kind]()
    rng = np.random.default_rng(2)
    for variable in model.trainable_variables:
        size = 0.5 / np.sqrt(variable.shape[0])
        variable.assign(size * rng.normal(size=variable.shape))
    return model


def data(model):
    rng = np.random.default_rng(0)
    shape = (ROWS, *model.input_shape[1:])
    if "int" in model.inputs[0].dtype:
        x = rng.integers(WORDS, size=shape).astype("int32")
    else:
        x = rng.normal(size=shape).astype("float32")
    y = rng.normal(size=(ROWS, *model.output_shape[1:])).astype("float32")
    return x, y


def as_array(value):
    return np.array(ops.convert_to_numpy(value))


def state(model):
    """All that a step might change."""
    optimizer = getattr(model, "optimizer", None)
    variables = list(model.variables)
    if optimizer is not None and optimizer.built:
        variables += optimizer.variables
    return {
        "values": [as_array(v) for v in variables],
        "trainable": [v.trainable for v in model.variables],
        "class": type(model),
        "layers": [type(layer) for layer in model.layers],
        "compiled": model.compiled,
        "adapters": model.geolora_adapters(),
    }


def assert_same_state(model, before):
    after = state(model)
    values, others = after.pop("values"), dict(before)
    for one, other in zip(values, others.pop("values"), strict=True):
        np.testing.assert_array_equal(one, other)
    assert after == others


class Life:
    """One model and what is known about it.

    Attributes:
        base: What the model predicts without adapters.
        outputs: Dict from the names of adapters to what they predict.
        merged: Whether the adapters are merged, and can come back.
        steps: List of the names of the steps that were taken.
    """

    def __init__(self, kind, seed, folder, eager=False):
        self.eager = eager
        self.kind = kind
        self.rng = np.random.default_rng([seed, list(KINDS).index(kind)])
        self.folder = pathlib.Path(folder)
        self.model = pretrained(kind)
        self.x, self.y = data(self.model)
        self.is_pretrained = True
        self.base = self.predict()
        self.outputs = {}
        self.merged = None
        self.count = 0
        self.steps = []

    def predict(self, model=None):
        """What a model says, operation by operation.

        What it says as a compiled function must be the same up to rounding:
        compilers fuse the same operations in one way or another.
        """
        model = model or self.model
        outputs = as_array(model(self.x, training=False))
        if self.eager:
            return outputs
        compiled = model.predict(self.x, verbose=0)
        np.testing.assert_allclose(compiled, outputs, rtol=1e-5, atol=1e-6)
        return outputs

    @property
    def names(self):
        return self.model.geolora_adapters()

    # What may happen.

    def step(self):
        """Takes one random step, and checks what always holds."""
        ways = [name for name in STEPS if STEPS[name](self)]
        if "train" in ways:  # what is trained has more to lose
            ways += 3 * ["train"]
        name = str(self.rng.choice(ways))
        self.steps.append(name)
        getattr(self, name)()
        self.check()

    def enable(self):
        name = f"a{self.count}"
        self.count += 1
        options = {"rank": int(self.rng.integers(1, 4)), "name": name}
        if self.rng.random() < 0.5:
            options["modules_to_save"] = "head"
            options["exclude"] = "head"
        # A mixture has biases beside weights, which `refuse` tries.
        if self.rng.random() < 0.3 and self.kind != "mixture":
            options["train_bias"] = True
        options["targets"] = "all" if self.rng.random() < 0.7 else "one"
        if "modules_to_save" in options and self.rng.random() < 0.5:
            options["modules_to_save"] = ["head"] + (
                ["norm"] if self.kind == "dense" else []
            )
        self.model.enable_geolora(seed=int(self.rng.integers(99)), **options)
        self.merged = None
        self.outputs[name] = self.base
        assert self.names[0] == name

    def train(self):
        if not self.model.compiled or self.rng.random() < 0.3:
            inner = self.rng.choice(["adam", "sgd", "rmsprop"])
            self.model.compile(
                GeoLoRA(str(inner), tolerance=0.2, cut_interval=3),
                loss="mse",
                run_eagerly=bool(self.rng.random() < 0.5) or self.eager,
            )
        self.fit(self.model)
        self.outputs[self.names[0]] = self.predict()

    def fit(self, model):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*ha(s|ve) not moved")
            warnings.filterwarnings("ignore", ".*has moved in the first")
            warnings.filterwarnings("ignore", "The last layer, 'head', is fro")
            model.fit(
                self.x,
                self.y,
                batch_size=ROWS // 2,
                epochs=2,
                shuffle=False,
                verbose=0,
            )

    def train_plain(self):
        self.model.compile("sgd", loss="mse", run_eagerly=self.eager)
        self.fit(self.model)
        self.base, self.merged = self.predict(), None
        self.is_pretrained = False

    def activate(self):
        name = str(self.rng.choice(self.names))
        self.model.activate_geolora(name)
        np.testing.assert_array_equal(self.predict(), self.outputs[name])

    def delete(self):
        before = self.predict()
        name = str(self.rng.choice(self.names[1:]))
        self.model.delete_geolora(name)
        del self.outputs[name]
        np.testing.assert_array_equal(self.predict(), before)

    def combine(self):
        name = f"a{self.count}"
        self.count += 1
        weights = {n: float(self.rng.normal()) for n in self.names[:2]}
        updates = [
            (layer, layer.adapters_by_name(), sum_of(layer, weights))
            for layer in layers_with_adapters(self.model).values()
            if set(weights) & set(layer.adapter_names)
        ]
        self.model.combine_geolora(name, weights)
        for layer, _, expected in updates:
            found = as_array(layer.adapters_by_name()[name].delta())
            np.testing.assert_allclose(found, expected, atol=1e-5)
        self.outputs[name] = self.predict()

    def merge(self):
        before = self.predict()
        reversible = bool(self.rng.random() < 0.7)
        self.model.merge_geolora(reversible=reversible)
        after = self.predict()
        np.testing.assert_allclose(after, before, atol=1e-4)
        self.merged = (self.base, self.outputs, before) if reversible else None
        self.base, self.outputs = after, {}
        self.is_pretrained = False

    def unmerge(self):
        self.base, self.outputs, before = self.merged
        self.merged = None
        self.model.unmerge_geolora()
        np.testing.assert_array_equal(self.predict(), before)

    def remove(self):
        self.model.remove_geolora()
        np.testing.assert_array_equal(self.predict(), self.base)
        self.outputs = {}

    def disable(self):
        before = self.predict()
        with self.model.geolora_disabled():
            np.testing.assert_array_equal(self.predict(), self.base)
        np.testing.assert_array_equal(self.predict(), before)

    def disable_and_fail(self):
        before = state(self.model)
        with contextlib.suppress(KeyError), self.model.geolora_disabled():
            raise KeyError
        assert_same_state(self.model, before)

    def compact(self):
        before = self.predict()
        self.model.compact_geolora(multiple=int(self.rng.integers(1, 4)))
        # Products with fewer columns of zeros may add in another order.
        np.testing.assert_allclose(self.predict(), before, rtol=1e-5, atol=1e-6)
        active = self.names[0]
        for name in self.names:
            self.model.activate_geolora(name)
            self.outputs[name] = self.predict()
        self.model.activate_geolora(active)

    def rest(self):
        before = state(self.model)
        self.model.trainable = False
        assert not self.model.trainable_variables
        self.model.trainable = True
        assert_same_state(self.model, before)

    def save(self):
        """The whole model by one of two ways, which trains on as it does."""
        if self.rng.random() < 0.5:
            path = self.folder / "life.keras"
            self.model.save(path)
            loaded = keras.saving.load_model(path)
        else:
            loaded = pickle.loads(pickle.dumps(self.model))
        self.check_copy(loaded)
        self.model = loaded
        self.merged = None

    def check_copy(self, loaded):
        assert loaded.compiled == self.model.compiled
        np.testing.assert_array_equal(
            self.predict(loaded), self.predict(self.model)
        )
        assert [v.trainable for v in loaded.variables] == [
            v.trainable for v in self.model.variables
        ]
        # Of a plain model Keras does not save the states of dropout.
        if self.names and self.model.compiled:
            for model in (self.model, loaded):
                self.fit(model)
            for one, other in zip(
                loaded.weights, self.model.weights, strict=True
            ):
                np.testing.assert_array_equal(as_array(one), as_array(other))
            self.outputs[self.names[0]] = self.predict()

    def save_weights(self):
        """Weights that come back after they were changed."""
        path, before = self.folder / "life.weights.h5", self.predict()
        self.model.save_weights(path)
        kept = state(self.model)
        for variable in self.model.trainable_variables:
            factor = factor_of(variable)
            if factor is None or factor.role == "S":
                variable.assign(2 * as_array(variable))
        self.model.load_weights(path)
        assert_same_state(self.model, kept)
        np.testing.assert_array_equal(self.predict(), before)

    def save_adapter(self):
        """An adapter alone, in the pretrained model."""
        path = self.folder / "life.safetensors"
        self.model.save_geolora(path)
        other = pretrained(self.kind)
        other.load_geolora(path)
        np.testing.assert_allclose(
            self.predict(other), self.predict(), atol=1e-5
        )

    def refuse(self):
        """What is wrong now changes nothing."""
        model, name = self.model, (self.names or ["none"])[0]
        wrong = [
            lambda: model.activate_geolora("unknown"),
            lambda: model.delete_geolora(name),
            lambda: model.enable_geolora(rank=0, name="b"),
            lambda: model.enable_geolora(rank=1, targets="x", name="b"),
            lambda: model.combine_geolora("sum", {"unknown": 1.0}),
            lambda: model.load_geolora(__file__),
        ]
        if self.kind == "mixture":
            bias = {"targets": "all", "train_bias": True}
            wrong.append(lambda: model.enable_geolora(name="b", **bias))
        if self.names:
            wrong.append(lambda: model.enable_geolora(name=name))
            wrong.append(lambda: model.set_weights(model.get_weights()[:-1]))
            wrong.append(lambda: model.quantize("int8"))
            wrong.append(lambda: model.save(self.folder / "life.h5"))
        else:
            wrong.append(lambda: model.merge_geolora())
            wrong.append(lambda: model.save_geolora(self.folder / "no"))
        before = state(model)
        try:
            self.rng.choice(wrong)()
        except ValueError:
            assert_same_state(model, before)
        else:
            raise AssertionError("was not refused")

    # What always holds.

    def check(self):
        if self.names:
            np.testing.assert_array_equal(
                self.predict(), self.outputs[self.names[0]]
            )
        else:
            np.testing.assert_array_equal(self.predict(), self.base)
            assert not type(self.model).__module__.startswith("keras_geolora")
            content = self.everything_in_a_file()
            assert b"geolora" not in content.lower()
        assert fits(self.model)
        for layer in layers_with_adapters(self.model).values():
            for adapter in layer.adapters_by_name().values():
                check_manifold(adapter)

    def everything_in_a_file(self):
        self.model.save(self.folder / "trace.keras")
        with zipfile.ZipFile(self.folder / "trace.keras") as content:
            return b"".join(map(content.read, content.namelist()))


def sum_of(layer, weights):
    """The weighted sum of the updates of a layer."""
    return sum(
        weight * as_array(layer.adapters_by_name()[name].delta())
        for name, weight in weights.items()
        if name in layer.adapter_names
    )


def check_manifold(adapter):
    arrays = adapter.factors_as_arrays()
    for factors in by_matrix("adapter", arrays).values():
        assert distance(*factors) < 1e-5
    assert adapter.min_rank <= adapter.ranks.min()
    assert adapter.ranks.max() <= adapter.max_rank


# When what may happen: each step and when it makes sense.
STEPS = {
    "enable": lambda life: len(life.names) < 3,
    "train": lambda life: life.names,
    "train_plain": lambda life: not life.names and life.steps,
    "activate": lambda life: life.names,
    "delete": lambda life: len(life.names) > 1,
    "combine": lambda life: 0 < len(life.names) < 3,
    "merge": lambda life: life.names,
    "unmerge": lambda life: life.merged is not None and not life.names,
    "remove": lambda life: life.names,
    "disable": lambda life: life.names,
    "disable_and_fail": lambda life: life.names,
    "compact": lambda life: life.names,
    "rest": lambda life: life.names,
    "save": lambda life: True,
    "save_weights": lambda life: life.names,
    "save_adapter": lambda life: life.names and life.is_pretrained,
    "refuse": lambda life: True,
}


def live(kind, seed, steps, eager=False):
    """Leads one life.

    Raises:
        AssertionError: With the steps that led to what is wrong.
    """
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        life = Life(kind, seed, folder, eager)
        try:
            for _ in range(steps):
                life.step()
        except Exception as error:
            raise AssertionError(
                f"{kind}, seed {seed}: {' -> '.join(life.steps)}: {error}"
            ) from error


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lives", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--kind", choices=KINDS)
    parser.add_argument("--eager", action="store_true")
    args = parser.parse_args()
    failed, begin = 0, time.time()
    for seed in range(args.seed, args.seed + args.lives):
        kind = args.kind or list(KINDS)[seed % len(KINDS)]
        try:
            live(kind, seed, args.steps, args.eager)
        except AssertionError as error:
            failed += 1
            print(f"FAILED {str(error)[:600]}", flush=True)
            if args.lives == 1:
                traceback.print_exc()
        if seed % 20 == 0:
            keras.utils.clear_session()
    print(
        f"{keras.backend.backend()}: {args.lives} lives of {args.steps} steps, "
        f"{failed} failed, {time.time() - begin:.0f} s"
    )
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
