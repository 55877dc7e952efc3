"""Prompts that a teacher answers before a run begins; the student then learns from its answers as from any others."""

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from jaxllm import config as settings_of
from jaxllm.data.answers import Answers
from jaxllm.data.chat import end_of_turn
from jaxllm.data.config import DataConfig
from jaxllm.data.conversation import Conversation, prompt
from jaxllm.data.readers import located, records
from jaxllm.data.shards import digest
from jaxllm.data.sources import Source, files
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import DataError
from jaxllm.generate.decode import unstack
from jaxllm.generate.text import generate_text
from jaxllm.objectives.distill import DistillConfig
from jaxllm.sharding import Sharding
from jaxllm.train.reference import frozen_model, version_of

BATCH = 8


def answered(
    data: DataConfig, config: DistillConfig, tokenizer: Tokenizer, sharding: Sharding, say: Callable[[str], None]
) -> DataConfig:
    """The data with conversations in the place of prompts: the teacher's answers, kept in the folder of token stores.

    Raises DataError where the teacher finishes no answer.
    """
    model = None

    def replaced(source: Source) -> Source:
        nonlocal model
        if source.format != "prompts":
            return source
        asked = list(_prompts(source))
        answers = Answers(tokenizer)
        what = [version_of(config.teacher), tokenizer.hash, answers.hash, settings_of.to_dict(config.answers)]
        name = digest([*what, *(chat.key.hex() for chat in asked)])[:16]
        path = Path(os.path.expanduser(data.cache)) / "answers" / f"{name}.jsonl"
        if not path.exists():
            model = model or frozen_model(config.teacher, sharding, tokenizer, "distill.teacher", 1)
            say(f"{source.name}: {config.teacher} answers {len(asked):,} prompts")
            _write(path, _answer(*model, answers, asked, config, source.name, say))
        return dataclasses.replace(source, path=str(path), format="chat")

    return dataclasses.replace(
        data, sources=tuple(map(replaced, data.sources)), eval_sources=tuple(map(replaced, data.eval_sources))
    )


def _prompts(source: Source) -> Iterator[Conversation]:
    for path in files(source):
        for offset, record in records(path):
            with located(path, offset):
                asked = prompt(record)
            yield asked


def _answer(model, params, answers: Answers, asked: list[Conversation], config: DistillConfig, name: str, say):
    """A record for each prompt whose answer the teacher has finished."""
    tokenizer, options = answers.tokenizer, config.answers
    ids = [answers.prompt(chat) for chat in asked]
    room = model.config.context - options.max_tokens
    order = sorted((i for i in range(len(ids)) if len(ids[i]) <= room), key=lambda i: len(ids[i]))
    if not order:
        raise DataError(
            f"source {name}: no prompt has room for an answer of {options.max_tokens} tokens in the teacher's context "
            f"of {model.config.context}; set fewer distill.answers.max_tokens"
        )
    ends = sorted({*tokenizer.stop_ids, *([end_of_turn(tokenizer)] if tokenizer.template else [])} - {None})
    made, params = {}, unstack(params)
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        how = dict(max_tokens=options.max_tokens, temperature=options.temperature, seed=options.seed + start)
        found = generate_text(model, params, tokenizer, [ids[i] for i in rows], stop_ids=ends, continued=False, **how)
        made |= {i: one.text for i, one in zip(rows, found, strict=True) if one.finish == "stop" and one.text.strip()}
    if not made:
        raise DataError(
            f"source {name}: the teacher finished none of its {len(asked):,} answers in {options.max_tokens} tokens; "
            "set distill.answers.max_tokens, or take a teacher that ends its answers"
        )
    if left := len(asked) - len(made):
        say(f"{name}: {left:,} of {len(asked):,} prompts are left out: too long, or no answer that ended")
    for i, chat in enumerate(asked):
        if i in made:
            yield _record(chat, made[i])


def _record(chat: Conversation, text: str) -> dict:
    if chat.plain:
        return {"prompt": chat.messages[0]["content"], "completion": text}
    tools = {"tools": chat.tools} if chat.tools else {}
    return {"prompt": chat.messages, "completion": [{"role": "assistant", "content": text}]} | tools


def _write(path: Path, made: Iterator[dict]) -> None:
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in made]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text("".join(lines), encoding="utf-8")
    temporary.replace(path)
