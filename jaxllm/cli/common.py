"""What all verbs share: their form, their examples, and what they read."""

import argparse
import sys

from jaxllm.errors import UserError

EXAMPLES = {
    "train": "jaxllm train demo train.steps=200 out=runs/mine",
    "sft": "jaxllm sft models/smollm2-135m-instruct --data chats.jsonl lora.rank=16",
    "dpo": "jaxllm dpo dpo train.init=runs/demo-sft data.sources.0.path=pairs.jsonl",
    "distill": "jaxllm distill distill distill.teacher=runs/demo out=runs/student",
    "tokenizer train": "jaxllm tokenizer train 'books/*.txt' --vocab 8192 --out tokenizers/books",
    "tokenizer encode": "jaxllm tokenizer encode runs/demo 'def main():'",
    "tokenizer decode": "jaxllm tokenizer decode runs/demo 300 301 302",
    "data prepare": "jaxllm data prepare demo",
    "data inspect": "jaxllm data inspect demo --rows 2",
    "eval": "jaxllm eval runs/demo --data notes.txt",
    "generate": "jaxllm generate runs/demo --prompt 'def main(' --temperature 0.7 --max-tokens 100",
    "chat": "jaxllm chat models/smollm2-135m-instruct --system 'Answer in one sentence.'",
    "runs list": "jaxllm runs list",
    "runs compare": "jaxllm runs compare runs/demo runs/demo-2",
    "demo": "jaxllm demo --minutes 2",
    "bench train": "jaxllm bench train --workloads W1 W2",
    "bench adapt": "jaxllm bench adapt --steps 20",
    "bench generate": "jaxllm bench generate models/gemma-3-270m --batches 1 8",
    "bench peers": "jaxllm bench peers W1 --torch peers/torch/bin/python --maxtext peers/maxtext/bin/python",
    "bench start": "jaxllm bench start",
    "bench programs": "jaxllm bench programs llama3.1-8b-v5p",
    "bench load": "jaxllm bench load models/gemma-3-270m",
    "info": "jaxllm info models/gemma-3-270m",
    "plan": "jaxllm plan llama3.1-8b --topology v5p:4x4x4 --tokens 15e12 train.batch=256",
    "export": "jaxllm export runs/demo --to hf --out exported/demo",
    "quantize": "jaxllm quantize runs/demo --format int4 --method gptq --calibrate notes.txt --out runs/demo-int4",
    "prune": "jaxllm prune runs/demo --sparsity 0.5 --method wanda --calibrate notes.txt --out runs/demo-sparse",
    "merge": "jaxllm merge models/llama --adapter adapters/mine --to hf --out models/llama-mine",
    "parity": "jaxllm parity models/gemma-3-270m",
    "verify": "jaxllm verify --json reliability.json",
}


def common_options(parser, default=argparse.SUPPRESS):
    parser.add_argument("--debug", action="store_true", default=default, help="show the traceback of an error")


def new_verb(verbs, name: str, help: str, run=None, example: str | None = None, **defaults):
    """A verb with its help, an example, and the function that runs it."""
    text = EXAMPLES.get(example or name)
    verb = verbs.add_parser(
        name,
        help=help,
        description=help[0].upper() + help[1:] + ".",
        epilog=f"example:\n  {text}" if text else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common_options(verb)
    if run is not None:
        verb.set_defaults(run=run, **defaults)
    return verb


def fast_option(verb) -> None:
    verb.add_argument(
        "--cpu-fast",
        action="store_true",
        help="on CPU: keep freed memory (the peak can double) and fuse products by oneDNN where jaxlib can",
    )


def published_options(verb) -> None:
    verb.add_argument(
        "--ignore-key",
        action="append",
        default=[],
        metavar="KEY",
        help="a key of config.json that is not understood and, on your word, changes nothing",
    )


def standard_input() -> str:
    data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"standard input: not UTF-8 at byte {error.start}") from None


def given(args, names) -> dict:
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def refuse_ignored(why: str, names) -> None:
    if names:
        flags = ", ".join("--" + name.replace("_", "-") for name in names)
        raise UserError(f"{why} and would ignore {flags}; leave that out")
