"""Adapters of weights that hold many matrices: one step for all, own ranks."""

import keras
import numpy as np
import pytest

import keras_geolora

SHAPE, RANK = (6, 5), 2


class Batched(keras_geolora.LowRankAdapter):
    """Adapters of equal shape in one object, with a leading axis."""

    def __init__(self, adapters, **kwargs):
        super().__init__(
            *SHAPE, rank=RANK, max_rank=4, count=len(adapters), **kwargs
        )
        for mine, *theirs in zip(
            self.factors, *(a.factors for a in adapters), strict=True
        ):
            mine.assign(keras.ops.stack([v.value for v in theirs]))

    def kernel_norm(self):
        return np.ones(self.count, "float32")


class Single(keras_geolora.LowRankAdapter):
    def kernel_norm(self):
        return 1.0


def some_adapters(number):
    return [
        Single(*SHAPE, rank=RANK, max_rank=4, seed=2 * i) for i in range(number)
    ]


def gradients_of(variables, seed):
    rng = np.random.default_rng(seed)
    return [
        keras.ops.convert_to_tensor(
            0.1 * rng.standard_normal(v.shape).astype("float32")
        )
        for v in variables
    ]


def trained(adapters):
    return [v for a in adapters for v in a.factors]


def arrays_of(adapter):
    return [keras.ops.convert_to_numpy(v) for v in adapter.factors]


INNER = {
    "adamw": lambda: keras.optimizers.AdamW(1e-2, weight_decay=0.1),
    "clipped": lambda: keras.optimizers.Adam(1e-2, clipnorm=1e6),
}


@pytest.mark.parametrize("options", [{}, {"rank_budget": 6}], ids=str)
@pytest.mark.parametrize("inner", INNER)
def test_a_bank_trains_like_its_matrices_alone(inner, options):
    singles = some_adapters(3)
    batched = Batched(singles)
    other = some_adapters(4)[3]  # an ordinary adapter in the same group
    groups = singles + [other], [batched, Batched([other])]
    optimizers = [
        keras_geolora.GeoLoRA(
            INNER[inner](), cut_interval=4, retraction_interval=2, **options
        )
        for _ in groups
    ]
    for optimizer, adapters in zip(optimizers, groups, strict=True):
        optimizer.build(trained(adapters))
    for step in range(5):
        by_adapter = [
            gradients_of(a.factors, 10 * step + i)
            for i, a in enumerate(groups[0])
        ]
        alone = [g for gs in by_adapter for g in gs]
        in_batches = [
            keras.ops.stack(gs) for gs in zip(*by_adapter[:3], strict=True)
        ] + [g[None] for g in by_adapter[3]]
        optimizers[0].apply(alone)
        optimizers[1].apply(in_batches)
    assert optimizers[0].skipped_steps == 0
    for i, adapter in enumerate(singles):
        for one, many in zip(
            arrays_of(adapter), arrays_of(batched), strict=True
        ):
            np.testing.assert_allclose(one, many[i], atol=1e-6)
        assert optimizers[0].step_scale(adapter) >= optimizers[1].step_scale(
            batched
        )


@pytest.mark.parametrize("interval", [1, 2])
def test_a_matrix_that_no_token_visited_keeps_factors_and_moments(interval):
    batched = Batched(some_adapters(3))
    optimizer = keras_geolora.GeoLoRA(
        keras.optimizers.AdamW(1e-2, weight_decay=0.1),
        retraction_interval=interval,
    )
    optimizer.build(list(batched.factors))
    gradients = gradients_of(batched.factors, 0)
    for _ in range(2 * interval):
        optimizer.apply(gradients)
    before = arrays_of(batched)
    slots = [keras.ops.convert_to_numpy(v) for v in optimizer.variables]
    visited = keras.ops.reshape(
        keras.ops.convert_to_tensor([1.0, 0.0, 1.0]), (3, 1, 1)
    )
    for _ in range(interval):
        optimizer.apply([g * visited for g in gradients])
    for old, new in zip(before, arrays_of(batched), strict=True):
        np.testing.assert_array_equal(old[1], new[1])
    assert any(
        (old[0] != new[0]).any()
        for old, new in zip(before, arrays_of(batched), strict=True)
    )
    for old, variable in zip(slots, optimizer.variables, strict=True):
        new = keras.ops.convert_to_numpy(variable)
        if new.ndim == 3:
            np.testing.assert_array_equal(old[1], new[1])


def test_a_matrix_without_tokens_at_a_retraction_returns_all_the_same():
    batched = Batched(some_adapters(2))
    optimizer = keras_geolora.GeoLoRA(
        keras.optimizers.Adam(1e-2), retraction_interval=2
    )
    optimizer.build(list(batched.factors))
    gradients = gradients_of(batched.factors, 0)
    only_first = keras.ops.reshape(
        keras.ops.convert_to_tensor([1.0, 0.0]), (2, 1, 1)
    )
    optimizer.apply(gradients)
    assert arrays_of(batched)[3][1].any()
    optimizer.apply([g * only_first for g in gradients])
    assert not arrays_of(batched)[3].any()


def test_accumulated_gradients_count_as_visits():
    adapters = [Batched(some_adapters(2)) for _ in range(2)]
    gradients = gradients_of(adapters[0].factors, 0)
    second = keras.ops.reshape(
        keras.ops.convert_to_tensor([0.0, 1.0]), (2, 1, 1)
    )
    parts = (
        [g * second for g in gradients],
        [g * (1 - second) for g in gradients],
    )
    for batched, order in zip(adapters, (parts, parts[::-1]), strict=True):
        optimizer = keras_geolora.GeoLoRA(
            keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)
        )
        optimizer.build(list(batched.factors))
        for part in order:
            optimizer.apply(part)
    for one, other in zip(*map(arrays_of, adapters), strict=True):
        assert one[:, :, 0].any() == other[:, :, 0].any()
        np.testing.assert_allclose(one, other, atol=1e-6)
    assert arrays_of(adapters[0])[1].any(axis=(1, 2)).all()
