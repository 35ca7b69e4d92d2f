"""Other values for variables, for the length of a `with` block."""

import contextlib

import keras
import numpy as np
from keras import ops

from keras_geolora.keras_internals import set_value_inside, value_inside


@contextlib.contextmanager
def exchanged_values(pairs):
    """Gives variables other values for a block.

    Where variables can be read, their values are exchanged. In a traced
    function they cannot, so reading them gives other tensors instead. On torch
    they hold other tensors, because the backward pass needs those that the
    forward pass used.

    Args:
        pairs: List of pairs of a variable and an array.

    Yields:
        Dict from the ids of the variables to their former values.
    """
    if keras.backend.backend() == "torch":
        exchange = other_tensors
    elif any(is_traced(variable) for variable, _ in pairs):
        exchange = other_readings
    else:
        exchange = other_numbers
    with exchange(pairs) as before:
        yield before


def is_traced(variable):
    """Returns whether a variable cannot be read, as in a trace.

    Args:
        variable: `keras.Variable`.
    """
    try:
        ops.convert_to_numpy(variable)
    except (NotImplementedError, TypeError):  # of TensorFlow, and of JAX
        return True
    return False


@contextlib.contextmanager
def other_numbers(pairs):
    """Assigns other values for a block."""
    before = {id(variable): value_of(variable) for variable, _ in pairs}
    try:
        for variable, value in pairs:
            variable.assign(value)
        yield before
    finally:
        for variable, _ in pairs:
            variable.assign(before[id(variable)])


@contextlib.contextmanager
def other_tensors(pairs):
    """Makes variables hold other tensors for a block, on torch.

    Assigning would write into tensors that a backward pass still needs.
    """
    before = {id(variable): value_inside(variable) for variable, _ in pairs}
    try:
        for variable, value in pairs:
            tensor = ops.convert_to_tensor(value, variable.dtype)
            set_value_inside(variable, tensor)
        yield before
    finally:
        for variable, _ in pairs:
            set_value_inside(variable, before[id(variable)])


@contextlib.contextmanager
def other_readings(pairs):
    """Makes variables read as other tensors for a block, in a trace."""
    before = {id(variable): variable.value for variable, _ in pairs}
    with Substitution(pairs):
        yield before


class Substitution(keras.StatelessScope):
    """Shows other values of some variables and leaves the rest as it is.

    Args:
        pairs: List of pairs of a variable and an array.
    """

    def __init__(self, pairs):
        super().__init__(pairs, initialize_variables=False)
        self._substituted = set(self.state_mapping)
        self._updates = []

    def get_current_value(self, variable):
        value = super().get_current_value(variable)
        if value is None and self.original_scope is not None:
            value = self.original_scope.get_current_value(variable)
        return value

    def add_update(self, update):
        variable, _ = update
        if id(variable) in self._substituted:
            raise ValueError(
                "Inside `with model.geolora_disabled()`, a variable that is "
                "trained along with an adapter shows its pretrained value and "
                f"cannot be assigned. Received: variable '{variable.path}'"
            )
        self._updates.append(update)
        super().add_update(update)

    def __exit__(self, *args, **kwargs):
        super().__exit__(*args, **kwargs)
        for variable, value in self._updates:  # such as states of dropout
            variable.assign(value)


def value_of(variable):
    """Returns a copy of the value of a variable, as an array."""
    return np.array(ops.convert_to_numpy(variable))
