"""The geometry is exact where the products of the model are rounded."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_geolora import GeoLoRA, GeoLoRADense
from keras_geolora.geometry import integrator

BACKEND = keras.backend.backend()


def built():
    layer = GeoLoRADense(6, rank=2, seed=0)
    layer.build((None, 8))
    optimizer = GeoLoRA("sgd", retraction_interval=1)
    optimizer.build(layer.trainable_variables)
    return layer, optimizer


def gradients_of(variables):
    rng = np.random.default_rng(0)
    return [
        ops.convert_to_tensor(rng.normal(size=v.shape).astype("float32"))
        for v in variables
    ]


@pytest.mark.skipif(BACKEND != "jax", reason="precision is that of JAX")
def test_jax_rounds_no_product_of_a_step():
    import jax

    layer, optimizer = built()
    variables = layer.trainable_variables
    values = [v.value for v in variables]
    state = [v.value for v in optimizer.variables]
    step = jax.make_jaxpr(optimizer.stateless_apply)(
        state, gradients_of(variables), values
    )
    precisions = [
        line.split("precision=")[1].split()[0]
        for line in str(step).splitlines()
        if "precision=" in line
    ]
    assert len(precisions) > 20
    highest = "(Precision.HIGHEST,"
    assert {p for p in precisions if p != "None"} == {highest}, precisions
    assert "None" not in precisions


@pytest.mark.skipif(BACKEND != "torch", reason="the switches are torch's")
@pytest.mark.parametrize("chosen", ["highest", "high", "medium"])
def test_torch_rounds_no_product_of_a_step_and_stays_as_it_was(
    chosen, monkeypatch
):
    import torch

    layer, optimizer = built()
    variables = layer.trainable_variables
    engines = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = torch.get_float32_matmul_precision()
    inside = []

    def truncate(*args, truncate=integrator.truncate):
        inside.extend(engine.fp32_precision for engine in engines)
        return truncate(*args)

    monkeypatch.setattr(integrator, "truncate", truncate)
    try:
        torch.set_float32_matmul_precision(chosen)
        outside = [engine.fp32_precision for engine in engines]
        optimizer.apply(gradients_of(variables), variables)
        optimizer.cut()
        assert outside == [engine.fp32_precision for engine in engines]
        assert torch.get_float32_matmul_precision() == chosen
    finally:
        torch.set_float32_matmul_precision(before)
    assert inside == 4 * ["ieee"]
