"""A model made smaller, and what that cost: quantised, pruned, compared with what it was."""

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

from jaxllm.adapt.changes import Change
from jaxllm.adapt.prune import PruneConfig
from jaxllm.adapt.quantize import QuantizeConfig, quantize_plan
from jaxllm.compress.calibrate import batches_of
from jaxllm.compress.compare import compare as compare_on
from jaxllm.compress.prune import prune as prune_by
from jaxllm.compress.prune import widest
from jaxllm.compress.quantize import Errors, errors_of, needed_tokens, quantize_calibrated
from jaxllm.compress.slices import StructuredConfig
from jaxllm.compress.structured import shrink
from jaxllm.data.batch import TokenBatch
from jaxllm.errors import SettingsError
from jaxllm.loaded import Loaded, stores_of
from jaxllm.model.build import check_tokens
from jaxllm.model.change import changed

log = logging.getLogger("jaxllm")


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
    (store,) = stores_of(loaded, text).values()
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
    models, stores = (first.model, first.params, second.model, second.params), stores_of(first, data).values()
    parts = [compare_on(*models, store, seq_len=seq_len, batch=-(-batch // ways) * ways) for store in stores]
    tokens, text_bytes = sum(part.tokens for part in parts), sum(store.text_bytes for store in stores)
    found: dict[str, Any] = {"heldout_loss": {}, "perplexity": {}, "bits_per_byte": {}}
    for i, when in enumerate(("before", "after")):
        nats = sum(part.nats[i] for part in parts)
        values = (nats / tokens, math.exp(min(nats / tokens, 700)), nats / math.log(2) / text_bytes)
        for name, value in zip(found, values, strict=True):
            found[name][when] = value
    return found | {"greedy_agreement": sum(part.same for part in parts) / tokens, "positions": int(tokens)}
