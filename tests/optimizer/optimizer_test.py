"""GeoLoRA, step by step: `apply` with gradients that are known in advance."""

import functools
import json
import math

import keras
import numpy as np
import pytest
import reference

from keras_geolora import (
    GeoLoRA,
    GeoLoRADense,
    LowRankAdapter,
    register_slot_rules,
)
from keras_geolora.geometry import manifold

# Every inner optimizer and variant, with a learning rate for `Regression`.
INNER = {
    "SGD": lambda **o: keras.optimizers.SGD(**{"learning_rate": 0.1} | o),
    "SGD-momentum": lambda **o: keras.optimizers.SGD(
        **{"learning_rate": 0.03, "momentum": 0.9} | o
    ),
    "SGD-Nesterov": lambda **o: keras.optimizers.SGD(
        **{"learning_rate": 0.03, "momentum": 0.9, "nesterov": True} | o
    ),
    "Adam": lambda **o: keras.optimizers.Adam(**{"learning_rate": 0.1} | o),
    "Adam-amsgrad": lambda **o: keras.optimizers.Adam(
        **{"learning_rate": 0.1, "amsgrad": True} | o
    ),
    "AdamW": lambda **o: keras.optimizers.AdamW(**{"learning_rate": 0.1} | o),
    "Nadam": lambda **o: keras.optimizers.Nadam(**{"learning_rate": 0.1} | o),
    "Adamax": lambda **o: keras.optimizers.Adamax(**{"learning_rate": 0.1} | o),
    "RMSprop": lambda **o: keras.optimizers.RMSprop(
        **{"learning_rate": 0.03} | o
    ),
    "RMSprop-momentum": lambda **o: keras.optimizers.RMSprop(
        **{"learning_rate": 0.02, "momentum": 0.5} | o
    ),
    "RMSprop-centered": lambda **o: keras.optimizers.RMSprop(
        **{"learning_rate": 0.02, "centered": True} | o
    ),
    "Lion": lambda **o: keras.optimizers.Lion(**{"learning_rate": 0.05} | o),
    "Adagrad": lambda **o: keras.optimizers.Adagrad(
        **{"learning_rate": 0.3} | o
    ),
    "Adadelta": lambda **o: keras.optimizers.Adadelta(
        **{"learning_rate": 50.0} | o
    ),
    "Adafactor": lambda **o: keras.optimizers.Adafactor(
        **{"learning_rate": 1.0, "epsilon_2": 0.1} | o
    ),
    "Lamb": lambda **o: keras.optimizers.Lamb(**{"learning_rate": 0.1} | o),
    "Muon": lambda **o: keras.optimizers.Muon(**{"learning_rate": 0.2} | o),
}
inner_optimizers = pytest.mark.parametrize("inner", INNER.values(), ids=INNER)
ON_ADAPTERS = sorted(set(INNER) - {"RMSprop-centered"})

# Options of every Keras optimizer, alone and together.
OPTIONS = {
    "clipnorm": {"clipnorm": 0.5},
    "clipvalue": {"clipvalue": 0.1},
    "global_clipnorm": {"global_clipnorm": 0.5},
    "schedule": {
        "learning_rate": keras.optimizers.schedules.ExponentialDecay(
            0.1, decay_steps=2, decay_rate=0.5
        )
    },
    "weight_decay": {"weight_decay": 0.02},
    "accumulation": {"gradient_accumulation_steps": 2},
    "loss_scale": {"loss_scale_factor": 8.0},
}
TOGETHER = {
    **OPTIONS["schedule"],
    **OPTIONS["weight_decay"],
    **OPTIONS["global_clipnorm"],
    **OPTIONS["accumulation"],
    **OPTIONS["loss_scale"],
}


def to_numpy(variables):
    return [np.array(keras.ops.convert_to_numpy(v)) for v in variables]


def tensors(arrays):
    return [
        None if x is None else keras.ops.convert_to_tensor(x.astype("float32"))
        for x in arrays
    ]


def assert_identical(these, those):
    for x, y in zip(these, those, strict=True):
        np.testing.assert_array_equal(x, y)


def assert_moved(these, those):
    for x, y in zip(these, those, strict=True):
        assert np.isfinite(x).all()
        at_rest = not (x.any() or y.any())  # P and Q
        assert at_rest or not np.array_equal(x, y)


def factors(adapter):
    return list(adapter.factors)


def delta(adapter):
    U, S, V, P, Q = (x.astype("float64") for x in to_numpy(factors(adapter)))
    return U @ S @ V.T + P @ V.T + U @ Q.T


def slots_of(optimizer, adapter, sums=True):
    """The slots of one adapter, with sums of gradients or without."""
    for group in optimizer.adapter_groups:
        if adapter in group.adapters:
            row = group.adapters.index(adapter)
            stores = [store for _, store in group.slots]
            stores += group.accumulators if sums else []
            return [x[row] for store in stores for x in to_numpy(store.read())]
    raise LookupError(adapter.path)


def place(adapter, sigma, seed=0):
    """Puts an adapter at a random point with given singular values."""
    rng = np.random.default_rng(seed)
    shape = adapter.input_dim, adapter.output_dim
    adapter.assign_factors(*reference.random_factors(rng, *shape, sigma))


def assert_on_manifold(adapter):
    U, S, V, P, Q = to_numpy(factors(adapter))
    assert manifold.distance(U, S, V, P, Q) < 1e-5
    if not (P.any() or Q.any()):
        assert_identical([S], [np.diag(np.diag(S))])
        assert (np.diag(S) >= 0).all()


