"""The example of a language model, on a tiny one and on the real one."""

import pathlib
import sys

import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples"))
import assets
import chat
import instructions

LENGTH = 48
HIDDEN, HEADS = 32, 2
EPSILON = 1e-5
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# "topic" is one token, and no token goes over a space.
MERGES = ["t o", "to p", "i c", "top ic", "Ġ to"]


def llama_weights(intermediate=HIDDEN, key_value_heads=HEADS):
    """Random weights of one block, under the names of transformers.

    All kernels are of one shape, unless asked for others.
    """
    rng = np.random.default_rng(0)
    hidden, few = HIDDEN, HIDDEN // HEADS * key_value_heads
    block = "model.layers.0"
    shapes = {
        "model.embed_tokens": (len(tokens()), hidden),
        "model.norm": (hidden,),
        f"{block}.input_layernorm": (hidden,),
        f"{block}.post_attention_layernorm": (hidden,),
        f"{block}.self_attn.q_proj": (hidden, hidden),
        f"{block}.self_attn.k_proj": (few, hidden),
        f"{block}.self_attn.v_proj": (few, hidden),
        f"{block}.self_attn.o_proj": (hidden, hidden),
        f"{block}.mlp.gate_proj": (intermediate, hidden),
        f"{block}.mlp.up_proj": (intermediate, hidden),
        f"{block}.mlp.down_proj": (hidden, intermediate),
    }
    return {
        f"{name}.weight": rng.normal(size=shape, scale=0.3).astype("float32")
        for name, shape in shapes.items()
    }


def tokens():
    import tokenizers

    bytes_ = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merged = [merge.replace(" ", "") for merge in MERGES]
    return [*SPECIAL_TOKENS, *bytes_, *merged]


