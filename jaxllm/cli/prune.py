"""The verb that takes weights out of a model."""

import logging

from jaxllm.cli.common import given, new_verb, published_options, refuse_ignored
from jaxllm.cli.compress import report_options, save_with_report, say
from jaxllm.errors import UserError

ZEROS, PARTS = ("sparsity", "nm"), ("heads", "neurons", "experts", "layers")


def add_prune(verbs):
    help = "make weights zero, or take heads, neurons, experts or layers out, and say what that costs"
    verb = new_verb(verbs, "prune", help, prune, launch=logging.DEBUG)
    verb.add_argument("checkpoint", metavar="CHECKPOINT", help="run folder, one of its steps, or a published model")
    verb.add_argument("--out", required=True, help="folder to write; must not exist")
    zeros = verb.add_argument_group("zeros, which stay in training")
    zeros.add_argument("--sparsity", type=float, metavar="SHARE", help="of each output's weights, such as 0.5")
    zeros.add_argument("--nm", metavar="N:M", help="keep N of each M neighbouring inputs, such as 2:4")
    zeros.add_argument("--method", choices=("magnitude", "wanda"), help="default magnitude; wanda goes by text")
    zeros.add_argument("--pattern", help="paths of the weights (default: all matrices of the layers)")
    parts = verb.add_argument_group("a smaller model; how much of it stays at most")
    parts.add_argument("--heads", type=int, metavar="N", help="kv heads of a layer, with the queries that share them")
    parts.add_argument("--neurons", type=int, metavar="N", help="hidden width of a feed-forward layer or expert")
    parts.add_argument("--experts", type=int, metavar="N", help="routed experts of a layer")
    parts.add_argument("--layers", type=int, metavar="N", help="layers of the model")
    text = verb.add_argument_group("calibration")
    text.add_argument("--calibrate", nargs="+", metavar="FILE", help="text that wanda and the smaller model go by")
    text.add_argument("--tokens", type=int, help="so many tokens of it (default 32,768)")
    report_options(verb)
    verb.add_argument("--ema", action="store_true", help="prune the averaged weights")
    published_options(verb)


def prune(args) -> None:
    config = _settings(args)
    from jaxllm import api
    from jaxllm.checkpoint.models import check_new
    from jaxllm.compress.prune import counts

    check_new(args.out)
    loaded = api.load(args.checkpoint, ema=args.ema, ignore_keys=args.ignore_key)
    less, lost = api.prune(loaded, config, args.calibrate, say=say, **given(args, ["tokens"]))
    (all_before, before), (all_after, after) = counts(loaded.params), counts(less.params)
    numbers = dict(parameters=dict(before=all_before, after=all_after), nonzeros=dict(before=before, after=after))
    save_with_report(args, loaded, less, config, lost.pop("errors", {}), **numbers, **lost)


def _settings(args):
    """The PruneConfig or StructuredConfig that the options say. Raises UserError."""
    zeros, parts = given(args, ZEROS), given(args, PARTS)
    if not zeros and not parts:
        raise UserError("say what goes: --sparsity, --nm, --heads, --neurons, --experts or --layers")
    if zeros and parts:
        flags = f"--{next(iter(zeros))} and --{next(iter(parts))}"
        raise UserError(f"{flags}: one after the other, the smaller model first; prune what that writes again")
    refuse_ignored("without --eval nothing is measured", given(args, ["seq_len"]) if not args.eval else [])
    from jaxllm.adapt.prune import PruneConfig
    from jaxllm.compress.slices import StructuredConfig
    from jaxllm.config import parse

    how = given(args, ["method", "pattern"])
    if parts:
        refuse_ignored(f"--{next(iter(parts))} takes whole parts out", how)
        config = parse(StructuredConfig, parts, "prune")
    else:
        config = parse(PruneConfig, zeros | how, "prune")
    if config.calibrated and not args.calibrate:
        why = "--method wanda" if zeros else f"--{next(iter(parts))}"
        raise UserError(f"{why} needs text to go by: --calibrate FILE")
    if not config.calibrated:
        refuse_ignored("--method magnitude goes by the weights alone", given(args, ["calibrate", "tokens"]))
    return config
