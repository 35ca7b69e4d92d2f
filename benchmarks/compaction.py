"""What `compact_geolora` saves: parameters, memory and time.

    python benchmarks/compaction.py run --backend jax
    python benchmarks/compaction.py table

A BERT classifier of the shape of MiniLM, random weights, buffers of 32
columns. A budget of 4 ranks per layer is spent in a few steps; then the buffers
are cut to multiples of 8. Times are medians of training steps and predictions
before and after, in one process, and of predictions when merged. Memory is what
the arrays of factors and slots take. Rows are added to
`benchmarks/results/compaction.jsonl`.
"""

import measuring
import train_step

MAX_RANK, BUDGET, MULTIPLE, BATCH = 32, 4, 8, 8
RESULT = "compaction"


def main():
    """Parses the command line."""
    parser, _, run = measuring.command_line(__doc__)
    run.add_argument("--steps", type=int, default=20)
    measuring.run_or_print(parser.parse_args(), measure, print_table)


def measure(args):
    """Trains, compacts, trains; adds a row."""
    import keras
    import numpy as np

    from keras_geolora import GeoLoRA
    from keras_geolora.layers.tree import adapted_layers

    keras.utils.set_random_seed(0)
    model = train_step.classifier("minilm")
    model.enable_geolora(rank=8, max_rank=MAX_RANK)
    layers = adapted_layers(model)
    model.compile(
        GeoLoRA(keras.optimizers.AdamW(1e-4), rank_budget=BUDGET * len(layers)),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    args.batch = BATCH
    x, y = train_step.batch_of(args)

    def step():
        return float(model.train_on_batch(x, y, return_dict=True)["loss"])

    def predict():
        return model.predict_on_batch(x)

    def time(function):
        function(), function()
        times = [measuring.seconds(function)[0] for _ in range(args.steps)]
        return measuring.spread(times)

    def look():
        times = {"step": time(step), "prediction": time(predict)}
        factors = [v for v in model.trainable_variables if v.name in "USV"]
        state = [*factors, *model.optimizer.variables]
        return {
            **times,
            "buffers": sum(int(np.prod(v.shape)) for v in factors),
            "state_mib": sum(int(np.prod(v.shape)) for v in state) / 2**18,
            "max_rank": sorted({x.adapter.max_rank for x in layers.values()}),
            "mean_rank": float(np.mean([x.rank for x in layers.values()])),
        }

    before = look()
    seconds, _ = measuring.seconds(lambda: model.compact_geolora(MULTIPLE))
    first = measuring.seconds(step)[0]
    after = look()
    model.merge_geolora()
    measuring.append(
        RESULT,
        {
            **measuring.environment(args.backend),
            "before": before,
            "after": after,
            "merged_prediction": time(predict),
            "compacting": seconds,
            "first_step_after": first,
        },
    )


def print_table():
    """Prints the last run of every backend."""
    last = {row["backend"]: row for row in measuring.rows(RESULT)}
    header = [
        "backend",
        "mean rank",
        "buffers",
        "factors' parameters",
        "factors and slots, MiB",
        "step, s",
        "prediction (merged), s",
        "compacting and first step, s",
    ]

    def both(row, cell):
        return " -> ".join(cell(row[when]) for when in ("before", "after"))

    lines = [
        [
            backend,
            both(row, lambda x: f"{x['mean_rank']:.1f}"),
            both(row, lambda x: "/".join(map(str, x["max_rank"]))),
            both(row, lambda x: f"{x['buffers'] / 1e6:.2f} M"),
            both(row, lambda x: f"{x['state_mib']:.1f}"),
            both(row, lambda x: f"{x['step']['median']:.3f}"),
            both(row, lambda x: f"{x['prediction']['median']:.3f}")
            + f" ({row['merged_prediction']['median']:.3f})",
            f"{row['compacting']:.1f} and {row['first_step_after']:.1f}",
        ]
        for backend, row in sorted(last.items())
    ]
    print(measuring.markdown(header, lines))


if __name__ == "__main__":
    main()
