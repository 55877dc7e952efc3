"""Whole plans: what they hold, that it adds up, and what is said of those that cannot be."""

import dataclasses
import importlib.util
import json
import shlex

import jax
import jsonschema
import plans
import pytest

from jaxllm import cli
from jaxllm.chips import CHIPS
from jaxllm.errors import MissingExtra, ResourceError, SettingsError
from jaxllm.plan import plan as plan_module
from jaxllm.plan.bounds import ASSUMED
from jaxllm.plan.fits import check_fits, smallest_slice
from jaxllm.plan.plan import plan
from jaxllm.plan.prices import Prices, read_prices
from jaxllm.plan.show import chart, show
from jaxllm.plan.target import parse_target
from jaxllm.plan.traffic import bandwidth, flows_of
from jaxllm.train.estimate import step as estimated
from jaxllm.train.estimate.held import divided, held_by, most_of
from jaxllm.train.estimate.step import varied

NUMBER, TEXT = {"type": "number"}, {"type": "string"}
MAYBE = {"type": ["number", "null"]}


def holds(required: dict, **more) -> dict:
    return {"type": "object", "properties": required, "required": list(required), "additionalProperties": False} | more


KINDS = ("parameters", "optimizer", "batch", "gradients", "activations", "logits", "gathered", "temporaries")
BOUND = holds({"seconds": NUMBER, "how": TEXT})
RULE = {"rule": NUMBER, "exact": NUMBER}
#: What `--json` prints: keys are named, and no others may be there.
SCHEMA = holds(
    {
        "topology": holds({"name": TEXT, "chips": NUMBER, "devices": NUMBER, "slices": NUMBER}),
        "mesh": {"type": "object", "additionalProperties": {"type": "integer"}},
        "run": holds(
            {name: TEXT for name in ("stage", "dtype", "optimizer", "method")}
            | {name: NUMBER for name in ("rows", "seq_len", "tokens", "accumulate")}
            | {"remat": {"type": ["string", "array"]}, "changes": {"type": "array"}, "assumed": {"type": "array"}}
        ),
        "parameters": holds({name: NUMBER for name in ("total", "active", "trained")}),
        "memory": holds(
            {
                "kinds": holds({kind: NUMBER for kind in KINDS}),
                "most": holds({kind: NUMBER for kind in KINDS}),
                "total": NUMBER,
                "capacity": NUMBER,
                "capacity_how": {"type": ["string", "null"]},
                "fits": {"type": "boolean"},
                "source": TEXT,
                "moment": {"enum": ["loss", "layer", "embedding"]},
                "logits_of_a_chunk": NUMBER,
                "estimate": holds({"total": NUMBER, "kinds": {"type": "object"}, "error": MAYBE}),
                "compiled": {"type": ["object", "null"]},
            }
        ),
        "flops": holds(
            {
                "model": NUMBER,
                "executed": NUMBER,
                "source": TEXT,
                "analytic": {"type": "object"},
                "error": MAYBE,
                "by_dtype": {"type": ["object", "null"]},
            }
        ),
        "network": {
            "type": "array",
            "items": holds(
                {"kind": TEXT, "axes": {"type": "array"}, "network": {"enum": ["ici", "dcn"]}, "group": NUMBER}
                | {"wire_bytes": NUMBER, "overlapped_bytes": MAYBE, "exposed_bytes": MAYBE, "count": MAYBE}
                | {"seconds": MAYBE}
            ),
        },
        "compiled": {"type": ["object", "null"]},
        "bounds": {"type": ["object", "null"], "additionalProperties": BOUND},
        "step": {"type": ["object", "null"]},
        "speed": {"type": ["object", "null"]},
        "assumptions": {"type": "array"},
        "training": holds(
            {
                "tokens": NUMBER,
                "steps": NUMBER,
                "how": {"type": ["string", "null"]},
                "days": MAYBE,
                "chip_hours": MAYBE,
                "money": {},
            }
        ),
        "formulas": holds(
            {"6ND": holds(RULE), "6ND_active": holds(RULE), "chinchilla": holds(RULE)}
            | {"memory": holds(RULE | {"bytes": NUMBER})}
        ),
    }
)


