"""Products that are prepared once, for many calls with the same weights.

A call without training adds the update to the kernel, and multiplies once. That
pays for many rows, and not for one row at a time, as when tokens are written
one after the other.
"""

import contextlib
import contextvars
import types

# Functions of the inputs, by id of the layer, in this thread.
PRODUCTS = contextvars.ContextVar(
    "keras_geolora_products", default=types.MappingProxyType({})
)


@contextlib.contextmanager
def prepared_products(layers, at_rest=False):
    """Prepares the products of layers for a block.

    For calls without training, with the weights of now.

    Args:
        layers: Iterable of adapted layers. Those that have nothing to prepare
            compute as always.
        at_rest: Bool, whether `P` and `Q` of the adapters are known to be zero.
            Defaults to `False`.
    """
    products = {id(layer): layer.prepare(at_rest) for layer in layers}
    token = PRODUCTS.set(products)
    try:
        yield
    finally:
        PRODUCTS.reset(token)


def prepared_product_of(layer):
    """Returns the prepared product of a layer, or `None`."""
    return PRODUCTS.get().get(id(layer))
