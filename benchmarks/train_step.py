"""The whole train step, side by side: GeoLoRA, LoRA, AdaLoRA, full training.

    python benchmarks/train_step.py run --backend jax --shape wide
    python benchmarks/train_step.py memory --backend jax --shape wide
    python benchmarks/train_step.py table

A BERT classifier with random weights, all linear layers of the backbone
adapted with rank 8, AdamW, 128 tokens, float32. `run` times `train_on_batch`
of all methods in turn in one process, A B A B, after a first step (with
compilation, timed apart) and a second. GeoLoRA begins as if 100 steps were
done: by then retractions are 20 steps apart. `memory` gives each method a
process of its own and reports by how much the memory of the process rises above
the built model, and the largest size of the process. On torch, `peft_lora` and
`peft_adalora` train the same architecture of `transformers`, AdaLoRA with its
allocator called in every step, as its manual says. Rows are added to
`benchmarks/results/train_step.jsonl`; ratios are those within one run.
"""

import argparse
import json
import os

import measuring

# hidden size, layers, heads, inner size, batch
SHAPES = {
    "minilm": (384, 6, 12, 1536, 32),
    "bert_base": (768, 12, 12, 3072, 8),
    "wide": (1024, 2, 16, 4096, 8),
}
LENGTH, VOCABULARY, RANK, CLASSES = 128, 30522, 8, 2
# So many updates count as done, at which retractions are as rare as they get.
UPDATES = 101
KERAS_METHODS = ("geolora", "plain_lora", "keras_lora", "full")
PEFT_METHODS = ("peft_lora", "peft_adalora")
OPTIONS = ("shape", "batch", "max_rank", "jit", "form")
RESULT = "train_step"


def main():
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "memory", "memory_of"):
        command = commands.add_parser(name)
        command.add_argument(
            "--backend", choices=measuring.BACKENDS, required=True
        )
        command.add_argument("--shape", choices=SHAPES, default="minilm")
        command.add_argument("--methods", nargs="+")
        command.add_argument("--batch", type=int)
        command.add_argument("--rounds", type=int, default=10)
        command.add_argument("--max-rank", type=int, default=RANK)
        command.add_argument(
            "--form", choices=["auto", "merged", "apart"], default="auto"
        )
        command.add_argument(
            "--jit", choices=["auto", "yes", "no"], default="auto"
        )
    commands.add_parser("table")
    args = parser.parse_args()
    if args.command == "table":
        print_tables()
        return
    if not args.methods:
        on_torch = args.backend == "torch"
        args.methods = KERAS_METHODS + (PEFT_METHODS if on_torch else ())
    args.batch = args.batch or SHAPES[args.shape][-1]
    os.environ["KERAS_BACKEND"] = args.backend
    {"run": run, "memory": memory, "memory_of": memory_of}[args.command](args)


def run(args):
    """Times the steps of all methods in turn."""
    steps, first, second = {}, {}, {}
    for method in args.methods:
        steps[method] = STEPS[method](args)
        first[method] = measuring.seconds(steps[method])[0]
        second[method] = measuring.seconds(steps[method])[0]
        print(f"{method}: first step {first[method]:.2f} s", flush=True)
    times = measuring.interleaved(steps, args.rounds)
    measuring.append(
        RESULT,
        {
            "kind": "time",
            **settings(args),
            **measuring.environment(args.backend),
            "first_step": first,
            "second_step": second,
            "step": {m: measuring.spread(t) for m, t in times.items()},
        },
    )


def settings(args):
    """Returns the options that rows are told apart by."""
    return {key: vars(args)[key] for key in OPTIONS}


def memory(args):
    """Measures the memory of each method in a process of its own."""
    options = {"backend": args.backend, **settings(args)}
    found = measuring.memory_alone(__file__, args.methods, options)
    measuring.append(
        RESULT,
        {
            "kind": "memory",
            **settings(args),
            **measuring.environment(args.backend),
            "mib": found,
        },
    )


def memory_of(args):
    """Prints the memory of one method, as JSON in the last line."""
    (method,) = args.methods
    step = STEPS[method](args)
    print(json.dumps(measuring.memory_of_steps(step)))


def keras_step(prepare):
    """Returns what makes the step of a method on a Keras model."""

    def make(args):
        import keras

        keras.utils.set_random_seed(0)
        model = classifier(args.shape)
        optimizer = prepare(model, args)
        jit = {"auto": "auto", "yes": True, "no": False}[args.jit]
        model.compile(
            optimizer=optimizer,
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            jit_compile=jit,
        )
        optimizer.build(model.trainable_variables)
        optimizer.iterations.assign(UPDATES)
        x, y = batch_of(args)
        return lambda: model.train_on_batch(x, y, return_dict=True)["loss"]

    return make


def classifier(shape):
    """Returns a BERT classifier with random weights."""
    import keras_hub

    hidden, layers, heads, inner, _ = SHAPES[shape]
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=VOCABULARY,
        num_layers=layers,
        num_heads=heads,
        hidden_dim=hidden,
        intermediate_dim=inner,
        max_sequence_length=LENGTH,
    )
    return keras_hub.models.BertTextClassifier(
        backbone, num_classes=CLASSES, preprocessor=None
    )


def batch_of(args):
    """Returns token ids, masks and segments, and labels."""
    import numpy as np

    rng = np.random.default_rng(0)
    shape = (args.batch, LENGTH)
    return {
        "token_ids": rng.integers(VOCABULARY, size=shape).astype("int32"),
        "segment_ids": np.zeros(shape, "int32"),
        "padding_mask": np.ones(shape, "int32"),
    }, rng.integers(CLASSES, size=args.batch)


