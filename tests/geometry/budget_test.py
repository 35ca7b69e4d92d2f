"""Ranks and parameters of all layers are within a budget after every cut."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_geolora import GeoLoRA
from keras_geolora.geometry.budget import RankRequest, spend
from keras_geolora.layers.tree import adapted_layers

pytestmark = [
    # Some of these tests step once, or with a part of the gradients.
    pytest.mark.filterwarnings("ignore:Gradients do not exist"),
    pytest.mark.filterwarnings("ignore:The last layer"),
    pytest.mark.filterwarnings("ignore:The loss has not changed"),
]

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(16, 6, 6, 2)).astype("float32")
IDS = RNG.integers(8, size=(16, 5)).astype("int32")
TARGETS = RNG.normal(size=(16, 4)).astype("float32")
X = RNG.normal(size=(64, 8)).astype("float32")
Y = np.tanh(X @ RNG.normal(size=(8, 8))).astype("float32")


def request(sigma, wanted, min_rank, cost):
    column = np.reshape
    return RankRequest(
        ops.convert_to_tensor(np.array(sigma, "float32")),
        ops.convert_to_tensor(column(wanted, (-1, 1)).astype("int32")),
        ops.convert_to_tensor(column(min_rank, (-1, 1)).astype("int32")),
        cost,
    )


def spent(budget, requests):
    ranks = spend(budget, requests)
    return [ops.convert_to_numpy(r)[:, 0].tolist() for r in ranks]


def greedy(budget, requests):
    """The same, one value at a time."""
    items = []
    for g, (sigma, wanted, min_rank, cost) in enumerate(requests):
        for layer, row in enumerate(ops.convert_to_numpy(sigma)):
            wants = int(wanted[layer, 0])
            for column in range(wants):
                guarded = column < int(min_rank[layer, 0])
                value = np.inf if guarded else row[column] ** 2 / cost
                items.append((-value, column, g, layer, cost))
    ranks = [[0] * len(ops.convert_to_numpy(c.sigma)) for c in requests]
    for _, _, g, layer, cost in sorted(items):
        budget -= cost
        if budget < 0:
            break
        ranks[g][layer] += 1
    return ranks


@pytest.mark.parametrize("seed", range(20))
def test_spending_is_greedy(seed):
    rng = np.random.default_rng(seed)
    requests = []
    for i, (width, cost) in enumerate([(4, 7), (6, 3), (2, 11)]):
        number = 1 + (seed + i) % 3
        sigma = -np.sort(-rng.exponential(size=(number, width)), axis=1)
        wanted = rng.integers(1, width + 1, size=number)
        requests.append(request(sigma, wanted, [1] * number, cost))
    floor = sum(c.cost * len(ops.convert_to_numpy(c.sigma)) for c in requests)
    for budget in (floor, floor + 10, floor + 40, 10**6):
        ranks = spent(budget, requests)
        assert ranks == greedy(budget, requests)
        total = sum(
            c.cost * sum(r) for c, r in zip(requests, ranks, strict=True)
        )
        assert total <= budget
        assert all(min(r) >= 1 for r in ranks)


def test_equal_values_are_shared_evenly():
    requests = [
        request(np.zeros((2, 4)), [4, 4], [1, 1], 1),
        request(np.zeros((1, 3)), [3], [1], 1),
    ]
    assert spent(6, requests) == [[2, 2], [2]]


def dense(units=8):
    """Three layers, the last of which may be of another shape."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(8, activation="tanh"),
            keras.layers.Dense(8, activation="tanh"),
            keras.layers.Dense(units),
        ]
    )
    return model, X, Y[:, :units]


def tapered():
    return dense(6)


