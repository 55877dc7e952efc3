"""A number format from outside of the package, `examples/fp4.py`: its bound, and its way through the command line."""

import json
import sys
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxllm
from jaxllm import cli
from jaxllm.errors import SettingsError
from jaxllm.weights.form import Form
from jaxllm.weights.quantized import quantize

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def fp4(monkeypatch):
    """The module of the example, found as PYTHONPATH=examples would."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.delitem(sys.modules, "fp4", raising=False)
    import fp4

    yield fp4
    sys.modules.pop("fp4", None)


def test_it_fits_on_a_page():
    assert (EXAMPLES / "fp4.py").read_text().count("\n") < 100


def test_the_error_is_within_its_bound(fp4):
    """Against float64, and the bound is not idle."""
    w_OI = np.random.default_rng(0).standard_normal((24, 64)).astype(np.float32)
    w = quantize(jnp.asarray(w_OI), Form("oi", (24, 64)), "fp4:FP4", group=16)
    groups = w_OI.astype(np.float64).reshape(24, 4, 16)
    scale = np.abs(groups).max(-1, keepdims=True) / 6
    error = np.abs(np.float64(w.dense(jnp.float32)).reshape(groups.shape) - groups) / scale
    bound = np.vectorize(fp4.bound)(groups / scale)
    assert (error <= bound * (1 + 1e-5)).all() and error.max() <= 1 + 1e-5
    assert all((error > 0.9 * bound)[bound == kind].any() for kind in (0.25, 0.5, 1.0))
    assert w.codes.dtype == jnp.uint8 and w.codes.shape == (24, 32)


def test_its_values_are_those_of_the_published_format(fp4):
    """All sixteen codes of e2m1, by ml_dtypes; 0 and -0 are one value here."""
    published = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert fp4.LEVELS == tuple(sorted({float(x) + 0.0 for x in published}))


@pytest.fixture
def stored(fp4, finished, here, capsys):
    """`stored(*argv)`: what `jaxllm quantize --format fp4:FP4 --out q` printed."""

    def call(*argv):
        words = ["quantize", str(finished.folder), *"--format fp4:FP4 --group 16 --tables --out q".split(), *argv]
        assert cli.main(words) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return call


@pytest.mark.slow
def test_a_model_whose_format_is_not_found_says_how_it_would_be(stored, monkeypatch, capsys):
    found = json.loads(stored("--json"))
    assert found["compression"] > 4 and found["settings"]["rules"][0]["format"] == "fp4:FP4"
    assert all(0.05 < error < 0.15 for errors in found["errors"].values() for error in errors)
    assert jaxllm.load("q").params["embed"].format == "fp4:FP4"
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder != str(EXAMPLES)])
    monkeypatch.delitem(sys.modules, "fp4")
    with pytest.raises(SettingsError, match="saved in q.*fp4:FP4.*No module named 'fp4'.*PYTHONPATH"):
        jaxllm.load("q")
    assert cli.main(["generate", "q", "--prompt", "def"]) == 2
    assert "put its folder into PYTHONPATH" in capsys.readouterr().err


@pytest.mark.slow
def test_what_is_reported_of_it_is_so_and_it_generates_what_its_values_do(stored, corpus):
    text = str(sorted(corpus.glob("*-1*.txt"))[0])
    found, loaded = json.loads(stored("--json", "--eval", text)), jaxllm.load("q")
    measured = jaxllm.api.evaluate(loaded, text, seq_len=64)
    assert found["perplexity"]["after"] == pytest.approx(measured["perplexity"], rel=1e-5)
    made, plain = (jaxllm.generate(one, "def f", max_tokens=4, temperature=0)[0] for one in (loaded, loaded.plain()))
    assert made.ids == plain.ids and len(made.ids) == 4
