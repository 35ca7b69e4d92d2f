"""Share what a model learned: one small file, for Keras and for PEFT.

    pip install --no-deps -r examples/requirements.txt
    pip install peft transformers
    python examples/share.py --backend tensorflow

Fine-tunes all-MiniLM-L6-v2 on rated movie sentences for a moment, writes the
adapter, looks into the file, loads it into a fresh model, and into the same
model of Hugging Face's transformers by PEFT.
"""

import argparse
import os
import pathlib

import assets
import numpy as np


def main(args):
    """Train, save, load, export."""
    # Keras reads its backend once, when it is imported.
    if args.backend:
        os.environ["KERAS_BACKEND"] = args.backend

    import keras
    import keras_hub
    import peft
    import torch
    import transformers

    import keras_geolora
    from keras_geolora import GeoLoRA
    from keras_geolora.__main__ import main as command_line

    keras.utils.set_random_seed(0)
    preset = assets.minilm_folder()
    sentences, liked = assets.movie_sentences(seed=0)
    sentences = np.array(sentences[: args.examples])

    def pretrained():
        return keras_hub.models.TextClassifier.from_preset(
            preset,
            num_classes=2,
            preprocessor=keras_hub.models.BertTextClassifierPreprocessor(
                keras_hub.tokenizers.BertTokenizer.from_preset(preset),
                sequence_length=40,
            ),
        )

    classifier = pretrained()
    # transformers has no use for the pooler of this model.
    classifier.enable_geolora(rank=8, exclude="pooled_dense")
    classifier.compile(
        optimizer=GeoLoRA(keras.optimizers.AdamW(1e-3)),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    classifier.fit(sentences, liked[: args.examples], batch_size=32)

    folder = pathlib.Path(args.folder)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "movies.safetensors"
    classifier.save_geolora(file)
    print(f"\nThe adapter and the head: {file.stat().st_size / 1e6:.1f} MB.")
    command_line(["inspect", str(file)])

    logits = classifier.predict(sentences[:64], verbose=0)
    loaded = pretrained().load_geolora(file)
    difference = np.abs(loaded.predict(sentences[:64], verbose=0) - logits)
    print(f"\nA fresh model with the file: {difference.max():.1e} away.")

    keras_geolora.export_peft(classifier, folder / "peft", prefix="")
    # KerasHub approximates GELU by tanh, which alone moves the hidden states of
    # the pretrained model by up to 6e-3: to compare, transformers has to do so.
    base = transformers.AutoModel.from_pretrained(preset, hidden_act="gelu_new")
    adapted = peft.PeftModel.from_pretrained(base, folder / "peft").eval()
    tokens = classifier.preprocessor(sentences[:64])
    ours = classifier.backbone.predict(tokens, verbose=0)["sequence_output"]
    ids, mask = (
        torch.tensor(np.array(keras.ops.convert_to_numpy(tokens[key]))).long()
        for key in ("token_ids", "padding_mask")
    )
    with torch.no_grad():
        theirs = adapted(input_ids=ids, attention_mask=mask)
    difference = np.abs(ours - theirs.last_hidden_state.numpy())
    difference = difference[mask.numpy().astype(bool)]
    print(f"PEFT on the model of transformers: {difference.max():.1e} away.")


def parse_args():
    """Read the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=["tensorflow", "jax", "torch"])
    parser.add_argument("--examples", type=int, default=640)
    parser.add_argument("--folder", default="shared-adapter")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
