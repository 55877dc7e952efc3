"""The decoder as an nnx module: embedding, layers, final norm.

Layers are stored stacked by slot of the layer pattern and scanned one period at a time; see `docs/design.md`.

Shapes: B batch, T position, D embed, E experts.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_policies

from jaxllm.errors import UserError
from jaxllm.kernels.backend import platform
from jaxllm.model.attention import Attention
from jaxllm.model.cache import Cache
from jaxllm.model.gather import Gather
from jaxllm.model.latent import LatentAttention
from jaxllm.model.mlp import Mlp
from jaxllm.model.moe import Moe, MoeAux
from jaxllm.model.param import Norm, by_row, dropout, normal
from jaxllm.model.rope import lengths, sinusoids, tables
from jaxllm.model.spec import Kernels, LayerSpec, ModelConfig, RopeSpec, remat_policy_names
from jaxllm.sharding import Sharding
from jaxllm.weights.seam import take, unwrap


class Block(nnx.Module):
    """One decoder layer."""

    def __init__(self, spec: LayerSpec, config: ModelConfig, rngs: nnx.Rngs):
        self.spec, self.config = spec, config
        self.attn = (Attention if spec.attn.latent is None else LatentAttention)(spec.attn, config, rngs)
        if spec.mlp is not None:
            self.mlp = Mlp(spec.mlp, config, rngs)
        else:
            self.moe = Moe(spec.moe, config, rngs)
        if config.norm_placement != "post":
            self.attn_norm, self.mlp_norm = Norm(config), Norm(config)
        if config.norm_placement != "pre":
            self.attn_post_norm, self.mlp_post_norm = Norm(config), Norm(config)

    def __call__(self, x_BTD, context: "Context", cache=None, key=None) -> tuple[jax.Array, Any, MoeAux | None]:
        keys = (None, None) if key is None else jax.random.split(key)
        rope = context.rope(self.spec.attn.rope, self.config.rope_dim(self.spec.attn))
        h, cache = self.attn(
            self._before(x_BTD, "attn"),
            positions_BT=context.positions_BT,
            segments_BT=context.segments_BT,
            rope=rope,
            sharding=context.sharding,
            kernels=context.kernels,
            cache=cache,
        )
        x_BTD = self._add(x_BTD, h, "attn", context, keys[0])
        h, aux = self._before(x_BTD, "mlp"), None
        if self.spec.mlp is not None:
            h = self.mlp(h, context.sharding)
        else:
            h, aux = self.moe(h, context.real_BT, context.sharding, context.kernels)
        return self._add(x_BTD, h, "mlp", context, keys[1]), cache, aux

    def _before(self, x_BTD, part: str):
        return x_BTD if self.config.norm_placement == "post" else getattr(self, f"{part}_norm")(x_BTD)

    def _add(self, x_BTD, h_BTD, part: str, context, key):
        if self.config.norm_placement != "pre":
            h_BTD = getattr(self, f"{part}_post_norm")(h_BTD)
        return context.sharding.constrain(
            x_BTD + dropout(h_BTD, self.config.dropout, key, context.sharding), "batch", "residual", None
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What every layer of one forward pass shares."""

    positions_BT: jax.Array
    segments_BT: jax.Array | None
    real_BT: jax.Array
    tables: tuple[tuple[jax.Array, jax.Array], ...]
    ropes: tuple[tuple[RopeSpec, int], ...] = dataclasses.field(metadata=dict(static=True))
    sharding: Sharding = dataclasses.field(metadata=dict(static=True))
    kernels: Kernels = dataclasses.field(metadata=dict(static=True))

    def rope(self, spec: RopeSpec | None, head: int) -> tuple[jax.Array, jax.Array] | None:
        """`cos_BTR, sin_BTR`, computed once for all layers that share them."""
        return self.tables[self.ropes.index((spec, head))] if spec is not None else None


