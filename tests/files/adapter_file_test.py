"""Adapter files: exact, strict, whole, and safe to open."""

import concurrent.futures
import contextlib
import json
import os
import pathlib
import random
import resource
import signal
import struct
import subprocess
import sys
import time

import families
import keras
import keras_hub
import numpy as np
import pytest
import safetensors.numpy
from keras import ops
from moving import move

import keras_geolora
from keras_geolora import AdapterFileError, GeoLoRA, whole_files
from keras_geolora.files import adapter_format
from keras_geolora.layers.tree import adapted_layers

RNG = np.random.default_rng(0)
X = RNG.normal(size=(32, 8)).astype("float32")
Y = np.tanh(X @ RNG.normal(size=(8, 3))).astype("float32")


def plain(seed=0, width=16):
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(width, activation="relu"),
            keras.layers.LayerNormalization(),
            keras.layers.Dense(width),
            keras.layers.Dense(3),
        ]
    )


def adapted(**options):
    model = plain()
    head, norm = model.layers[-1], model.layers[1]
    options = {
        "rank": 2,
        "exclude": head.name,
        "modules_to_save": [head.name, norm.name],
        "train_bias": True,
        "seed": 0,
        **options,
    }
    model.enable_geolora(**options)
    return model


def moved(**options):
    """Another adapter, as if it were trained."""
    model = adapted(**options)
    move(model)
    return model


def fit(model, targets=Y):
    model.compile(GeoLoRA(keras.optimizers.Adam(1e-2), cut_interval=5), "mse")
    model.fit(X, targets, batch_size=8, epochs=5, verbose=0)
    return model


@pytest.fixture(scope="module")
def trained():
    """A trained model, which no test changes."""
    return fit(adapted())


@pytest.fixture(scope="module")
def content(trained, tmp_path_factory):
    """What is in the file of its adapter."""
    path = tmp_path_factory.mktemp("trained") / "adapter.safetensors"
    trained.save_geolora(path)
    return path.read_bytes()


def predict(model, inputs=X):
    return np.array(model.predict(inputs, verbose=0))


def everything(model):
    """All that can be seen of a model."""
    return (
        [type(layer) for layer in model.layers],
        [v.trainable for v in model.variables],
        [ops.convert_to_numpy(v).tobytes() for v in model.variables],
        model.geolora_adapters(),
    )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "adapter.safetensors"


@pytest.fixture
def saved(path, content):
    """The file of the trained adapter."""
    path.write_bytes(content)
    return path


# What comes back.


def test_a_fresh_base_becomes_the_trained_model(trained, saved):
    fresh = plain().load_geolora(saved)
    expected = predict(trained)
    np.testing.assert_allclose(predict(fresh), expected, atol=1e-6)
    ranks = [layer.rank for layer in trained.layers if hasattr(layer, "rank")]
    assert ranks == [x.rank for x in fresh.layers if hasattr(x, "rank")]
    for one, other in zip(
        fresh.trainable_variables, trained.trainable_variables, strict=True
    ):
        assert one.shape == other.shape
        np.testing.assert_array_equal(*map(ops.convert_to_numpy, (one, other)))
    fresh.merge_geolora()
    np.testing.assert_allclose(predict(fresh), expected, atol=1e-5)
    fresh.unmerge_geolora()
    fresh.remove_geolora()
    np.testing.assert_array_equal(predict(fresh), predict(plain()))


def test_factors_are_cut_to_their_ranks(path):
    model = adapted(max_rank=3)
    model.save_geolora(path)
    _, tensors = adapter_format.read_adapter(path)
    layers = [layer for layer in model.layers if hasattr(layer, "rank")]
    assert [layer.rank for layer in layers] == [2, 2]
    assert [tensors[f"{name}.S"].shape for name in ("dense", "dense_1")] == [
        (layer.rank, layer.rank) for layer in layers
    ]


def test_an_adapted_model_gets_one_more(trained, saved):
    other = plain()
    other.enable_geolora(rank=1, name="mine", exclude=other.layers[-1].name)
    other.load_geolora(saved, name="theirs")
    assert other.geolora_adapters() == ["theirs", "mine"]
    np.testing.assert_allclose(predict(other), predict(trained), atol=1e-6)
    other.activate_geolora("mine")
    np.testing.assert_array_equal(predict(other), predict(plain()))


