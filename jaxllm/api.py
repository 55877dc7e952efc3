"""What the verbs of the command line do, as functions for a notebook: `load`, `train`, `generate`, `evaluate`."""

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxllm import checkpoint, tree
from jaxllm.adapt import gather as gathering
from jaxllm.adapt.changes import Change, Changes, after, trainable
from jaxllm.adapt.prune import PruneConfig
from jaxllm.adapt.quantize import QuantizeConfig, quantize_plan
from jaxllm.checkpoint.models import changes_of, meta_of, model_of, save_model, tokenizer_folder
from jaxllm.compress.calibrate import batches_of
from jaxllm.compress.compare import compare as compare_on
from jaxllm.compress.prune import prune as prune_by
from jaxllm.compress.prune import widest
from jaxllm.compress.quantize import Errors, errors_of, needed_tokens, quantize_calibrated
from jaxllm.compress.slices import StructuredConfig
from jaxllm.compress.structured import shrink
from jaxllm.data.batch import TokenBatch
from jaxllm.data.config import DataConfig
from jaxllm.data.prepare import prepare_source
from jaxllm.data.sources import Source
from jaxllm.data.store import TokenStore
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import CheckpointError, SettingsError
from jaxllm.evals.run import run_task
from jaxllm.evals.tasks import prompts, read_task
from jaxllm.generate.decode import power_of_two, unstack
from jaxllm.generate.text import Prompt, TextGeneration, TextStream, beam_text, generate_text, stream_text
from jaxllm.hf.export import export_hf
from jaxllm.hf.open import open_published
from jaxllm.hf.peft import load_peft
from jaxllm.hf.peft_export import export_peft
from jaxllm.model.build import Model, Params, build, check_tokens
from jaxllm.model.change import change, changed, weights_of
from jaxllm.sharding import ParallelConfig, make_sharding
from jaxllm.train import loop
from jaxllm.train.config import RunConfig
from jaxllm.train.evaluate import Evaluator
from jaxllm.train.load import load_run
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


def train(config: RunConfig | dict | str | Path, overrides: Sequence[str] = (), *, quiet: bool = False) -> loop.Result:
    """Trains by a RunConfig, a dict, or the path of a YAML file with `section.key=value` overrides.

    The run folder is `config.out`; a run that was stopped there goes on. Raises UserError.
    """
    if not isinstance(config, RunConfig):
        config, _ = load_run(config, overrides)
    return loop.train(config, quiet=quiet)


def generate(
    loaded: Loaded, prompts: Prompt | Sequence[Prompt], *, max_tokens: int | Sequence[int] = 128, **options
) -> list[TextGeneration]:
    """Continues each prompt (text, or token ids), by sampling or, where `beams` is given, by beam search.

    Options of sampling: temperature (0 is greedy), top_k, top_p, min_p, typical_p, seed, repetition_penalty,
    frequency_penalty, presence_penalty, logit_bias, top_logprobs (see `generate.tokens.stream`), stop (strings).
    Options of beam search: beams, length_penalty. Of both: n (several results for a prompt), min_tokens, stop_ids,
    banned_ids, adapters (of a model that `gather` made: the adapter of each prompt, -1 for none).
    Raises SettingsError for what is out of range or would be ignored.
    """
    one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
    make = beam_text if "beams" in options else generate_text
    texts = (loaded.tokenizer, [prompts] if one else prompts)
    return make(loaded.model, loaded.decoding, *texts, max_tokens=max_tokens, **options)


def stream(loaded: Loaded, prompt: Prompt, *, max_tokens: int = 128, **options) -> TextStream:
    """The continuation of one prompt in pieces of whole characters, as they are made; options of sampling."""
    return stream_text(loaded.model, loaded.decoding, loaded.tokenizer, prompt, max_tokens=max_tokens, **options)


