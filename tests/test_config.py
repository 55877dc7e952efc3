import dataclasses

import pytest
import tiny
import yaml

from jaxllm import config
from jaxllm.config import changed, describe, diff, flatten, load, parse, settings, to_dict
from jaxllm.errors import SettingsError
from jaxllm.model.spec import ModelConfig
from jaxllm.sharding import ParallelConfig


@settings
class Inner:
    """Part of Outer."""

    size: int = 3
    """How large."""
    rate: float = 0.1
    ls: int = 1


@settings
class Part:
    """An entry of a list in Outer."""

    key: str
    path: str
    weight: float = 1.0


@settings
class Outer:
    """Settings of these tests."""

    model: ModelConfig
    """What is trained."""
    inner: Inner = Inner()
    """A section."""
    maybe: Inner | None = None
    name: str = "x"
    parts: tuple[Part, ...] = ()
    names: tuple[str, ...] = ()
    parallel: ParallelConfig = ParallelConfig()


MODEL = {"vocab": 61, "embed": 32, "layers": 2, "pattern": [{"attn": {"heads": 4}, "mlp": {"ffw": 48}}]}
RAW = {"model": MODEL}
ATTN = "model.pattern.0.attn"

ERRORS = [
    ([], {"model": MODEL, "inner": {"sise": 3}}, r"unknown setting inner.sise; did you mean size\?"),
    ([], {"model": MODEL | {"emebd": 3}}, r"unknown setting model.emebd; did you mean embed\?"),
    ([], {"model": MODEL, "inner": {"size": "many"}}, r"inner.size='many': input should be a valid integer"),
    ([], {"model": MODEL, "inner": {"size": True}}, r"settings: inner.size=True: input should be a number"),
    (["inner.rate=yes"], RAW, r"inner.rate=True: input should be a number, not yes or no"),
    ([f"{ATTN}.heads=no"], RAW, r"heads=False: input should be a number"),
    ([], {}, r"model is required"),
    (["learning_size=1"], RAW, r"unknown setting learning_size; known: "),
    (["inner.least_size=1"], RAW, r"unknown setting inner.least_size; did you mean inner.ls\?"),
    (["inner.rate=null"], RAW, r"inner.rate=null: leave it out, or set a value \(default 0.1\)"),
    ([], {"model": MODEL, "inner": {"ls": None}}, r"inner.ls=null: leave it out"),
    ([], RAW | {"parts": "a.txt"}, r"parts='a.txt': write it as a list, parts: \[\{key: ..., path: ...\}, ...\]"),
    ([], RAW | {"names": "a.txt"}, r"names='a.txt': write it as a list, names: \[...\]"),
    ([], {"model": {k: v for k, v in MODEL.items() if k != "vocab"}}, r"model.vocab is required"),
    (["inner.sise=4"], RAW, r"unknown setting inner.sise; did you mean inner.size\?"),
    (["iner.size=4"], RAW, r"unknown setting iner.size; did you mean inner\?"),
    (["model.mbed=4"], RAW, r"unknown setting model.mbed; did you mean model.embed\?"),
    ([f"{ATTN}.widow=4"], RAW, rf"unknown setting {ATTN}.widow; did you mean {ATTN}.window\?"),
    (["model.pattern.1.attn.window=4"], RAW, r"1 is not an index into the 1 entries there \(0 to 0\)"),
    (["model.pattern.first.attn.window=4"], RAW, r"first is not an index"),
    (["name.first=4"], RAW, r"unknown setting name.first: name has no keys of its own"),
    (["inner.size.0=4"], RAW, r"unknown setting inner.size.0: size has no keys of its own"),
    (["inner.size"], RAW, r"override 'inner.size': write it as section.key=value"),
    (["=4"], RAW, r"override '=4': write it as section.key=value"),
    (["name={a"], RAW, r"the value is not valid YAML"),
    ([f"{ATTN}.heads=3"], RAW, r"embed=32 does not divide by heads=3"),
    ([f"{ATTN}.kv_heads=3"], RAW, r"heads=4 must be a multiple of kv_heads=3"),
    ([f"{ATTN}.alibi=true"], RAW, r"alibi=true and rope are both set"),
    ([f"{ATTN}.rope.factor=4"], RAW, r"factor=4.0 would be ignored: set scaling"),
    ([f"{ATTN}.rope.scaling=yarn"], RAW, r"rope scaling yarn needs original_context"),
    ([f"{ATTN}.rope.fraction=0.4"], RAW, r"rope needs an even head \* fraction of at least 2, got 3"),
    ([f"{ATTN}.rope.fraction=0.1"], RAW, r"rope needs an even head \* fraction of at least 2, got 0"),
    ([f"{ATTN}.rope={{fraction: 0.25, scaling: ntk}}"], RAW, r"of at least 4, got 2"),
    (["model.m=4"], RAW, r"unknown setting model.m; known: context, dropout"),
    (["model.remat=some"], RAW, r"remat='some': known are none, full, qkv"),
    (["model.remat=[q,w]"], RAW, r"remat name 'w': known are q, k, v"),
    (["model.prefix=[{attn: {heads: 4}}]"], RAW, r"a layer has exactly one of mlp and moe"),
    (["model.dropout=1"], RAW, r"dropout=1.0 must lie in \[0, 1\)"),
    (["model=nowhere"], RAW, r"no such settings file: nowhere"),
]


