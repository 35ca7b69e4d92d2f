"""A run that is interrupted and resumed equals one that was not."""

import copy
import functools
import importlib.util
import os
import pathlib
import pickle
import shutil
import subprocess
import sys
from typing import NamedTuple

import families
import keras
import keras_hub
import numpy as np
import pytest
from inner_optimizers import INNER
from keras import ops
from moving import move

from keras_geolora import GeoLoRA, GeoLoRADense

RNG = np.random.default_rng(0)
X = RNG.normal(size=(32, 8)).astype("float32")
Y = np.tanh(X @ RNG.normal(size=(8, 8))).astype("float32")
BACKENDS = "tensorflow", "jax", "torch"
OTHERS = [name for name in BACKENDS if name != keras.backend.backend()]


def plain(outputs=8):
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(8, activation="relu"),
            # On torch, dropout without a seed draws from a generator of the
            # process, which no file of a model can hold.
            keras.layers.Dropout(0.2, seed=1),
            keras.layers.Dense(8),
            keras.layers.Dense(outputs),
        ]
    )


def adapted(inner="adamw"):
    # Layers of two shapes take twice the time; one inner optimizer has them.
    model = plain(3 if inner == "momentum" else 8)
    model.enable_geolora(rank=2, dropout=0.1, train_bias=True)
    optimizer = GeoLoRA(INNER[inner](), cut_interval=3)
    if inner == "momentum":
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    model.compile(optimizer=optimizer, loss="mse")
    return model


def fit(model, epochs, start=0, **options):
    return model.fit(
        X,
        Y[:, : model.output_shape[-1]],
        8,
        epochs,
        verbose=0,
        shuffle=False,
        initial_epoch=start,
        **options,
    )


def state(model):
    variables = [*model.weights, *model.optimizer.variables]
    return [np.array(ops.convert_to_numpy(v)) for v in variables]


def ranks(model):
    return [layer.rank for layer in model.layers if hasattr(layer, "rank")]


def assert_same(these, those):
    for one, other in zip(these, those, strict=True):
        np.testing.assert_array_equal(one, other)


class Keep(keras.callbacks.Callback):
    """Keeps a run as it is after each epoch: its state, and a pickle of it."""

    def __init__(self, folder):
        super().__init__()
        self.folder, self.states = folder, {}

    def on_epoch_end(self, epoch, logs=None):
        self.states[epoch + 1] = state(self.model)
        path = self.folder / f"{epoch + 1}.pickle"
        path.write_bytes(pickle.dumps(self.model))


class Run(NamedTuple):
    """A run of four epochs that nothing has interrupted, not to be changed."""

    model: keras.Model
    states: dict  # from the number of an epoch to the state after it
    folder: pathlib.Path  # what was saved after each epoch


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    @functools.cache
    def run_of(inner):
        folder = tmp_path_factory.mktemp(inner)
        model, keep = adapted(inner), Keep(folder)
        save = keras.callbacks.ModelCheckpoint
        weights = save(folder / "{epoch}.weights.h5", save_weights_only=True)
        whole = save(folder / "{epoch}.keras")
        fit(model, 4, callbacks=[whole, weights, keep])
        return Run(model, keep.states, folder)

    return run_of


@pytest.fixture
def run(run_of):
    return run_of("adamw")


def from_weights(folder, epoch, inner="adamw"):
    model = adapted(inner)
    model.load_weights(folder / f"{epoch}.weights.h5")
    return model


def from_keras_file(folder, epoch, inner="adamw"):
    return keras.saving.load_model(folder / f"{epoch}.keras")


def from_pickle(folder, epoch, inner="adamw"):
    return pickle.loads((folder / f"{epoch}.pickle").read_bytes())


ROUTES = from_weights, from_keras_file, from_pickle


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("inner", INNER)
def test_a_saved_run_goes_on_as_if_nothing_had_happened(run_of, inner, route):
    run = run_of(inner)
    resumed = route(run.folder, 2, inner)
    assert_same(state(resumed), run.states[2])
    fit(resumed, 4, start=2)
    assert_same(state(resumed), run.states[4])
    assert len(ranks(resumed)) == 3
    assert ranks(resumed) == ranks(run.model)


