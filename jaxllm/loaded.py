"""A model in hand: read from a run, a published folder or file, changed, saved, exported."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import jax

from jaxllm import checkpoint, tree
from jaxllm.adapt import gather as gathering
from jaxllm.adapt.changes import Change, Changes, after, trainable
from jaxllm.checkpoint.models import changes_of, meta_of, model_of, save_model, tokenizer_folder
from jaxllm.data.config import DataConfig
from jaxllm.data.prepare import prepare_source
from jaxllm.data.sources import Source
from jaxllm.data.store import TokenStore
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import CheckpointError, SettingsError
from jaxllm.generate.decode import unstack
from jaxllm.hf.export import export_hf
from jaxllm.hf.open import open_published
from jaxllm.hf.peft import load_peft
from jaxllm.hf.peft_export import export_peft
from jaxllm.model.build import Model, Params, build
from jaxllm.model.change import change, changed, weights_of
from jaxllm.sharding import ParallelConfig, make_sharding
from jaxllm.weights.lora import Lora
from jaxllm.weights.quantized import Quantized

log = logging.getLogger("jaxllm")


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A trained model in hand: `jax.grad` through `model.apply`, change `params`, anything."""

    model: Model
    params: Params
    tokenizer: Tokenizer
    step: int
    """Training steps behind the weights; 0 for a published model."""
    family: str | None = None
    """The family of a published model."""
    changes: Changes = ()
    """What the weights have been through: quantised, adapted, ..."""

    @property
    def decoding(self) -> Params:
        """The weights laid out for decoding (`decode.unstack`): copied once, and again after `params` was changed."""
        leaves = jax.tree.leaves(self.params)
        of, laid_out = self.__dict__.get("_decoding", ([], None))
        if len(of) != len(leaves) or any(old is not new for old, new in zip(of, leaves, strict=True)):
            laid_out = unstack(self.params)
            self.__dict__["_decoding"] = leaves, laid_out
        return laid_out

    def for_decoding(self) -> "Loaded":
        """The same model to generate with and for nothing else: its weights are kept once, and those here are freed."""
        return dataclasses.replace(self, params=unstack(self.params, free=True))

    def change(self, one: Change, *, free: bool = False) -> "Loaded":
        """The model with its weights quantised, adapted, merged, or made plain.

        `free` gives the memory of each old weight back once the new one is made. Raises SettingsError where the change
        does not fit the model.
        """
        plan = one.plan(self.model)
        params = change(self.model, plan, self.params, free=free)
        return dataclasses.replace(self, model=changed(self.model, plan), params=params, changes=(*self.changes, one))

    def caching(self, stored: str) -> "Loaded":
        """The same model, whose key-value cache is kept as `float` or `int8` when it generates."""
        if stored not in ("float", "int8"):
            raise SettingsError(f"cache={stored!r}: known are float and int8")
        kernels = dataclasses.replace(self.model.kernels, cache=stored)
        return dataclasses.replace(self, model=dataclasses.replace(self.model, kernels=kernels))

    def plain(self) -> "Loaded":
        """The model with float32 arrays for all weights: adapters merged, codes as the values they stand for."""
        return self.change(Change(plain=True)) if self.changes else self


