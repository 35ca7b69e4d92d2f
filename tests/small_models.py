"""The smallest models of KerasHub, with random weights."""

import keras
import keras_hub
import numpy as np

# Words of the classifier.
VOCABULARY = 50


def classifier():
    """A BERT of one block, for two classes."""
    keras.utils.set_random_seed(0)
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=VOCABULARY,
        num_layers=1,
        num_heads=2,
        hidden_dim=16,
        intermediate_dim=16,
        max_sequence_length=32,
    )
    return keras_hub.models.BertTextClassifier(
        backbone, num_classes=2, preprocessor=None
    )


def tokens(rows, length, rng):
    """Inputs of the classifier."""
    ids = rng.integers(VOCABULARY, size=(rows, length))
    return {
        "token_ids": ids.astype("int32"),
        "segment_ids": np.zeros((rows, length), "int32"),
        "padding_mask": np.ones((rows, length), "int32"),
    }


def writer(length):
    """A GPT-2 of one block that takes text, of `length` tokens."""
    keras.utils.set_random_seed(0)
    words = [*map(chr, range(33, 127)), "Ġ", "su"]
    vocabulary = {x: i for i, x in enumerate([*words, "<|endoftext|>"])}
    tokenizer = keras_hub.models.GPT2Tokenizer(vocabulary, merges=["s u"])
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=len(vocabulary),
        num_layers=1,
        num_heads=2,
        hidden_dim=16,
        intermediate_dim=16,
        max_sequence_length=16,
    )
    return keras_hub.models.GPT2CausalLM(
        backbone, keras_hub.models.GPT2CausalLMPreprocessor(tokenizer, length)
    )


def llama(**options):
    """A Llama 3 of one block that takes tokens below 32.

    All kernels have one shape, but that of the vocabulary.
    """
    keras.utils.set_random_seed(0)
    backbone = keras_hub.models.Llama3Backbone(
        vocabulary_size=32,
        num_layers=1,
        num_query_heads=2,
        num_key_value_heads=2,
        hidden_dim=16,
        intermediate_dim=16,
        **options,
    )
    return keras_hub.models.Llama3CausalLM(backbone, preprocessor=None)
