"""Adapters in PEFT's layout: out and in again, what is refused, and damaged files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny

from jaxllm import tree
from jaxllm.adapt.changes import Change, after
from jaxllm.adapt.lora import LoraConfig
from jaxllm.errors import DataError, SettingsError
from jaxllm.families.registry import read_config
from jaxllm.hf.peft import CONFIG, TENSORS, load_peft
from jaxllm.hf.peft_export import export_peft
from jaxllm.model.build import build
from jaxllm.model.change import weights_of
from jaxllm.parity.tiny import VARIANTS
from jaxllm.weights.lora import Lora

Q = "base_model.model.model.layers.0.self_attn.q_proj"


def base_of(variant: str):
    """`(family, model, weights)` of a small model of a family."""
    family, config, _ = read_config(VARIANTS[variant])
    model = tiny.one_device(config)
    return family.name, model, tiny.weights(model)


def adapted(model, params, **settings):
    """The model with an adapter that does something; no array of the base is copied."""
    config = LoraConfig(**({"pattern": "**/attn/*,**/mlp/*", "rank": 4, "alpha": 6.0} | settings))
    model = after(model, (Change(lora=config),))
    rng = np.random.default_rng(0)

    def lay(path, leaf):
        if not isinstance(leaf, Lora):
            return weights_of(params)[path]
        arrays = {name: getattr(leaf, name) for name in ("lora_a", "lora_b", "lora_magnitude")}
        drawn = {n: jnp.asarray(rng.random(x.shape, np.float32) - 0.4) for n, x in arrays.items() if x is not None}
        return leaf.__class__(**(vars(leaf) | {"base": weights_of(params)[path]} | drawn))

    weights = {path: lay(path, leaf) for path, leaf in weights_of(model.abstract).items()}
    return model, jax.tree.structure(params).unflatten(weights.values())


def written(folder, family, model, params, *, rslora=False, dropout=0.0):
    export_peft(model, params, folder, family=family, rslora=rslora, dropout=dropout)
    return json.loads((folder / CONFIG).read_text()), safetensors.numpy.load_file(folder / TENSORS)


@pytest.mark.parametrize("variant", ["llama3", "gemma3", "phi3", "gpt2", "deepseek_v2"])
@pytest.mark.parametrize("kind", ["rslora", "dora"])
def test_an_adapter_goes_out_and_comes_back(variant, kind, tmp_path):
    """Its merged weights are the same: rotated, joined and transposed tensors, stacks of layers, a tied head."""
    family, base, params = base_of(variant)
    tables = "" if kind == "dora" else ",embed" if base.config.tied else ",embed,head"
    pattern = "**/attn/*,**/mlp/*" + tables
    rules = () if "phi3" in variant or "gpt2" in variant or "deep" in variant else ({"pattern": "**/up", "rank": 2},)
    model, ours = adapted(base, params, kind=kind, pattern=pattern, rules=rules)
    written(tmp_path / "a", family, model, ours, rslora=kind == "rslora", dropout=0.1)
    config, again = load_peft(base, params, tmp_path / "a", family=family)
    assert (config.kind, config.dropout) == (kind, 0.1)
    assert jax.tree.structure(again) == jax.tree.structure(after(base, (Change(lora=config),)).abstract)
    found, expected = weights_of(again), weights_of(ours)
    assert {p for p in found if isinstance(found[p], Lora)} == {p for p in found if isinstance(expected[p], Lora)}
    for path, weight in expected.items():
        if isinstance(weight, Lora):
            assert tiny.relative(*(w.scale * np.asarray(w.lora_a) @ w.lora_b for w in (found[path], weight))) < 1e-6
            assert kind != "dora" or tiny.bit_equal(found[path].lora_magnitude, weight.lora_magnitude)
    export_peft(
        after(base, (Change(lora=config),)), again, tmp_path / "b", family=family, rslora=kind == "rslora", dropout=0.1
    )
    assert (tmp_path / "a" / CONFIG).read_text() == (tmp_path / "b" / CONFIG).read_text(), "ranks do not grow"


@pytest.fixture(scope="module")
def llama():
    return base_of("llama3")


@pytest.fixture
def folder(llama, tmp_path):
    """An adapter over the llama."""
    family, base, params = llama
    written(tmp_path / "a", family, *adapted(base, params))
    return tmp_path / "a"


def edit(folder, settings=(), tensors=None):
    raw = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(raw | dict(settings)))
    if tensors is not None:
        found = safetensors.numpy.load_file(folder / TENSORS)
        safetensors.numpy.save_file(tensors(found), folder / TENSORS)


def test_what_is_written_is_what_peft_writes(llama, folder):
    raw, tensors = json.loads((folder / CONFIG).read_text()), safetensors.numpy.load_file(folder / TENSORS)
    names = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert raw["target_modules"] == names and (raw["r"], raw["lora_alpha"]) == (4, 6.0)
    assert tensors[f"{Q}.lora_A.weight"].shape == (4, 48) and tensors[f"{Q}.lora_B.weight"].shape == (64, 4)
    assert len(tensors) == 3 * 7 * 2


def test_ranks_and_scales_by_layer(llama, folder):
    """A smaller rank is filled up with zeros, another scale goes into b, and a layer without an adapter has zeros."""
    family, base, params = llama
    last = Q.replace("layers.0", "layers.2")

    def cut(tensors):
        tensors = {name: value for name, value in tensors.items() if Q.replace("layers.0", "layers.1") not in name}
        a, b = f"{last}.lora_A.weight", f"{last}.lora_B.weight"
        return tensors | {a: tensors[a][:2], b: np.ascontiguousarray(tensors[b][:, :2])}

    before = weights_of(load_peft(base, params, folder, family=family)[1])["layers/0/attn/q"]
    by_layer = {"rank_pattern": {r"layers\.2\.self_attn\.q_proj": 2}, "alpha_pattern": {"layers.2.*q_proj": 9}}
    edit(folder, by_layer | {"exclude_modules": ["model.layers.1.self_attn.q_proj"]}, cut)
    config, found = load_peft(base, params, folder, family=family)
    q = weights_of(found)["layers/0/attn/q"]
    assert q.scale == 1.5 and q.lora_a.shape == (3, 48, 4)
    assert tiny.bit_equal(q.lora_a[0], before.lora_a[0]) and not q.lora_a[1].any() and not q.lora_b[1].any()
    assert tiny.bit_equal(q.lora_a[2, :, :2], before.lora_a[2, :, :2]) and not q.lora_a[2, :, 2:].any()
    np.testing.assert_allclose(q.lora_b[2, :2], before.lora_b[2, :2] * (9 / 2) / 1.5, rtol=1e-6)


REFUSED = {
    "modules_to_save": (["lm_head"], "modules_to_save"),
    "bias": ("all", "bias='all'"),
    "init_lora_weights": ("pissa", "init_lora_weights='pissa'"),
    "layer_replication": ([[0, 2]], "layer_replication"),
    "trainable_token_indices": ([1], "trainable_token_indices"),
    "target_parameters": (["experts.down_proj"], "target_parameters"),
    "use_qalora": (True, "use_qalora"),
    "peft_type": ("LOHA", "peft_type='LOHA'"),
    "use_something_new": (True, "use_something_new"),
    "r": ("4", "r='4'"),
    "rank_pattern": ({"q_proj": 8}, "has rank 4, and adapter_config.json says 8"),
    "alpha_pattern": ({"q_(": 8}, "not a regular expression"),
    "lora_alpha": (float("nan"), "lora_alpha=nan"),
    "target_modules": (3, "wrong type"),
    "use_dora": (True, "lacks a magnitude"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(key, llama, folder):
    value, said = REFUSED[key]
    edit(folder, {key: value})
    with pytest.raises((SettingsError, DataError)) as error:
        load_peft(llama[1], llama[2], folder, family=llama[0])
    assert said in str(error.value)


def test_an_adapter_of_another_base(llama, folder):
    family, model, params = base_of("qwen2")
    with pytest.raises(
        DataError, match=r"lora_B.weight has shape \[48, 4\], and this model needs \[64, 4\]; the adapter"
    ):
        load_peft(model, params, folder, family=family)
    edit(folder, tensors=lambda found: {n.replace("layers.2", "layers.7"): v for n, v in found.items()})
    with pytest.raises(DataError, match=r"layers.7.*which a llama model of 3 layers does not have.*another base"):
        load_peft(llama[1], llama[2], folder, family="llama")


def test_damaged_adapters(llama, folder):
    def load():
        return load_peft(llama[1], llama[2], folder, family=llama[0])

    whole = (folder / TENSORS).read_bytes()
    for damaged in (whole[:100], whole[:-8], b"\xff" * 64):
        (folder / TENSORS).write_bytes(damaged)
        with pytest.raises(DataError, match="adapter_model.safetensors"):
            load()
    for change, said in (
        (lambda t: {n: v for n, v in t.items() if n != f"{Q}.lora_B.weight"}, "q_proj has no lora_B"),
        (
            lambda t: {n: v for n, v in t.items() if not n.startswith(Q)},
            "has nothing for model.layers.0.self_attn.q_proj",
        ),
        (lambda t: t | {f"{Q}.lora_A.weight": t[f"{Q}.lora_A.weight"] * np.nan}, "NaN or infinity"),
        (lambda t: t | {"base_model.model.score.weight": np.ones(3, np.float32)}, "score.weight is not part of"),
        (lambda t: {}, "has nothing for"),
    ):
        (folder / TENSORS).write_bytes(whole)
        edit(folder, tensors=change)
        with pytest.raises(DataError, match=said):
            load()
    (folder / TENSORS).unlink()
    with pytest.raises(DataError, match="has no adapter_model.safetensors"):
        load()
    (folder / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(DataError, match="pickle"):
        load()
    (folder / CONFIG).write_text("{")
    with pytest.raises(DataError, match="not JSON at line 1"):
        load()


def test_what_peft_has_no_place_for(tmp_path):
    family, model, params = base_of("mixtral")
    with pytest.raises(SettingsError, match="layers/0/moe/gate has an adapter, and PEFT's layout has none for experts"):
        written(tmp_path / "a", family, *adapted(model, params, pattern="**/moe/*"))
    family, model, params = base_of("llama3.2")
    with pytest.raises(SettingsError, match="embed has a DoRA adapter"):
        written(tmp_path / "a", family, *adapted(model, params, pattern="embed", kind="dora"))
    with pytest.raises(SettingsError, match="none or several"):
        written(tmp_path / "a", family, model, params)
    assert not (tmp_path / "a").exists()


def test_one_adapter_over_a_tied_table_is_over_both_modules(tmp_path):
    family, model, params = base_of("llama3.2")
    _, tensors = written(tmp_path / "a", family, *adapted(model, params, pattern="embed"))
    assert {name.split(".lora")[0] for name in tensors} == {
        "base_model.model.lm_head",
        "base_model.model.model.embed_tokens",
    }
    edit(tmp_path / "a", tensors=lambda t: {n: v * (2 if "lm_head.lora_A" in n else 1) for n, v in t.items()})
    with pytest.raises(SettingsError, match="the head of this model is its embedding"):
        load_peft(model, params, tmp_path / "a", family=family)


def test_a_padded_vocabulary_is_not_stored(tmp_path):
    family, config, _ = read_config(VARIANTS["llama3"])
    model = build(config.__class__(**(vars(config) | {"vocab_multiple": 8})), tiny.one_device(config).sharding)
    params = tiny.weights(model)
    _, tensors = written(tmp_path / "a", family.name, *adapted(model, params, pattern="embed,head"))
    assert tensors["base_model.model.lm_head.lora_B.weight"].shape == (97, 4)
    again = load_peft(model, params, tmp_path / "a", family=family.name)[1]
    assert again["head"].lora_b.shape == (4, 104) and not tree.flatten(again)["head/lora_b"][:, 97:].any()