def mixed():
    """A convolution and an embedding of one shape, and a dense layer."""
    keras.utils.set_random_seed(0)
    image, ids = keras.Input((6, 6, 2)), keras.Input((5,), dtype="int32")
    x = keras.layers.Conv2D(8, 2, activation="relu")(image)
    x = keras.layers.GlobalAveragePooling2D()(x)
    y = keras.layers.Embedding(8, 8)(ids)
    y = keras.layers.GlobalAveragePooling1D()(y)
    outputs = keras.layers.Dense(4)(x + y)
    return keras.Model([image, ids], outputs), [IMAGES, IDS], TARGETS


def adapted(create, optimizer, **options):
    model, x, y = create()
    if create is mixed:
        options["targets"] = [
            keras.layers.Conv2D,
            keras.layers.Embedding,
            keras.layers.Dense,
        ]
    model.enable_geolora(**{"rank": 2, "max_rank": 4, "seed": 0, **options})
    model.compile(optimizer, loss="mse")
    return model, x, y


def step(model, layers=slice(None)):
    """Takes one step without a graph, with random gradients of some layers."""
    rng, variables = np.random.default_rng(0), model.trainable_variables
    model.optimizer.build(variables)
    moving = {id(v) for x in model.layers[layers] for v in x.weights}
    gradients = [rng.normal(size=v.shape).astype("float32") for v in variables]
    gradients = [
        ops.convert_to_tensor(g) if id(v) in moving else None
        for g, v in zip(gradients, variables, strict=True)
    ]
    model.optimizer.apply(gradients, variables)


def ranks_of(model):
    return [layer.rank for layer in adapted_layers(model).values()]


def parameters_of(model):
    return sum(
        layer.rank * layer.adapter.parameters_per_rank
        for layer in adapted_layers(model).values()
    )


@pytest.mark.parametrize("create", [dense, mixed])
def test_the_sum_of_ranks_is_within_the_budget_after_every_cut(create):
    optimizer = GeoLoRA(
        keras.optimizers.Adam(1e-2), 0.0, cut_interval=1, rank_budget=5
    )
    model, x, y = adapted(create, optimizer)
    found = []
    for _ in range(6):
        model.train_on_batch(x, y)
        found.append(ranks_of(model))
        assert min(found[-1]) >= 1
    assert {sum(ranks) for ranks in found} == {5}
    assert any(max(ranks) > min(ranks) for ranks in found)


@pytest.mark.parametrize("create", [tapered, mixed])
def test_parameters_are_within_the_budget_after_every_cut(create):
    model, _, _ = adapted(create, GeoLoRA("adam"))
    budget = int(0.8 * parameters_of(model))
    optimizer = GeoLoRA(
        keras.optimizers.Adam(1e-2),
        0.0,
        cut_interval=1,
        parameter_budget=budget,
    )
    model, x, y = adapted(create, optimizer)
    for _ in range(6):
        model.train_on_batch(x, y)
        assert min(ranks_of(model)) >= 1
        dearest = max(
            layer.adapter.parameters_per_rank
            for layer in adapted_layers(model).values()
        )
        assert budget - dearest < parameters_of(model) <= budget


def test_the_largest_singular_values_are_kept():
    wide = GeoLoRA(keras.optimizers.SGD(0.1), 0.0, max_update_ratio=None)
    tight = GeoLoRA(
        keras.optimizers.SGD(0.1),
        0.0,
        cut_interval=1,
        rank_budget=4,
        max_update_ratio=None,
    )
    spectra = []
    for optimizer in (wide, tight):
        model, _, _ = adapted(dense, optimizer)
        step(model)
        spectra.append(
            [
                (sigma, i)
                for i, layer in enumerate(model.layers)
                for sigma in ops.convert_to_numpy(layer.adapter.S).diagonal()
                if sigma > 0
            ]
        )
    guarded = [max(x for x in spectra[0] if x[1] == i) for i in range(3)]
    rest = sorted(set(spectra[0]) - set(guarded))
    expected = sorted([*guarded, rest[-1]])
    assert [p for _, p in sorted(spectra[1])] == [p for _, p in expected]
    np.testing.assert_allclose(
        [s for s, _ in sorted(spectra[1])],
        [s for s, _ in expected],
        rtol=1e-4,
    )


