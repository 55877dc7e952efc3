"""`jaxllm quantize`: what it writes, what it reports, and every way in which it can be asked for something wrong."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
import tiny

import jaxllm
from jaxllm import api, cli, tree
from jaxllm.adapt.changes import Change
from jaxllm.adapt.prune import PruneConfig
from jaxllm.adapt.quantize import QuantizeConfig, QuantizeRule
from jaxllm.compress.prune import counts
from jaxllm.config import parse
from jaxllm.sharding import ParallelConfig
from jaxllm.weights.quantized import Quantized

pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture
def verb(finished, capsys):
    """`verb(*argv)`: `(exit code, what was printed, what was said)`."""

    def call(*argv, model=finished.folder):
        capsys.readouterr()
        code = cli.main(["quantize", str(model), *map(str, argv)])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def texts(corpus):
    return sorted(map(str, corpus.glob("*-1*.txt")))


@pytest.fixture(scope="module")
def alone(finished):
    """The trained model on one device, where programs compile in half the time."""
    loaded = jaxllm.load(finished.folder)
    model = tiny.one_device(loaded.model.config)
    return dataclasses.replace(loaded, model=model, params=jax.tree.map(jnp.asarray, jax.device_get(loaded.params)))


@pytest.mark.parametrize("activations, bar", [(None, 1.005), ("int8", 1.015)])
def test_int8_costs_next_to_nothing(alone, texts, activations, bar):
    """Weight-only at most 0.5 % perplexity, with int8 activations at most 1.5 %; embedding and head included."""
    config = QuantizeConfig(rules=(QuantizeRule(pattern="**", format="int8"),), activations=activations)
    smaller, errors = api.quantize(alone, config)
    found = api.compare(alone, smaller, texts)
    assert 1 != found["perplexity"]["after"] / found["perplexity"]["before"] < bar
    assert 0.95 < found["greedy_agreement"] < 1 and found["positions"] > 1000
    assert all(0.001 < error < 0.02 for values in errors.values() for error in values)
    measured = api.evaluate(smaller, texts)
    assert all(found[name]["after"] == pytest.approx(measured[name], rel=1e-5) for name in found if name in measured)


@pytest.mark.slow
def test_gptq_by_rules_with_its_report(verb, texts, tmp_path):
    rules = ["--rule", "**/down=float", "--rule", "**/attn/*=nf4:8", "--eval", texts[0]]
    argv = [*"--format int4 --group 16 --tables --method gptq --out q --tokens 400 --calibrate".split(), *texts, *rules]
    code, out, said = verb(*argv)
    assert code == 0, said
    assert "times smaller" in out and "layers/0/attn/q" in out and "down" not in out and "written to q" in out
    assert "layer 2 of 2" in said
    found = json.loads((tmp_path / "q" / "report.json").read_text())
    assert found["compression"] == found["bytes_before"] / found["bytes_after"] > 2.5
    assert f"{found['perplexity']['before']:.3f} -> {found['perplexity']['after']:.3f}" in out
    assert (tmp_path / "q" / "report.png").stat().st_size > 10_000
    loaded = jaxllm.load(tmp_path / "q", parallel=ParallelConfig(fsdp=2, tensor=2, data=2))
    assert tree.nbytes(loaded.params) == found["bytes_after"] and isinstance(loaded.params["head"], Quantized)
    assert [rule.method for rule in loaded.changes[0].quantize.rules] == ["nearest", "gptq", "nearest", "gptq"]
    other = jaxllm.load(tmp_path / "q", parallel=ParallelConfig(fsdp=8))
    assert tiny.bit_equal(*(jax.device_get(one.params) for one in (loaded, other)))
    code, _, said = verb(*"--format int8 --out again".split(), model="q")
    assert code == 2 and "layers/0/attn/k is quantised already (nf4)" in said and not (tmp_path / "again").exists()


@pytest.mark.slow
@pytest.mark.slow
def test_one_part_after_the_other(alone):
    """Codes beside codes and zeros; each report is of what was done, and all weights are counted."""
    rule = lambda pattern: QuantizeConfig(rules=(QuantizeRule(pattern=pattern, format="int8"),))  # noqa: E731
    mlp, _ = api.quantize(alone, rule("layers/**/mlp/**"))
    both, errors = api.quantize(mlp, rule("embed"))
    assert list(errors) == ["embed"]
    pruned, found = api.prune(both, PruneConfig(sparsity=0.5, pattern="layers/**/attn/**"))
    total, left = counts(pruned.params)
    assert all("/attn/" in path for path in found["errors"]) and total == counts(alone.params)[0]
    halves = sum(leaf.size for path, leaf in tree.flatten(alone.params).items() if path in found["errors"]) // 2
    assert 0.98 * halves < total - left < 1.02 * halves + 0.02 * total


def test_a_quantised_model_generates_what_its_values_do(alone):
    config = QuantizeConfig(rules=(QuantizeRule(pattern="**", format="int4", group=8),))
    smaller, _ = api.quantize(alone, config)
    made, plain = (jaxllm.generate(one, "def f", max_tokens=8, temperature=0)[0] for one in (smaller, smaller.plain()))
    assert made.ids == plain.ids and len(made.ids) == 8


@pytest.mark.parametrize(
    "options, says",
    [
        ("--format in8", "unknown format 'in8'; did you mean int8"),
        ("--format int8 --pattern layers/0/atn/*", "no matrix matches 'layers/0/atn/*'; did you mean layers/0/attn/"),
        ("--format int4", "group=64 does not divide its 32 inputs; groups that do: 16, 32"),
        ("--format int4 --group 7", "group=7 does not divide"),
        ("--format int4 --method gptq", "--method gptq needs text to go by: --calibrate FILE"),
        ("--format int8 --calibrate x.txt", "--method nearest goes by the weights alone and would ignore --calibrate"),
        ("--format int8 --ordered", "ordered=true is for method=gptq"),
        ("--format int8 --seq-len 8", "without --eval nothing is measured and would ignore --seq-len"),
        ("--format nf4 --group 16 --activations int8", "activations=int8 needs symmetric integers, not nf4"),
        ("--format int8 --rule x", "--rule 'x': write it as PATTERN=FORMAT"),
        ("--format int8 --rule **/q=int7", "unknown format 'int7'; did you mean int"),
        ("--format int8 --method gptq --calibrate short.txt", "the calibration text is too short: 0 whole rows"),
        ("--format int8 --method awq --tokens 9 --calibrate short.txt", "tokens=9: at least 48 are needed"),
        ("--format int8 --eval nothing.txt", "nothing.txt"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_written(verb, tmp_path, options, says):
    (tmp_path / "short.txt").write_text("def f")
    code, out, said = verb(*options.split(), "--out", "made")
    assert code == 2 and says in said and not out, said
    assert not (tmp_path / "made").exists()


def test_nothing_is_written_over(verb, tmp_path):
    (tmp_path / "there").mkdir()
    code, _, said = verb(*"--format int8 --out there".split())
    assert code == 2 and "there exists, and nothing is written over" in said
    assert not list((tmp_path / "there").iterdir())


@pytest.fixture(scope="module")
def trained_for_int4(finished, tmp_path_factory):
    """A folder with weights as a run with `qat` leaves them."""
    folder = tmp_path_factory.mktemp("qat") / "run"
    qat = {"rules": [{"format": "int4", "group": 16, "symmetric": False}]}
    api.save(jaxllm.load(finished.folder).change(Change(qat=qat)), folder)
    return folder


@pytest.mark.slow
def test_a_run_trained_for_a_format_is_stored_in_it(verb, trained_for_int4, finished, tmp_path):
    """Codes, scales and zeros are those of the floats quantised, to the last bit; errors are those of the floats."""
    code, out, said = verb("--out", "stored", "--json", model=trained_for_int4)
    assert code == 0, said
    found = json.loads(out)
    rule = found["settings"]["rules"][0]
    assert rule["format"] == "int4" and rule["symmetric"] is False and found["compression"] > 1.3
    loaded = jaxllm.load("stored")
    config = parse(QuantizeConfig, found["settings"], "report")
    expected, errors = api.quantize(jaxllm.load(finished.folder), config)
    assert tiny.bit_equal(*(jax.device_get(one.params) for one in (loaded, expected)))
    assert found["errors"] == {path: pytest.approx(values) for path, values in errors.items()}
    code, _, said = verb("--out", "again", model="stored")
    assert code == 2 and "is stored in it: choose one with --format (int8, int4" in said


def test_what_a_run_trained_for_a_format_cannot_be_asked(verb, trained_for_int4, tmp_path):
    for options, model, says in (
        ("--group 16 --tables", trained_for_int4, "as they were trained (qat) and would ignore --group, --tables"),
        ("--method gptq --rule **/q=int8", trained_for_int4, "would ignore --rule, --method"),
        ("--format int8", trained_for_int4, "was trained for int4 (qat) and is still used rounded: jaxllm quantize"),
        ("", None, "was not trained for a number format (qat)"),
    ):
        code, _, said = verb(*options.split(), "--out", "made", **({"model": model} if model else {}))
        assert code == 2 and says in said and not (tmp_path / "made").exists(), said
