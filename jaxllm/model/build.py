"""`build`: the only bridge from the description of a model to functions on plain trees of weights.

Shapes: B batch, T position, D embed, V vocab, E experts.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxllm import tree
from jaxllm.errors import SettingsError
from jaxllm.model.cache import Cache
from jaxllm.model.gather import Gather, make_gather
from jaxllm.model.moe import update_bias
from jaxllm.model.spec import Kernels, LayerSpec, ModelConfig
from jaxllm.model.transformer import Transformer
from jaxllm.sharding import Sharding, make_sharding
from jaxllm.weights.axes import Axes
from jaxllm.weights.seam import einsum

Params = dict[str, Any]

#: How the names of the weights of a layer end that are in no matrix product.
VECTORS = ("bias", "norm", "scale", "sinks")


@dataclasses.dataclass(frozen=True)
class Model:
    """A model as functions on plain nested dicts of weights; made by `build`."""

    config: ModelConfig
    sharding: Sharding
    kernels: Kernels
    abstract: Params
    """Shapes, dtypes and shardings of the weights."""
    axes: dict[str, Any]
    """Logical axes of each array, same structure."""
    weights: dict[str, tuple[Axes, tuple[int, ...]]]
    """`{path: (logical axes, shape)}` of what the model multiplies with, whatever types `abstract` holds for it."""
    init: Callable[[jax.Array], Params]
    """`init(key)`: new weights, made where they will live."""
    graph: Any
    """The nnx description with the weights taken out."""

    def apply(
        self,
        params: Params,
        tokens_BT,
        *,
        positions_BT=None,
        segments_BT=None,
        lengths_B=None,
        cache: Cache | None = None,
        key=None,
        neftune: float | None = None,
    ) -> tuple[jax.Array, Cache | None, dict[str, Any]]:
        """Forward pass: `(hidden_BTD, cache, aux)`.

        Args:
          params: weights; leaves may be arrays or any weight type.
          tokens_BT: ids in 0..vocab-1.
          positions_BT: position of each token in its document; default 0, 1, ...; -1 marks padding under a cache.
          segments_BT: number of the document in the row, 0 for padding; tokens attend within their segment only.
          lengths_B: how long each row will be in all; dynamic NTK and LongRoPE go by it. Default: as long as it is
            here. They need it with a cache, so that a row keeps its angles from the first token to the last.
          cache: from `make_cache`; the new tokens see what it holds and are added to what comes back.
          key: of dropout; None for evaluation.
          neftune: with a key, noise on the embeddings, uniform within `neftune / sqrt(L embed)` for the L tokens of a
            document (Jain et al. 2023, arXiv 2310.05914, algorithm 1).
        """
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        return nnx.merge(self.graph, self.gather.around(params, self.config.dtype))(
            tokens_BT,
            positions_BT=positions_BT,
            segments_BT=segments_BT,
            lengths_B=lengths_B,
            cache=cache,
            key=key,
            neftune=neftune,
            sharding=self.sharding,
            kernels=self.kernels,
            gather=self.gather,
        )

    @functools.cached_property
    def gather(self) -> Gather:
        """How layers get the weights that devices share."""
        return make_gather(self.sharding, self.abstract, self.axes, self.weights)

    @functools.cached_property
    def local(self) -> "Model":
        """The same model for code that sees the rows of one device, and its parts of the weights."""
        return dataclasses.replace(self, sharding=self.sharding.inside())

    @property
    def layers(self) -> list[tuple[str, str, int | None]]:
        """Where the weights of each layer are, in order: group, slot, and place in the stack (None where unstacked)."""
        config = self.config
        stacked = [("layers", str(i), period) for period in range(config.periods) for i in range(len(config.pattern))]
        prefix, suffix = (
            [(group, str(i), None) for i in range(len(getattr(config, group)))] for group in ("prefix", "suffix")
        )
        return prefix + stacked + suffix

    def embedded(self, params: Params, tokens_BT, *, positions_BT, segments_BT=None) -> jax.Array:
        """What the first layer reads, `[B, T, D]`."""
        where = dict(positions_BT=positions_BT, segments_BT=segments_BT)
        return nnx.merge(self.graph, params).embedded(tokens_BT, **where, sharding=self.sharding, kernels=self.kernels)

    def layer(self, group: str, slot: str, weights: Params, x_BTD, *, positions_BT, segments_BT=None) -> jax.Array:
        """One layer by itself: `[B, T, D]` to the same. `weights` are its own, without a stack.

        What `apply` does in one, layer after layer: for whatever looks at each of them, or changes it on the way.
        """
        params = {**self.abstract, group: {**self.abstract[group], slot: weights}}
        where = dict(positions_BT=positions_BT, segments_BT=segments_BT)
        return nnx.merge(self.graph, params).alone(
            group, slot, x_BTD, **where, sharding=self.sharding, kernels=self.kernels
        )

    def head(self, params: Params) -> Any:
        """The head, or the tied embedding table, as it is kept; `whole_head` makes it what `unembed` needs."""
        return params[self._head]

    def whole_head(self, head: Any) -> Any:
        """The head with the parts of all devices, where the code at hand sees those of one."""
        return self.gather.tree(self._head, head, self.config.dtype)

    @property
    def _head(self) -> str:
        return "embed" if self.config.tied else "head"

    def unembed(self, head, hidden_BTD: jax.Array) -> jax.Array:
        """Logits `[B, T, V]` in float32; V is the padded vocabulary, and ids of the padding get -1e30."""
        logits_BTV = einsum("BTD,VD->BTV", hidden_BTD, head, dtype=jnp.float32)
        logits_BTV = self.sharding.constrain(logits_BTV, "batch", "seq", "vocab")
        if self.config.logit_softcap is not None:
            logits_BTV = self.config.logit_softcap * jnp.tanh(logits_BTV / self.config.logit_softcap)
        if self.config.padded_vocab != self.config.vocab:
            logits_BTV = jnp.where(jnp.arange(self.config.padded_vocab) < self.config.vocab, logits_BTV, -1e30)
        return logits_BTV

    def logits(self, params: Params, tokens_BT, **kwargs) -> jax.Array:
        """`apply` and `unembed` in one: logits `[B, T, V]` in float32."""
        return self.unembed(self.head(params), self.apply(params, tokens_BT, **kwargs)[0])

    def balance(self, params: Params, load: dict[str, jax.Array]) -> Params:
        """The weights with the router biases moved towards equal load (layers with balance=bias; others untouched)."""
        for where, load_E in load.items():
            group, slot = where.split("/")
            spec = _slot(self.config, group, slot).moe
            if spec.balance == "bias":
                block = params[group][slot]
                bias = update_bias(block["moe"]["bias"], load_E, spec.bias_rate or 0.001)
                block = {**block, "moe": {**block["moe"], "bias": bias}}
                params = {**params, group: {**params[group], slot: block}}
        return params


def build(config: ModelConfig, sharding: Sharding | None = None, kernels: Kernels | None = None) -> Model:
    """The model that `config` describes, on the mesh of `sharding` (default: all devices).

    Raises SettingsError when a weight does not divide over the mesh.
    """
    sharding = sharding or make_sharding()
    described = nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0)))
    graph, state = nnx.split(described)
    axes, abstract, weights = {}, {}, {}
    for path, variable in nnx.to_flat_state(state):
        keys, value = tuple(map(str, path)), variable.get_value()
        names = tuple(variable.get_metadata()["axes"])
        names = ("layers",) * (value.ndim - len(names)) + names
        where = sharding.weight(names, value.shape, "/".join(keys))
        weights["/".join(keys)] = names, value.shape
        _put(axes, keys, names)
        _put(abstract, keys, jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=where))

    def init(key):
        return nnx.to_pure_dict(nnx.state(Transformer(config, nnx.Rngs(key))))

    init = jax.jit(init, out_shardings=jax.tree.map(lambda s: s.sharding, abstract))
    return Model(config, sharding, kernels or Kernels(), abstract, axes, weights, init, graph)


def _put(nested: dict, keys: tuple[str, ...], value) -> None:
    for key in keys[:-1]:
        nested = nested.setdefault(key, {})
    nested[keys[-1]] = value


def _slot(config: ModelConfig, group: str, slot: str) -> LayerSpec:
    """The layers whose weights are at `group/slot`."""
    return getattr(config, "pattern" if group == "layers" else group)[int(slot)]


def active_parameters(config: ModelConfig, abstract: Params) -> tuple[int, int]:
    """`(total, active)` parameters; active ones are in a matrix product for each token (no gather, no norms)."""
    sizes = {path: leaf.size for path, leaf in tree.flatten(abstract).items()}
    active = config.padded_vocab * config.embed
    for path, size in sizes.items():
        group, *keys = path.split("/")
        if group not in ("prefix", "layers", "suffix") or keys[-1].endswith(VECTORS):
            continue
        if keys[1] == "moe" and keys[2] in ("gate", "up", "down"):
            moe = _slot(config, group, keys[0]).moe
            size = size // moe.experts * moe.experts_per_token
        active += size
    return sum(sizes.values()), active


def check_tokens(config: ModelConfig, tokens, context: int | None = None) -> None:
    """Raises SettingsError for ids outside the vocabulary or more tokens than learned positions."""
    tokens = np.asarray(tokens)
    if tokens.size and (tokens.min() < 0 or tokens.max() >= config.vocab):
        where = np.argwhere((tokens < 0) | (tokens >= config.vocab))[0]
        raise SettingsError(
            f"token id {tokens[tuple(where)]} at {where.tolist()} is outside the vocabulary of {config.vocab}"
        )
    length = context or tokens.shape[-1]
    if config.positions == "learned" and length > config.context:
        raise SettingsError(f"{length} tokens are more than the {config.context} learned positions (model.context)")
