"""Typed settings: frozen dataclasses, read from YAML, overridden as `section.key=value`.

Each room owns its own settings class; this file only knows how to read, check, print and compare them.
"""

import dataclasses
import typing
from pathlib import Path

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from jaxllm.errors import SettingsError, nearest

#: Decorator of a settings class: frozen, hashable, checked on construction, unknown keys refused.
#: The string under each field is its documentation (`--print-config` shows it).
settings = dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))

S = typing.TypeVar("S")


def config_dir() -> Path:
    """The folder of the configs that ship with jaxllm: inside the wheel, or beside the package in a checkout."""
    package = Path(__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def load(cls: type[S], source: str | Path | dict | None = None, overrides: typing.Sequence[str] = ()) -> S:
    """Settings of type `cls` from a YAML file (or a dict), with `section.key=value` overrides applied on top.

    Where a section holds a string instead of keys (`model: demo`), the string names a YAML file: a path beside
    the file that says so, or a shipped one (`configs/models/demo.yaml`).
    Raises SettingsError that names the key, the nearest known key, and the file.
    """
    return parse(cls, *merge(cls, source, overrides))


def merge(cls, source=None, overrides: typing.Sequence[str] = ()) -> tuple[dict, str]:
    """The plain dict that `load` checks, and what to call it in errors."""
    where, folder, raw = "settings", Path.cwd(), {}
    if isinstance(source, dict):
        raw = source
    elif source is not None:
        path = find(str(source), "runs", Path.cwd())
        where, folder, raw = str(path), path.parent, read_yaml(path)
        if not raw:
            raise SettingsError(f"{path}: holds no settings; for an example see {config_dir() / 'runs' / 'demo.yaml'}")
    raw = _expand(cls, raw, folder)
    for text in overrides:
        raw = _override(cls, raw, text)
    return raw, where


def parse(cls: type[S], raw: dict, where: str = "settings") -> S:
    """Checks a plain dict against `cls`. Raises SettingsError."""
    _refuse_booleans(cls, raw, where)
    try:
        return TypeAdapter(cls).validate_python(raw)
    except ValidationError as error:
        lines = [_explain(cls, item) for item in error.errors()]
        raise SettingsError(f"{where}: " + "\n".join(dict.fromkeys(lines))) from None


def read_yaml(path: Path) -> dict:
    """A YAML file as a dict. Raises SettingsError for a missing, undecodable or malformed file."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path}: not UTF-8 at byte {error.start}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise SettingsError(f"{path}: not valid YAML{line}: {getattr(error, 'problem', error)}") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise SettingsError(f"{path}: expected `key: value` lines, found a {type(raw).__name__}")
    return raw


def find(name: str, kind: str, folder: Path) -> Path:
    """The YAML file that `name` means: a path (from `folder` or here), or a shipped config of that kind."""
    shipped = config_dir() / kind
    for path in (folder / name, Path(name), shipped / f"{name}.yaml", shipped / name):
        if path.is_file():
            return path
    known = [p.stem for p in shipped.glob("*.yaml")]
    raise SettingsError(f"no such settings file: {name}{nearest(Path(name).stem, known)}")


def to_dict(value) -> typing.Any:
    """Settings as plain dicts, lists and scalars: what YAML and JSON hold."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: to_dict(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_dict(item) for item in value]
    return value


def flatten(value, prefix: str = "") -> dict[str, typing.Any]:
    """`{"section.key": scalar}` of settings or of the dict that `to_dict` gives."""
    value = to_dict(value)
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None or not value:
        return {prefix: value}
    out = {}
    for key, item in items:
        out |= flatten(item, f"{prefix}.{key}" if prefix else str(key))
    return out


def diff(old, new) -> dict[str, tuple]:
    """`{"section.key": (old value, new value)}` wherever two settings (or their dicts) differ."""
    a, b = flatten(old), flatten(new)
    return {key: (a.get(key), b.get(key)) for key in a | b if a.get(key) != b.get(key)}


def changed(value) -> dict[str, typing.Any]:
    """`{"section.key": value}` of the settings that differ from their defaults; required ones count."""
    out = {}
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        if item != _default(field):
            out |= _changed(item, field.name)
    return out


def _changed(item, name: str) -> dict[str, typing.Any]:
    if isinstance(item, tuple) and any(dataclasses.is_dataclass(x) for x in item):
        return {k: v for i, x in enumerate(item) for k, v in _changed(x, f"{name}.{i}").items()}
    if dataclasses.is_dataclass(item):
        return {f"{name}.{key}": v for key, v in changed(item).items()} or {name: {}}
    return flatten(item, name)


def describe(value, indent: int = 0) -> str:
    """Settings as YAML text, each line with its meaning as a comment."""
    lines = []
    for field in dataclasses.fields(value):
        item, meaning = getattr(value, field.name), _meaning(type(value), field.name)
        lines += _describe(field.name + ":", item, meaning, " " * indent)
    return "\n".join(lines)


def _describe(head: str, item, meaning: str, pad: str) -> list[str]:
    comment = f"  # {meaning}" if meaning else ""
    if dataclasses.is_dataclass(item):
        return [f"{pad}{head}{comment}", describe(item, len(pad) + 2)]
    if isinstance(item, tuple) and any(dataclasses.is_dataclass(x) for x in item):
        lines = [f"{pad}{head}{comment}"]
        for element in item:
            body = describe(element, len(pad) + 4)
            lines.append(f"{pad}  - {body.lstrip()}")
        return lines
    text = yaml.safe_dump(to_dict(item), default_flow_style=True, width=10_000).split("\n...")[0].strip()
    line = f"{pad}{head} {text}"
    return [f"{line:<44}{comment}" if comment else line]


def _meaning(cls, name: str) -> str:
    text = cls.__pydantic_fields__[name].description or ""
    return " ".join(text.split())


def _default(field):
    if field.default is not dataclasses.MISSING:
        value = field.default
        if type(value).__name__ == "FieldInfo":
            value = value.get_default(call_default_factory=True)
        return value
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else dataclasses.MISSING


def _section(annotation):
    """The settings class behind an annotation (`X`, `X | None`, `tuple[X, ...]`, `dict[str, X]`), or None."""
    if dataclasses.is_dataclass(annotation):
        return annotation
    for inner in typing.get_args(annotation):
        if found := _section(inner):
            return found
    return None


def _fields(cls) -> dict[str, typing.Any]:
    return {name: info.annotation for name, info in cls.__pydantic_fields__.items()}


def _expand(cls, raw, folder: Path):
    """Replaces a string that stands for a section by the file it names, at any depth."""
    if not isinstance(raw, dict):
        return raw
    out = dict(raw)
    for key, annotation in _fields(cls).items():
        section = _section(annotation)
        if section is None or key not in out:
            continue
        if isinstance(out[key], str) and dataclasses.is_dataclass(annotation):
            path = find(out[key], key + "s", folder)
            out[key] = _expand(section, read_yaml(path), path.parent)
        else:
            out[key] = _expand(section, out[key], folder)
    return out


def _override(cls, raw: dict, text: str) -> dict:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise SettingsError(f"override {text!r}: write it as section.key=value")
    try:
        value = yaml.safe_load(value) if value.strip() else None
    except yaml.YAMLError:
        raise SettingsError(f"override {text!r}: the value is not valid YAML") from None
    parts = key.strip().split(".")
    return _set(cls, raw, parts, value, ".".join(parts))


def _set(cls, raw, parts: list[str], value, whole: str):
    """A copy of `raw` with the value at `parts` replaced; keys are checked on the way down."""
    head, rest = parts[0], parts[1:]
    if isinstance(raw, (list, tuple)):
        if not head.isdigit() or int(head) >= len(raw):
            raise SettingsError(
                f"{whole}: {head} is not an index into the {len(raw)} entries there (0 to {len(raw) - 1})"
            )
        out = list(raw)
        out[int(head)] = _set(cls, out[int(head)], rest, value, whole) if rest else value
        return out
    if raw is not None and not isinstance(raw, dict):
        raise SettingsError(f"{whole}: {raw!r} has no key {head}")
    annotation = None
    if cls is not None:
        fields = _fields(cls)
        if head not in fields:
            raise SettingsError(f"unknown setting {whole}{_nearest_path(cls, whole, parts)}")
        annotation = fields[head]
    out = dict(raw or {})
    if not rest:
        out[head] = _expand(cls, {head: value}, Path.cwd())[head] if cls is not None else value
        return out
    free = _has_free_keys(annotation)
    section = None if free else _section(annotation)
    if section is None and not free and not isinstance(out.get(head), (dict, list)):
        raise SettingsError(f"unknown setting {whole}: {head} has no keys of its own")
    out[head] = _set(section, out.get(head), rest, value, whole)
    return out


def _has_free_keys(annotation) -> bool:
    """Whether the value is a dict with keys of the user's choice (`dict[str, X]`, `dict[str, X] | None`)."""
    return typing.get_origin(annotation) is dict or any(map(_has_free_keys, typing.get_args(annotation)))


def _nearest_path(cls, whole: str, parts: list[str]) -> str:
    prefix = whole.removesuffix(".".join(parts))
    return nearest(parts[0], _fields(cls)).replace("did you mean ", f"did you mean {prefix}")


def _refuse_booleans(annotation, value, where: str, path: str = "") -> None:
    """Raises SettingsError for yes or no where a number is wanted; pydantic would read them as 1 and 0."""
    if (
        isinstance(value, bool)
        and not _takes(annotation, bool)
        and (_takes(annotation, int) or _takes(annotation, float))
    ):
        raise SettingsError(f"{where}: {path}={value!r}: input should be a number, not yes or no")
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    section = _section(annotation)
    for key, item in items:
        inside = (
            _fields(section).get(key)
            if isinstance(value, dict) and section and not _has_free_keys(annotation)
            else annotation
        )
        _refuse_booleans(inside, item, where, f"{path}.{key}" if path else str(key))


def _takes(annotation, kind: type) -> bool:
    return annotation is kind or any(_takes(inner, kind) for inner in typing.get_args(annotation))


def _explain(cls, item: dict) -> str:
    """One line for one pydantic error: the dotted path, what is wrong, and the nearest known key."""
    loc, value = [str(part) for part in item["loc"]], item["input"]
    path, owner = ".".join(loc), cls
    for part in loc[:-1]:
        fields = _fields(owner) if owner is not None else {}
        owner = _section(fields[part]) if part in fields else owner
    known = owner.__pydantic_fields__ if owner is not None else {}
    if item["type"] == "unexpected_keyword_argument":
        return f"unknown setting {path}{nearest(loc[-1], known)}"
    if item["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{path} is required"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return f"{path}: {message}" if path else message
    field = known.get(loc[-1]) if loc else None
    if value is None and field is not None and not field.is_required():
        return f"{path}=null: leave it out, or set a value (default {field.get_default(call_default_factory=True)!r})"
    if item["type"] == "tuple_type" and field is not None:
        return f"{path}={value!r}: write it as a list, {loc[-1]}: {_form(field.annotation)}"
    return f"{path}={value!r}: {message[0].lower()}{message[1:]}"


def _form(annotation) -> str:
    """What a list is to look like: `[{name: ..., path: ...}, ...]`, with the settings that have no default."""
    section = _section(annotation)
    required = [name for name, info in section.__pydantic_fields__.items() if info.is_required()] if section else []
    inside = "{" + ", ".join(f"{name}: ..." for name in required) + "}, " if required else ""
    return f"[{inside}...]"
