"""A published model's logits in float64 NumPy, from its own config.json and tensors: what parity compares with.

Written from the papers, and independent of the model code: nothing here comes from jaxllm but the errors. Tensors are
read layer by layer, experts one by one, the embedding by row and the head by pieces, so that a large model fits.
T positions, D embed, V vocab.
"""

import numpy as np

from jaxllm.errors import SettingsError
from jaxllm.parity.families import fill
from jaxllm.parity.layers import (
    Tensor,
    Weights,
    activation,
    attend,
    layer_norm,
    rms_norm,
    softcap,
)

#: What published files put before the names of the decoder, and the name of its embedding.
PREFIXES = ("model.", "language_model.model.", "model.language_model.", "", "transformer.")
PIECE = 8192  # rows of the head turned into float64 at a time


def forward(config: dict, tensor: Tensor, ids, start: int = 0, rows=None) -> np.ndarray:
    """Logits `[T, V]` of token ids `[T]` at positions `start`, `start + 1`, ...; of some positions only with `rows`.

    `config` is config.json as it is, `tensor` gives a stored array by its published name and raises KeyError where
    there is none. The first token sees nothing before it, wherever it stands.
    Raises SettingsError for an architecture, or a value of a key, that is not known here, or that tensors contradict.
    """
    ids = np.asarray(ids)
    positions = start + np.arange(len(ids))
    c, traits = fill(config)
    block = (config.get("quantization_config") or {}).get("weight_block_size") or (128, 128)
    embedding = "wte.weight" if traits is None else "embed_tokens.weight"
    w = Weights(tensor, _prefix(tensor, embedding), tuple(block))
    x = w.get(embedding)[ids].astype(np.float64)
    x = _gpt2(c, w, x, positions) if traits is None else _decoder(c, traits, w, x, positions)
    x = x if rows is None else x[np.asarray(rows)]
    head = _tied(w, embedding) if c["tie_word_embeddings"] else tensor("lm_head.weight")
    pieces = [x @ head[i : i + PIECE].astype(np.float64).T for i in range(0, len(head), PIECE)]
    return softcap(np.concatenate(pieces, -1), c.get("final_logit_softcapping"))


def _prefix(tensor: Tensor, embedding: str) -> str:
    for prefix in PREFIXES:
        try:
            tensor(prefix + embedding)
            return prefix
        except KeyError:
            continue
    raise SettingsError(f"no tensor {embedding}, under any of the prefixes {', '.join(map(repr, PREFIXES))}")


def _tied(w: Weights, embedding: str) -> np.ndarray:
    """The embedding as head. A file that also has another head contradicts itself, and readers differ on it."""
    head = w.get(embedding)
    try:
        stored = w.raw("lm_head.weight")
    except KeyError:
        return head
    if all(np.array_equal(head[i : i + PIECE], stored[i : i + PIECE]) for i in range(0, len(head), PIECE)):
        return head
    raise SettingsError("config.json: tie_word_embeddings is true, but lm_head.weight differs from the embedding")


def _decoder(c, traits, w: Weights, x, positions):
    """The final hidden state, normed, of everything that is built as Llama is (arXiv 2302.13971)."""

    def norm(name, y):
        weight = w(f"{name}.weight")
        return rms_norm(y, 1 + weight if traits.gemma else weight, c["rms_norm_eps"])

    if traits.gemma:
        x = x * c["hidden_size"] ** 0.5
    for i in range(c["num_hidden_layers"]):
        layer = f"layers.{i}"
        before, after = NORMS[traits.norms]
        h = norm(f"{layer}.{before[0]}", x) if before else x
        h = traits.attention(c, traits, w.at(f"{layer}.self_attn"), h, i, positions)
        x = x + (norm(f"{layer}.{after[0]}", h) if after else h)
        h = norm(f"{layer}.{before[1]}", x) if before else x
        h = traits.feed(c, w.at(f"{layer}.{traits.feed_name}"), h, i)
        x = x + (norm(f"{layer}.{after[1]}", h) if after else h)
    return norm("norm", x)


#: Names of the norms before and after the attention and the feed-forward block.
NORMS = {
    "pre": (("input_layernorm", "post_attention_layernorm"), None),
    "post": (None, ("post_attention_layernorm", "post_feedforward_layernorm")),
    "both": (
        ("input_layernorm", "pre_feedforward_layernorm"),
        ("post_attention_layernorm", "post_feedforward_layernorm"),
    ),
}


def _gpt2(c, w: Weights, x, positions):
    """GPT-2 (Radford et al. 2019): learned positions, norms before each block, matrices stored as [in, out]."""
    T, N, act = len(x), c["n_head"], activation(c["activation_function"])
    x = x + w.get("wpe.weight")[positions].astype(np.float64)

    def norm(v, name, y):
        return layer_norm(y, v(f"{name}.weight"), v(f"{name}.bias"), c["layer_norm_epsilon"])

    def linear(v, name, y):
        return y @ v(f"{name}.weight") + v(f"{name}.bias")

    for i in range(c["n_layer"]):
        v = w.at(f"h.{i}")
        q, k, value = (y.reshape(T, N, -1) for y in np.split(linear(v, "attn.c_attn", norm(v, "ln_1", x)), 3, -1))
        strength = q.shape[-1] ** -0.5 if c["scale_attn_weights"] else 1.0
        if c["scale_attn_by_inverse_layer_idx"]:
            strength /= i + 1
        x = x + linear(v, "attn.c_proj", attend(q, k, value, strength).reshape(T, -1))
        x = x + linear(v, "mlp.c_proj", act(linear(v, "mlp.c_fc", norm(v, "ln_2", x))))
    return norm(w, "ln_f", x)
