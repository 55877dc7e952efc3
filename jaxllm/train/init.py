"""What a run starts from: new weights, or those of `train.init`, quantised and adapted as the settings say."""

import dataclasses
from typing import NamedTuple

import jax

from jaxllm import config as settings_of
from jaxllm import tree
from jaxllm.adapt.changes import Changes, after
from jaxllm.checkpoint import load, read_meta
from jaxllm.checkpoint.models import changes_of, config_of, tokenizer_folder
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import CheckpointError, SettingsError
from jaxllm.families.export import essence
from jaxllm.hf.open import open_published
from jaxllm.hf.weights import read
from jaxllm.model.build import Model, Params
from jaxllm.model.change import change, changed
from jaxllm.model.spec import LayerSpec, ModelConfig, RopeSpec
from jaxllm.weights.quantized import Quantized


class Origin(NamedTuple):
    """Where the weights of a run come from, and what they have been through by the time it begins."""

    init: str | None
    """The checkpoint or published model, or None for new weights."""
    family: str | None
    """Of a published model, so that what comes of it can be published again."""
    before: Changes
    """What they had been through there."""
    here: Changes
    """What this run makes of them before its first step."""

    @property
    def changes(self) -> Changes:
        return (*self.before, *self.here)


def origin_of(init: str | None, here: Changes) -> Origin:
    """What `init` says of itself; no weight is read. Raises CheckpointError where it is not there."""
    if init is None:
        return Origin(None, None, (), here)
    if (published := open_published(init)) is not None:
        return Origin(init, published.family.name, published.changes, here)
    meta = read_meta(init)[1]
    return Origin(init, meta.get("family"), changes_of(meta, init), here)


def first_weights(origin: Origin, plain: Model, tokenizer: Tokenizer, key: jax.Array) -> Params:
    """The weights of a run's first step, on the mesh of `plain`, its model before any change.

    Raises CheckpointError when they were trained with another tokenizer or in another model. What may differ: the
    context and how RoPE stretches to it, dropout, dtype and rematerialisation.
    """
    model = after(plain, origin.before)
    params = plain.init(key) if origin.init is None else _read(origin.init, model, tokenizer)
    for one in origin.here:
        plan = one.plan(model)
        params, model = change(model, plan, params, key, free=True), changed(model, plan)
    return params


def _read(init: str, model: Model, tokenizer: Tokenizer) -> Params:
    if (published := open_published(init)) is not None:
        _check(init, published.tokenizer().hash, tokenizer, published.config, model.config)
        return read(model, published.family, published.tensors())
    meta = read_meta(init)[1]
    _check(init, meta["tokenizer"], tokenizer, config_of(meta, init), model.config)
    return load(init, model.abstract).state


def check_trainable(model: Model, pattern: str) -> None:
    """Raises SettingsError where the pattern chooses codes of quantised weights: no gradient reaches them."""
    adapters = [path for path in tree.flatten(model.abstract) if "/lora_" in path]
    if adapters and not any(tree.matches(pattern, path) for path in adapters):
        raise SettingsError(f"train.trainable={pattern} trains none of the adapters; leave it out, or merge them first")
    quantised = [path for path, w in tree.flatten(model.abstract, _is_quantised).items() if _is_quantised(w)]
    if chosen := [path for path in quantised if tree.matches(pattern, f"{path}/codes")]:
        raise SettingsError(
            f"{chosen[0]} is quantised and cannot be trained as it is; train adapters over it (lora: {{rank: 16}}), "
            "or choose other weights with train.trainable"
        )


def _is_quantised(x) -> bool:
    return isinstance(x, Quantized)


def take_over(raw: dict) -> dict:
    """Settings of a run with a `train.init`: its model and tokenizer, where none are given."""
    init = (raw.get("train") or {}).get("init")
    if not isinstance(init, str):
        return raw
    model, data = raw.get("model") or {}, raw.get("data") or {}
    if (published := open_published(init)) is not None:
        theirs = published.config
    elif model and ("tokenizer" in data or "vocab" in data):
        return raw
    else:
        theirs = config_of(read_meta(init)[1], init)
    own = {} if "vocab" in data else {"tokenizer": tokenizer_at(init)}
    return raw | {"model": settings_of.to_dict(theirs) | model, "data": own | data}


def load_tokenizer(path: str) -> Tokenizer:
    """What `data.tokenizer` names: a tokenizer's folder or file, a Hugging Face folder, or a .gguf file."""
    return open_published(path).tokenizer() if str(path).endswith(".gguf") else Tokenizer.load(path)


def tokenizer_at(path: str) -> str:
    """Where the tokenizer of a run or a published model lies."""
    return path if open_published(path) is not None else str(tokenizer_folder(path))


def _check(init: str, their_tokenizer: str, tokenizer: Tokenizer, theirs: ModelConfig, ours: ModelConfig) -> None:
    if their_tokenizer != tokenizer.hash:
        raise CheckpointError(
            f"train.init={init} was trained with another tokenizer (hash {their_tokenizer[:12]}, here "
            f"{tokenizer.hash[:12]}); set data.tokenizer to the tokenizer/ of that run, or to the published model"
        )
    context = max(theirs.context, ours.context)
    if changes := settings_of.diff(_core(theirs, context), _core(ours, context)):
        listed = "; ".join(f"{key}: {old!r} there, {new!r} here" for key, (old, new) in list(changes.items())[:6])
        raise CheckpointError(
            f"train.init={init} holds the weights of another model: {listed}. Take over its model settings; "
            "another base of RoPE can be a change of the first stage (train.stages)"
        )


def _core(config: ModelConfig, context: int) -> ModelConfig:
    """What weights were trained to be used in."""

    def plain(spec: LayerSpec) -> LayerSpec:
        rope = spec.attn.rope and RopeSpec(base=spec.attn.rope.base, fraction=spec.attn.rope.fraction)
        return dataclasses.replace(spec, attn=dataclasses.replace(spec.attn, rope=rope))

    config = essence(dataclasses.replace(config, context=context))
    layers = {name: tuple(map(plain, getattr(config, name))) for name in ("prefix", "pattern")}
    return dataclasses.replace(config, **layers)
