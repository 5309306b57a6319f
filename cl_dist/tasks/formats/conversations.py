"""Conversations: lists of messages, as chat models learn them (`role`/`content`, or ShareGPT's `from`/`value`).

A conversation with a system prompt or several answers becomes an `Example` with `turns`. What a model learns from it
depends on its chat template (`cl_dist.tasks.stream`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cl_dist.config.words import listed, show
from cl_dist.errors import BadInput
from cl_dist.tasks.formats.files import check_encodable, json_type, no_field
from cl_dist.tasks.types import Example, Role, Turn

ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "human": "user",
    "gpt": "assistant",
}
"""Names of roles in data, `human` and `gpt` being ShareGPT's."""
ROLE_KEYS = {"role": "content", "from": "value"}
"""The key of a message's role, and that of its text."""
TOOL_KEYS = ("tool_calls", "function_call", "tool_call_id")


def read_conversation(messages: object, field: str) -> Example:
    """The conversation in a record's field. Raises BadInput, which names the message, if it cannot be learnt."""
    if not isinstance(messages, list) or not messages:
        what = "an empty list" if isinstance(messages, list) else json_type(messages)
        raise BadInput(f"field {field!r} must be a list of messages, not {what}")
    turns = [_turn(message, f"field {field!r}, message {number}") for number, message in enumerate(messages)]
    _check_order(turns, field)
    last = len(turns) - 1
    empty = next((number for number, turn in enumerate(turns) if not turn.content.strip() and number != last), None)
    if empty is not None:
        raise BadInput(f"field {field!r}, message {empty}: its text is empty")
    return from_turns(turns)


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
    _refuse_tools(message, where)
    if ROLE_KEYS[key] not in message:
        raise BadInput(f"{where}: {no_field(message, ROLE_KEYS[key])}")
    text = message[ROLE_KEYS[key]]
    if not isinstance(text, str):
        raise BadInput(f"{where}: {ROLE_KEYS[key]!r} must be a string, not {json_type(text)}")
    check_encodable(text, where)
    return Turn(role, text.strip() if role == "assistant" else text)


def _role(message: Mapping[str, Any], key: str, where: str) -> Role:
    written = message[key]
    role = ROLES.get(written) if isinstance(written, str) else None
    if role is None:
        tool = " (tool calls cannot be learnt)" if written in ("tool", "function", "ipython", "observation") else ""
        raise BadInput(f"{where}: {key} {show(written)} is not allowed{tool}; allowed: {listed(ROLES, last='or')}")
    return role


def _refuse_tools(message: Mapping[str, Any], where: str) -> None:
    """Refuse what would be lost: calls of tools, and answers that are marked as not to be learnt."""
    found = next((key for key in TOOL_KEYS if message.get(key)), None)
    if found is not None:
        raise BadInput(f"{where}: {found!r} is not allowed (tool calls cannot be learnt); allowed: plain text")
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
