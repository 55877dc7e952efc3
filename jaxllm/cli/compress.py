"""Verbs that make a model smaller: quantize."""

import json
import logging
import sys

from jaxllm.cli.common import given, new_verb, published_options, refuse_ignored
from jaxllm.errors import UserError


def add_quantize(verbs):
    help = "store the weights of a model in fewer bits, and say what that costs"
    verb = new_verb(verbs, "quantize", help, quantize, launch=logging.DEBUG)
    verb.add_argument("checkpoint", metavar="CHECKPOINT", help="run folder, one of its steps, or a published model")
    what = "int8, int4, nf4, int2, fp8, or package.module:NAME (default: the one that the run was trained for, by qat)"
    verb.add_argument("--format", help=what)
    verb.add_argument("--out", required=True, help="folder to write; must not exist")
    verb.add_argument("--group", type=int, help="inputs that share a scale (default: 64 for int4 and nf4, 32 for int2)")
    verb.add_argument("--double", action="store_true", help="store the scales in 8 bits, too")
    verb.add_argument("--pattern", help="paths of the weights (default: all matrices of the layers)")
    verb.add_argument("--tables", action="store_true", help="embedding and head too, rounded to nearest")
    verb.add_argument(
        "--rule",
        action="append",
        default=[],
        metavar="PATTERN=FORMAT[:GROUP]",
        help="another format for some of the weights (float leaves them); the first one that chooses a weight decides",
    )
    verb.add_argument("--activations", choices=("int8",), help="quantise activations on the way, for integer products")
    text = verb.add_argument_group("calibration")
    text.add_argument("--method", choices=("nearest", "gptq", "awq"), default="nearest", help="default nearest")
    text.add_argument("--calibrate", nargs="+", metavar="FILE", help="text that gptq and awq go by")
    text.add_argument("--tokens", type=int, help="so many tokens of it (default 32,768)")
    text.add_argument("--ordered", action="store_true", help="gptq: inputs of large activations first (act_order)")
    report_options(verb)
    verb.add_argument("--ema", action="store_true", help="quantise the averaged weights")
    published_options(verb)


def quantize(args) -> None:
    config = _settings(args) if args.format else None
    _refuse(args, config)
    from jaxllm import api
    from jaxllm.checkpoint.models import check_new

    check_new(args.out)
    loaded = api.load(args.checkpoint, ema=args.ema, ignore_keys=args.ignore_key)
    if config is None:
        smaller, errors, config = _stored(loaded, args.checkpoint)
    else:
        smaller, errors = api.quantize(loaded, config, args.calibrate, say=say, **given(args, ["tokens"]))
    save_with_report(args, loaded, smaller, config, errors)


def report_options(verb) -> None:
    text = verb.add_argument_group("report")
    text.add_argument("--eval", nargs="+", metavar="FILE", help="text to measure the loss of quality on")
    text.add_argument("--seq-len", type=int, help="tokens that a prediction can see (default: the model's context)")
    text.add_argument("--json", action="store_true", help="print the report as JSON")


def say(text: str) -> None:
    """Progress, beside what the verb prints."""
    print(text, file=sys.stderr)


def save_with_report(args, loaded, smaller, config, errors, **more) -> None:
    """Writes the model and a report of what it cost into --out, and prints that; `more`: see `report.report`."""
    from pathlib import Path

    from jaxllm import api, tree
    from jaxllm.compress import report
    from jaxllm.config import to_dict

    quality = api.compare(loaded, smaller, args.eval, seq_len=args.seq_len) if args.eval else None
    sizes = tree.nbytes(loaded.params), tree.nbytes(smaller.params)
    found = report.report(to_dict(config), sizes, errors, quality, **more)
    api.save(smaller, args.out)
    report.write(found, Path(args.out))
    print(json.dumps(found) if args.json else f"{report.show(found)}\n\nwritten to {args.out}")


def _stored(loaded, where: str):
    """`(the model in the format that it was trained for, errors, settings)`. Raises SettingsError where it has none."""
    from jaxllm.adapt.changes import Change
    from jaxllm.compress.quantize import errors_of
    from jaxllm.weights.formats import FORMATS

    config = next((one.qat for one in reversed(loaded.changes) if one.qat is not None), None)
    if config is None or any(one.store for one in loaded.changes):
        raise UserError(
            f"{where} was not trained for a number format (qat), or is stored in it: choose one with --format "
            f"({', '.join(FORMATS)}, or package.module:NAME)"
        )
    smaller = loaded.change(Change(store=True))
    return smaller, errors_of(loaded.params, smaller.params), config


def _settings(args):
    """The QuantizeConfig that the options say. Raises SettingsError."""
    from jaxllm.adapt.quantize import LAYERS, TABLES, QuantizeConfig
    from jaxllm.config import parse

    how = {"method": args.method, "ordered": args.ordered}
    rules = [_rule(text, how) for text in args.rule]
    main = {"format": args.format, "group": args.group, "double": args.double}
    if args.tables:
        rules.append({"pattern": TABLES, **main})
    rules.append({"pattern": args.pattern or LAYERS, **main, **how})
    return parse(QuantizeConfig, {"rules": rules, "activations": args.activations}, "quantize")


def _rule(text: str, how: dict) -> dict:
    from jaxllm.weights.formats import FORMATS

    pattern, equals, rest = text.rpartition("=")
    kind, colon, group = rest.rpartition(":")
    if not (colon and group.isdigit()):
        kind, group = rest, None
    if rest.partition(":")[0] in FORMATS and kind not in FORMATS:
        raise UserError(
            f"--rule {text!r}: {rest.partition(':')[2]!r} is no number of inputs; write PATTERN=FORMAT:GROUP"
        )
    if not equals or not pattern or not kind:
        raise UserError(f"--rule {text!r}: write it as PATTERN=FORMAT or PATTERN=FORMAT:GROUP, such as '**/down=int8'")
    table = pattern in ("embed", "head") or kind == "float"
    return {"pattern": pattern, "format": kind, "group": group and int(group)} | ({} if table else how)


#: What says how `--format` is to be taken.
OF_FORMAT = ("group", "double", "pattern", "tables", "rule", "activations", "calibrate", "tokens", "ordered")


def _refuse(args, config) -> None:
    refuse_ignored("without --eval nothing is measured", ["seq_len"] * bool(args.seq_len and not args.eval))
    if config is None:
        ignored = [name for name in OF_FORMAT if getattr(args, name)] + ["method"] * (args.method != "nearest")
        return refuse_ignored("without --format the weights are stored as they were trained (qat)", ignored)
    if config.calibrated and not args.calibrate:
        raise UserError(f"--method {args.method} needs text to go by: --calibrate FILE")
    if not config.calibrated:
        refuse_ignored("--method nearest goes by the weights alone", given(args, ["calibrate", "tokens"]))