@pytest.mark.parametrize("route", ROUTES)
def test_what_is_saved_holds_every_epoch(run, route):
    for epoch in 1, 3, 4:
        resumed = route(run.folder, epoch)
        assert_same(state(resumed), run.states[epoch])


@pytest.mark.parametrize("route", [from_weights, from_keras_file])
def test_a_checkpoint_of_the_first_epoch_goes_on(run, route):
    resumed = route(run.folder, 1)
    fit(resumed, 3, start=1)
    assert_same(state(resumed), run.states[3])


def thawed_by_hand():
    model = keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(8, name="first"),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.Dense(8, name="second"),
            keras.layers.Dense(8, name="head"),
        ]
    )
    model.enable_geolora(rank=2, exclude="head", train_bias=True)
    model.get_layer("norm").trainable = True
    model.get_layer("head").trainable = True
    model.get_layer("second").bias.trainable = False
    model.compile(GeoLoRA("adam"), loss="mse")
    return model


def trainable_names(model):
    paths = [v.path.split("/") for v in model.trainable_variables]
    return ["/".join(path[-2:]) for path in paths]


@pytest.mark.filterwarnings("error:Skipping variable loading")
def test_what_was_thawed_by_hand_trains_in_the_loaded_model(tmp_path):
    model = thawed_by_hand()
    fit(model, 2)
    resumed = reload(model, tmp_path)
    trains = trainable_names(model)
    assert trainable_names(resumed) == trains
    assert {"head/kernel", "norm/gamma", "first/bias"} <= set(trains)
    assert "second/bias" not in trains
    assert_same(state(resumed), state(model))
    for run in model, resumed:
        fit(run, 3, start=2)
    assert_same(state(resumed), state(model))


@pytest.mark.filterwarnings("error:Skipping variable loading")
def test_an_adapter_frozen_by_hand_rests_in_the_loaded_model(tmp_path):
    model = adapted()
    model.layers[0].adapter.trainable = False
    model.compile(GeoLoRA("adam"), loss="mse")
    fit(model, 2)
    resumed = reload(model, tmp_path)
    assert trainable_names(resumed) == trainable_names(model)
    assert not resumed.layers[0].adapter.trainable
    for run in model, resumed:
        fit(run, 3, start=2)
    assert_same(state(resumed), state(model))


def test_a_model_that_rests_does_so_in_the_file(tmp_path):
    model = thawed_by_hand()
    trains = trainable_names(model)
    model.trainable = False
    resumed = reload(model, tmp_path)
    assert trainable_names(resumed) == [] and not resumed.trainable
    resumed.trainable = True
    assert trainable_names(resumed) == trains


def test_a_file_may_say_nothing_of_adapters_frozen_by_hand():
    model = adapted()
    config = model.get_config()
    del config["plan"]["by_hand"]["adapters"]
    loaded = type(model).from_config(config)
    assert trainable_names(loaded) == trainable_names(model)


def test_an_adapter_file_says_what_it_leaves_out(tmp_path):
    with pytest.warns(UserWarning, match="Left out: .*norm/gamma'"):
        thawed_by_hand().save_geolora(tmp_path / "adapter.safetensors")


class Interrupt(keras.callbacks.Callback):
    """Stops a run in the middle of an epoch."""

    def __init__(self, epoch, batch):
        super().__init__()
        self.at = epoch, batch
        self.epochs = []

    def on_epoch_begin(self, epoch, logs=None):
        self.epochs.append(epoch)

    def on_train_batch_end(self, batch, logs=None):
        if (self.epochs[-1], batch) == self.at:
            raise KeyboardInterrupt