class Transformer(nnx.Module):
    """Embedding, layers and final norm; the head is `unembed`."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        D, V = config.embed, config.padded_vocab
        self.embed = normal(rngs, (V, D), ("vocab", "embed"), fan_in=D)
        if config.positions == "learned":
            self.positions = normal(rngs, (config.context, D), (None, "embed"), fan_in=D)
        self.prefix = nnx.data({str(i): Block(spec, config, rngs) for i, spec in enumerate(config.prefix)})
        self.layers = nnx.data(
            {str(i): _stack(spec, config, rngs) for i, spec in enumerate(config.pattern) if config.periods}
        )
        self.suffix = nnx.data({str(i): Block(spec, config, rngs) for i, spec in enumerate(config.suffix)})
        self.norm = Norm(config)
        if not config.tied:
            self.head = normal(rngs, (V, D), ("vocab", "embed"), fan_in=D)

    def __call__(
        self,
        tokens_BT: jax.Array,
        *,
        positions_BT: jax.Array,
        segments_BT: jax.Array | None,
        lengths_B: jax.Array | None,
        cache: Cache | None,
        key: jax.Array | None,
        neftune: float | None,
        sharding: Sharding,
        kernels: Kernels,
        gather: Gather,
    ) -> tuple[jax.Array, Cache | None, dict[str, Any]]:
        """`(hidden_BTD, cache, aux)`; see `Model.apply`."""
        context = self._context(positions_BT, segments_BT, lengths_B, cache, sharding, kernels)
        x_BTD = self._embed(tokens_BT, context, key, neftune, gather if cache is None else None)
        run = Run(self.config, context, key, caches=list(cache) if cache is not None else None, gather=gather)
        for slot, block in self.prefix.items():
            x_BTD = run.layer(block, x_BTD, ("prefix", slot))
        if self.layers:
            scan = cache is None and self.config.layers > _unroll_up_to(kernels)
            x_BTD = (run.scanned if scan else run.unrolled)(self.layers, x_BTD)
        for slot, block in self.suffix.items():
            x_BTD = run.layer(block, x_BTD, ("suffix", slot))
        return self.norm(x_BTD), tuple(run.caches) if cache is not None else None, run.aux()

    def alone(self, group: str, slot: str, x_BTD, *, positions_BT, segments_BT, sharding, kernels) -> jax.Array:
        """One layer by itself, whose weights are those of the slot without a stack; see `Model.layer`."""
        context = self._context(positions_BT, segments_BT, None, None, sharding, kernels)
        return getattr(self, group)[slot](x_BTD, context)[0]

    def embedded(self, tokens_BT, *, positions_BT, segments_BT, sharding, kernels) -> jax.Array:
        """What the first layer reads; see `Model.embedded`."""
        context = self._context(positions_BT, segments_BT, None, None, sharding, kernels)
        return self._embed(tokens_BT, context, None, None)

    def _context(self, positions_BT, segments_BT, lengths_B, cache, sharding, kernels) -> Context:
        # Else they are split as the residual stream, and masks and rotations sent about in every layer.
        positions_BT, segments_BT = (
            None if x is None else sharding.constrain(x, "batch", "seq") for x in (positions_BT, segments_BT)
        )
        specs = [s.attn for s in self.config.layer_specs if s.attn.rope is not None]
        ropes = tuple(dict.fromkeys((attn.rope, self.config.rope_dim(attn)) for attn in specs))
        by_length = [rope.scaling for rope, _ in ropes if rope.by_length]
        if by_length and cache is not None and lengths_B is None:
            raise UserError(f"rope scaling {by_length[0]} goes by how long a row will be: give lengths_B with a cache")
        length_BT = None
        if by_length:
            whole = [None if x is None else sharding.whole(x) for x in (positions_BT, segments_BT)]
            length_BT = sharding.part(lengths(*whole)) if lengths_B is None else lengths_B[:, None]
        return Context(
            positions_BT=positions_BT,
            segments_BT=segments_BT,
            real_BT=positions_BT >= 0 if segments_BT is None else segments_BT > 0,
            tables=tuple(tables(*pair, positions_BT, length_BT) for pair in ropes),
            ropes=ropes,
            sharding=sharding,
            kernels=kernels,
        )

    def _embed(self, tokens_BT, context: Context, key, neftune, gather: Gather | None = None):
        x_BTD = context.sharding.constrain(self._rows(tokens_BT, gather), "batch", "seq", None)
        if self.config.embed_scale is not None:
            x_BTD = x_BTD * jnp.asarray(self.config.embed_scale, x_BTD.dtype)
        if self.config.positions == "learned":
            x_BTD = x_BTD + take(self.positions, jnp.maximum(context.positions_BT, 0), x_BTD.dtype)
        if self.config.positions == "sinusoidal":
            x_BTD = x_BTD + sinusoids(context.positions_BT, self.config.embed).astype(x_BTD.dtype)
        key = None if key is None else jax.random.fold_in(key, self.config.layers)
        if neftune is not None and key is not None:
            x_BTD = x_BTD + _noise(jax.random.fold_in(key, 1), neftune, x_BTD, context)
        x_BTD = context.sharding.constrain(x_BTD, "batch", "residual", None)
        return dropout(x_BTD, self.config.dropout, key, context.sharding)

    def _rows(self, tokens_BT, gather: Gather | None):
        table = unwrap(self.embed)
        if gather is None:
            return take(table, tokens_BT, self.config.dtype)
        return gather.take("embed", table, tokens_BT, self.config.dtype)


def _noise(key, neftune: float, x_BTD, context: Context):
    """NEFTune's noise (arXiv 2310.05914, algorithm 1), with the length of each document of a packed row."""
    B, T, D = x_BTD.shape
    sharding, segments_BT = context.sharding, context.segments_BT
    noise_BTD = by_row(
        key, x_BTD.shape, sharding, lambda key, shape: jax.random.uniform(key, shape, minval=-1, maxval=1)
    )
    length_BT = jnp.full((B, T), sharding.row_length(T))
    if segments_BT is not None:
        row_B1, whole = jnp.arange(B)[:, None], sharding.whole(segments_BT)
        counts_BS = jnp.zeros((B, whole.shape[1] + 1), jnp.int32).at[row_B1, whole].add(1)
        length_BT = counts_BS[row_B1, segments_BT]
    bound_BT1 = neftune / jnp.sqrt(length_BT[..., None].astype(jnp.float32) * D)
    return (noise_BTD * bound_BT1).astype(x_BTD.dtype)