def gradients_of(adapter, G):
    """The gradients of the factors, if `G` is that of the update."""
    U, _, V, *_ = to_numpy(factors(adapter))
    return [G @ V, U.T @ G @ V, G.T @ U, 0 * U, 0 * V]


class Regression:
    """Fits every adapter to a matrix of rank 3: `||U S V.T - target||^2 / 2`.

    The gradients come from NumPy, so that no backend is needed for them.
    """

    def __init__(self, shapes=((12, 8), (12, 8)), rank=2, max_rank=5):
        rng = np.random.default_rng(0)
        self.adapters = [
            self.adapter(*shape, rank=rank, max_rank=max_rank, seed=2 * i)
            for i, shape in enumerate(shapes)
        ]
        self.targets = [
            reference.random_factors(rng, *shape, [4.0, 2.0, 1.0])
            for shape in shapes
        ]
        self.targets = [U @ S @ V.T for U, S, V in self.targets]

    @staticmethod
    def adapter(input_dim, output_dim, **options):
        # A kernel of zeros puts no bound on the steps.
        layer = GeoLoRADense(output_dim, kernel_initializer="zeros", **options)
        layer.build((None, input_dim))
        return layer.adapter

    @property
    def variables(self):
        return [v for a in self.adapters for v in factors(a)]

    def state(self, optimizer):
        return to_numpy([*self.variables, *optimizer.variables])

    def gradients(self):
        found = []
        for adapter, target in zip(self.adapters, self.targets, strict=True):
            found += gradients_of(adapter, delta(adapter) - target)
        return found

    def loss(self):
        return sum(
            np.square(delta(a) - t).sum() / 2
            for a, t in zip(self.adapters, self.targets, strict=True)
        )

    def step(self, optimizer, gradients=None):
        gradients = self.gradients() if gradients is None else gradients
        optimizer.apply(tensors(gradients), self.variables)


def traced(optimizer, variables):
    """Returns `apply` for gradients of these variables, as `fit` runs it.

    TensorFlow takes a tenth of a second for a step outside of a graph, and
    half a second to trace one.
    """
    optimizer.build(variables)

    def apply(gradients):
        optimizer.apply(gradients, variables)

    if keras.backend.backend() != "tensorflow":
        return apply
    import tensorflow as tf

    return tf.function(apply, autograph=False)


class Trainer:
    """A problem, and variables beside it, with an inner optimizer."""

    def __init__(self, name):
        self.problem, self.plain = Regression(), plain_variables()
        self.variables = self.problem.variables + self.plain
        self.optimizer = GeoLoRA(INNER[name](), tolerance=0.1, cut_interval=5)
        self.apply = traced(self.optimizer, self.variables)
        rng = np.random.default_rng(1)
        self.slopes = [rng.normal(size=v.shape) for v in self.plain]
        self.start = self.state()

    @classmethod
    @functools.cache
    def _made(cls, name):
        return cls(name)

    @classmethod
    def at_start(cls, name):
        """Returns the one of this optimizer, as if it was new."""
        trainer = cls._made(name)
        trainer.restore(trainer.start)
        return trainer

    def state(self):
        return to_numpy([*self.variables, *self.optimizer.variables])

    def restore(self, state):
        variables = [*self.variables, *self.optimizer.variables]
        for variable, value in zip(variables, state, strict=True):
            variable.assign(value)

    def step(self, gradients=None, slopes=None):
        gradients = self.problem.gradients() if gradients is None else gradients
        slopes = self.slopes if slopes is None else slopes
        self.apply(tensors([*gradients, *map(np.asarray, slopes)]))

    def skipped(self):
        return int(to_numpy([self.optimizer.skipped_steps])[0])


# Variables that belong to no adapter.


def plain_variables(seed=0):
    rng = np.random.default_rng(seed)
    return [
        keras.Variable(rng.normal(size=shape).astype("float32"), name=f"v{i}")
        for i, shape in enumerate([(4, 3), (3,), (2, 3, 2), ()])
    ]


def assert_wrapper_is_inner(inner, options, steps=4):
    bare, wrapped = inner(**options), GeoLoRA(inner(**options))
    these, those = plain_variables(), plain_variables()
    rng = np.random.default_rng(1)
    for _ in range(steps):
        grads = [rng.normal(size=v.shape) for v in these]
        bare.apply(tensors(map(np.asarray, grads)), these)
        wrapped.apply(tensors(map(np.asarray, grads)), those)
        assert_identical(to_numpy(these), to_numpy(those))
    assert_identical(
        to_numpy(bare.variables), to_numpy(wrapped.inner_optimizer.variables)
    )


