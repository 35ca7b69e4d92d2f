"""`python -m keras_geolora`: inspect, convert and diff."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import families
import keras
import keras_hub
import numpy as np
import pytest

import keras_geolora
from keras_geolora.__main__ import main

by_numpy = pytest.mark.backend_independent("NumPy reads and compares files")


def saved(path, **options):
    backbone = created(**options)
    backbone.save_geolora(path)
    return backbone


@functools.cache
def created(seed=0, rank=2, **options):
    keras.utils.set_random_seed(0)
    backbone, _ = families.build("BertBackbone")
    backbone.enable_geolora(rank=rank, seed=seed, **options)
    for layer in backbone._flatten_layers():
        if getattr(layer, "is_adapted", False):
            size = layer.adapter.max_rank
            core = np.diag(np.r_[np.arange(rank, 0, -1), np.zeros(size - rank)])
            layer.adapter.S.assign(core)
    return backbone


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "mine.safetensors")


@by_numpy
def test_inspect_shows_ranks_parameters_and_spectrum(path, capsys):
    saved(path, train_bias=True)
    assert main(["inspect", path]) == 0
    text = capsys.readouterr().out
    assert "of a BertBackbone" in text
    line = next(x for x in text.splitlines() if "layer_0/feedforward_out" in x)
    assert line.split()[1:] == [
        "Dense",
        "32",
        "x",
        "16",
        "2",
        "96",
        "2",
        "to",
        "1",
    ]
    assert "13 layers, mean rank 2.0" in text
    assert "pooled_dense/bias (16,)" in text


@by_numpy
def test_inspect_prints_json(path, capsys):
    saved(path)
    main(["inspect", path, "--json"])
    description = json.loads(capsys.readouterr().out)
    assert description["adapter"]["layers"]["pooled_dense"]["rank"] == 2


def test_convert_writes_what_export_writes(path, tmp_path, capsys):
    backbone = saved(path)
    keras_geolora.export_peft(backbone, tmp_path / "exported", prefix="bert")
    assert main(["convert", path, "--to", "peft", "--prefix", "bert"]) == 0
    for name in "adapter_config.json", "adapter_model.safetensors":
        one = (tmp_path / "mine" / name).read_bytes()
        assert one == (tmp_path / "exported" / name).read_bytes()


@by_numpy
@pytest.mark.filterwarnings("ignore:PEFT's LoRA format")  # without the head
def test_convert_knows_the_family_and_the_place_of_a_backbone(tmp_path):
    class Mine(keras_hub.models.BertBackbone):
        pass

    arguments, _ = families.TEXT["BertBackbone"]
    backbone = Mine(**arguments)
    task = keras_hub.models.BertTextClassifier(
        backbone, num_classes=2, preprocessor=None
    )
    task.enable_geolora(rank=1)
    for model, place in (task, "bert.pooler.dense"), (backbone, "pooler.dense"):
        if model is backbone:
            task.remove_geolora()
            backbone.enable_geolora(rank=1)
        path, folder = tmp_path / f"{place}.safetensors", tmp_path / place
        model.save_geolora(path)
        convert = ["convert", str(path), "--to", "peft"]
        assert main([*convert, "--output", str(folder)]) == 0
        config = json.loads((folder / "adapter_config.json").read_text())
        assert place in config["target_modules"]


@by_numpy
def test_convert_takes_names(tmp_path, capsys):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    model.enable_geolora(rank=1)
    path = str(tmp_path / "a.safetensors")
    model.save_geolora(path)
    assert main(["convert", path, "--to", "peft"]) == 2
    assert "names={path: module}" in capsys.readouterr().err
    (tmp_path / "names.json").write_text('{"dense": "score"}')
    names = ["--names", str(tmp_path / "names.json")]
    output = ["--output", str(tmp_path / "out")]
    assert main(["convert", path, "--to", "peft", *names, *output]) == 0
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["target_modules"] == ["score"]


@by_numpy
def test_diff_of_equal_files(path, tmp_path, capsys):
    saved(path)
    other = str(tmp_path / "other.safetensors")
    created.cache_clear()
    saved(other)
    assert main(["diff", path, other]) == 0
    assert "same" in capsys.readouterr().out


@by_numpy
def test_diff_shows_what_differs(path, tmp_path, capsys):
    saved(path, train_bias=True)
    other = str(tmp_path / "other.safetensors")
    saved(other, seed=1, rank=3, exclude="pooled_dense")
    assert main(["diff", path, other]) == 1
    lines = capsys.readouterr().out.splitlines()
    found = {line.split()[0]: line.split()[1:] for line in lines}
    assert found["pooled_dense"] == ["yes", "no"]
    assert found["pooled_dense/bias"] == ["yes", "no"]
    query = found["transformer_layer_0/self_attention_layer/query"]
    assert query[:5] == ["rank", "2", "rank", "3", "distance"]
    assert 0.5 < float(query[5]) < 1.6


@by_numpy
def test_errors_are_sentences(path, tmp_path, capsys):
    pathlib.Path(path).write_bytes(b"no")
    assert main(["inspect", path]) == 2
    assert "damaged, or not a safetensors file" in capsys.readouterr().err
    assert main(["diff", path, str(tmp_path / "none")]) == 2


@by_numpy
def test_it_runs_as_a_module(path, forked):
    saved(path)
    root = str(pathlib.Path(__file__).parents[2])
    run = subprocess.run(
        [sys.executable, "-m", "keras_geolora", "inspect", path],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert "BertBackbone" in run.stdout
