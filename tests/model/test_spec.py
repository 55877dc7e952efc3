"""Settings of a model: combinations that cannot work or would do nothing, sizes, and folding layers into a pattern."""

import functools
import itertools

import pytest
import tiny

from jaxllm.config import parse
from jaxllm.errors import SettingsError
from jaxllm.model.spec import LayerSpec, MlpSpec, ModelConfig, fold

LATENT = {"kv_heads": None, "latent": {"kv_rank": 12, "rope_head": 4, "v_head": 5}}
LONG = {"scaling": "longrope", "original_context": 16, "short_factors": [1] * 4, "long_factors": [2] * 4}
GROUPS = {"experts": 8, "groups": 4, "groups_per_token": 2, "group_score": "max"}

REFUSED = [
    (dict(attn={"rope": {"truncate": False}}), "truncate=False would be ignored: scaling none does not read it"),
    (dict(attn={"rope": {"short_factors": [1.0]}}), r"short_factors=\(1.0,\) would be ignored: scaling none"),
    (dict(attn={"rope": LONG | {"original_context": None}}), "rope scaling longrope needs original_context"),
    (dict(attn={"rope": LONG | {"long_factors": None}}), "longrope needs long_factors, .* each pair; got None"),
    (dict(attn={"rope": LONG | {"long_factors": [1, 1, 0, 1]}}), r"needs long_factors, a positive number"),
    (dict(attn={"rope": LONG | {"long_factors": [1, 2]}}), "rope.long_factors has 2 numbers, but 8 rotated .* need 4"),
    (dict(attn={"rope": LONG | {"fraction": 0.5}}), "rope.short_factors has 4 numbers, but 4 rotated .* need 2"),
    (dict(attn={"rope": LONG | {"factor": 2, "attention_factor": 1.5}}), "factor=2.0 .* attention_factor=1.5 is set"),
    (
        dict(attn={"rope": {"scaling": "yarn", "original_context": 8, "beta_fast": 1, "beta_slow": 2}}),
        "beta_fast=1.0 must not be below beta_slow=2.0",
    ),
    (dict(attn=LATENT | {"kv_heads": 2}), "kv_heads=2 would be ignored: latent attention makes each head's key"),
    (dict(attn=LATENT | {"qk_norm": "head"}), "qk_norm=head would be ignored: latent attention has its own"),
    (dict(attn=LATENT | {"qkv_bias": True}), "qkv_bias=True would be ignored: latent attention has none"),
    (dict(attn=LATENT | {"latent": LATENT["latent"] | {"q_rank": 0}}), "q_rank=0 must be at least 1"),
    (dict(attn=LATENT | {"latent": LATENT["latent"] | {"rope_head": 3}}), "even head .* fraction of at least 2, got 3"),
    (dict(moe={"groups_per_token": 2}), "groups_per_token=2 would be ignored: groups=1"),
    (dict(moe={"group_score": "max"}), "group_score=max would be ignored: groups=1"),
    (dict(moe=GROUPS | {"groups": 3}), "experts=8 must be a multiple of groups=3"),
    (dict(moe=GROUPS | {"groups": 0}), "groups=0 must be at least 1"),
    (dict(moe=GROUPS | {"group_score": None}), "groups=4 needs groups_per_token and group_score"),
    (dict(moe=GROUPS | {"groups_per_token": 5}), "groups_per_token=5 must lie in 1 to groups=4"),
    (dict(moe=GROUPS | {"experts_per_token": 5}), "experts_per_token=5 is more than groups_per_token=2 groups of 2"),
    (
        dict(moe=GROUPS | {"groups": 8, "group_score": "top2"}),
        "group_score=top2 needs groups of two .* have 1",
    ),
]


@pytest.mark.fast
@pytest.mark.parametrize("settings,message", REFUSED, ids=lambda x: str(x)[:50])
def test_what_cannot_work_is_refused(settings, message):
    with pytest.raises(SettingsError, match=message):
        tiny.config(**settings)


@pytest.mark.fast
def test_sizes_of_heads():
    plain, latent = tiny.config({"head": 12}), tiny.config(LATENT | {"head": 6})
    sizes = lambda c: [f(c.pattern[0].attn) for f in (c.head_dim, c.qk_dim, c.v_dim, c.rope_dim)]  # noqa: E731
    assert sizes(plain) == [12, 12, 12, 12]
    assert sizes(latent) == [6, 10, 5, 4]


