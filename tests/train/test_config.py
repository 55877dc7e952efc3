"""Settings of a run: stages, the dial, what may change between two parts of a run."""

import dataclasses

import pytest
import small

from jaxllm import config as settings_of
from jaxllm.errors import SettingsError
from jaxllm.train.config import differences
from jaxllm.train.load import load_run

pytestmark = pytest.mark.fast


def load(corpus, *overrides, **changes):
    return load_run(small.settings(corpus, "run", **changes), overrides)[0]


def test_stages_fill_their_nulls_and_keep_a_rope_once_it_is_set(corpus):
    rope = {"scaling": "linear", "factor": 2.0}
    stages = [
        {"name": "a", "steps": 2},
        {"name": "b", "steps": 3, "seq_len": 16, "rope": rope},
        {"name": "c", "steps": 4, "batch": 4},
    ]
    a, b, c = load(corpus, train={"stages": stages, "seq_len": 32, "batch": 8}).train.resolved_stages
    assert [(s.seq_len, s.batch) for s in (a, b, c)] == [(32, 8), (16, 8), (32, 4)]
    assert a.rope is None and b.rope == c.rope == rope


def test_the_rope_of_a_stage_changes_what_it_names_in_every_layer(corpus):
    """Layers of two bases, as in Gemma 3: each keeps its own, and its fraction."""
    local, wide = (
        {"attn": {"heads": 4, "rope": rope}, "mlp": {"ffw": 48}} for rope in ({"fraction": 0.5}, {"base": 1e6})
    )
    stages = [
        {"name": "a", "steps": 2},
        {"name": "b", "steps": 2, "seq_len": 128, "rope": {"scaling": "linear", "factor": "2e0"}},
        {"name": "c", "steps": 2, "rope": {"factor": 4}},
    ]
    config = load(corpus, train={"stages": stages, "seq_len": 32}, model=small.MODEL | {"pattern": [local, wide]})
    a, b, c = (stage.model(config.model) for stage in config.train.resolved_stages)
    assert a == config.model and (b.context, c.context) == (128, 64)
    for model, factor in ((b, 2.0), (c, 4.0)):
        found = [spec.attn.rope for spec in model.pattern]
        assert [(r.base, r.fraction, r.scaling, r.factor) for r in found] == [
            (1e4, 0.5, "linear", factor),
            (1e6, 1.0, "linear", factor),
        ]


@pytest.mark.parametrize(
    "stage, message",
    [
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"seq_len": 0}, "seq_len=0 must be at least 1"),
        ({"batch": -8}, "batch=-8 must be at least 1"),
        ({"weights": {"code": 0.0}}, "stage a: weights={'code': 0.0}: at least one above 0"),
        ({"weights": {"code": 1.0, "prose": -1.0}}, "and none below"),
        (
            {"rope": {"scalling": "yarn"}},
            "stage a: unknown setting pattern.0.attn.rope.scalling; did you mean .*scaling",
        ),
        ({"rope": {"scaling": "yarn"}}, "stage a: .*needs original_context"),
        ({"rope": {"base": "x"}}, "stage a: pattern.0.attn.rope.base='x': input should be a valid number"),
        ({"weights": {"proze": 1.0}}, "no source proze; did you mean prose?"),
        ({"name": None}, "name"),
    ],
)
def test_a_stage_that_cannot_be_is_refused(stage, message, corpus):
    with pytest.raises(SettingsError, match=message):
        load(corpus, train={"stages": [{"name": "a", "steps": 2} | stage], "seq_len": 32, "batch": 8})


def test_a_stage_with_rope_for_a_model_without_it_is_refused(corpus):
    layer = {"attn": {"heads": 4, "rope": None}, "mlp": {"ffw": 48}}
    train = {"stages": [{"name": "a", "steps": 2, "rope": {"base": 5e5}}], "seq_len": 32, "batch": 8}
    with pytest.raises(SettingsError, match="rope would be ignored"):
        load(corpus, train=train, model=small.MODEL | {"pattern": [layer], "positions": "learned"})


@pytest.mark.parametrize("train", [{}, {"steps": 2, "stages": [{"name": "a", "steps": 2}]}])
def test_steps_stand_in_one_place(train, corpus):
    with pytest.raises(SettingsError, match="set steps, or stages that have their own steps; not both"):
        load(corpus, train=train)


@pytest.mark.parametrize("profile, steps", [("3", (3, 3)), ("3-5", (3, 5)), ("5-3", None), ("3-", None), ("x", None)])
def test_profile_steps(profile, steps, corpus):
    if steps is None:
        with pytest.raises(SettingsError, match="write it as 10-12"):
            load(corpus, profile={"steps": profile})
    else:
        assert load(corpus, profile={"steps": profile}).profile.first_and_last == steps


def test_vocab_comes_from_the_tokenizer(corpus):
    assert load(corpus).model.vocab == 400
    assert load(corpus, data__tokenizer=None, data__vocab=777).model.vocab == 777
    assert load(corpus, "model.vocab=512").model.vocab == 512


def test_settings_survive_the_way_through_a_file(corpus):
    config = load(corpus, model=small.MOE, train__ema=0.9)
    assert load_run(settings_of.to_dict(config))[0] == config


