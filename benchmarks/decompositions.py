"""What a geometric step could be made of: ways to do the same, side by side.

    python benchmarks/decompositions.py run --backend tensorflow
    python benchmarks/decompositions.py table

For 48 adapters of 768 x 768 with buffers of 8, in compiled functions, in turn:

- an orthonormal basis of the columns of 48 matrices of 768 x 16, `[U, K]`, by
  Householder QR, by the singular value decomposition, and by the two passes
  over Gram matrices that the library makes (`integrator.extend`);
- the singular values and vectors of 48 matrices of 16 x 16 by `svd`, and by
  `eigh` of their squares, which loses singular values below 3e-4 of the
  largest in float32;
- the library's way for all adapters at once, and in a loop over them.

On TensorFlow with and without XLA. Rows are added to
`benchmarks/results/decompositions.jsonl`. Takes a minute.
"""

import functools

import measuring

RESULT = "decompositions"
LAYERS, DIM, RANK, ROUNDS = 48, 768, 8, 20


def main():
    """Parses the command line."""
    parser, _, _ = measuring.command_line(__doc__)
    measuring.run_or_print(parser.parse_args(), measure, print_table)


def measure(args):
    """Times all ways, and adds a row."""
    import numpy as np
    from keras import ops

    rng = np.random.default_rng(0)
    U = np.linalg.qr(rng.normal(size=(LAYERS, DIM, RANK)))[0]
    K = rng.normal(size=(LAYERS, DIM, RANK))
    core = rng.normal(size=(LAYERS, 2 * RANK, 2 * RANK))
    U, K, core = (ops.convert_to_tensor(x, "float32") for x in (U, K, core))
    steps = {}
    for way, compiled in compilers(args.backend):
        for name, function, inputs in (
            ("basis, QR", by_qr, (U, K)),
            ("basis, SVD", by_svd, (U, K)),
            ("basis, Gram", by_gram, (U, K)),
            ("basis, Gram, loop", in_loop, (U, K)),
            ("core, svd", ops.svd, (core,)),
            ("core, eigh", by_eigh, (core,)),
        ):
            # These take XLA minutes to compile, or seconds to compute.
            if way != "XLA" or function not in (in_loop, by_svd):
                run = functools.partial(compiled(function), *inputs)
                steps[f"{name}, {way}"] = waiting(run)
    measuring.interleaved(steps, 2)  # compile and warm up
    times = measuring.interleaved(steps, ROUNDS)
    measuring.append(
        RESULT,
        {
            **measuring.environment(args.backend),
            "times": {k: measuring.spread(t) for k, t in times.items()},
        },
    )


def waiting(run):
    """Returns a function that waits for the result of another."""
    import keras
    from keras import ops

    return lambda: ops.convert_to_numpy(keras.tree.flatten(run())[0])


def by_qr(U, K):
    """An orthonormal basis of `[U, K]` by Householder reflections."""
    from keras import ops

    return ops.qr(ops.concatenate([U, K], axis=-1))[0]


def by_svd(U, K):
    """An orthonormal basis of `[U, K]` by singular vectors."""
    from keras import ops

    return ops.svd(ops.concatenate([U, K], axis=-1), full_matrices=False)[0]


def by_gram(U, K):
    """An orthonormal basis of `[U, K]` as the library finds it."""
    from keras import ops

    from keras_geolora.geometry import integrator

    active = ops.ones((U.shape[0], U.shape[-1]), dtype="bool")
    known = ops.ones((U.shape[0], 1, 1))
    extension = integrator.extend(U, active, K, known)
    return ops.matmul(extension.both, extension.mix)


def in_loop(U, K):
    """As `by_gram`, one adapter after the other."""
    from keras import ops

    return ops.concatenate(
        [by_gram(U[i : i + 1], K[i : i + 1]) for i in range(LAYERS)]
    )


def by_eigh(core):
    """Singular values and vectors from eigenvectors of the square."""
    from keras import ops

    squares, P = ops.eigh(ops.matmul(ops.swapaxes(core, -1, -2), core))
    return ops.matmul(core, P), ops.sqrt(ops.maximum(squares, 0.0)), P


def compilers(backend):
    """Yields the ways to compile a function."""
    if backend == "tensorflow":
        import tensorflow as tf

        yield "graph", tf.function
        yield "XLA", functools.partial(tf.function, jit_compile=True)
    elif backend == "jax":
        import jax

        yield "jit", jax.jit
    else:
        yield "eager", lambda function: function


def print_table():
    """Prints milliseconds, the last row of every backend."""
    last = {row["backend"]: row for row in measuring.rows(RESULT)}
    columns, names = [], {}
    for backend, row in last.items():
        for name, times in row["times"].items():
            name, way = name.rsplit(", ", 1)
            column = f"{backend}, {way}"
            if column not in columns:
                columns.append(column)
            names.setdefault(name, {})[column] = (
                f"{1e3 * times['median']:.1f} "
                f"({1e3 * times['min']:.1f} to {1e3 * times['max']:.1f})"
            )
    lines = [
        [name, *(found.get(column, "-") for column in columns)]
        for name, found in names.items()
    ]
    print(measuring.markdown(["ms", *columns], lines))


if __name__ == "__main__":
    main()
