"""Processors and beam search against transformers, on random logits and a small random model."""

import jax
import numpy as np
import pytest

from jaxllm.generate.beam import beam_search
from jaxllm.generate.params import make_sampling
from jaxllm.generate.tokens import generate
from jaxllm.generate.truncate import truncate
from jaxllm.hf.open import open_published
from jaxllm.sharding import ParallelConfig, make_sharding

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

PROMPTS = [[1, 5, 9, 33], [1, 77, 3, 14, 20, 21]]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The same model there and here."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=128, hidden_size=32, intermediate_size=48, max_position_embeddings=64)
    heads = dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.mul_(8 if weight.ndim == 2 else 1)
    folder = tmp_path_factory.mktemp("llama")
    theirs.save_pretrained(folder)
    one_device = make_sharding(ParallelConfig(), jax.devices()[:1])
    return theirs, open_published(folder).load(one_device, dtype="float32")


def their(model, prompt, **options):
    ids = torch.tensor([prompt])
    return model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **options)


@pytest.mark.parametrize(
    "temperature, top_k, top_p, min_p, typical_p",
    [(1.0, 500, 1, 0, 0.3), (0.7, 500, 1, 0, 0.9), (1.5, 50, 0.9, 0.02, 0.5), (1.2, 20, 0.8, 0.1, 0.99)],
)
def test_truncation_keeps_the_same_tokens(temperature, top_k, top_p, min_p, typical_p):
    from transformers.generation import logits_process as there

    logits = np.random.default_rng(0).normal(size=(8, 500)).astype(np.float32) * 3
    kept = torch.tensor(logits) / temperature
    kept = there.TopPLogitsWarper(float(top_p))(None, there.TopKLogitsWarper(top_k)(None, kept))
    kept = there.TypicalLogitsWarper(typical_p)(None, there.MinPLogitsWarper(float(min_p))(None, kept))
    numbers = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, typical_p=typical_p)
    ours = jax.jit(truncate)(logits, make_sampling(8, **numbers))
    assert (np.isfinite(ours) == np.isfinite(kept.numpy())).all()


@pytest.mark.parametrize("penalty", [1.3, 0.8, 2.0])
def test_repetition_penalty_and_min_tokens_make_the_same_greedy_text(both, penalty):
    theirs, ours = both
    stops = list(range(2, 40))
    rows = generate(
        *ours, PROMPTS, max_tokens=20, temperature=0, repetition_penalty=penalty, min_tokens=15, stop_ids=stops
    )
    for prompt, row in zip(PROMPTS, rows, strict=True):
        options = dict(repetition_penalty=penalty, min_new_tokens=15, max_new_tokens=20, eos_token_id=stops)
        assert row.ids == their(theirs, prompt, **options)[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    "beams, length_penalty, stops",
    [(4, 1.0, [2]), (4, 0.0, [2, 17, 40, 90]), (3, 2.0, range(2, 17)), (5, -1.0, range(2, 17)), (8, 0.6, range(2, 40))],
)
def test_beam_search_finds_the_same_texts(both, beams, length_penalty, stops):
    theirs, ours = both
    options = dict(length_penalty=length_penalty, max_tokens=12)
    rows = beam_search(*ours, PROMPTS, beams=beams, n=3, stop_ids=list(stops), **options)
    for p, prompt in enumerate(PROMPTS):
        found = their(
            theirs,
            prompt,
            num_beams=beams,
            num_return_sequences=3,
            length_penalty=length_penalty,
            early_stopping="never",
            max_new_tokens=12,
            eos_token_id=list(stops),
            return_dict_in_generate=True,
            output_scores=True,
        )
        for row, ids, score in zip(rows[3 * p :], found.sequences, found.sequences_scores, strict=False):
            assert ids[len(prompt) :].tolist()[: len(row.ids)] == row.ids
            assert abs(sum(row.logprobs) / len(row.ids) ** length_penalty - float(score)) < 1e-4