def planned(source="llama3.1-8b", topology="h100:8x4", *overrides, slices=1, **options):
    target = parse_target(topology, slices)
    return plan(plans.run(source, *overrides, devices=target.devices), target, **options)


@pytest.mark.fast
def test_a_plan_by_formulas_adds_up():
    found = planned(tokens=15e12, prices=(Prices(date="2026-11-27", chip_hour={"h100": 2.0}), "mine.yaml"))
    jsonschema.validate(json.loads(json.dumps(found)), SCHEMA)
    memory, step, speed = found["memory"], found["step"], found["speed"]
    assert sum(memory["kinds"].values()) == pytest.approx(memory["total"]) and memory["fits"]
    assert memory["kinds"]["parameters"] == pytest.approx(4 * 8_030_261_248 / 32, rel=1e-3)
    assert memory["kinds"]["optimizer"] == pytest.approx(2 * memory["kinds"]["parameters"], rel=1e-3)
    bounds = {name: bound["seconds"] for name, bound in found["bounds"].items()}
    assert step["seconds"] == max(bounds.values()) == bounds[step["bound"]]
    assert speed["tokens_per_second"] == pytest.approx(found["run"]["tokens"] / step["seconds"])
    assert speed["mfu"] == pytest.approx(found["flops"]["model"] / step["seconds"] / CHIPS["h100"].bf16)
    training = found["training"]
    assert training["days"] * 86400 == pytest.approx(15e12 / speed["tokens_per_second"], rel=1e-6)
    assert training["chip_hours"] == pytest.approx(training["days"] * 24 * 32)
    assert training["money"]["total"] == pytest.approx(2 * training["chip_hours"])
    rules = found["formulas"]
    assert rules["6ND"]["rule"] == 6 * 8_030_261_248 * found["run"]["tokens"]
    assert rules["chinchilla"]["rule"] == 20 * 8_030_261_248


@pytest.mark.fast
def test_a_gpu_has_what_jax_takes_of_its_memory():
    found = planned("llama", "h100:8")
    assert found["memory"]["capacity"] == pytest.approx(0.75 * CHIPS["h100"].hbm)
    assert "of 59.7 GiB" in show(found) and "jax takes 75% of a GPU's memory" in show(found)
    tpu = planned("llama", "v6e:2x4", compiles=False)
    assert tpu["memory"]["capacity"] == CHIPS["v6e"].hbm and tpu["memory"]["capacity_how"] is None


@pytest.mark.fast
def test_stages_are_summed():
    """10,000 steps of 64 x 512 and 100 of 512 x 512: the larger step is planned, and few steps are that large."""
    stages = [{"name": "short", "steps": 10_000, "batch": 64}, {"name": "wide", "steps": 100, "batch": 512}]
    config, target = plans.run("llama", train={"seq_len": 512, "batch": 64, "stages": stages}), parse_target("h100:8")
    found = plan(config, target)
    training, tokens = found["training"], 10_000 * 64 * 512 + 100 * 512 * 512
    assert (training["tokens"], training["steps"]) == (tokens, 10_100) and found["run"]["tokens"] == 512 * 512
    assert training["days"] * 86400 == pytest.approx(tokens / found["speed"]["tokens_per_second"])
    assert "tokens summed over 2 stages, each as fast a token as stage wide" in show(found)
    assert plan(config, target, tokens=1e9)["training"]["how"] == "all steps as in stage wide"
    assert planned("llama", "h100:8")["training"]["how"] is None


@pytest.mark.fast
def test_what_a_person_reads():
    text = show(planned(tokens=1e12, prices=read_prices(None)))
    for words in (
        "8,030,261,248 parameters",
        "memory of a device",
        "at the peak     at most",
        "optimizer state",
        "gradients",
        "logits, head",
        "all-gather",
        "MFU",
        "chip-hours",
    ):
        assert words in text
    assert "no price of this chip in configs/prices.yaml" in text
    assert "C = 6ND" in text and "Chinchilla" in text and "x 4 bytes x 1.2" in text
    for name, share in ASSUMED.items():
        assert name == "products" and "75% of the peak" in text or f"{share:.0%}" in text


def test_the_plan_of_cpu_devices_is_of_the_compiled_step(tmp_path):
    found = planned("llama", "cpu:8", "parallel.fsdp=8")
    jsonschema.validate(json.loads(json.dumps(found)), SCHEMA)
    assert found["memory"]["source"] == found["flops"]["source"] == "the compiled program"
    assert sum(found["memory"]["kinds"].values()) == pytest.approx(found["memory"]["total"])
    assert abs(found["memory"]["estimate"]["error"]) < 0.15 and abs(found["flops"]["error"]) < 0.02
    assert found["step"] is None and "no speed of these devices is known" in show(found)
    assert {row["kind"] for row in found["network"]} >= {"all-gather", "reduce-scatter"}
    chart(found, str(tmp_path / "plan.png"))
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.fast
def test_kinds_of_a_compiled_program_sum_up_to_it():
    step, target = plans.described("llama3.1-8b", "h100:8x4")
    held = held_by(step, "gpu")
    for total in (0.5 * held.total, held.total, 2 * held.total):
        kinds, most = divided(held, total), most_of(held, divided(held, total))
        assert sum(kinds.values()) == pytest.approx(max(total, held.parameters + held.optimizer + held.batch))
        assert kinds["parameters"] == held.parameters and min(kinds.values()) >= 0
        assert all(kinds[kind] <= most[kind] <= max(total, kinds[kind]) for kind in kinds)


@pytest.mark.fast
def test_what_does_not_fit_names_the_smallest_slice_that_would_do():
    overrides, target = ["parallel.fsdp=-1", "train.batch=64"], parse_target("v5p:2x2x1")
    config = plans.run("llama2-70b", *overrides, devices=4)
    found = plan(config, target, compiles=False)
    assert not found["memory"]["fits"]
    where, more = smallest_slice(config, target)
    assert found["advice"].startswith("v5p:2x2x1: a device needs ")
    assert f"the smallest slice that would do, by formulas: {where}{more}" in found["advice"]
    with pytest.raises(ResourceError, match="has 95.7 GiB .*optimizer"):
        check_fits(found)
    there = parse_target(where)
    changes = [text.strip() for text in more.replace("with", "").split(",") if "=" in text]
    fits = plan(plans.run("llama2-70b", *overrides, *changes, devices=there.devices), there, compiles=False)
    assert fits["memory"]["fits"] and there.chips > target.chips
    for smaller in ("v5p:2x2x2", "v5p:2x2x4", "v5p:2x4x4", "v5p:4x4x4"):
        if parse_target(smaller).chips < there.chips:
            assert not plan(config, parse_target(smaller), compiles=False)["memory"]["fits"]


@pytest.mark.fast
@pytest.mark.parametrize(
    "model, topology, words",
    [
        ("llama3.1-8b", "v6e:2x4", ["train.batch=64"]),
        ("llama3.1-8b", "h100:8", ["train.batch=8", "parallel.data=8", "parallel.fsdp=1"]),
        ("mixtral-8x7b", "v5p:2x2x2", ["parallel.data=2", "parallel.fsdp=4"]),
        ("llama3.1-70b", "h100:8", ["train.init=absent"]),
        ("llama3.1-70b", "v5p:2x2x1", ["train.batch=64", "train.ema=0.99"]),
    ],
)
def test_what_does_not_fit_names_settings_that_do_with_the_saving_of_each(model, topology, words):
    target = parse_target(topology)
    found = planned(model, topology, *words, compiles=False)
    total, capacity = found["memory"]["total"], found["memory"]["capacity"]
    assert found["ways"] and json.dumps(found)
    for way in found["ways"]:
        need, told = total, list(words)
        for one in way:
            told += one["overrides"]
            assert shlex.join(one["overrides"]) + "  " in found["advice"]
            there = planned(model, topology, *told, compiles=False)["memory"]
            assert one["saves"] == pytest.approx(need - there["total"]) and one["total"] == pytest.approx(
                there["total"]
            )
            need = there["total"]
        assert there["fits"] and need <= capacity, target.name


@pytest.mark.fast
def test_other_axes_are_kept_where_that_will_do_and_all_that_changes_is_printed():
    words = ["train.batch=8", "train.accumulate=8", "parallel.fsdp=1", "parallel.tensor=8"]
    config, target = plans.run("llama3.1-70b", *words, devices=8), parse_target("v6e:2x4")
    where, more = smallest_slice(config, target)
    assert (where, more) == ("v6e:8x8", ", with parallel.fsdp=-1, train.accumulate=1")


@pytest.mark.fast
@pytest.mark.parametrize(
    "model, topology, words",
    [
        ("llama3.1-70b", "v6e:2x4", ["train.batch=8", "parallel.tensor=2", "train.accumulate=4"]),
        ("llama3.1-70b", "h100:8", ["train.batch=16", "parallel.tensor=2", "parallel.fsdp=4", "train.accumulate=2"]),
        ("mixtral-8x7b", "v5e:2x4", ["train.batch=64", "parallel.fsdp=1", "parallel.expert=8", "model.remat=none"]),
    ],
)
def test_the_printed_settings_are_the_plan_that_was_found_to_fit(model, topology, words):
    config, target = plans.run(model, *words, devices=8), parse_target(topology)
    where, more = smallest_slice(config, target)
    there = parse_target(where)
    found = plan(plans.run(model, *words, *more[7:].split(", "), devices=there.devices), there, compiles=False)
    assert found["memory"]["fits"] and more.startswith(", with ")


@pytest.mark.fast
def test_more_rows_are_offered_where_a_run_has_too_few_for_enough_devices():
    found = planned("llama3.1-70b", "v6e:2x4", "train.batch=8", compiles=False)
    assert "train.batch=" in found["advice"] and "v6e:" in found["advice"].partition("would do")[2]


@pytest.mark.fast
def test_of_cpu_devices_no_slice_is_spoken_of():
    advice = planned("llama3.1-70b", "cpu:8", "train.batch=1024", compiles=False)["advice"]
    assert "devices of this CPU share its memory" in advice and "slice" not in advice
    assert "lower train.batch" not in advice and "no other settings would make it fit" in advice


@pytest.mark.fast
def test_steps_that_skip_spikes_keep_what_the_run_keeps(monkeypatch):
    plain, _ = plans.described("llama", "cpu:8")
    step, _ = plans.described("llama", "cpu:8", "train.skip_spikes=6")
    assert set(step.state.extra) - set(plain.state.extra) == {"spikes"}
    seen = {}
    made = lambda *_, **options: seen.update(options) or jax.jit(lambda *_: 0)  # noqa: E731
    monkeypatch.setattr(estimated, "make_train_step", made)
    step.lower()
    assert seen["skip_spikes"] == 6


@pytest.mark.fast
def test_what_a_run_does_already_is_not_advised():
    words = "train.batch=1", "parallel.fsdp=1", "parallel.tensor=4"
    plain = planned("llama3.1-405b", "v5e:2x2", *words, compiles=False)["advice"]
    less = planned("llama3.1-405b", "v5e:2x2", *words, "optim.name=adafactor", compiles=False)["advice"]
    assert all("choose chips with more memory, or train adapters" in advice for advice in (plain, less))
    assert ", or set optim.name=adafactor" in plain and "adafactor" not in less


@pytest.mark.fast
def test_every_stage_has_rows_for_the_devices_as_in_a_run():
    stages = "train.steps=null", "train.stages=[{name: long, steps: 5}, {name: short, steps: 5, batch: %d}]"
    with pytest.raises(SettingsError, match=r"batch 4 / accumulate 1\) do not divide over 8"):
        planned("llama", "cpu:8", stages[0], stages[1] % 4, compiles=False)
    step, _ = plans.described("llama", "cpu:8", stages[0], stages[1] % 8)
    train = dataclasses.replace(step.config.train, accumulate=2)  # of 16 rows that would do
    with pytest.raises(SettingsError, match="batch 8 / accumulate 2"):
        varied(step, dataclasses.replace(step.config, train=train))


@pytest.mark.fast
def test_what_is_far_too_large_is_not_compiled(monkeypatch):
    monkeypatch.setattr(plan_module, "compile_step", lambda *_: pytest.fail("compiled"))
    found = planned("llama2-70b", "v5p:2x2x1", "train.batch=64")
    assert found["memory"]["source"] == "formulas" and not found["memory"]["fits"]


@pytest.mark.fast
@pytest.mark.parametrize(
    "topology, overrides, says",
    [
        ("v5p:4x4x4", ["parallel.fsdp=8"], "has 8 of the 64 devices, and 56 would be wasted; set parallel.fsdp=-1"),
        ("v5p:4x4x4", ["parallel.fsdp=128"], "does not fit 64 devices"),
        ("h100:8", ["kernels.attention=splash"], "kernels.attention=splash is for TPU, and this plan is for GPU"),
        ("v6e:2x4", ["kernels.attention=cudnn"], "kernels.attention=cudnn is for GPU, and this plan is for TPU"),
        ("v5p:4x4x4", ["train.batch=32"], "rows in a microbatch .* do not divide over 64"),
        ("v5p:4x4x4", ["parallel.tensor=16", "parallel.fsdp=4"], "kv_heads=8 does not divide over tensor=16"),
    ],
)
def test_what_cannot_be_is_one_clear_error(topology, overrides, says):
    with pytest.raises(SettingsError, match=says):
        planned("llama3.1-8b", topology, *overrides)


@pytest.mark.fast
@pytest.mark.parametrize(
    "topology, slices, says",
    [
        ("v5p:4x4x5", 1, "did you mean v5p:4x4x4?"),
        ("cpu:8", 2, "would be ignored: CPU devices are one slice"),
        ("h100:8x2", 2, "write all nodes into the shape, h100:8x4"),
        ("v5p:4x4x4", 0, "must be at least 1"),
    ],
)
def test_what_there_is_not(topology, slices, says):
    with pytest.raises(SettingsError) as error:
        parse_target(topology, slices)
    assert says in str(error.value)


@pytest.mark.fast
@pytest.mark.parametrize(
    "words, says",
    [
        (("--tokens", "nan"), "--tokens nan: must be above 0"),
        (("--tokens", "inf"), "--tokens inf: must be above 0"),
        (("--chart", "/nowhere/x.png"), "--chart /nowhere/x.png: there is no folder /nowhere"),
        (("--chart", "."), "--chart .: that is a folder"),
        (("--generate", "--batch", "0"), "--batch 0, --context 131072: at least 1 row"),
        (("--generate", "--context", "0"), "--batch 1, --context 0: at least 1 row, of at least 2 tokens"),
        (("--topology", "cpu"), "topology cpu: write how many devices of this machine's CPU, such as cpu:8"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_compiled(capsys, words, says):
    with plans.environment():
        code = cli.main(["plan", "llama3.1-8b", "--topology", "v6e:2x4", *words])
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and says in err and err.count("\n") == 1


@pytest.mark.fast
def test_a_missing_libtpu_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'jaxllm\[plan\]'"):
        planned("llama", "v5e:2x4", "train.batch=16")


@pytest.mark.fast
def test_replicas_are_split_over_slices():
    with pytest.raises(SettingsError, match="parallel.data=1 does not divide over 4 slices; use a multiple of 4"):
        planned("llama3.1-8b", "v5p:4x4x4", slices=4, compiles=False)
    found = planned("llama3.1-8b", "v5p:4x4x4", "parallel.data=4", slices=4, compiles=False)
    (slow,) = [row for row in found["network"] if row["network"] == "dcn"]
    # Every device sums its 64th of the float32 gradient over four slices, as a ring does.
    assert slow["wire_bytes"] == pytest.approx(2 * 3 / 4 * 4 * 8_030_261_248 / 64, rel=0.01)
    assert found["bounds"]["dcn"]["seconds"] == pytest.approx(slow["wire_bytes"] / 6.25e9 / ASSUMED["links"])


@pytest.mark.fast
def test_a_sum_over_slices_is_scattered_within_each_first():
    """Four replicas in two slices: each device sends half of the gradient it holds to its slice, and half across."""
    step, target = plans.described("llama3.1-8b", "v5e:2x2", "parallel.data=4", "train.batch=8", slices=2)
    parts = {(flow.kind, flow.network): flow for flow in flows_of(step, "tpu", 2) if flow.axes == ("data",)}
    gradient = 4 * 8_030_261_248 / 2
    assert set(parts) == {("reduce-scatter", "ici"), ("all-reduce", "dcn"), ("all-gather", "ici")}
    for flow in parts.values():
        assert flow.wire_bytes == pytest.approx(gradient / 2, rel=0.01) and flow.group == 2


@pytest.mark.fast
def test_links_by_the_torus_and_the_node():
    """Of v5p's six links a line of four has two, a plane four, a cube all; a slice without rings half of them."""
    cube, small = parse_target("v5p:4x4x8"), parse_target("v5p:2x2x2")
    sizes = {"data": 1, "fsdp": 128, "expert": 1, "context": 1, "tensor": 1}
    speeds = [bandwidth(cube, ("fsdp",), sizes, group, "ici") for group in (4, 16, 32, 128)]
    assert speeds == [200e9, 400e9, 400e9, 600e9]
    assert bandwidth(small, ("fsdp",), sizes, 8, "ici") == 300e9
    gpus = parse_target("h100:8x4")
    inside, across = {"data": 4, "tensor": 8}, {"data": 1, "fsdp": 32}
    assert bandwidth(gpus, ("tensor",), inside, 8, "ici") == 450e9
    assert bandwidth(gpus, ("data",), inside, 4, "ici") == 50e9
    assert bandwidth(gpus, ("fsdp",), across, 32, "ici") == 400e9


@pytest.mark.fast
def test_traffic_by_hand():
    """ZeRO stage 3 of 8 devices: bfloat16 weights twice, their gradients once, the embedding's in float32."""
    step, target = plans.described("llama2-7b", "v5p:2x2x2")
    flows = {(flow.kind, flow.axes): flow.wire_bytes for flow in flows_of(step, "tpu")}
    layers, table = 6_738_415_616 - 2 * 32000 * 4096 - 4096, 32000 * 4096
    assert flows["all-gather", ("fsdp",)] == pytest.approx(7 / 8 * 2 * (2 * layers + 2 * table), rel=1e-3)
    assert flows["reduce-scatter", ("fsdp",)] == pytest.approx(7 / 8 * (2 * layers + (2 + 4) * table), rel=1e-3)


@pytest.mark.fast
def test_prices_are_the_users_own(tmp_path):
    prices, file = read_prices(None)
    assert file == "configs/prices.yaml" and set(prices.chip_hour) == set(CHIPS)
    assert not any(prices.chip_hour.values()), "no price comes with jaxllm"
    mine = tmp_path / "mine.yaml"
    mine.write_text("date: 2026-11-27\nchip_hour: {v5p: 4.2}\n")
    assert read_prices(str(mine))[0].chip_hour == {"v5p": 4.2}
    for text, says in (
        ("chip_hour: {v5p: 4.2}", "date: say when"),
        ("date: 2026-11-27\nchip_hour: {v5q: 4.2}", "unknown chip 'v5q'; did you mean v5p?"),
        ("date: 2026-11-27\nchip_hour: {v5p: -1}", "greater than 0"),
        ("curency: EUR", "did you mean currency?"),
    ):
        mine.write_text(text)
        with pytest.raises(SettingsError) as error:
            read_prices(str(mine))
        assert says in str(error.value)
    with pytest.raises(SettingsError, match="no such file"):
        read_prices(str(tmp_path / "none.yaml"))