def test_backup_and_restore_continues_a_run_interrupted_twice(tmp_path, run):
    def backup():
        return keras.callbacks.BackupAndRestore(tmp_path / "backup")

    begin = 0
    for epoch in 1, 3:
        interrupt = Interrupt(epoch, 2)
        with pytest.raises(KeyboardInterrupt):
            fit(adapted(), 4, callbacks=[backup(), interrupt])
        assert interrupt.epochs == list(range(begin, epoch + 1))
        begin = epoch
    resumed = adapted()
    history = fit(resumed, 4, callbacks=[backup()])
    assert history.epoch == [3]
    assert_same(state(resumed), run.states[4])


def test_early_stopping_restores_the_best_epoch(run):
    model = adapted()
    stop = keras.callbacks.EarlyStopping(
        monitor="loss", mode="max", patience=2, restore_best_weights=True
    )
    history = fit(model, 6, callbacks=[stop])
    assert history.epoch == [0, 1, 2]
    count = len(model.weights)
    assert_same(state(model)[:count], run.states[1][:count])


def test_a_deep_copy_is_a_model_of_its_own():
    model = adapted()
    fit(model, 2)
    before = state(model)
    copied = copy.deepcopy(model)
    assert_same(state(copied), before)
    fit(copied, 3, start=2)
    assert_same(state(model), before)
    fit(model, 3, start=2)
    assert_same(state(copied), state(model))


LOAD = 'keras.saving.load_model("run.keras")'
UNPICKLE = 'pickle.load(open("run.pickle", "rb"))'
FRESH = """
import sys
import keras, numpy as np
{imports}
model = {load}
data = np.load("data.npz")
prediction = model.predict(data["x"], verbose=0)
options = dict(batch_size=8, epochs=2, verbose=0, shuffle=False)
model.fit(data["x"], data["y"], **options)
np.savez(
    "fresh.npz",
    *[np.array(keras.ops.convert_to_numpy(v)) for v in model.weights],
    prediction=prediction,
)
"""


