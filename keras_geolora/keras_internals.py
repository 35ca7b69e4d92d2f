"""What this library asks of Keras for which Keras has no public name."""

import keras

# Asks for all layers; its name keeps Keras' numbering of layers as it is.
PROBE = keras.layers.Layer(name="probe")


def in_layer_call():
    """Says whether the `__call__` of any layer is running, in this thread.

    Keras keeps a context for the outermost call, to pass on `training`. A
    layer that asks for it gets that of the call which is running, and begins
    one of its own only where there is none.
    """
    context = PROBE._get_call_context()
    PROBE._maybe_reset_call_context()
    return context.entry_layer is not PROBE