def test_what_was_loaded_below_min_rank_can_be_saved_again(path):
    low, high = plain(), plain()
    low.enable_geolora(rank=1)
    high.enable_geolora(rank=2, min_rank=2)
    low.save_geolora(path)
    high.load_geolora(path)
    assert {x.rank for x in adapted_layers(high).values()} == {1}
    high.save_geolora(path)
    fresh = adapted_layers(plain().load_geolora(path))
    assert {x.adapter.min_rank for x in fresh.values()} == {1}
    assert {x.adapter.min_rank for x in adapted_layers(high).values()} == {2}


def test_an_adapter_that_is_not_active_can_be_saved(path):
    model = moved(name="first")
    expected = predict(model)
    model.enable_geolora(rank=1, name="second")
    model.save_geolora(path, name="first")
    fresh = plain().load_geolora(path)
    assert fresh.geolora_adapters() == ["first"]
    np.testing.assert_allclose(predict(fresh), expected, atol=1e-6)


def test_training_goes_on_and_can_be_taken_back(trained, saved):
    model = fit(plain().load_geolora(saved))
    expected = predict(trained)
    assert np.mean((predict(model) - Y) ** 2) < np.mean((expected - Y) ** 2)
    assert not np.allclose(predict(model), expected, atol=1e-4)
    # An adapter of the same name gets new values.
    model.load_geolora(saved)
    np.testing.assert_allclose(predict(model), expected, atol=1e-6)


def classifier(classes=2):
    keras.utils.set_random_seed(0)
    backbone, inputs = families.small_bert()
    task = keras_hub.models.BertTextClassifier(
        backbone, num_classes=classes, preprocessor=None
    )
    return task, inputs


def test_a_task_brings_its_head(path):
    task, inputs = classifier()
    task.enable_geolora(rank=2, seed=0)
    move(task)
    task.save_geolora(path)
    keras.utils.set_random_seed(5)
    fresh, _ = classifier()
    fresh.get_layer("logits").kernel.assign(np.zeros((16, 2)))
    fresh.load_geolora(path)
    np.testing.assert_allclose(
        predict(fresh, inputs), predict(task, inputs), atol=1e-5
    )


def test_a_backbone_takes_the_adapter_of_a_task(path):
    task, inputs = classifier()
    task.enable_geolora(rank=2, seed=0)
    move(task)
    task.save_geolora(path)
    other, _ = classifier()
    with pytest.raises(AdapterFileError, match="no variable 'head:logits/"):
        other.backbone.load_geolora(path)
    with pytest.warns(UserWarning, match="head:logits"):
        other.backbone.load_geolora(path, strict=False)
    outputs = [
        predict_all(model.backbone, inputs)["pooled_output"]
        for model in (other, task)
    ]
    np.testing.assert_allclose(*outputs, atol=1e-5)


def predict_all(model, inputs):
    return model.predict(inputs, verbose=0)


def test_bfloat16_weights_come_back_exactly(path):
    keras.config.set_dtype_policy("bfloat16")
    try:
        models = plain(), plain()
    finally:
        keras.config.set_dtype_policy("float32")
    models[0].enable_geolora(
        rank=2, modules_to_save=models[0].layers[1].name, train_bias=True
    )
    move(models[0])
    models[0].save_geolora(path)
    models[1].load_geolora(path)
    for one, other in zip(*(m.weights for m in models), strict=True):
        assert one.dtype == other.dtype
        if len(one.shape) == 1:
            np.testing.assert_array_equal(
                *(np.float32(ops.convert_to_numpy(v)) for v in (one, other))
            )


# What does not fit.


def pruned():
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((8,)), keras.layers.Dense(16)])


@pytest.mark.parametrize(
    "create, sentence",
    [
        (lambda: plain(width=12), r"shape of 'dense': \(8, 16\) in the file"),
        (lambda: plain(seed=1), "pretrained kernels of 2 of 2 layers"),
        (pruned, "no layer that can be adapted at 'dense_1'"),
    ],
)
def test_another_base_is_refused_and_left_alone(saved, create, sentence):
    model = create()
    before = everything(model)
    with pytest.raises(AdapterFileError, match=sentence) as caught:
        model.load_geolora(saved)
    assert "strict=False" in str(caught.value)
    assert everything(model) == before


