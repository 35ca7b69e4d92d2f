"""What configurations of KerasHub and of quantized layers leave out.

A file without it does not load, or loads as another model, when it is too late
to do anything. What can be added to the configuration is added; the rest is
refused.
"""

import contextlib
import functools
import inspect

import keras

from keras_geolora.layers.tree import inside, stable_paths

# What a configuration can hold as it is.
PLAIN_VALUES = (bool, int, float, str, type(None))


def forgotten_arguments(part):
    """Returns the arguments of a class that its configuration leaves out.

    Those that are attributes of the same name and not the default, such as
    `tie_word_embeddings` of KerasHub's Llama.

    Args:
        part: Model of KerasHub, with its plain class.

    Returns:
        Dict from name to value.
    """
    config, found = part.get_config(), {}
    parameters = inspect.signature(type(part).__init__).parameters
    for name, parameter in parameters.items():
        default = parameter.default
        value = getattr(part, name, default)
        if name in config or default is inspect.Parameter.empty:
            continue
        if isinstance(value, PLAIN_VALUES) and value != default:
            found[name] = value
    return found


@contextlib.contextmanager
def complete_configs(model):
    """Lets models of KerasHub write whole configurations in a block.

    Args:
        model: `keras.Model`, which has its plain class, as all models inside.
    """
    changed = []
    for part in (model, *inside(model)):
        # KerasHub's `from_config` passes all of the configuration to the class.
        if not hasattr(part, "from_preset") or "get_config" in vars(part):
            continue
        forgotten = forgotten_arguments(part)
        if forgotten:
            complete = functools.partial(completed, part.get_config, forgotten)
            vars(part)["get_config"] = complete
            changed.append(part)
    try:
        yield
    finally:
        for part in changed:
            del vars(part)["get_config"]


def completed(get_config, forgotten):
    """Returns a configuration with what it forgets."""
    return {**get_config(), **forgotten}


def check_tokenizer(model):
    """Refuses a tokenizer whose configuration forgets special tokens.

    Raises:
        ValueError: If a loaded tokenizer would have other special tokens.
    """
    preprocessor = getattr(model, "preprocessor", None)
    tokenizer = getattr(preprocessor, "tokenizer", None)
    tokens = special_tokens(tokenizer)
    if not tokens:
        return
    config = keras.saving.serialize_keras_object(tokenizer)
    loaded = special_tokens(keras.saving.deserialize_keras_object(config))
    if loaded != tokens:
        cls = type(tokenizer).__name__
        raise ValueError(
            "A file must contain the special tokens of its tokenizer, and "
            f"`{cls}.get_config` leaves them out: the file would not load, or "
            "with other tokens. Tokenize before, and take the preprocessor "
            f"off with `model.preprocessor = None`; or make it with a subclass "
            f"of `{cls}` whose constructor sets these tokens. Received: model "
            f"'{model.name}' with the special tokens {sorted(tokens)}, of "
            f"which a loaded one has {sorted(tokens & loaded)}"
        )


def special_tokens(tokenizer):
    """Returns the set of the special tokens of a tokenizer of KerasHub."""
    return set(getattr(tokenizer, "special_tokens", None) or ())


def input_quantizers(model):
    """Returns how quantized layers round their inputs, by stable path.

    Layers that a model makes in its constructor do not get back the
    configuration that they were quantized with. Keras then takes a default,
    which for the int4 head of a language model is another.

    Returns:
        Dict from stable path to the configuration of a quantizer, or to `None`
        for a layer that does not round.
    """
    return {
        path: keras.saving.serialize_keras_object(layer.inputs_quantizer)
        for path, layer in stable_paths(model).items()
        if hasattr(layer, "inputs_quantizer")
    }


def restore_input_quantizers(model, configs):
    """Lets quantized layers round their inputs as before they were saved.

    Args:
        model: `keras.Model`, just loaded.
        configs: Dict, as `input_quantizers` returns it.
    """
    layers = stable_paths(model)
    for path, config in configs.items():
        quantizer = keras.saving.deserialize_keras_object(config)
        layers[path].inputs_quantizer = quantizer
