"""What configurations forget, which files must not."""

import keras
import keras_hub
import numpy as np
import pytest
from keras import ops
from moving import move
from small_models import llama

import keras_geolora
from keras_geolora.model.forgotten import check_tokenizer

X = {
    "token_ids": np.arange(16).reshape(2, 8).astype("int32"),
    "padding_mask": np.ones((2, 8), "int32"),
}


def language_model(quantized=None, **options):
    model = llama(**options)
    if quantized:
        model.quantize(config=quantized)
    return model


def adapted(*args, **options):
    model = language_model(*args, **options)
    model.enable_geolora(rank=2, seed=0)
    move(model)
    return model


def answers(model):
    return ops.convert_to_numpy(model(X, training=False))


def loaded(model, folder):
    model.save(folder / "model.keras")
    return keras.saving.load_model(folder / "model.keras")


def test_tied_embeddings_are_remembered(tmp_path):
    model = adapted(tie_word_embeddings=True)
    again = loaded(model, tmp_path)
    assert again.backbone.tie_word_embeddings
    np.testing.assert_array_equal(answers(again), answers(model))
    # Nothing of it stays with the model.
    again.merge_geolora()
    assert "tie_word_embeddings" not in again.backbone.get_config()


QUANTIZED = {
    "int4": keras.quantizers.Int4QuantizationConfig(),
    "int8": keras.quantizers.Int8QuantizationConfig(),
    "int8, weights only": keras.quantizers.Int8QuantizationConfig(
        activation_quantizer=None
    ),
}


@pytest.mark.filterwarnings("ignore:.*does not have a `quantize`")
@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_layers_round_their_inputs_as_before(name, tmp_path):
    model = adapted(QUANTIZED[name])
    again = loaded(model, tmp_path)
    np.testing.assert_array_equal(answers(again), answers(model))


def byte_pairs(cls=keras_hub.models.Llama3Tokenizer, **options):
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "ab"]
    return cls(
        vocabulary={name: i for i, name in enumerate(names)},
        merges=["a b"],
        **options,
    )


def with_tokenizer(tokenizer):
    model = language_model()
    model.preprocessor = keras_hub.models.Llama3CausalLMPreprocessor(
        tokenizer, sequence_length=8
    )
    model.enable_geolora(rank=2)
    return model


@keras.saving.register_keras_serializable("tests")
class ChatTokenizer(keras_hub.models.Llama3Tokenizer):
    def __init__(self, *args, **kwargs):
        chat = {
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "misc_special_tokens": set(),
        }
        super().__init__(*args, **chat, **kwargs)


def test_special_tokens_that_a_file_would_lose_are_noticed(tmp_path):
    tokenizer = byte_pairs(
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        misc_special_tokens=set(),
    )
    model = with_tokenizer(tokenizer)
    path = tmp_path / "model.keras"
    with pytest.raises(ValueError, match=r"special tokens \['<\|im_end\|>'"):
        model.save(path)
    assert not path.exists()
    with pytest.raises(ValueError, match="model.preprocessor = None"):
        keras_geolora.export(model, tmp_path / "serving")
    model.preprocessor = None
    np.testing.assert_array_equal(
        answers(loaded(model, tmp_path)), answers(model)
    )


def test_a_tokenizer_that_sets_its_special_tokens_is_saved(tmp_path):
    model = with_tokenizer(byte_pairs(ChatTokenizer))
    again = loaded(model, tmp_path)
    assert again.preprocessor.tokenizer.end_token == "<|im_end|>"


def test_a_model_without_a_tokenizer_forgets_no_tokens():
    check_tokenizer(keras.Sequential([keras.Input((2,))]))
