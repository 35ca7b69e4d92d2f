"""Products with stacks of experts, without the gradient of their sums."""

import gradients_test as plain
import keras
import numpy as np
import pytest
import weight_test as experts
from keras import ops
from weight_test import EXPERTS, HIDDEN, INPUTS, Experts

from keras_geolora.layers import weight as weight_module
from keras_geolora.layers.einsum_products import Labels
from keras_geolora.layers.kernel_view import KernelView
from keras_geolora.layers.linked import linked
from keras_geolora.layers.weight import AdaptedWeight


class Backwards(Experts):
    """Its matrices are stored transposed, and the last product adds up."""

    def build(self, shape):
        self.gate = self.add_weight(
            name="gate", shape=(EXPERTS, HIDDEN, INPUTS)
        )
        self.out = self.add_weight(name="out", shape=(EXPERTS, HIDDEN, INPUTS))

    def call(self, x):
        kernel = ops.cast(self.gate, x.dtype)  # as Gemma does
        hidden = ops.tanh(ops.einsum("ti,ehi->teh", x, kernel))
        return ops.einsum("teh, ehi -> ti", hidden, self.out)


class Otherwise(Experts):
    """Reads its weights in ways for which there is no rule."""

    def call(self, x):
        hidden = ops.einsum("eih,ti->eth", self.gate, x)
        hidden = hidden + ops.mean(self.gate)
        return ops.sum(ops.matmul(hidden, self.out), axis=0)


OWNERS = {"usual": Experts, "backwards": Backwards, "otherwise": Otherwise}


@pytest.fixture(params=["sum", "apart"])
def form(request, monkeypatch):
    pays = request.param == "sum"
    monkeypatch.setattr(weight_module, "sum_pays", lambda *sizes: pays)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("owner", OWNERS)
@pytest.mark.parametrize("order", [1, 2])
def test_gradients_are_those_of_the_weight_projected(owner, order):
    model = experts.adapted(OWNERS[owner])
    assert len(experts.weights(model)) == 2
    experts.compare_gradients(model, order)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("owner", OWNERS)
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_a_call_in_training_gives_what_one_without_gives(owner, policy):
    model = experts.model_of(OWNERS[owner], dtype=policy)
    model.trainable = False  # torch may take other kernels for what trains
    x = experts.rows(model)
    before = ops.convert_to_numpy(model(x, training=True))
    model = experts.adapted(OWNERS[owner], dtype=policy)
    model.trainable = False
    fresh = ops.convert_to_numpy(model(x, training=True))
    np.testing.assert_array_equal(fresh, before)
    experts.move(model)
    found, expected = (
        ops.convert_to_numpy(ops.cast(model(x, training=training), "float32"))
        for training in (True, False)
    )
    assert np.abs(expected - before).max() > 1e-2
    atol = 1e-5 if policy == "float32" else 0.05 * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, atol=atol)


def test_in_training_no_sum_is_formed_unless_it_is_read(monkeypatch):
    def refuse(self):
        raise AssertionError

    models = [experts.adapted(Experts), experts.adapted(Otherwise)]
    x = experts.rows(models[0])
    monkeypatch.setattr(AdaptedWeight, "sum", refuse)
    models[0](x, training=True)
    for model, training in ((models[0], False), (models[1], True)):
        with pytest.raises(AssertionError):
            model(x, training=training)


def test_a_thawed_weight_gets_its_gradient_in_training_too():
    model = experts.adapted()
    experts.move(model)
    layer = model.layers[0]
    layer.gate.trainable = True
    x = ops.convert_to_tensor(plain.random((5, INPUTS)))
    value = ops.convert_to_numpy(layer.gate)
    (found,) = plain.gradients(
        model, [layer.gate], [value], lambda m: ops.sum(m(x, training=True))
    )
    assert np.abs(found).max() > 1e-3


VIEW = KernelView("kernel", (2, 3, 4), rows=(1,), columns=(2,), batch=(0,))


@pytest.mark.backend_independent("it reads letters")
@pytest.mark.parametrize(
    "equation, known",
    [
        ("th,ehm->etm", True),
        ("eti,eih->eth", True),
        ("bsh,ehm->bsem", True),
        ("etm,ehm->th", True),
        ("th,ehm->tm", False),  # a sum of matrices
        ("th,ehm->ehm", False),
        ("th,ehm->etmh", False),
        ("ehm,ehm->ehm", False),
        ("tt,ehm->em", False),
        ("...h,ehm->e...m", False),
        ("th,ehm", False),
        ("h,hm->m", False),
    ],
)
def test_products_are_known_by_their_letters(equation, known):
    found = Labels.of(equation, VIEW)
    assert (found is not None) == known
    if known:
        labels, transposed = found
        assert transposed == (equation == "etm,ehm->th")
        assert labels.product == equation
        assert labels.transposed.transposed == labels


@pytest.mark.backend_independent("it calls functions")
def test_linked_code_keeps_its_defaults_and_closures():
    def maker(offset):
        def call(x, by=2, *, power=1):
            return ops.cast(x, "float32") * by**power + offset

        return call

    function = linked(maker(3), lambda operand: None)
    assert function is not None and function(5, power=2) == 23.0
    assert linked(len, None) is None
    assert linked(maker, None) is None  # it reads no operations
    assert linked(keras.layers.Dense.call, lambda operand: None) is not None
