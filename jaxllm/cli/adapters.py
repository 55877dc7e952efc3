"""The verb that makes plain weights of adapted ones, and the option that lays adapters over a model."""

from jaxllm.cli.common import new_verb, published_options
from jaxllm.errors import UserError


def add_merge(verbs):
    verb = new_verb(verbs, "merge", "make plain float32 weights of adapters and quantised weights", merge)
    verb.add_argument("checkpoint", metavar="CHECKPOINT", help="run folder, one of its steps, or a published model")
    verb.add_argument("--adapter", metavar="DIR", help="an adapter in PEFT's layout to lay over it first")
    verb.add_argument("--to", choices=("jaxllm", "hf"), default="jaxllm", help="default jaxllm, for every verb here")
    verb.add_argument("--out", required=True, help="folder to write; must not exist")
    verb.add_argument("--ema", action="store_true", help="merge the averaged weights")
    published_options(verb)


def merge(args) -> None:
    from jaxllm import api

    loaded = api.load(args.checkpoint, ema=args.ema, ignore_keys=args.ignore_key)
    if args.adapter is not None:
        loaded = api.load_adapter(loaded, args.adapter)
    if not loaded.changes:
        raise UserError(f"{args.checkpoint} has no adapter and plain weights; give the adapter with --adapter DIR")
    plain = loaded.plain()
    if args.to == "hf":
        family = api.export(plain, args.out)
        print(f"{args.out}: a {family} model in float32")
    else:
        api.save(plain, args.out)
        print(f"{args.out}: plain weights in float32")


def adapter_option(verb) -> None:
    verb.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="DIR",
        help="an adapter in PEFT's layout to lay over the model; given again: a continuation with each of them",
    )


def with_adapters(loaded, folders: list[str]):
    """The model with one adapter over it, or with several side by side."""
    from jaxllm import api

    adapted = [api.load_adapter(loaded, folder) for folder in folders]
    return loaded if not adapted else adapted[0] if len(adapted) == 1 else api.gather(adapted)