@pytest.mark.parametrize("options", [{}, TOGETHER], ids=["plain", "options"])
@inner_optimizers
def test_without_adapters_the_wrapper_is_the_inner_optimizer(inner, options):
    assert_wrapper_is_inner(inner, options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("inner", ["SGD-momentum", "AdamW"])
def test_without_adapters_each_option_does_what_it_does(inner, options):
    assert_wrapper_is_inner(INNER[inner], options)


@pytest.mark.parametrize("name", ON_ADAPTERS)
def test_variables_beside_adapters_get_the_inner_step_bit_for_bit(name):
    trainer, these = Trainer.at_start(name), plain_variables()
    apply = traced(INNER[name](), these)
    rng = np.random.default_rng(1)
    for _ in range(4):
        grads = [np.asarray(rng.normal(size=v.shape)) for v in these]
        apply(tensors(grads))
        trainer.step(slopes=grads)
        assert_identical(to_numpy(these), to_numpy(trainer.plain))


@pytest.mark.parametrize(
    "selection", [{"var_names": ["v1"]}, {"var_list": [1]}], ids=["name", "var"]
)
def test_exclude_from_weight_decay_reaches_the_inner_optimizer(selection):
    variables = plain_variables()
    if "var_list" in selection:
        selection = {"var_list": [variables[1]]}
    optimizer = GeoLoRA(keras.optimizers.SGD(0.1, weight_decay=0.5))
    optimizer.exclude_from_weight_decay(**selection)
    before = to_numpy(variables)
    optimizer.apply(tensors([np.zeros(v.shape) for v in variables]), variables)
    after = to_numpy(variables)
    assert_identical(after[1:2], before[1:2])
    assert_moved(after[:1] + after[2:], before[:1] + before[2:])


def test_an_optimizer_that_is_not_built_needs_variables():
    with pytest.raises(ValueError, match="must already be built"):
        GeoLoRA("sgd").apply(tensors([np.ones(3)]))


def test_apply_gradients_takes_pairs():
    problem, other = Regression(), Regression()
    optimizer = GeoLoRA(INNER["Adam"]())
    pairs = zip(tensors(problem.gradients()), problem.variables, strict=True)
    optimizer.apply_gradients(pairs)
    other.step(GeoLoRA(INNER["Adam"]()))
    assert_identical(to_numpy(problem.variables), to_numpy(other.variables))


# Adapters.


def test_centered_rmsprop_is_refused_on_adapters():
    optimizer = GeoLoRA(INNER["RMSprop-centered"]())
    with pytest.raises(ValueError, match="Received: centered=True"):
        optimizer.build(Regression().variables)


@pytest.mark.parametrize("name", ON_ADAPTERS)
def test_every_inner_optimizer_trains_on_the_manifold(name):
    trainer = Trainer.at_start(name)
    problem = trainer.problem
    before = problem.loss()
    for _ in range(30):
        trainer.step()
        for adapter in problem.adapters:
            assert_on_manifold(adapter)
    assert trainer.skipped() == 0
    slots = to_numpy(trainer.optimizer.inner_optimizer.variables)
    assert all(np.isfinite(x).all() for x in slots)
    assert problem.loss() < 0.5 * before


def test_steps_of_sgd_are_those_of_the_reference():
    problem = Regression(shapes=[(12, 8), (6, 10), (12, 8)])
    for seed, adapter in enumerate(problem.adapters):
        place(adapter, [3.0, 1.0], seed)
    optimizer = GeoLoRA(keras.optimizers.SGD(0.1), tolerance=0.0)
    points = []
    for adapter in problem.adapters:
        U, S, V = (x.astype("float64") for x in adapter.trimmed())
        points.append((U[:, :2], S[:2, :2], V[:, :2]))
    for _ in range(5):
        problem.step(optimizer)
        for i, (U, S, V) in enumerate(points):
            G = U @ S @ V.T - problem.targets[i]
            points[i] = U, S, V = reference.sgd_step(
                U, S, V, G, 0.1, max_rank=5
            )
            np.testing.assert_allclose(
                delta(problem.adapters[i]), U @ S @ V.T, atol=1e-5
            )


def test_adapters_in_a_group_do_not_disturb_each_other():
    together, apart = Regression(), Regression()
    one = GeoLoRA(INNER["Adam"](), cut_interval=2)
    two = [GeoLoRA(INNER["Adam"](), cut_interval=2) for _ in range(2)]
    for _ in range(4):
        together.step(one)
        grads = tensors(apart.gradients())
        for i, optimizer in enumerate(two):
            part = slice(5 * i, 5 * i + 5)
            optimizer.apply(grads[part], apart.variables[part])
    for these, those in zip(together.adapters, apart.adapters, strict=True):
        np.testing.assert_allclose(delta(these), delta(those), atol=1e-5)


def test_weight_decay_shrinks_the_update_itself():
    problem = Regression()
    for adapter in problem.adapters:
        place(adapter, [3.0, 1.0])
    before = [delta(a) for a in problem.adapters]
    optimizer = GeoLoRA(keras.optimizers.SGD(0.1, weight_decay=0.5))
    problem.step(optimizer, [np.zeros(v.shape) for v in problem.variables])
    for adapter, old in zip(problem.adapters, before, strict=True):
        np.testing.assert_allclose(delta(adapter), 0.95 * old, atol=1e-6)


def clip_each(gradients):
    return [g * 0.5 / max(np.linalg.norm(g), 0.5) for g in gradients]


def clip_all(gradients):
    size = math.sqrt(sum(np.square(g).sum() for g in gradients))
    return [g * min(0.5 / size, 1.0) for g in gradients]


@pytest.mark.parametrize(
    "option, clip",
    [
        ({"clipnorm": 0.5}, clip_each),
        ({"global_clipnorm": 0.5}, clip_all),
        ({"clipvalue": 0.1}, lambda gs: [np.clip(g, -0.1, 0.1) for g in gs]),
    ],
    ids=["clipnorm", "global_clipnorm", "clipvalue"],
)
def test_gradients_of_adapters_are_clipped_before_the_step(option, clip):
    these, those = Regression(), Regression()
    clipped = GeoLoRA(keras.optimizers.SGD(0.1, **option))
    plain = GeoLoRA(keras.optimizers.SGD(0.1))
    for _ in range(3):
        these.step(clipped)
        those.step(plain, clip(those.gradients()))
    for x, y in zip(these.adapters, those.adapters, strict=True):
        assert np.linalg.norm(delta(y)) > 0.05
        np.testing.assert_allclose(delta(x), delta(y), atol=1e-5)


def test_a_loss_scale_factor_leaves_the_step_as_it_is():
    these, those = Regression(), Regression()
    scaled = GeoLoRA(keras.optimizers.SGD(0.1, loss_scale_factor=8.0))
    plain = GeoLoRA(keras.optimizers.SGD(0.1))
    assert float(scaled.scale_loss(1.0)) == 8.0
    for _ in range(3):
        these.step(scaled, [8 * g for g in these.gradients()])
        those.step(plain)
    for x, y in zip(these.adapters, those.adapters, strict=True):
        np.testing.assert_allclose(delta(x), delta(y), atol=1e-5)


# Ranks.


def cut_once(adapter, tolerance):
    """A step without a gradient, which cuts."""
    optimizer = GeoLoRA(keras.optimizers.SGD(0.1), tolerance, cut_interval=1)
    grads = [np.zeros(v.shape) for v in factors(adapter)]
    optimizer.apply(tensors(grads), factors(adapter))
    assert_on_manifold(adapter)


def test_a_cut_discards_at_most_tolerance_of_the_norm():
    adapter = LowRankAdapter(12, 8, rank=4, max_rank=5)
    sigma = [3.0, 1.0, 0.25, 0.2]
    place(adapter, sigma)
    before = delta(adapter)
    cut_once(adapter, tolerance=0.11)  # 0.32 of 3.18 may go
    assert adapter.rank == 2
    lost = np.linalg.norm(delta(adapter) - before)
    np.testing.assert_allclose(lost, math.hypot(0.25, 0.2), rtol=1e-4)


def test_a_cut_keeps_a_tail_above_tolerance():
    adapter = LowRankAdapter(12, 8, rank=4, max_rank=5)
    place(adapter, [3.0, 1.0, 0.25, 0.2])
    cut_once(adapter, tolerance=0.09)  # 0.29 of 3.18 may go, 0.32 may not
    assert adapter.rank == 3


def test_a_cut_without_tolerance_keeps_the_update():
    adapter = LowRankAdapter(12, 8, rank=4, max_rank=5)
    place(adapter, [3.0, 1.0, 0.25, 1e-3])
    before = delta(adapter)
    cut_once(adapter, tolerance=0.0)
    assert adapter.rank == 4
    np.testing.assert_allclose(delta(adapter), before, atol=1e-6)


def test_a_cut_keeps_the_rank_above_min_rank():
    adapter = LowRankAdapter(12, 8, rank=4, max_rank=5, min_rank=3)
    place(adapter, [3.0, 1e-2, 1e-2, 1e-2])
    cut_once(adapter, tolerance=0.5)
    assert adapter.rank == 3


def test_the_rank_stays_below_max_rank():
    problem = Regression(rank=4, max_rank=5)
    optimizer = GeoLoRA(INNER["Adam"](), tolerance=0.0)
    for _ in range(5):
        problem.step(optimizer)
        assert [a.rank for a in problem.adapters] == [5, 5]


def test_the_rank_shrinks_only_at_a_cut():
    adapter = LowRankAdapter(12, 8, rank=4, max_rank=5)
    place(adapter, [3.0, 1e-2, 1e-2, 1e-2])
    optimizer = GeoLoRA(keras.optimizers.SGD(0.1), 0.1, cut_interval=3)
    grads = tensors([np.zeros(v.shape) for v in factors(adapter)])
    ranks = []
    for _ in range(4):
        optimizer.apply(grads, factors(adapter))
        ranks.append(adapter.rank)
    assert ranks == [4, 4, 1, 1]


def test_cuts_are_counted_in_updates_of_gradient_accumulation():
    adapter = LowRankAdapter(12, 8, rank=4, max_rank=5)
    place(adapter, [3.0, 1e-2, 1e-2, 1e-2])
    inner = keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)
    optimizer = GeoLoRA(inner, 0.1, cut_interval=2)
    grads = tensors([np.zeros(v.shape) for v in factors(adapter)])
    ranks = []
    for _ in range(5):
        optimizer.apply(grads, factors(adapter))
        ranks.append(adapter.rank)
    assert ranks == [4, 4, 4, 1, 1]


