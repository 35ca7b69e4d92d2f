"""A task far from the pretraining: a small CNN learns clothes it never saw.

    python benchmarks/distant_task.py run --backend torch
    python benchmarks/distant_task.py table

Five convolutional layers and a head are trained on the classes 0 to 4 of
Fashion-MNIST. Then they are adapted to the classes 5 to 9 with 320 pictures in
100 steps of 32, with a new head that trains with the adapters. Accuracy is that
on 2,000 new pictures of these classes. Each method takes every rate; the rates
are judged on the same pictures, so the best of a row is a little too good, for
all methods alike. Rows are added to `benchmarks/results/distant_task.jsonl`.
"""

import statistics

import measuring
import numpy as np

RESULT = "distant_task"
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
RANK, BATCH, STEPS, EXAMPLES, TESTED = 8, 32, 100, 320, 2000
FILTERS = (32, 32, 64, 64, 128)


def main():
    """Parses the command line."""
    parser, _, run = measuring.command_line(__doc__)
    run.add_argument("--methods", nargs="+", default=list(METHODS))
    run.add_argument("--rates", nargs="+", type=float, default=RATES)
    run.add_argument("--seeds", nargs="+", type=int, default=range(3))
    measuring.run_or_print(parser.parse_args(), measure, print_table)


def measure(args):
    """Trains with every method, rate and seed."""
    for seed in args.seeds:
        model, (x, y), (x_new, y_new) = pretrained(seed)
        for method in args.methods:
            for rate in args.rates:
                accuracy, scale = trained(
                    METHODS[method], model(), rate, seed, (x, y), (x_new, y_new)
                )
                measuring.append(
                    RESULT,
                    {
                        "method": method,
                        "rate": rate,
                        "seed": seed,
                        "accuracy": accuracy,
                        "step_scale": scale,
                        **measuring.environment(args.backend),
                    },
                )


def pretrained(seed):
    """Pretrains on the first five classes.

    Returns:
        A function that returns a copy with a new head, and pairs of pictures
        and labels of the other classes, for training and for testing.
    """
    import keras

    (pictures, clothes), (new_pictures, new_clothes) = load()
    keras.utils.set_random_seed(seed)
    source = network()
    first = clothes < 5
    source.compile(
        keras.optimizers.Adam(1e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    source.fit(
        pictures[first][:10000],
        clothes[first][:10000],
        epochs=3,
        batch_size=64,
        verbose=0,
    )

    def copy():
        keras.utils.set_random_seed(seed)
        model = network()
        for old, new in zip(source.layers[:-1], model.layers, strict=False):
            new.set_weights(old.get_weights())
        return model

    def select(x, y, number):
        rows = np.flatnonzero(y >= 5)
        rows = np.random.default_rng(seed).permutation(rows)[:number]
        return x[rows], y[rows] - 5

    return (
        copy,
        select(pictures, clothes, EXAMPLES),
        select(new_pictures, new_clothes, TESTED),
    )


def load():
    """Returns Fashion-MNIST, with a channel, in [0, 1]."""
    import pathlib
    import sys

    sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))
    import assets

    return [
        (x[..., None].astype("float32") / 255, y.astype("int32"))
        for x, y in assets.fashion_mnist()
    ]


def network():
    """Returns the CNN, not trained."""
    import keras

    layers = [keras.Input((28, 28, 1))]
    for i, filters in enumerate(FILTERS):
        strides = 2 if i in (1, 3) else 1
        layers.append(
            keras.layers.Conv2D(
                filters, 3, strides, padding="same", activation="relu"
            )
        )
    layers += [
        keras.layers.GlobalAveragePooling2D(),
        keras.layers.Dense(5, name="logits"),
    ]
    return keras.Sequential(layers)


def trained(prepare, model, rate, seed, examples, new):
    """Adapts a model; returns its accuracy and the last `step_scale`."""
    import keras

    optimizer = prepare(model, rate)
    model.compile(
        optimizer,
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    keras.utils.set_random_seed(seed)
    epochs = STEPS * BATCH // EXAMPLES
    history = model.fit(
        *examples, batch_size=BATCH, epochs=epochs, verbose=0
    ).history
    _, accuracy = model.evaluate(*new, batch_size=500, verbose=0)
    return accuracy, history.get("step_scale", [None])[-1]


def geolora(model, rate, **options):
    """Prepares GeoLoRA, with the defaults but for options."""
    import keras

    import keras_geolora

    model.enable_geolora(
        rank=RANK, targets="all", exclude="logits", modules_to_save="logits"
    )
    return keras_geolora.GeoLoRA(keras.optimizers.AdamW(rate), **options)


def bounded(ratio):
    """Returns GeoLoRA with another bound on the steps."""
    return lambda model, rate: geolora(model, rate, max_update_ratio=ratio)


def keras_lora(model, rate):
    """Prepares LoRA of Keras; only its factors and the head train."""
    import keras

    for layer in model.layers[:-1]:
        layer.trainable = False
        if hasattr(layer, "enable_lora"):
            layer.trainable = True
            layer.enable_lora(RANK)
            layer.bias.trainable = False
    return keras.optimizers.AdamW(rate)


def full(model, rate):
    """Prepares full fine-tuning."""
    import keras

    return keras.optimizers.AdamW(rate)


def only_head(model, rate):
    """Prepares training of the head alone."""
    import keras

    for layer in model.layers[:-1]:
        layer.trainable = False
    return keras.optimizers.AdamW(rate)


METHODS = {
    "geolora": geolora,
    "geolora, no bound": bounded(None),
    "geolora, bound 0.008": bounded(0.008),
    "geolora, bound 0.02": bounded(0.02),
    "keras_lora": keras_lora,
    "full": full,
    "head": only_head,
}


def print_table():
    """Prints mean accuracies, and the mean factor on the steps."""
    found = {}
    for row in measuring.rows(RESULT):
        key = row["method"], row["rate"]
        found.setdefault(key, {})[row["seed"]] = row
    rates = sorted({rate for _, rate in found})
    lines = []
    for method in METHODS:
        cells = [found.get((method, rate)) for rate in rates]
        if any(cells):
            lines.append([method, *(cell(c) if c else "-" for c in cells)])
    print(measuring.markdown(["method", *(f"{r:g}" for r in rates)], lines))


def cell(by_seed):
    """Formats the rows of one method and rate."""
    mean = statistics.mean(row["accuracy"] for row in by_seed.values())
    scales = [r["step_scale"] for r in by_seed.values()]
    text = f"{mean:.3f}"
    if scales[0] is not None:
        text += f" (steps times {statistics.mean(scales):.2f})"
    return text


if __name__ == "__main__":
    main()
