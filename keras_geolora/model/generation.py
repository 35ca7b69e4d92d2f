"""Lets adapted models of KerasHub generate as fast as merged ones."""

import functools

from keras_geolora.layers.prepared import prepared_products
from keras_geolora.layers.tree import adapted_layers


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
        # `generate` calls this every time, so a training may lie in between.
        layers = adapted_layers(self).values()
        at_rest = all(layer.adapter.is_at_rest for layer in layers)
        adaptation = self.geolora_adaptation
        if at_rest != adaptation.generates_at_rest:
            adaptation.generates_at_rest = at_rest
            self.generate_function = None
        return plain_class.make_generate_function(self)

    @functools.wraps(plain_class.generate_step)
    def generate_step(self, *args, **kwargs):
        layers = adapted_layers(self).values()
        at_rest = self.geolora_adaptation.generates_at_rest
        with prepared_products(layers, at_rest):
            return plain_class.generate_step(self, *args, **kwargs)

    return {
        "make_generate_function": make_generate_function,
        "generate_step": generate_step,
    }
