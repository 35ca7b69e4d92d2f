"""Fine-tune a small BERT on all devices of a machine, by `tf.distribute`.

    pip install --no-deps -r examples/requirements.txt
    python examples/distributed_tensorflow.py

Trains on all GPUs, and where there are none on two parts of the CPU, which
shows that it works and saves no time. Every replica takes its share of every
batch; only the gradients of the factors and of the head go from one to another.
"""

import argparse
import os

import assets


def main(args):
    """Load and adapt in the scope of a strategy, train, compare replicas."""
    os.environ["KERAS_BACKEND"] = "tensorflow"

    import keras
    import tensorflow as tf

    # TensorFlow divides a device before it does anything else.
    strategy = tf.distribute.MirroredStrategy(devices(tf))

    import keras_hub

    import keras_geolora  # noqa: F401, adds methods to `keras.Model`
    from keras_geolora import GeoLoRA

    keras.utils.set_random_seed(args.seed)
    print(f"Replicas: {strategy.num_replicas_in_sync}")

    sentences, liked = assets.movie_sentences(seed=args.seed)
    count = args.batch_size * args.steps
    preset = assets.minilm_folder()
    preprocess = keras_hub.models.BertTextClassifierPreprocessor(
        keras_hub.tokenizers.BertTokenizer.from_preset(preset),
        sequence_length=40,
    )
    tokens = preprocess(sentences[:count])
    # Keras averages a batch over replicas to learn its shapes, and TensorFlow
    # has no mean of bools.
    tokens["padding_mask"] = tf.cast(tokens["padding_mask"], "int32")

    with strategy.scope():
        classifier = keras_hub.models.TextClassifier.from_preset(
            preset, num_classes=2, preprocessor=None
        )
        classifier.enable_geolora(rank=8)
        classifier.compile(
            optimizer=GeoLoRA(keras.optimizers.AdamW(args.learning_rate)),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
    # The size of a batch is that of all replicas together.
    classifier.fit(tokens, liked[:count], batch_size=args.batch_size)

    print("\nWhich rank did each layer need?")
    classifier.geolora_summary()

    variables = classifier.variables + classifier.optimizer.variables
    different = sum(not replicas_agree(strategy, v.value) for v in variables)
    print(f"\nOf {len(variables)} variables, {different} differ on replicas.")


def devices(tf):
    """Returns the devices to train on: all GPUs, or two parts of the CPU."""
    kind = "GPU"
    if not tf.config.list_physical_devices(kind):
        kind, part = "CPU", tf.config.LogicalDeviceConfiguration()
        (cpu,) = tf.config.list_physical_devices(kind)
        tf.config.set_logical_device_configuration(cpu, [part, part])
    return [device.name for device in tf.config.list_logical_devices(kind)]


def replicas_agree(strategy, variable):
    """Says whether all replicas hold the same numbers, bit for bit."""
    first, *others = strategy.experimental_local_results(variable)
    first = first.numpy().tobytes()
    return all(other.numpy().tobytes() == first for other in others)


def parse_args():
    """Read the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