def specs(letters: str) -> list[LayerSpec]:
    """A list of layers, one kind a letter."""
    return [kind(letter) for letter in letters]


@functools.cache
def kind(letter: str) -> LayerSpec:
    return tiny.config(mlp={"ffw": ord(letter)}).pattern[0]


def model_of(prefix, pattern, layers) -> ModelConfig:
    return ModelConfig(vocab=8, embed=32, layers=layers, prefix=prefix, pattern=pattern)


FOLDS = {
    "gemma 3": ("LLLLLG" * 4 + "LL", "", "LLLLLG"),
    "deepseek": ("DDD" + "M" * 58, "DDD", "M"),
    "smollm3": ("RRRN" * 9, "", "RRRN"),
    "gpt-oss": ("SF" * 18, "", "SF"),
    "llama": ("A" * 32, "", "A"),
    "qwen3-moe, every second dense": ("DM" * 24, "", "DM"),
    "qwen3-moe, some dense layers first": ("DD" + "MMD" * 7 + "M", "D", "DMM"),
    "one": ("A", "", "A"),
    "no two alike": ("ABCDE", "", "ABCDE"),
    "the last differs": ("AAAAB", "", "AAAAB"),
    "in the midst": ("AAABAAAA", "AAAB", "A"),
}


@pytest.mark.fast
@pytest.mark.parametrize("layers,prefix,pattern", FOLDS.values(), ids=FOLDS)
def test_layers_fold_into_a_prefix_and_a_pattern(layers, prefix, pattern):
    found = fold(specs(layers))
    assert found == (tuple(specs(prefix)), tuple(specs(pattern)))
    assert list(model_of(*found, len(layers)).layer_specs) == specs(layers)


def test_any_list_folds_into_the_shortest_that_gives_it_back():
    """All lists of two kinds of up to nine layers; no shorter prefix and pattern spells the same letters."""
    for letters in ("".join(word) for n in range(1, 10) for word in itertools.product("AB", repeat=n)):
        layers = specs(letters)
        prefix, pattern = fold(layers)
        assert list(model_of(prefix, pattern, len(layers)).layer_specs) == layers
        for total in range(1, len(prefix) + len(pattern)):
            for start in range(total):
                assert not (letters[:start] + letters[start:total] * 9).startswith(letters), letters


def test_folding_the_deepest_models_is_quick():
    """A list of 200 layers without a period: each kind is compared as a number, not field by field."""
    layers = [LayerSpec(attn=tiny.config().pattern[0].attn, mlp=MlpSpec(ffw=i + 1)) for i in range(200)]
    assert fold(layers) == ((), tuple(layers))


def test_no_layers_have_no_pattern():
    with pytest.raises(ValueError, match="fold needs at least one layer"):
        fold([])


@pytest.mark.fast
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab": 0}, "vocab=0 must be at least 1"),
        ({"context": 0}, "context=0 must be at least 1"),
        ({"vocab_multiple": 0}, "vocab_multiple=0 must be at least 1"),
        ({"norm_eps": -1.0}, "norm_eps=-1.0 must be above 0"),
        ({"logit_softcap": 0.0}, "logit_softcap=0.0 must be above 0"),
        ({"pattern": [{"attn": {"heads": 4, "kv_heads": -2}, "mlp": {"ffw": 8}}]}, "kv_heads=-2 must be at least 1"),
        ({"pattern": [{"attn": {"heads": 4, "kv_heads": 0}, "mlp": {"ffw": 8}}]}, "kv_heads=0 must be at least 1"),
        ({"pattern": [{"attn": {"heads": 4}, "mlp": {"ffw": 0}}]}, "ffw=0 must be at least 1"),
        (
            {
                "pattern": [
                    {"attn": {"heads": 4, "rope": {"scaling": "yarn", "original_context": 0}}, "mlp": {"ffw": 8}}
                ]
            },
            "original_context=0 must be at least 1",
        ),
        (
            {"pattern": [{"attn": {"heads": 4, "rope": {"low_freq_factor": 4.0}}, "mlp": {"ffw": 8}}]},
            "low_freq_factor=4.0 must be below high_freq_factor=4.0",
        ),
    ],
)
def test_sizes_that_cannot_be_are_refused(settings, message):
    whole = {"vocab": 61, "embed": 32, "layers": 2, "pattern": [{"attn": {"heads": 4}, "mlp": {"ffw": 48}}]} | settings
    with pytest.raises(SettingsError, match=message):
        parse(ModelConfig, whole)
