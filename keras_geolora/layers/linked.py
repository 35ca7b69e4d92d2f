"""Runs the code of a layer with other operations in place of some.

A layer of experts keeps its class and its code, which says
`ops.einsum("th,ehm->etm", x, self.kernel)`. Only the name `ops` in that code
means something else while adapters train: a namespace whose `einsum` knows how
to multiply by an adapted weight (`einsum_products.py`).
"""

import types

import keras
from keras import ops


class LinkedOps:
    """`keras.ops`, but products with some variables are taken by rules.

    Args:
        rule_of: Function of an operand that returns an object with
            `einsum(equation, x)`, a tensor or `None`, and `compute_dtype`; or
            `None` if the operand is an ordinary one.
    """

    def __init__(self, rule_of):
        self._rule_of = rule_of

    def __getattr__(self, name):
        return getattr(ops, name)

    def einsum(self, equation, *operands, **options):
        """As `ops.einsum`."""
        if len(operands) == 2 and not options:
            rule = self._rule_of(operands[1])
            if rule is not None:
                y = rule.einsum(equation, operands[0])
                if y is not None:
                    return y
        return ops.einsum(equation, *operands, **options)

    def cast(self, x, dtype):
        """As `ops.cast`, but returns a variable where it changes nothing."""
        rule = self._rule_of(x)
        if rule is not None and rule.compute_dtype == dtype:
            return x
        return ops.cast(x, dtype)


def linked(function, rule_of):
    """Returns a function with the same code, but for `keras.ops`.

    Args:
        function: Function, such as the `call` of a layer.
        rule_of: As in `LinkedOps`.

    Returns:
        Function; or `None` if the code reads no global name that is
        `keras.ops`. What it calls in turn is as it was.
    """
    if not isinstance(function, types.FunctionType):
        return None
    names = [
        name
        for name in function.__code__.co_names
        if is_ops(function.__globals__.get(name))
    ]
    if not names:
        return None
    replaced = dict.fromkeys(names, LinkedOps(rule_of))
    found = types.FunctionType(
        function.__code__,
        {**function.__globals__, **replaced},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    found.__kwdefaults__ = function.__kwdefaults__
    return found


def is_ops(value):
    """Returns whether a value is a module of the operations of Keras."""
    einsum = getattr(value, "einsum", None)
    return isinstance(value, types.ModuleType) and einsum is keras.ops.einsum