def test_what_makes_another_run(corpus):
    config = load(corpus)
    saved = settings_of.to_dict(config)
    assert differences(saved, config) == {}
    same = [
        "parallel.fsdp=4",
        "log.every=2",
        "checkpoint.keep=9",
        "train.eval_every=3",
        "out=elsewhere",
        "data.workers=1",
    ]
    assert differences(saved, load(corpus, *same)) == {}
    assert differences(saved, load(corpus, "checkpoint.folder=b")) == {"checkpoint.folder": (None, "b")}
    other = load(corpus, "train.seed=1", "data.seed=2", "model.pattern.0.mlp.ffw=64")
    assert differences(saved, other) == {
        "train.seed": (0, 1),
        "data.seed": (0, 2),
        "model.pattern.0.mlp.ffw": (48, 64),
    }


def test_a_setting_that_an_older_version_did_not_know_has_its_default(corpus):
    config = load(corpus)
    saved = settings_of.to_dict(config)
    del saved["train"]["max_skipped"], saved["train"]["z_loss"], saved["optim"]["clip"], saved["log"]
    assert differences(saved, config) == {}
    assert differences(saved, load(corpus, "train.z_loss=1")) == {"train.z_loss": (0.0, 1.0)}
    with pytest.raises(SettingsError, match="there: unknown setting train.zz_loss"):
        differences(saved | {"train": saved["train"] | {"zz_loss": 1}}, config, "there")


def test_a_run_folder_in_an_object_store_is_refused(corpus):
    with pytest.raises(SettingsError, match="out=gs://bucket/run: .* set checkpoint.folder=gs://bucket/run"):
        load(corpus, "out=gs://bucket/run")


def test_the_dial_replaces_what_a_file_says_and_gives_way_to_overrides(corpus):
    file = small.settings(corpus, "run", model=small.MODEL | {"tied": True, "dropout": 0.1})
    assert load_run(file)[1] is None
    turned, scale = load_run(file, ["model.depth=2"])
    assert (turned.model.layers, turned.model.embed) == (2, 128) == (scale.depth, scale.embed)
    assert turned.optim.lr == scale.lr != 1e-2
    assert turned.model.pattern[0].attn.heads == scale.heads and turned.model.pattern[0].mlp.ffw == scale.ffw
    assert turned.model.tied and turned.model.dropout == 0.1, "what it does not derive stays"
    assert turned.model.context == turned.train.seq_len == 32
    tokens = turned.train.steps * turned.train.batch * turned.train.seq_len
    assert scale.tokens <= tokens < scale.tokens + turned.train.batch * turned.train.seq_len
    by_hand = ["optim.lr=5e-4", "train.batch=4", "model.embed=192", "train.steps=9"]
    run, scale = load_run(file, ["model.depth=2", *by_hand])
    assert (run.optim.lr, run.train.batch, run.model.embed, run.train.steps) == (5e-4, 4, 192, 9)
    assert scale.by_hand == {"embed", "lr", "batch_tokens", "steps"}


def test_the_shipped_demo_takes_the_dial():
    config, scale = load_run("demo", ["model.depth=2"])
    assert (config.model.layers, config.model.embed, config.optim.lr) == (2, 128, scale.lr)


def test_depth_in_a_file_fills_what_the_file_leaves_open(corpus):
    raw = small.settings(corpus, "run", model={"depth": 3, "tied": True}, optim={})
    config, scale = load_run(raw)
    assert (config.model.layers, config.model.embed, config.optim.lr) == (3, 256, scale.lr)
    assert (config.train.steps, config.train.batch, config.train.seq_len) == (8, 8, 32)
    assert load_run(raw, ["model.depth=1"])[0].model.layers == 1
    assert raw["model"] == {"depth": 3, "tied": True}, "the caller's dict is left as it was"


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["model.depth=x"], "model.depth=x: must be a whole number above 0"),
        (["model.depth=0"], "model.depth=0"),
        (["model.depth=2.9"], "model.depth=2.9: must be a whole number"),
        (["model.depth=2", "train.batch=few"], "train.batch=few: must be a whole number"),
        (["model.depth=2", "train.seq_len=-1"], "train.seq_len=-1"),
        (["model.depth=2", "optim=3"], "optim=3"),
        (["model.dept=2"], "unknown setting model.dept"),
    ],
)
def test_a_dial_that_cannot_be_turned_is_refused(overrides, message):
    with pytest.raises(SettingsError, match=message):
        load_run("demo", overrides)


@pytest.mark.parametrize("depth", [2.9, True])
def test_a_depth_in_a_file_that_is_no_whole_number_is_refused(depth, corpus):
    with pytest.raises(SettingsError, match=f"model.depth={depth}: must be a whole number above 0"):
        load_run(small.settings(corpus, "run", model={"depth": depth}))


def test_the_dial_makes_a_run_of_valid_settings_at_every_depth():
    for depth in (1, 4, 12, 24):
        config, scale = load_run("demo", [f"model.depth={depth}"])
        assert config.model.layers == depth and config.train.batch % 8 == 0
        assert load_run(settings_of.to_dict(config))[0] == dataclasses.replace(config)
        assert f"depth = {depth}" in scale.derivation()
