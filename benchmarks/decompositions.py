"""Times the small decompositions of a geometric step.

    python benchmarks/decompositions.py --backend tensorflow

Singular values of 36 matrices of 32 x 32 and eigenvalues of 36 of 16 x 16, the
size of MiniLM at `max_rank=16`, in a compiled function: the median, smallest
and largest of 20 runs after two that warm up. On TensorFlow with and without
XLA.
"""

import argparse
import functools
import os
import statistics
import time


def main(backend):
    """Prints a line for each decomposition."""
    os.environ["KERAS_BACKEND"] = backend
    import numpy as np
    from keras import ops

    rng = np.random.default_rng(0)
    small = rng.normal(size=(36, 16, 16)).astype("float32")
    small = small @ small.swapaxes(1, 2)
    large = rng.normal(size=(36, 32, 32)).astype("float32")
    for name, function, x in [
        ("svd of 36 x 32 x 32", ops.svd, large),
        ("eigh of 36 x 16 x 16", ops.eigh, small),
    ]:
        for way, compiled in compilers(backend):
            run = compiled(function)
            x = ops.convert_to_tensor(x)
            times = []
            for _ in range(22):
                start = time.perf_counter()
                ops.convert_to_numpy(run(x)[0])
                times.append(1e3 * (time.perf_counter() - start))
            times = sorted(times[2:])
            print(
                f"{name}, {way}: {statistics.median(times):.1f} ms "
                f"({times[0]:.1f} to {times[-1]:.1f})"
            )


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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--backend", choices=["tensorflow", "jax", "torch"], required=True
    )
    main(parser.parse_args().backend)
