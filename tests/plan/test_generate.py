"""Plans of generation: weights, cache, and what memory and compute allow."""

import json
import re

import plans
import pytest

from jaxllm.chips import CHIPS
from jaxllm.errors import SettingsError
from jaxllm.info import cache_bytes
from jaxllm.plan.bounds import ASSUMED
from jaxllm.plan.generate import Request, compile_generation, make_generation, plan_generation, show
from jaxllm.plan.read import read
from jaxllm.plan.sends import DRAWN, flows
from jaxllm.plan.target import parse_target
from jaxllm.train.estimate.step import abstract_sharding
from jaxllm.train.memory import size


def planned(source, topology, *overrides, compiles=False, **request):
    target = parse_target(topology)
    config = read(source, overrides, devices=target.devices, generates=True).config
    return config, plan_generation(config, target, Request(**request), compiles=compiles)


@pytest.mark.fast
def test_tokens_a_second_are_bound_by_what_is_read():
    config, found = planned("llama3.1-8b", "h100:1", batch=16, context=8192)
    weights, cache = 2 * 8_030_261_248, 16 * 8192 * cache_bytes(config.model, 2)
    kinds = found["memory"]["kinds"]
    assert kinds["parameters"] == weights and kinds["cache"] == pytest.approx(cache, rel=1e-3)
    one = found["decode"]
    seconds = (kinds["parameters"] + kinds["cache"]) / (CHIPS["h100"].hbm_bandwidth * ASSUMED["memory"])
    assert one["bound"] == "memory" and one["seconds"] == pytest.approx(seconds)
    assert one["tokens_per_second"] == pytest.approx(16 / seconds) == 16 * one["tokens_per_second_per_row"]
    assert found["prefill"]["bound"] == "compute"
    assert found["prefill"]["tokens_per_second"] > 10 * one["tokens_per_second"]
    assert "key-value cache" in show(found) and json.dumps(found)


@pytest.mark.fast
def test_fewer_bits_and_more_devices_take_less_room():
    _, plain = planned("llama3.1-8b", "h100:1", batch=16, context=8192)
    _, small = planned("llama3.1-8b", "h100:1", batch=16, context=8192, cache="int8", weights="int8")
    _, split = planned("llama3.1-8b", "h100:8", batch=16, context=8192)
    before, after, part = (x["memory"]["kinds"] for x in (plain, small, split))
    assert 0.5 < after["cache"] / before["cache"] < 0.53, "a scale for each head and position"
    assert 0.5 < after["parameters"] / before["parameters"] < 0.6, "tables stay as they are"
    assert part["parameters"] / before["parameters"] == pytest.approx(1 / 8, rel=0.01)
    assert small["decode"]["tokens_per_second"] > 1.7 * plain["decode"]["tokens_per_second"]


@pytest.mark.fast
def test_of_experts_only_those_are_read_that_a_token_chooses():
    _, few = planned("mixtral-8x7b", "h100:8", batch=1, context=1024)
    _, many = planned("mixtral-8x7b", "h100:8", batch=64, context=1024)
    spent = [(x["decode"]["bounds"]["memory"]["seconds"], x["memory"]["kinds"]) for x in (few, many)]
    speed = CHIPS["h100"].hbm_bandwidth * ASSUMED["memory"]
    shares = [(seconds * speed - kinds["cache"]) / kinds["parameters"] for seconds, kinds in spent]
    assert shares[0] == pytest.approx(12_748_587_008 / 46_702_792_704, abs=0.02) and shares[1] > 0.99


@pytest.mark.fast
def test_what_cannot_be_generated():
    with pytest.raises(SettingsError, match="--context 9999 is more than model.context=512"):
        planned(plans.settings(), "h100:1", batch=1, context=9999)
    with pytest.raises(SettingsError, match="--batch 0"):
        Request(batch=0, context=8)
    _, found = planned("llama3.1-70b", "h100:1", batch=1, context=1024)
    assert not found["memory"]["fits"] and "--weights int4" in found["advice"]
    assert "int8" not in found["advice"], "that would be too large as well"


@pytest.mark.fast
@pytest.mark.parametrize(
    "model, topology, words",
    [
        ("llama3.1-70b", "v6e:2x2", []),
        ("llama3.1-70b", "h100:1", []),
        ("llama3.1-70b", "v6e:2x4", ["parallel.tensor=2"]),
    ],
)
def test_what_does_not_fit_names_the_smallest_slice_that_would_do(model, topology, words):
    request = {"batch": 1, "context": 1024}
    _, found = planned(model, topology, *words, **request)
    where = found["advice"].splitlines()[0].partition("without temporaries: ")[2]
    there, _, changed = where.partition(", with ")
    _, fits = planned(model, there, *words, *filter(None, changed.split(", ")), **request)
    assert not found["memory"]["fits"] and fits["memory"]["fits"]
    half = fits["topology"]["chips"] // 2
    assert 2 * 70.5e9 > half * fits["memory"]["capacity"], "half of the chips could not even hold the weights"


@pytest.mark.fast
@pytest.mark.parametrize(
    "request_, names",
    [
        ({"batch": 64, "context": 8192}, ["--cache", "--batch", "--context"]),
        ({"batch": 96, "context": 8192, "cache": "int8"}, ["--weights", "--batch", "--context"]),
    ],
)
def test_what_does_not_fit_names_fewer_bits_rows_or_tokens_that_do(request_, names):
    _, found = planned("llama3.1-8b", "h100:1", **request_)
    told = re.findall(r"^  (--\w+) (\w+) +saves (.+): (.+) needed$", found["advice"], re.M)
    assert [name for name, *_ in told] == names
    for name, value, saves, leaves in told:
        change = {name[2:]: int(value) if value.isdigit() else value}
        _, there = planned("llama3.1-8b", "h100:1", **request_ | change)
        less = found["memory"]["total"] - there["memory"]["total"]
        assert there["memory"]["fits"] and (size(less), size(there["memory"]["total"])) == (saves, leaves)


