"""Chat templates: a conversation to token ids, with control pieces from the template alone."""

import json
import re
from functools import cache

import numpy as np
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxllm.errors import DataError, nearest

ROLES = ("system", "user", "assistant", "tool")
#: Control pieces that every tokenizer trained here reserves.
MARKERS = (*(f"<|{role}|>" for role in ROLES), "<|end|>")

DEFAULT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}{{ '<|' ~ message.role ~ '|>' }}{{ message.content }}{{ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def render(tokenizer, messages: list[dict], *, add_generation_prompt: bool = False) -> np.ndarray:
    """int32 ids of `messages` (`[{"role": "user", "content": "..."}]`) under the tokenizer's chat template.

    Text of a message never becomes a control piece, whatever it says. Raises DataError for an unknown role or a
    template that fails. The template runs in jinja's immutable sandbox.
    """
    guard = _unused(json.dumps(messages, ensure_ascii=False))
    text = _render(tokenizer, [_message(m, guard) for m in messages], add_generation_prompt)
    control = ("<bos>", "<eos>", *MARKERS)
    ids = []
    for part in re.split("(" + "|".join(map(re.escape, control)) + ")", text):
        if part in control:
            ids.append([tokenizer.id(part)])
        elif part:
            ids.append(tokenizer.encode(part.replace(guard, "")))
    return np.concatenate(ids, dtype=np.int32) if ids else np.zeros(0, np.int32)


def _message(message: dict, guard: str) -> dict:
    if message.get("role") not in ROLES:
        raise DataError(f"unknown role {message.get('role')!r}{nearest(str(message.get('role')), ROLES)}")
    if "content" not in message:
        raise DataError(f"a message of the role {message['role']} has no content (keys: {', '.join(message)})")
    return {key: value if key == "role" else _guarded(value, guard) for key, value in message.items()}


def _guarded(value, guard: str):
    """Puts `guard` after every `<` of the user's strings, so that no control piece can start there."""
    if isinstance(value, str):
        return value.replace("<", "<" + guard)
    if isinstance(value, dict):
        return {key: _guarded(item, guard) for key, item in value.items()}
    return [_guarded(item, guard) for item in value] if isinstance(value, (list, tuple)) else value


def _unused(text: str) -> str:
    """A Unicode noncharacter that the conversation does not hold."""
    guard = next((c for c in map(chr, range(0xFDD0, 0xFDF0)) if c not in text), None)
    if guard is None:
        raise DataError("the conversation holds all the noncharacters U+FDD0 to U+FDEF; remove one of them")
    return guard


def _render(tokenizer, messages: list[dict], add_generation_prompt: bool) -> str:
    try:
        return _compile(tokenizer.template).render(
            messages=messages, add_generation_prompt=add_generation_prompt, bos_token="<bos>", eos_token="<eos>"
        )
    except TemplateError as error:
        raise DataError(f"the chat template failed: {error}") from None


@cache
def _compile(template: str):
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = _refuse
    return environment.from_string(template)


def _refuse(message: str):
    raise TemplateError(message)
