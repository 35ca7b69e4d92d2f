"""The slots of the inner optimizers follow the bases."""

import keras
import numpy as np
import pytest
import reference
from keras import ops

from keras_geolora import LowRankAdapter
from keras_geolora.geometry.integrator import (
    Move,
    Point,
    T,
    Unknowns,
    active_columns,
)
from keras_geolora.geometry.transport import mean_of_active, transport
from keras_geolora.optimizer.slot_rules import (
    find_slots,
    register_slot_rules,
    slot_rules,
)

MAX_RANK = 5
SIDES = 12, 8


def pad(basis):
    return np.pad(basis, ((0, 0), (0, MAX_RANK - basis.shape[1])))


def random_point(seed, sigma):
    """A point in buffers of `MAX_RANK` columns, float32, batch of one."""
    rng = np.random.default_rng(seed)
    U, S, V = reference.random_factors(rng, *SIDES, sigma)
    S = np.pad(S, (0, MAX_RANK - len(sigma)))
    return batch(Point(pad(U), S, pad(V)))


def batch(arrays):
    return type(arrays)(*(x[None].astype("float32") for x in arrays))


def unbatch(arrays):
    return [keras.ops.convert_to_numpy(x)[0] for x in arrays]


def tensors(arrays):
    return type(arrays)(*map(keras.ops.convert_to_tensor, arrays))


def transported(kind, slots, old, new):
    old, new = tensors(old), tensors(new)
    move = Move(
        old,
        new,
        active_columns(old.U),
        ops.matmul(T(old.U), new.U),
        ops.matmul(T(old.V), new.V),
    )
    return transport(kind, tensors(slots), move)


def move(kind, slots, old, new):
    return unbatch(transported(kind, slots, old, new))


def coordinates(M, point):
    """The slots of a tangent vector `M`: `M V`, `U.T M V`, `M.T U`."""
    U, V = point.U[0], point.V[0]
    return Unknowns(M @ V, U.T @ M @ V, M.T @ U)


def rotated(point, seed):
    """The same column spaces in other bases."""
    rng = np.random.default_rng(seed)
    bases = []
    for basis in (point.U[0], point.V[0]):
        rank = int((basis != 0).any(axis=0).sum())
        Q = np.linalg.qr(rng.normal(size=(rank, rank)))[0]
        bases.append(pad(basis[:, :rank] @ Q))
    return batch(Point(bases[0], point.S[0], bases[1]))


def random_slots(seed):
    rng = np.random.default_rng(seed)
    shapes = [(SIDES[0], MAX_RANK), (MAX_RANK,) * 2, (SIDES[1], MAX_RANK)]
    return batch(Unknowns(*(rng.uniform(1, 2, shape) for shape in shapes)))


