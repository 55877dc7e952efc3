"""What the files beside a tokenizer say of it: special tokens, begin and end rules, chat templates."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from jaxllm.errors import DataError

#: Files that belong to a tokenizer; a folder written by `save` holds the same bytes.
FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
)
#: Templates beside the default one, each of the name of its file.
MORE_TEMPLATES = "additional_chat_templates"
#: Control tokens that end a turn or a text, by the names that published models give them.
ENDS = frozenset(
    "<|im_end|> <|eot_id|> <|eom_id|> <end_of_turn> <|end|> <|endoftext|> <|end_of_text|> <|return|> <|call|> "
    "<｜end▁of▁sentence｜> <|END_OF_TURN_TOKEN|>".split()
)
#: Pieces which mark turns and images, where no file says whether they are special.
TURNS = re.compile(r"<\|[^|<>]+\|>|<(start|end)_of_\w+>")


@dataclass(frozen=True)
class Added:
    """A token that is matched in text as a whole, before the model cuts the rest into pieces."""

    content: str
    id: int | None = None
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


@dataclass(frozen=True)
class Special:
    """Empty where a tokenizer is its model file alone."""

    names: dict[str, str] = field(default_factory=dict)
    """`{"bos_token": "<s>", ...}`, as templates see them"""
    added: dict[str, Added] = field(default_factory=dict)
    control: frozenset[str] = frozenset()
    """contents of tokens that no text may become"""
    add_bos: bool | None = None
    add_eos: bool | None = None
    legacy: bool = False
    """text after a control token begins with a space of the model's own, as text at the start does"""
    ends: tuple[int, ...] = ()
    """ids that end generation, by generation_config.json"""
    templates: dict[str, str] = field(default_factory=dict)


def read(files: dict[str, bytes]) -> Special:
    """From the bytes of tokenizer_config.json and its siblings. Raises DataError that names the file and the key."""
    config = _object(files, "tokenizer_config.json")
    try:
        return _read(files, config)
    except DataError as error:
        place = "" if str(error).startswith(FILES) else "tokenizer_config.json: "
        raise DataError(f"{place}{error}") from None


def _read(files: dict[str, bytes], config: dict) -> Special:
    named = _object(files, "special_tokens_map.json") | {k: v for k, v in config.items() if v is not None}
    names, control = {}, set()
    for key, value in named.items():
        if key.endswith("_token") and not key.startswith("add_") and value is not None:
            names[key] = _content(value, key)
        elif key in ("additional_special_tokens", "extra_special_tokens") and value:
            _expect(value, (list, dict), key)
            control |= {_content(item, key) for item in (value.values() if isinstance(value, dict) else value)}
    added = _added(files, config)
    control |= {*names.values(), *(a.content for a in added.values() if a.special)}
    return Special(
        names,
        added,
        frozenset(control - {""}),
        add_bos=_flag(config, "add_bos_token"),
        add_eos=_flag(config, "add_eos_token"),
        legacy=bool(_flag(config, "legacy")),
        ends=_ends(_object(files, "generation_config.json")),
        templates=_templates(files, config),
    )


def _added(files: dict[str, bytes], config: dict) -> dict[str, Added]:
    listed = config.get("added_tokens_decoder")
    if listed is None:  # an older folder: `{"<|im_end|>": 32000}`
        older = _object(files, "added_tokens.json")
        return {content: Added(content, _id(i, "added_tokens.json")) for content, i in older.items()}
    _expect(listed, dict, "added_tokens_decoder")
    return {a.content: a for a in (added(raw, _id(i, "added_tokens_decoder")) for i, raw in listed.items())}


def added(raw: dict, i: int | None = None) -> Added:
    """One entry of `added_tokens` or of `added_tokens_decoder`. Raises DataError."""
    _expect(raw, dict, "added token")
    flags = {key: raw[key] for key in ("special", "lstrip", "rstrip", "single_word", "normalized") if key in raw}
    for key, value in flags.items():
        _expect(value, bool, f"{key} of an added token")
    i = _id(raw.get("id"), "added_tokens") if i is None else i
    return Added(_content(raw, "added token"), i, **flags)


def _templates(files: dict[str, bytes], config: dict) -> dict[str, str]:
    """The default template under the name `default`; a file beside the config wins over what the config holds."""
    found = config.get("chat_template") or _object(files, "chat_template.json").get("chat_template") or {}
    if isinstance(found, str):
        found = {"default": found}
    if isinstance(found, list):
        try:
            found = {item["name"]: item["template"] for item in found}
        except (TypeError, KeyError):
            raise DataError("chat_template: a list of templates needs a name and a template in each") from None
    if not isinstance(found, dict) or not all(isinstance(x, str) for pair in found.items() for x in pair):
        raise DataError("chat_template: expected a text, or a list of named ones")
    if "chat_template.jinja" in files:
        found = found | {"default": text(files, "chat_template.jinja")}
    more = {n.split("/")[1].removesuffix(".jinja"): n for n in files if n.startswith(MORE_TEMPLATES)}
    return found | {name: text(files, file) for name, file in more.items()}


def _ends(generation: dict) -> tuple[int, ...]:
    found = generation.get("eos_token_id")
    return tuple(_id(i, "generation_config.json: eos_token_id") for i in _list(found))


def _list(value) -> list:
    return (
        [] if value is None else list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value]
    )


def _id(value, key: str) -> int:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 31:
        raise DataError(f"{key}: {value!r} is not a token id")
    return value


def _flag(config: dict, key: str) -> bool | None:
    value = config.get(key)
    if value is not None:
        _expect(value, bool, key)
    return value


def _content(value, key: str) -> str:
    """A token is written as its text or as an object that holds it."""
    content = value.get("content") if isinstance(value, dict) else value
    _expect(content, str, key)
    return content


def _expect(value, kind, key: str) -> None:
    if not isinstance(value, kind):
        raise DataError(f"{key}: {value!r:.60} is a {type(value).__name__}, which it cannot be")


def text(files: dict[str, bytes], name: str) -> str:
    """A file of text. Raises DataError where it is not UTF-8."""
    try:
        return files[name].decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not UTF-8 at byte {error.start}") from None


def _object(files: dict[str, bytes], name: str) -> dict:
    return parse(files, name) if name in files else {}


def parse(files: dict[str, bytes], name: str) -> dict:
    """A JSON file that holds an object. Raises DataError with the line."""
    try:
        found = json.loads(text(files, name))
    except json.JSONDecodeError as error:
        raise DataError(f"{name}: not JSON at line {error.lineno}, column {error.colno}: {error.msg}") from None
    except (RecursionError, ValueError) as error:
        raise DataError(f"{name}: not JSON that can be read: {error}") from None
    if not isinstance(found, dict):
        raise DataError(f"{name}: expected an object, found a {type(found).__name__}")
    return found
