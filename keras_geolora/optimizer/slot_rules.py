"""What each slot of an inner optimizer means, by class of optimizer."""

import keras

from keras_geolora.geometry.transport import MOVES
from keras_geolora.keras_internals import gradient_accumulators

_RULES = {}  # class -> rules, and whether it is elementwise


_REFUSALS = {}


def register_slot_rules(optimizer_class, rules, elementwise=False):
    """Registers how the slots of an optimizer follow the moving bases.

    `GeoLoRA` needs to know what every slot of its inner optimizer means. The
    optimizers of Keras are registered. For your own, name the attribute that
    holds each list of slots (one per variable, in the order of `build`) and
    its kind.

    Args:
        optimizer_class: Subclass of `keras.optimizers.Optimizer`. The rules
            apply to its subclasses too, unless they have their own.
        rules: Dict from attribute name to one of

            - `"linear"`: accumulates gradients or steps, like a momentum.
              It is projected onto the new tangent space.
            - `"quadratic"`: accumulates squares or absolute values, like
              Adam's velocity. Every new column is a weighted mean of the
              old ones, except for `S`, whose slot becomes its mean. With
              `retraction_interval=1` it is averaged.
            - `"averaged"`: the same, but averaged over the rank axis.
            - `"row"`: one value per row of the variable. It is unchanged,
              except for `S`, whose rows are a rank axis too.
            - `"column"`: one value per column. It is averaged.
        elementwise: Bool, whether the step treats every number independently,
            as Adam does, and uses no norm or shape of a variable. Adapters of
            equal shape are then updated as one variable, which is faster.
            Applies to this class only, not to its subclasses.

    Raises:
        TypeError: If `optimizer_class` is not an optimizer class.
        ValueError: If a kind is unknown.

    Example:

    ```python
    import keras
    import keras_geolora

    class SignDescent(keras.optimizers.Optimizer):
        def build(self, variables):
            super().build(variables)
            self.averages = self.add_optimizer_variables(variables, "average")

        def update_step(self, gradient, variable, learning_rate):
            m = self.averages[self._get_variable_index(variable)]
            self.assign(m, 0.9 * m + 0.1 * gradient)
            self.assign_sub(variable, learning_rate * keras.ops.sign(m))

    keras_geolora.register_slot_rules(
        SignDescent, {"averages": "linear"}, elementwise=True
    )
    optimizer = keras_geolora.GeoLoRA(SignDescent(1e-3))
    ```
    """
    if not (
        isinstance(optimizer_class, type)
        and issubclass(optimizer_class, keras.optimizers.Optimizer)
    ):
        raise TypeError(
            "`optimizer_class` must be a subclass of "
            "`keras.optimizers.Optimizer`. "
            f"Received: optimizer_class={optimizer_class!r}"
        )
    for attribute, kind in rules.items():
        if kind not in MOVES:
            raise ValueError(
                f"The kind of a slot must be one of {sorted(MOVES)}. "
                f"Received: {attribute}={kind!r}"
            )
    _RULES[optimizer_class] = dict(rules), bool(elementwise)
    _REFUSALS.pop(optimizer_class, None)


def is_elementwise(optimizer):
    """Returns whether an optimizer treats every number independently.

    `global_clipnorm` allows that, because it scales all numbers by one factor;
    `clipnorm` does not, because its factor depends on the variable.
    """
    if optimizer.clipnorm is not None:
        return False
    for cls in type(optimizer).__mro__:
        if cls in _RULES:
            return _RULES[cls][1]
        # On torch, Keras replaces its optimizers by its own subclasses.
        if cls.__module__.partition(".")[0] != "keras":
            break
    return False


def slot_rules(optimizer):
    """Returns the rules of an optimizer, or refuses it with a reason."""
    check_options(optimizer)
    for cls in type(optimizer).__mro__:
        if cls in _REFUSALS:
            raise ValueError(
                f"{_REFUSALS[cls]} Write `GeoLoRA(keras.optimizers.AdamW("
                "...))` instead. Received: "
                f"inner_optimizer={type(optimizer).__name__}"
            )
        if cls in _RULES:
            return _RULES[cls][0]
    raise ValueError(
        "GeoLoRA must know how the slots of its inner optimizer follow the "
        "moving bases. Register rules once, for example with "
        "`keras_geolora.register_slot_rules("
        f"{type(optimizer).__name__}, {{'momentums': 'linear'}})`. "
        f"Received: inner_optimizer={type(optimizer).__name__}, which has "
        "no rules"
    )


