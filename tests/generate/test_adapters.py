"""Rows with different adapters in one batch make what each makes alone with its own."""

import jax
import numpy as np
import pytest

from jaxllm import tree
from jaxllm.adapt.changes import Change, after
from jaxllm.adapt.gather import gather
from jaxllm.adapt.lora import TRAINABLE, LoraConfig
from jaxllm.errors import SettingsError
from jaxllm.generate import decode
from jaxllm.generate.beam import beam_search
from jaxllm.generate.tokens import generate
from jaxllm.model.change import change

PROMPTS = [[7], [3, 9, 11, 2, 30, 8, 1, 4, 19], [5, 6, 38], [3, 9]]
ADAPTERS = [1, 0, -1, 1]


@pytest.fixture(scope="module")
def models(dense):
    """`([(model, weights) with adapter 0, with adapter 1, with none], (model, weights) with both)`."""
    ones = []
    for seed, pattern in enumerate(("**/attn/*,embed", "**/mlp/*,**/q")):
        one = Change(lora=LoraConfig(pattern=pattern, rank=2 + seed))
        rng = np.random.default_rng(seed)

        def draw(path, leaf, rng=rng):
            noise = 0.3 * rng.standard_normal(leaf.shape, np.float32)
            return jax.device_put(noise, leaf.sharding) if tree.matches(TRAINABLE, path) else leaf

        params = tree.map_with_path(draw, change(dense.model, one.plan(dense.model), dense.params))
        ones.append((after(dense.model, (one,)), params))
    config, params = gather([params for _, params in ones])
    return [*ones, tuple(dense)], (after(dense.model, (Change(lora=config), Change(several=2))), params)


@pytest.mark.slow
def test_rows_with_adapters_of_their_own(models, monkeypatch):
    """Prompts read a row at a time; two samples of each; greedy, sampled and by beams."""
    monkeypatch.setattr(decode, "PREFILL", 16)
    alone, (model, params) = models
    options = dict(temperature=[0.9, 0.0001, 1.2, 0.7], seed=[1, 2, 3, 4])
    found = generate(model, params, PROMPTS, max_tokens=6, adapters=ADAPTERS, n=2, **options)
    for row, (prompt, which) in enumerate(zip(PROMPTS, ADAPTERS, strict=True)):
        mine = {name: values[row] for name, values in options.items()}
        expected = generate(*alone[which], [prompt], max_tokens=6, n=2, **mine)
        for one, other in zip(found[2 * row : 2 * row + 2], expected, strict=True):
            assert one.ids == other.ids
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
    assert found[1].ids != found[7].ids


@pytest.mark.slow
def test_beams_with_adapters_of_their_own(models):
    alone, (model, params) = models
    found = beam_search(model, params, PROMPTS, max_tokens=5, beams=2, adapters=ADAPTERS)
    for made, prompt, which in zip(found, PROMPTS, ADAPTERS, strict=True):
        assert made.ids == beam_search(*alone[which], [prompt], max_tokens=5, beams=2)[0].ids


def test_adapters_that_are_not_there(models, dense):
    _, both = models
    for adapters, said in ((None, "the model holds 2 adapters"), ([0], "each of the 2"), ([0, 2], "0 to 1")):
        with pytest.raises(SettingsError, match=said):
            generate(*both, [[1], [2]], max_tokens=2, adapters=adapters)
    with pytest.raises(SettingsError, match="does not hold several"):
        generate(*dense, [[1]], max_tokens=2, adapters=[0])
