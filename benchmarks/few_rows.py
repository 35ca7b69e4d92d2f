"""Predictions of a few rows with an adapter, beside the merged model.

    python benchmarks/few_rows.py run --backend jax
    python benchmarks/few_rows.py table

all-MiniLM-L6-v2 as a classifier, all linear layers adapted with rank 8 (buffers
of 16), one row of 1 to 256 tokens: as many rows go into every kernel. Every
round times `predict_on_batch` of all kinds in turn, A B A B, after calls that
compile:

- `merged` and `again`, the same operations, whose ratio shows the noise;
- `sum`: every call adds the update to the kernel, and multiplies once;
- `factors`: every call adds the product with the update to that with the
  kernel.

`layers/products.py` (`merging_pays`) chooses between the last two. Rows are
added to `benchmarks/results/few_rows.jsonl`; a ratio is the median of those of
the rounds.
"""

import functools
import pathlib
import statistics
import sys

import measuring
import numpy as np

sys.path.append(str(pathlib.Path(__file__).parents[1] / "examples"))
RANK = 8
TOKENS = (1, 4, 16, 64, 256)
RESULT = "few_rows"
# What `merging_pays` says in calls of a kind.
ANSWERS = {"sum": True, "factors": False}
KINDS = ("merged", "again", *ANSWERS)


def main():
    """Parses the command line."""
    parser, _, run = measuring.command_line(__doc__)
    run.add_argument("--rounds", type=int, default=25)
    run.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    measuring.run_or_print(parser.parse_args(), measure, print_table)


def measure(args):
    """Times predictions of every length, of all kinds in turn."""
    from keras_geolora.layers import adapted

    models = {kind: classifier(kind) for kind in KINDS}

    def predict(kind, inputs):
        # The choice is made while a call is traced, or in every eager one.
        adapted.merging_pays = lambda *sizes: ANSWERS.get(kind)
        return models[kind].predict_on_batch(inputs)

    for tokens in args.tokens:
        inputs = inputs_of(tokens)
        calls = {
            kind: functools.partial(predict, kind, inputs) for kind in KINDS
        }
        measuring.interleaved(calls, 2)
        times = measuring.interleaved(calls, args.rounds)
        measuring.append(
            RESULT,
            {
                **measuring.environment(args.backend),
                "rank": RANK,
                "tokens": tokens,
                "rounds": args.rounds,
                "seconds": {k: measuring.spread(t) for k, t in times.items()},
                "ratio": {
                    kind: statistics.median(
                        one / other
                        for one, other in zip(
                            found, times["merged"], strict=True
                        )
                    )
                    for kind, found in times.items()
                },
            },
        )


def classifier(kind):
    """Returns a MiniLM with an adapter that is not zero, or merged."""
    import assets
    import keras
    import keras_hub

    from keras_geolora.layers.tree import adapted_layers

    keras.utils.set_random_seed(0)
    model = keras_hub.models.TextClassifier.from_preset(
        assets.minilm_folder(), num_classes=2, preprocessor=None
    )
    model.enable_geolora(rank=RANK, seed=0)
    for layer in adapted_layers(model).values():
        core = np.zeros(layer.adapter.S.shape, "float32")
        np.fill_diagonal(core[:RANK, :RANK], 0.1)
        layer.adapter.S.assign(core)
    if kind not in ANSWERS:
        model.merge_geolora(reversible=False)
    return model


def inputs_of(tokens):
    """Returns a batch of one row."""
    ids = np.random.default_rng(0).integers(1000, 20000, (1, tokens))
    return {
        "token_ids": ids.astype("int32"),
        "segment_ids": np.zeros((1, tokens), "int32"),
        "padding_mask": np.ones((1, tokens), "int32"),
    }


def print_table():
    """Prints the last run of every backend and length."""
    last = {(x["backend"], x["tokens"]): x for x in measuring.rows(RESULT)}
    lines = [
        [
            measuring.BACKEND_NAMES[backend],
            tokens,
            f"{1e3 * row['seconds']['merged']['median']:.1f}",
            *(f"{row['ratio'][kind]:.2f}" for kind in KINDS[1:]),
        ]
        for (backend, tokens), row in sorted(last.items())
    ]
    ratios = [f"{kind} / merged" for kind in KINDS[1:]]
    header = ["backend", "rows", "merged, ms", *ratios]
    print(measuring.markdown(header, lines))


if __name__ == "__main__":
    main()
