"""The train step of a mixture of experts, side by side with PEFT and others.

    python benchmarks/experts.py run --backend torch
    python benchmarks/experts.py memory --backend torch
    python benchmarks/experts.py table

A Mixtral language model with random weights, rank 8 on experts and attention,
AdamW, float32, one thread. `run` times the steps of all methods in turn in one
process, A B A B, after two steps that do not count, by the clock and by the
time that the processor spends on the process, which other processes disturb
less. `memory` gives each method a process of its own and reports by how much
its memory rises above the built model; what is freed goes back at once.

| method | what trains |
| --- | --- |
| `frozen` | one vector of the first block, so that gradients go all the way |
| `full` | all weights |
| `keras_lora` | KerasHub's `enable_lora`, on query and value only |
| `geolora` | this library |

and on torch, on the same weights in `transformers`,

| method | what trains |
| --- | --- |
| `sparse_frozen` | as `frozen` |
| `sparse_peft` | LoRA of PEFT, experts by `target_parameters` |
| `dense_frozen`, `dense_peft` | the same, where all experts see all tokens |

KerasHub lets every expert compute every token and takes what the router chose;
`transformers` sends tokens to two experts of eight. So that the adapters are
compared and not these, `dense` gives `transformers` the products of KerasHub,
by its own interface for that. Rows are added to
`benchmarks/results/experts.jsonl`; ratios are those within one run.
"""

import argparse
import json
import os
import pathlib
import tempfile
import time

import measuring

# hidden size, layers, heads, heads of keys, inner size, experts
SHAPES = {
    "tiny": (64, 2, 4, 2, 128, 4),
    "mid": (512, 4, 8, 2, 1536, 8),
}
VOCABULARY, RANK, TOP = 1024, 8, 2
KERAS_METHODS = ("frozen", "full", "keras_lora", "geolora")
TORCH_METHODS = ("sparse_frozen", "sparse_peft", "dense_frozen", "dense_peft")
OPTIONS = ("shape", "batch", "length")
RESULT = "experts"
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TF_NUM_INTRAOP_THREADS": "1",
    "TF_NUM_INTEROP_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
}

# Memory that is freed goes back at once, and does not count.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "1048576"}


def main():
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "memory", "memory_of"):
        command = commands.add_parser(name)
        command.add_argument(
            "--backend", choices=measuring.BACKENDS, required=True
        )
        command.add_argument("--shape", choices=SHAPES, default="mid")
        command.add_argument("--batch", type=int, default=4)
        command.add_argument("--length", type=int, default=128)
        command.add_argument("--methods", nargs="+")
        command.add_argument("--rounds", type=int, default=6)
    commands.add_parser("table")
    args = parser.parse_args()
    if args.command == "table":
        print_tables()
        return
    if not args.methods:
        on_torch = args.backend == "torch"
        args.methods = KERAS_METHODS + (TORCH_METHODS if on_torch else ())
    os.environ.update(ONE_THREAD, KERAS_BACKEND=args.backend)
    {"run": run, "memory": memory, "memory_of": memory_of}[args.command](args)


def run(args):
    """Times the steps of all methods in turn."""
    steps, losses = {}, {}
    for method in args.methods:
        steps[method] = STEPS[method](args)
        losses[method] = float(steps[method]())
        steps[method]()
        print(f"{method}: first loss {losses[method]:.4f}", flush=True)
    clock = {method: [] for method in steps}
    processor = {method: [] for method in steps}
    for _ in range(args.rounds):
        for method, step in steps.items():
            start = time.process_time()
            clock[method].append(measuring.seconds(step)[0])
            processor[method].append(time.process_time() - start)
    measuring.append(
        RESULT,
        {
            "kind": "time",
            **settings(args),
            **measuring.environment(args.backend),
            "first_loss": losses,
            "step": {m: measuring.spread(t) for m, t in clock.items()},
            "processor": {m: measuring.spread(t) for m, t in processor.items()},
        },
    )


def settings(args):
    """Returns the options that rows are told apart by."""
    return {key: vars(args)[key] for key in OPTIONS}


def memory(args):
    """Measures the memory of each method in a process of its own."""
    options = {"backend": args.backend, **settings(args)}
    found = measuring.memory_alone(__file__, args.methods, options, GIVE_BACK)
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
    measuring.forget_peak()  # gives back what building the model needed
    print(json.dumps(measuring.memory_of_steps(step)))


def tokens_of(args):
    """Returns random tokens and, as labels, those that follow."""
    import numpy as np

    shape = args.batch, args.length + 1
    tokens = np.random.default_rng(0).integers(VOCABULARY, size=shape)
    return tokens[:, :-1], tokens[:, 1:]


def keras_step(prepare):
    """Returns what makes the step of a method on KerasHub's Mixtral."""

    def make(args):
        import keras
        import numpy as np

        keras.utils.set_random_seed(0)
        model = keras_model(args)
        optimizer = prepare(model)
        model.compile(
            optimizer=optimizer,
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            # Without it JAX would run operation by operation.
            jit_compile=args.backend == "jax",
        )
        tokens, labels = tokens_of(args)
        x = {
            "token_ids": tokens.astype("int32"),
            "padding_mask": np.ones(tokens.shape, "int32"),
        }
        return lambda: model.train_on_batch(x, labels, return_dict=True)["loss"]

    return make