def check_options(optimizer):
    """Refuses options of an optimizer that do not work with adapters."""
    if optimizer.use_ema:
        raise ValueError(
            "`use_ema` averages the factors of an adapter one by one, but "
            "their product is not the average update. Create the inner "
            "optimizer without it. Received: use_ema=True"
        )


def find_slots(optimizer, variables):
    """Finds the slots of a built optimizer for every variable.

    Args:
        optimizer: The built inner optimizer.
        variables: The list of variables it was built on.

    Returns:
        Dict from attribute name to the list of slots, for the attributes
        that this optimizer uses with its current options.
    """
    rules = slot_rules(optimizer)
    if getattr(optimizer, "centered", False):
        raise ValueError(
            "Centered RMSprop subtracts a squared mean, which depends on the "
            "basis, from a second moment, which must not depend on it. Write "
            "`RMSprop(..., centered=False)`. Received: centered=True"
        )
    slots = {name: getattr(optimizer, name, None) or [] for name in rules}
    slots = {name: found for name, found in slots.items() if found}
    known = {id(slot) for found in slots.values() for slot in found}
    known |= {id(v) for v in gradient_accumulators(optimizer)}
    unknown = [
        v.path
        for v in optimizer.variables
        if len(v.shape) and id(v) not in known
    ]
    if unknown:
        raise ValueError(
            "Every slot of the inner optimizer needs a rule; see "
            "`keras_geolora.register_slot_rules`. Received: "
            f"inner_optimizer={type(optimizer).__name__} with rules {rules}, "
            f"which do not cover {unknown[:3]}"
        )
    return slots


def has_factored_moments(optimizer):
    """Returns whether an optimizer multiplies moments of rows and columns."""
    return "column" in slot_rules(optimizer).values()


def _refuse(name, reason):
    """Refuses an optimizer, if this version of Keras has it."""
    optimizer_class = getattr(keras.optimizers, name, None)
    if optimizer_class is not None:
        _REFUSALS[optimizer_class] = reason


register_slot_rules(
    keras.optimizers.SGD, {"momentums": "linear"}, elementwise=True
)
for _adam in (keras.optimizers.Adam, keras.optimizers.AdamW):
    register_slot_rules(
        _adam,
        {
            "_momentums": "linear",
            "_velocities": "quadratic",
            "_velocity_hats": "quadratic",
        },
        elementwise=True,
    )
register_slot_rules(
    keras.optimizers.Nadam,
    {"_momentums": "linear", "_velocities": "quadratic"},
    elementwise=True,
)
register_slot_rules(
    keras.optimizers.Adamax,
    {"_m": "linear", "_u": "quadratic"},
    elementwise=True,
)
register_slot_rules(
    keras.optimizers.RMSprop,
    {"_velocities": "quadratic", "_momentums": "linear"},
    elementwise=True,
)
register_slot_rules(
    keras.optimizers.Lion, {"_momentums": "linear"}, elementwise=True
)
register_slot_rules(
    keras.optimizers.Adagrad, {"_accumulators": "quadratic"}, elementwise=True
)
register_slot_rules(
    keras.optimizers.Adadelta,
    {
        "_accumulated_grads": "quadratic",
        "_accumulated_delta_vars": "quadratic",
    },
    elementwise=True,
)
register_slot_rules(
    keras.optimizers.Adafactor, {"_r": "row", "_c": "column", "_v": "quadratic"}
)
register_slot_rules(
    keras.optimizers.Lamb,
    {"_momentums": "linear", "_velocities": "quadratic"},
)
register_slot_rules(
    keras.optimizers.Muon,
    {"momentums": "linear", "adam_velocities": "quadratic"},
)
_refuse(
    "Ftrl",
    "Ftrl recomputes a variable from the sum of all its gradients, which is "
    "meaningless once the bases have moved.",
)
_refuse(
    "ScheduleFreeAdamW",
    "ScheduleFreeAdamW keeps a second copy of every variable; copies of the "
    "three factors are not the factors of a copy of the update.",
)
_refuse(
    "LossScaleOptimizer",
    "Loss scaling must wrap the geometric step: "
    "`LossScaleOptimizer(GeoLoRA(...))`.",
)
_refuse(
    "MultiOptimizer",
    "One optimizer must update all three factors of an adapter.",
)
