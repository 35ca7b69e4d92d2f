"""What a device holds while a Llama is adapted, computed from shapes.

    python benchmarks/memory_per_device.py

Builds Llamas of 1, 8 and 70 billion parameters on PyTorch's device `meta`,
which has shapes but no memory, adapts all linear layers with rank 8 in buffers
of 16, builds the optimizer, and adds up the bytes of all variables: weights in
bfloat16, factors, their gradients, and the moments of AdamW and the scratch of
the geometric step in float32. *Replicated*, each device holds everything.
*Sharded*, each of eight holds its part by the layouts that KerasHub proposes
(`LlamaBackbone.get_layout_map`, all eight on the axis `model`), and those that
adapters get from them. What activations take depends on batch and length, and
is not counted.
"""

import math
import os
import types

import measuring

# Llama 3.2 1B, Llama 3.1 8B and 70B.
SIZES = (
    "num_layers",
    "hidden_dim",
    "intermediate_dim",
    "num_query_heads",
    "tie_word_embeddings",
)
MODELS = {
    "1 billion": (16, 2048, 8192, 32, True),
    "8 billion": (32, 4096, 14336, 32, False),
    "70 billion": (80, 8192, 28672, 64, False),
}
KEY_VALUE_HEADS, VOCABULARY, DEVICES, GIB = 8, 128_256, 8, 2**30


def main():
    """Prints the table."""
    os.environ["KERAS_BACKEND"] = "torch"
    header = ["model", "way", "weights", "factors", "their gradients"]
    header += ["optimizer", "GiB of a device", "full fine-tuning"]
    lines = []
    for name, sizes in MODELS.items():
        model, optimizer, layouts = build(dict(zip(SIZES, sizes, strict=True)))
        for way in ("replicated", "sharded"):
            shares = layouts if way == "sharded" else {}
            lines.append([name, way, *line(model, optimizer, shares)])
    print(measuring.markdown(header, lines))


def build(sizes):
    """Returns an adapted Llama without memory, its optimizer, and layouts.

    The layouts are a dict from the ids of variables to the number of devices
    among which they are divided.
    """
    import keras
    import keras_hub
    import numpy as np

    from keras_geolora import GeoLoRA

    mesh = keras.distribution.DeviceMesh(
        (1, DEVICES), ("batch", "model"), np.arange(DEVICES).astype(str)
    )
    with keras.device("meta"):
        model = keras_hub.models.Llama3Backbone(
            vocabulary_size=VOCABULARY,
            num_key_value_heads=KEY_VALUE_HEADS,
            dtype="bfloat16",
            **sizes,
        )
        layout_map = model.get_layout_map(mesh)
        model.enable_geolora(rank=8)
        # The bound of a step needs the numbers of the kernels.
        optimizer = GeoLoRA(keras.optimizers.AdamW(), max_update_ratio=None)
        optimizer.build(model.trainable_variables)
    return model, optimizer, divided(model, optimizer, layout_map)


def divided(model, optimizer, layout_map):
    """Returns among how many devices variables are divided, by their ids."""
    from keras_geolora.distribution.layouts import kernel_sharding

    def devices(layout):
        in_parts = layout is not None and "model" in layout.axes
        return DEVICES if in_parts else 1

    counts = {id(v): devices(layout_map[v.path]) for v in model.variables}
    asked = types.SimpleNamespace(
        get_variable_layout=lambda v: layout_map[v.path]
    )
    for layer in model._flatten_layers():
        if not getattr(layer, "is_adapted", False):
            continue
        view = layer.kernel_view
        axes = view.rows, view.columns
        axes = kernel_sharding(asked, layer.kernel, axes)
        for factor, axis in zip(
            (layer.adapter.U, layer.adapter.V), axes, strict=True
        ):
            counts[id(factor)] = DEVICES if axis == "model" else 1
    for group in optimizer.adapter_groups:
        of_factors = [
            {counts.get(id(v), 1) for v in variables}
            for variables in group.factors.variables
        ]
        for store in (group.unknowns, *group.state()):
            for found, (variable,) in zip(
                of_factors, store.variables, strict=True
            ):
                # A stack is spread if any of its factors is.
                counts[id(variable)] = max(found)
    return counts


def line(model, optimizer, counts):
    """Returns the cells of a model: GiB of a device."""

    def gib(variables):
        return sum(size(v) / counts.get(id(v), 1) for v in variables) / GIB

    trained = model.trainable_variables
    frozen = [v for v in model.variables if not v.trainable]
    state = list(optimizer.variables)
    for group in optimizer.adapter_groups:  # scratch of the geometric step
        state += [v for (v,) in group.unknowns.variables]
    parts = [gib(frozen), gib(trained), gib(trained), gib(state)]
    # Weights in bfloat16; a copy to update, gradients and two moments in
    # float32.
    full = gib(frozen) * (1 + 4 * 2)
    return [*(f"{part:.2f}" for part in (*parts, sum(parts))), f"{full:.0f}"]


def size(variable):
    """Returns the bytes of a variable."""
    width = {"bfloat16": 2}.get(variable.dtype, 4)
    return math.prod(variable.shape) * width


if __name__ == "__main__":
    main()
