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
    known, cases = paths(RunConfig), lab.count(300, 3000)
    failures, right, wrong = [], 0, []
    for _ in range(cases):
        path, siblings = lab.random.choice(known)
        head, _, key = path.rpartition(".")
        typo = mistyped(key, siblings, lab.random)
        whole = f"{head}.{typo}" if head else typo
        try:
            settings_of.merge(RunConfig, {"model": {"pattern": [{}]}, "data": {"sources": [{}]}}, [f"{whole}=1"])
        except SettingsError as error:
            meant = re.search(r"did you mean ([\w.]+)\?", str(error))
            near = meant is not None and meant[1] == path
            right += near
            wrong += [] if near else [f"{whole} -> {meant[1] if meant else 'nothing'}"]
        else:
            failures.append(f"{whole} was accepted")
    if right < NEAREST * cases:
        failures.append(f"the right setting was named for {right} of {cases}; not for {', '.join(wrong[:5])}")
    return Found(
        cases, tuple(failures), f"{cases} typos over {len(known)} settings refused, {right} with the right one"
    )


def paths(cls, prefix: str = "", depth: int = 0) -> list[tuple[str, frozenset[str]]]:
    """`(dotted path, the names beside it)` of every setting; entries of a list are its first one."""
    fields, out = settings_of._fields(cls), []
    for name, annotation in fields.items():
        out.append((f"{prefix}{name}", frozenset(fields)))
        section = settings_of._section(annotation)
        if section is None or depth > 4 or settings_of._has_free_keys(annotation):
            continue
        listed = "0." if _is_list(annotation) else ""
        if not listed or f"{prefix}{name}" in ("model.pattern", "data.sources"):  # lists that the base has
            out += paths(section, f"{prefix}{name}.{listed}", depth + 1)
    return out


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