def test_another_base_outside_of_the_adapters_is_refused(path):
    moved(modules_to_save=None, exclude=None).save_geolora(path)
    model = plain()
    model.layers[1].gamma.assign(np.full(16, 2.0))
    with pytest.raises(AdapterFileError, match="outside of the adapted"):
        model.load_geolora(path)


def test_what_fits_can_be_loaded(trained, saved):
    other = plain(seed=1)
    with pytest.warns(UserWarning, match="pretrained kernels of 2"):
        other.load_geolora(saved, strict=False)
    np.testing.assert_allclose(
        *(ops.convert_to_numpy(m.layers[0].delta()) for m in (trained, other)),
        atol=1e-6,
    )


def test_a_quantized_base_takes_the_adapter(path):
    task, inputs = classifier()
    task.enable_geolora(rank=2, seed=0)
    move(task)
    task.save_geolora(path)
    keras.utils.set_random_seed(0)
    backbone, _ = families.small_bert()
    backbone.quantize("int8")
    quantized = keras_hub.models.BertTextClassifier(
        backbone, num_classes=2, preprocessor=None
    )
    with pytest.raises(AdapterFileError, match="pretrained kernels of 7"):
        quantized.load_geolora(path)
    with pytest.warns(UserWarning, match="pretrained kernels of 7"):
        quantized.load_geolora(path, strict=False)
    np.testing.assert_allclose(
        predict(quantized, inputs), predict(task, inputs), atol=0.05
    )


def test_numbers_are_not_put_into_integers(saved):
    quantized = plain()
    quantized.quantize("int8")
    with pytest.raises(AdapterFileError, match="type of 'dense_2/kernel'"):
        quantized.load_geolora(saved)


@pytest.mark.parametrize("options", [{}, {"train_bias": False}])
def test_an_adapter_with_other_co_trained_variables_is_refused(saved, options):
    other = moved(**options, modules_to_save=None, exclude=None)
    before = everything(other)
    with pytest.raises(AdapterFileError, match="has no variable"):
        other.load_geolora(saved)
    assert everything(other) == before


def test_an_adapter_without_its_co_trained_variables_is_refused(path):
    moved(train_bias=False).save_geolora(path)
    with pytest.raises(AdapterFileError, match="no values for 'dense"):
        adapted().load_geolora(path)


def test_an_adapter_on_other_layers_is_refused(saved):
    model = plain()
    model.enable_geolora(rank=2, targets=model.layers[0].name)
    before = everything(model)
    with pytest.raises(AdapterFileError, match="adapter is not on 'dense_1'"):
        model.load_geolora(saved)
    assert everything(model) == before


def test_a_rank_without_room_is_refused(path):
    moved(rank=4, min_rank=4).save_geolora(path)
    model = plain()
    head, norm = model.layers[-1].name, model.layers[1].name
    model.enable_geolora(
        rank=1, max_rank=2, exclude=head, modules_to_save=[head, norm]
    )
    with pytest.raises(AdapterFileError, match="room for 2 in the model"):
        model.load_geolora(path)


def test_a_plain_model_has_nothing_to_save(path, trained):
    with pytest.raises(ValueError, match="enable_geolora"):
        plain().save_geolora(path)
    with pytest.raises(ValueError, match="no adapter with this"):
        trained.save_geolora(path, name="other")
    assert not path.exists()


def test_numbers_that_are_not_finite_are_not_saved(path):
    model = moved()
    model.save_geolora(path)
    before = path.read_bytes()
    model.layers[-1].bias.assign([0, np.nan, 0])
    with pytest.raises(ValueError, match="not finite.*dense_2/bias"):
        model.save_geolora(path)
    assert path.read_bytes() == before


# Damaged files.


