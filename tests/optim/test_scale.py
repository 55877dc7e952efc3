import math
import subprocess
import sys
from itertools import pairwise

import pytest

from jaxllm.errors import SettingsError
from jaxllm.optim.scale import RULES, compute_optimal


def test_depth_12_by_hand():
    s = compute_optimal(12, vocab=4096)
    assert (s.embed, s.head, s.heads, s.kv_heads, s.ffw) == (768, 64, 12, 6, 2048)
    attention = 768 * 768 + 2 * 768 * 384 + 768 * 768
    layer = attention + 3 * 768 * 2048 + 2 * 768
    assert s.params == 12 * layer + 768 + 4096 * 768 == 81_021_696
    assert s.tokens == 1_620_433_920
    assert s.flops == pytest.approx(7.877e17, rel=1e-3)
    assert s.lr == pytest.approx(1.806e-3, rel=1e-3)
    assert s.batch_tokens == pytest.approx(208_600, rel=1e-3)
    assert s.steps == math.ceil(s.tokens / s.batch_tokens)


def test_the_laws_give_the_published_settings_of_deepseek_llm():
    """Bi et al. 2024, table 2: 7B and 67B models trained on 2T tokens use lr 4.2e-4 and 3.2e-4, batch 9.4M and 18.9M.

    Their compute counts attention and leaves embeddings out, so the laws hold only roughly at 6ND.
    """
    for params, lr, batch in ((6.9e9, 4.2e-4, 9.4e6), (67e9, 3.2e-4, 18.9e6)):
        s = compute_optimal(30, 102_400, params=int(params), tokens=2 * 10**12)
        assert s.lr == pytest.approx(lr, rel=0.1) and s.batch_tokens == pytest.approx(batch, rel=0.15)


def test_untied_embeddings_count_twice():
    assert compute_optimal(4, 1000, tied=False).params - compute_optimal(4, 1000).params == 1000 * 256


def test_larger_depth_means_larger_run_and_smaller_learning_rate():
    runs = [compute_optimal(depth, 32_000) for depth in range(1, 65)]
    for a, b in pairwise(runs):
        assert all(getattr(a, k) < getattr(b, k) for k in ("params", "tokens", "flops", "batch_tokens"))
        assert a.embed <= b.embed and a.ffw <= b.ffw and a.lr > b.lr


def test_sizes_divide():
    for depth in range(1, 65):
        s = compute_optimal(depth, 4096)
        assert s.heads * s.head == s.embed and s.heads % s.kv_heads == 0 and s.ffw % 64 == 0


def test_by_hand_changes_what_follows_and_nothing_before():
    free, fixed = compute_optimal(12, 4096), compute_optimal(12, 4096, tokens=10**9)
    assert fixed.tokens == 10**9 and fixed.params == free.params
    assert fixed.flops == 6.0 * free.params * 10**9 and fixed.lr > free.lr


def test_derivation_has_a_line_with_a_source_for_each_quantity():
    lines = compute_optimal(12, 4096, lr=1e-3).derivation().splitlines()
    for rule in RULES:
        (line,) = (line for line in lines if line.split()[0] == rule.name)
        assert "set by hand" in line if rule.name == "lr" else rule.source in line
    assert not any("extrapolation" in line for line in lines)
    assert "extrapolation" in compute_optimal(2, 4096).derivation()


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"depth": 0}, "depth=0"),
        ({"depth": 2.5}, "depth=2.5"),
        ({"embd": 512}, "did you mean embed"),
        ({"heads": 6, "kv_heads": 4}, "heads=6 is not a multiple of kv_heads=4"),
        ({"lr": -1.0}, "lr=-1.0"),
    ],
)
def test_refused(kwargs, words):
    with pytest.raises(SettingsError, match=words):
        compute_optimal(**{"depth": 4, "vocab": 4096, **kwargs})


def test_loads_no_jax():
    code = "import sys, jaxllm.optim.scale, jaxllm.optim.config; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
