"""Ids, chats and masks equal transformers'."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxllm.data.answers import MARKS, Answers
from jaxllm.data.conversation import Conversation
from jaxllm.data.rebuild import bpe_from_vocab
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.hf.open import open_published

pytestmark = pytest.mark.parity
LETTERS = list(" \n\t\0▁▅<>|abc1é日😀\u0301\r")
#: As Qwen3's and the DeepSeek distillations': cuts reasoning out of earlier turns, trims, prints tools as JSON.
TEMPLATE = """{{ bos_token }}{% if tools %}<|im_start|>tools
{{ tools | tojson }}<|im_end|>
{% endif %}
{% for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\n') %}
<|im_start|>assistant
{% generation %}{{ content }}<|im_end|>{% endgeneration %}

    {%- else %}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
THOUGHT = "<think>\nwhy\n</think>\n\nyes "
CHATS = [
    [("user", "  a < b [x]\n\n ")],
    [("system", "brief"), ("user", "é日 1 </s"), ("assistant", THOUGHT), ("user", "<|"), ("assistant", "")],
    [("user", "<tool_response>x</tool_response>"), ("assistant", "self.value\n\n")],
]


@pytest.fixture(scope="module")
def auto():
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained


def random_texts(count=200):
    rng = np.random.default_rng(0)
    return ["".join(rng.choice(LETTERS, rng.integers(1, 60))) for _ in range(count)]


def byte_level(texts) -> Tokenizer:
    rust = tokenizers.Tokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    rust.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=450, initial_alphabet=alphabet, show_progress=False))
    merges = [" ".join(merge) for merge in json.loads(rust.to_str())["model"]["merges"]]
    tokens = sorted(rust.get_vocab(), key=rust.get_vocab().get) + ["<|im_start|>", "<|im_end|>", "</think>"]
    types = [1] * (len(tokens) - 3) + [3, 3, 4]
    end = len(tokens) - 2
    return bpe_from_vocab(
        tokens, merges, types, pre="gpt-2", bos=end, eos=end, unk=None, pad=end, add_bos=False, template=TEMPLATE
    )


def test_ours_in_autotokenizer(auto, tokenizer, texts, tmp_path):
    tokenizer.to_hf(tmp_path)
    theirs = auto(str(tmp_path))
    assert len(theirs) == tokenizer.vocab and theirs.eos_token_id == tokenizer.eos
    for text in random_texts() + texts[:20]:
        assert theirs.encode(text) == tokenizer.encode(text, bos=True).tolist()
        assert theirs.decode(tokenizer.encode(text)) == text
    turns = [{"role": "user", "content": " hi "}, {"role": "assistant", "content": "é yes"}]
    assert theirs.apply_chat_template(turns)["input_ids"] == tokenizer.render(turns).tolist()


@pytest.mark.parametrize("tools", [None, [{"name": "f<x>", "parameters": {"é": ["<", 1, None]}}]])
@pytest.mark.parametrize("chat", CHATS)
def test_chats_and_masks(auto, texts, tmp_path, chat, tools):
    ours = byte_level(texts)
    ours.to_hf(tmp_path)
    theirs = auto(str(tmp_path))
    turns = [{"role": role, "content": content} for role, content in chat]
    for prompt in (False, True):
        options = dict(add_generation_prompt=prompt, return_assistant_tokens_mask=True, return_dict=True)
        wanted = theirs.apply_chat_template(turns, tools, **options)
        ids_N, mask_N = ours.render_masked(turns, tools, add_generation_prompt=prompt)
        assert ids_N.tolist() == list(wanted["input_ids"])
        assert mask_N.tolist() == [bool(x) for x in wanted["assistant_masks"]]


def test_texts_of_a_byte_level_model(auto, texts, tmp_path):
    ours = byte_level(texts)
    ours.to_hf(tmp_path)
    theirs = auto(str(tmp_path))
    for text in random_texts() + texts[:20]:
        assert ours.encode(text, bos=True).tolist() == theirs.encode(text)


@pytest.mark.parametrize("marked", [True, False], ids=["marks", "compared"])
def test_what_is_learnt_of_a_conversation(auto, texts, tmp_path, marked):
    """As `assistant_masks`, also where the template does not mark the assistant's words."""
    ours = byte_level(texts)
    ours.to_hf(tmp_path)
    theirs, answers = auto(str(tmp_path)), Answers(ours)
    if not marked:
        answers = Answers(ours.with_template(MARKS.sub("", TEMPLATE).replace("{% endgeneration %}", "")))
    rng = np.random.default_rng(0)
    for _ in range(40):
        words = ["".join(rng.choice(LETTERS, rng.integers(1, 20))) for _ in range(2 * rng.integers(1, 4))]
        turns = [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(words)]
        wanted = theirs.apply_chat_template(turns, return_assistant_tokens_mask=True, return_dict=True)
        found = answers(Conversation(turns))
        assert found.ids_N.tolist() == list(wanted["input_ids"]) and found.untrained == 0
        assert found.marks_N.tolist() == [bool(x) for x in wanted["assistant_masks"]]


@pytest.mark.real_models
def test_a_conversation_of_smollm2(auto, tmp_path):
    """Its template has no marks; what is learnt is each answer and the end of its turn."""
    path = Path(os.environ.get("JAXLLM_MODELS", "models")) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.is_file():
        pytest.skip(f"{path} is not here; scripts/fetch_models.sh gets it")
    ours = open_published(path).tokenizer()
    ours.to_hf(tmp_path)
    theirs = auto(str(tmp_path))
    for chat in [*CHATS, [("user", "a"), ("assistant", "b\n\n"), ("user", "c"), ("assistant", " é日\n")]]:
        turns = [{"role": role, "content": content} for role, content in chat]
        wanted = theirs.apply_chat_template(turns)["input_ids"]
        assert ours.render(turns).tolist() == list(wanted)
        said = "".join(f"{content}<|im_end|>" for role, content in chat if role == "assistant")
        if said:
            found = Answers(ours)(Conversation(turns))
            assert found.ids_N.tolist() == list(wanted)
            assert ours.decode(found.ids_N[found.marks_N], skip_special=False) == said