def _stack(spec: LayerSpec, config: ModelConfig, rngs: nnx.Rngs) -> Block:
    """The layers of one pattern slot as a Block whose weights have a leading axis over periods."""
    return nnx.vmap(lambda r: Block(spec, config, r))(rngs.split(config.periods))


def _unroll_up_to(kernels: Kernels) -> int:
    # Scanning copies each layer's saved activations into stacked buffers: 8 to 20 % of a step on CPU at 6 layers.
    return kernels.unroll if kernels.unroll is not None else 8 if platform() == "cpu" else 0


class Run:
    """One pass through the layers: counts them, hands out caches and keys, gathers what the experts report."""

    def __init__(self, config: ModelConfig, context: Context, key, caches: list | None, gather: Gather):
        self.config, self.context, self.key, self.caches, self.gather = config, context, key, caches, gather
        self.index, self.found = 0, {}
        names = remat_policy_names(config.remat)
        self.remat = (lambda f: f) if names is None or caches is not None else _remat(*names)

    def call(self, where: tuple[str, ...]):
        """`(graph, state, x_BTD, context, cache, key) -> what the Block gives`, for the layers at `where`."""

        def run(graph, state, x_BTD, context: Context, cache, key):
            if cache is None:
                state = self.gather.layer(where, nnx.to_pure_dict(state), x_BTD)
            return nnx.merge(graph, state)(x_BTD, context, cache, key)

        return run

    def layer(self, block: Block, x_BTD, where: tuple[str, ...]):
        """One layer outside the scan."""
        cache = self.caches[self.index] if self.caches is not None else None
        key = None if self.key is None else jax.random.fold_in(self.key, self.index)
        x_BTD, cache, aux = self.remat(self.call(where))(*nnx.split(block), x_BTD, self.context, cache, key)
        if self.caches is not None:
            self.caches[self.index] = cache
        if aux is not None:
            self.found[where] = aux
        self.index += 1
        return x_BTD

    def unrolled(self, slots: dict[str, Block], x_BTD):
        """The stacked layers one after another, each with its slice of the stack."""
        stacked = {slot: nnx.split(block) for slot, block in slots.items()}
        for period in range(self.config.periods):
            for slot, (graph, state) in stacked.items():
                block = nnx.merge(graph, _slice(state, period))
                x_BTD = self.layer(block, x_BTD, ("layers", slot, period))
        for slot in slots:  # what a scan would have stacked
            auxes = [self.found.pop(("layers", slot, p), None) for p in range(self.config.periods)]
            if auxes[0] is not None:
                self.found["layers", slot] = jax.tree.map(lambda *xs: jnp.stack(xs), *auxes)
        return x_BTD

    def scanned(self, slots: dict[str, Block], x_BTD):
        """The stacked layers by `lax.scan` over periods: compile time does not grow with depth."""
        stacked = {slot: nnx.split(block) for slot, block in slots.items()}
        graphs = {slot: graph for slot, (graph, _) in stacked.items()}

        def period(x_BTD, step):
            states, first = step
            auxes = {}
            for i, (slot, graph) in enumerate(graphs.items()):
                key = None if self.key is None else jax.random.fold_in(self.key, first + i)
                call = self.call(("layers", slot))
                x_BTD, _, auxes[slot] = call(graph, states[slot], x_BTD, self.context, None, key)
            return x_BTD, auxes

        first_P = self.index + jnp.arange(self.config.periods) * len(slots)
        states = {slot: state for slot, (_, state) in stacked.items()}
        x_BTD, auxes = jax.lax.scan(self.remat(period), x_BTD, (states, first_P))
        self.index += self.config.periods * len(slots)
        self.found |= {("layers", slot): aux for slot, aux in auxes.items() if aux is not None}
        return x_BTD

    def aux(self) -> dict[str, Any]:
        """Per-row losses summed over layers, and each expert's load keyed by the layer's place in the weights."""
        if not self.found:
            return {}
        sums = [jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), aux) for aux in self.found.values()]
        total = jax.tree.map(lambda *xs: jnp.concatenate(xs), *[a._replace(load_E=jnp.zeros((1, 1))) for a in sums])
        return {
            "loss_B": jnp.sum(total.loss_B, axis=0),
            "balance_B": jnp.mean(total.balance_B, axis=0),
            "router_z_B": jnp.mean(total.z_B, axis=0),
            "dropped_B": jnp.mean(total.dropped_B, axis=0),
            "load": {"/".join(where): aux.load_E for where, aux in self.found.items()},
        }


def _slice(state, period: int):
    """Period `period` of stacked weights; an `Unstacked` tuple gives its element without a copy."""
    return jax.tree.map(lambda w: w[period], state, is_leaf=lambda w: isinstance(w, tuple))


def _remat(save: tuple[str, ...], offload: tuple[str, ...]):
    """`jax.checkpoint` that keeps the named values, on the device or in the host's memory."""
    policy = checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=save,
        names_which_can_be_offloaded=offload,
        offload_src="device",
        offload_dst="pinned_host",
    )
    return partial(jax.checkpoint, policy=policy if save or offload else None)
