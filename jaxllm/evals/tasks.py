"""Task files: one question a line, as JSON; and the prompts that they give, with examples before them."""

import dataclasses
import json
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
from pydantic import Field

from jaxllm.config import parse, settings
from jaxllm.errors import DataError, SettingsError

KINDS = {"choices": "multiple_choice", "completion": "cloze", "answers": "exact_match"}


@settings
class Item:
    """One line of a task file; the key of the answer says which kind it is."""

    prompt: str | None = None
    """text before the answer, word for word"""
    question: str | None = None
    """instead of prompt: stands as `Question: ...`, and below it `Answer:`"""
    choices: tuple[str, ...] | None = None
    """multiple choice: texts of which the likeliest is chosen"""
    answer: int | None = None
    """multiple choice: which of them is right, from 0"""
    completion: str | None = None
    """cloze: the text to predict"""
    answers: tuple[str, ...] | None = None
    """exact match: what is right to say; examples show the first"""
    join: str = " "
    """between prompt and answer, where neither has white space there already"""
    stop: tuple[str, ...] = Field(default=("\n",), min_length=1)
    """exact match: texts that end what the model says"""
    max_tokens: int = Field(default=32, ge=1)
    """exact match: most tokens that the model may make"""

    def __post_init__(self):
        _one_of(self, ("prompt", "question"))
        key = _one_of(self, tuple(KINDS))
        if (key == "choices") != (self.answer is not None):
            raise ValueError("answer: belongs to choices, and choices need it (which of them is right, from 0)")
        if not all(text.strip() for text in self.options):
            raise ValueError(f"{key}: a text without a visible character cannot be told from none")
        if key == "choices" and not (len(self.choices) > 1 and 0 <= self.answer < len(self.choices)):
            raise ValueError(
                f"answer={self.answer} of {len(self.choices)} choices: give two choices or more, and count from 0"
            )
        if key == "answers" and not self.answers:
            raise ValueError("answers: give one at least")
        if key != "answers" and (self.stop != ("\n",) or self.max_tokens != 32):
            raise ValueError(f"stop and max_tokens would be ignored beside {key}: they belong to answers")
        if not all(self.stop):
            raise ValueError("stop: a text of at least one character")

    @property
    def kind(self) -> str:
        return next(kind for key, kind in KINDS.items() if getattr(self, key) is not None)

    @property
    def options(self) -> tuple[str, ...]:
        """What may be said: the choices, the completion, or the answers."""
        return self.choices or self.answers or ((self.completion,) if self.completion is not None else ())

    @property
    def context(self) -> str:
        return self.prompt if self.prompt is not None else f"Question: {self.question}\nAnswer:"

    def continuation(self, option: str) -> str:
        """The option as it follows the context."""
        meets = not self.context or self.context[-1].isspace() or option[0].isspace()
        return option if meets else self.join + option

    @property
    def example(self) -> str:
        """The item with its right answer."""
        return self.context + self.continuation(self.options[self.answer or 0])


@dataclasses.dataclass(frozen=True)
class Task:
    """The items of a file, all of one kind."""

    path: str
    items: tuple[Item, ...]
    lines: tuple[int, ...]
    """The line of each."""

    @cached_property
    def kind(self) -> str:
        return self.items[0].kind

    def where(self, i: int) -> str:
        return f"{self.path}: line {self.lines[i]}"


def read_task(path: str | Path) -> Task:
    """Reads and checks a task file. Raises DataError with the file and the line of what is wrong."""
    path = str(path)
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; name a .jsonl file with one item a line") from None
    items, lines = [], []
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        items.append(_item(line, f"{path}: line {number}"))
        lines.append(number)
        if items[-1].kind != items[0].kind:
            raise DataError(
                f"{path}: line {number} is {items[-1].kind} and line {lines[0]} is {items[0].kind}; "
                "a file holds one kind"
            )
    if not items:
        raise DataError(f"{path}: holds no items; write one JSON object a line")
    return Task(path, tuple(items), tuple(lines))


def prompts(task: Task, shots: int = 0, pool: Task | None = None, seed: int | None = None) -> list[str]:
    """The context of each item, after `shots` examples with their answers, a blank line between them.

    They are the first of `pool`, or of the task itself, that are not the same question; `seed` shuffles the examples
    first, alike for all items. Raises DataError for too few, or examples of another kind.
    """
    pool = pool or task
    if pool.kind != task.kind:
        raise DataError(f"the examples of {pool.path} are {pool.kind}, and {task.path} is {task.kind}")
    order = np.arange(len(pool.items)) if seed is None else np.random.default_rng(seed).permutation(len(pool.items))
    return ["\n\n".join([*_examples(task, i, pool, order, shots), item.context]) for i, item in enumerate(task.items)]


def _examples(task: Task, i: int, pool: Task, order: np.ndarray, shots: int) -> list[str]:
    others = (pool.items[k] for k in order)
    found = list(islice((other.example for other in others if not _twins(other, task.items[i])), shots))
    if len(found) < shots:
        raise DataError(f"{task.where(i)}: {shots} shots were asked for, and {pool.path} has {len(found)} other items")
    return found


def _twins(one: Item, other: Item) -> bool:
    """Whether one would give away the other's answer."""
    return one.example == other.example or one.context == other.context != ""


def _item(line: bytes, where: str) -> Item:
    try:
        raw = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 at byte {error.start} of the line") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{where}, column {error.colno}: not JSON: {error.msg}") from None
    if not isinstance(raw, dict):
        raise DataError(f"{where}: expected an object such as {{...}}, found a {type(raw).__name__}")
    if isinstance(raw.get("stop"), str):
        raw["stop"] = [raw["stop"]]
    try:
        return parse(Item, raw, where)
    except SettingsError as error:
        raise DataError(str(error).replace("unknown setting", "unknown key")) from None


def _one_of(item: Item, keys: tuple[str, ...]) -> str:
    given = [key for key in keys if getattr(item, key) is not None]
    if len(given) != 1:
        raise ValueError(f"give one of {', '.join(keys)}; found {' and '.join(given) or 'none'}")
    return given[0]
