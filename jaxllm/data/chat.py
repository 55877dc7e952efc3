"""Chat: a conversation to token ids, with control tokens from the template alone."""

import json
import re
from typing import NamedTuple

import numpy as np

from jaxllm.data.template import run
from jaxllm.errors import DataError, nearest

ROLES = ("system", "user", "assistant", "tool")
#: Control pieces that every tokenizer trained here reserves.
MARKERS = (*(f"<|{role}|>" for role in ROLES), "<|end|>")

DEFAULT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}{{ '<|' ~ message.role ~ '|>' }}"
    "{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}{{ '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ message.content }}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
#: Names under which a message may hold its reasoning; templates read the first, and gpt-oss's the second.
REASONING = ("reasoning_content", "thinking", "reasoning")


class Rendered(NamedTuple):
    """`ids_N` int32; `mask_N` bool, true for what `{% generation %}` blocks hold."""

    ids_N: np.ndarray
    mask_N: np.ndarray


def render(
    backend, source: str, messages: list[dict], control: dict[str, int], given: dict, tokens: dict[str, str]
) -> Rendered:
    """The ids of `messages` (`[{"role": "user", "content": "..."}]`) under the template `source`.

    `control`: `{content: id}`; `given`: tools, documents and other variables of the caller; `tokens`: `bos_token` and
    its like. What the caller gives never becomes a control token, whatever it says, except that a role may choose
    between those of the template. Raises DataError for a message, a role or a template that cannot be.
    """
    if not messages:
        raise DataError("the conversation holds no messages")
    user = _plain({"messages": [_message(m, k, source) for k, m in enumerate(messages, 1)], **given})
    guard, *marks = _unused(user)
    text = _render(source, user, tokens, guard, tuple(marks), tuple(control))
    parts, flags = _parts(text, guard, marks, control)
    ids_N, spans_N2 = backend.encode_parts(parts, spans=any(flags))
    if spans_N2 is None:
        return Rendered(ids_N, np.zeros(len(ids_N), bool))
    before = np.concatenate([[0], np.cumsum(flags), [sum(flags)]])
    first, last = spans_N2.T
    # A byte of a character may cover no character of its own; it belongs where it stands.
    return Rendered(ids_N, before[np.maximum(last, first + 1)] > before[first])


def _render(source: str, user: dict, tokens: dict, guard: str, marks: tuple[str, str], control: tuple[str, ...]) -> str:
    """The template's text, with `guard` wherever the caller's text could be the start of a control token.

    Guarding every first character of one (each `<`) is safe, but hides `</think>` from a template that looks for it.
    Guarding only where three characters agree hides nothing but control tokens, but a template that cuts text and joins
    it again could make one. So the second is taken where it gives the same control tokens as the first.
    """
    careful = _guarded(user, guard, _starts(control))
    safe = run(source, careful | tokens, marks)
    if careful == user:
        return safe
    near = run(source, _guarded(user, guard, _fragments(control)) | tokens, marks)
    safe, near = (text.replace(json.dumps(guard)[1:-1], guard) for text in (safe, near))
    find = re.compile(_either(control))
    return near if find.findall(near) == find.findall(safe) and _bare(near, guard) != _bare(safe, guard) else safe


def _bare(text: str, guard: str) -> str:
    return text.replace(guard, "")


def _parts(text: str, guard: str, marks: list[str], control: dict[str, int]) -> tuple[list[str | int], list[bool]]:
    """Text and control ids in turn, and for each character (a control id counts as one) whether it is marked."""
    parts, flags, inside = [], [], False
    for piece in re.split(f"({_either((*marks, *control))})", text):
        if piece in marks:
            inside = piece == marks[0]
        elif piece in control:
            parts.append(control[piece])
            flags.append(inside)
        elif body := _bare(piece, guard):
            flags += [inside] * len(body)
            if parts and isinstance(parts[-1], str):
                parts[-1] += body
            else:
                parts.append(body)
    return parts, flags


def _either(texts) -> str:
    """A pattern for any of the texts, the longest first; for none, one that matches nothing."""
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)"


def _starts(control) -> re.Pattern:
    return re.compile(_either({content[0] for content in control}))


def _fragments(control) -> re.Pattern:
    """The first character of a control token whose next two follow, or as many as the text still has."""
    follow = "|".join(f"{re.escape(c[0])}(?={re.escape(c[1:3])}|{re.escape(c[1:2])}\\Z|\\Z)" for c in set(control))
    return re.compile(follow or "(?!)")


def _guarded(value, guard: str, pattern: re.Pattern):
    """Puts `guard` behind each match of `pattern` in the strings of a value, keys included."""
    if isinstance(value, str):
        return pattern.sub(lambda match: match[0] + guard, value)
    if isinstance(value, dict):
        return {_guarded(key, guard, pattern): _guarded(item, guard, pattern) for key, item in value.items()}
    return [_guarded(item, guard, pattern) for item in value] if isinstance(value, list) else value


def _message(message: dict, k: int, source: str) -> dict:
    """Message k without empty fields. Raises DataError for a role that the template does not know."""
    if not isinstance(message, dict):
        raise DataError(f"message {k}: a message is a dict with a role and a content, not a {type(message).__name__}")
    message = {key: value for key, value in message.items() if value is not None}
    role = message.get("role")
    if role not in ROLES and not (isinstance(role, str) and re.fullmatch(r"\w+", role) and role in source):
        raise DataError(f"message {k}: unknown role {role!r}{nearest(str(role), ROLES)}")
    if "content" not in message and "tool_calls" not in message:
        raise DataError(f"message {k}, of the role {role}, has no content (keys: {', '.join(map(str, message))})")
    reasoning = next((message[key] for key in REASONING if key in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _plain(value):
    """A copy of JSON's types alone, whose methods the sandbox knows. Raises DataError for others."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, dict) and all(type(key) is str for key in value):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    raise DataError(f"a conversation holds texts, numbers, lists and dicts with text keys, not {value!r:.60}")


def _unused(user: dict) -> list[str]:
    """Three Unicode noncharacters that the conversation does not hold, nor their escapes in JSON."""
    raw, escaped = json.dumps(user, ensure_ascii=False), json.dumps(user)
    free = [c for c in map(chr, range(0xFDD0, 0xFDF0)) if c not in raw and json.dumps(c)[1:-1] not in escaped.lower()]
    if len(free) < 3:
        raise DataError("the conversation holds nearly all the noncharacters U+FDD0 to U+FDEF; remove some")
    return free[:3]


def end_of_turn(tokenizer) -> int | None:
    """The control token with which the chat template ends an answer; None where it writes none."""
    said = [[{"role": "user", "content": "?"}, {"role": "assistant", "content": text}] for text in ("x", "y")]
    one, other = (tokenizer.render(messages).tolist() for messages in said)
    same = 0
    while same < min(len(one), len(other)) and one[-same - 1] == other[-same - 1]:
        same += 1
    return next((i for i in one[len(one) - same :] if not tokenizer.bytes_of[i]), None)