# The bound on the change of a layer in one step.


def changes_at_rates(rates, scale=1.0, **options):
    """The changes of a layer with a kernel of norm 10, a step for each rate.

    The gradient stays the same, so that Adam moves on steadily.
    """
    rng = np.random.default_rng(0)
    layer = GeoLoRADense(8, rank=2, max_rank=5, scale=scale, seed=0)
    layer.build((None, 12))
    kernel = rng.normal(size=(12, 8))
    layer.kernel.assign(10 * kernel / np.linalg.norm(kernel))
    optimizer = GeoLoRA(keras.optimizers.Adam(), 0.0, **options)
    slope, changes = rng.normal(size=(12, 8)), []
    before = np.zeros((12, 8))
    for rate in rates:
        optimizer.learning_rate = rate
        grads = tensors(gradients_of(layer.adapter, slope))
        optimizer.apply(grads, factors(layer.adapter))
        assert_on_manifold(layer.adapter)
        (after,) = to_numpy([layer.delta()])
        changes.append(np.linalg.norm(after - before))
        before = after
    return np.array(changes)


def change_of_one_step(scale=1.0, **options):
    """The change in one long step."""
    return changes_at_rates([1.0], scale, **options)[0]


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_a_step_changes_a_layer_by_no_more_than_its_bound(scale):
    change = change_of_one_step(scale, max_update_ratio=0.01)
    np.testing.assert_allclose(change, 0.1, rtol=1e-4)


