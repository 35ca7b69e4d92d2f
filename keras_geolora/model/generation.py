"""Lets adapted models of KerasHub generate as fast as merged ones."""

import contextvars
import functools

from keras_geolora.layers.prepared import prepared_products
from keras_geolora.layers.tree import adapted_layers

# Whether `P` and `Q` are known to be zero in the values that are used now. A
# trace cannot read values, so the call that starts it sets this.
AT_REST = contextvars.ContextVar("keras_geolora_at_rest", default=False)


def generation_of(plain_class):
    """Returns the members of an adapted class that generate.

    Args:
        plain_class: Subclass of `keras.Model`.

    Returns:
        Dict from name to value; empty for a class that cannot generate.
    """
    if not hasattr(plain_class, "make_generate_function"):
        return {}

    @functools.wraps(plain_class.make_generate_function)
    def make_generate_function(self):
        # Not the compiled function itself: the caller may keep that, and after
        # training it is wrong if it was compiled without `P` and `Q`.
        return functools.partial(generated, self, plain_class)

    @functools.wraps(plain_class.generate_step)
    def generate_step(self, *args, **kwargs):
        with prepared_products(adapted_layers(self).values(), AT_REST.get()):
            return plain_class.generate_step(self, *args, **kwargs)

    return {
        "make_generate_function": make_generate_function,
        "generate_step": generate_step,
    }


def generated(model, plain_class, *args, **kwargs):
    """Returns what a model generates with the values of now.

    Args:
        model: `CausalLM`, adapted when the function was made.
        plain_class: Its class without adapters.
        *args: Those of the function.
        **kwargs: As `args`.
    """
    layers = adapted_layers(model).values()
    adaptation = getattr(model, "geolora_adaptation", None)
    if adaptation is None:  # it has been merged meanwhile
        return plain_class.make_generate_function(model)(*args, **kwargs)
    at_rest = all(layer.adapter.is_at_rest for layer in layers)
    if at_rest != adaptation.generates_at_rest:
        adaptation.generates_at_rest = at_rest
        model.generate_function = None
    token = AT_REST.set(at_rest)
    try:
        return plain_class.make_generate_function(model)(*args, **kwargs)
    finally:
        AT_REST.reset(token)
