"""How adapters of equal shape share variables, and when they do not."""

import keras
import numpy as np
import pytest
from keras import ops
from optimizer_test import (
    INNER,
    Regression,
    assert_identical,
    assert_on_manifold,
    delta,
    factors,
    gradients_of,
    place,
    slots_of,
    tensors,
    to_numpy,
)

from keras_geolora import GeoLoRA, LowRankAdapter
from keras_geolora.geometry import integrator
from keras_geolora.optimizer import groups

ELEMENTWISE = sorted(
    set(INNER) - {"Adafactor", "Lamb", "Muon", "RMSprop-centered"}
)
THREE = ((12, 8), (12, 8), (12, 8))


def built(inner, problem):
    optimizer = GeoLoRA(inner)
    optimizer.build(problem.variables)
    return optimizer


def number_of_slots(optimizer):
    return sum(len(v.shape) > 1 for v in optimizer.inner_optimizer.variables)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_equal_adapters_share_the_variables_of_the_inner_optimizer(name):
    one = number_of_slots(built(INNER[name](), Regression(THREE[:1])))
    three = number_of_slots(built(INNER[name](), Regression(THREE)))
    assert three == one


@pytest.mark.parametrize("name", ["Adafactor", "Lamb", "Muon"])
def test_optimizers_that_look_at_a_whole_variable_get_one_each(name):
    one = number_of_slots(built(INNER[name](), Regression(THREE[:1])))
    three = number_of_slots(built(INNER[name](), Regression(THREE)))
    assert three == 3 * one > 0


def test_clipping_by_the_norm_of_a_variable_keeps_adapters_apart():
    one = number_of_slots(built(INNER["Adam"](), Regression(THREE[:1])))
    three = built(INNER["Adam"](clipnorm=1.0), Regression(THREE))
    assert number_of_slots(three) == 3 * one


def test_a_subclass_is_not_taken_for_elementwise():
    class Child(keras.optimizers.Adam):
        pass

    one = number_of_slots(built(INNER["Adam"](), Regression(THREE[:1])))
    assert number_of_slots(built(Child(0.1), Regression(THREE))) == 3 * one


@pytest.mark.parametrize(
    "options",
    [{}, {"global_clipnorm": 0.5, "weight_decay": 0.02}],
    ids=["plain", "options"],
)
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_shared_variables_take_the_same_steps(name, options, monkeypatch):
    shared, apart = Regression(THREE), Regression(THREE)
    these = built(INNER[name](**options), shared)
    monkeypatch.setattr(groups, "is_elementwise", lambda optimizer: False)
    those = built(INNER[name](**options), apart)
    assert number_of_slots(those) in (0, 3 * number_of_slots(these))
    rng = np.random.default_rng(0)
    for _ in range(4):
        noise = rng.normal(size=(3, 12, 8))
        # Columns may have other signs, so each gets gradients for its own.
        for problem, optimizer in ((shared, these), (apart, those)):
            found = map(gradients_of, problem.adapters, noise)
            problem.step(optimizer, sum(found, []))
    for x, y in zip(shared.adapters, apart.adapters, strict=True):
        # A clipping factor is a sum in another order.
        difference = np.linalg.norm(delta(x) - delta(y))
        assert difference <= 1e-3 * np.linalg.norm(delta(y))


@pytest.mark.parametrize("excluded", ["the factors", "^K$"])
def test_weight_decay_spares_whom_the_user_named(excluded):
    problem = Regression()
    for adapter in problem.adapters:
        place(adapter, [3.0, 1.0])
    optimizer = GeoLoRA(
        keras.optimizers.AdamW(0.1, weight_decay=0.5), max_update_ratio=None
    )
    if excluded == "the factors":
        optimizer.exclude_from_weight_decay(problem.variables[:5])
        first = 1.0
    else:  # a variable of the inner optimizer has that name, none of the user
        optimizer.exclude_from_weight_decay(var_names=[excluded])
        first = 0.95
    problem.step(optimizer, [np.zeros(v.shape) for v in problem.variables])
    for adapter, share in zip(problem.adapters, (first, 0.95), strict=True):
        sigma = np.diag(to_numpy([adapter.S])[0])[:2]
        np.testing.assert_allclose(sigma, [3 * share, share], rtol=1e-5)


def test_a_pattern_for_paths_reaches_optimizers_that_look_at_them():
    problem = Regression()
    chosen = problem.adapters[0].path.split("/")[0]
    optimizer = built(INNER["Muon"](exclude_layers=[chosen]), problem)
    kinds = [len(slots_of(optimizer, a)) for a in problem.adapters]
    assert kinds[0] == 2 * kinds[1]  # AdamW's second moments