def test_a_bound_is_a_smaller_rate_and_leaves_schedules_their_effect():
    rates = np.array([0.1, 0.3, 1.0, 1.0, 0.5, 0.1, 0.01])
    bound = changes_at_rates(rates, max_update_ratio=0.01)
    assert bound.max() <= 0.1 * 1.001
    # A warm-up is cut where it reaches the bound, a decay is not.
    np.testing.assert_allclose(bound[:3], 0.1, rtol=0.2)
    np.testing.assert_allclose(bound[4:] / bound[3], rates[4:], rtol=0.2)


def test_a_step_below_the_bound_is_that_of_the_inner_optimizer():
    rates = [1e-4, 2e-4, 1e-4]
    bound = changes_at_rates(rates, max_update_ratio=0.1)
    free = changes_at_rates(rates, max_update_ratio=None)
    np.testing.assert_array_equal(bound, free)


@pytest.mark.parametrize("ratio", [1e-4, 0.01, 100.0, None])
def test_the_optimizer_says_how_much_a_bound_scales_a_step(ratio):
    scales, changes = [], []
    for bound in (ratio, None):
        adapter = LowRankAdapter(12, 8, rank=5, max_rank=5, seed=0)
        adapter.kernel_norm = lambda: 10.0
        inner = keras.optimizers.Adam(0.1)
        optimizer = GeoLoRA(inner, 0.0, max_update_ratio=bound)
        assert optimizer.step_scale(adapter) is None  # not built
        slope = np.random.default_rng(0).normal(size=(12, 8))
        grads = tensors(gradients_of(adapter, slope))
        optimizer.apply(grads, factors(adapter))
        assert adapter.rank == 5
        scales.append(optimizer.step_scale(adapter))
        changes.append(np.linalg.norm(delta(adapter)))
    assert scales[1] == 1
    assert (scales[0] == 1) == (ratio in (100.0, None))
    np.testing.assert_allclose(scales[0], changes[0] / changes[1], rtol=1e-4)


def test_a_bound_does_not_depend_on_the_rank_at_the_start():
    # Adam's first step is long, and so are those at a high rank: it was seen
    # that layers which begin with a high rank were held back for ever.
    # All in one optimizer, as rows of the same arrays.
    starts = [(rank, seed) for rank in (1, 8) for seed in range(3)]
    noise = [np.random.default_rng(seed) for _, seed in starts]
    adapters = [
        LowRankAdapter(48, 40, rank=rank, max_rank=8, seed=seed)
        for rank, seed in starts
    ]
    for adapter in adapters:
        adapter.kernel_norm = lambda: 1.0
    optimizer = GeoLoRA(keras.optimizers.Adam(0.1), 0.0, max_update_ratio=0.01)
    variables = [v for adapter in adapters for v in factors(adapter)]
    apply = traced(optimizer, variables)
    before, lengths = np.array(list(map(delta, adapters))), []
    for _ in range(20):
        grads = []
        for adapter, rng in zip(adapters, noise, strict=True):
            grads += gradients_of(adapter, rng.normal(size=(48, 40)))
        apply(tensors(grads))
        after = np.array(list(map(delta, adapters)))
        lengths.append(np.linalg.norm(after - before, axis=(1, 2)))
        before = after
    assert [adapter.rank for adapter in adapters] == [8] * len(adapters)
    low, high = np.mean(lengths[10:], axis=0).reshape(2, -1)
    np.testing.assert_allclose(np.mean(high), np.mean(low), rtol=0.2)


@pytest.mark.parametrize(
    "number, ratio", [(1, 0.06), (10, 0.03), (60, 0.008), (100, 0.005)]
)
def test_all_layers_together_share_the_default_bound(number, ratio):
    assert_default_bound((12, 8), number, ratio)


@pytest.mark.parametrize("side, ratio", [(200, 0.04), (1200, 0.008)])
def test_in_wide_layers_the_default_bound_is_smaller(side, ratio):
    assert_default_bound((1300, side), 1, ratio)


def assert_default_bound(shape, number, ratio):
    adapters = [LowRankAdapter(*shape, rank=4, seed=i) for i in range(number)]
    for adapter in adapters:
        adapter.kernel_norm = lambda: 10.0
    optimizer = GeoLoRA(keras.optimizers.Adam(1.0), 0.0, retraction_interval=9)
    slope = np.random.default_rng(0).normal(size=shape)
    grads = [g for a in adapters for g in gradients_of(a, slope)]
    optimizer.apply(tensors(grads), [v for a in adapters for v in factors(a)])
    steps = [np.linalg.norm(delta(adapter)) for adapter in adapters]
    np.testing.assert_allclose(steps, 10 * ratio, rtol=1e-3)


@pytest.mark.parametrize("inner, ratio", [("adam", 0.008), ("sgd", None)])
def test_a_configuration_of_version_0_1_keeps_its_bound(inner, ratio):
    config = GeoLoRA(inner).get_config()
    assert config["max_update_ratio"] == "auto"
    assert GeoLoRA.from_config(dict(config)).max_update_ratio == "auto"
    del config["retraction_interval"]
    assert GeoLoRA.from_config(config).max_update_ratio == ratio


def test_without_a_bound_a_step_is_as_long_as_the_inner_one():
    assert change_of_one_step(max_update_ratio=None) > 1


