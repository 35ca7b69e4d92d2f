"""How the slots of the inner optimizer follow the moving bases.

The columns of `U` and `V` change at every step, so a moment buffer that
stays put refers to directions that no longer exist. What happens to a slot
depends on what it means. That is data: a table by optimizer class, open to
others through `register_slot_rules`.

| kind          | the slot                       | how it moves               |
| ------------- | ------------------------------ | -------------------------- |
| `"linear"`    | adds up gradients or steps     | projected on the tangents  |
| `"quadratic"` | adds up their squares or sizes | mean over the rank axis    |
| `"row"`       | one number per row             | stays, but for `S`: mean   |
| `"column"`    | one number per column          | mean over the rank axis    |

A linear slot stands for a tangent vector of the old point. Its projection on
the tangent space of the new point is the nearest vector that the new
coordinates can express. No row takes more of it than its own.

A mean over the rank axis counts the columns in use only. It makes the second
moment the same in every basis; squaring the rotation instead would lose
energy for new directions and make their steps too large.
"""

import keras
from keras import ops

from keras_geolora.geometry.integrator import T, Unknowns, divide, norm

_RULES = {}  # class -> rules, and whether it is elementwise
_REFUSALS = {}


def register_slot_rules(optimizer_class, rules, elementwise=False):
    """Tells how the slots of an optimizer follow the moving bases.

    `GeoLoRA` needs to know what every slot of its inner optimizer means. The
    optimizers of Keras are registered; for your own, name the attribute that
    holds each list of slots (one per variable, in the order of `build`) and
    its kind.

    Args:
        optimizer_class: Subclass of `keras.optimizers.Optimizer`. The rules
            hold for its subclasses too, unless they have rules of their own.
        rules: Dict from attribute name to one of

            - `"linear"`: adds up gradients or steps, as a momentum does.
              It is projected on the new tangent space.
            - `"quadratic"`: adds up squares or absolute values, as Adam's
              velocity does. It is averaged over the rank axis.
            - `"row"`: one value per row of the variable. It stays, except
              for `S`, where rows are an axis of the rank too.
            - `"column"`: one value per column. It is averaged.
        elementwise: Bool, whether the step treats every number by itself, as
            Adam does, and looks at no norm or shape of a variable. Adapters
            of equal shape then take their step as one variable, which is
            faster. It holds for this class only, not for its subclasses.

    Raises:
        TypeError: If `optimizer_class` is no optimizer class.
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
        if kind not in _MOVES:
            raise ValueError(
                f"A slot is of one of the kinds {sorted(_MOVES)}. "
                f"Received: {attribute}={kind!r}"
            )
    _RULES[optimizer_class] = dict(rules), bool(elementwise)
    _REFUSALS.pop(optimizer_class, None)


def is_elementwise(optimizer):
    """Says whether an optimizer treats every number by itself.

    A `global_clipnorm` is one factor for all numbers; the `clipnorm` of a
    variable is not.
    """
    if optimizer.clipnorm is not None:
        return False
    for cls in type(optimizer).__mro__:
        if cls in _RULES:
            return _RULES[cls][1]
        # On torch, Keras has subclasses of its own for its optimizers.
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
        "moving bases. Tell it once, for example with "
        "`keras_geolora.register_slot_rules("
        f"{type(optimizer).__name__}, {{'momentums': 'linear'}})`. "
        f"Received: inner_optimizer={type(optimizer).__name__}, which has "
        "no rules"
    )


def check_options(optimizer):
    """Refuses options of an optimizer that do not go with adapters."""
    if optimizer.use_ema:
        raise ValueError(
            "The average of factors is not a factor of the average. Create "
            "the inner optimizer without `use_ema`. Received: use_ema=True"
        )


def find_slots(optimizer, variables):
    """Finds the slots of a built optimizer for every variable.

    Args:
        optimizer: The built inner optimizer.
        variables: The list of variables it was built on.

    Returns:
        Dict from attribute name to the list of slots, for the attributes
        that this optimizer uses with its present options.
    """
    rules = slot_rules(optimizer)
    if getattr(optimizer, "centered", False):
        raise ValueError(
            "Centered RMSprop subtracts a squared mean, which depends on the "
            "basis, from a second moment, which must not. Write "
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
            "Every slot of the inner optimizer needs a rule, see "
            "`keras_geolora.register_slot_rules`. "
            f"Received: inner_optimizer={type(optimizer).__name__} with "
            f"rules {rules}, which say nothing of {unknown[:3]}"
        )
    return slots


def has_factored_moments(optimizer):
    """Says whether an optimizer multiplies moments of rows and columns."""
    return "column" in slot_rules(optimizer).values()


def gradient_accumulators(optimizer):
    """Returns the sums of gradients between two updates, if there are any."""
    return getattr(optimizer, "_accumulated_gradients", [])


def transport(kind, slots, move):
    """Moves the slots of one kind into new bases.

    Args:
        kind: `"linear"`, `"quadratic"`, `"row"` or `"column"`.
        slots: `Unknowns` of arrays, the slots of `K`, `S` and `L`.
        move: `Move` of the point.

    Returns:
        `Unknowns` of the same shapes.
    """
    return _MOVES[kind](slots, move)


def _project(slots, move):
    """Projects `M = m_K V.T + U m_L.T - U m_S V.T` on a new tangent space.

    The slots are `M V`, `U.T M V` and `M.T U` in the old bases, and become
    the same in the new ones; `M` is never formed.
    """
    m_K, m_S, m_L = slots
    old, new, _, A, B = move
    K_in_U = ops.matmul(T(new.U), m_K)
    across = ops.matmul(T(m_L), new.V) - ops.matmul(m_S, B)
    down = T(K_in_U) - ops.matmul(T(m_S), A)
    return Unknowns(
        limited_sum(ops.matmul(m_K, B), ops.matmul(old.U, across)),
        ops.matmul(K_in_U, B) + ops.matmul(T(A), across),
        limited_sum(ops.matmul(m_L, A), ops.matmul(old.V, down)),
    )


def limited_sum(own, others):
    """Adds to every row what others say of it, but no more than its own.

    A row without a gradient, as of a token that was not seen, has a second
    moment of zero: whatever else its first moment becomes would be divided by
    that.
    """
    share = divide(norm(own, -1), norm(others, -1))
    return own + ops.minimum(share, 1.0) * others


def _average(slots, move):
    K, S, L = slots
    S = T(mean_of_active(T(S), move.active))
    return Unknowns(
        mean_of_active(K, move.active),
        mean_of_active(S, move.active),
        mean_of_active(L, move.active),
    )


def _average_columns(slots, move):
    return Unknowns(*(mean_of_row(x, move.active) for x in slots))


def _keep_rows(slots, move):
    K, S, L = slots
    return Unknowns(K, mean_of_row(S, move.active), L)


def mean_of_row(x, active):
    """As `mean_of_active`, for arrays without rows, `(..., r)`."""
    return mean_of_active(x[..., None, :], active)[..., 0, :]


def mean_of_active(x, active):
    """Replaces the entries of the last axis by the mean of the active ones.

    Args:
        x: Array of shape `(..., n, r)`.
        active: Bool array of shape `(..., r)`.

    Returns:
        Array of the shape of `x`.
    """
    weights = ops.cast(active, x.dtype)
    number = ops.sum(weights, axis=-1, keepdims=True)
    weights = weights / ops.maximum(number, 1.0)
    mean = ops.matmul(x, weights[..., None])
    return ops.broadcast_to(mean, ops.shape(x))


_MOVES = {
    "linear": _project,
    "quadratic": _average,
    "row": _keep_rows,
    "column": _average_columns,
}


def _refuse(name, reason):
    """Refuses an optimizer, where this version of Keras has it."""
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
    "Ftrl computes a variable anew from the sum of all its gradients, which "
    "says nothing once the bases have moved.",
)
_refuse(
    "ScheduleFreeAdamW",
    "ScheduleFreeAdamW keeps a second copy of every variable; the copies of "
    "three factors are not the factors of a copy.",
)
_refuse(
    "LossScaleOptimizer",
    "Loss scaling goes around the geometric step: "
    "`LossScaleOptimizer(GeoLoRA(...))`.",
)
_refuse(
    "MultiOptimizer",
    "The three factors of an adapter are moved by one optimizer.",
)