def adamw():
    """Returns the optimizer of all methods."""
    import keras

    return keras.optimizers.AdamW(1e-4)


def prepare_geolora(model, args):
    """Adapts all linear layers; returns the optimizer."""
    from keras_geolora import GeoLoRA
    from keras_geolora.layers import adapted

    if args.form != "auto":
        adapted.merging_pays = lambda *sizes: args.form == "merged"
    model.enable_geolora(rank=RANK, max_rank=args.max_rank)
    return GeoLoRA(adamw())


def prepare_plain_lora(model, args):
    """Adds two factors to the same layers; returns the optimizer."""
    from plain_lora import enable_plain_lora

    enable_plain_lora(model, args.max_rank)
    return adamw()


def prepare_keras_lora(model, args):
    """Enables Keras' own LoRA in the same layers; returns the optimizer."""
    from contenders import enable_keras_lora

    enable_keras_lora(model, args.max_rank)
    return adamw()


def prepare_full(model, args):
    """Trains all weights; returns the optimizer."""
    return adamw()


def peft_step(config_of):
    """Returns what makes the step of a method of Hugging Face PEFT."""

    def make(args):
        import peft
        import torch
        import transformers

        torch.manual_seed(0)
        hidden, layers, heads, inner, _ = SHAPES[args.shape]
        config = transformers.BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=inner,
            max_position_embeddings=LENGTH,
            num_labels=CLASSES,
        )
        model = peft.get_peft_model(
            transformers.BertForSequenceClassification(config), config_of(args)
        )
        model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, 1e-4)
        x, y = batch_of(args)
        x = {
            "input_ids": torch.tensor(x["token_ids"]).long(),
            "token_type_ids": torch.tensor(x["segment_ids"]).long(),
            "attention_mask": torch.tensor(x["padding_mask"]).long(),
            "labels": torch.tensor(y),
        }
        allocate = getattr(model.base_model, "update_and_allocate", None)
        count = 0

        def step():
            nonlocal count
            loss = model(**x).loss
            loss.backward()
            optimizer.step()
            if allocate is not None:
                allocate(count)
            optimizer.zero_grad()
            count += 1
            return float(loss.detach())

        return step

    return make


# The linear layers of the encoder, as `all-linear` finds them in Keras.
PEFT_OPTIONS = {
    "target_modules": r".*encoder.*(query|key|value|dense)|.*pooler\.dense",
    "task_type": "SEQ_CLS",
    "lora_alpha": 16,
}


def lora_config(args):
    """Returns PEFT's LoRA of the same rank."""
    import peft

    return peft.LoraConfig(r=args.max_rank, **PEFT_OPTIONS)


def adalora_config(args):
    """Returns PEFT's AdaLoRA, which prunes from 12 to 8 from step 2 on."""
    import peft

    return peft.AdaLoraConfig(
        init_r=args.max_rank * 3 // 2,
        target_r=args.max_rank,
        tinit=1,
        tfinal=100,
        deltaT=1,
        total_step=1000,
        **PEFT_OPTIONS,
    )


STEPS = {
    "geolora": keras_step(prepare_geolora),
    "plain_lora": keras_step(prepare_plain_lora),
    "keras_lora": keras_step(prepare_keras_lora),
    "full": keras_step(prepare_full),
    "peft_lora": peft_step(lora_config),
    "peft_adalora": peft_step(adalora_config),
}


def print_tables():
    """Prints the last run of every backend, shape and setting."""
    last = {}
    for row in measuring.rows(RESULT):
        keys = ("kind", "backend", *OPTIONS)
        last[tuple(row[key] for key in keys)] = row
    last = [last[key] for key in sorted(last)]
    times = [row for row in last if row["kind"] == "time"]
    methods = KERAS_METHODS + PEFT_METHODS
    print("\nSeconds per step, median (smallest to largest)\n")
    print_table(times, methods, lambda row, m: seconds_cell(row["step"].get(m)))
    print("\nGeoLoRA's step as a share of the other's\n")
    print_table(
        times,
        methods[1:],
        lambda row, m: ratio(row["step"], m, lambda found: found["median"]),
    )
    print("\nThe first step, with compilation, as a share of the other's\n")
    print_table(
        times,
        methods[1:],
        lambda row, m: ratio(row["first_step"], m, lambda found: found),
    )
    memories = [row for row in last if row["kind"] == "memory"]
    print("\nMemory above the built model, MiB (whole process)\n")
    print_table(memories, methods, lambda row, m: mib_cell(row["mib"].get(m)))
    print("\nGeoLoRA's memory above the built model as a share\n")
    print_table(
        memories,
        methods[1:],
        lambda row, m: ratio(row["mib"], m, lambda found: found["rise"]),
    )


def print_table(found, methods, cell):
    """Prints a line for every row, a column for every method."""
    lines = [
        [
            row["backend"],
            f"{row['shape']} x {row['batch']}, {row['max_rank']}"
            + ("" if row["jit"] == "auto" else f", jit {row['jit']}")
            + ("" if row["form"] == "auto" else f", {row['form']}"),
            *(cell(row, method) for method in methods),
        ]
        for row in found
    ]
    print(measuring.markdown(["backend", "model", *methods], lines))


def seconds_cell(found):
    """Formats median, smallest and largest."""
    if found is None:
        return "-"
    return f"{found['median']:.3f} ({found['min']:.3f} to {found['max']:.3f})"


def mib_cell(found):
    """Formats the rise and the size of the process."""
    return "-" if found is None else f"{found['rise']} ({found['process']})"


def ratio(found, method, number):
    """Formats GeoLoRA's number divided by that of another method."""
    if method not in found:
        return "-"
    return f"{number(found['geolora']) / number(found[method]):.2f}"


if __name__ == "__main__":
    main()