def test_an_adapter_without_a_layer_trains_with_adam():
    adapter = LowRankAdapter(12, 8, rank=2, max_rank=5)
    optimizer = GeoLoRA(keras.optimizers.Adam(0.1))
    grads = gradients_of(adapter, np.ones((12, 8)))
    optimizer.apply(tensors(grads), factors(adapter))
    assert np.linalg.norm(delta(adapter)) > 0.1


@pytest.mark.parametrize("ratio", [0, -0.1, math.nan, "none", True])
def test_a_bound_that_is_no_positive_number_is_refused(ratio):
    with pytest.raises(
        (ValueError, TypeError), match=f"Received: max_update_ratio={ratio!r}"
    ):
        GeoLoRA("adamw", max_update_ratio=ratio)


# Gradient accumulation.


@pytest.mark.parametrize("inner", ["SGD-momentum", "AdamW", "Muon"])
def test_between_updates_of_accumulation_nothing_moves(inner):
    problem = Regression()
    optimizer = GeoLoRA(INNER[inner](gradient_accumulation_steps=3))
    for update in range(2):
        before = to_numpy(problem.variables)
        slots = None
        for step in range(3):
            if step:
                assert_identical(to_numpy(problem.variables), before)
                found = [
                    slots_of(optimizer, a, sums=False) for a in problem.adapters
                ]
                if slots is not None:
                    assert_identical(sum(found, []), sum(slots, []))
                slots = found
            problem.step(optimizer)
        assert_moved(to_numpy(problem.variables), before)
        assert int(to_numpy([optimizer.iterations])[0]) == update + 1


def test_accumulated_steps_equal_one_step_on_the_mean_gradient():
    these, those = Regression(), Regression()
    accumulated = GeoLoRA(
        keras.optimizers.SGD(0.1, momentum=0.9, gradient_accumulation_steps=3)
    )
    plain = GeoLoRA(keras.optimizers.SGD(0.1, momentum=0.9))
    rng = np.random.default_rng(2)
    for _ in range(3):
        gradients = these.gradients()
        noise = rng.normal(size=(3, len(gradients)))
        noise -= noise.mean(axis=0)
        for row in noise:
            these.step(
                accumulated,
                [(1 + e) * g for e, g in zip(row, gradients, strict=True)],
            )
        those.step(plain)
    for x, y in zip(these.adapters, those.adapters, strict=True):
        np.testing.assert_allclose(delta(x), delta(y), atol=1e-4)


# Gradients that are not finite, or not there.


