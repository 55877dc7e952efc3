"""`train.init`: the weights of another run, or of a published model, as those that a run starts from."""

import dataclasses

from jaxllm import config as settings_of
from jaxllm.checkpoint import load, read_meta
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import CheckpointError
from jaxllm.families.export import essence
from jaxllm.hf.open import open_published
from jaxllm.hf.weights import read
from jaxllm.model.build import Model, Params
from jaxllm.model.spec import LayerSpec, ModelConfig, RopeSpec


def first_weights(init: str, model: Model, tokenizer: Tokenizer) -> Params:
    """The weights of the checkpoint or published model `init`, on the mesh of `model`.

    Raises CheckpointError when they were trained with another tokenizer or in another model. What may differ: the
    context and how RoPE stretches to it, dropout, dtype and rematerialisation.
    """
    if (published := open_published(init)) is not None:
        _check(init, published.tokenizer().hash, tokenizer, published.config, model.config)
        return read(model, published.family, published.tensors())
    _, meta = read_meta(init)
    theirs = settings_of.parse(ModelConfig, meta["model"], f"settings saved in {init}")
    _check(init, meta["tokenizer"], tokenizer, theirs, model.config)
    return load(init, model.abstract).state


def take_over(raw: dict) -> dict:
    """Settings of a run whose `train.init` is a published model: its model and tokenizer, where none are given."""
    init = (raw.get("train") or {}).get("init")
    published = open_published(init) if isinstance(init, str) else None
    if published is None:
        return raw
    model, data = raw.get("model") or {}, raw.get("data") or {}
    return raw | {
        "model": settings_of.to_dict(published.config) | model,
        "data": {"tokenizer": init} | data,
    }


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
