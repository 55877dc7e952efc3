"""Times training steps of PyTorch on CPU; called by `jaxllm bench peers` with the Python of an environment with torch.

    python peer_torch.py KIND '{"vocab": ..., "embed": ..., ...}' STEPS

KIND: eager and compile (a plain decoder), transformers (Llama, or Mixtral where there are experts), peft (that Llama
with LoRA on all linear layers). float32, fused AdamW. Prints one line of JSON: seconds of each step, and flags.
"""

import json
import sys
import time

import torch
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Grouped-query attention with RoPE, through scaled_dot_product_attention."""

    def __init__(self, size):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = size["heads"], size["kv_heads"], size["embed"] // size["heads"]
        self.q = nn.Linear(size["embed"], self.heads * self.head_dim, bias=False)
        self.k = nn.Linear(size["embed"], self.kv_heads * self.head_dim, bias=False)
        self.v = nn.Linear(size["embed"], self.kv_heads * self.head_dim, bias=False)
        self.out = nn.Linear(self.heads * self.head_dim, size["embed"], bias=False)

    def forward(self, x, cos, sin):
        def split(y, heads):
            return y.view(*y.shape[:2], heads, self.head_dim).transpose(1, 2)

        def rotate(y):
            a, b = y.chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

        q, k = rotate(split(self.q(x), self.heads)), rotate(split(self.k(x), self.kv_heads))
        k, v = (y.repeat_interleave(self.heads // self.kv_heads, 1) for y in (k, split(self.v(x), self.kv_heads)))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(size["embed"], 1e-5) for _ in range(2))
        self.attention = Attention(size)
        self.gate, self.up = (nn.Linear(size["embed"], size["ffw"], bias=False) for _ in range(2))
        self.down = nn.Linear(size["ffw"], size["embed"], bias=False)

    def forward(self, x, cos, sin):
        x = x + self.attention(self.norms[0](x), cos, sin)
        y = self.norms[1](x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.embedding = nn.Embedding(size["vocab"], size["embed"])
        self.layers = nn.ModuleList(Layer(size) for _ in range(size["layers"]))
        self.norm = nn.RMSNorm(size["embed"], 1e-5)
        self.head = nn.Linear(size["embed"], size["vocab"], bias=False)
        half = size["embed"] // size["heads"] // 2
        angles = torch.outer(torch.arange(size["length"]), 10_000.0 ** (-torch.arange(half) / half))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        for weight in self.parameters():
            if weight.ndim > 1:
                nn.init.normal_(weight, 0, 0.02)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        return self.head(self.norm(x))


def published(size):
    """transformers' Llama or Mixtral."""
    import transformers

    settings = {
        "vocab_size": size["vocab"],
        "hidden_size": size["embed"],
        "intermediate_size": size["ffw"],
        "num_hidden_layers": size["layers"],
        "num_attention_heads": size["heads"],
        "num_key_value_heads": size["kv_heads"],
        "head_dim": size["embed"] // size["heads"],
        "max_position_embeddings": size["length"],
        "use_cache": False,
        "tie_word_embeddings": False,
        "attn_implementation": "sdpa",
    }
    if not size["experts"]:
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    moe = {"num_local_experts": size["experts"], "num_experts_per_tok": size["experts_per_token"]}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**settings, **moe, sliding_window=None))


def main(kind: str, sizes: str, steps: str) -> None:
    torch.manual_seed(0)
    size = json.loads(sizes)
    if kind in ("eager", "compile"):
        model = Decoder(size)
        logits_of = model
    else:
        model = published(size)
        if kind == "peft":
            from peft import LoraConfig, get_peft_model

            names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
            model = get_peft_model(model, LoraConfig(r=size["rank"], lora_alpha=16, target_modules=names))

        def logits_of(tokens):
            return model(input_ids=tokens, use_cache=False).logits

    def loss_of(inputs, targets):
        return F.cross_entropy(logits_of(inputs).flatten(0, 1), targets.flatten())

    if kind == "compile":
        loss_of = torch.compile(loss_of)
    trained = [weight for weight in model.train().parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, 3e-4, (0.9, 0.95), 1e-8, 0.1, fused=True)
    seconds = []
    for _ in range(int(steps)):
        tokens = torch.randint(0, size["vocab"], (size["rows"], size["length"] + 1))
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(inputs, targets)
        loss.backward()
        optimizer.step()
        loss.item()
        seconds.append(time.perf_counter() - start)
    print(json.dumps({"seconds": seconds, "flags": f"torch {torch.__version__}, {torch.get_num_threads()} threads"}))


if __name__ == "__main__":
    main(*sys.argv[1:])
