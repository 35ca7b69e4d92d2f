"""What it costs to serve many adapters at once: mixed batches against one.

    python benchmarks/routed_serving.py run --backend tensorflow
    python benchmarks/routed_serving.py run --backend jax
    python benchmarks/routed_serving.py table

all-MiniLM-L6-v2 as a classifier, all linear layers adapted with random factors
of ranks 1, 2, 4 and 8 in turn, batches of 1, 16 and 64 rows with 48 tokens.
Rows of a batch have different adapters, as far as there are enough. On
TensorFlow the SavedModels are asked, as a server would; on JAX and PyTorch
`predict_on_batch` of a routed model. All are asked in turn in one process,
A B A B, against the same model with

- `merged`: one adapter, merged: the operations of the model without adapters;
- `beside`: one adapter of rank 8, beside the kernels, which is how
  `export(..., adapters=[...])` serves several by a signature each;
- `adapted`, on JAX and PyTorch: the model with one adapter of rank 8, as it is
  after a training.

Rows are added to `benchmarks/results/routed_serving.jsonl`; a ratio is the
median of those of the rounds, which a busy machine disturbs less than it does
medians of seconds. With `--folder` SavedModels are kept, and taken from there
if they exist.
"""

import pathlib
import statistics
import sys
import tempfile

import measuring
import numpy as np

sys.path.append(str(pathlib.Path(__file__).parents[1] / "examples"))
COUNTS = (1, 4, 16, 64)
RANKS = (8, 4, 2, 1)
BATCHES = (1, 16, 64)
LENGTH = 48
RESULT = "routed_serving"
BASES = {"merged", "beside", "adapted"}


def main():
    """Parses the command line."""
    _, _, run = parts = measuring.command_line(__doc__)
    run.add_argument("--rounds", type=int, default=15)
    run.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    run.add_argument("--counts", type=int, nargs="+", default=COUNTS)
    run.add_argument("--folder")
    measuring.run_or_print(parts[0].parse_args(), measure, print_table)


def measure(args):
    """Times batches with each number of adapters, in turn."""
    import keras

    keras.utils.set_random_seed(0)
    on_tensorflow = args.backend == "tensorflow"
    prepare = prepared_exports if on_tensorflow else prepared_models
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(args.folder or folder)
        functions = prepare(folder, args.counts)
        for batch in args.batches:
            time_batch(args, functions, batch)


def time_batch(args, functions, batch):
    """Times all functions on a batch, and adds a row."""
    tokens = np.random.default_rng(0).integers(1000, 20000, (batch, LENGTH))
    inputs = {
        "token_ids": tokens.astype("int32"),
        "segment_ids": np.zeros((batch, LENGTH), "int32"),
        "padding_mask": np.ones((batch, LENGTH), "int32"),
    }
    calls = {
        name: (lambda ask=ask, count=count: ask(inputs, mix(count, batch)))
        for name, (ask, count) in functions.items()
    }
    measuring.interleaved(calls, 2)
    times = measuring.interleaved(calls, args.rounds)
    found = {name: measuring.spread(x) for name, x in times.items()}
    measuring.append(
        RESULT,
        {
            **measuring.environment(args.backend),
            "batch": batch,
            "length": LENGTH,
            "rounds": args.rounds,
            "seconds": found,
            "ratio": {base: ratios(times, base) for base in BASES & {*times}},
        },
    )


def ratios(times, base):
    """Returns the median of the ratios of the rounds, by name.

    Args:
        times: Dict from name to list of seconds.
        base: Name of what the others are compared with.
    """
    return {
        name: statistics.median(
            one / other for one, other in zip(x, times[base], strict=True)
        )
        for name, x in times.items()
    }


def mix(count, batch):
    """Returns the names of the rows' adapters; `None` without a choice."""
    return count and [f"a{row % count}" for row in range(batch)]


def classifier(count):
    """Returns a MiniLM with random adapters, the first of which is active."""
    import assets
    import keras_hub

    from keras_geolora.layers.tree import adapted_layers

    model = keras_hub.models.TextClassifier.from_preset(
        assets.minilm_folder(), num_classes=2, preprocessor=None
    )
    for i in range(count):
        rank = RANKS[i % len(RANKS)]
        model.enable_geolora(rank=rank, max_rank=rank, name=f"a{i}", seed=i)
        for layer in adapted_layers(model).values():
            layer.adapter.S.assign(0.1 * np.eye(rank))
    model.activate_geolora("a0")
    return model


def prepared_exports(folder, counts):
    """Exports everything; returns dict from name to function and count."""
    import tensorflow as tf

    import keras_geolora

    def exported(name, count, **options):
        if not (folder / name / "1").exists():
            keras_geolora.export(
                classifier(count),
                folder / name,
                baseline=False,
                verbose=False,
                **options,
            )
        loaded = tf.saved_model.load(str(folder / name / "1"))
        function = loaded.signatures["serving_default"]

        def ask(inputs, names):
            # `loaded` must live as long as its functions.
            more = {"adapter": names} if names else {}
            inputs = {n: tf.constant(x) for n, x in (inputs | more).items()}
            outputs = loaded and function(**inputs)
            return [x.numpy() for x in outputs.values()]

        return ask

    functions = {
        "merged": (exported("merged", 1), 0),
        "beside": (exported("beside", 1, adapters=["a0"]), 0),
    }
    for count in counts:
        ask = exported(f"routed_{count}", count, route=True)
        functions[f"routed_{count}"] = ask, count
    return functions


def prepared_models(folder, counts):
    """Makes all models; returns dict from name to function and count."""
    from keras_geolora.layers.tree import adapted_layers

    del folder

    def alone(model):
        return lambda inputs, names: model.predict_on_batch(inputs)

    def routed(model):
        return lambda inputs, names: model.predict_on_batch(
            {"inputs": inputs, "adapter": model.ids(names)}
        )

    beside = classifier(1)
    for layer in adapted_layers(beside).values():
        layer.keeps_update_apart = True
    merged = classifier(1)
    merged.merge_geolora(reversible=False)
    functions = {
        "merged": (alone(merged), 0),
        "beside": (alone(beside), 0),
        "adapted": (alone(classifier(1)), 0),
    }
    for count in counts:
        model = classifier(count).route_geolora()
        functions[f"routed_{count}"] = routed(model), count
    return functions


def ratios_of(row, base):
    """Returns the ratios of a row; of medians, if those of rounds were lost."""
    if "ratio" in row:
        return row["ratio"][base]
    medians = {name: x["median"] for name, x in row["seconds"].items()}
    return {name: x / medians[base] for name, x in medians.items()}


def print_table():
    """Prints the last run of every backend and batch."""
    latest = {}
    for row in measuring.rows(RESULT):
        latest[row["backend"], row["batch"]] = row
    for base in sorted(BASES):
        print(f"\nTimes the latency of one adapter, {base}:\n")
        lines = []
        for (backend, batch), row in sorted(latest.items()):
            if base not in row["seconds"]:
                continue
            found = [
                f"{x:.2f}"
                for name, x in ratios_of(row, base).items()
                if name.startswith("routed")
            ]
            name = measuring.BACKEND_NAMES[backend]
            median = 1e3 * row["seconds"][base]["median"]
            lines.append([name, batch, f"{median:.1f}", *found])
        counts = [n[7:] for n in row["seconds"] if n.startswith("routed")]
        header = ["backend", "rows", "ms", *(f"N = {n}" for n in counts)]
        print(measuring.markdown(header, lines))


if __name__ == "__main__":
    main()
