"""What we export is what transformers loads: the same logits, and the same token ids."""

import json

import numpy as np
import pytest

from jaxllm.data.tokenizer import Tokenizer
from jaxllm.families.registry import read_config
from jaxllm.hf.export import export_hf
from jaxllm.hf.quantized import dequantized
from jaxllm.hf.weights import read
from jaxllm.model.build import build
from jaxllm.parity.prove import Held, ours
from jaxllm.parity.tensors import random_model
from jaxllm.parity.tiny import VARIANTS

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_exported_model_computes_the_same_in_transformers(variant, corpus, tmp_path):
    raw, arrays = random_model(variant)
    family, config, _ = read_config(raw)
    model = build(config)
    params = read(model, family, dequantized(Held(arrays), raw))
    export_hf(config, params, Tokenizer.load(corpus / "tokenizer"), tmp_path / "out", family=family.name)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids = np.random.default_rng(0).integers(0, config.vocab, 40)
    for start in (0, 100):
        positions = start + torch.arange(len(ids))[None]
        with torch.no_grad():
            other = theirs(torch.tensor(ids)[None], position_ids=positions, use_cache=False).logits[0].numpy()
        found = ours(model, params)(ids, start)
        assert np.abs(found - other).max() <= 1e-4 * np.abs(other).max(), f"{variant} from position {start}"


def test_the_tokenizer_of_an_exported_model_gives_the_same_ids(corpus, tmp_path):
    tokenizer = Tokenizer.load(corpus / "tokenizer")
    raw, arrays = random_model("llama3")
    arrays |= {name: np.resize(arrays[name], (400, 48)) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    family, config, _ = read_config(raw | {"vocab_size": 400})
    params = read(build(config), family, Held(arrays))
    export_hf(config, params, tokenizer, tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "def f(self, x):\n    return  self.value + 12 ▁ <|end|> é 東京\n"
    found = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert found == tokenizer.encode(text).tolist(), "and the text's <|end|> is no control token"
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert generation["bos_token_id"] == tokenizer.bos == theirs.bos_token_id
    messages = [{"role": "user", "content": "hello"}]
    rendered = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert rendered == tokenizer.render(messages, add_generation_prompt=True).tolist()
