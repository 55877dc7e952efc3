"""The verb that plans a run for hardware that need not be there."""

import json
import math
from pathlib import Path

from jaxllm.cli.common import given, new_verb, refuse_ignored
from jaxllm.errors import UserError


def add_plan(verbs):
    help = "memory, time and money of a run on TPUs or GPUs that you do not have"
    verb = new_verb(verbs, "plan", help, plan)
    what = "settings file, run folder, Hugging Face folder or .gguf file, or a name in configs/runs or configs/models"
    verb.add_argument("config", metavar="RUN.yaml|MODEL", help=what)
    verb.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that differ from the file")
    where = "v5p:4x4x4 (chips of a slice), h100:8x4 (GPUs of a node x nodes), or cpu:8"
    verb.add_argument("--topology", required=True, metavar="CHIP:SHAPE", help=where)
    verb.add_argument("--slices", type=int, default=1, help="so many slices of TPUs, joined by the slow network")
    verb.add_argument("--no-compile", action="store_true", help="formulas alone, in a second (GPUs: always)")
    verb.add_argument("--json", action="store_true", help="print the plan as JSON")
    train = verb.add_argument_group("training")
    train.add_argument("--tokens", type=float, help="to train on in all, such as 15e12 (default: as the settings say)")
    train.add_argument("--prices", metavar="FILE", help="prices of chips (default configs/prices.yaml, which has none)")
    train.add_argument("--chart", metavar="FILE.png", help="write memory, traffic and time as bars")
    train.add_argument(
        "--search", action="store_true", help="try meshes, remat, microbatches and dtypes; rank what fits"
    )
    train.add_argument(
        "--compile",
        type=int,
        metavar="N",
        help="of --search: compile the best N (default 2; 0: none, by estimates alone)",
    )
    verb.add_argument("--generate", action="store_true", help="plan generation, not training")
    make = verb.add_argument_group("of --generate")
    make.add_argument("--batch", type=int, help="rows at a time (default 1)")
    make.add_argument("--context", type=int, help="tokens of a row in the end (default: the model's context)")
    make.add_argument("--cache", choices=("float", "int8"), help="of keys and values (default float)")
    make.add_argument("--weights", metavar="FORMAT", help="store the layers' weights as int8, int4, nf4, ...")


#: What only one of the two kinds of plan takes.
TRAINING = ("tokens", "prices", "chart", "compile")
GENERATION = ("batch", "context", "cache", "weights")


def plan(args) -> int:
    _refuse(args)
    from jaxllm.plan.target import parse_target, prepare_environment

    target = parse_target(args.topology, args.slices)
    prepare_environment(target)
    from jaxllm.plan.fits import check_fits
    from jaxllm.plan.read import read

    config, assumed = read(args.config, args.overrides, devices=target.devices, generates=args.generate)
    found, text = (
        _generation(args, config, assumed, target) if args.generate else _training(args, config, assumed, target)
    )
    print(json.dumps(found) if args.json else text())
    check_fits(found)
    return 0


def _refuse(args) -> None:
    if args.generate:
        refuse_ignored("--generate plans no training", [*given(args, TRAINING), *["search"] * args.search])
    else:
        refuse_ignored("without --generate this plans training", given(args, GENERATION))
    if args.search:
        refuse_ignored("--search prints a table", given(args, ["chart"]))
        refuse_ignored("--search compiles what --compile says", ["no_compile"] * args.no_compile)
    else:
        refuse_ignored("without --search one plan is made", given(args, ["compile"]))
    if args.tokens is not None and not 0 < args.tokens < math.inf:
        raise UserError(f"--tokens {args.tokens:g}: must be above 0 and finite")
    if args.compile is not None and args.compile < 0:
        raise UserError(f"--compile {args.compile}: must be 0 or more")
    if args.chart and (not (folder := Path(args.chart).parent).is_dir() or Path(args.chart).is_dir()):
        what = f"there is no folder {folder}" if not folder.is_dir() else "that is a folder"
        raise UserError(f"--chart {args.chart}: {what}; name a file in a folder that is there")


def _training(args, config, assumed, target):
    from jaxllm.plan import search
    from jaxllm.plan.plan import plan
    from jaxllm.plan.prices import read_prices
    from jaxllm.plan.show import chart, show

    options = dict(tokens=args.tokens, prices=read_prices(args.prices))
    if args.search:
        most = 2 if args.compile is None else args.compile
        options |= dict(overrides=args.overrides, assumed=assumed)
        found = search.search(config, target, compiles=most, say=_say, **options)
        return found, lambda: search.show(found)
    found = plan(config, target, compiles=not args.no_compile, assumed=assumed, **options)
    if args.chart:
        chart(found, args.chart)
    return found, lambda: show(found)


def _generation(args, config, assumed, target):
    from jaxllm.plan.generate import Request, plan_generation, show

    context = config.model.context if args.context is None else args.context
    request = Request(1 if args.batch is None else args.batch, context, args.cache or "float", args.weights)
    found = plan_generation(config, target, request, compiles=not args.no_compile, assumed=assumed)
    return found, lambda: show(found)


def _say(line: str) -> None:
    """Progress, beside what the verb prints."""
    import sys

    print(line, file=sys.stderr, flush=True)
