"""Reads the settings of a run: a file with its overrides, and what follows from a model to start from or a depth."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxllm import config as settings_of
from jaxllm.errors import SettingsError
from jaxllm.optim.scale import Scale, compute_optimal
from jaxllm.train.config import RunConfig
from jaxllm.train.init import load_tokenizer, take_over, tokenizer_at


def load_run(source: str | Path | dict, overrides=()) -> tuple[RunConfig, Scale | None]:
    """A run's settings, and the derivation when `model.depth` was given. Raises SettingsError.

    `model.depth` in a settings file gives what the file leaves open. As an override it also replaces what the file
    says of what it derives; the other overrides win over it. Without `model.vocab` the tokenizer's size is taken, or
    that of the tokenizer to be trained.
    """
    dial = [text for text in overrides if text.startswith("model.depth=")]
    rest = [text for text in overrides if not text.startswith("model.depth=")]
    raw, where = settings_of.merge(RunConfig, source)
    depth = _take_depth(raw)
    if dial:
        depth, raw = dial[-1].partition("=")[2], _without_derived(raw)
    raw, _ = settings_of.merge(RunConfig, raw, rest)
    if depth is not None:
        raw |= {name: raw.get(name) or {} for name in DERIVED}
        if wrong := [name for name in DERIVED if not isinstance(raw[name], dict)]:
            raise SettingsError(f"{wrong[0]}={raw[wrong[0]]!r}: model.depth needs `key: value` settings there")
    raw = take_over(raw)
    if isinstance(model := raw.get("model"), dict) and "vocab" not in model:
        raw["model"] = model | {"vocab": _vocab(raw.get("data"))}
    scale = None
    if depth is not None:
        raw, scale = _turn_dial(raw, depth)
    if raw.get("out") is None and not isinstance(source, dict):
        raw["out"] = f"runs/{Path(source).stem}"
    return settings_of.parse(RunConfig, raw, where), scale


def load_sft(source: str, files: Sequence[str] | None, overrides=()) -> tuple[RunConfig, Scale | None]:
    """The settings of a fine-tuning run: of a file, or those of configs/runs/sft for a model and conversations.

    Raises SettingsError where there is no model to start from, or no source of conversations.
    """
    raw = source
    if is_model := source.endswith(".gguf") or Path(source).is_dir():
        if not files:
            raise SettingsError(f"{source} is a model: give the conversations too, with --data FILE.jsonl")
        raw, _ = settings_of.merge(RunConfig, "sft")
        raw["data"] |= {"sources": [{"name": "chat", "path": list(files), "format": "chat"}]}
        raw["train"] |= {"init": source}
        raw["out"] = f"runs/{Path(source).stem}-sft"
    elif files:
        raise SettingsError(f"--data is for a model, and {source} is a settings file; name the files in data.sources")
    config, scale = load_run(raw, overrides)
    if config.train.init is None:
        raise SettingsError(f"{source}: nothing to fine-tune; set train.init to a run, a model folder or a .gguf file")
    if not is_model and all(one.format != "chat" for one in config.data.sources):
        raise SettingsError(f"{source}: no source holds conversations; set format: chat, or use jaxllm train for text")
    return config, scale


def load_dpo(source: str, overrides=()) -> tuple[RunConfig, Scale | None]:
    """The settings of a run that learns preferences. Raises SettingsError."""
    raw, dial = _merged(source, overrides)
    raw |= {"dpo": raw.get("dpo") or {}, "out": raw.get("out") or f"runs/{Path(source).stem}"}
    if not (raw.get("train") or {}).get("init"):
        raise SettingsError(f"{source}: nothing to start from; set train.init to a run, a model folder or a .gguf file")
    return load_run(raw, dial)


def load_distill(source: str, overrides=()) -> tuple[RunConfig, Scale | None]:
    """The settings of a run that learns from a teacher, whose tokenizer it takes. Raises SettingsError."""
    raw, dial = _merged(source, overrides)
    teacher = (raw.get("distill") or {}).get("teacher")
    if not teacher:
        raise SettingsError(
            f"{source}: nobody to learn from; set distill.teacher to a run, a model folder or .gguf file"
        )
    data = raw.get("data") or {}
    raw |= {"data": data if data.get("tokenizer") else data | {"tokenizer": tokenizer_at(teacher)}}
    raw |= {"out": raw.get("out") or f"runs/{Path(source).stem}"}
    return load_run(raw, dial)


def _merged(source: str, overrides) -> tuple[dict, list[str]]:
    """The settings without what the dial derives, and the overrides that turn it."""
    dial = [text for text in overrides if text.startswith("model.depth=")]
    return settings_of.merge(RunConfig, source, [text for text in overrides if text not in dial])[0], dial


#: What the dial derives.
DERIVED = {"model": ("embed", "layers", "pattern", "prefix", "context"), "train": ("batch", "steps"), "optim": ("lr",)}


def _take_depth(raw: dict):
    """Takes `model.depth`, which is no setting of the model itself, out of the dict."""
    if not isinstance(raw.get("model"), dict):
        return None
    raw["model"] = dict(raw["model"])
    return raw["model"].pop("depth", None)


def _without_derived(raw: dict) -> dict:
    sections = {name: raw[name] for name in DERIVED if isinstance(raw.get(name), dict)}
    return raw | {
        name: {key: value for key, value in section.items() if key not in DERIVED[name]}
        for name, section in sections.items()
    }


def _vocab(data) -> int:
    data = data if isinstance(data, dict) else {}
    if data.get("tokenizer"):
        return load_tokenizer(data["tokenizer"]).vocab
    return data.get("vocab", 4096)


def _turn_dial(raw: dict, depth) -> tuple[dict, Scale]:
    """Fills what the depth derives under what is set by hand (which the derivation takes into account)."""
    depth = _number("model.depth", depth, int)
    model, train, optim = (raw[name] for name in DERIVED)
    seq_len, vocab = _number("train.seq_len", train.get("seq_len", 512), int), _number("vocab", model["vocab"], int)
    by_hand: dict[str, Any] = {}
    if "embed" in model:
        by_hand["embed"] = _number("model.embed", model["embed"], int)
    if "lr" in optim:
        by_hand["lr"] = _number("optim.lr", optim["lr"], float)
    if "batch" in train:
        by_hand["batch_tokens"] = _number("train.batch", train["batch"], int) * seq_len
    if "steps" in train:
        by_hand["steps"] = _number("train.steps", train["steps"], int)
    scale = compute_optimal(depth, vocab, tied=bool(model.get("tied", False)), **by_hand)
    layer = {
        "attn": {"heads": scale.heads, "kv_heads": scale.kv_heads, "head": scale.head},
        "mlp": {"ffw": scale.ffw},
    }
    rows = max(1, round(scale.batch_tokens / seq_len))
    rows = rows if rows < 8 or "batch" in train else 8 * round(rows / 8)  # so that usual meshes divide it
    steps = {} if train.get("stages") else {"steps": -(-scale.tokens // (rows * seq_len))}
    return raw | {
        "model": {"embed": scale.embed, "layers": depth, "pattern": [layer], "context": seq_len} | model,
        "train": steps | {"batch": rows, "seq_len": seq_len} | train,
        "optim": {"lr": scale.lr} | optim,
    }, scale


def _number(name: str, value, kind: type):
    try:
        number = kind(value)
    except (TypeError, ValueError):
        number = 0
    if not number > 0 or isinstance(value, bool) or number != float(value):
        raise SettingsError(f"{name}={value}: must be a {'whole ' * (kind is int)}number above 0")
    return number
