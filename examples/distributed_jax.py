"""Teach a small BERT on several devices, whole on each or in parts.

    pip install --no-deps -r examples/requirements.txt
    python examples/distributed_jax.py --parallel model

The devices are the accelerators that JAX finds, or else eight virtual ones on
the processor. With `--parallel data` every device has the whole model and its
share of a batch; with `--parallel model` the kernels are spread over
`--devices-of-model` devices, and the adapters with them. The layout map knows
nothing of adapters: it is one for the pretrained model.
"""

import argparse
import os

import assets
import numpy as np


def main(args):
    """Distribute, load, adapt, train, look."""
    # All are read once, when Keras is imported.
    os.environ["KERAS_BACKEND"] = "jax"
    # Threads enough for virtual devices to wait for decompositions.
    os.environ.setdefault("PJRT_NPROC", "32")
    # And one for each decomposition, or they wait for cores.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # Means nothing where there are accelerators.
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "")
        + " --xla_force_host_platform_device_count=8"
    )

    import keras
    import keras_hub

    import keras_geolora  # noqa: F401, also adds methods to `keras.Model`
    from keras_geolora import GeoLoRA

    devices = keras.distribution.list_devices()
    print(f"{len(devices)} devices: {', '.join(devices)}")
    if args.parallel == "data":
        distribution = keras.distribution.DataParallel(devices=devices)
    else:
        distribution = in_parts(len(devices), args.devices_of_model)
    # Before anything else is made, as Keras asks for.
    keras.distribution.set_distribution(distribution)
    keras.utils.set_random_seed(args.seed)

    preset = assets.minilm_folder()
    classifier = keras_hub.models.TextClassifier.from_preset(
        preset,
        num_classes=2,
        preprocessor=keras_hub.models.BertTextClassifierPreprocessor(
            keras_hub.tokenizers.BertTokenizer.from_preset(preset),
            sequence_length=40,
        ),
    )
    classifier.enable_geolora(rank=8)
    classifier.compile(
        optimizer=GeoLoRA(keras.optimizers.AdamW(args.learning_rate)),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    sentences, liked = assets.movie_sentences(seed=args.seed)
    count = args.steps * args.batch  # whole batches only
    classifier.fit(
        np.array(sentences[:count]), liked[:count], args.batch, shuffle=False
    )

    print("\nHow are the kernels and factors of one layer spread, and what")
    print("rank does each have?")
    block = classifier.backbone.get_layer("transformer_layer_0")
    for layer in block._flatten_layers():
        if getattr(layer, "is_adapted", False):
            show(layer)


def in_parts(devices, devices_of_model):
    """Returns a distribution that spreads the kernels of a BERT."""
    import keras

    mesh = keras.distribution.DeviceMesh(
        (devices // devices_of_model, devices_of_model), ["batch", "model"]
    )
    layout_map = keras.distribution.LayoutMap(mesh)
    # Heads, and hidden units, are independent of each other.
    layout_map[".*(query|key|value)/kernel"] = (None, "model", None)
    layout_map[".*attention_output/kernel"] = ("model", None, None)
    layout_map[".*feedforward_intermediate_dense/kernel"] = (None, "model")
    layout_map[".*feedforward_output_dense/kernel"] = ("model", None)
    return keras.distribution.ModelParallel(
        layout_map=layout_map, batch_dim_name="batch"
    )


def show(layer):
    """Prints the rank of an adapted layer and its layouts."""
    adapter = layer.adapter
    print(f"\n{layer.path}: rank {layer.rank}")
    for variable in (layer.kernel, *adapter.factors):
        axes = tuple(variable.value.sharding.spec)
        shape = " x ".join(map(str, variable.shape))
        print(f"  {variable.name:<7}{shape:<14}{axes}")


def parse_args():
    """Read the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--parallel", choices=["data", "model"], default="model"
    )
    parser.add_argument("--devices-of-model", type=int, default=4)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=32, help="of all devices")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
