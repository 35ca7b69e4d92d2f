"""The geometric step of a model in parts: spread factors or replicated ones.

    python benchmarks/geometric_step_in_parts.py run --backend jax
    python benchmarks/geometric_step_in_parts.py table

Times `optimizer.apply` of `GeoLoRA(AdamW)` under a `ModelParallel` distribution
over `--devices` devices, with the layouts that adapters get by themselves and
with replicated ones, in turn, on the layers of one or more blocks of a
transformer: kernels spread by columns, the next one by rows. On a processor the
devices are virtual: they share its cores, so that work which all of them do
takes as many times as long as on devices of their own, and what they exchange
costs next to nothing. The bytes of what a step exchanges, and of the state on
one device, hold on any device. Rows are added to
`benchmarks/results/geometric_step_in_parts.jsonl`.
"""

import os

import measuring

RESULT = "geometric_step_in_parts"
WAYS = ("spread", "replicated")


def main():
    """Parses the command line."""
    parser, _, run = measuring.command_line(__doc__)
    run.add_argument("--widths", nargs="+", type=int, default=[384, 1024, 4096])
    run.add_argument("--blocks", type=int, default=2)
    run.add_argument("--max-ranks", nargs="+", type=int, default=[16, 32])
    run.add_argument("--devices", type=int, default=4)
    run.add_argument("--rounds", type=int, default=10)
    measuring.run_or_print(parser.parse_args(), measure, print_table)


def measure(args):
    """Times every width."""
    # All are looked at once; accelerators do not mind.
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "")
        + f" --xla_force_host_platform_device_count={args.devices}"
    )
    os.environ.setdefault("PJRT_NPROC", str(4 * args.devices))
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    for width in args.widths:
        for max_rank in args.max_ranks:
            measure_setting(args, width, max_rank)


def measure_setting(args, width, max_rank):
    """Times both ways, and adds a row."""
    steps, exchanged, held = {}, {}, {}
    for way in WAYS:
        steps[way], exchanged[way], held[way] = prepare(
            args, width, max_rank, way
        )
    measuring.interleaved(steps, 2)  # warm up
    times = measuring.interleaved(steps, args.rounds)
    measuring.append(
        RESULT,
        {
            "width": width,
            "blocks": args.blocks,
            "max_rank": max_rank,
            "devices": args.devices,
            **measuring.environment(args.backend),
            **{way: measuring.spread(times[way]) for way in WAYS},
            "exchanged": exchanged,
            "held": held,
        },
    )


def prepare(args, width, max_rank, way):
    """Returns a step, the bytes that it exchanges, and those of its state."""
    import keras

    mesh = keras.distribution.DeviceMesh(
        (1, args.devices),
        ["batch", "model"],
        keras.distribution.list_devices()[: args.devices],
    )
    layout_map = keras.distribution.LayoutMap(mesh)
    layout_map[".*(query|key|value|up)/kernel"] = (None, "model")
    layout_map[".*(output|down)/kernel"] = ("model", None)
    if way == "replicated":
        layout_map[".*/adapter/[USV]"] = (None, None)
    distribution = keras.distribution.ModelParallel(layout_map=layout_map)
    with distribution.scope():
        return compiled(*adapters(args, width, max_rank))


def adapters(args, width, max_rank):
    """Returns a GeoLoRA, built, and the factors of all layers."""
    import keras

    import keras_geolora

    keras.utils.set_random_seed(0)
    shapes = {name: (width, width) for name in ("query", "key", "value")}
    shapes |= {"output": (width, width)}
    shapes |= {"up": (width, 4 * width), "down": (4 * width, width)}
    variables = []
    for block in range(args.blocks):
        for name, (rows, columns) in shapes.items():
            with keras.name_scope(f"block_{block}"):
                layer = keras_geolora.GeoLoRADense(
                    columns,
                    rank=max_rank,
                    max_rank=max_rank,
                    name=name,
                )
                layer.build((None, rows))
            adapter = layer.adapter
            variables += adapter.factors
    optimizer = keras_geolora.GeoLoRA(keras.optimizers.AdamW(1e-3))
    optimizer.build(variables)
    return optimizer, variables


def compiled(optimizer, variables):
    """Returns a step that keeps its layouts, as training does, and bytes."""
    import jax
    import keras
    import numpy as np
    from engines.jax_engines import sizes_of_collectives

    state = [
        [v.value for v in variables],
        [v.value for v in optimizer.variables],
    ]
    shardings = jax.tree.map(lambda value: value.sharding, state)
    rng = np.random.default_rng(0)
    gradients = [
        keras.distribution.distribute_tensor(
            rng.normal(size=v.shape).astype("float32"), v.value.sharding
        )
        for v in variables
    ]

    def apply(state, gradients):
        values, slots = state
        return optimizer.stateless_apply(slots, gradients, values)

    apply = jax.jit(apply, donate_argnums=0, out_shardings=tuple(shardings))
    apply = apply.lower(state, gradients).compile()

    def step():
        state[:] = jax.block_until_ready(apply(state, gradients))

    held = sum(
        value.addressable_shards[0].data.nbytes
        for values in state
        for value in values
    )
    return step, sum(sizes_of_collectives(apply.as_text())), held


def print_table():
    """Prints milliseconds, and MB exchanged and held, of both ways."""
    last = {}
    for row in measuring.rows(RESULT):
        setting = row["width"], row["max_rank"]
        last[row["device"], row["devices"], *setting] = row
    lines = [
        [
            f"{row['width']} x {row['blocks']}",
            row["max_rank"],
            row["devices"],
            *(cell(row, way) for way in WAYS),
        ]
        for _, row in sorted(last.items())
    ]
    print("Geometric step with AdamW: ms (MB exchanged, MB on a device)\n")
    print(
        measuring.markdown(
            ["width x blocks", "max_rank", "devices", *WAYS], lines
        )
    )


def cell(row, way):
    """Formats one timing."""
    times = row[way]
    return (
        f"{1e3 * times['median']:.1f}, {1e3 * times['min']:.1f} to "
        f"{1e3 * times['max']:.1f} ({row['exchanged'][way] / 1e6:.2f}, "
        f"{row['held'][way] / 1e6:.1f})"
    )


if __name__ == "__main__":
    main()
