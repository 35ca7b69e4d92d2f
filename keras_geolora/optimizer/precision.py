"""Products of matrices as exact as float32 allows.

Accelerators round the factors of such a product to 10 bits (TensorFloat-32 on
NVIDIA's GPUs) or 7 bits (TPUs). A network bears that. Bases would be
orthonormal to three digits only, and rounding errors would pass for new
directions.
"""

import contextlib

import keras

BACKEND = keras.backend.backend()
if BACKEND == "jax":
    import jax
elif BACKEND == "torch":
    import torch

    # "none" means what PyTorch chooses, which is exact.
    EXACT = ("none", "ieee")


@contextlib.contextmanager
def full_precision():
    """Computes products of float32 matrices in full float32 for a block.

    On JAX and torch, whatever the precision that the user chose for the rest
    of the model. On TensorFlow that is a switch of the whole process
    (`tf.config.experimental.enable_tensor_float_32_execution`), which stays as
    it is.
    """
    if BACKEND == "jax":
        with jax.default_matmul_precision("float32"):
            yield
    elif BACKEND == "torch" and not torch.compiler.is_compiling():
        with torch_in_full_precision():
            yield
    else:
        yield


@contextlib.contextmanager
def torch_in_full_precision():
    """Switches what torch rounds off for a block."""
    engines = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    chosen = [engine.fp32_precision for engine in engines]
    for engine, precision in zip(engines, chosen, strict=True):
        if precision not in EXACT:
            engine.fp32_precision = "ieee"
    try:
        yield
    finally:
        for engine, precision in zip(engines, chosen, strict=True):
            if precision not in EXACT:
                engine.fp32_precision = precision
