"""`jaxllm parity` on a folder: what it prints, the perplexity of a whole text, and how it fails."""

import json

import jax
import numpy as np
import pytest

from jaxllm import api, cli
from jaxllm.parity import prove
from jaxllm.parity.tensors import random_model

pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "model"
    api.export(api.load(finished.folder), folder)
    return folder


def test_all_of_a_text_counts(exported, corpus, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("def f1(self, x):\n    return self.value + 7\n\n" * 30, encoding="utf-8")
    assert cli.main(["parity", str(exported), "--text", str(text), "--json"]) == 0
    out, err = capsys.readouterr()
    (report,) = json.loads(out)
    tokens, perplexity = report["text"]
    loaded = api.load(exported)
    ids = np.asarray(loaded.tokenizer.encode(text.read_text(), bos=True))
    longest = min(prove.LONGEST, loaded.model.config.context)
    assert tokens == len(ids) > 2 * longest
    nats, start, logits_of = [], 0, jax.jit(loaded.model.logits)
    while start < len(ids) - 1:
        window = ids[start : start + longest]
        logits = np.asarray(logits_of(loaded.params, window[None])[0], np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nats += list(-logprobs[np.arange(len(window) - 1), window[1:]])
        start += longest - 1
    assert len(nats) == len(ids) - 1
    assert perplexity == pytest.approx(np.exp(np.mean(nats)), rel=1e-5)
    assert report["holds"] and err.splitlines()[-1] == f"parity holds: {exported}"


def test_a_model_that_computes_something_else_fails(exported, monkeypatch, capsys):
    right = prove.forward
    monkeypatch.setattr(prove, "forward", lambda *args: right(*args) * 1.01)
    assert cli.main(["parity", str(exported)]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"parity fails: {exported}"


def test_what_it_cannot_do(exported, capsys):
    for words, said in (
        (["parity"], "--family NAME"),
        (["parity", str(exported), "--text", "none.txt"], "none.txt"),
        (["parity", "--family", "llama", "--text", "x"], "would be ignored"),
        (["parity", "."], "no config.json"),
    ):
        assert cli.main(words) == 2
        assert said in capsys.readouterr().err


def test_another_implementation_that_is_far_off_is_no_witness():
    """However far it misses the reference, it may miss ours by little."""
    raw, ids, rng = random_model("llama3")[0], np.arange(12), np.random.default_rng(0)
    right, wrong = (rng.standard_normal((12, raw["vocab_size"])) for _ in range(2))
    ours, near, far = (lambda ids, start, x=x: x for x in (right, right * (1 + 1e-5), wrong))
    assert all(row.holds for row in prove._beside("near", raw, ours, near, ours, ids))
    assert not any(row.holds for row in prove._beside("far", raw, ours, far, ours, ids))
