"""Every expert gets the rank that it needs, in training."""

import keras
import numpy as np
from keras import ops
from moving import anew
from training_test import linear_data

from keras_geolora import GeoLoRA
from keras_geolora.layers.tree import adapted_layers

EXPERTS, INPUTS, OUTPUTS = 4, 12, 8
SIGMA = [4.0, 3.5, 3.0, 2.5]


@keras.saving.register_keras_serializable("tests")
class Experts(keras.layers.Layer):
    """Linear experts; the first number of a row says which one acts."""

    def build(self, shape):
        self.kernel = self.add_weight(
            name="kernel",
            shape=(EXPERTS, INPUTS, OUTPUTS),
            initializer="zeros",
        )

    def call(self, rows):
        expert = ops.cast(rows[:, 0], "int32")
        y = ops.einsum("ti,eio->teo", rows[:, 1:], self.kernel)
        chosen = ops.one_hot(expert, EXPERTS, dtype=y.dtype)
        return ops.sum(y * chosen[..., None], axis=1)


def data(experts=range(EXPERTS), sigma=None):
    """As many rows for each expert, which needs one rank more than the last."""
    x, y = [], []
    for expert in experts:
        needed = SIGMA[: expert + 1] if sigma is None else sigma[expert]
        rows, outputs = linear_data(needed, seed=expert)
        x.append(np.hstack([np.full((len(rows), 1), expert), rows]))
        y.append(outputs)
    return np.vstack(x).astype("float32"), np.vstack(y)


def compiled(inner, **options):
    model = keras.Sequential(
        [keras.Input((1 + INPUTS,)), Experts(name="experts")]
    )
    model.enable_geolora(2, max_rank=5, targets="experts", seed=0)
    model.compile(GeoLoRA(inner, cut_interval=2, **options), loss="mse")
    return model


def by_sgd():
    # The mean over four experts makes each of them four times slower.
    return compiled(keras.optimizers.SGD(2.0 * EXPERTS))


def within_a_budget():
    return compiled(keras.optimizers.SGD(2.0 * EXPERTS), rank_budget=7)


def by_adam():
    return compiled(keras.optimizers.AdamW(0.01, weight_decay=0.1))


def adapter_of(model):
    (layer,) = adapted_layers(model).values()
    return layer.adapter


def test_every_expert_gets_the_rank_of_its_data():
    model = anew(by_sgd)
    x, y = data()
    history = model.fit(x, y, batch_size=len(x), epochs=40, verbose=0).history
    assert adapter_of(model).ranks.tolist() == [1, 2, 3, 4]
    assert history["mean_rank"][-1] == 2.5
    assert history["skipped_steps"][-1] == 0
    assert history["loss"][-1] < 1e-2 * history["loss"][0]


def test_experts_share_a_budget():
    model = anew(within_a_budget)
    x, y = data(sigma=[[1.0], [1.0, 0.9], [1.0, 0.9], [4.0, 3.5, 3.0, 2.5]])
    model.fit(x, y, batch_size=len(x), epochs=40, verbose=0)
    # Each has one; most of the others are where singular values are large.
    ranks = adapter_of(model).ranks.tolist()
    assert sum(ranks) == 7 and ranks[3] >= 3 > max(ranks[:3])


def arrays(variables):
    return [np.array(ops.convert_to_numpy(v)) for v in variables]


def test_an_expert_without_tokens_keeps_its_factors_and_moments():
    model = anew(by_adam)
    adapter, x, y = adapter_of(model), *data()
    model.fit(x, y, batch_size=len(x), epochs=3, verbose=0)
    variables = [*adapter.factors, *model.optimizer.variables]
    before = arrays(variables)
    x, y = data([0, 1, 3])
    for _ in range(3):  # `fit` also cuts at the end of an epoch
        model.train_on_batch(x, y)
    moved = 0
    for old, new in zip(before, arrays(variables), strict=True):
        if new.ndim == 3:
            np.testing.assert_array_equal(new[2], old[2])
            moved += not np.array_equal(new[3], old[3])
    assert moved >= 9  # U, S, V and two moments of each
