"""Verbs that measure speed and memory."""

import logging

from jaxllm.cli.common import fast_option, new_verb


def add_bench(verbs):
    verbs = new_verb(verbs, "bench", "measure speed and memory").add_subparsers(metavar="VERB", required=True)
    verb = new_verb(
        verbs, "train", "tokens/s, memory and compile time of real training steps", bench_train, "bench train"
    )
    verb.set_defaults(launch=logging.INFO)
    verb.add_argument("--workloads", nargs="+", default=["W1", "W2", "W3"], help="default: W1 W2 W3")
    verb.add_argument("--steps", type=int, help="timed steps (default: as the workload says)")
    fast_option(verb)
    verb.add_argument("--json", action="store_true", help="print the result as JSON")

    verb = new_verb(
        verbs, "start", "seconds to the help, and to the first step of the demo when warm", bench_start, "bench start"
    )
    verb.add_argument("--rounds", type=int, default=5, help="each is a median of so many (default 5)")
    verb.add_argument("--json", action="store_true", help="print the result as JSON")

    verb = new_verb(verbs, "peers", "training on CPU beside other codebases", bench_peers, "bench peers")
    verb.set_defaults(launch=logging.INFO)
    verb.add_argument("workloads", nargs="*", metavar="WORKLOAD", help="W1, W2, W3, LoRA (default: all)")
    verb.add_argument("--torch", metavar="PYTHON", help="of an environment with torch, transformers and peft")
    verb.add_argument("--maxtext", metavar="PYTHON", help="of an environment with MaxText")
    verb.add_argument("--nanodo", metavar="FOLDER", help="a checkout of nanodo, to run in this environment")
    verb.add_argument("--rounds", type=int, default=3, help="each measures every contender once (default 3)")
    verb.add_argument("--steps", type=int, default=6, help="timed steps of each process (default 6)")
    fast_option(verb)
    verb.add_argument("--json", action="store_true", help="print the result as JSON")

    help = "training steps compiled for absent TPU slices: memory, bytes sent, cycles, compile time"
    verb = new_verb(verbs, "programs", help, bench_programs, "bench programs")
    verb.add_argument("names", nargs="*", metavar="PROGRAM", help="default: all, which takes some ten minutes")
    verb.add_argument(
        "--maxtext", metavar="PYTHON", help="of an environment with MaxText, to compile its programs in turn"
    )
    verb.add_argument("--rounds", type=int, default=1, help="pairs of each program (default 1)")
    verb.add_argument("--json", action="store_true", help="print the result as JSON")

    help = "time of a training step, full, with LoRA and with QLoRA"
    verb = new_verb(verbs, "adapt", help, bench_adapt, "bench adapt")
    verb.set_defaults(launch=logging.INFO)
    verb.add_argument("--steps", type=int, default=10, help="timed steps of each (default 10)")
    fast_option(verb)
    verb.add_argument("--json", action="store_true", help="print the result as JSON")

    verb = new_verb(verbs, "generate", "tokens/s of prefill and of decoding", bench_generate, "bench generate")
    verb.set_defaults(launch=logging.INFO)
    verb.add_argument("models", nargs="+", metavar="MODEL", help="run folder, Hugging Face folder or .gguf file")
    verb.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="rows at a time (default: 1 8)")
    verb.add_argument("--dtype", default="float32", help="of a published model's weights (default float32)")
    verb.add_argument("--json", action="store_true", help="print the result as JSON")

    verb = new_verb(verbs, "load", "memory of the host and time that loading takes", bench_load, "bench load")
    verb.set_defaults(launch=logging.DEBUG)
    verb.add_argument("model", metavar="MODEL_DIR", help="Hugging Face folder or .gguf file")
    verb.add_argument("--dtype", default="float32", help="of the weights (default float32)")
    verb.add_argument("--json", action="store_true", help="print the result as JSON")


def bench_adapt(args) -> None:
    from jaxllm.bench_adapt import bench_adapt

    bench_adapt(steps=args.steps, json=args.json)


def bench_start(args) -> None:
    from jaxllm.bench_start import bench_start

    bench_start(rounds=args.rounds, json=args.json)


def bench_peers(args) -> None:
    from jaxllm.bench_peers import NAMES, Peers, bench_peers

    peers = Peers(args.torch, args.maxtext, args.nanodo)
    bench_peers(args.workloads or NAMES, peers=peers, rounds=args.rounds, steps=args.steps, json=args.json)


def bench_programs(args) -> None:
    from jaxllm.bench_programs import bench_programs

    bench_programs(args.names, maxtext=args.maxtext, rounds=args.rounds, json=args.json)


def bench_load(args) -> None:
    from jaxllm.bench_load import bench_load

    bench_load(args.model, dtype=args.dtype, json=args.json)


def bench_generate(args) -> None:
    from jaxllm.bench_generate import bench_generate

    bench_generate(args.models, batches=args.batches, dtype=args.dtype, json=args.json)


def bench_train(args) -> None:
    from jaxllm.bench import bench_train

    bench_train(args.workloads, steps=args.steps, json=args.json, fast=args.cpu_fast)