def neighbours(weight, heads):
    """Orders rows as `convert_hf_to_gguf.py` of llama.cpp does."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def write_gguf(path, weights, quantized=()):
    """Writes a llama as llama.cpp does."""
    import gguf

    kinds = gguf.GGMLQuantizationType
    own_names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "model.layers.0.input_layernorm": "blk.0.attn_norm",
        "model.layers.0.post_attention_layernorm": "blk.0.ffn_norm",
        "model.layers.0.self_attn.q_proj": "blk.0.attn_q",
        "model.layers.0.self_attn.k_proj": "blk.0.attn_k",
        "model.layers.0.self_attn.v_proj": "blk.0.attn_v",
        "model.layers.0.self_attn.o_proj": "blk.0.attn_output",
        "model.layers.0.mlp.gate_proj": "blk.0.ffn_gate",
        "model.layers.0.mlp.up_proj": "blk.0.ffn_up",
        "model.layers.0.mlp.down_proj": "blk.0.ffn_down",
    }
    intermediate = len(weights["model.layers.0.mlp.up_proj.weight"])
    few = len(weights["model.layers.0.self_attn.k_proj.weight"])
    key_value_heads = few * HEADS // HIDDEN
    file = gguf.GGUFWriter(path, "llama")
    file.add_block_count(1)
    file.add_context_length(64)
    file.add_embedding_length(HIDDEN)
    file.add_feed_forward_length(intermediate)
    file.add_head_count(HEADS)
    file.add_head_count_kv(key_value_heads)
    file.add_rope_freq_base(1000.0)
    file.add_layer_norm_rms_eps(EPSILON)
    file.add_tokenizer_model("gpt2")
    file.add_token_list(tokens())
    file.add_token_types([3 if t in SPECIAL_TOKENS else 1 for t in tokens()])
    file.add_token_merges(MERGES)
    for add, place in (
        (file.add_unk_token_id, 0),
        (file.add_bos_token_id, 1),
        (file.add_eos_token_id, 2),
        (file.add_pad_token_id, 2),
    ):
        add(place)
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if module.endswith("q_proj"):
            weight = neighbours(weight, HEADS)
        if module.endswith("k_proj"):
            weight = neighbours(weight, key_value_heads)
        kind = kinds.Q8_0 if name in quantized else kinds.F32
        file.add_tensor(
            f"{own_names[module]}.weight",
            gguf.quantize(weight, kind),
            raw_dtype=kind,
        )
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


@pytest.fixture(scope="module")
def gguf_checkpoint():
    pytest.importorskip("gguf", reason="gguf, of the examples, is not there")
    import gguf_checkpoint

    return gguf_checkpoint


@pytest.fixture(scope="module")
def checkpoint(gguf_checkpoint, tmp_path_factory):
    """A tiny llama, from GGUF, as a folder of Hugging Face."""
    folder = tmp_path_factory.mktemp("llama")
    write_gguf(folder / "tiny.gguf", llama_weights())
    gguf_checkpoint.write_checkpoint(folder / "tiny.gguf", folder)
    return folder


@pytest.mark.backend_independent("it reads and writes files")
def test_a_gguf_file_becomes_what_it_was_in_hugging_face(
    gguf_checkpoint, tmp_path
):
    from safetensors.numpy import load_file

    weights = llama_weights(intermediate=64, key_value_heads=1)
    rounded = "model.layers.0.mlp.up_proj.weight"
    write_gguf(tmp_path / "tiny.gguf", weights, quantized=[rounded])
    gguf_checkpoint.write_checkpoint(tmp_path / "tiny.gguf", tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == weights.keys()
    assert {w.dtype for w in found.values()} == {np.dtype("float32")}
    largest = np.abs(weights[rounded]).max()
    np.testing.assert_allclose(
        found.pop(rounded), weights.pop(rounded), atol=largest / 127
    )
    for name in weights:
        np.testing.assert_array_equal(found[name], weights[name], name)


@pytest.mark.backend_independent("it reads and writes files")
def test_another_architecture_is_no_llama(gguf_checkpoint, tmp_path):
    import gguf

    file = gguf.GGUFWriter(tmp_path / "other.gguf", "bert")
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    with pytest.raises(ValueError, match="Received: 'bert'"):
        gguf_checkpoint.write_checkpoint(tmp_path / "other.gguf", tmp_path)


def test_the_checkpoint_is_one_model_in_kerashub_and_transformers(checkpoint):
    transformers = pytest.importorskip("transformers", reason="no transformers")
    import keras
    import torch

    model, tokenizer = instructions.load(checkpoint)
    assert model.backbone.layer_norm.epsilon == EPSILON
    theirs = transformers.AutoTokenizer.from_pretrained(checkpoint)
    text = "<|im_start|>user\na topic  to 12.\n\n'tis<|im_end|>\n"
    ids = tokenizer.encode(text).ids
    assert ids == theirs(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    ids = np.array([ids], "int32")
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    logits = model.predict(inputs, verbose=0)
    reference = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        expected = reference(torch.tensor(ids).long()).logits.numpy()
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(logits), expected, atol=1e-4
    )


@pytest.mark.backend_independent("it is about arrays of NumPy")
def test_only_answers_and_their_end_have_a_weight(checkpoint):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    x, labels, weights = instructions.encode(
        tokenizer, ["one topic", "a"], ["to", "topic"], length=LENGTH
    )
    for array in (*x.values(), labels, weights):
        assert array.shape == (2, LENGTH)
    np.testing.assert_array_equal(x["token_ids"][:, 1:], labels[:, :-1])
    for row, mask, answer in zip(labels, weights, ["to", "topic"], strict=True):
        marked = tokenizer.decode(row[mask == 1], skip_special_tokens=False)
        assert marked == answer + "<|im_end|>"
    for ids, mask, question in zip(
        *x.values(), ["one topic", "a"], strict=True
    ):
        seen = tokenizer.decode(ids[mask == 1], skip_special_tokens=False)
        assert seen.startswith(instructions.PROMPT.format(question))
    assert not weights[x["padding_mask"] == 0].any()


@pytest.mark.backend_independent("it is about arrays of NumPy")
def test_no_answer_is_cut_off(checkpoint):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    with pytest.raises(ValueError, match="Received: length=8"):
        instructions.encode(tokenizer, ["one topic"], ["to"], length=8)


def test_a_batch_that_is_not_full_gets_the_same_replies(checkpoint):
    import keras

    keras.utils.set_random_seed(0)
    model, tokenizer = instructions.load(checkpoint)
    model.compile(sampler="greedy")
    asked = ["one topic", "to", "a topic"]
    together = instructions.reply(model, tokenizer, asked, length=56, batch=3)
    apart = instructions.reply(model, tokenizer, asked, length=56, batch=2)
    assert together == apart
    assert len(set(together)) > 1


# PEFT asks transformers by an old name.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_the_example_runs(checkpoint, tmp_path, monkeypatch, capsys):
    try:
        questions, labels, names = assets.trec_questions()
    except ModuleNotFoundError as error:
        pytest.skip(f"the questions are not installed: {error}")
    short = [i for i, q in enumerate(questions) if len(q) < 30][:12]
    few = [questions[i] for i in short], labels[short], names
    monkeypatch.setattr(assets, "trec_questions", lambda seed: few)
    monkeypatch.setattr(assets, "smollm2_folder", lambda: str(checkpoint))
    folder = tmp_path / "adapter"
    options = f"--examples 8 --held-out 4 --length 200 --folder {folder}"
    monkeypatch.setattr(sys, "argv", ["chat.py", *options.split()])
    chat.main(chat.parse_args())
    printed = capsys.readouterr().out
    assert printed.count("of 4.") == 2
    assert "Merging moved" in printed
    names = {path.name for path in folder.rglob("*") if path.is_file()}
    assert names == {
        "topics.safetensors",
        "adapter_config.json",
        "adapter_model.safetensors",
    }


@pytest.mark.slow("loads a language model")
@pytest.mark.backend_independent("it is about the weights of a package")
def test_the_real_model_knows_the_capital_of_france():
    transformers = pytest.importorskip("transformers", reason="no transformers")
    import keras
    import torch

    try:
        folder = assets.smollm2_folder()
    except (FileNotFoundError, ModuleNotFoundError) as error:
        pytest.skip(f"the language model is not installed: {error}")
    model, tokenizer = instructions.load(folder)
    prompt = tokenizer.encode("The capital of France is").ids
    ids = list(prompt)
    for _ in range(2):
        row = np.array([ids], "int32")
        inputs = {"token_ids": row, "padding_mask": np.ones_like(row)}
        logits = keras.ops.convert_to_numpy(model(inputs))
        ids.append(int(logits[0, -1].argmax()))
    assert tokenizer.decode(ids[len(prompt) :]) == " Paris."
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        expected = reference(torch.tensor(row).long()).logits.numpy()
    # With KerasHub's own epsilon they are 1e-2 apart.
    np.testing.assert_allclose(logits, expected, atol=2e-4)
