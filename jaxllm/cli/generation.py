"""Verbs that make text: generate, chat."""

import logging

from jaxllm.cli.adapters import adapter_option, with_adapters
from jaxllm.cli.common import given, new_verb, published_options, refuse_ignored, standard_input


def add_generate(verbs):
    verb = new_verb(verbs, "generate", "continue a prompt, streamed as text", generate, launch=logging.DEBUG)
    verb.add_argument("checkpoint", metavar="CHECKPOINT", help="run folder, one of its steps, or a published model")
    verb.add_argument("--prompt", required=True, help="text to continue; - reads standard input")
    verb.add_argument("--max-tokens", type=int, default=128, help="most tokens to make (default 128)")
    verb.add_argument("--min-tokens", type=int, default=0, help="do not end before so many (default 0)")
    verb.add_argument("--n", type=int, default=1, help="so many continuations (default 1)")
    verb.add_argument("--logprobs", type=int, metavar="N", help="show each token's log-probability and the N likeliest")
    verb.add_argument("--beams", type=int, help="beam search with so many beams, in place of sampling")
    verb.add_argument("--length-penalty", type=float, help="of beams: score / length ** this (default 1)")
    verb.add_argument("--ema", action="store_true", help="use the averaged weights")
    adapter_option(verb)
    _sampling(verb)
    published_options(verb)


def _sampling(verb) -> None:
    options = verb.add_argument_group("sampling")
    for name, (kind, help) in SAMPLING.items():
        options.add_argument("--" + name.replace("_", "-"), type=kind, help=help)
    verb.add_argument("--cache", choices=("float", "int8"), default="float", help="of keys and values (default float)")
    options.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be given again")


#: Options that both `generate` and `chat` have.
SAMPLING = {
    "temperature": (float, "0 is greedy (default 0.8)"),
    "top_k": (int, "keep this many of the likeliest tokens"),
    "top_p": (float, "keep the likeliest tokens up to this probability"),
    "min_p": (float, "keep tokens of this share of the largest probability"),
    "typical_p": (float, "keep tokens of typical surprise up to this probability"),
    "repetition_penalty": (float, "above 1: tokens of the text so far become less likely"),
    "frequency_penalty": (float, "subtracted from a token's logit for each time that it was made"),
    "presence_penalty": (float, "subtracted from the logits of tokens that were made"),
    "seed": (int, "the same seed gives the same text"),
}


#: What a greedy choice does not look at.
DRAWS = ("top_k", "top_p", "min_p", "typical_p", "seed")


def _sampling_options(args) -> dict:
    options = {"temperature": 0.8} | given(args, (*SAMPLING, "stop"))
    if options["temperature"] == 0:
        refuse_ignored("--temperature 0 is greedy", [name for name in DRAWS if name in options])
    return options


def generate(args) -> None:
    lengths = given(args, ("max_tokens", "min_tokens"))
    if args.beams is None:
        options = _sampling_options(args) | lengths
        refuse_ignored("without --beams this samples", given(args, ["length_penalty"]))
    else:
        refuse_ignored("--beams searches", given(args, (*SAMPLING, "stop", "logprobs")))
        options = given(args, ("beams", "length_penalty")) | lengths
    prompt = standard_input() if args.prompt == "-" else args.prompt
    from jaxllm import api

    loaded = with_adapters(api.load(args.checkpoint, ema=args.ema, ignore_keys=args.ignore_key), args.adapter)
    loaded, names = loaded.for_decoding().caching(args.cache), args.adapter if len(args.adapter) > 1 else []
    if args.beams is None and args.n == 1 and args.logprobs is None and not names:
        pieces = api.stream(loaded, prompt, **options)
        print(prompt, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
        return
    tops = {} if args.logprobs is None else {"top_logprobs": args.logprobs}
    tops |= {"adapters": range(len(names))} if names else {}
    results = api.generate(loaded, [prompt] * max(1, len(names)), n=args.n, **tops, **options)
    for i, made in enumerate(results):
        if len(results) > 1:
            name, count = names[i // args.n : i // args.n + 1], [f"{i % args.n + 1} of {args.n}"] * (args.n > 1)
            print("---", *name, *count)
        print(prompt + made.text)
        if args.logprobs is not None:
            print(_logprobs(loaded.tokenizer, made))


def _logprobs(tokenizer, made) -> str:
    """A line for each token: its log-probability, its id and piece, and the likeliest in its place."""
    lines = ["", f"{'logprob':>8}  token"]
    for i, logprob, top in zip(made.ids, made.logprobs, made.top or [[]] * len(made.ids), strict=True):
        others = "  ".join(f"{tokenizer.piece(j)!r} {value:.3f}" for j, value in top)
        lines.append(f"{logprob:8.3f}  {i:>6} {tokenizer.piece(i)!r:<16} {others}".rstrip())
    return "\n".join(lines)


def add_chat(verbs):
    verb = new_verb(verbs, "chat", "talk with a model in the terminal", chat, launch=logging.DEBUG)
    verb.add_argument("checkpoint", metavar="CHECKPOINT", help="run folder, one of its steps, or a published model")
    verb.add_argument("--system", metavar="TEXT", help="system message")
    verb.add_argument("--max-tokens", type=int, help="most tokens of an answer (default: a quarter of the context)")
    verb.add_argument("--ema", action="store_true", help="use the averaged weights")
    _sampling(verb)
    published_options(verb)


def chat(args) -> None:
    import secrets

    options = _sampling_options(args)
    if options["temperature"] > 0:
        options = {"seed": secrets.randbits(32)} | options
    from jaxllm import api
    from jaxllm.chat import Chat, run

    loaded = api.load(args.checkpoint, ema=args.ema, ignore_keys=args.ignore_key).for_decoding().caching(args.cache)
    parts = (loaded.model, loaded.decoding, loaded.tokenizer)
    run(Chat(*parts, system=args.system, max_tokens=args.max_tokens, **options))