def evaluate(
    loaded: Loaded,
    data: str | Source | Sequence[str | Source],
    *,
    seq_len: int | None = None,
    batch: int | None = None,
    progress=None,
) -> dict[str, Any]:
    """Perplexity and bits per byte of text: a path, several, a Source, or several, each also by itself (`KEY/NAME`).

    `seq_len`: tokens in a row, which is what a prediction can see; default: those of the longest document, at most the
    model's context. `batch`: rows at a time; default: up to 8 that hold 8,192 tokens.
    Raises DataError for files that cannot be read, SettingsError for rows longer than learned positions.
    """
    stores, ways = _stores(loaded, data), loaded.model.sharding.batch_size
    longest = max(int(store.lengths.max()) for store in stores.values())
    seq_len = min(loaded.model.config.context, power_of_two(longest, 64)) if seq_len is None else seq_len
    check_tokens(loaded.model.config, (), seq_len)
    batch = max(1, min(8, 8192 // max(seq_len, 1))) if batch is None else batch
    evaluator = Evaluator(loaded.model, stores, seq_len=seq_len, batch=-(-batch // ways) * ways)
    found = evaluator(loaded.params, progress=progress)
    for key, of in (("documents", "documents"), ("tokens", "tokens"), ("bytes", "text_bytes")):
        sizes = {name: getattr(store, of) for name, store in stores.items()}
        found |= {key: sum(sizes.values())}
        found |= {f"{key}/{name}": size for name, size in sizes.items()} if len(sizes) > 1 else {}
    return found


def _stores(loaded: Loaded, data) -> dict[str, TokenStore]:
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


def quantize(
    loaded: Loaded,
    config: QuantizeConfig,
    calibrate: str | Sequence[str] | None = None,
    *,
    tokens: int = 32_768,
    say: Callable[[str], None] = log.info,
) -> tuple[Loaded, Errors]:
    """The model with its weights in other number formats, and the relative error of each by path and layer.

    Args:
      calibrate: path (or several) of the text that method=gptq and method=awq go by; `tokens` of it are read.

    Raises SettingsError where the settings do not fit the model, DataError where the text is too short.
    """
    if config.calibrated != (calibrate is not None):
        raise SettingsError("method=gptq and method=awq go by calibration text, and method=nearest by none (calibrate)")
    if calibrate is None:
        new = loaded.change(Change(quantize=config))
        return new, errors_of(loaded.params, new.params)
    batches = _calibration(loaded, calibrate, tokens, needed_tokens(loaded.model, config))
    params, errors = quantize_calibrated(loaded.model, loaded.params, config, batches, say)
    model = changed(loaded.model, quantize_plan(loaded.model, config))
    changes = (*loaded.changes, Change(quantize=config))
    return dataclasses.replace(loaded, model=model, params=params, changes=changes), errors


def _calibration(loaded: Loaded, text, tokens: int, needed: int) -> list[TokenBatch]:
    """About `tokens` tokens of calibration text in rows of at most 512, where `needed` are needed at least."""
    if tokens < needed:
        raise SettingsError(f"tokens={tokens}: at least {needed:,} are needed, the inputs of the widest matrix")
    (store,) = _stores(loaded, text).values()
    return batches_of(loaded.model, store, tokens, needed, seq_len=min(512, loaded.model.config.context))


def prune(
    loaded: Loaded,
    config: PruneConfig | StructuredConfig,
    calibrate: str | Sequence[str] | None = None,
    *,
    tokens: int = 32_768,
    say: Callable[[str], None] = log.info,
) -> tuple[Loaded, dict[str, Any]]:
    """The model with weights made zero (PruneConfig), or a smaller one, without some of its heads, neurons, experts or
    layers (StructuredConfig); and what that took from it, by path or part and layer, as a report holds it.

    Args:
      calibrate: path (or several) of the text that method=wanda and structured pruning go by; `tokens` of it are read.

    Raises SettingsError where the settings do not fit the model, DataError where the text is too short.
    """
    if config.calibrated != (calibrate is not None):
        raise SettingsError("method=wanda and structured pruning go by calibration text, method=magnitude by none")
    text = None if calibrate is None else _calibration(loaded, calibrate, tokens, widest(loaded.model))
    if isinstance(config, StructuredConfig):
        model, params, found = shrink(loaded.model, loaded.params, config, text, say)
        return dataclasses.replace(loaded, model=model, params=params, changes=()), found
    model, params, errors = prune_by(loaded.model, loaded.params, config, text, say)
    changes = (*loaded.changes, Change(prune=config))
    return dataclasses.replace(loaded, model=model, params=params, changes=changes), {"errors": errors}


def compare(first: Loaded, second: Loaded, data, *, seq_len: int | None = None, batch: int = 8) -> dict[str, Any]:
    """What the second model, made from the first, lost: `{measure: {"before": ..., "after": ...}}` on some text.

    The measures of `evaluate`, and `greedy_agreement`: the share of positions at which both have the same likeliest
    next token. Raises as `evaluate` does.
    """
    seq_len, ways = seq_len or first.model.config.context, first.model.sharding.batch_size
    check_tokens(first.model.config, (), seq_len)
    models, stores = (first.model, first.params, second.model, second.params), _stores(first, data).values()
    parts = [compare_on(*models, store, seq_len=seq_len, batch=-(-batch // ways) * ways) for store in stores]
    tokens, text_bytes = sum(part.tokens for part in parts), sum(store.text_bytes for store in stores)
    found: dict[str, Any] = {"heldout_loss": {}, "perplexity": {}, "bits_per_byte": {}}
    for i, when in enumerate(("before", "after")):
        nats = sum(part.nats[i] for part in parts)
        values = (nats / tokens, math.exp(min(nats / tokens, 700)), nats / math.log(2) / text_bytes)
        for name, value in zip(found, values, strict=True):
            found[name][when] = value
    return found | {"greedy_agreement": sum(part.same for part in parts) / tokens, "positions": int(tokens)}


def evaluate_tasks(
    loaded: Loaded,
    files: str | Path | Sequence[str | Path],
    *,
    shots: int = 0,
    shots_from: str | Path | None = None,
    seed: int | None = None,
    batch: int = 8,
) -> dict[str, dict[str, Any]]:
    """`{file: metrics}` of task files: multiple choice, cloze and exact match (`evals.tasks`, `evals.run.run_task`).

    Args:
      shots: examples before each question, the first ones of `shots_from` or else of the file itself, but never the
        question's own.
      seed: shuffles the examples first; default: as they stand in the file.
      batch: rows at a time.

    Raises DataError with file and line for what is wrong with an item, or does not fit into the model's context.
    """
    if shots < 0 or (not shots and (shots_from is not None or seed is not None)):
        raise SettingsError(f"shots={shots}: must not be negative, and without shots shots_from and seed are ignored")
    tasks = [read_task(file) for file in ([files] if isinstance(files, str | Path) else files)]
    pool = None if shots_from is None else read_task(shots_from)
    asked = [(task, prompts(task, shots, pool, seed)) for task in tasks]
    return {task.path: {"shots": shots} | run_task(loaded, task, texts, batch=batch) for task, texts in asked}