def test_no_damage_goes_unnoticed(saved, tmp_path):
    """1,200 mutations: each is refused, or what is read is the same."""
    whole = saved.read_bytes()
    description, tensors = adapter_format.read_adapter(saved)
    rng = random.Random(0)
    broken = tmp_path / "broken.safetensors"
    header = struct.unpack("<Q", whole[:8])[0]
    same = 0
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for kind in range(1200):
        data = bytearray(whole)
        match kind % 6:
            case 0:  # cut off
                del data[rng.randrange(len(data)) :]
            case 1:  # one bit anywhere
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            case 2:  # one bit in the header
                data[8 + rng.randrange(header)] ^= 1 << rng.randrange(8)
            case 3:  # another length of the header
                length = rng.choice(
                    [0, 1, header - 1, header + 1, 2**40, 2**63]
                )
                data[:8] = struct.pack("<Q", length)
            case 4:  # a digit of the header: offsets, shapes, options
                digits = [
                    i for i in range(8, 8 + header) if chr(data[i]).isdigit()
                ]
                data[rng.choice(digits)] = ord(rng.choice("0123456789"))
            case 5:  # rubbish in the middle or at the end
                at = rng.choice([rng.randrange(len(data)), len(data)])
                data[at:at] = rng.randbytes(rng.randrange(1, 64))
        broken.write_bytes(data)
        try:
            other, others = adapter_format.read_adapter(broken)
        except AdapterFileError:
            continue
        same += 1
        assert other == description
        assert others.keys() == tensors.keys()
        for key in tensors:
            np.testing.assert_array_equal(others[key], tensors[key])
    # A digit may be replaced by itself; little else can go unpunished.
    assert same < 60
    # In kilobytes: declared sizes of terabytes reserve nothing.
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    assert grown < 100_000


