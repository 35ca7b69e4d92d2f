"""One training, on one replica or on several: what each of them ends with.

    KERAS_BACKEND=torch python benchmarks/distributed.py --engine ddp \\
        --replicas 2 --steps 50 --out folder

Starts as many processes as the engine takes (`engines/`), trains a small
network with three adapted layers and a plain one on rows that are the same for
every engine, and writes for each replica the variables of the model and of the
optimizer, `folder/replica-0.npz`, and `folder/process-0.json` with ranks,
skipped steps and, with `--count`, the bytes that one step exchanges. The tests
compare these files.
"""

import argparse
import contextlib
import importlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np

INPUTS, OUTPUTS = 12, 4


def main():
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", required=True)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--first-step", type=int, default=0)
    parser.add_argument("--batch", type=int, default=16, help="of all replicas")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--accumulate", type=int, help="steps of an update")
    parser.add_argument("--loss-scale", action="store_true")
    parser.add_argument("--budget", type=int, help="ranks of all adapters")
    parser.add_argument(
        "--poison", type=int, help="step in which one row is not finite"
    )
    parser.add_argument("--load", type=pathlib.Path, help="model to go on with")
    parser.add_argument("--save", type=pathlib.Path, help="model, at the end")
    parser.add_argument("--count", action="store_true", help="bytes of a step")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--limit", type=float, default=300, help="seconds")
    parser.add_argument("--process", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--addresses", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    engine = find_engine(args.engine)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.process is None:
        count = engine.processes(args.replicas)
        args.addresses = free_addresses(count)
        if count > 1:
            start_all(args.addresses, args.limit)
            return
        args.process = 0
    # Nothing is left behind, even if the process that started it was killed.
    signal.alarm(int(args.limit) + 10)
    args.address = args.addresses[0]
    train(engine(args), args)


def find_engine(name):
    """Returns the class of an engine of the backend that Keras will use."""
    backend = os.environ.get("KERAS_BACKEND", "tensorflow")
    engines = importlib.import_module(f"engines.{backend}_engines").ENGINES
    if name not in engines:
        raise SystemExit(
            f"No engine {name!r} on {backend}; there are {sorted(engines)}"
        )
    return engines[name]


def start_all(addresses, limit):
    """Starts this script once for each address, and waits for all.

    When one fails or time is over, the others are stopped, with whatever
    they have started.
    """
    command = [sys.executable, *sys.argv, "--addresses", *addresses]
    running = [
        subprocess.Popen(
            [*command, "--process", str(i)], start_new_session=True
        )
        for i in range(len(addresses))
    ]
    try:
        wait_for_all(running, limit)
    finally:
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for_all(running, limit):
    """Returns when all processes are done; raises when the first one fails.

    The others may wait for that one until the end of time.
    """
    over = time.monotonic() + limit
    while True:
        codes = [process.poll() for process in running]
        for i, code in enumerate(codes):
            if code:
                raise SystemExit(f"Process {i} ended with code {code}.")
        if None not in codes:
            return
        if time.monotonic() > over:
            left = [i for i, code in enumerate(codes) if code is None]
            raise SystemExit(f"Processes {left} took over {limit} seconds.")
        time.sleep(0.05)


def free_addresses(count):
    """Returns different addresses on loopback where nobody listens."""
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{x.getsockname()[1]}" for x in listeners]


def train(engine, args):
    """Trains in one process, and writes what its replicas hold."""
    import keras

    import keras_geolora  # noqa: F401, which knows how to load its models

    with engine.scope():
        if args.load:
            model = keras.saving.load_model(args.load)
        else:
            model = make_model(args)
    x, y = rows(args)
    sizes = engine.exchanged(model, x, y, args.batch) if args.count else None
    engine.fit(model, x, y, args.batch)
    write(engine, model, args, sizes)
    if args.save and args.process == 0:
        model.save(args.save)
    engine.close()


def make_model(args):
    """Returns a compiled network, the same in every process."""
    import keras

    import keras_geolora  # noqa: F401, for the methods of models
    from keras_geolora import GeoLoRA

    keras.utils.set_random_seed(0)
    dense = keras.layers.Dense
    model = keras.Sequential(
        [
            keras.Input((INPUTS,)),
            dense(args.width, "relu", name="first"),
            dense(args.width, "tanh", name="second"),
            dense(args.width, "tanh", name="third"),
            dense(OUTPUTS, name="logits"),
        ],
        name="network",
    )
    model.enable_geolora(
        # Of fewer directions, rounding would choose which ones come first.
        rank=4,
        max_rank=8,
        targets=["first", "second", "third"],
        # It would take numbers that are not finite.
        modules_to_save="logits" if args.poison is None else None,
        seed=0,
    )
    optimizer = GeoLoRA(
        keras.optimizers.Adam(
            1e-2, gradient_accumulation_steps=args.accumulate
        ),
        rank_budget=args.budget,
    )
    if args.loss_scale:
        optimizer = keras.optimizers.LossScaleOptimizer(
            optimizer, initial_scale=2.0**8, dynamic_growth_steps=20
        )
    model.compile(optimizer=optimizer, loss="mse")
    return model


def rows(args):
    """Returns the rows of the steps to take, in their order."""
    rng = np.random.default_rng(0)
    count = (args.first_step + args.steps) * args.batch
    x = rng.normal(size=(count, INPUTS)).astype("float32")
    y = np.tanh(x @ rng.normal(size=(INPUTS, OUTPUTS))).astype("float32")
    if args.poison is not None:
        # One row of one replica; a layer might hide numbers of `x`.
        y[args.poison * args.batch] = np.nan
    first = args.first_step * args.batch
    return x[first:], y[first:]


def write(engine, model, args, sizes):
    """Writes the variables of every replica, and what else came out."""
    import keras

    from keras_geolora.optimizer.geolora import find_geolora

    variables = {v.path: v for v in model.variables}
    for i, variable in enumerate(model.optimizer.variables):
        variables[f"optimizer/{i}/{variable.path}"] = variable
    held = {}
    for path, variable in variables.items():
        for replica, array in engine.replicas(variable).items():
            held.setdefault(replica, {})[path] = array
    for replica, arrays in held.items():
        np.savez(args.out / f"replica-{replica}.npz", **arrays)
    adapted = [layer for layer in model.layers if hasattr(layer, "adapter")]
    skipped = find_geolora(model.optimizer).skipped_steps
    found = {
        "ranks": [layer.rank for layer in adapted],
        "skipped_steps": int(keras.ops.convert_to_numpy(skipped)),
        "exchanged": sizes,
    }
    file = args.out / f"process-{args.process}.json"
    file.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
