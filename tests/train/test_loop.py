"""Whole runs: the folder they leave, exact resumption, stages, early stopping, what stops them."""

import dataclasses
import json
import math
import shutil

import jax
import numpy as np
import pytest
import small

from jaxllm import api, checkpoint, tree
from jaxllm.checkpoint import Checkpoints
from jaxllm.config import parse
from jaxllm.errors import CheckpointError, SettingsError, UserError
from jaxllm.model.build import build
from jaxllm.sharding import ParallelConfig, make_sharding
from jaxllm.train import loop
from jaxllm.train.config import RunConfig
from jaxllm.train.evaluate import Evaluator
from jaxllm.train.init import first_weights, origin_of
from jaxllm.train.load import load_run
from jaxllm.train.writers import JsonlWriter


def train(*args, **changes):
    return api.train(small.settings(*args, **changes), quiet=True)


def steps_of(out):
    """Names in the folder of checkpoints."""
    return sorted(path.name for path in (out / "checkpoints").iterdir() if path.name != ".lock")


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_its_folder(finished):
    out = finished.folder
    assert finished.status == "finished" and finished.saved
    assert {path.name for path in out.iterdir()} == {
        "settings.yaml", "metrics.jsonl", "checkpoints", "loss.png", "card.md", "summary.json", "tokenizer", ".lock"
    }  # fmt: skip
    steps = [row for row in rows(out) if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 9))
    assert steps[-1]["loss"] < steps[0]["loss"] - 1
    assert [row["tokens"] for row in steps] == [256 * n for n in range(1, 9)]
    heldout = [row for row in rows(out) if "heldout_loss" in row]
    assert [row["step"] for row in heldout] == [4, 8]
    assert {"heldout_loss/code-heldout", "bits_per_byte/prose-heldout"} < set(heldout[-1])
    assert steps_of(out) == ["3", "4", "6", "8"], "every third step, the evaluated ones and the last"
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((out / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["steps"] == 8 and summary["tokens"] == 2048
    assert summary["heldout_loss"] == heldout[-1]["heldout_loss"]
    assert summary["params"] == tree.count(finished.params)


def test_the_saved_settings_are_the_run(finished, corpus):
    config, _ = load_run(finished.folder / "settings.yaml")
    assert config == load_run(small.settings(corpus, finished.folder))[0]


def test_the_card_tells_a_reader_what_was_run(finished):
    card = (finished.folder / "card.md").read_text()
    for word in ("optim.lr", "0.01", "fingerprint", "jax", "parameters", "documents"):
        assert word in card, word


def test_the_checkpoint_holds_what_the_run_ended_with(finished):
    restored = checkpoint.load(finished.folder)
    assert restored.step == 8
    assert small.bits(tree.flatten(restored.state)) == small.bits(tree.flatten(finished.params))
    assert restored.meta["position"] == {"stage": 0, "row": 64}
    assert parse(RunConfig, restored.meta["settings"]) == load_run(finished.folder / "settings.yaml")[0]


def test_a_finished_run_that_is_started_again_changes_nothing(finished, corpus, tmp_path):
    def files():
        return {p: p.read_bytes() for p in finished.folder.rglob("*") if p.is_file() and p.name != ".lock"}

    before = files()
    again = train(corpus, finished.folder)
    assert again.status == "finished" and again.summary["tokens_per_second"] == finished.summary["tokens_per_second"]
    assert files() == before
    assert small.bits(tree.flatten(again.params)) == small.bits(tree.flatten(finished.params))


STAGES = [
    {"name": "first", "steps": 3},
    {"name": "longer", "steps": 5, "weights": {"prose": 1.0}, "seq_len": 128,
     "rope": {"scaling": "linear", "factor": 2.0}},
]  # fmt: skip
VARIANTS = {
    "moe, ema, dropout, microbatches": {
        "model": small.MOE | {"dropout": 0.1},
        "train__ema": 0.9,
        "train__batch": 16,
        "train__accumulate": 2,
    },
    "stages": {"train": {"stages": STAGES, "seq_len": 32, "batch": 8, "eval_every": 4}},
}


@pytest.mark.parametrize(
    "variant, stop",
    [
        pytest.param("moe, ema, dropout, microbatches", 5, marks=pytest.mark.slow),
        pytest.param("stages", 2, marks=pytest.mark.slow),
        ("stages", 3),
        pytest.param("stages", 5, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(variant, stop, corpus, tmp_path, whole_runs, stop_at):
    whole = whole_runs(variant)
    stop_at(stop)
    first = train(corpus, tmp_path / "run", **VARIANTS[variant])
    assert first.status == "preempted" and first.summary["steps"] == stop
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "preempted"
    second = train(corpus, tmp_path / "run", **VARIANTS[variant])
    assert second.status == "finished"
    assert small.losses(tmp_path / "run") == small.losses(whole)
    assert small.bits(small.saved(tmp_path / "run", 8)) == small.bits(small.saved(whole, 8))


@pytest.fixture(scope="module")
def whole_runs(corpus, tmp_path_factory):
    """`whole_runs(variant)`: the folder of the uninterrupted run, made once."""
    made = {}

    def whole(variant):
        if variant not in made:
            made[variant] = tmp_path_factory.mktemp("whole") / "run"
            assert train(corpus, made[variant], **VARIANTS[variant]).status == "finished"
        return made[variant]

    return whole


@pytest.mark.slow
def test_router_biases_moved_and_weights_were_averaged(whole_runs):
    """Without this the comparison above could hold for runs in which neither took part."""
    found = small.saved(whole_runs("moe, ema, dropout, microbatches"))
    assert any(path.endswith("moe/bias") and np.any(x) for path, x in found.items() if path.startswith("params/"))
    averaged = {path.removeprefix("extra/ema/"): x for path, x in found.items() if path.startswith("extra/ema/")}
    assert averaged and all(np.any(x != found[f"params/{path}"]) for path, x in averaged.items() if x.size > 64)


def test_a_damaged_newest_checkpoint_falls_back_and_the_run_still_ends_bit_equal(
    finished, corpus, tmp_path, stop_at, caplog
):
    stop_at(7)
    train(corpus, tmp_path / "run")
    newest = tmp_path / "run/checkpoints/7"
    file = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    train(corpus, tmp_path / "run")
    assert any("7 is damaged" in message and "resuming from 6" in message for message in caplog.messages)
    assert (tmp_path / "run/checkpoints/7.corrupt").is_dir()
    assert small.losses(tmp_path / "run") == small.losses(finished.folder)
    assert small.bits(small.saved(tmp_path / "run", 8)) == small.bits(small.saved(finished.folder, 8))


@pytest.mark.slow
def test_another_mesh_restores_the_same_bits_and_goes_on(finished, corpus, tmp_path, stop_at, monkeypatch):
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    loaded = api.load(finished.folder, parallel=ParallelConfig(**mesh))
    assert small.bits(tree.flatten(loaded.params)) == small.bits(tree.flatten(finished.params))
    stop_at(3)
    train(corpus, tmp_path / "run")
    at_restore, restore = [], Checkpoints.restore
    monkeypatch.setattr(Checkpoints, "restore", lambda *args: at_restore.append(restore(*args)) or _copy(at_restore))
    train(corpus, tmp_path / "run", parallel=mesh)
    assert small.bits(at_restore[0]) == small.bits(
        {p: x for p, x in small.saved(tmp_path / "run", 3).items() if p.startswith("params/")}
    )
    ends = [[float.fromhex(x) for x in small.losses(out).values()] for out in (tmp_path / "run", finished.folder)]
    np.testing.assert_allclose(*ends, rtol=1e-4)


def _copy(found):
    """The state is donated to the first step, so its weights are read before."""
    restored, found[:] = (
        found[0],
        [{f"params/{p}": np.asarray(x) for p, x in tree.flatten(found[0].state.params).items()}],
    )
    return restored


def test_stages_change_length_rope_and_context(whole_runs):
    whole = whole_runs("stages")
    found = rows(whole)
    assert [row["tokens"] for row in found if "loss" in row] == [256, 512, 768, *(768 + 1024 * n for n in range(1, 6))]
    positions = {step: checkpoint.read_meta(whole, step)[1]["position"] for step in (3, 6, 8)}
    assert positions == {3: {"stage": 0, "row": 24}, 6: {"stage": 1, "row": 24}, 8: {"stage": 1, "row": 40}}
    before, after = api.load(whole, step=3).model.config, api.load(whole).model.config
    assert before.pattern[0].attn.rope.scaling == "none" and before.context == 64
    assert after.pattern[0].attn.rope.scaling == "linear" and after.pattern[0].attn.rope.factor == 2.0
    assert after.context == 128, "the model is now meant for what it was trained on"


def test_a_stage_reads_only_its_sources(corpus, tmp_path):
    """Seen from the rows themselves: prose has no parenthesis."""
    config, _ = load_run(small.settings(corpus, tmp_path / "run", **VARIANTS["stages"]))
    trainer = loop.Trainer(config, loop.RunFolder(config), loop.Show(8, quiet=True))
    texts = []
    for index in (0, 1):
        loader = trainer.loader(index, done=0)
        batch = next(loader)
        loader.close()
        texts.append(trainer.tokenizer.decode(batch.tokens_BT.ravel()))
    assert "(" in texts[0] and "(" not in texts[1]
    assert batch.tokens_BT.shape == (8, 128)


@pytest.fixture
def heldout(monkeypatch):
    """`heldout([3.0, 2.0])`: the evaluations of the next run find these losses, then infinity."""

    def find(values):
        values = iter(values)

        def call(self, params, **_):
            loss = next(values, math.inf)
            return {"heldout_loss": loss, "perplexity": 1.0, "bits_per_byte": 1.0}

        monkeypatch.setattr(Evaluator, "__call__", call)

    return find


def test_early_stopping_by_patience_keeps_the_best_and_stays_stopped(corpus, tmp_path, heldout):
    changes = {"train__eval_every": 1, "train__patience": 2, "checkpoint": {"every": 1, "keep": 1}}
    heldout([3.0, 2.0, 2.5, 2.6, 1.0])
    result = train(corpus, tmp_path / "run", **changes)
    assert result.status == "stopped early" and result.summary["steps"] == 4
    assert steps_of(tmp_path / "run") == ["2", "4"]
    assert train(corpus, tmp_path / "run", **changes).summary["steps"] == 4
    assert list(small.losses(tmp_path / "run")) == [1, 2, 3, 4]
    heldout([1.9])
    result = train(corpus, tmp_path / "run", **changes | {"train__patience": 3})
    assert result.summary["steps"] == 8, "one better evaluation starts the count again: 1.9, then three worse"
    assert steps_of(tmp_path / "run") == ["5", "8"]


def test_the_best_evaluation_is_kept_wherever_it_falls(corpus, tmp_path, heldout):
    heldout([3.0, 2.0, 2.5])
    train(corpus, tmp_path / "run", train__eval_every=2, checkpoint={"every": 100, "keep": 1})
    assert steps_of(tmp_path / "run") == ["4", "8"]
    heldout([3.0, 2.0, 2.5])
    train(corpus, tmp_path / "other", train__eval_every=2, checkpoint={"every": 100, "keep": 1, "keep_best": False})
    assert steps_of(tmp_path / "other") == ["8"]


@pytest.mark.parametrize("step", [4, 8])
def test_an_evaluation_that_fails_loses_no_step_and_is_made_up_for(step, finished, corpus, tmp_path, monkeypatch):
    def fails(self, params, **_):
        raise MemoryError("no room for the evaluation")

    evaluate = Evaluator.__call__
    calls = iter([evaluate] * (step // 4 - 1) + [fails])
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(Evaluator, "__call__", lambda *args, **options: next(calls)(*args, **options))
        train(corpus, tmp_path / "run")
    assert steps_of(tmp_path / "run")[-1] == str(step)
    assert train(corpus, tmp_path / "run").status == "finished"
    assert metrics(tmp_path / "run") == metrics(finished.folder)


def test_a_run_stopped_at_an_evaluation_makes_up_for_it(finished, corpus, tmp_path, stop_at):
    stop_at(4)
    assert train(corpus, tmp_path / "run").status == "preempted"
    assert not any("heldout_loss" in row for row in rows(tmp_path / "run"))
    train(corpus, tmp_path / "run")
    assert metrics(tmp_path / "run") == metrics(finished.folder)
    ends = [checkpoint.read_meta(out)[1] for out in (tmp_path / "run", finished.folder)]
    assert ends[0]["best"] == ends[1]["best"] == rows(finished.folder)[-1]["heldout_loss"]


def metrics(out):
    """All that does not depend on the clock."""
    return [{k: v for k, v in row.items() if k not in ("tokens_per_second", "eta")} for row in rows(out)]


def test_checkpoints_that_are_gone_are_not_trained_again(finished, corpus, tmp_path):
    shutil.copytree(finished.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints")
    with pytest.raises(CheckpointError, match="trained for 8 steps, but .*checkpoints holds no checkpoint"):
        train(corpus, tmp_path / "run")
    (tmp_path / "run/summary.json").unlink()  # a run that was killed after its first save, every three steps
    with pytest.raises(CheckpointError, match="trained for 8 steps"):
        train(corpus, tmp_path / "run")
    assert metrics(tmp_path / "run") == metrics(finished.folder)


def test_a_full_disk_costs_lines_of_metrics_and_not_the_run(finished, corpus, tmp_path, monkeypatch, caplog):
    write = JsonlWriter.write

    def full(self, step, row):
        if step in (5, 6):
            raise OSError(28, "No space left on device")
        write(self, step, row)

    monkeypatch.setattr(JsonlWriter, "write", full)
    result = train(corpus, tmp_path / "run")
    assert result.status == "finished" and result.saved
    there = small.losses(finished.folder)
    assert small.losses(tmp_path / "run") == {step: there[step] for step in there if step not in (5, 6)}
    assert sum("metrics are being lost: [Errno 28]" in message for message in caplog.messages) == 1


def test_too_many_non_finite_gradients_stop_the_run(corpus, tmp_path, monkeypatch):
    make_state = loop.make_state

    def poisoned(*args, **options):
        state = make_state(*args, **options)
        return dataclasses.replace(state, params=jax.tree.map(lambda x: x * np.nan, state.params))

    monkeypatch.setattr(loop, "make_state", poisoned)
    words = (
        r"step 3: the gradient was not finite in 3 steps in a row .*since step 0\. .* Step 3 read the rows 16 to 23 "
    )
    with pytest.raises(UserError, match=words + r"of train, which hold \d+ documents: \S+(code|prose)-\d+.txt"):
        train(corpus, tmp_path / "run", train__max_skipped=3, train__eval_every=9, checkpoint__every=9)
    found = rows(tmp_path / "run")
    assert [row["skipped"] for row in found] == [1, 2, 3, 4] and found[0]["loss"] is None
    assert steps_of(tmp_path / "run") == ["4"], "what was trained before is not lost"
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "diverged"


def test_init_and_trainable(finished, corpus, tmp_path):
    out, pattern = tmp_path / "run", "**/attn/**"
    options = dict(train__trainable=pattern, train__steps=3, train__ema=0.5)
    result = train(corpus, out, train__init=str(finished.folder), **options)
    old, new = tree.flatten(finished.params), tree.flatten(result.params)
    moved = {path for path in old if np.asarray(old[path]).tobytes() != np.asarray(new[path]).tobytes()}
    assert moved == {path for path in old if tree.matches(pattern, path)} != set()
    first = float.fromhex(small.losses(out)[1])
    assert first < float.fromhex(small.losses(finished.folder)[2]), "it starts where the other run ended"
    averaged = tree.flatten(api.load(out, ema=True).params)
    same = {path for path in old if np.asarray(old[path]).tobytes() == np.asarray(averaged[path]).tobytes()}
    assert same == old.keys() - moved, "weights that were not trained have no average and are as they were"


def test_a_ring_without_parts_of_rows_is_refused(corpus, tmp_path):
    with pytest.raises(SettingsError, match=r"kernels\.context=ring, but parallel\.context=1"):
        train(corpus, tmp_path / "run", kernels__context="ring")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "parallel, model, said",
    [
        ({}, small.MOE, r"but with parallel\.expert=1 every device has all experts.*kernels\.experts=wait"),
        ({"expert": 2, "fsdp": 4}, small.MODEL, r"but no layer of the model has experts without a capacity_factor"),
    ],
)
def test_experts_that_nobody_could_lend_are_refused(parallel, model, said, corpus, tmp_path):
    with pytest.raises(SettingsError, match=r"kernels\.experts=lend, " + said):
        train(corpus, tmp_path / "run", kernels__experts="lend", parallel=parallel, model=model)
    assert not (tmp_path / "run").exists()


def test_init_from_a_run_with_another_tokenizer_is_refused(finished, corpus, tmp_path):
    changes = {"data__tokenizer": None, "data__vocab": 399, "train__init": str(finished.folder)}
    with pytest.raises(CheckpointError, match="another tokenizer .*data.tokenizer"):
        train(corpus, tmp_path / "run", **changes, model=small.MODEL | {"vocab": 400})
    assert not (tmp_path / "run").exists()


def test_init_from_another_model_of_the_same_shapes_is_refused(finished, corpus, tmp_path):
    layer = small.MODEL["pattern"][0]
    other = {"attn": layer["attn"] | {"rope": {"base": 5e5}}, "mlp": layer["mlp"] | {"activation": "geglu"}}
    with pytest.raises(
        CheckpointError, match="another model: .*base: 10000.0 there, 500000.0 here; .*geglu.*; norm_eps"
    ):
        model = small.MODEL | {"pattern": [other], "norm_eps": 1e-2}
        train(corpus, tmp_path / "run", train__init=str(finished.folder), model=model)
    assert not (tmp_path / "run").exists()


def test_init_may_change_the_context_and_how_it_is_computed(finished, corpus):
    layer = small.MODEL["pattern"][0]
    longer = {
        "attn": layer["attn"] | {"kv_heads": 2, "rope": {"scaling": "linear", "factor": 2.0}},
        "mlp": layer["mlp"],
    }
    raw = small.settings(corpus, "run", model=small.MODEL | {"pattern": [longer, longer], "context": 128})
    raw["model"] |= {"dropout": 0.1, "dtype": "bfloat16", "remat": "full"}
    model = build(load_run(raw)[0].model, make_sharding())
    with pytest.raises(CheckpointError, match="holds other arrays"):  # two slots of one layer are stored in another way
        first_weights(origin_of(str(finished.folder), ()), model, finished.tokenizer, jax.random.key(0))
    raw["model"]["pattern"] = [longer]
    model = build(load_run(raw)[0].model, make_sharding())
    found = first_weights(origin_of(str(finished.folder), ()), model, finished.tokenizer, jax.random.key(0))
    assert small.bits(tree.flatten(found)) == small.bits(tree.flatten(finished.params))


@pytest.mark.slow
def test_a_profiler_trace_of_chosen_steps(corpus, tmp_path, stop_at):
    train(corpus, tmp_path / "last", profile={"steps": "8"})
    assert list((tmp_path / "last/profile").rglob("*.xplane.pb")), "a trace that ends with the run"
    stop_at(2)
    train(corpus, tmp_path / "cut", profile={"steps": "2-3"})
    train(corpus, tmp_path / "cut", profile={"steps": "2-3"})
    assert len(list((tmp_path / "cut/profile").rglob("*.xplane.pb"))) == 2, "both parts of a trace that was cut"


def test_a_signal_at_the_last_step_still_ends_the_run(corpus, tmp_path, stop_at):
    stop_at(8)
    result = train(corpus, tmp_path / "run")
    assert result.status == "finished" and "heldout_loss" in result.summary


def test_a_run_killed_before_its_first_checkpoint_starts_again(finished, corpus, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.Trainer, "after", killed)
    with pytest.raises(KeyboardInterrupt):
        train(corpus, tmp_path / "run")
    monkeypatch.undo()
    assert (tmp_path / "run/settings.yaml").exists()
    train(corpus, tmp_path / "run")
    assert small.losses(tmp_path / "run") == small.losses(finished.folder)


def test_a_run_goes_on_from_a_checkpoint_folder_of_its_own_on_a_new_disk(finished, corpus, tmp_path, stop_at):
    where = {"every": 3, "folder": str(tmp_path / "bucket")}
    stop_at(5)
    assert train(corpus, tmp_path / "first", checkpoint=where).status == "preempted"
    assert not (tmp_path / "first/checkpoints").exists()
    with pytest.raises(CheckpointError, match="holds a run with other settings: optim.lr"):
        train(corpus, tmp_path / "second", checkpoint=where, optim={"lr": 2e-2})
    result = train(corpus, tmp_path / "second", checkpoint=where)
    assert result.status == "finished" and (tmp_path / "second/settings.yaml").exists()
    there = small.losses(finished.folder)
    assert small.losses(tmp_path / "second") == {step: there[step] for step in (6, 7, 8)}
    assert small.bits(tree.flatten(result.params)) == small.bits(tree.flatten(finished.params))
    for folder in ("bucket", "second"):
        loaded = api.load(tmp_path / folder)  # the run folder's settings say where its checkpoints are
        assert loaded.step == 8 and small.bits(tree.flatten(loaded.params)) == small.bits(tree.flatten(result.params))
    third = train(corpus, tmp_path / "third", checkpoint=where)
    assert third.status == "finished" and json.loads((tmp_path / "third/summary.json").read_text())["steps"] == 8
