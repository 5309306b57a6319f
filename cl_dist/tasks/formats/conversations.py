"""Conversations: lists of messages, as chat models learn them (`role`/`content`, or ShareGPT's `from`/`value`).

A conversation with a system prompt or several answers becomes an `Example` with `turns`. What a model learns from it
depends on its chat template (`cl_dist.tasks.stream`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cl_dist.config.words import listed, show
from cl_dist.errors import BadInput
from cl_dist.tasks.formats.files import check_encodable, json_type, no_field, require_once
from cl_dist.tasks.types import Example, Role, Turn

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "human": "user",
    "gpt": "assistant",
}
"""Names of roles in data: `developer` is OpenAI's newer name of the system prompt, `human` and `gpt` are ShareGPT's."""
ROLE_KEYS = {"role": "content", "from": "value"}
"""The key of a message's role, and that of its text."""
TOOL_KEYS = ("tool_calls", "function_call", "tool_call_id")
LOST_KEYS = ("reasoning_content", "reasoning", "thinking", "refusal", "audio", "images")
"""What a message may have beside its text, and what a model would not learn."""
SYSTEM, TOOLS = "system", ("tools", "functions")
"""Fields beside a conversation: its system prompt, and the tools that it may call."""
BESIDE = (SYSTEM, *TOOLS)


def read_conversation(record: Mapping[str, Any], field: str) -> Example:
    """The conversation in a record's field, after the system prompt in a field of its own (`BESIDE`).

    Raises BadInput, which names the message, if it cannot be learnt.
    """
    messages = record[field]
    if not isinstance(messages, list) or not messages:
        what = "an empty list" if isinstance(messages, list) else json_type(messages)
        raise BadInput(f"field {field!r} must be a list of messages, not {what}")
    turns = [_turn(message, f"field {field!r}, message {number}") for number, message in enumerate(messages)]
    _check_order(turns, field)
    last = len(turns) - 1
    empty = next((number for number, turn in enumerate(turns) if not turn.content.strip() and number != last), None)
    if empty is not None:
        raise BadInput(f"field {field!r}, message {empty}: its text is empty")
    return from_turns([*system_turns(record, inside=turns[0].role == "system"), *turns])


def system_turns(record: Mapping[str, Any], inside: bool = False) -> list[Turn]:
    """The system prompt in a field of its own, if the record has one. Raises BadInput if there is one `inside` the
    conversation too, or if the record has tools.
    """
    for name in BESIDE:
        require_once(record, name)
    tools = next((name for name in TOOLS if record.get(name) not in (None, "", "[]", [], {})), None)
    if tools is not None:
        raise BadInput(f"field {tools!r} is not allowed (tool calls cannot be learnt); leave it out")
    text = record.get(SYSTEM)
    if text is not None and not isinstance(text, str):
        raise BadInput(f"field {SYSTEM!r} must be a string, not {json_type(text)}")
    if text is None or not text.strip():
        return []
    if inside:
        raise BadInput(f"field {SYSTEM!r} is a second system prompt; the conversation starts with one")
    return [Turn("system", check_encodable(text, f"field {SYSTEM!r}"))]


def from_turns(turns: Sequence[Turn]) -> Example:
    """The sample whose answer is the last turn."""
    alone = len(turns) == 2
    return Example(plain_text(turns[:-1]), turns[-1].content, turns=() if alone else tuple(turns))


def plain_text(turns: Sequence[Turn]) -> str:
    """The turns before an answer as a prompt for models without a chat template.

    A system prompt stands above a blank line. A single question stands by itself; several turns are marked `User:` and
    `Assistant:`.
    """
    system = [turn.content for turn in turns if turn.role == "system"]
    others = [turn for turn in turns if turn.role != "system"]
    if len(others) == 1:
        return "\n\n".join([*system, others[0].content])
    marked = [f"{turn.role.capitalize()}: {turn.content}" for turn in others]
    return "\n\n".join([*system, "\n".join([*marked, "Assistant:"])])


def each_answer(example: Example) -> Iterator[Example]:
    """A sample for every answer of a conversation, with all turns before it; any other sample as it is."""
    if not example.turns:
        yield example
    for end, turn in enumerate(example.turns, start=1):
        if turn.role == "assistant":
            yield from_turns(example.turns[:end])


def has_several_answers(example: Example) -> bool:
    """Whether a sample is a conversation of more than one exchange."""
    return sum(turn.role == "assistant" for turn in example.turns) > 1


def _turn(message: object, where: str) -> Turn:
    if not isinstance(message, dict):
        raise BadInput(f"{where} must be an object with 'role' and 'content', not {json_type(message)}")
    key = next((key for key in ROLE_KEYS if key in message), None)
    if key is None:
        raise BadInput(f"{where}: {no_field(message, 'role')}")
    role = _role(message, key, where)
    _refuse_lost(message, where)
    if ROLE_KEYS[key] not in message:
        raise BadInput(f"{where}: {no_field(message, ROLE_KEYS[key])}")
    text = _text(message[ROLE_KEYS[key]], f"{where}: {ROLE_KEYS[key]!r}")
    check_encodable(text, where)
    return Turn(role, text.strip() if role == "assistant" else text)


def _text(content: object, what: str) -> str:
    """A message's text, which may come in parts: `[{"type": "text", "text": ...}]`, as for models that see pictures."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadInput(f"{what} must be a string, not {json_type(content)}")
    for number, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = show(part.get("type")) if isinstance(part, dict) else json_type(part)
            raise BadInput(f'{what}, part {number}: {kind} is not allowed; allowed: {{"type": "text", "text": ...}}')
    return "".join(part["text"] for part in content)


def _role(message: Mapping[str, Any], key: str, where: str) -> Role:
    written = message[key]
    role = ROLES.get(written) if isinstance(written, str) else None
    if role is None:
        tool = " (tool calls cannot be learnt)" if written in ("tool", "function", "ipython", "observation") else ""
        raise BadInput(f"{where}: {key} {show(written)} is not allowed{tool}; allowed: {listed(ROLES, last='or')}")
    return role


def _refuse_lost(message: Mapping[str, Any], where: str) -> None:
    """Refuse what would be lost: calls of tools, what stands beside the text, and the mark of an answer to skip."""
    found = next((key for key in TOOL_KEYS if message.get(key)), None)
    if found is not None:
        raise BadInput(f"{where}: {found!r} is not allowed (tool calls cannot be learnt); allowed: plain text")
    found = next((key for key in LOST_KEYS if message.get(key)), None)
    if found is not None:
        raise BadInput(
            f"{where}: {found!r} is not allowed (it would not be learnt); allowed: text in the message itself"
        )
    if message.get("weight") not in (None, 1):
        raise BadInput(f"{where}: weight {show(message['weight'])} is not allowed; every answer is learnt")


def _check_order(turns: Sequence[Turn], field: str) -> None:
    """Raise BadInput unless questions and answers alternate, after at most one system prompt."""
    start = 1 if turns[0].role == "system" else 0
    for number, turn in enumerate(turns[start:], start):
        expected = "user" if (number - start) % 2 == 0 else "assistant"
        if turn.role != expected:
            raise BadInput(
                f"field {field!r}, message {number} is of the {turn.role}; allowed: a system prompt at the start, then "
                "user and assistant in turn"
            )
    if turns[-1].role != "assistant":
        raise BadInput(
            f"field {field!r}: the conversation must end with an answer, and its last turn is of the {turns[-1].role}"
        )
