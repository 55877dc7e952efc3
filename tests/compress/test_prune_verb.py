"""`jaxllm prune`: what it writes, what it reports, what comes after it, and every wrong way to ask."""

import json

import jax
import pytest
import small
import tiny

import jaxllm
from jaxllm import api, checkpoint, cli, tree
from jaxllm.compress.prune import counts
from jaxllm.sharding import ParallelConfig
from jaxllm.weights.pruned import Pruned

pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture
def verb(finished, capsys):
    """`verb(*argv)`: `(exit code, what was printed, what was said)`."""

    def call(*argv, model=finished.folder, verb="prune"):
        capsys.readouterr()
        code = cli.main([verb, str(model), *map(str, argv)])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def texts(corpus):
    return sorted(map(str, corpus.glob("*-1*.txt")))


def test_half_of_the_weights_with_a_report(verb, finished, texts, tmp_path):
    code, out, said = verb(*"--sparsity 0.5 --out half --eval".split(), texts[0])
    assert code == 0, said
    found = json.loads((tmp_path / "half" / "report.json").read_text())
    pruned = sum(x.size for path, x in tree.flatten(finished.params).items() if "layers" in path and "norm" not in path)
    assert found["nonzeros"]["before"] - found["nonzeros"]["after"] == pruned // 2
    assert found["parameters"]["before"] == found["parameters"]["after"] == tree.count(finished.params)
    assert f"{found['perplexity']['before']:.3f} -> {found['perplexity']['after']:.3f}" in out
    assert "relative error of" in out and "layers/0/mlp/down" in out and "times smaller" not in out
    assert (tmp_path / "half" / "report.png").stat().st_size > 10_000
    loaded = jaxllm.load("half")
    assert counts(loaded.params)[1] == found["nonzeros"]["after"] and tree.nbytes(loaded.params) == found["bytes_after"]
    code, _, said = verb(*"--sparsity 0.7 --out again".split(), model="half")
    assert code == 2 and "layers/0/attn/k is pruned already; make it plain first" in said
    assert not (tmp_path / "again").exists()


@pytest.mark.slow
def test_what_is_pruned_is_loaded_merged_and_generates_as_anything_else(verb, tmp_path):
    """It loads onto another mesh, generates what its plain values do, and merges into those."""
    assert verb(*"--sparsity 0.5 --out half".split())[0] == 0
    loaded = jaxllm.load("half", parallel=ParallelConfig(fsdp=2, tensor=2, data=2))
    assert isinstance(loaded.params["layers"]["0"]["mlp"]["up"], Pruned) and loaded.changes[0].prune.sparsity == 0.5
    code, _, said = verb("--out", "plain", model="half", verb="merge")
    assert code == 0, said
    plain = jaxllm.load("plain")
    assert counts(plain.params)[1] == counts(loaded.params)[1] < counts(loaded.params)[0]
    assert all(isinstance(w, jax.Array) for w in jax.tree.leaves(plain.params, is_leaf=lambda x: isinstance(x, Pruned)))
    made, expected = (jaxllm.generate(one, "def f", max_tokens=6, temperature=0)[0].ids for one in (loaded, plain))
    assert made == expected and len(made) == 6


@pytest.mark.slow
def test_a_smaller_model_is_an_ordinary_one(verb, texts, tmp_path):
    """With fewer layers, heads and neurons: another config, plain weights, and a published folder as any other."""
    options = "--layers 1 --heads 1 --neurons 24 --tokens 400 --json --out small --calibrate"
    code, out, said = verb(*options.split(), *texts)
    assert code == 0 and "layer 1 of 1" in said, said
    found = json.loads(out)
    assert found == json.loads((tmp_path / "small" / "report.json").read_text())
    assert len(found["dropped"]) == 1 and len(found["influence"]) == 2 and set(found["removed"]) == {"heads", "neurons"}
    loaded = jaxllm.load("small")
    spec = loaded.model.config.pattern[0]
    assert (loaded.model.config.layers, spec.attn.kv_heads, spec.mlp.ffw) == (1, 1, 24) and not loaded.changes
    assert found["parameters"]["after"] == tree.count(loaded.params) and found["compression"] > 1
    family = api.export(loaded, tmp_path / "hf")
    again = jaxllm.load(tmp_path / "hf")
    made = [jaxllm.generate(one, "def f", max_tokens=4, temperature=0)[0].ids for one in (loaded, again)]
    assert made[0] == made[1] and family