def load(
    path: str | Path,
    *,
    step: int | None = None,
    parallel: ParallelConfig | None = None,
    ema: bool = False,
    dtype: str = "float32",
    vocab_multiple: int = 1,
    ignore_keys: Sequence[str] = (),
) -> Loaded:
    """The model of a run folder (or its checkpoints, or one step), of a Hugging Face folder, or of a .gguf file.

    Args:
      step: of a run; default: the newest whole one (a damaged newest step is said in a line).
      parallel: mesh to load onto, of any size (default: all devices, `fsdp=-1`).
      ema: a run's averaged weights.
      dtype: of a published model's weights in memory.
      vocab_multiple: pads a published model's vocabulary, for a mesh that it does not divide over.
      ignore_keys: keys of config.json that change nothing, on your word.

    Raises CheckpointError when there is no whole checkpoint or its tokenizer is not the one beside it; SettingsError
    for a key of config.json that is not understood; DataError for a damaged file.
    """
    if (published := open_published(path, ignore_keys=tuple(ignore_keys))) is not None:
        if step is not None or ema:
            raise SettingsError(f"{path} is a published model: it has no steps and no averaged weights (step, ema)")
        model, params = published.load(make_sharding(parallel), dtype=dtype, vocab_multiple=vocab_multiple)
        return Loaded(model, params, published.tokenizer(), 0, published.family.name, published.changes)
    if ignore_keys or dtype != "float32" or vocab_multiple != 1:
        raise SettingsError(
            f"{path} has no config.json: ignore_keys, dtype and vocab_multiple are for published models"
        )
    newest, meta = checkpoint.read_meta(path, step)
    sharding = make_sharding(parallel)
    model = model_of(meta, str(path), sharding)
    restored = checkpoint.load(path, model.abstract, step=step)
    if restored.step != newest:  # it was damaged; the one before may belong to another stage
        model, meta = model_of(restored.meta, str(path), sharding), restored.meta
    params = _averaged(path, restored, model.abstract) if ema else restored.state
    tokenizer = Tokenizer.load(beside := tokenizer_folder(path))
    if tokenizer.hash != meta["tokenizer"]:
        raise CheckpointError(
            f"the tokenizer in {beside} is not the one of the checkpoint (hash {tokenizer.hash[:12]}, the "
            f"checkpoint's {meta['tokenizer'][:12]}); put that one back"
        )
    return Loaded(model, params, tokenizer, restored.step, meta.get("family"), changes_of(meta, str(path)))


def _averaged(path, restored: checkpoint.Restored, abstract: Params) -> Params:
    """The averaged weights; those that were not trained have no average and are as they were."""
    if "settings" not in restored.meta:
        raise SettingsError(f"{path} holds a model and no run: it has no averaged weights (ema)")
    pattern = trainable(restored.meta["settings"]["train"]["trainable"], changes_of(restored.meta, str(path)))
    chosen, _ = tree.partition(abstract, tree.select(abstract, pattern))
    averages = checkpoint.load(path, chosen, step=restored.step, part="extra/ema").state
    return tree.combine(averages, restored.state)


def save(loaded: Loaded, out: str | Path) -> None:
    """Writes the model, whatever types its weights are of, into the new folder `out`, for `load` and every verb.

    Raises SettingsError where `out` exists, ResourceError where it cannot be written.
    """
    meta = meta_of(loaded.model, loaded.changes, loaded.tokenizer, loaded.family)
    save_model(out, loaded.params, loaded.tokenizer, meta, step=loaded.step)


def save_adapter(loaded: Loaded, out: str | Path) -> str:
    """Writes the adapter over the model's weights, and nothing else, into the new folder `out` in PEFT's layout.

    Gives the family whose names it has. Raises SettingsError where there is no adapter, or where it has no counterpart.
    """
    config = next((one.lora for one in reversed(loaded.changes) if one.lora is not None), None)
    kind = dict(rslora=config is not None and config.kind == "rslora", dropout=config.dropout if config else 0.0)
    return export_peft(loaded.model, loaded.params, out, family=loaded.family, **kind)


def load_adapter(loaded: Loaded, folder: str | Path) -> Loaded:
    """The model with the adapter of a folder in PEFT's layout over its weights (LoRA, rsLoRA, DoRA).

    Raises DataError for a damaged file or an adapter of another base, SettingsError for what cannot be done here.
    """
    config, params = load_peft(loaded.model, loaded.params, folder, family=loaded.family)
    return _with_changes(loaded, (*loaded.changes, Change(lora=config)), params)


