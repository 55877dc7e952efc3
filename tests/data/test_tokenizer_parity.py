"""Ids, chats and masks equal transformers'."""

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxllm.data.rebuild import bpe_from_vocab
from jaxllm.data.tokenizer import Tokenizer

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