@pytest.mark.fast
def test_fewer_bits_are_fewer_than_those_that_are_asked():
    """Codes of 8 bits can be of 4; where these are too large as well, nothing is advised that would not help."""
    request = {"batch": 1, "context": 1024, "weights": "int8"}
    _, found = planned("llama3.1-70b", "h100:1", **request)
    assert re.findall(r"^  (.+?) +saves", found["advice"], re.M) == ["--weights int4"]
    _, none = planned("llama3.1-405b", "h100:1", **request | {"weights": "int4"})
    assert "saves" not in none["advice"] and "nothing of this would do by itself" in none["advice"]


@pytest.mark.fast
def test_what_is_sent_bounds_a_token():
    """By hand: two sums of a row's stream in each layer and one behind the table, at the links' assumed share."""
    rows, embed, layers = 16, 4096, 32
    config, found = planned("llama3.1-8b", "h100:8", batch=rows, context=8192)
    one = found["decode"]
    assert config.parallel.tensor == 8 and one["network_source"] == "formulas" and one["missing"] is None
    sent = 2 * 7 / 8 * rows * ((2 * layers + 1) * embed * 2 + DRAWN * 4)
    assert [(row["kind"], row["axes"]) for row in one["network"]] == [("all-reduce", ["tensor"])]
    assert one["network"][0]["wire_bytes"] == pytest.approx(sent)
    seconds = sent / (CHIPS["h100"].ici * ASSUMED["links"])
    assert one["bounds"]["ici"]["seconds"] == pytest.approx(seconds) and "by formulas" in show(found)
    _, alone = planned("llama3.1-8b", "h100:1", batch=rows, context=8192)
    assert set(alone["decode"]["bounds"]) == {"compute", "memory"} and not alone["decode"]["network"]
    shared = ("parallel.tensor=1", "parallel.fsdp=8", "parallel.data=1")
    _, gathers = planned("llama3.1-8b", "h100:8", *shared, batch=rows, context=8192)
    assert gathers["decode"]["bound"] == "ici", "weights come over the links for each token"
    weights = 7 / 8 * 2 * (8_030_261_248 - 128_256 * embed)
    assert gathers["decode"]["network"][0]["wire_bytes"] == pytest.approx(weights, rel=0.01)


@pytest.mark.fast
def test_where_no_formula_knows_what_is_sent_that_is_said():
    _, experts = planned("mixtral-8x7b", "v6e:2x2", batch=1, context=1024)
    assert "no bound of networks" in show(experts) and experts["decode"]["network_source"] is None
    _, replicas = planned("mixtral-8x7b", "h100:8", "parallel.tensor=1", "parallel.data=8", batch=8, context=1024)
    assert "no bound of networks" not in show(replicas)


SPLIT = [
    ("parallel.data=1", "parallel.fsdp=1", "parallel.tensor=4"),
    ("parallel.data=2", "parallel.fsdp=1", "parallel.tensor=2"),
    ("parallel.fsdp=4",),
    ("parallel.fsdp=2", "parallel.tensor=2"),
]
CASES = [(SPLIT[0], "tied", None), (SPLIT[2], "llama", "int8")]
CASES += [
    pytest.param(*case, marks=pytest.mark.slow) for case in ((SPLIT[1], "gemma", None), (SPLIT[3], "llama", None))
]


@pytest.mark.parametrize("mesh, model, weights", CASES)
def test_bytes_that_are_sent_are_those_of_the_compiled_programs(mesh, model, weights):
    heads = {"heads": 4, "kv_heads": 4}
    pattern = [{"attn": one["attn"] | heads, "mlp": one["mlp"]} for one in plans.MODELS[model]["pattern"]]
    small = plans.settings(
        model, model={**plans.settings(model)["model"], "embed": 256, "layers": 4, "pattern": pattern}
    )
    target, request = parse_target("cpu:4"), Request(8, 128, weights=weights)
    config = read(small, mesh, devices=4, generates=True).config
    shapes = make_generation(config, abstract_sharding(config.parallel, 4), request)
    for phase, compiled in compile_generation(config, target, request).items():
        width = 128 if phase == "prefill" else 1
        told = sum(row.wire_bytes for row in flows(shapes.model, 8, width, phase, "cpu"))
        sent = sum(row.wire_bytes for row in compiled.program.collectives)
        assert told == pytest.approx(sent, rel=0.05), phase


def test_the_programs_are_those_that_generate():
    """The loop that makes tokens holds weights and cache as its arguments, and a token costs its products."""
    overrides = ("parallel.data=2", "parallel.fsdp=1", "parallel.tensor=2", "model.layers=2")
    config, found = planned(plans.settings(), "cpu:4", *overrides, compiles=True, batch=4, context=128)
    assert found["memory"]["source"] == "the compiled programs" and found["memory"]["fits"]
    assert set(found["compiled"]) == {"decode", "prefill"} and all(one["fits"] for one in found["compiled"].values())
    kinds = found["memory"]["kinds"]
    assert kinds["temporaries"] > 0 and found["decode"] is None
    assert kinds["cache"] == pytest.approx(cache_bytes(config.model, 4) * 4 * 128 / 4, rel=0.05)
    assert "memory of a device, by the compiled programs" in show(found)