@pytest.mark.slow
@pytest.mark.parametrize("options", ["--nm 2:4 --method wanda", "--neurons 24"])
def test_recovery_by_distillation_keeps_what_is_pruned(verb, finished, corpus, texts, options):
    """A run from the pruned weights with the unpruned model as its teacher, ."""
    code, _, said = verb(*options.split(), *"--tokens 400 --out less --calibrate".split(), *texts)
    assert code == 0, said
    before = jaxllm.load("less")
    raw = small.settings(corpus, "recovered", train__init="less", distill={"teacher": str(finished.folder)})
    raw = {key: value for key, value in raw.items() if key != "model"} | {"out": "recovered"}
    result = api.train(raw | {"train": raw["train"] | {"steps": 4}}, quiet=True)
    after = jaxllm.load("recovered")
    assert result.status == "finished" and after.changes == before.changes
    assert after.model.config == before.model.config and counts(after.params) == counts(before.params)
    assert "kl" in (result.folder / "metrics.jsonl").read_text()
    old, new = (tree.flatten(one.params) for one in (before, after))
    for path, was in old.items():
        assert tiny.bit_equal(was, new[path]) == path.endswith("/mask"), path
    assert checkpoint.read_meta("recovered")[1]["changes"] == checkpoint.read_meta("less")[1]["changes"]


@pytest.mark.parametrize(
    "options, says",
    [
        ("", "say what goes: --sparsity, --nm, --heads"),
        ("--sparsity 0.5 --heads 1", "--sparsity and --heads: one after the other, the smaller model first"),
        ("--sparsity 0.5 --nm 2:4", "sparsity=0.5, nm=2:4: set one of them"),
        ("--sparsity 1.5", "sparsity=1.5 must lie between 0 and 1"),
        ("--nm 4:2", "nm='4:2': write N:M, N kept of each M, such as 2:4"),
        ("--nm 3:5", "layers/0/attn/k: nm=3:5 goes by groups of 5 inputs, and its 32 do not divide"),
        ("--sparsity 0.5 --pattern layers/0/atn/*", "no matrix matches 'layers/0/atn/*'; did you mean layers/0/attn/"),
        ("--sparsity 0.5 --method wanda", "--method wanda needs text to go by: --calibrate FILE"),
        ("--neurons 8", "--neurons needs text to go by: --calibrate FILE"),
        ("--sparsity 0.5 --calibrate short.txt", "goes by the weights alone and would ignore --calibrate"),
        ("--heads 1 --pattern ** --method wanda", "--heads takes whole parts out and would ignore --method, --pattern"),
        ("--sparsity 0.5 --seq-len 8", "without --eval nothing is measured and would ignore --seq-len"),
        ("--nm 2:4 --method wanda --calibrate short.txt", "the calibration text is too short: 0 whole rows"),
        ("--neurons 8 --tokens 9 --calibrate short.txt", "tokens=9: at least 48 are needed"),
        ("--heads 2 --calibrate long.txt", "heads=2 may stay, and the model has 2"),
        ("--experts 0 --calibrate long.txt", "experts=0: at least 1 must be left"),
        ("--layers 2 --calibrate long.txt", "layers=2 may stay, and the model has 2"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_written(verb, tmp_path, options, says):
    (tmp_path / "short.txt").write_text("def f")
    (tmp_path / "long.txt").write_text("def f(x):\n    return x\n" * 200)
    code, out, said = verb(*options.split(), "--out", "made")
    assert code == 2 and says in said and not out, said
    assert not (tmp_path / "made").exists()


def test_nothing_is_written_over(verb, tmp_path):
    (tmp_path / "there").mkdir()
    code, _, said = verb(*"--sparsity 0.5 --out there".split())
    assert code == 2 and "there exists, and nothing is written over" in said
    assert not list((tmp_path / "there").iterdir())
