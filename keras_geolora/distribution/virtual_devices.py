"""Virtual devices of one CPU, on which JAX may deadlock.

On CPU, jaxlib computes a batch of decompositions on the thread pool that also
runs the program, and one of these threads waits for the result. As many
devices as threads, each with its own batch, leave no thread to compute (seen
with jaxlib 0.10.2). By default there are as many threads as cores, or as
devices if these are more.
"""

import os
import warnings

import keras

# Where XLA looks up the number of threads, in this order.
THREADS = ("PJRT_NPROC", "NPROC")


def warn_of_virtual_devices():
    """Warns if a program may deadlock, and says what helps."""
    distribution = keras.distribution.distribution()
    if distribution is None or keras.backend.backend() != "jax":
        return
    devices = list(map(str, distribution.device_mesh.devices.flat))
    count = len(devices) // distribution.num_processes
    on_cpu = all(name.startswith("cpu") for name in devices)
    if not on_cpu or count < 2 or threads() > count:
        return
    warnings.warn(
        "Training may deadlock: while the geometric step waits for its "
        "decompositions, each virtual device blocks one of the threads that "
        f"would compute them. There are {count} devices, but no more threads "
        "than that. Before you import Keras, write "
        f"`os.environ['{THREADS[0]}'] = '{4 * count}'`.",
        stacklevel=4,
    )


def threads():
    """Returns how many threads JAX has on CPU, or fewer."""
    for name in THREADS:
        if os.environ.get(name, "").isdecimal():
            return int(os.environ[name])
    if hasattr(os, "sched_getaffinity"):  # not everywhere
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
