"""Prefill and decode speed of transformers on CPU, on the same work as `jaxllm bench generate`.

    python scripts/peer_transformers.py HF_DIR [--batches 1 8] [--dtype float32]

Needs torch and transformers in its environment. Two threads, as many as the cores that both sides get.
"""

import argparse
import json
import time

import torch
from transformers import AutoModelForCausalLM

PREFILL, PROMPT, DECODE, REPEATS = 512, 16, 128, 3


def fastest(call) -> float:
    call()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def measure(model, batch: int) -> dict:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 20_000, (batch, PREFILL), generator=generator)
    exact = dict(do_sample=False, eos_token_id=None, pad_token_id=0)

    def generate(n: int):
        return model.generate(tokens[:, :PROMPT], max_new_tokens=n, min_new_tokens=n, **exact)

    prefill = fastest(lambda: model(tokens, logits_to_keep=1))
    decode = fastest(lambda: generate(DECODE + 1)) - fastest(lambda: generate(1))
    return {"batch": batch, "prefill": batch * PREFILL / prefill, "decode": batch * DECODE / decode}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    torch.set_num_threads(2)
    dtype = getattr(torch, options.dtype)
    model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=dtype, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for batch in options.batches:
            print(json.dumps(measure(model, batch)), flush=True)


if __name__ == "__main__":
    main()