@pytest.mark.parametrize("overrides,raw,message", ERRORS, ids=lambda x: str(x)[:40])
def test_bad_settings_are_named(overrides, raw, message):
    with pytest.raises(SettingsError, match=message) as error:
        load(Outer, raw, overrides)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    "moe,message",
    [
        ({"experts_per_token": 5}, "experts_per_token=5 must lie in 1 to experts=4"),
        ({"balance": "bias", "balance_coef": 0.1}, "balance_coef=0.1 would be ignored: balance=bias has no loss"),
        ({"bias_rate": 0.1}, "bias_rate=0.1 would be ignored: balance=sequence has no bias"),
        ({"capacity_factor": 0}, "capacity_factor=0.0 must be above 0"),
    ],
)
def test_bad_experts_are_named(moe, message):
    with pytest.raises(SettingsError, match=message):
        tiny.config(moe=moe)


@pytest.mark.fast
def test_overrides_reach_any_depth():
    overrides = ["inner.rate=1e-3", f"{ATTN}.window=4", f"{ATTN}.rope.base=500", "maybe.size=9", "name=y"]
    got = load(Outer, RAW, [*overrides, "parallel.rules.kv_heads=null", "parallel.rules.ffw=[tensor, fsdp]"])
    assert got.inner == Inner(rate=0.001) and got.maybe == Inner(size=9) and got.name == "y"
    attn = got.model.pattern[0].attn
    assert attn.window == 4 and attn.rope.base == 500 and attn.heads == 4
    assert got.parallel.rules == {"kv_heads": None, "ffw": ("tensor", "fsdp")}
    assert RAW == {"model": MODEL} and "window" not in MODEL["pattern"][0]["attn"]
    assert load(Outer, RAW, [f"{ATTN}.rope=null"]).model.pattern[0].attn.rope is None


def test_a_file_may_name_files_for_its_sections(tmp_path, monkeypatch):
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(MODEL))
    (tmp_path / "run.yaml").write_text("model: small.yaml\ninner: {size: 5}\n")
    got = load(Outer, tmp_path / "run.yaml", ["model.layers=4"])
    assert got == load(Outer, {"model": MODEL | {"layers": 4}, "inner": {"size": 5}})
    shipped = tmp_path / "configs"
    (shipped / "models").mkdir(parents=True)
    (shipped / "models" / "demo.yaml").write_text(yaml.safe_dump(MODEL))
    monkeypatch.setattr(config, "config_dir", lambda: shipped)
    assert load(Outer, {"model": "demo"}).model == parse(ModelConfig, MODEL)
    assert load(Outer, RAW, ["model=demo"]).model == parse(ModelConfig, MODEL)
    with pytest.raises(SettingsError, match=r"no such settings file: dmo; did you mean demo\?"):
        load(Outer, {"model": "dmo"})


@pytest.mark.parametrize(
    "content,message",
    [
        (b"a: [1\nb: 2\n", r"run.yaml: not valid YAML at line 2, column"),
        (b"a: \xff\n", r"run.yaml: not UTF-8 at byte 3"),
        (b"# to be written\n", r"run.yaml: holds no settings; for an example see .*runs/demo.yaml"),
        (b"- a\n", r"run.yaml: expected `key: value` lines, found a list"),
        (b"!!python/object/apply:os.getcwd []\n", r"run.yaml: not valid YAML at line 1"),
        (b"modle: demo\n", r"run.yaml: model is required\nunknown setting modle; did you mean model\?"),
    ],
)
def test_bad_files_are_named_with_the_place(tmp_path, content, message):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(SettingsError, match=message):
        load(Outer, path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SettingsError, match="nothing.yaml"):
        load(Outer, tmp_path / "nothing.yaml")


FULL = [f"{ATTN}.window=4", "maybe.size=9", "model.remat=[q,k]", f"{ATTN}.rope.base=500", "parallel.rules.ffw=null"]


@pytest.mark.fast
def test_settings_survive_a_round_trip():
    for value in (load(Outer, RAW), load(Outer, RAW, FULL)):
        assert parse(Outer, to_dict(value)) == value
        assert parse(Outer, yaml.safe_load(yaml.safe_dump(to_dict(value)))) == value
        assert parse(Outer, yaml.safe_load(describe(value))) == value
    for model in (tiny.DENSE, tiny.MOE):
        assert parse(ModelConfig, yaml.safe_load(describe(model))) == model
        assert hash(parse(ModelConfig, to_dict(model))) == hash(model)


def test_the_description_says_what_each_setting_means():
    text = describe(load(Outer, RAW))
    assert "# How large." in text and "# Query heads." in text and "# What is trained." in text


def test_changed_and_diff_name_exactly_what_differs():
    plain, full = load(Outer, RAW), load(Outer, RAW, FULL)
    assert changed(Inner()) == {} and changed(Inner(size=4)) == {"size": 4}
    keys = {"maybe.size", "model.remat.0", "model.remat.1", f"{ATTN}.window", "parallel.rules.ffw"}
    assert keys <= set(changed(full)) and not any(key.startswith("inner") for key in changed(full))
    assert changed(full)["maybe.size"] == 9
    found = diff(plain, full)
    assert found[f"{ATTN}.window"] == (None, 4) and found[f"{ATTN}.rope.base"] == (10_000.0, 500.0)
    assert not any(key.startswith(("inner", "name", "model.vocab")) for key in found)
    assert diff(plain, plain) == {} == diff(to_dict(full), full)
    assert flatten({"a": {"b": [1, {"c": 2}]}, "d": {}}) == {"a.b.0": 1, "a.b.1.c": 2, "d": {}}


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Inner().size = 4
