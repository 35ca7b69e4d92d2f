"""Random lives of small models; `lives.py` leads hundreds by hand."""

import lives
import pytest


# Others than those that are led by hand, and the same for everybody.
@pytest.mark.parametrize("seed", [1000])
@pytest.mark.parametrize("kind", lives.KINDS)
@pytest.mark.filterwarnings("ignore:`trainable=False` was set on a model")
def test_a_life_keeps_every_promise(kind, seed):
    lives.live(kind, seed, steps=8)