def keras_model(args):
    """Returns KerasHub's Mixtral; on torch, with the weights of the other."""
    import keras_hub

    if args.backend == "torch":
        with tempfile.TemporaryDirectory() as folder:
            torch_model(args, "eager").save_pretrained(folder)
            config = pathlib.Path(folder) / "config.json"
            values = json.loads(config.read_text())
            values.setdefault("output_router_logits", False)
            config.write_text(json.dumps(values))
            backbone = keras_hub.models.MixtralBackbone.from_preset(folder)
    else:
        hidden, layers, heads, key_heads, inner, experts = SHAPES[args.shape]
        backbone = keras_hub.models.MixtralBackbone(
            vocabulary_size=VOCABULARY,
            num_layers=layers,
            num_query_heads=heads,
            num_key_value_heads=key_heads,
            hidden_dim=hidden,
            intermediate_dim=inner,
            num_experts=experts,
            top_k=TOP,
        )
    return keras_hub.models.MixtralCausalLM(backbone, preprocessor=None)


def adamw():
    """Returns the optimizer of all methods."""
    import keras

    return keras.optimizers.AdamW(1e-4)


def prepare_frozen(model):
    """Trains one vector below all matrices; returns the optimizer."""
    model.trainable = False
    block = model.backbone.get_layer("transformer_layer_0")
    norm = block._self_attention_layernorm
    for part in (model, model.backbone, block, norm):
        part._trainable = True
    norm.scale.trainable = True
    return adamw()


def prepare_full(model):
    """Trains all weights; returns the optimizer."""
    return adamw()


def prepare_keras_lora(model):
    """Enables KerasHub's LoRA; returns the optimizer."""
    model.backbone.enable_lora(RANK)
    return adamw()


def prepare_geolora(model):
    """Adapts experts and attention; returns the optimizer."""
    from keras_geolora import GeoLoRA

    targets = r".*self_attention/.*|.*experts/.*"
    model.enable_geolora(rank=RANK, max_rank=RANK, targets=targets)
    return GeoLoRA(adamw())


def torch_model(args, experts):
    """Returns the same model of `transformers`."""
    import torch
    import transformers
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register("dense", dense_experts)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    hidden, layers, heads, key_heads, inner, count = SHAPES[args.shape]
    config = transformers.MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        intermediate_size=inner,
        num_local_experts=count,
        num_experts_per_tok=TOP,
        sliding_window=512,
        experts_implementation=experts,
    )
    return transformers.MixtralForCausalLM(config)


def dense_experts(self, hidden_states, top_k_index, top_k_weights):
    """Computes all tokens by all experts, as KerasHub does."""
    import torch

    both = torch.einsum("th,emh->etm", hidden_states, self.gate_up_proj)
    gate, up = both.chunk(2, dim=-1)
    hidden = self.act_fn(gate) * up
    out = torch.einsum("eti,ehi->eth", hidden, self.down_proj)
    chosen = torch.zeros(len(hidden_states), self.num_experts)
    chosen = chosen.scatter(1, top_k_index, top_k_weights)
    return (out * chosen.T[:, :, None]).sum(0)


def torch_step(experts, prepare):
    """Returns what makes the step of a method on Mixtral of `transformers`."""

    def make(args):
        import torch

        model = prepare(torch_model(args, experts))
        model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, 1e-4)
        tokens, labels = map(torch.tensor, tokens_of(args))

        def step():
            logits = model(input_ids=tokens, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels.flatten()
            )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return float(loss.detach())

        return step

    return make


def torch_frozen(model):
    """Trains one vector below all matrices."""
    model.requires_grad_(False)
    model.model.layers[0].input_layernorm.weight.requires_grad_(True)
    return model


def torch_peft(model):
    """Adds LoRA to experts and attention."""
    import peft

    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=RANK,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    return peft.get_peft_model(model, config)


STEPS = {
    "frozen": keras_step(prepare_frozen),
    "full": keras_step(prepare_full),
    "keras_lora": keras_step(prepare_keras_lora),
    "geolora": keras_step(prepare_geolora),
    "sparse_frozen": torch_step("grouped_mm", torch_frozen),
    "sparse_peft": torch_step("grouped_mm", torch_peft),
    "dense_frozen": torch_step("dense", torch_frozen),
    "dense_peft": torch_step("dense", torch_peft),
}


def print_tables():
    """Prints the last run of every backend and setting."""
    last = {}
    for row in measuring.rows(RESULT):
        keys = ("kind", "backend", *OPTIONS)
        last[tuple(row[key] for key in keys)] = row
    for key in sorted(last):
        print_table(last[key])


def print_table(row):
    """Prints one run: a line for every method."""
    shape = f"{row['shape']}, {row['batch']} x {row['length']} tokens"
    print(f"\n{row['backend']}, {shape}\n")
    if row["kind"] == "memory":
        found = {m: x["rise"] for m, x in row["mib"].items()}
        lines = [[m, x, *shares(found, m)] for m, x in found.items()]
        print(measuring.markdown(["", "MiB", *SHARES], lines))
        return
    found = {m: x["median"] for m, x in row["processor"].items()}
    lines = [
        [m, f"{row['step'][m]['median']:.2f}", f"{x:.2f}", *shares(found, m)]
        for m, x in found.items()
    ]
    print(measuring.markdown(["", "clock", "processor", *SHARES], lines))


SHARES = ("above frozen", "GeoLoRA / this", "the same above frozen")


def shares(found, method):
    """Returns what a method costs above its model, and GeoLoRA's shares."""
    kind = method.rpartition("_")[0] if method in TORCH_METHODS else ""
    base = found[f"{kind}_frozen" if kind else "frozen"]
    above, ours = found[method] - base, found["geolora"] - found["frozen"]
    if method.endswith("frozen") or method == "geolora":
        return f"{above:.2f}", "", ""
    whole = f"{found['geolora'] / found[method]:.2f}"
    apart = f"{ours / above:.2f}" if above > 0 else "-"
    return f"{above:.2f}", whole, apart


if __name__ == "__main__":
    main()