def gather(adapted: Sequence[Loaded]) -> Loaded:
    """Models with different adapters over the same weights as one, whose rows choose theirs (`generate(adapters=...)`).

    Raises SettingsError where what the adapters lie over differs.
    """
    first = adapted[0]
    bases = [tuple(one for one in loaded.changes if one.lora is None) for loaded in adapted]
    if any(loaded.model.config != first.model.config for loaded in adapted) or len(set(bases)) > 1:
        raise SettingsError("these adapters lie over different models, or over one quantised in different ways")
    config, params = gathering.gather([loaded.params for loaded in adapted])
    return _with_changes(first, (*bases[0], Change(lora=config), Change(several=len(adapted))), params)


def _with_changes(loaded: Loaded, changes: Changes, params: Params) -> Loaded:
    """The model after other changes, with weights that were made elsewhere."""
    model = after(build(loaded.model.config, loaded.model.sharding, loaded.model.kernels), changes)
    params = jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding), params, model.abstract)
    return dataclasses.replace(loaded, model=model, params=params, changes=changes)


def export(loaded: Loaded, out: str | Path, *, to: str = "hf", dtype: str = "float32") -> str:
    """Writes the model as a Hugging Face folder (`to="hf"`) or a .gguf file (`to="gguf"`), or its adapter alone
    (`to="peft"`); gives the family's name.

    `dtype`: float32, bfloat16 or float16; for GGUF q8_0 and q4_0 too, and the names that it has for them. int8 and int4
    weights keep their codes: as compressed-tensors, or as Q8_0 and Q4_0 where their groups are made of 32s. Raises
    SettingsError where no known family computes what the model does, with the settings that have no counterpart, for
    other weight types, or where `out` exists.
    """
    if to not in ("hf", "gguf", "peft"):
        raise SettingsError(f"to={to!r}: known are hf, gguf and peft")
    if to == "peft":
        if dtype != "float32":
            raise SettingsError(f"dtype={dtype}: to=peft writes float32; leave that out")
        return save_adapter(loaded, out)
    _check_publishable(loaded, to)
    parts = (loaded.model.config, loaded.params, loaded.tokenizer, out)
    if to == "hf":
        return export_hf(*parts, dtype=dtype, family=loaded.family)
    from jaxllm.hf.gguf_export import export_gguf

    short = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
    return export_gguf(*parts, dtype=short.get(dtype, dtype))


def _check_publishable(loaded: Loaded, to: str) -> None:
    """Raises SettingsError, with the next step, for weights that other software has no counterpart for; codes may."""
    weights = weights_of(loaded.params).items()
    odd = {path: weight for path, weight in weights if not isinstance(weight, jax.Array | Quantized)}
    if any(isinstance(weight, Lora) for weight in odd.values()):
        raise SettingsError(
            f"the model has adapters over its weights, which to={to} does not hold: merge them first (jaxllm merge) or "
            "write the adapter alone (to=peft)"
        )
    if odd:
        path, weight = next(iter(odd.items()))
        kind = getattr(weight, "format", type(weight).__name__)
        raise SettingsError(
            f"{path} is stored as {kind}, which to={to} does not write; make the weights plain first (jaxllm merge)"
        )


def stores_of(loaded: Loaded, data) -> dict[str, TokenStore]:
    """Token stores by name of text: a path, several, a Source, or several."""
    sources = _sources(data)
    where = Path(DataConfig(sources=sources).cache)
    return {source.name: prepare_source(source, loaded.tokenizer, where, say=log.info) for source in sources}


def _sources(data) -> tuple[Source, ...]:
    if isinstance(data, Source):
        return (data,)
    if not isinstance(data, str) and any(isinstance(one, Source) for one in data):
        if not all(isinstance(one, Source) for one in data):
            raise SettingsError("data: give paths, or Sources, and not some of each")
        return tuple(data)
    return (Source(name="eval", path=data if isinstance(data, str) else tuple(data)),)