def test_a_group_that_rests_is_not_touched():
    problem = Regression(((12, 8), (12, 8), (6, 5)))
    optimizer = built(INNER["Adam"](), problem)
    problem.step(optimizer)
    resting = problem.adapters[2]
    kept = to_numpy(factors(resting)) + slots_of(optimizer, resting)
    optimizer.apply(tensors(problem.gradients()[:10]), problem.variables[:10])
    found = to_numpy(factors(resting)) + slots_of(optimizer, resting)
    assert_identical(found, kept)


# What does not converge.


def giving_up(function, numbers, calls):
    """`function`, which in calls of these numbers fails at the first matrix."""

    def decompose(x):
        found = function(ops.nan_to_num(x))
        bad = np.isnan(ops.convert_to_numpy(x)).any((-2, -1))
        bad[0] |= len(calls) in numbers
        calls.append(bad)
        return [
            ops.where(bad[(..., *[None] * (len(y.shape) - 1))], np.nan, y)
            for y in found
        ]

    return decompose


@pytest.mark.parametrize("number", range(5))
def test_an_adapter_whose_decomposition_fails_returns_later(
    number, monkeypatch
):
    monkeypatch.setattr(groups, "traced_once", lambda call, rank, *x: call(*x))
    healthy, problem = Regression(THREE), Regression(THREE)
    these, those = (
        GeoLoRA(INNER["Adam"](), retraction_interval=1) for _ in range(2)
    )
    for _ in range(2):
        healthy.step(these)
        problem.step(those)
    calls = []
    with monkeypatch.context() as patch:
        for name in ("eigh", "svd"):
            function = getattr(integrator, name)
            fake = giving_up(function, [number], calls)
            patch.setattr(integrator, name, fake)
        problem.step(those)
    assert len(calls) == 5
    bad, *others = problem.adapters
    assert to_numpy([bad.P])[0].any()
    assert not any(x.any() for a in others for x in to_numpy([a.P, a.Q]))
    healthy.step(these)
    for x, y in zip(others, healthy.adapters[1:], strict=True):
        assert_identical(to_numpy(factors(x)), to_numpy(factors(y)))
    # It has not lost what truncation discards.
    whole, cut = delta(bad), delta(healthy.adapters[0])
    share = these.discarded_share(healthy.adapters[0])
    lost = np.linalg.norm(whole - cut) / np.linalg.norm(whole)
    assert lost == pytest.approx(share, rel=1e-2, abs=1e-6)
    problem.step(those)
    assert not to_numpy([bad.P])[0].any()
    assert_on_manifold(bad)


# What a truncation discards.


@pytest.mark.parametrize("how", ["step", "cut"])
def test_the_discarded_share_is_that_of_the_norm(how):
    problem = Regression()
    place(problem.adapters[0], [3.0, 1.0, 0.1])
    place(problem.adapters[1], [3.0, 1.0])
    optimizer = GeoLoRA(keras.optimizers.SGD(0.0), 0.1, cut_interval=1)
    optimizer.build(problem.variables)
    assert optimizer.discarded_share(problem.adapters[0]) == 0.0
    if how == "cut":
        optimizer.cut()
    else:
        problem.step(optimizer)
    shares = [optimizer.discarded_share(a) for a in problem.adapters]
    assert shares[0] == pytest.approx(0.1 / np.sqrt(10.01), rel=1e-4)
    assert shares[1] < 1e-6
    assert problem.adapters[0].rank == 2


def test_of_adapters_that_it_does_not_train_nothing_is_known():
    problem = Regression()
    optimizer = GeoLoRA("adam")
    assert optimizer.discarded_share(problem.adapters[0]) is None
    optimizer.build(problem.variables)
    stranger = LowRankAdapter(12, 8, rank=2)
    assert optimizer.discarded_share(stranger) is None


@pytest.mark.parametrize("together", [True, False])
def test_adapters_that_rest_keep_what_was_discarded(together):
    problem = Regression(((12, 8), (12, 8) if together else (6, 5)))
    for adapter in problem.adapters:
        place(adapter, [3.0, 1.0, 0.1])
    optimizer = GeoLoRA(keras.optimizers.SGD(0.0), 0.1, cut_interval=1)
    problem.step(optimizer)
    resting = problem.adapters[1]
    share = optimizer.discarded_share(resting)
    optimizer.apply(tensors(problem.gradients()[:5]), problem.variables[:5])
    assert optimizer.discarded_share(resting) == share > 0.03


