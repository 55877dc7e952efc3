"""Families are data: every line of every table inverts, and every key of config.json is accounted for."""

import numpy as np
import pytest

from jaxllm.config import load
from jaxllm.errors import SettingsError
from jaxllm.families.base import Map, stored_shape, to_ours, to_theirs
from jaxllm.families.export import config_json, essence
from jaxllm.families.keys import IGNORED, Keys
from jaxllm.families.registry import FAMILIES, read_config
from jaxllm.model.spec import ModelConfig
from jaxllm.parity.tiny import VARIANTS

pytestmark = pytest.mark.fast
SIZES = dict(D=6, N=4, K=2, H=8, F=10, V=20, E=3, P=7, Q=5, C=9, R=4, W=3)
LLAMA = VARIANTS["llama3.1"]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_line_of_a_family_inverts(name):
    family = FAMILIES[name]
    for m in family.layer + family.top:
        shapes = {part[0]: tuple(SIZES[letter] for letter in part[3]) for part in m.parts}
        ours = {path: np.random.default_rng(0).normal(size=shape) for path, shape in shapes.items()}
        stored = to_theirs(m, ours, 4)
        assert stored.shape == stored_shape(m, shapes)
        back = to_ours(m, stored, shapes, 4)
        assert all(np.array_equal(back[path], ours[path]) for path in ours)


def test_axes_are_split_joined_and_turned():
    joined = Map(("k", "v"), "kv", ("(N H) C -> C N H", "(N W) C -> C N W"), join=1)
    stored = np.arange(2 * (3 + 1) * 5).reshape(8, 5)  # two heads of three and one
    found = to_ours(joined, stored, {"k": (5, 2, 3), "v": (5, 2, 1)})
    assert np.array_equal(found["k"][:, 1], stored[4:7].T) and np.array_equal(found["v"][:, 1], stored[7:8].T)
    alternating = Map(("gate", "up"), "both", ("D (F 1) -> D F",) * 2, join=2)
    found = to_ours(alternating, np.arange(6)[None], {"gate": (1, 3), "up": (1, 3)})
    assert found["gate"].tolist() == [[0, 2, 4]] and found["up"].tolist() == [[1, 3, 5]]
    pairs = Map("q", "q", "H", halves="H")
    assert to_ours(pairs, np.arange(6), {"q": (6,)}, 4)["q"].tolist() == [0, 1, 2, 4, 3, 5]
    offset = Map("w", "w", "D", plus=1.0)
    assert to_ours(offset, np.ones(3), {"w": (3,)})["w"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_written_reads_back_as_the_same_settings(variant):
    family, config, _ = read_config(VARIANTS[variant])
    chosen, raw = config_json(config, family.name)
    again = read_config(raw)[1]
    assert chosen is family and essence(again) == essence(config)
    assert config.layer_specs == again.layer_specs or essence(config).pattern == essence(again).pattern


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_key_that_is_not_understood_is_refused_by_name(variant):
    with pytest.raises(SettingsError, match="not understood: attention_flavour='new'.*--ignore-key attention_flavour"):
        read_config(VARIANTS[variant] | {"attention_flavour": "new"})
    _, config, keys = read_config(VARIANTS[variant] | {"attention_flavour": "new"}, ignore=("attention_flavour",))
    assert config == read_config(VARIANTS[variant])[1] and keys.ignored["attention_flavour"] == "ignored on request"
    assert keys.used.keys() | keys.ignored.keys() == keys.raw.keys()
    assert not IGNORED.keys() & keys.used.keys(), "no key is said to be harmless and used all the same"


def with_rope(**changes):
    return LLAMA | {"rope_parameters": LLAMA["rope_parameters"] | changes}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (LLAMA | {"architectures": ["LlamaForCausalML"]}, "LlamaForCausalML is not known; did you mean Llama"),
        (LLAMA | {"hidden_act": "swish9"}, "hidden_act='swish9' changes what the model computes"),
        (with_rope(rope_type="spiral"), "rope_type='spiral' is not known; known: default, linear"),
        (with_rope(mrope_section=[4, 4]), "rope_parameters: not understood: mrope_section"),
        (with_rope(low_freq_factor=None), "needs low_freq_factor and high_freq_factor"),
        (LLAMA | {"num_attention_heads": 3}, "heads=3 must be a multiple of kv_heads=2"),
        (LLAMA | {"hidden_size": None}, "config.json has no hidden_size"),
        (LLAMA | {"hidden_size": "wide"}, "hidden_size='wide' must be an integer of at least 1"),
        (LLAMA | {"num_hidden_layers": 0}, "num_hidden_layers=0 must be an integer of at least 1"),
        (LLAMA | {"rope_parameters": [1]}, "must be an object with keys"),
        (LLAMA | {"attention_bias": "yes"}, "attention_bias='yes' must be true or false"),
        (VARIANTS["gemma3"] | {"layer_types": ["local"] * 7}, "layer_types has 'local'"),
        (VARIANTS["gemma3"] | {"layer_types": ["full_attention"]}, "layer_types has 1 entries for 7 layers"),
        (VARIANTS["smollm3"] | {"no_rope_layers": [1]}, "no_rope_layers has 1 entries for 4 layers"),
        (VARIANTS["gpt2"] | {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True changes"),
        (VARIANTS["deepseek_v3"] | {"scoring_func": "softmax"}, "scoring_func='softmax' changes"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_by_name(raw, message):
    with pytest.raises(SettingsError, match=message):
        read_config(raw)


def test_both_spellings_of_rope_read_alike():
    old = {key: value for key, value in LLAMA.items() if key != "rope_parameters"}
    rope = dict(LLAMA["rope_parameters"])
    old |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope | {"type": "llama3"}}
    assert read_config(old)[1] == read_config(LLAMA)[1]


def test_models_made_here_find_the_family_whose_equations_they_follow():
    demo = load(ModelConfig, "configs/models/demo.yaml", ["vocab=512"])
    assert config_json(demo)[0].name == "llama"
    normed = load(ModelConfig, "configs/models/demo.yaml", ["vocab=512", "pattern.0.attn.qk_norm=head"])
    assert config_json(normed)[0].name == "qwen3"
    sinusoidal = load(ModelConfig, "configs/models/demo.yaml", ["vocab=512", "positions=sinusoidal"])
    with pytest.raises(SettingsError, match="no known family.*positions='sinusoidal'"):
        config_json(sinusoidal)


def test_an_account_forgets_no_key():
    keys = Keys({"a": 1, "use_cache": True, "b": None})
    assert keys.get("a") == 1
    keys.finish()
    assert keys.used == {"a": 1} and set(keys.ignored) == {"use_cache", "b"}
