"""Which learning rate is best, over widths and ranks, on a toy.

    python benchmarks/rates_over_sizes.py run --backend torch
    python benchmarks/rates_over_sizes.py table

A square layer with a random kernel of singular values around 1 is to become the
sum of that kernel and a matrix of rank 4, with singular values from 1 to 0.3,
known by its products with random inputs: 200 steps of 64 rows, AdamW, a rate
that falls to zero. The error is the relative distance to that matrix at the
end. Ranks are those at the start; buffers have twice as many columns. Plain
LoRA is `x @ A @ B` as in `plain_lora.py`. Rows are added to
`benchmarks/results/rates_over_sizes.jsonl`.
"""

import functools
import statistics

import measuring
import numpy as np

RESULT = "rates_over_sizes"
WIDTHS, RANKS = (256, 512, 1024), (4, 16, 64, 128)
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
STEPS, BATCH, TRUE = 200, 64, (1.0, 0.7, 0.5, 0.3)


def main():
    """Parses the command line."""
    parser, _, run = measuring.command_line(__doc__)
    run.add_argument("--methods", nargs="+", default=list(METHODS))
    run.add_argument("--widths", nargs="+", type=int, default=WIDTHS)
    run.add_argument("--ranks", nargs="+", type=int, default=RANKS)
    run.add_argument("--rates", nargs="+", type=float, default=RATES)
    run.add_argument("--seeds", nargs="+", type=int, default=[0])
    measuring.run_or_print(parser.parse_args(), measure, print_table)


def measure(args):
    """Trains at every width, rank and rate."""
    for seed in args.seeds:
        for width in args.widths:
            for rank in args.ranks:
                for method in args.methods:
                    for rate in args.rates:
                        measure_one(args, method, width, rank, rate, seed)


def measure_one(args, method, width, rank, rate, seed):
    """Trains once, and adds a row."""
    measuring.append(
        RESULT,
        {
            "method": method,
            "width": width,
            "rank": rank,
            "rate": rate,
            "seed": seed,
            "error": error(method, width, rank, rate, seed),
            **measuring.environment(args.backend),
        },
    )


def error(method, width, rank, rate, seed):
    """Trains a layer; returns how far it ends from what it should be."""
    import keras

    keras.utils.set_random_seed(seed)
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=(width, width)) / width**0.5
    left, right = (
        np.linalg.qr(rng.normal(size=(width, len(TRUE))))[0] for _ in "UV"
    )
    target = kernel + left * TRUE @ right.T
    x = rng.normal(size=(STEPS * BATCH, width)).astype("float32")
    layer = keras.layers.Dense(width, use_bias=False)
    model = keras.Sequential([keras.Input((width,)), layer])
    layer.kernel.assign(kernel)
    schedule = keras.optimizers.schedules.PolynomialDecay(rate, STEPS, 0.0)
    optimizer = METHODS[method](
        model, layer, rank, keras.optimizers.AdamW(schedule), seed
    )
    model.compile(optimizer, loss="mse")
    y = x @ target.astype("float32")
    model.fit(x, y, batch_size=BATCH, epochs=1, verbose=0)
    found = model.predict(
        np.eye(width, dtype="float32"), batch_size=width, verbose=0
    )
    return float(np.linalg.norm(found - target) / np.linalg.norm(TRUE))


def geolora(model, layer, rank, inner, seed, **options):
    """Adapts the layer with the defaults but for options."""
    import keras_geolora

    model.enable_geolora(rank=rank, max_rank=2 * rank, seed=seed)
    return keras_geolora.GeoLoRA(inner, **options)


def lora(model, layer, rank, inner, seed):
    """Adapts the layer with plain LoRA."""
    import plain_lora

    layer.kernel.trainable = False
    layer.__class__ = plain_lora.lora_class(type(layer))
    layer.add_factors(rank)
    if hasattr(model, "_torch_params"):
        model._track_variables()
    return inner


METHODS = {
    "geolora": geolora,
    # What the default was before it looked at the width.
    "geolora, bound 0.06": functools.partial(geolora, max_update_ratio=0.06),
    "geolora, no bound": functools.partial(geolora, max_update_ratio=None),
    "plain_lora": lora,
}


def print_table():
    """Prints the best rate, its error, and the errors around it."""
    errors = {}
    for row in measuring.rows(RESULT):
        key = row["method"], row["width"], row["rank"]
        by_rate = errors.setdefault(key, {})
        by_rate.setdefault(row["rate"], []).append(row["error"])
    lines = []
    for (method, width, rank), by_rate in sorted(errors.items()):
        means = {r: statistics.mean(e) for r, e in sorted(by_rate.items())}
        best = min(means, key=means.get)
        cells = [f"{means[r]:.1e}" if r in means else "-" for r in RATES]
        lines.append([method, width, rank, f"{best:g}", *cells])
    header = ["method", "width", "rank", "best", *(f"{r:g}" for r in RATES)]
    print(measuring.markdown(header, lines))


if __name__ == "__main__":
    main()
