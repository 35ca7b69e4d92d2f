"""A Llama of 1.1 billion parameters in bfloat16, adapted and trained.

    python benchmarks/large_model.py run --backend jax
    python benchmarks/large_model.py run --backend torch --remat full
    python benchmarks/large_model.py table

The sizes are those of TinyLlama (22 layers of 2048, 5632 inside, 32 heads of
which 4 hold keys and values), the weights random, so that nothing has to be
downloaded. All 154 linear layers get an adapter. `--remat` computes
activations anew in the backward pass, by a `keras.RematScope` of that mode;
with Keras 3.15, layers of Llama as a whole (`full`) on torch only. Memory is
that of the whole process. Rows are added to
`benchmarks/results/large_model.jsonl`.
"""

import contextlib

import measuring

LLAMA = {
    "vocabulary_size": 32000,
    "num_layers": 22,
    "num_query_heads": 32,
    "num_key_value_heads": 4,
    "hidden_dim": 2048,
    "intermediate_dim": 5632,
}
RESULT = "large_model"


def main():
    """Parses the command line."""
    parser, _, run = measuring.command_line(__doc__)
    run.add_argument("--remat", choices=["full", "activations"])
    run.add_argument("--rank", type=int, default=8)
    run.add_argument("--batch", type=int, default=1)
    run.add_argument("--length", type=int, default=128)
    run.add_argument("--layers", type=int, default=LLAMA["num_layers"])
    run.add_argument("--steps", type=int, default=4)
    measuring.run_or_print(parser.parse_args(), measure, print_table)


def measure(args):
    """Builds, adapts and trains; adds a row."""
    import keras
    import numpy as np

    from keras_geolora import GeoLoRA

    keras.utils.set_random_seed(0)
    build_seconds, model = measuring.seconds(lambda: llama(args))
    built = measuring.resident_kib("VmRSS")
    measuring.forget_peak()
    adapt_seconds, _ = measuring.seconds(
        lambda: model.enable_geolora(rank=args.rank, max_rank=args.rank)
    )
    adapting_peak = measuring.resident_kib("VmHWM") - built
    model.compile(
        GeoLoRA(keras.optimizers.AdamW(1e-3)),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    rng = np.random.default_rng(0)
    shape = (args.batch, args.length)
    x = {
        "token_ids": rng.integers(32000, size=shape).astype("int32"),
        "padding_mask": np.ones(shape, "int32"),
    }
    y = np.roll(x["token_ids"], -1, axis=1)
    measuring.forget_peak()
    times, losses = [], []
    for _ in range(args.steps):
        taken, loss = measuring.seconds(
            lambda: float(model.train_on_batch(x, y, return_dict=True)["loss"])
        )
        times.append(taken)
        losses.append(loss)
    measuring.append(
        RESULT,
        {
            **measuring.environment(args.backend),
            **{k: v for k, v in vars(args).items() if k != "command"},
            "parameters": model.backbone.count_params(),
            "trained": sum(
                int(np.prod(v.shape)) for v in model.trainable_weights
            ),
            "build_seconds": build_seconds,
            "adapt_seconds": adapt_seconds,
            "adapting_peak_mib": adapting_peak // 1024,
            "model_mib": built // 1024,
            "peak_mib": measuring.resident_kib("VmHWM") // 1024,
            "first_step": times[0],
            "step": measuring.spread(times[1:]),
            "losses": losses,
        },
    )


def llama(args):
    """Returns a Llama with random weights in bfloat16."""
    import keras
    import keras_hub

    remat = keras.RematScope(args.remat) if args.remat else None
    with remat or contextlib.nullcontext():
        backbone = keras_hub.models.LlamaBackbone(
            **{**LLAMA, "num_layers": args.layers}, dtype="bfloat16"
        )
        return keras_hub.models.LlamaCausalLM(backbone, preprocessor=None)


def print_table():
    """Prints the last run of every backend."""
    last = {}
    for row in measuring.rows(RESULT):
        keys = ("backend", "remat", "batch", "length", "layers")
        last[tuple(row[key] for key in keys)] = row
    header = [
        "backend",
        "tokens",
        "remat",
        "parameters",
        "trained",
        "adapting",
        "first step",
        "step",
        "built, MiB",
        "largest, MiB",
    ]
    lines = [
        [
            row["backend"],
            f"{row['batch']} x {row['length']}",
            row["remat"] or "no",
            f"{row['parameters'] / 1e9:.2f} G",
            f"{row['trained'] / 1e6:.1f} M",
            f"{row['adapt_seconds']:.1f} s, +{row['adapting_peak_mib']} MiB",
            f"{row['first_step']:.0f} s",
            f"{row['step']['median']:.1f} s",
            row["model_mib"],
            row["peak_mib"],
        ]
        for _, row in sorted(last.items(), key=str)
    ]
    print(measuring.markdown(header, lines))


if __name__ == "__main__":
    main()