@pytest.mark.parametrize("together", [True, False])
def test_a_step_that_an_adapter_does_not_take_is_not_its_longest(together):
    problem = Regression(((12, 8), (12, 8) if together else (6, 5)))
    optimizer = GeoLoRA(keras.optimizers.Adam(1e-3))
    problem.step(optimizer)

    def longest():
        groups = optimizer.adapter_groups
        return np.concatenate(to_numpy([g.longest for g in groups]))

    moving, resting = longest()
    optimizer.learning_rate = 1.0
    optimizer.apply(tensors(problem.gradients()[:5]), problem.variables[:5])
    found = longest()
    assert found[0] > 100 * moving > 0
    assert found[1] == resting > 0


# What Keras promises of an optimizer.


def test_what_does_not_decay_is_written_with_the_optimizer():
    problem = Regression()
    optimizer = GeoLoRA(keras.optimizers.AdamW(0.1, weight_decay=0.5))
    optimizer.exclude_from_weight_decay(problem.variables[:5])
    optimizer.build(problem.variables)
    revived = GeoLoRA.from_config(optimizer.get_config())
    revived.build(problem.variables)
    shapes = [[v.shape for v in o.variables] for o in (optimizer, revived)]
    assert shapes[0] == shapes[1]
    assert revived.get_config()["without_weight_decay"] == [0, 1, 2]


def test_what_decays_is_not_changed_after_the_optimizer_is_built():
    problem = Regression()
    optimizer = built(INNER["AdamW"](weight_decay=0.1), problem)
    with pytest.raises(ValueError, match="(?s)Received:.*which is built"):
        optimizer.exclude_from_weight_decay(problem.variables[:5])


def test_the_state_is_set_as_a_whole():
    these, those = Regression(), Regression()
    one, other = (built(INNER["Adam"](), problem) for problem in (these, those))
    these.step(one)
    weights = to_numpy(one.variables)
    other.set_weights(weights)
    assert_identical(to_numpy(other.variables), weights)
    with pytest.raises(ValueError, match=f"Received: 3 .* {len(weights)} var"):
        other.set_weights(weights[:3])


def test_a_budget_that_was_refused_can_be_raised():
    problem = Regression()
    optimizer = GeoLoRA("adam", rank_budget=1)
    with pytest.raises(ValueError, match="Received: rank_budget=1"):
        optimizer.build(problem.variables)
    optimizer.rank_budget = 4
    problem.step(optimizer)
    optimizer.cut()
    assert sum(adapter.rank for adapter in problem.adapters) <= 4


def test_gradients_and_variables_are_as_many():
    problem = Regression()
    optimizer = built(INNER["Adam"](), problem)
    optimizer.apply([])
    assert int(to_numpy([optimizer.iterations])[0]) == 0
    with pytest.raises(ValueError, match="Received: 2 gradients for 10 varia"):
        problem.step(optimizer, problem.gradients()[:2])
    pairs = zip(tensors(problem.gradients()), problem.variables, strict=True)
    assert int(to_numpy([optimizer.apply_gradients(pairs)])[0]) == 1


def test_an_epoch_whose_last_step_was_a_cut_is_not_cut_again():
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    model.enable_geolora(rank=4)
    optimizer = GeoLoRA(keras.optimizers.Adam(0.01), 0.3, cut_interval=4)
    model.compile(optimizer, loss="mse")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(32, 8)), rng.normal(size=(32, 4))
    with pytest.MonkeyPatch.context() as patch:
        cuts = []
        patch.setattr(GeoLoRA, "cut", lambda self: cuts.append(1))
        model.fit(x, y, batch_size=8, verbose=0)
        assert not cuts
        model.fit(x[:24], y[:24], batch_size=4, verbose=0)
        assert len(cuts) == 1


def test_short_epochs_end_with_a_cut_about_every_20_steps():
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    model.enable_geolora(rank=2)
    model.compile(GeoLoRA("sgd"), loss="mse")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(12, 8)), rng.normal(size=(12, 4))
    with pytest.MonkeyPatch.context() as patch:
        cuts, updates = [], model.optimizer.iterations

        def cut(self):
            cuts.append(int(to_numpy([updates])[0]))

        patch.setattr(GeoLoRA, "cut", cut)
        # In parts, as a run that is interrupted: the count goes on.
        for epochs in (2, 5):
            model.fit(x, y, batch_size=1, epochs=epochs, verbose=0)
    assert cuts == [24, 48, 60, 84]