def run_fresh(run, folder, backend, imports, load=LOAD):
    """Loads a run after two epochs and trains it in a process of its own."""
    for kind in "keras", "pickle":
        shutil.copy(run.folder / f"2.{kind}", folder / f"run.{kind}")
    np.savez(folder / "data.npz", x=X, y=Y)
    root = str(pathlib.Path(__file__).parents[2])
    environment = {
        **os.environ,
        "KERAS_BACKEND": backend,
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
    }
    return subprocess.run(
        [sys.executable, "-c", FRESH.format(imports=imports, load=load)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow("takes a process of its own")
@pytest.mark.parametrize(
    "imports, load",
    [
        ("import keras_geolora", LOAD),
        ("import pickle", UNPICKLE),
    ],
    ids=["keras", "pickle"],
)
def test_a_fresh_process_continues_bit_for_bit(
    run, tmp_path, forked, imports, load
):
    backend = keras.backend.backend()
    process = run_fresh(run, tmp_path, backend, imports, load)
    assert process.returncode == 0, process.stderr
    count = len(run.model.weights)
    with np.load(tmp_path / "fresh.npz") as file:
        weights = [file[f"arr_{index}"] for index in range(count)]
        assert len(file.files) == count + 1
    assert_same(weights, run.states[4][:count])


@pytest.mark.slow("takes a process of another backend")
@pytest.mark.parametrize("backend", OTHERS)
def test_another_backend_takes_over(run, tmp_path, forked, backend):
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    process = run_fresh(run, tmp_path, backend, "import keras_geolora")
    assert process.returncode == 0, process.stderr
    arrays = np.load(tmp_path / "fresh.npz")
    model = from_keras_file(run.folder, 2)
    np.testing.assert_allclose(
        arrays["prediction"], predict(model, X), atol=1e-5
    )
    core = ops.convert_to_numpy(model.layers[0].adapter.S)
    assert not np.array_equal(arrays["arr_3"], core)


def test_without_the_library_the_error_names_the_import(run, tmp_path, forked):
    process = run_fresh(run, tmp_path, keras.backend.backend(), "")
    assert process.returncode != 0
    assert "`import keras_geolora` before loading" in process.stderr


# KerasHub.


def predict(model, inputs):
    return np.array(model.predict(inputs, verbose=0))


def reload(model, folder):
    model.save(folder / "model.keras")
    return keras.saving.load_model(folder / "model.keras")


def classifier(backbone):
    return keras_hub.models.BertTextClassifier(
        backbone, num_classes=2, preprocessor=None
    )


def test_a_backbone_is_one_again(tmp_path):
    backbone, inputs = families.small_bert()
    backbone.enable_geolora(rank=2, targets="all", seed=0)
    move(backbone)
    loaded = reload(backbone, tmp_path)
    assert isinstance(loaded, keras_hub.models.BertBackbone)
    after, before = predict(loaded, inputs), predict(backbone, inputs)
    for key in before.item() if before.shape == () else ():
        np.testing.assert_array_equal(after.item()[key], before.item()[key])
    assert loaded.geolora_adapters() == ["default"]
    loaded.merge_geolora()
    assert type(loaded) is keras_hub.models.BertBackbone


# Keras does not compile KerasHub's tasks; ours, with GeoLoRA, are compiled.
@pytest.mark.filterwarnings("ignore:`compile\\(\\)` was not called")
@pytest.mark.parametrize("part", ["backbone", "task"])
def test_a_task_is_one_again(tmp_path, part):
    backbone, inputs = families.small_bert()
    task = classifier(backbone)
    pretrained = predict(task, inputs)
    (task if part == "task" else backbone).enable_geolora(rank=2, seed=0)
    move(task if part == "task" else backbone)
    if part == "backbone":
        task.compile()  # it does not know what happened to its backbone
    loaded = reload(task, tmp_path)
    assert isinstance(loaded, keras_hub.models.BertTextClassifier)
    assert isinstance(loaded.backbone, keras_hub.models.BertBackbone)
    np.testing.assert_array_equal(
        predict(loaded, inputs), predict(task, inputs)
    )
    assert [v.shape for v in loaded.trainable_variables] == [
        v.shape for v in task.trainable_variables
    ]
    loaded.remove_geolora()
    np.testing.assert_array_equal(predict(loaded, inputs), pretrained)


def test_a_task_trains_on_where_it_was(tmp_path):
    backbone, inputs = families.small_bert()
    task = classifier(backbone)
    task.enable_geolora(rank=2, seed=0)
    labels = np.array([0, 1])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    task.compile(GeoLoRA("adam"), loss=loss)
    task.fit(inputs, labels, epochs=2, verbose=0)
    loaded = reload(task, tmp_path)
    assert_same(state(loaded), state(task))


def test_a_quantized_base_stays_quantized(tmp_path):
    backbone, inputs = families.small_bert()
    # KerasHub cannot load a task whose head is quantized.
    backbone.quantize("int8")
    task = classifier(backbone)
    task.enable_geolora(rank=2, seed=0)
    move(task)
    loaded = reload(task, tmp_path)
    np.testing.assert_array_equal(
        predict(loaded, inputs), predict(task, inputs)
    )


def test_a_bfloat16_base_keeps_its_factors(tmp_path):
    keras.config.set_dtype_policy("bfloat16")
    try:
        model = plain()
    finally:
        keras.config.set_dtype_policy("float32")
    model.enable_geolora(rank=2, seed=0, modules_to_save=model.layers[-1].name)
    move(model)
    loaded = reload(model, tmp_path)
    for one, other in zip(model.weights, loaded.weights, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(*map(ops.convert_to_numpy, (one, other)))


def test_a_preset_is_refused(tmp_path):
    backbone, _ = families.small_bert()
    backbone.enable_geolora(rank=2)
    with pytest.raises(ValueError, match="merge_geolora.*save_to_preset"):
        backbone.save_to_preset(tmp_path / "preset")
    with pytest.raises(ValueError, match="merge_geolora.*export_peft"):
        backbone.export_to_transformers(tmp_path / "preset")
    backbone.merge_geolora()
    backbone.save_to_preset(tmp_path / "preset")


# Everything that belongs to a model.


def two_adapters():
    model = plain()
    head = model.layers[-1].name
    model.enable_geolora(
        rank=2, name="a", exclude=head, modules_to_save=head, seed=0
    )
    move(model)
    model.enable_geolora(
        rank=3, name="b", exclude=head, modules_to_save=head, seed=7
    )
    move(model)
    model.layers[-1].bias.assign(np.arange(8))
    return model


def loaded_weights(model, folder):
    model.save_weights(folder / "m.weights.h5")
    other = two_adapters()
    move(other)
    other.load_weights(folder / "m.weights.h5")
    return other


@pytest.mark.parametrize("route", [reload, loaded_weights])
@pytest.mark.parametrize("active", ["a", "b"])
def test_all_adapters_and_their_heads_come_back(tmp_path, route, active):
    model = two_adapters()
    model.activate_geolora(active)
    expected = predict(model, X)
    other = route(model, tmp_path)
    assert other.geolora_adapters() == model.geolora_adapters()
    np.testing.assert_array_equal(predict(other, X), expected)
    for name in "ab":
        for one in model, other:
            one.activate_geolora(name)
        np.testing.assert_array_equal(predict(other, X), predict(model, X))
    for one in model, other:
        one.remove_geolora()
    np.testing.assert_array_equal(predict(other, X), predict(model, X))
    assert [v.trainable for v in other.weights] == [
        v.trainable for v in model.weights
    ]


def test_what_was_frozen_before_is_frozen_after(tmp_path):
    model = plain()
    model.layers[0].trainable = False
    model.enable_geolora(rank=2)
    loaded = reload(model, tmp_path)
    assert loaded.layers[0].trainable
    loaded.merge_geolora()
    assert [layer.trainable for layer in loaded.layers] == [
        False,
        *[True] * (len(model.layers) - 1),
    ]


def test_an_adapted_part_of_a_model(tmp_path):
    part = plain()
    part.enable_geolora(rank=2, seed=0)
    move(part)
    inputs = keras.Input((8,))
    model = keras.Model(inputs, keras.layers.Dense(2)(part(inputs)))
    model.compile(GeoLoRA("adam"), loss="mse")
    model.fit(X, Y[:, :2], verbose=0)
    loaded = reload(model, tmp_path)
    assert_same(state(loaded), state(model))
    assert loaded.geolora_adapters() == ["default"]
    np.testing.assert_array_equal(predict(loaded, X), predict(model, X))


def test_a_layer_with_an_adapter_of_its_own(tmp_path):
    model = keras.Sequential([keras.Input((8,)), GeoLoRADense(4, rank=2)])
    move(model)
    np.testing.assert_array_equal(
        predict(reload(model, tmp_path), X), predict(model, X)
    )


def test_a_backend_chooses_its_own_compilation(tmp_path):
    model = adapted()
    assert model.get_compile_config()["jit_compile"] == "auto"
    model.compile(GeoLoRA("adam"), loss="mse", jit_compile=False)
    assert model.get_compile_config()["jit_compile"] is False


def test_the_loss_scaling_of_a_policy_is_loaded_without_the_policy(tmp_path):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = adapted()
    finally:
        keras.config.set_dtype_policy("float32")
    fit(model, 1)
    loaded = reload(model, tmp_path)
    assert isinstance(loaded.optimizer, keras.optimizers.LossScaleOptimizer)
    assert_same(state(loaded), state(model))


@pytest.mark.parametrize("optimizer", [GeoLoRA("adam"), "adam"])
def test_a_model_that_was_compiled_before_it_was_adapted(tmp_path, optimizer):
    model = plain()
    model.compile(optimizer, loss="mse")
    model.enable_geolora(rank=2)
    loaded = reload(model, tmp_path)
    np.testing.assert_array_equal(predict(loaded, X), predict(model, X))
    assert loaded.compiled == isinstance(optimizer, GeoLoRA)


def test_weights_without_an_optimizer_load_without_a_warning(tmp_path):
    model = plain()
    model.enable_geolora(rank=2, seed=0)
    move(model)
    model.save_weights(tmp_path / "m.weights.h5")
    other = plain()
    other.enable_geolora(rank=2, seed=1)
    other.load_weights(tmp_path / "m.weights.h5")
    np.testing.assert_array_equal(predict(other, X), predict(model, X))


def test_adapters_under_their_own_names_can_be_added_up(tmp_path):
    model = two_adapters()
    model.activate_geolora("a")
    model.save_geolora(tmp_path / "a.safetensors")
    other = plain()
    head = other.layers[-1].name
    other.enable_geolora(
        rank=1, name="mine", exclude=head, modules_to_save=head
    )
    other.load_geolora(tmp_path / "a.safetensors")
    other.combine_geolora("sum", {"a": 1.0, "mine": 1.0})
    np.testing.assert_allclose(predict(other, X), predict(model, X), atol=1e-5)


class Alike(keras.Model):
    def __init__(self):
        super().__init__()
        self.one = keras.layers.Dense(8, name="same")
        self.two = keras.layers.Dense(8, name="same")

    def call(self, x):
        return self.two(self.one(x))


def test_layers_of_the_same_name_are_all_adapted():
    model = Alike()
    model(X)
    model.enable_geolora(rank=2)
    assert model.one.is_adapted and model.two.is_adapted
    model.merge_geolora()
    assert type(model.one) is type(model.two) is keras.layers.Dense


@keras.saving.register_keras_serializable("tests")
class OwnCompile(keras.Sequential):
    def compile(self, optimizer, strength):
        super().compile(optimizer, loss="mse")
        self.strength = strength


def test_a_model_with_its_own_compile_loads_as_in_keras(tmp_path):
    model = OwnCompile([keras.Input((8,)), keras.layers.Dense(3)])
    model.enable_geolora(rank=2)
    model.compile(GeoLoRA("adam"), strength=2)
    with pytest.warns(UserWarning, match="was not called"):
        loaded = reload(model, tmp_path)
    np.testing.assert_array_equal(predict(loaded, X), predict(model, X))


# Mistakes.


def test_the_backbone_of_an_adapted_task_is_not_saved_alone(tmp_path):
    backbone, inputs = families.small_bert()
    task = classifier(backbone)
    task.enable_geolora(rank=2)
    for save in (
        lambda: backbone.save(tmp_path / "b.keras"),
        lambda: backbone.save_weights(tmp_path / "b.weights.h5"),
        lambda: backbone.save_to_preset(tmp_path / "preset"),
        lambda: backbone.export_to_transformers(tmp_path / "preset"),
    ):
        with pytest.raises(ValueError, match="belong to the task"):
            save()
    assert isinstance(backbone, keras_hub.models.BertBackbone)
    task.remove_geolora()
    assert type(backbone) is keras_hub.models.BertBackbone
    backbone.save(tmp_path / "b.keras")


def test_a_model_over_adapted_layers_is_not_saved(tmp_path):
    model = two_adapters()
    part = keras.Model(model.inputs, model.layers[1].output)
    with pytest.raises(ValueError, match="belong to the model"):
        part.save(tmp_path / "part.keras")


def test_a_model_with_parts_adapted_one_by_one_is_not_saved(tmp_path):
    inner = plain()
    inputs = keras.Input((8,))
    outputs = keras.layers.Dense(2)(inner(inputs))
    model = keras.Model(inputs, outputs)
    model.enable_geolora(rank=2, exclude=inner.name)
    inner.enable_geolora(rank=2)
    with pytest.raises(ValueError, match="one `enable_geolora`"):
        model.save(tmp_path / "m.keras")
    model.save_weights(tmp_path / "m.weights.h5")


@pytest.mark.parametrize("options", [{"train_bias": True}, {"exclude": "none"}])
def test_weights_with_other_companions_change_nothing(tmp_path, options):
    model = plain()
    if "exclude" in options:
        options = {"modules_to_save": model.layers[0].name}
    model.enable_geolora(rank=2, **options)
    move(model)
    model.save_weights(tmp_path / "m.weights.h5")
    for weights in (model, plain()):
        weights.save_weights(tmp_path / "m.weights.h5")
        other = plain()
        other.enable_geolora(rank=2)
        before = [ops.convert_to_numpy(v) for v in other.weights]
        with pytest.raises(ValueError, match="weights"):
            other.load_weights(tmp_path / "m.weights.h5")
        for variable, value in zip(other.weights, before, strict=True):
            np.testing.assert_array_equal(ops.convert_to_numpy(variable), value)


def test_weights_of_other_adapters_are_refused(tmp_path):
    two_adapters().save_weights(tmp_path / "m.weights.h5")
    model = plain()
    model.enable_geolora(rank=2, name="a")
    with pytest.raises(ValueError, match=r"weights of adapters \['a', 'b'\]"):
        model.load_weights(tmp_path / "m.weights.h5")


def test_weights_of_a_plain_model_are_refused(tmp_path):
    plain().save_weights(tmp_path / "m.weights.h5")
    model = plain()
    model.enable_geolora(rank=2)
    with pytest.raises(ValueError, match="do not come from an adapted"):
        model.load_weights(tmp_path / "m.weights.h5")


@pytest.mark.parametrize("name", ["m.keras", "m.weights.h5"])
def test_nothing_is_saved_while_adapters_are_disabled(tmp_path, name):
    model = two_adapters()
    save = model.save_weights if "weights" in name else model.save
    with model.geolora_disabled():
        with pytest.raises(ValueError, match="geolora_disabled"):
            save(tmp_path / name)
    save(tmp_path / name)


@pytest.mark.parametrize("name", ["m.h5", "m.hdf5", "m.weights.h5"])
def test_a_whole_model_in_hdf5_is_refused(tmp_path, name):
    model = adapted()
    with pytest.raises(ValueError, match=f"model.keras.*filepath='.*/{name}'"):
        model.save(tmp_path / name)
    assert not list(tmp_path.iterdir())


def named(inner):
    """A model whose variables have the same paths each time.

    The optimizer with most variables has layers of two shapes.
    """
    keras.utils.set_random_seed(0)
    width = 16 if inner == "accumulating" else 8
    model = keras.Sequential(
        [keras.layers.Dense(width, name=name) for name in "abc"], name="model"
    )
    model.build((None, 8))
    model.enable_geolora(rank=2, max_rank=6, seed=0)
    inner = INNER[inner]()
    inner = inner.from_config({**inner.get_config(), "name": "inner"})
    model.compile(GeoLoRA(inner, 0.5, cut_interval=2, name="outer"), "mse")
    return model


def step(model, count=3):
    y = np.concatenate([Y, Y], axis=1)[:, : model.output_shape[-1]]
    for _ in range(count):
        model.train_on_batch(X, y)


# Adafactor of Keras names slots by the last part of a path.
@pytest.mark.parametrize("inner", sorted(set(INNER) - {"adafactor"}))
def test_a_tree_of_states_holds_all_of_a_run(inner):
    run = named(inner)
    step(run)
    tree, before = run.get_state_tree("numpy_array"), state(run)
    step(run)
    after = state(run)
    run.set_state_tree(tree)
    assert_same(state(run), before)
    step(run)
    assert_same(state(run), after)

    other = named(inner)
    other.optimizer.build(other.trainable_variables)
    other.set_state_tree(run.get_state_tree("numpy_array"))
    assert_same(state(other), after)
    for model in run, other:
        model.compact_geolora(1)
    step(run)
    other.set_state_tree(run.get_state_tree("numpy_array"))
    for _ in range(2):
        assert_same(state(other), state(run))
        step(run)
        step(other)


class Unbuildable(keras.Model):
    def __init__(self, **options):
        super().__init__(**options)
        self.dense = keras.layers.Dense(4)

    def call(self, x):
        return self.dense(x)

    def get_build_config(self):
        return None


def test_a_model_that_cannot_be_built_again_says_so(tmp_path):
    model = Unbuildable()
    model(X)
    model.enable_geolora(rank=2)
    config = model.get_config()
    config["base"]["class_name"] = "Unbuildable"
    with keras.saving.custom_object_scope({"Unbuildable": Unbuildable}):
        with pytest.raises(ValueError, match="build_from_config"):
            type(model).from_config(config)
