"""Gemma 3 270M (Q4_K_M) and SmolLM2 135M Instruct (Q4_1), against what transformers computes on the same weights.

`scripts/fetch_models.sh` gets both; the references are in real_models.json.
"""

import hashlib
import json
import os
import pydoc_data.topics
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.evals.score import Pair, loglikelihoods
from jaxllm.hf.gguf import open_gguf
from jaxllm.hf.gguf_export import export_gguf
from jaxllm.hf.gguf_file import read_gguf
from jaxllm.sharding import ParallelConfig, make_sharding

pytestmark = pytest.mark.real_models
MODELS = Path(os.environ.get("JAXLLM_MODELS", Path(__file__).parents[2] / "models"))
FILES = {"gemma3": "gemma3-270m-q4_k_m.gguf", "smollm2": "SmolLM2-135M-Instruct.Q4_1.gguf"}
REFERENCE = json.loads(Path(__file__).with_name("real_models.json").read_text(encoding="utf-8"))


def path(name: str) -> Path:
    file = MODELS / FILES[name]
    if not file.is_file():
        pytest.skip(f"{file} is not there; scripts/fetch_models.sh {MODELS} gets it")
    return file


@pytest.fixture(scope="module", params=list(FILES))
def opened(request):
    file = open_gguf(path(request.param))
    one = make_sharding(ParallelConfig(data=1, fsdp=1), devices=jax.devices()[:1])
    return request.param, file, *file.load(one)


def logprobs(model, params, ids, last: int):
    """Of the token after each of the `last` positions, `[last, V]`."""

    @jax.jit
    def run(params, tokens_BT):
        hidden_BTD = model.apply(params, tokens_BT)[0][:, -last:]
        return jax.nn.log_softmax(model.unembed(model.head(params), hidden_BTD))[0]

    return np.asarray(run(params, jnp.asarray([ids])))


def test_next_tokens_are_those_of_transformers(opened):
    name, _, model, params = opened
    for prompt in REFERENCE[name]:
        greedy, n = prompt["greedy_ids"], len(prompt["greedy_ids"])
        found = logprobs(model, params, prompt["ids"] + greedy[:-1], n)
        np.testing.assert_allclose(found[0][prompt["top10_ids"]], prompt["top10_logprobs"], rtol=0, atol=1e-3)
        clear = np.asarray(prompt["margins"]) > 0.02
        assert clear.sum() > n / 2
        assert np.array_equal(found.argmax(-1)[clear], np.asarray(greedy)[clear])


def reference_windows(tokenizer):
    """The 20 x 1,023 ids of the reference, cut from text that this Python brings."""
    topics, wanted = pydoc_data.topics.topics, REFERENCE["perplexity"]
    text = "\n\n".join(topics[name].strip() for name in sorted(topics, key=str.lower))
    if hashlib.sha256(text.encode()).hexdigest() != wanted["text_sha256"]:
        pytest.skip("another Python has other topics than 3.11.7, of which the reference is")
    ids = np.asarray(tokenizer.encode(text[:110_000])[: 20 * 1023], "<i4")
    at, changed = wanted["changed"]
    ids[at : at + len(changed)] = changed
    assert hashlib.sha256(ids.tobytes()).hexdigest() == wanted["ids_sha256"]
    return ids.reshape(20, 1023)


@pytest.mark.parametrize("opened", ["gemma3"], indirect=True)
def test_the_perplexity_is_that_of_transformers(opened):
    _, file, model, params = opened
    tokenizer, wanted = file.tokenizer(), REFERENCE["perplexity"]
    pairs = [Pair([tokenizer.bos], row.tolist()) for row in reference_windows(tokenizer)]
    nll = [-score.logprob / score.tokens for score in loglikelihoods(model, params, pairs, batch=1)]
    np.testing.assert_allclose(nll, wanted["nll"], rtol=0, atol=2e-4)
    assert np.exp(np.mean(nll)) == pytest.approx(wanted["perplexity"], rel=1e-3)


def test_the_tokenizer_gives_the_ids_of_transformers(opened):
    name, file, _, _ = opened
    tokenizer = file.tokenizer()
    for prompt in REFERENCE[name]:
        if "text" in prompt:
            assert tokenizer.encode(prompt["text"], bos=True).tolist() == prompt["ids"]
        if "messages" in prompt:
            rendered = tokenizer.render(prompt["messages"], add_generation_prompt=True)
            assert rendered.tolist() == prompt["ids"]


def test_a_file_written_again_holds_the_same_model(opened, tmp_path):
    name, file, _, params = opened
    export_gguf(file.config, params, file.tokenizer(), tmp_path / "a.gguf")
    again = open_gguf(tmp_path / "a.gguf")
    assert again.architecture == file.architecture and str(again.config) == str(file.config)
    before, after = file.tensors(), again.tensors()
    assert before.keys() == after.keys()
    assert all(np.array_equal(tensor.map(), after[key].map()) for key, tensor in before.items())
    keys = [f"tokenizer.ggml.{key}" for key in ("model", "tokens", "merges", "bos_token_id", "eos_token_id")]
    old, new = (read_gguf(p).metadata for p in (file.path, tmp_path / "a.gguf"))
    assert [np.asarray(old.get(key)).tolist() for key in keys] == [np.asarray(new.get(key)).tolist() for key in keys]
    ids = [i for prompt in REFERENCE[name] for i in prompt["ids"]]
    tokenizer = again.tokenizer()
    text = tokenizer.decode(ids)
    assert np.array_equal(tokenizer.encode(text), file.tokenizer().encode(text))