def test_tolerance_still_cuts_below_the_budget():
    optimizer = GeoLoRA(
        keras.optimizers.Adam(1e-2), 0.9, rank_budget=9, cut_interval=1
    )
    model, _, _ = adapted(dense, optimizer)
    step(model)
    assert sum(ranks_of(model)) < 9


def test_min_rank_is_inside_the_budget():
    optimizer = GeoLoRA(
        keras.optimizers.Adam(1e-2), 0.0, cut_interval=1, rank_budget=6
    )
    model, _, _ = adapted(dense, optimizer, min_rank=2)
    step(model)
    assert ranks_of(model) == [2, 2, 2]


@keras.saving.register_keras_serializable("budget_test")
def shrinking(updates):
    return 12 - 2 * updates


@pytest.fixture(scope="module")
def compiled_under_a_schedule():
    optimizer = GeoLoRA(
        keras.optimizers.Adam(1e-2), 0.0, cut_interval=1, rank_budget=shrinking
    )
    copy = GeoLoRA.from_config(optimizer.get_config())
    assert copy.rank_budget is shrinking
    model, x, y = adapted(dense, copy)
    copy.build(model.trainable_variables)
    state = [ops.convert_to_numpy(v) for v in copy.variables]
    return model, x, y, model.get_weights(), state


@pytest.fixture
def under_a_schedule(compiled_under_a_schedule):
    """A model at its start, compiled once, with inputs and targets."""
    model, x, y, weights, state = compiled_under_a_schedule
    model.set_weights(weights)
    model.optimizer.set_weights(state)
    return model, x, y


def test_a_budget_may_follow_a_schedule(under_a_schedule):
    model, x, y = under_a_schedule
    totals = []
    for _ in range(6):
        model.train_on_batch(x, y)
        totals.append(sum(ranks_of(model)))
    # No layer gives up its last rank, whatever the schedule says.
    assert totals == [10, 8, 6, 4, 3, 3]


ENDLESS = {
    "inf": float("inf"),
    "float": 1e10,
    "int": 10**10,
    "NumPy": np.int64(10**10),
}


@pytest.mark.parametrize("endless", ENDLESS.values(), ids=ENDLESS)
@pytest.mark.parametrize("option", ["rank_budget", "parameter_budget"])
def test_a_schedule_may_say_that_there_is_no_budget(option, endless):
    options = {option: lambda updates: endless}
    optimizer = GeoLoRA(keras.optimizers.Adam(1e-2), 0.0, **options)
    model, _, _ = adapted(dense, optimizer)
    step(model)
    assert ranks_of(model) == [4, 4, 4]


def test_a_schedule_may_begin_without_a_budget():
    optimizer = GeoLoRA(
        keras.optimizers.Adam(1e-2),
        tolerance=0.0,
        cut_interval=1,
        rank_budget=lambda updates: ops.where(updates < 3, float("inf"), 5.0),
    )
    model, x, y = adapted(dense, optimizer)
    totals = []
    for _ in range(4):
        model.train_on_batch(x, y)
        totals.append(sum(ranks_of(model)))
    assert totals == [12, 12, 5, 5]


@pytest.mark.parametrize("budget", [7, 2**24 + 1, 2**31 - 1])
@pytest.mark.parametrize("kind", [int, np.int64, float])
def test_a_budget_of_a_schedule_is_exact(kind, budget):
    optimizer = GeoLoRA("adam", rank_budget=lambda updates: kind(budget))
    assert int(optimizer.budget_of([])[0]) == budget


@pytest.mark.parametrize("budget", [-(10**10), -np.inf, np.nan])
def test_a_budget_below_all_is_that_of_the_smallest_ranks(budget):
    optimizer = GeoLoRA("adam", rank_budget=lambda updates: budget)
    model, x, y = adapted(dense, optimizer, min_rank=2)
    adapters = [layer.adapter for layer in adapted_layers(model).values()]
    assert int(optimizer.budget_of(adapters)[0]) == 6


