"""Generation with an adapter, beside the merged model and the plain one.

    python benchmarks/generation.py run --backend jax --shape smollm2
    python benchmarks/generation.py table

A language model of KerasHub with random weights, all linear layers adapted with
rank 8, float32, greedy. Every round times `generate` of all kinds in turn, A B
A B, after a first call that compiles. The prompts fill half of the rows, and
nothing ends early. `merged` and `plain` have the same operations, so their
ratio shows the noise. Rows are added to `benchmarks/results/generation.jsonl`;
the ratio is the median of those of the rounds.
"""

import statistics

import measuring

# layers, hidden size, heads, key-value heads, inner size, vocabulary
SHAPES = {
    "smollm2": (30, 576, 9, 3, 1536, 49152),
    "wide": (4, 1024, 16, 4, 4096, 16384),
}
RANK = 8
RESULT = "generation"
KINDS = ("plain", "merged", "adapted")


def main():
    """Parses the command line."""
    parser, _, run = measuring.command_line(__doc__)
    run.add_argument("--shape", choices=SHAPES, default="smollm2")
    run.add_argument("--batch", type=int, default=1)
    run.add_argument("--length", type=int, default=64, help="of rows, tokens")
    run.add_argument("--rounds", type=int, default=7)
    run.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    measuring.run_or_print(parser.parse_args(), measure, print_table)


def measure(args):
    """Times `generate` of all kinds in turn."""
    import numpy as np

    rng = np.random.default_rng(0)
    vocabulary = SHAPES[args.shape][-1]
    shape = args.batch, args.length
    prompt = {
        "token_ids": rng.integers(vocabulary, size=shape).astype("int32"),
        "padding_mask": np.zeros(shape, "int32"),
    }
    prompt["padding_mask"][:, : args.length // 2] = 1
    calls, first, written = {}, {}, {}
    for kind in args.kinds:
        model = model_of(kind, args.shape)
        calls[kind] = lambda model=model: model.generate(
            prompt, stop_token_ids=None
        )["token_ids"]
        first[kind], written[kind] = measuring.seconds(calls[kind])
        print(f"{kind}: first call {first[kind]:.2f} s", flush=True)
    times = measuring.interleaved(calls, args.rounds)
    same = {
        kind: float(np.mean(written[kind] == written["merged"]))
        for kind in args.kinds
    }
    measuring.append(
        RESULT,
        {
            "shape": args.shape,
            "batch": args.batch,
            "length": args.length,
            "rank": RANK,
            **measuring.environment(args.backend),
            "first_call": first,
            "seconds": {k: measuring.spread(t) for k, t in times.items()},
            "ratio": {k: ratio(t, times["merged"]) for k, t in times.items()},
            "same_tokens_as_merged": same,
        },
    )


def model_of(kind, shape):
    """Returns a language model of a kind, the same weights every time."""
    import keras
    import keras_hub
    import numpy as np

    from keras_geolora.layers.tree import adapted_layers

    keras.utils.set_random_seed(0)
    layers, hidden, heads, few, inner, vocabulary = SHAPES[shape]
    backbone = keras_hub.models.Llama3Backbone(
        vocabulary_size=vocabulary,
        num_layers=layers,
        num_query_heads=heads,
        num_key_value_heads=few,
        hidden_dim=hidden,
        intermediate_dim=inner,
        tie_word_embeddings=True,
    )
    model = keras_hub.models.Llama3CausalLM(backbone, preprocessor=None)
    if kind != "plain":
        model.enable_geolora(rank=RANK, seed=0)
        for layer in adapted_layers(model).values():
            core = np.zeros(layer.adapter.S.shape, "float32")
            np.fill_diagonal(core[:RANK, :RANK], 0.1)
            layer.adapter.S.assign(core)
    if kind == "merged":
        model.merge_geolora(reversible=False)
    model.compile(sampler="greedy")
    return model


def ratio(times, others):
    """Returns the median of the ratios of the rounds."""
    pairs = zip(times, others, strict=True)
    return statistics.median(one / other for one, other in pairs)


def print_table():
    """Prints the last run of every backend, shape, batch and length."""
    keys = ("backend", "shape", "batch", "length")
    last = {
        tuple(row[key] for key in keys): row for row in measuring.rows(RESULT)
    }
    lines = [
        [
            *row_keys,
            *(f"{row['seconds'][kind]['median']:.2f}" for kind in KINDS),
            *(f"{row['ratio'][kind]:.3f}" for kind in ("plain", "adapted")),
        ]
        for row_keys, row in sorted(last.items())
    ]
    header = [
        *keys,
        *(f"{kind}, s" for kind in KINDS),
        "plain / merged",
        "adapted / merged",
    ]
    print(measuring.markdown(header, lines))


if __name__ == "__main__":
    main()
