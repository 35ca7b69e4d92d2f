"""Instructions and answers as the tokens that a language model learns from.

Tokens are made by the library `tokenizers`, from the checkpoint's own file, so
that they are those that transformers and llama.cpp make. (KerasHub's tokenizer
merges across words, and adds a token at the start of every text.)
"""

import json
import pathlib

import numpy as np

END = "<|im_end|>"
PROMPT = "<|im_start|>user\n{}" + END + "\n<|im_start|>assistant\n"


def load(folder):
    """Loads a llama and its tokenizer from a checkpoint of Hugging Face.

    Returns:
        A `keras_hub.models.Llama3CausalLM` that takes tokens, and a
        `tokenizers.Tokenizer`.
    """
    import keras_hub
    from tokenizers import Tokenizer  # comes with KerasHub

    config = json.loads(pathlib.Path(folder, "config.json").read_text("utf-8"))
    backbone = keras_hub.models.Llama3Backbone.from_preset(
        str(folder),
        # KerasHub 0.32 does not read it, and takes 1e-6.
        layer_norm_epsilon=config["rms_norm_eps"],
    )
    model = keras_hub.models.Llama3CausalLM(backbone, preprocessor=None)
    return model, Tokenizer.from_file(f"{folder}/tokenizer.json")


def tokens(tokenizer, instruction, answer):
    """Returns the tokens of an instruction, and those of its answer."""
    # Apart, so that no token lies over the border.
    return (
        tokenizer.encode(PROMPT.format(instruction)).ids,
        tokenizer.encode(answer + END).ids,
    )


def encode(tokenizer, instructions, answers, length):
    """Makes what `fit` takes, with a loss on the answers only.

    A label is the token that comes next. Its weight is 1 where that token
    belongs to the answer, or ends it, and 0 in the instruction and the padding.

    Args:
        tokenizer: A `tokenizers.Tokenizer`.
        instructions: List of strings.
        answers: List of strings, of equal length.
        length: Int, the number of tokens of every row.

    Returns:
        A dict of the int32 arrays `token_ids` and `padding_mask`, the labels
        and the float32 weights, all of shape `(len(answers), length)`.

    Raises:
        ValueError: If an instruction and its answer are longer than `length`.
    """
    # One more, because labels are the tokens from the second on.
    rows = np.zeros((len(answers), length + 1), "int32")
    is_token, is_answer = np.zeros_like(rows), np.zeros_like(rows)
    for i, pair in enumerate(zip(instructions, answers, strict=True)):
        prompt, answer = tokens(tokenizer, *pair)
        total = len(prompt) + len(answer)
        if total > length + 1:
            raise ValueError(
                f"`length` is the number of tokens of a row, and {pair} has "
                f"{total}. Received: length={length}. Choose a larger one, or "
                "leave out what is longer."
            )
        rows[i, :total] = prompt + answer
        is_token[i, :total] = 1
        is_answer[i, len(prompt) : total] = 1
    x = {"token_ids": rows[:, :-1], "padding_mask": is_token[:, :-1]}
    return x, rows[:, 1:], is_answer[:, 1:].astype("float32")


def reply(model, tokenizer, instructions, length, batch=32):
    """Returns the answer of a language model to each instruction.

    Args:
        model: A `keras_hub.models.CausalLM` without a preprocessor, compiled
            with a `sampler`.
        tokenizer: A `tokenizers.Tokenizer`.
        instructions: List of strings.
        length: Int, the number of tokens of an instruction and its answer.
        batch: Int, how many instructions are answered at once.
    """
    end = tokenizer.token_to_id(END)
    found = []
    for start in range(0, len(instructions), batch):
        chosen = instructions[start : start + batch]
        prompts = [tokenizer.encode(PROMPT.format(x)).ids for x in chosen]
        rows, mask = np.zeros((2, batch, length), "int32")
        for i, prompt in enumerate(prompts):
            rows[i, : len(prompt)], mask[i, : len(prompt)] = prompt, 1
        # The same shape every time: it is compiled once.
        mask[len(prompts) :, 0] = 1
        written = model.generate(
            {"token_ids": rows, "padding_mask": mask}, stop_token_ids=(end,)
        )["token_ids"]
        for row, prompt in zip(written, prompts, strict=False):
            answer = row[len(prompt) :].tolist()
            if end in answer:
                answer = answer[: answer.index(end)]
            found.append(tokenizer.decode(answer))
    return found