def test_a_moment_is_the_same_matrix_in_rotated_bases():
    old = random_point(0, [3.0, 2.0, 1.0])
    new = rotated(old, 1)
    M = np.random.default_rng(2).normal(size=SIDES)
    moved = move("linear", batch(coordinates(M, old)), old, new)
    for x, y in zip(moved, coordinates(M, new), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_a_moment_is_projected_on_the_new_tangent_space():
    old, new = random_point(0, [3.0, 2.0]), random_point(1, [3.0, 2.0, 1.0])
    M = np.random.default_rng(2).normal(size=SIDES)
    known = reference.tangent_projection(old.U[0], old.V[0], M)
    K, S, L = move("linear", batch(coordinates(M, old)), old, new)
    expected = coordinates(known, new)
    np.testing.assert_allclose(S, expected.S, atol=1e-5)
    own = M @ old.V[0] @ old.V[0].T @ new.V[0]
    limited = reference.limited(expected.K, own)
    np.testing.assert_allclose(K, limited, atol=1e-5)
    own = M.T @ old.U[0] @ old.U[0].T @ new.U[0]
    limited = reference.limited(expected.L, own)
    np.testing.assert_allclose(L, limited, atol=1e-5)


def test_a_row_without_a_gradient_stays_without_a_moment():
    old, new = random_point(0, [3.0, 2.0]), random_point(1, [3.0, 2.0])
    M = np.random.default_rng(2).normal(size=SIDES)
    M[3] = 0
    K, _, _ = move("linear", batch(coordinates(M, old)), old, new)
    assert not K[3].any() and K[4].any()


def test_a_moment_of_unused_columns_is_zero():
    old, new = random_point(0, [3.0, 2.0, 1.0]), random_point(1, [3.0, 2.0])
    K, S, L = move("linear", random_slots(2), old, new)
    assert not K[:, 2:].any() and not L[:, 2:].any()
    assert not S[2:].any() and not S[:, 2:].any()
    assert K[:, :2].all() and L[:, :2].all() and S[:2, :2].all()


def in_use(basis):
    """The columns of a padded basis that are not zero."""
    return basis[:, (basis != 0).any(axis=0)].astype("float64")


def test_a_second_moment_follows_the_columns():
    old, new = random_point(0, [3.0, 2.0, 1.0]), random_point(1, [3.0, 2.0])
    slots = random_slots(2)
    K, S, L = (x.astype("float64") for x in unbatch(slots))
    moved = move("quadratic", slots, old, new)
    bases = [in_use(point.V[0]) for point in (old, new)]
    expected_K = reference.followed(K[:, :3], *bases)
    bases = [in_use(point.U[0]) for point in (old, new)]
    expected_L = reference.followed(L[:, :3], *bases)
    np.testing.assert_allclose(moved[0][:, :2], expected_K, rtol=1e-5)
    np.testing.assert_allclose(moved[2][:, :2], expected_L, rtol=1e-5)
    mean = np.full((MAX_RANK, MAX_RANK), S[:3, :3].mean())
    np.testing.assert_allclose(moved[1], mean, rtol=1e-5)


def test_second_moments_stay_with_their_directions():
    point = random_point(0, [3.0, 2.0, 1.0])
    order = [2, 0, 1, 3, 4]
    U, S, V = point
    same = Point(U[..., order], S[..., order], -V[..., order])
    K, _, L = unbatch(random_slots(2))
    moved = move("quadratic", random_slots(2), point, same)
    np.testing.assert_allclose(moved[0][:, :3], K[:, order[:3]], rtol=1e-4)
    np.testing.assert_allclose(moved[2][:, :3], L[:, order[:3]], rtol=1e-4)


def test_a_direction_from_outside_gets_the_mean_of_second_moments():
    old = random_point(0, [3.0, 2.0])
    whole = np.linalg.qr(np.concatenate([old.V[0, :, :2], np.eye(8)], 1))[0]
    outside = batch(Point(old.U[0], old.S[0], pad(whole[:, 3:4])))
    K = unbatch(random_slots(2))[0]
    moved = move("quadratic", random_slots(2), old, outside)[0]
    np.testing.assert_allclose(moved[:, 0], K[:, :2].mean(axis=1), rtol=1e-4)


def test_no_second_moment_is_less_than_the_smallest_or_more_than_the_largest():
    for seed in range(5):
        old = random_point(seed, [3.0, 2.0, 1.0])
        new = random_point(seed + 9, [3.0, 2.0, 1.0, 0.5])
        slots = random_slots(seed)
        for before, after in zip(
            unbatch(slots), move("quadratic", slots, old, new), strict=True
        ):
            used = before[:, :3] if len(before) > MAX_RANK else before[:3, :3]
            assert (after <= used.max(axis=1).max() + 1e-5).all()
            assert (after >= used.min(axis=1).min() - 1e-5).all()


def test_averaged_slots_become_the_mean_over_the_columns_in_use():
    old, new = random_point(0, [3.0, 2.0, 1.0]), random_point(1, [3.0, 2.0])
    slots = random_slots(2)
    K, S, L = unbatch(slots)
    moved = move("averaged", slots, old, new)
    expected = [
        np.repeat(K[:, :3].mean(axis=1, keepdims=True), MAX_RANK, axis=1),
        np.full((MAX_RANK, MAX_RANK), S[:3, :3].mean()),
        np.repeat(L[:, :3].mean(axis=1, keepdims=True), MAX_RANK, axis=1),
    ]
    for x, y in zip(moved, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5)
    again = move("averaged", batch(Unknowns(*moved)), old, old)
    for x, y in zip(again, moved, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5)


def test_averaged_slots_do_not_depend_on_the_order_of_columns():
    old = random_point(0, [3.0, 2.0, 1.0])
    slots = random_slots(2)
    order = [2, 0, 1, 3, 4]
    K, S, L = unbatch(slots)
    shuffled = Unknowns(K[:, order], S[order][:, order], L[:, order])
    these = move("averaged", slots, old, old)
    those = move("averaged", batch(shuffled), old, old)
    for x, y in zip(these, those, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5)


def test_one_number_per_row_stays_where_no_row_is_an_axis_of_the_rank():
    old, new = random_point(0, [3.0, 2.0, 1.0]), random_point(1, [3.0, 2.0])
    rows = Unknowns(*(x[..., 0] for x in random_slots(2)))
    moved = Unknowns(*move("row", rows, old, new))
    before = Unknowns(*unbatch(rows))
    np.testing.assert_array_equal(moved.K, before.K)
    np.testing.assert_array_equal(moved.L, before.L)
    mean = np.full(MAX_RANK, before.S[:3].mean())
    np.testing.assert_allclose(moved.S, mean, rtol=1e-5)


def test_one_number_per_column_becomes_their_mean():
    old, new = random_point(0, [3.0, 2.0, 1.0]), random_point(1, [3.0, 2.0])
    columns = Unknowns(*(x[:, 0] for x in random_slots(2)))
    moved = move("column", columns, old, new)
    for x, y in zip(moved, unbatch(columns), strict=True):
        np.testing.assert_allclose(x, np.full(MAX_RANK, y[:3].mean()), 1e-5)


def test_the_mean_of_no_column_is_zero():
    x, active = keras.ops.ones((2, 3, 4)), keras.ops.zeros((2, 4), "bool")
    mean = keras.ops.convert_to_numpy(mean_of_active(x, active))
    np.testing.assert_array_equal(mean, np.zeros((2, 3, 4)))


@pytest.mark.parametrize(
    "kind", ["linear", "quadratic", "averaged", "row", "column"]
)
def test_every_adapter_of_a_batch_moves_on_its_own(kind):
    olds = [random_point(0, [3.0, 2.0, 1.0]), random_point(1, [3.0, 2.0])]
    news = [random_point(2, [3.0, 2.0]), random_point(3, [3.0, 2.0, 1.0, 0.5])]
    slots = [random_slots(4), random_slots(5)]
    if kind in ("row", "column"):
        slots = [Unknowns(*(x[:, 0] for x in s)) for s in slots]

    def stack(pair):
        return type(pair[0])(
            *(np.concatenate(arrays) for arrays in zip(*pair, strict=True))
        )

    old, new = stack(olds), stack(news)
    together = transported(kind, stack(slots), old, new)
    for i in range(2):
        alone = move(kind, slots[i], olds[i], news[i])
        for x, y in zip(together, alone, strict=True):
            x = keras.ops.convert_to_numpy(x)[i]
            np.testing.assert_allclose(x, y, atol=1e-6)


# Rules.

WITH_ALL_SLOTS = {
    "SGD": {"momentum": 0.9},
    "Adam": {"amsgrad": True},
    "AdamW": {"amsgrad": True},
    "RMSprop": {"momentum": 0.5},
    "Muon": {"exclude_layers": ["S"]},
}
WITH_RULES = [
    "SGD",
    "Adam",
    "AdamW",
    "Nadam",
    "Adamax",
    "RMSprop",
    "Lion",
    "Adagrad",
    "Adadelta",
    "Adafactor",
    "Lamb",
    "Muon",
]
REFUSED = ["Ftrl", "LossScaleOptimizer", "MultiOptimizer", "ScheduleFreeAdamW"]


def test_every_optimizer_of_keras_has_rules_or_is_refused():
    classes = {
        name
        for name, value in vars(keras.optimizers).items()
        if isinstance(value, type)
        and issubclass(value, keras.optimizers.Optimizer)
    }
    assert classes - {"Optimizer"} <= {*WITH_RULES, *REFUSED}


@pytest.mark.parametrize("name", WITH_RULES)
def test_every_rule_names_slots_that_the_optimizer_has(name):
    optimizer_class = getattr(keras.optimizers, name)
    optimizer = optimizer_class(**WITH_ALL_SLOTS.get(name, {}))
    adapter = LowRankAdapter(12, 8, rank=2)
    variables = list(adapter.factors[:3])
    optimizer.build(variables)
    slots = find_slots(optimizer, variables)
    assert set(slots) == set(slot_rules(optimizer))
    assert all(len(found) == 3 for found in slots.values())


@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.9}], ids=["plain", "momentum"]
)
def test_slots_that_an_option_switches_off_are_not_there(options):
    optimizer = keras.optimizers.SGD(**options)
    adapter = LowRankAdapter(12, 8, rank=2)
    variables = list(adapter.factors[:3])
    optimizer.build(variables)
    assert len(find_slots(optimizer, variables)) == len(options)


def test_rules_hold_for_subclasses_until_they_have_their_own():
    class Child(keras.optimizers.SGD):
        pass

    assert slot_rules(Child(0.1)) == {"momentums": "linear"}
    register_slot_rules(Child, {"momentums": "quadratic"})
    assert slot_rules(Child(0.1)) == {"momentums": "quadratic"}
    assert slot_rules(keras.optimizers.SGD()) == {"momentums": "linear"}


def test_rules_of_ones_own_lift_a_refusal_of_the_parent():
    class Child(keras.optimizers.Ftrl):
        pass

    with pytest.raises(ValueError, match="Received: inner_optimizer=Child"):
        slot_rules(Child())
    register_slot_rules(Child, {"_accumulators": "quadratic"})
    assert slot_rules(Child()) == {"_accumulators": "quadratic"}


def test_changing_the_registered_dict_later_changes_nothing():
    class Child(keras.optimizers.SGD):
        pass

    rules = {"momentums": "quadratic"}
    register_slot_rules(Child, rules)
    rules["momentums"] = "linear"
    assert slot_rules(Child(0.1)) == {"momentums": "quadratic"}
