"""Which weights are quantised how, and settings that would be ignored."""

import pytest
import tiny

from jaxllm.adapt.changes import Change, after
from jaxllm.adapt.lora import LoraConfig
from jaxllm.adapt.quantize import LAYERS, QuantizeConfig, check_group, quantize_plan, rules_by_path
from jaxllm.config import parse, to_dict
from jaxllm.errors import SettingsError
from jaxllm.model.change import forms, weights_of
from jaxllm.weights.form import Form
from jaxllm.weights.quantized import Quantized

MODEL = tiny.one_device(tiny.MOE)


def config_of(*rules, **options):
    return parse(QuantizeConfig, {"rules": list(rules), **options}, "quantize")


def test_the_first_rule_that_chooses_a_weight_decides():
    config = config_of(
        {"pattern": "**/down", "format": "float"},
        {"pattern": "**/mlp/*", "format": "int8"},
        {"format": "nf4", "group": 8},
    )
    assert parse(QuantizeConfig, to_dict(config)) == config
    found = {path: rule.format for path, rule in rules_by_path(MODEL, config).items()}
    for path, form in forms(MODEL).items():
        expected = None
        if form is not None and path not in ("embed", "head") and not path.endswith("/down"):
            expected = "int8" if "/mlp/" in path else "nf4"
        assert found.get(path) == expected, path
    assert LAYERS == "prefix/**,layers/**,suffix/**" and "layers/0/moe/router" not in found
    weights = weights_of(after(MODEL, (Change(quantize=config),)).abstract)
    assert {path: w.format for path, w in weights.items() if isinstance(w, Quantized)} == found


@pytest.mark.parametrize(
    "rule, options, says",
    [
        ({"format": "int3"}, {}, "rules.0: unknown format 'int3'; did you mean int"),
        ({"format": "int8", "group": 0}, {}, "group=0 must be at least 1"),
        ({"format": "int8", "method": "gtpq"}, {}, "method='gtpq': input should be 'nearest', 'gptq' or 'awq'"),
        (
            {"format": "int8", "ordered": True},
            {},
            "ordered=true is for method=gptq, and method=nearest would ignore it",
        ),
        ({"format": "float", "method": "awq"}, {}, "format=float leaves weights as they are"),
        ({"format": "nf4", "symmetric": False}, {}, "symmetric=false is for int8 and int4"),
        ({"format": "fp8"}, {"activations": "int8"}, "activations=int8 needs symmetric integers, not fp8"),
        ({"format": "int8"}, {"activations": "int4"}, "activations='int4': int8 or null"),
    ],
)
def test_settings_that_cannot_be(rule, options, says):
    with pytest.raises(SettingsError, match=says):
        config_of(rule, **options)


def test_groups_divide_the_inputs_and_fill_whole_bytes():
    def group(inputs, **rule):
        (rule,) = config_of(rule).rules
        return check_group("layers/0/mlp/up", Form("io", (inputs, 8)), rule)

    assert [group(640, format=name) for name in ("int8", "int4", "nf4", "int2", "fp8")] == [640, 64, 64, 32, 640]
    assert group(640, format="int8", group=128) == 128
    for inputs, rule, fits in (
        (640, dict(format="int4", group=100), "16, 32, 64, 128"),
        (96, dict(format="int4"), "16, 32"),
        (10, dict(format="int4", group=5), "2, 10"),
        (12, dict(format="int2", group=3), "4, 12"),
    ):
        with pytest.raises(SettingsError, match=rf"layers/0/mlp/up: group=.* its {inputs} inputs; .*: {fits}$"):
            group(inputs, **rule)


def test_weights_that_are_something_else_already():
    eight = Change(quantize=config_of({"pattern": "**/moe/up", "format": "int8"}))
    with pytest.raises(SettingsError, match=r"layers/0/moe/up is quantised already \(int8\); quantise the model"):
        quantize_plan(after(MODEL, (eight,)), eight.quantize)
    quantize_plan(after(MODEL, (eight,)), config_of({"pattern": "**/moe/down", "format": "int8"}))
    adapted = after(MODEL, (Change(lora=LoraConfig(pattern="**/attn/q", rank=2)),))
    with pytest.raises(SettingsError, match="layers/0/attn/q has an adapter; merge it first"):
        quantize_plan(adapted, config_of({"pattern": "layers/0/attn/q", "format": "int8"}))
