import pytest

from jaxllm.config import describe, load
from jaxllm.data.config import DataConfig
from jaxllm.errors import SettingsError

ONE = {"sources": [{"name": "a", "path": "a.txt"}]}


@pytest.mark.fast
def test_defaults_and_overrides():
    config = load(DataConfig, ONE, ["sources.0.weight=1e-1", "prefetch=0"])
    assert config.weights == {"a": 0.1} and config.prefetch == 0 and config.threads > 0
    assert config.eval_names == () and hash(config)
    assert all("#" in line for line in describe(config).splitlines())
    assert load(DataConfig, ONE, ["sources.0.path=[a.txt, b.txt]"]).sources[0].path == ("a.txt", "b.txt")


@pytest.mark.parametrize("change", [{"pack": False}, {"sources": [{"name": "a", "path": "a", "format": "chat"}]}])
def test_what_stays_whole_can_be_too_long(change):
    assert load(DataConfig, {**ONE, **change, "truncate": "drop"}).truncate == "drop"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sources": []}, "name at least one"),
        ({"sources": ONE["sources"] * 2}, "the name a stands twice"),
        ({"eval_sources": ONE["sources"]}, "the name a stands twice"),
        ({"heldout": 0.1, "eval_sources": [{"name": "b", "path": "b"}]}, "heldout=0.1 would be ignored"),
        ({"heldout": 1.0}, "less than 1"),
        ({"tokenizer": "tok", "vocab": 5000}, "vocab=5000 would be ignored"),
        ({"cache": "gs://bucket/x"}, "must be a local folder"),
        ({"sources": [{"name": "a", "path": "x", "weight": -1}]}, "weight=-1.0: must not be negative"),
        ({"sources": [{"name": "a/b", "path": "x"}]}, "use letters, digits"),
        ({"sources": [{"name": "a", "path": "x", "fromat": "text"}]}, "did you mean format"),
        ({"sources": [{"name": "a", "path": "x", "format": "csv"}]}, "'text', 'jsonl'"),
        ({"sources": [{"name": "a", "path": "x", "format": "jsonl", "document": "line"}]}, "document=line would be"),
        ({"sources": [{"name": "a", "path": "x", "format": "text", "field": "body"}]}, "field=body would be ignored"),
        ({"sources": [{"name": "a", "path": "x", "format": "chat", "field": "body"}]}, "field=body would be ignored"),
        ({"sources": [{"name": "a", "path": "x", "format": "chat", "document": "line"}]}, "document=line would be"),
        ({"truncate": "left"}, "truncate=left would be ignored: packed text is cut nowhere"),
        ({"truncate": "middle"}, "'right', 'left'"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(SettingsError, match=message):
        load(DataConfig, {**ONE, **change})
