"""A model by what a checkpoint says of it, and a folder that holds a model and nothing of a run."""

import shutil
from pathlib import Path
from typing import Any

from etils import epath

from jaxllm import config as settings_of
from jaxllm.adapt.changes import Change, Changes, after
from jaxllm.checkpoint.reader import locate
from jaxllm.checkpoint.store import CheckpointConfig, Checkpoints
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import ResourceError, SettingsError
from jaxllm.model.build import Model, Params, build
from jaxllm.model.spec import Kernels, ModelConfig
from jaxllm.sharding import Sharding


def config_of(meta: dict[str, Any], where: str) -> ModelConfig:
    """The settings of the model that a checkpoint holds. Raises SettingsError."""
    return settings_of.parse(ModelConfig, meta["model"], f"settings saved in {where}")


def changes_of(meta: dict[str, Any], where: str) -> Changes:
    """What its weights have been through; checkpoints of older versions do not say, and held plain arrays."""
    return tuple(settings_of.parse(Change, raw, f"changes saved in {where}") for raw in meta.get("changes", ()))


def tokenizer_folder(path: str | Path) -> epath.Path:
    """The folder of the tokenizer of a checkpoint: beside its steps, or in the run folder around them."""
    folder, _ = locate(path)
    return (folder if (folder / "tokenizer").is_dir() else folder.parent) / "tokenizer"


def model_of(meta: dict[str, Any], where: str, sharding: Sharding, kernels: Kernels | None = None) -> Model:
    """The model whose arrays a checkpoint holds."""
    return after(build(config_of(meta, where), sharding, kernels), changes_of(meta, where))


def meta_of(model: Model, changes: Changes, tokenizer: Tokenizer, family: str | None) -> dict[str, Any]:
    """What `model_of` reads, and what says how the model can be published."""
    return {
        "model": settings_of.to_dict(model.config),
        "changes": [settings_of.to_dict(change) for change in changes],
        "tokenizer": tokenizer.hash,
        "family": family,
    }


def save_model(out: str | Path, params: Params, tokenizer: Tokenizer, meta: dict[str, Any], *, step: int = 0) -> None:
    """Writes weights and tokenizer into the new folder `out`, which loads as the folder of a run does.

    Raises SettingsError where `out` exists, ResourceError where it cannot be written; nothing is left then.
    """
    out = Path(out)
    check_new(out)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        tokenizer.save(partial / "tokenizer")
        with Checkpoints(partial / "checkpoints", CheckpointConfig(keep_best=False)) as checkpoints:
            checkpoints.save(step, {"params": params}, meta)
            checkpoints.wait()
            if checkpoints.failed is not None:
                raise ResourceError(f"{out} was not saved: {checkpoints.failed}")
        partial.rename(out)
    except OSError as error:
        raise ResourceError(f"{out} cannot be written ({error.strerror or error}); choose another --out") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_new(out: str | Path) -> None:
    """Raises SettingsError where `out` exists."""
    if Path(out).exists():
        raise SettingsError(f"{out} exists, and nothing is written over; choose another --out, or move it away")