@pytest.mark.parametrize("value", [np.nan, np.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("role", [0, 1, 2], ids="USV")
def test_an_adapter_with_a_bad_gradient_stays_and_others_move(role, value):
    assert_bad_gradient_is_skipped("Adam", role, value)


@pytest.mark.parametrize("name", ON_ADAPTERS)
def test_every_inner_optimizer_goes_on_after_a_bad_gradient(name):
    assert_bad_gradient_is_skipped(name, 0, np.nan)


def assert_bad_gradient_is_skipped(inner, role, value):
    trainer = Trainer.at_start(inner)
    trainer.step()
    before = trainer.state()
    bad, good = trainer.problem.adapters
    kept = to_numpy(factors(bad))
    old, gradients = to_numpy(factors(good)), trainer.problem.gradients()
    trainer.step(gradients)
    healthy = to_numpy(factors(good))
    assert_moved(healthy, old)

    trainer.restore(before)
    gradients[role][1, 1] = value
    trainer.step(gradients)

    assert trainer.skipped() == 1
    assert_identical(to_numpy(factors(bad)), kept)
    for slot in slots_of(trainer.optimizer, bad):
        assert np.isfinite(slot).all()
    assert_identical(to_numpy(factors(good)), healthy)
    trainer.step()
    assert trainer.skipped() == 1
    assert_moved(to_numpy(factors(bad)), kept)
    assert_on_manifold(bad)


def test_the_slots_of_an_adapter_are_found():
    problem = Regression()
    optimizer = GeoLoRA(INNER["Adam"]())
    problem.step(optimizer)
    assert len(slots_of(optimizer, problem.adapters[0])) == 6


def test_accumulation_goes_on_after_a_bad_gradient():
    problem = Regression()
    optimizer = GeoLoRA(INNER["Adam"](gradient_accumulation_steps=2))
    gradients = problem.gradients()
    gradients[0][0, 0] = np.nan
    before = to_numpy(problem.variables)
    problem.step(optimizer, gradients)
    problem.step(optimizer)
    assert_moved(to_numpy(problem.variables), before)
    assert int(to_numpy([optimizer.skipped_steps])[0]) == 1


def test_an_adapter_without_gradients_stays():
    problem = Regression()
    optimizer = GeoLoRA(INNER["Adam"](weight_decay=0.1))
    problem.step(optimizer)
    idle, busy = problem.adapters
    kept = to_numpy(factors(idle)) + slots_of(optimizer, idle)
    moving = to_numpy(factors(busy))
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        problem.step(optimizer, [None] * 5 + problem.gradients()[5:])
    assert_identical(to_numpy(factors(idle)) + slots_of(optimizer, idle), kept)
    assert_moved(to_numpy(factors(busy)), moving)


def test_apply_on_some_of_the_variables_leaves_the_others():
    problem = Regression()
    optimizer = GeoLoRA(INNER["Adam"]())
    problem.step(optimizer)
    kept = to_numpy(problem.variables)
    optimizer.apply(tensors(problem.gradients()[5:]), problem.variables[5:])
    assert_identical(to_numpy(problem.variables)[:5], kept[:5])
    assert_moved(to_numpy(problem.variables)[5:8], kept[5:8])


def test_a_step_that_raises_leaves_the_factors_as_they_were():
    problem = Regression()
    for adapter in problem.adapters:
        place(adapter, [3.0, 1.0])
    optimizer = GeoLoRA(INNER["Adam"]())
    problem.step(optimizer)
    kept = to_numpy(problem.variables)
    stranger = keras.Variable(np.ones(3, "float32"))
    with pytest.raises(ValueError, match="Unknown variable"):
        optimizer.apply(
            tensors([*problem.gradients(), np.ones(3)]),
            [*problem.variables, stranger],
        )
    assert_identical(to_numpy(problem.variables), kept)


# State.


@inner_optimizers
def test_the_configuration_survives_a_round_trip(inner):
    optimizer = GeoLoRA(
        inner(clipnorm=0.5), tolerance=0.2, cut_interval=7, name="mine"
    )
    config = keras.optimizers.serialize(optimizer)
    revived = keras.optimizers.deserialize(config)
    assert type(revived) is GeoLoRA
    assert type(revived.inner_optimizer) is type(optimizer.inner_optimizer)
    assert revived.get_config() == optimizer.get_config()
    assert keras.optimizers.serialize(revived) == config
    assert revived.tolerance == 0.2 and revived.cut_interval == 7
    assert revived.name == "mine"
    assert revived.inner_optimizer.clipnorm == 0.5


@pytest.mark.parametrize(
    "inner", ["SGD-momentum", "AdamW", "Nadam", "RMSprop-momentum", "Muon"]
)
def test_a_restored_state_continues_bit_for_bit(inner):
    problem = Regression()
    options = {"gradient_accumulation_steps": 2}
    optimizer = GeoLoRA(INNER[inner](**options), cut_interval=2)
    for _ in range(3):
        problem.step(optimizer)
    store = {}
    optimizer.save_own_variables(store)

    copy = Regression()
    for variable, value in zip(
        copy.variables, to_numpy(problem.variables), strict=True
    ):
        variable.assign(value)
    restored = GeoLoRA(INNER[inner](**options), cut_interval=2)
    restored.build(copy.variables)
    restored.load_own_variables(store)
    for _ in range(3):
        assert_identical(copy.state(restored), problem.state(optimizer))
        problem.step(optimizer)
        copy.step(restored)
    assert_identical(copy.state(restored), problem.state(optimizer))


def test_the_variables_are_those_of_both_optimizers():
    problem = Regression()
    optimizer = GeoLoRA(INNER["Adam"]())
    problem.step(optimizer)
    ids = [id(v) for v in optimizer.variables]
    assert len(set(ids)) == len(ids)
    assert {id(v) for v in optimizer.inner_optimizer.variables} < set(ids)
    assert id(optimizer.skipped_steps) in ids


def test_the_learning_rate_is_that_of_the_inner_optimizer():
    optimizer = GeoLoRA(keras.optimizers.SGD(0.1))
    assert float(optimizer.learning_rate) == pytest.approx(0.1)
    optimizer.learning_rate = 0.25
    assert float(optimizer.learning_rate) == 0.25
    assert float(optimizer.inner_optimizer.learning_rate) == 0.25


def test_a_schedule_sees_the_steps():
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay(
        [1, 2], [0.1, 0.02, 0.0]
    )
    these, those = Regression(), Regression()
    scheduled = GeoLoRA(keras.optimizers.SGD(schedule))
    by_hand = GeoLoRA(keras.optimizers.SGD(0.1))
    for rate in (0.1, 0.1, 0.02, 0.0):
        by_hand.learning_rate = rate
        those.step(by_hand)
        these.step(scheduled)
    for x, y in zip(these.adapters, those.adapters, strict=True):
        np.testing.assert_allclose(delta(x), delta(y), atol=1e-6)


# Refusals.


def refused_optimizers():
    adamw = keras.optimizers.AdamW
    yield "Ftrl", lambda: keras.optimizers.Ftrl()
    yield (
        "LossScaleOptimizer",
        lambda: keras.optimizers.LossScaleOptimizer(adamw()),
    )
    if hasattr(keras.optimizers, "ScheduleFreeAdamW"):
        yield "ScheduleFreeAdamW", keras.optimizers.ScheduleFreeAdamW
    yield "GeoLoRA", lambda: GeoLoRA(adamw())


@pytest.mark.parametrize("name, create", list(refused_optimizers()))
def test_inner_optimizers_that_cannot_follow_are_refused(name, create):
    with pytest.raises(ValueError, match=f"Received: inner_optimizer={name}"):
        GeoLoRA(create())


def test_the_refusal_of_loss_scaling_shows_the_right_order():
    inner = keras.optimizers.LossScaleOptimizer(keras.optimizers.AdamW())
    with pytest.raises(ValueError, match=r"LossScaleOptimizer\(GeoLoRA\("):
        GeoLoRA(inner)


def test_an_average_of_factors_is_refused():
    with pytest.raises(ValueError, match="Received: use_ema=True"):
        GeoLoRA(keras.optimizers.AdamW(use_ema=True))


class SignDescent(keras.optimizers.Optimizer):
    """An optimizer of one's own, at first without rules."""

    def build(self, variables):
        super().build(variables)
        self.averages = self.add_optimizer_variables(variables, "average")

    def update_step(self, gradient, variable, learning_rate):
        m = self.averages[self._get_variable_index(variable)]
        self.assign(m, 0.9 * m + 0.1 * gradient)
        self.assign_sub(variable, learning_rate * keras.ops.sign(m))


class AdamWithExtraSlot(keras.optimizers.Adam):
    """A subclass that inherits rules which do not know its new slot."""

    def build(self, variables):
        super().build(variables)
        self.extra = self.add_optimizer_variables(variables, "extra")


def test_an_optimizer_without_rules_is_refused():
    class Unknown(SignDescent):
        pass

    message = "Received: inner_optimizer=Unknown, which has no rules"
    with pytest.raises(ValueError, match=message):
        GeoLoRA(Unknown(0.1))


def test_an_optimizer_of_ones_own_trains_once_it_has_rules():
    class Own(SignDescent):
        pass

    register_slot_rules(Own, {"averages": "linear"})
    problem = Regression()
    optimizer = GeoLoRA(Own(0.05))
    before = problem.loss()
    for _ in range(10):
        problem.step(optimizer)
    assert problem.loss() < 0.9 * before
    for adapter in problem.adapters:
        assert_on_manifold(adapter)


def test_a_slot_that_the_rules_do_not_know_is_refused():
    optimizer = GeoLoRA(AdamWithExtraSlot(0.1))
    with pytest.raises(
        ValueError, match="(?s)inner_optimizer=AdamWithExtraSlot.*_extra"
    ):
        optimizer.build(Regression().variables)


def test_an_inner_optimizer_that_is_built_is_refused():
    inner = keras.optimizers.Adam(name="veteran")
    inner.build(plain_variables())
    with pytest.raises(ValueError, match="='veteran', which is built"):
        GeoLoRA(inner)


@pytest.mark.parametrize("tolerance", [1, -0.1, 10, math.nan])
def test_a_tolerance_outside_of_its_range_is_refused(tolerance):
    with pytest.raises(ValueError, match=f"Received: tolerance={tolerance}"):
        GeoLoRA("adamw", tolerance=tolerance)


def test_numbers_of_numpy_are_numbers():
    optimizer = GeoLoRA(
        "adam",
        tolerance=np.float32(0.25),
        rank_budget=np.int64(40),
        cut_interval=np.int32(5),
        max_update_ratio=np.float64(0.01),
    )
    config = json.loads(json.dumps(optimizer.get_config()))
    assert [config["tolerance"], config["rank_budget"]] == [0.25, 40]
    assert [config["cut_interval"], config["max_update_ratio"]] == [5, 0.01]


@pytest.mark.parametrize("interval", [0, -1, 1.5, None, True])
def test_a_cut_interval_that_is_no_count_is_refused(interval):
    with pytest.raises(
        (ValueError, TypeError), match=f"Received: cut_interval={interval}"
    ):
        GeoLoRA("adamw", cut_interval=interval)


@pytest.mark.parametrize(
    "option",
    [
        {"clipnorm": 1.0},
        {"clipvalue": 1.0},
        {"global_clipnorm": 1.0},
        {"weight_decay": 0.01},
        {"gradient_accumulation_steps": 4},
        {"loss_scale_factor": 8.0},
        {"use_ema": True},
        {"learning_rate": 0.1},
    ],
    ids=lambda option: next(iter(option)),
)
def test_options_of_the_inner_optimizer_are_sent_there(option):
    ((name, value),) = option.items()
    with pytest.raises(
        ValueError, match=rf"(?s){name}=\.\.\..*Received: {name}={value}"
    ):
        GeoLoRA(keras.optimizers.AdamW(), **option)


@pytest.mark.parametrize("kind", ["cubic", None, 3])
def test_rules_of_an_unknown_kind_are_refused(kind):
    with pytest.raises(ValueError, match=f"Received: averages={kind!r}"):
        register_slot_rules(SignDescent, {"averages": kind})


@pytest.mark.parametrize("value", [keras.optimizers.SGD(), dict, "sgd", None])
def test_rules_of_what_is_no_optimizer_class_are_refused(value):
    with pytest.raises(TypeError, match="Received: optimizer_class="):
        register_slot_rules(value, {"averages": "linear"})


@pytest.mark.parametrize("roles", [["U"], ["S", "V"], ["U", "S"]])
def test_an_adapter_trains_with_all_its_factors_or_none(roles):
    adapter = LowRankAdapter(12, 8, rank=2, name="halved")
    variables = [getattr(adapter, role) for role in roles]
    with pytest.raises(ValueError, match="(?s)Received: .*'halved'") as error:
        GeoLoRA("adamw").build(variables)
    assert str(sorted(roles)) in str(error.value)


def test_another_optimizer_may_not_move_factors():
    problem = Regression()
    with pytest.raises(RuntimeError, match="Received an optimizer other than"):
        problem.step(keras.optimizers.AdamW())


def test_another_optimizer_is_refused_after_steps_of_geolora():
    problem = Regression()
    problem.step(GeoLoRA("sgd"))
    with pytest.raises(RuntimeError, match=r"keras_geolora\.GeoLoRA\("):
        problem.step(keras.optimizers.SGD())


def test_the_layer_of_a_refused_variable_is_named():
    layer = GeoLoRADense(4, rank=2, name="culprit")
    layer.build((None, 8))
    grads = tensors([np.zeros(v.shape) for v in layer.trainable_variables])
    with pytest.raises(RuntimeError, match="variable 'culprit/adapter/U'"):
        keras.optimizers.SGD().apply(grads, layer.trainable_variables)


# The optimizer tests of Keras itself.
