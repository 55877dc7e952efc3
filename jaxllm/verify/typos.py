"""Row 11: settings with one wrong letter."""

import random as random_of
import re
import string
import typing

from jaxllm import config as settings_of
from jaxllm.errors import SettingsError
from jaxllm.train.config import RunConfig
from jaxllm.verify.lab import Found, Lab

#: Of the typos, so many must be answered with the setting that was meant.
NEAREST = 0.95


def typos(lab: Lab) -> Found:
    """One-edit typos over all the settings: each refused, and the nearest setting named."""
    known, base, cases = paths(RunConfig), entries(RunConfig), lab.count(300, 3000)
    failures, right, wrong = [], 0, []
    for number in range(cases):
        path, siblings = lab.random.choice(known)
        head, _, key = path.rpartition(".")
        typo = mistyped(key, siblings, lab.random)
        whole = f"{head}.{typo}" if head else typo
        try:
            if number % 2:
                settings_of.merge(RunConfig, base, [f"{whole}=1"])
            else:
                settings_of.parse(RunConfig, written(base, whole.split(".")))
        except SettingsError as error:
            if f"unknown setting {whole}" not in str(error):  # what else the settings lack is refused as well
                failures.append(f"{whole} was not refused")
            meant = re.search(rf"unknown setting {re.escape(whole)}; did you mean ([\w.]+)\?", str(error))
            near = meant is not None and meant[1] == (path if number % 2 else key)
            right += near
            wrong += [] if near else [f"{whole} -> {meant[1] if meant else 'nothing'}"]
        else:
            failures.append(f"{whole} was accepted")
    if right < NEAREST * cases:
        failures.append(f"the right setting was named for {right} of {cases}; not for {', '.join(wrong[:5])}")
    figure = f"{cases} typos over {len(known)} settings, in files and overrides, refused, {right} with the right one"
    return Found(cases, tuple(failures), figure)


def written(raw, parts: list[str]):
    """The settings with the value 1 at `parts`, as a file might say it."""
    head, *rest = parts
    if isinstance(raw, list):
        return [written(raw[0], rest)]
    return raw | {head: written(raw.get(head, {}), rest) if rest else 1}


def paths(cls, prefix: str = "", depth: int = 0) -> list[tuple[str, frozenset[str]]]:
    """`(dotted path, the names beside it)` of every setting; entries of a list are its first one."""
    fields, out = settings_of._fields(cls), []
    for name, annotation in fields.items():
        out.append((f"{prefix}{name}", frozenset(fields)))
        if (section := _inside(annotation, depth)) is not None:
            out += paths(section, f"{prefix}{name}.{'0.' if _is_list(annotation) else ''}", depth + 1)
    return out


def entries(cls, depth: int = 0) -> dict:
    """Settings in which each list has an entry, so that there is something to mistype in it."""
    out = {}
    for name, annotation in settings_of._fields(cls).items():
        if (section := _inside(annotation, depth)) is not None:
            inside = entries(section, depth + 1)
            out |= {name: [inside]} if _is_list(annotation) else {name: inside} if inside else {}
    return out


def _inside(annotation, depth: int):
    """The settings class behind an annotation, but where keys are of the user's choice."""
    return None if depth > 4 or settings_of._has_free_keys(annotation) else settings_of._section(annotation)


def _is_list(annotation) -> bool:
    return typing.get_origin(annotation) in (tuple, list) or any(map(_is_list, typing.get_args(annotation)))


def mistyped(key: str, known: frozenset[str], random: random_of.Random) -> str:
    """`key` with a letter dropped, added, replaced, or two exchanged, so that it is none of the known ones."""
    while True:
        at, letter = random.randrange(len(key)), random.choice(string.ascii_lowercase)
        edits = [key[:at] + letter + key[at:], key[:at] + letter + key[at + 1 :]]
        if len(key) > 1:
            edits += [key[:at] + key[at + 1 :], key[:at] + key[at : at + 2][::-1] + key[at + 2 :]]
        if (typo := random.choice(edits)) not in known:
            return typo