def test_tolerance_may_follow_a_schedule():
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay(
        [3], [0.0, 0.95]
    )
    optimizer = GeoLoRA(
        keras.optimizers.Adam(1e-2), tolerance=schedule, cut_interval=1
    )
    copy = GeoLoRA.from_config(optimizer.get_config())
    assert copy.tolerance.get_config() == schedule.get_config()
    model, x, y = adapted(dense, copy)
    ranks = []
    for _ in range(5):
        model.train_on_batch(x, y)
        ranks.append(sum(ranks_of(model)))
    assert ranks[2] == 12 and ranks[4] == 3


def test_fit_may_stop_at_any_time():
    optimizer = GeoLoRA(keras.optimizers.Adam(1e-2), rank_budget=5)
    model, x, y = adapted(dense, optimizer, rank=4)
    model.compile(optimizer, loss="mse", run_eagerly=True)
    assert sum(ranks_of(model)) == 12

    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.stop_training = True

    model.fit(x, y, batch_size=16, callbacks=[Stop()], verbose=0)
    assert int(optimizer.iterations) == 1 and sum(ranks_of(model)) <= 5


def test_a_layer_that_gets_no_gradient_gives_up_ranks_too():
    optimizer = GeoLoRA(
        keras.optimizers.Adam(1e-2), 0.0, cut_interval=1, rank_budget=4
    )
    model, _, _ = adapted(dense, optimizer, rank=3)
    variables = model.trainable_variables
    optimizer.build(variables)
    optimizer.apply([ops.zeros(v.shape) for v in variables], variables)
    assert ranks_of(model) == [2, 1, 1]


def test_layers_that_rest_count():
    optimizer = GeoLoRA(
        keras.optimizers.Adam(1e-2), 0.0, cut_interval=1, rank_budget=8
    )
    # One of them is of the shape of the layer that moves, one is not.
    model, _, _ = adapted(tapered, optimizer)
    step(model, slice(1))
    assert ranks_of(model) == [4, 2, 2]


def test_a_step_that_is_not_finite_is_within_the_budget(under_a_schedule):
    model, x, y = under_a_schedule
    for _ in range(2):
        model.train_on_batch(x, y)
    assert sum(ranks_of(model)) == 8
    before = [ops.convert_to_numpy(v) for v in model.layers[0].weights]
    model.train_on_batch(x, np.full_like(y, np.nan))
    assert int(model.optimizer.skipped_steps) == 1
    assert sum(ranks_of(model)) == 6
    rank = model.layers[0].rank
    U = ops.convert_to_numpy(model.layers[0].adapter.U)
    np.testing.assert_array_equal(U[:, :rank], before[2][:, :rank])


@pytest.mark.parametrize(
    "options, words",
    [
        ({"rank_budget": 2}, "rank_budget=2 for 3 adapters.*at least 3 ranks"),
        (
            {"parameter_budget": 48},
            "parameter_budget=48 for 3 adapters.*at least 49 parameters",
        ),
    ],
)
def test_a_budget_below_the_floor_is_refused_with_numbers(options, words):
    model, x, y = adapted(tapered, GeoLoRA("adam", **options))
    with pytest.raises(ValueError, match=words):
        model.fit(x, y, verbose=0)


@pytest.mark.parametrize("budget", [0, -1, 2.5, True, "many", 2**31])
@pytest.mark.parametrize("name", ["rank_budget", "parameter_budget"])
def test_what_is_no_budget_is_refused(name, budget):
    with pytest.raises(ValueError, match=f"Received: {name}="):
        GeoLoRA("adam", **{name: budget})


def test_two_budgets_are_refused():
    with pytest.raises(ValueError, match="not both"):
        GeoLoRA("adam", rank_budget=10, parameter_budget=100)
