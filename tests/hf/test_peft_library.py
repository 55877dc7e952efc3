"""Adapters that go to the peft library and come from it compute the same logits, over the same small models."""

import json

import numpy as np
import pytest

from jaxllm.adapt.changes import Change, after
from jaxllm.adapt.lora import LoraConfig
from jaxllm.families.registry import read_config
from jaxllm.hf.peft import load_peft
from jaxllm.hf.peft_export import export_peft
from jaxllm.hf.weights import read
from jaxllm.model.change import change
from jaxllm.parity.prove import Held, ours
from jaxllm.parity.tensors import random_model
from jaxllm.tree import map_with_path, matches

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.parity

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
#: variant, kind, modules. peft's DoRA over an embedding normalises the other axis; a tied table needs both modules.
CASES = [
    ("llama3", "lora", [*LAYERS, "embed_tokens", "lm_head"]),
    ("llama3", "rslora", ["q_proj", "down_proj"]),
    ("llama3", "dora", [*LAYERS, "lm_head"]),
    ("qwen3", "lora", LAYERS),
    ("qwen3", "dora", ["q_proj", "v_proj", "up_proj"]),
    ("gemma3", "rslora", LAYERS),
    ("gemma3", "dora", LAYERS),
    ("phi3", "lora", ["qkv_proj", "gate_up_proj", "o_proj"]),
    ("gpt2", "dora", ["c_attn", "c_fc", "c_proj"]),
]
TOKENS = np.random.default_rng(0).integers(0, 97, 40)


@pytest.fixture(scope="module")
def base():
    """`variant -> (family, model, weights, arrays, config.json)`"""
    made = {}

    def get(variant):
        if variant not in made:
            raw, arrays = random_model(variant)
            family, config, _ = read_config(raw)
            from jaxllm.model.build import build

            model = build(config)
            made[variant] = family, model, read(model, family, Held(arrays)), arrays, raw
        return made[variant]

    return get


def theirs(raw, arrays):
    """The same model in transformers, with a copy of the weights."""
    config = transformers.AutoConfig.for_model(**{k: v for k, v in raw.items() if k != "architectures"})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(torch.float32)
    model.load_state_dict({name: torch.tensor(array) for name, array in arrays.items()}, strict=False)
    model.tie_weights()
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)[None], use_cache=False).logits[0].numpy()


def close(found, expected):
    return np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(("variant", "kind", "modules"), CASES, ids=lambda x: x if isinstance(x, str) else "")
def test_an_adapter_of_peft_computes_the_same_here(variant, kind, modules, base, tmp_path):
    family, model, params, arrays, raw = base(variant)
    torch.manual_seed(0)
    options = dict(r=4, lora_alpha=6, use_dora=kind == "dora", use_rslora=kind == "rslora", init_lora_weights=False)
    options |= {"rank_pattern": {modules[0]: 2}, "alpha_pattern": {rf"layers\.1\..*{modules[-1]}": 11}}
    adapted = peft.get_peft_model(theirs(raw, arrays), peft.LoraConfig(target_modules=modules, **options)).eval()
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_magnitude" in name:
                value.mul_(1 + 0.3 * torch.rand_like(value))
            elif "lora_" in name:
                value.mul_(0.3)
    adapted.save_pretrained(tmp_path / "a")
    config, found = load_peft(model, params, tmp_path / "a", family=family.name)
    expected = logits(adapted)
    assert close(ours(after(model, (Change(lora=config),)), found)(TOKENS, 0), expected)
    assert not close(ours(model, params)(TOKENS, 0), expected)


@pytest.mark.parametrize(("variant", "kind", "modules"), CASES, ids=lambda x: x if isinstance(x, str) else "")
def test_our_adapter_computes_the_same_in_peft(variant, kind, modules, base, tmp_path):
    family, model, params, arrays, raw = base(variant)
    pattern = "**/attn/*,**/mlp/*" + (",embed,head" if "embed_tokens" in modules else ",head" * ("lm_head" in modules))
    if model.config.tied and kind == "lora":
        pattern += ",embed"
    change_ = Change(lora=LoraConfig(pattern=pattern, rank=3, alpha=5.0, kind=kind))
    new = after(model, (change_,))
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        if not matches("**/lora_*", path):
            return leaf
        return leaf * (1 + 0.2 * noise) if path.endswith("magnitude") else 0.2 * noise

    adapted = map_with_path(draw, change(model, change_.plan(model), params))
    export_peft(new, adapted, tmp_path / "a", family=family.name, rslora=kind == "rslora", dropout=0.0)
    found = peft.PeftModel.from_pretrained(theirs(raw, arrays), tmp_path / "a").eval()
    loaded = {name for name, _ in found.named_parameters() if "lora_" in name}
    assert len(loaded) == len(json.loads(_header(tmp_path / "a/adapter_model.safetensors"))) - 1
    expected = ours(new, adapted)(TOKENS, 0)
    assert close(logits(found), expected)
    assert not close(ours(model, params)(TOKENS, 0), expected)


def _header(path):
    raw = path.read_bytes()
    return raw[8 : 8 + int.from_bytes(raw[:8], "little")]
