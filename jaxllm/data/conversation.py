"""Conversations out of records: `messages`, prompt and completion, or instruction and output, told apart by keys."""

import json
from typing import Any, NamedTuple

from jaxllm.errors import DataError, nearest

#: The keys that make a record one of the three forms; all other keys are none of ours.
FORMS = (("messages",), ("prompt", "completion"), ("instruction", "output"))
WANTED = "expected messages, or prompt and completion, or instruction and output"


class Conversation(NamedTuple):
    """What a chat template takes, and which part of it is to be learnt."""

    messages: list[dict]
    """`[{"role": "user", "content": "..."}, ...]`"""
    tools: list | None = None
    """JSON schemas of the tools that the assistant may call"""
    first: int = 0
    """the first message whose answers are learnt; those before are the prompt"""
    plain: bool = False
    """a prompt and a completion that are mere text, which needs no template"""

    @property
    def text(self) -> str:
        """What is said, without roles: text for a tokenizer to be trained on."""
        return "\n".join(message.get("content") or "" for message in self.messages)

    @property
    def key(self) -> bytes:
        """What tells it from others, whatever the template: copies are held out together."""
        return json.dumps(self, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")


def conversation(record: Any) -> Conversation:
    """The conversation of one line. Raises DataError that says what was found and what is expected.

    Roles are checked by the template that renders it.
    """
    if not isinstance(record, dict):
        raise DataError(f"{WANTED} in an object, found a {type(record).__name__}")
    form = next((keys for keys in FORMS if all(record.get(key) is not None for key in keys)), None)
    if form is None:
        raise DataError(_unknown(record))
    found = {"messages": _messages, "prompt": _pair, "instruction": _alpaca}[form[0]](record)
    tools = record.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise DataError(f"tools holds a {type(tools).__name__}, expected a list of JSON schemas")
    roles = [message["role"] for message in found.messages[found.first :]]
    if "assistant" not in roles:
        raise DataError(f"no turn of the assistant to learn from (roles: {', '.join(map(str, roles))})")
    return found._replace(tools=tools or None)


def pair(record: Any) -> tuple[Conversation, Conversation]:
    """The chosen and the rejected conversation of one line. Raises DataError that says what was found.

    `prompt`, `chosen` and `rejected` are three strings or three lists of messages; without a prompt, chosen and
    rejected are whole conversations, and what they have in common at the start is the prompt.
    """
    wanted = "expected prompt, chosen and rejected, or chosen and rejected conversations"
    if not isinstance(record, dict):
        raise DataError(f"{wanted} in an object, found a {type(record).__name__}")
    if missing := [key for key in ("chosen", "rejected") if record.get(key) is None]:
        raise DataError(f"{wanted}; {missing[0]} is missing (keys: {', '.join(record)}){nearest(missing[0], record)}")
    if record.get("prompt") is not None:
        rest = {key: value for key, value in record.items() if key in ("prompt", "tools")}
        both = tuple(conversation(rest | {"completion": record[key]}) for key in ("chosen", "rejected"))
    else:
        both = tuple(_checked(record[key], key) for key in ("chosen", "rejected"))
        common = next((i for i, (a, b) in enumerate(zip(*both, strict=False)) if a != b), min(map(len, both)))
        both = tuple(conversation({"messages": m, "tools": record.get("tools")})._replace(first=common) for m in both)
    if both[0] == both[1]:
        raise DataError("chosen and rejected are the same")
    return both


def prompt(record: Any) -> Conversation:
    """What one line asks for: all before the last answers of a conversation. Raises DataError that says what was found.

    `prompt` is a string or a list of messages; or a line is as for `conversation`, with its last answers or without.
    """
    if not isinstance(record, dict):
        raise DataError(f"expected a prompt, messages or an instruction in an object, found a {type(record).__name__}")
    tools = record.get("tools") or None
    if isinstance(record.get("prompt"), str):
        return Conversation([_said("user", record["prompt"])], tools, plain=True)
    if record.get("prompt") is not None:
        messages = _checked(record["prompt"], "prompt")
    elif record.get("messages") is not None:
        messages = list(_checked(record["messages"], "messages"))
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
    elif record.get("instruction") is not None:
        messages = _alpaca({"output": "", **record}).messages[:-1]
    else:
        raise DataError(f"expected prompt, messages or instruction; found the keys {', '.join(record) or 'none'}")
    if not messages:
        raise DataError("it has no turn before the assistant's, so there is nothing to answer")
    return Conversation(messages, tools)


def _messages(record: dict) -> Conversation:
    return Conversation(_checked(record["messages"], "messages"))


def _pair(record: dict) -> Conversation:
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return Conversation([_said("user", prompt), _said("assistant", completion)], first=1, plain=True)
    if isinstance(prompt, str) or isinstance(completion, str):
        kinds = f"a {type(prompt).__name__} and a {type(completion).__name__}"
        raise DataError(f"prompt and completion hold {kinds}, expected two strings or two lists of messages")
    messages = _checked(prompt, "prompt")
    return Conversation(messages + _checked(completion, "completion"), first=len(messages))


def _alpaca(record: dict) -> Conversation:
    texts = {key: record[key] for key in ("system", "instruction", "input", "output") if record.get(key) is not None}
    for key, value in texts.items():
        _expect(value, str, key, "a string")
    system = [_said("system", texts["system"])] if texts.get("system") else []
    asked = "\n\n".join(text for text in (texts["instruction"], texts.get("input")) if text)
    return Conversation([*system, _said("user", asked), _said("assistant", texts["output"])])


def _said(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def _checked(messages: Any, key: str) -> list[dict]:
    _expect(messages, list, key, "a list of messages")
    for k, message in enumerate(messages, 1):
        _expect(message, dict, f"{key}: message {k}", "an object with a role and a content")
        _expect(message.get("role"), str, f"{key}: message {k}: role", "a string")
        if message.get("content") is not None:
            _expect(message["content"], str, f"{key}: message {k}: content", "a string")
        if message.get("tool_calls") is not None:
            _expect(message["tool_calls"], list, f"{key}: message {k}: tool_calls", "a list")
    return messages


def _expect(value: Any, kind: type, place: str, wanted: str) -> None:
    if not isinstance(value, kind):
        found = "nothing" if value is None else f"a {type(value).__name__}"
        raise DataError(f"{place} holds {found}, expected {wanted}")


def _unknown(record: dict) -> str:
    half = [keys for keys in FORMS if any(record.get(key) is not None for key in keys)]
    if half:
        there, missing = ([k for k in half[0] if (record.get(k) is not None) == has] for has in (True, False))
        return f"{there[0]} stands there without {missing[0]} (keys: {', '.join(record)}){nearest(missing[0], record)}"
    close = [hint for key in record if (hint := nearest(key, [k for keys in FORMS for k in keys])).startswith("; did")]
    return f"{WANTED}; found the keys {', '.join(record) or 'none'}{close[0] if close else ''}"
