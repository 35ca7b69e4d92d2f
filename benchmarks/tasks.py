"""The tasks of the benchmarks: real data, and the model that learns them.

A task has its sizes (`examples` to train on, `validation` to choose by,
`held_out` to report, `epochs`), and

- `load()`: the inputs, a dict of arrays, and the labels of all examples;
- `keras_model()`: the pretrained backbone with a head, a `keras.Model`;
- `torch_backbone()`: the same weights in a `torch.nn.Module` of `transformers`;
- `torch_inputs(arrays)`: the inputs as that module takes them;
- `pool(outputs)`: what the head sees of its outputs.
"""

import functools
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

import assets

BATCH = 32


class Sentences:
    """Sentences of one source, for all-MiniLM-L6-v2."""

    examples, validation, held_out, epochs = 1600, 500, 3000, 2
    dropout = 0.1

    def __init__(self, read, length, classes, held_out=held_out):
        self.read = read
        self.length = length
        self.classes = classes
        self.held_out = held_out

    @functools.cached_property
    def _texts(self):
        return self.read()[:2]

    def load(self):
        import keras_hub

        texts, labels = self._texts
        make = keras_hub.models.BertTextClassifierPreprocessor.from_preset
        preprocessor = make(
            str(assets.minilm_folder()), sequence_length=self.length
        )
        x = {
            name: np.asarray(column).astype("int32")
            for name, column in preprocessor(list(texts)).items()
        }
        return x, np.asarray(labels)

    def keras_model(self):
        import keras_hub

        return keras_hub.models.BertTextClassifier.from_preset(
            str(assets.minilm_folder()),
            num_classes=self.classes,
            preprocessor=None,
        )

    def torch_backbone(self):
        import transformers

        # KerasHub's BERT has this form of GELU; the checkpoint says another.
        return transformers.BertModel.from_pretrained(
            assets.minilm_folder(), hidden_act="gelu_pytorch_tanh"
        )

    def torch_inputs(self, arrays):
        import torch

        return {
            "input_ids": torch.tensor(arrays["token_ids"]).long(),
            "token_type_ids": torch.tensor(arrays["segment_ids"]).long(),
            "attention_mask": torch.tensor(arrays["padding_mask"]).long(),
        }

    def pool(self, outputs):
        return outputs.pooler_output


class Pictures:
    """Fashion-MNIST at 98 pixels, for a DINOv2 ViT-S/14."""

    examples, validation, held_out, epochs = 640, 250, 1000, 2
    dropout, classes, side, pictures = 0.0, 10, 98, 2500
    mean = np.array([123.675, 116.28, 103.53], "float32")
    deviation = np.array([58.395, 57.12, 57.375], "float32")

    def load(self):
        import keras

        _, (pictures, labels) = assets.fashion_mnist()
        pictures = pictures[: self.pictures, ..., None].astype("float32")
        resize = keras.layers.Resizing(self.side, self.side)
        grey = keras.ops.convert_to_numpy(resize(pictures))
        x = {"images": (grey - self.mean) / self.deviation}
        return x, labels[: self.pictures].astype("int32")

    @property
    def _keras_backbone(self):
        import keras_hub

        return keras_hub.models.DINOV2Backbone.from_preset(
            assets.dinov2_folder(), image_shape=(self.side, self.side, 3)
        )

    def keras_model(self):
        import keras

        class Classifier(keras.Model):
            """A task as those of KerasHub: what is not backbone is head."""

            def __init__(self, backbone, classes):
                self.backbone = backbone
                x = backbone(backbone.input)
                x = keras.layers.GlobalAveragePooling1D()(x)
                x = keras.layers.Dense(classes, name="logits")(x)
                super().__init__(backbone.input, x)

        return Classifier(self._keras_backbone, self.classes)

    def torch_backbone(self):
        import keras
        import torch
        import transformers

        model = transformers.Dinov2Model.from_pretrained(assets.dinov2_folder())
        # The two libraries interpolate the table of positions differently.
        table = self._keras_backbone.embeddings.interpolated_position_embeddings
        model.embeddings.position_embeddings = torch.nn.Parameter(
            torch.tensor(keras.ops.convert_to_numpy(table))
        )
        return model

    def torch_inputs(self, arrays):
        import torch

        # They are channels first.
        images = torch.tensor(arrays["images"]).permute(0, 3, 1, 2)
        return {"pixel_values": images}

    def pool(self, outputs):
        return outputs.last_hidden_state.mean(axis=1)


TASKS = {
    "movies": Sentences(assets.movie_sentences, length=32, classes=2),
    "trec": Sentences(assets.trec_questions, length=16, classes=6),
    # There are 4,512 messages.
    "sms": Sentences(assets.sms_messages, length=32, classes=2, held_out=2375),
    "fashion": Pictures(),
}


def draw_head(task, width, seed):
    """Returns the kernel that the head of every method starts with."""
    rng = np.random.default_rng(7000 + seed)
    return rng.normal(0.0, 0.02, (width, task.classes)).astype("float32")


def split(task, count, seed, examples=None, held_out=None):
    """Returns the indices to train on, to validate with and held out.

    Args:
        task: A task.
        count: Int, the number of all examples.
        seed: Int.
        examples: Int or `None`, in place of `task.examples`.
        held_out: Int or `None`, in place of `task.held_out`.
    """
    order = np.random.default_rng(100 + seed).permutation(count)
    rest = order[task.examples :]
    return (
        order[: examples or task.examples],
        rest[: task.validation],
        rest[task.validation :][-(held_out or task.held_out) :],
    )


def count_steps(orders):
    """Returns how many batches orders of examples make."""
    return sum(-(-len(order) // BATCH) for order in orders)


def epochs(task, train, seed):
    """Returns the order of the training examples in every epoch."""
    rng = np.random.default_rng(5000 + seed)
    return [rng.permutation(train) for _ in range(task.epochs)]
