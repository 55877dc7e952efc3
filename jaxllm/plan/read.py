"""Reads what is to be planned: a settings file of a run, whose text need not be there, or a model by itself."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jaxllm import config as settings_of
from jaxllm.errors import SettingsError, nearest
from jaxllm.hf.open import open_published
from jaxllm.model.spec import ModelConfig
from jaxllm.train.config import RunConfig
from jaxllm.train.load import load_run

#: What a model by itself is planned with, where its file does not say.
ASSUMED = {"dtype": "bfloat16", "remat": "full"}
LONGEST = 8192


class Plannable(NamedTuple):
    """Settings of a run, and what of them was assumed."""

    config: RunConfig
    assumed: tuple[str, ...]


def read(source: str | dict, overrides: Sequence[str] = (), *, devices: int = 1, generates: bool = False) -> Plannable:
    """The settings to plan with: of a settings file, a run folder, a model of configs/models or a published model.

    Neither text nor tokenizer is needed: only how large the vocabulary is. A model by itself is planned with rows of
    its context, at most 8,192 tokens, one row for each of the devices, AdamW, bfloat16 and full rematerialisation; to
    generate with its heads split over devices. Raises SettingsError that says what to set.
    """
    raw, alone = _open(source)
    raw, assumed = _of_model(raw, devices, generates) if alone else raw, []
    dial = [text for text in overrides if text.startswith("model.depth=")]
    raw, _ = settings_of.merge(RunConfig, raw, [text for text in overrides if text not in dial])
    if alone:
        asked = {text.partition("=")[0].strip() for text in overrides}
        training = ("model.dtype", "model.remat", "train.seq_len", "train.batch")
        listed = ("model.dtype", "parallel.tensor") if generates else training
        assumed = [f"{key}={_get(raw, key)}" for key in listed if key not in asked]
    raw = _without_text(raw, "settings" if isinstance(source, dict) else source, bool(dial))
    return Plannable(load_run(raw, dial)[0], tuple(assumed))


def _get(raw: dict, key: str):
    section, _, name = key.partition(".")
    return raw[section][name]


def _open(source: str | dict) -> tuple[dict, bool]:
    """`(settings as a dict, whether they are those of a model by itself)`."""
    if isinstance(source, dict):
        return source, False
    path = Path(source)
    if path.is_dir() and (path / "settings.yaml").is_file():
        return settings_of.read_yaml(path / "settings.yaml"), False
    if path.is_dir() or source.endswith(".gguf"):
        if (published := open_published(source)) is None:
            raise SettingsError(f"{source}: neither a run (settings.yaml) nor a published model (config.json) is there")
        model = settings_of.to_dict(published.config)
        return {name: value for name, value in model.items() if name not in ASSUMED}, True
    kind, path = _find(source)
    raw = settings_of.read_yaml(path)
    if kind == "models" or ("model" not in raw and {"embed", "pattern"} <= raw.keys()):
        return raw, True
    return settings_of.merge(RunConfig, source)[0], False


def _find(source: str) -> tuple[str, Path]:
    """Where a name leads, runs before models."""
    for kind in ("runs", "models"):
        try:
            return kind, settings_of.find(source, kind, Path.cwd())
        except SettingsError:
            continue
    shipped = settings_of.config_dir()
    known = [path.stem for kind in ("models", "runs") for path in sorted((shipped / kind).glob("*.yaml"))]
    raise SettingsError(
        f"no such settings file, run, or model: {source}{nearest(Path(source).stem, known)}; "
        f"see {shipped / 'models'} and {shipped / 'runs'}"
    )


def _of_model(model: dict, devices: int, generates: bool) -> dict:
    context = model.get("context", ModelConfig.__pydantic_fields__["context"].default)
    model = ASSUMED | {name: value for name, value in model.items() if value is not None}
    raw = {"model": model, "train": {"steps": 1, "seq_len": min(context, LONGEST), "batch": devices}}
    if generates:  # splitting weights by heads moves activations for each token, and not the weights
        heads = [layer["attn"].get("kv_heads") or layer["attn"]["heads"] for layer in model["pattern"]]
        raw["parallel"] = {"data": -1, "fsdp": 1, "tensor": math.gcd(devices, *heads)}
    return raw


def _without_text(raw: dict, source: str, depth: bool) -> dict:
    """The settings with a stand-in for text that is not named, and without a tokenizer or a start that is not there."""
    raw = {**raw, "train": dict(raw.get("train") or {}), "data": dict(raw.get("data") or {})}
    named, data, model = bool(raw["data"]), raw["data"], raw.get("model")
    if not data.get("sources"):
        data["sources"] = [
            {"name": "text", "path": "text", "format": "pairs" if raw.get("dpo") is not None else "text"}
        ]
    init = raw["train"].get("init")
    absent = isinstance(init, str) and "://" not in init and not Path(init).exists()
    if absent and not isinstance(model, dict):
        raise SettingsError(f"{source}: train.init={init} is not there; bring it, or give the model: model=NAME")
    if isinstance(model, dict) and "vocab" in model:
        # The size is all that a plan wants of a tokenizer.
        data.pop("tokenizer", None)
        data["vocab"] = max(300, int(model["vocab"]))
    elif data.get("tokenizer") and not Path(data["tokenizer"]).exists():
        raise SettingsError(f"{source}: data.tokenizer={data['tokenizer']} is not there; set model.vocab=N instead")
    elif not named and (absent or init is None):
        raise SettingsError(f"{source}: how large is the vocabulary? set model.vocab=N{' too' * depth}")
    return raw