@pytest.mark.parametrize("mutation", range(6))
def test_a_damaged_file_leaves_the_model_alone(path, content, mutation):
    data = bytearray(content)
    data[len(data) * (mutation + 1) // 8] ^= 1
    path.write_bytes(data)
    model = plain()
    before = everything(model)
    with pytest.raises(AdapterFileError, match="damaged"):
        model.load_geolora(path)
    assert everything(model) == before


def rewritten(path, change):
    """Writes a file that contradicts itself, with the right checksum."""
    description, tensors = adapter_format.read_adapter(path)
    change(description, tensors)
    path.write_bytes(adapter_format.serialized(tensors, description))


FORGED = {
    "an extra tensor": lambda d, t: t.update(foreign=np.ones(3, "float32")),
    "a missing factor": lambda d, t: t.pop("dense.V"),
    "another rank": lambda d, t: d["adapter"]["layers"]["dense"].update(rank=9),
    "a huge buffer": lambda d, t: d["adapter"]["layers"]["dense"].update(
        max_rank=10**12
    ),
    "no rank": lambda d, t: d["adapter"]["layers"]["dense"].pop("rank"),
    "an option": lambda d, t: d["adapter"]["layers"]["dense"].update(x=1),
    "a smallest rank above the rank": lambda d, t: d["adapter"]["layers"][
        "dense"
    ].update(min_rank=9),
    "a smallest rank of zero": lambda d, t: d["adapter"]["layers"][
        "dense"
    ].update(min_rank=0),
    "a largest rank below the rank": lambda d, t: d["adapter"]["layers"][
        "dense"
    ].update(max_rank=0),
    "a zero scale": lambda d, t: d["adapter"]["layers"]["dense"].update(
        scale=0.0
    ),
    "text as dropout": lambda d, t: d["adapter"]["layers"]["dense"].update(
        dropout="much"
    ),
    "another type": lambda d, t: t.update(
        {"dense.U": t["dense.U"].astype("float64")}
    ),
    "not finite": lambda d, t: t["dense.S"].fill(np.nan),
    "no layers": lambda d, t: d["adapter"].pop("layers"),
    "layers as a list": lambda d, t: d["adapter"].update(layers=["dense"]),
    "a name": lambda d, t: d["adapter"].update(name="a/b"),
    "a kernel": lambda d, t: t.update(
        {"dense/kernel": np.ones((8, 16), "float32")}
    ),
    "a scale too large": lambda d, t: d["adapter"]["layers"]["dense"].update(
        scale=10**400
    ),
    "no model": lambda d, t: d.pop("model"),
    "a strange class": lambda d, t: d["classes"].update(x=[1]),
    "no base": lambda d, t: d.pop("base"),
    "the future": lambda d, t: d.update(format=2),
    "a foreign layer": lambda d, t: d["adapter"]["modules_to_save"].append("x"),
}


@pytest.mark.parametrize("forgery", FORGED)
def test_a_forged_file_is_refused(saved, forgery):
    rewritten(saved, FORGED[forgery])
    model = plain()
    before = everything(model)
    with pytest.raises(ValueError):
        model.load_geolora(saved)
    assert everything(model) == before


RANKS = "a smallest rank above the rank", "a largest rank below the rank"


@pytest.mark.parametrize("forgery", RANKS)
def test_ranks_out_of_order_contradict_the_file(saved, forgery):
    rewritten(saved, FORGED[forgery])
    with pytest.raises(AdapterFileError, match="are inconsistent.*'dense'"):
        plain().load_geolora(saved)


def test_nested_descriptions_are_refused(path):
    text = "[" * 100_000
    metadata = {
        adapter_format.ENTRY: text,
        adapter_format.DIGEST: adapter_format.digest(text, {}),
    }
    path.write_bytes(safetensors.numpy.save({}, metadata))
    with pytest.raises(AdapterFileError, match="no description"):
        plain().load_geolora(path)


def test_foreign_files_are_refused(path):
    path.write_bytes(safetensors.numpy.save({"x": np.ones(3)}))
    with pytest.raises(AdapterFileError, match="import_peft"):
        plain().load_geolora(path)
    path.write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(AdapterFileError, match="not a safetensors file"):
        plain().load_geolora(path)
    with pytest.raises(FileNotFoundError):
        plain().load_geolora(path.with_name("none"))
    with pytest.raises(IsADirectoryError):
        plain().load_geolora(path.parent)


# Writing.

WRITER = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("files", sys.argv[1])
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
print("ready", flush=True)
i = 0
while True:
    i += 1
    files.write_whole(sys.argv[2], bytes([i % 256]) * 3_000_000, b"end")
"""


def test_a_file_is_whole_whenever_the_writer_is_killed(path):
    rng = random.Random(0)
    for _ in range(15):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, whole_files.__file__, str(path)],
            stdout=subprocess.PIPE,
        )
        writer.stdout.readline()
        while not path.exists():
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.05))
        writer.kill()
        writer.wait()
        writer.stdout.close()
        data = path.read_bytes()
        assert len(data) == 3_000_003 and data.endswith(b"end")
        assert len(set(data[:-3])) == 1


@contextlib.contextmanager
def disk_of(size):
    """Files cannot become larger than this."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_loses_nothing(trained, saved):
    before = saved.read_bytes()
    with disk_of(1000):
        with pytest.raises(OSError, match="could not be written.*unchanged"):
            trained.save_geolora(saved)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


def test_files_that_belong_together_are_written_together(tmp_path):
    small, large = tmp_path / "small", tmp_path / "large"
    whole_files.write_together(tmp_path, {"small": [b"old"], "large": [b"old"]})
    with disk_of(1000):
        with pytest.raises(OSError, match="large' could not be written"):
            whole_files.write_together(
                tmp_path, {"small": [b"new"], "large": [bytes(2000)]}
            )
    assert small.read_bytes() == large.read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["large", "small"]


# Ends a writer of two files before each of its calls in turn, which are all
# that another process can notice of it. Prints, for each: how it ended, the two
# files right after, and, after another writer, what the folder holds.
ENDINGS = """
import importlib.util, json, os, pathlib, sys, tempfile
_, source, ending, links = sys.argv
spec = importlib.util.spec_from_file_location("files", source)
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
CALLS = "mkdir", "chmod", "link", "symlink", "replace", "unlink", "rmdir"
NAMES = "weights", "config"

def no_links(*args, **options):
    raise NotImplementedError

if links == "no links":
    os.symlink = no_links

def write(folder, text):
    files.write_together(folder, {name: [text] for name in NAMES})

def counted(call, at):
    def wrapped(*args, **options):
        at[0] -= 1
        if at[0] == -1:
            if ending == "kill":
                os._exit(9)
            raise KeyboardInterrupt
        return call(*args, **options)
    return wrapped

def write_until(call, folder):
    at = [call]
    for name in CALLS:
        setattr(os, name, counted(getattr(os, name), at))
    try:
        write(folder, b"new")
    except KeyboardInterrupt:
        os._exit(9)
    os._exit(0)

def read(folder, name):
    try:
        return (folder / name).read_text()
    except FileNotFoundError:
        return None

status, call = 1, 0
while status:
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        write(folder, b"old")
        writer = os.fork()
        if not writer:
            write_until(call, folder)
        status = os.waitstatus_to_exitcode(os.waitpid(writer, 0)[1])
        found = [read(folder, name) for name in NAMES]
        led = any((folder / name).is_symlink() for name in NAMES)
        write(folder, b"last")
        last = [read(folder, name) for name in NAMES]
        left = sorted(os.listdir(folder))
        print(json.dumps([status, found, led, last, left]))
    call += 1
"""


def endings(*options):
    command = sys.executable, "-c", ENDINGS, whole_files.__file__, *options
    output = subprocess.run(command, capture_output=True, check=True).stdout
    return [json.loads(line) for line in output.splitlines()]


@pytest.mark.backend_independent("it writes bytes")
@pytest.mark.parametrize("ending", ["kill", "interrupt"])
def test_readers_find_all_old_or_all_new_files_at_any_moment(ending):
    rows = endings(ending, "links")
    assert len(rows) > 15
    moments = [found for _, found, *_ in rows]
    change = moments.index(["new", "new"])
    assert moments[:change] == [["old", "old"]] * change
    assert moments[change:] == [["new", "new"]] * (len(rows) - change)
    assert any(led for _, _, led, *_ in rows)
    for _, _, _, last, left in rows:
        assert last == ["last", "last"]
        assert left == ["config", "weights"]


@pytest.mark.backend_independent("it writes bytes")
def test_without_links_readers_find_all_files_or_no_config():
    for _, found, _, last, left in endings("kill", "no links"):
        assert found in (["old", "old"], ["new", "new"]) or found[1] is None
        assert last == ["last", "last"]
        assert left == ["config", "weights"]


@pytest.mark.backend_independent("it writes bytes")
def test_writers_wait_for_each_other(tmp_path):
    def write(text):
        for _ in range(20):
            files = {name: [text] for name in ("weights", "config")}
            whole_files.write_together(tmp_path, files)

    write(b"0")
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        list(pool.map(write, [b"1", b"2", b"3"]))
    both = {(tmp_path / name).read_bytes() for name in ("weights", "config")}
    assert len(both) == 1 and len(list(tmp_path.iterdir())) == 2


@pytest.mark.backend_independent("it writes bytes")
def test_files_written_together_are_plain_and_leave_others_alone(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "elsewhere").write_text("shared")
    (tmp_path / "config").symlink_to("elsewhere")
    for text in b"1", b"2":
        whole_files.write_together(
            tmp_path, {"weights": [text], "config": [text]}
        )
        for name in "weights", "config":
            path = tmp_path / name
            assert path.read_bytes() == text and not path.is_symlink()
            assert path.stat().st_mode & 0o777 == 0o666 & ~umask()
    assert (tmp_path / "elsewhere").read_text() == "shared"
    assert (tmp_path / "README.md").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 4


def test_a_folder_that_is_not_there(path, trained):
    with pytest.raises(FileNotFoundError, match="could not be written"):
        trained.save_geolora(path.parent / "none" / path.name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(path, trained):
    path.parent.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match="could not be written"):
            trained.save_geolora(path)
    finally:
        path.parent.chmod(0o700)


def test_options_may_be_numbers_of_numpy(path):
    model = plain()
    model.enable_geolora(
        rank=np.int64(2),
        max_rank=np.int32(3),
        scale=np.float32(0.5),
        dropout=np.float32(0.25),
        seed=np.int64(1),
    )
    model.save_geolora(path)
    plain().load_geolora(path)
    keras.models.model_from_json(model.to_json())


def test_a_path_may_be_a_string_or_an_object(path, trained):
    trained.save_geolora(str(path))
    assert pathlib.Path(path).stat().st_mode & 0o777 == 0o666 & ~umask()
    keras_geolora.load_geolora(plain(), str(path))


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask
