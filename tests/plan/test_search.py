"""The search: what it tries, how it ranks, what it compiles, and why the others do not fit."""

import json

import plans
import pytest

from jaxllm.errors import ResourceError, SettingsError
from jaxllm.plan import search as search_module
from jaxllm.plan.compiled import memory_of
from jaxllm.plan.search import candidates, meshes, search, show
from jaxllm.plan.target import parse_target
from jaxllm.train.estimate.step import describe


@pytest.fixture(scope="module")
def found():
    target = parse_target("v6e:4x4")
    return search(plans.run("llama3.1-8b", "train.batch=32", devices=16), target, compiles=0)


@pytest.mark.fast
def test_those_that_fit_are_ranked_and_the_others_have_a_reason(found):
    capacity = memory_of(parse_target("v6e:4x4"))
    ranked, refused = found["ranked"], found["refused"]
    assert len(ranked) + len(refused) == found["candidates"] > 100
    assert all(row["memory"] <= capacity and row["refused"] is None for row in ranked)
    assert all(row["refused"] for row in refused) and all(row["memory"] > capacity for row in refused if row["memory"])
    seconds = [float(f"{row['seconds']:.3g}") for row in ranked]
    assert seconds == sorted(seconds)
    needs = next(row["refused"] for row in refused if row["memory"])
    assert needs.startswith("needs ") and "GiB of 31.2 GiB (" in needs
    text = show(found)
    assert "formulas" in text and " ".join(ranked[0]["overrides"]) in text and "the others do not fit" in text
    json.dumps(found)


@pytest.mark.fast
def test_meshes_remat_microbatches_and_dtypes_are_tried(found):
    tried = {text for row in found["ranked"] + found["refused"] for text in row["overrides"]}
    for text in ("parallel.fsdp=16", "parallel.data=4", "parallel.tensor=2", "model.remat=full", "model.remat=none"):
        assert text in tried
    assert {"model.dtype=float32", "model.dtype=bfloat16", "train.accumulate=2"} <= tried
    assert "parallel.context=2" not in tried, "32 rows keep 16 devices busy"


@pytest.mark.fast
def test_settings_of_a_row_give_its_plan(found):
    row, target = found["ranked"][len(found["ranked"]) // 2], parse_target("v6e:4x4")
    step = describe(plans.run("llama3.1-8b", "train.batch=32", *row["overrides"], devices=16), 16)
    assert search_module.judged(step, target).held.total == pytest.approx(row["memory"])


@pytest.mark.fast
def test_rows_are_split_where_there_are_fewer_than_devices_and_experts_where_there_are_any():
    target = parse_target("v5p:4x4x4")
    few = list(meshes(plans.run("llama3.1-8b", "train.batch=8", devices=64), target))
    assert {one.context for one in few} >= {8, 16}
    experts = {one.expert for one in meshes(plans.run("mixtral-8x7b", devices=64), target)}
    assert experts == {1, 2, 4, 8}
    for one in few:
        assert one.data * one.fsdp * one.expert * one.context * one.tensor == 64


@pytest.mark.fast
def test_slices_are_replicas():
    target = parse_target("v5p:2x2x2", 2)
    found = list(candidates(plans.run("llama3.1-8b", "train.batch=32", devices=16), target))
    assert {one.config.parallel.data % 2 for one in found if one.refused is None} == {0}


@pytest.mark.fast
def test_the_best_are_compiled_and_ranked_by_that(monkeypatch):
    """The first one turns out not to fit, the second to be slower than its estimate: it still stands first."""
    asked, target = [], parse_target("v6e:4x4")
    config = plans.run("llama3.1-8b", "train.batch=32", devices=16)

    def stand_in(config, target, **_):
        asked.append(config)
        speed = {"mfu": 0.1, "tokens_per_second": 1.0, "tokens_per_second_per_chip": 1 / 16}
        fits = len(asked) > 1
        made = {"memory": {"total": 1.0, "fits": fits}, "step": {"seconds": 1e6, "bound": "compute"}, "speed": speed}
        return made | ({} if fits else {"advice": "too large"})

    monkeypatch.setattr(search_module, "plan", stand_in)
    found, plain = search(config, target, compiles=2), search(config, target, compiles=0)
    best = [row["overrides"] for row in plain["ranked"][:2]]
    assert len(asked) == 2 and found["ranked"][0]["overrides"] == best[1] and found["ranked"][0]["seconds"] == 1e6
    assert found["refused"][0]["overrides"] == best[0] and found["refused"][0]["refused"] == "too large"
    assert all(row["compiled"] is None for row in found["ranked"][1:])


@pytest.mark.fast
def test_where_nothing_fits_the_smallest_slice_is_named():
    target = parse_target("v6e:2x2")
    with pytest.raises(
        ResourceError, match=r"v6e:2x2: none of .* candidates fits; .* needs .*would do, by formulas: v6e:"
    ):
        search(plans.run("llama3.1-70b", devices=4), target, compiles=0)
    with pytest.raises(SettingsError, match="no speed of cpu:8 is known"):
        search(plans.run("llama"), parse_target("cpu:8"))


@pytest.mark.fast
def test_what_is_named_stays(found):
    words = ["parallel={tensor: 2}", "model.remat=qkv", "train.accumulate=2", "model.dtype=bfloat16", "train.batch=64"]
    config, target = plans.run("llama3.1-8b", *words, devices=16), parse_target("v6e:4x4")
    kept = search(config, target, compiles=0, overrides=words, assumed=("train.seq_len=8192", "model.remat=full"))
    rows = kept["ranked"] + kept["refused"]
    assert 0 < kept["candidates"] == len(rows) < found["candidates"]
    assert all({"parallel.tensor=2", *words[1:4]} <= set(row["overrides"]) for row in rows)
    assert len({tuple(row["overrides"][:-4]) for row in rows}) > 2, "what is not named is tried"
    text = show(kept)
    assert "assumed: train.seq_len=8192\n" in text and "kept as they were named: model.dtype, model.remat, par" in text


@pytest.mark.fast
def test_axes_that_are_named_and_what_is_left():
    config, target = (
        plans.run("llama3.1-8b", "parallel.tensor=16", "train.batch=64", devices=64),
        parse_target("v5p:4x4x4"),
    )
    assert {one.tensor for one in meshes(config, target, frozenset(["parallel.tensor"]))} == {16}
    config = plans.run("llama3.1-8b", "parallel.fsdp=-1", "train.batch=64", devices=64)
    assert list(meshes(config, target, frozenset(["parallel.fsdp"]))) == list(meshes(config, target))
    words = ["parallel.tensor=3"]
    with pytest.raises(SettingsError, match="no mesh of v5p:4x4x4's 64 devices has parallel.tensor=3"):
        search(plans.run("llama3.1-8b", *words, devices=64), target, overrides=words)


@pytest.mark.fast
def test_where_the_compiler_refuses_all_its_reasons_are_raised(monkeypatch):
    words = ["parallel.fsdp=16", "model.remat=full", "train.accumulate=1", "model.dtype=bfloat16", "train.batch=32"]
    config, target = plans.run("llama3.1-8b", *words, devices=16), parse_target("v6e:4x4")
    refused = {"memory": {"total": 1.0, "fits": False}, "advice": "a device needs 40 GiB"}
    monkeypatch.setattr(search_module, "plan", lambda *_, **options: refused)
    with pytest.raises(ResourceError, match="the compiler refuses all that fit.*remat=full.*a device needs 40 GiB"):
        search(config, target, overrides=words)
