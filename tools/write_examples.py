"""Write the data sets in examples/: made-up messages of customers to a shop, each with what it is about.

`python tools/write_examples.py` writes them; the tests compare them with what it would write. The words of a message
give its label away, so that even the tiny built-in model learns a task within seconds, and shows how it forgets it.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"
MESSAGES = 150
"""Messages in each file, a third of them with each label."""

SENTENCES: dict[str, dict[str, list[str]]] = {
    "billing": {
        "card": [
            "My {card} was declined {day}.",
            "Can I pay with another {card}?",
            "The payment by {card} failed {day}.",
            "How do I replace the {card} on my account?",
            "{hello} which {card} did you charge {day}?",
            "My bank blocked the {card} {day}.",
        ],
        "invoice": [
            "Please send me the {invoice} for {month}.",
            "The {invoice} for {month} shows the wrong address.",
            "I need a copy of the {invoice} for {month}.",
            "{hello} where do I find the {invoice} for {month}?",
            "Our accountant is missing the {invoice} for {month}.",
            "Can you add our tax number to the {invoice} for {month}?",
        ],
        "refund": [
            "I sent it back {day}, where is my money?",
            "When do I get my money back for {item}?",
            "I returned {item} {day} and got no money back.",
            "{hello} you owe me money for {item}.",
            "I want my money back for {item}.",
            "You took the money for {item} twice.",
        ],
    },
    "shipping": {
        "address": [
            "I moved, please send {item} to my new {address}.",
            "The {address} on my order is wrong.",
            "Can I change the {address} for {item}?",
            "{hello} I misspelt my {address}.",
            "Please deliver {item} to another {address}.",
            "Where can I correct the {address}?",
        ],
        "damaged": [
            "The parcel with {item} arrived {broken}.",
            "The box was {broken} when it came {day}.",
            "It is {broken}, please replace it.",
            "{hello} my parcel came {broken}.",
            "I opened the box and {item} was {broken}.",
            "Half of it is {broken}, what now?",
        ],
        "late": [
            "Where is {item}? It should have come {day}.",
            "I have been waiting for {item} for {time}.",
            "My order is {time} late.",
            "{hello} my parcel has not arrived for {time}.",
            "When will {item} come? I ordered it {day}.",
            "The tracking has not changed for {time}.",
        ],
    },
}
WORDS = {
    "address": ["address", "street", "house number"],
    "broken": ["broken", "cracked", "torn", "scratched", "wet"],
    "card": ["card", "credit card", "debit card", "bank card"],
    "day": ["yesterday", "last week", "on Monday", "this morning", "two days ago"],
    "hello": ["Hello,", "Hi there,", "Good morning,"],
    "invoice": ["invoice", "receipt", "bill"],
    "item": ["the lamp", "my chair", "the kettle", "the blue coat", "my phone case", "the desk"],
    "month": ["March", "April", "May", "June", "July"],
    "time": ["five days", "a week", "ten days", "two weeks"],
}


def written() -> dict[str, str]:
    """The content of each file by its name."""
    return {f"{task}.jsonl": _lines(sentences, seed) for seed, (task, sentences) in enumerate(SENTENCES.items())}


def _lines(sentences: dict[str, list[str]], seed: int) -> str:
    draw = random.Random(seed)
    answers: dict[str, str] = {}
    for label, patterns in sentences.items():
        found: set[str] = set()
        for _ in range(100 * MESSAGES):
            if len(found) == MESSAGES // len(sentences):
                break
            found.add(re.sub(r"\{(\w+)\}", lambda name: draw.choice(WORDS[name[1]]), draw.choice(patterns)))
        answers |= dict.fromkeys(sorted(found), label)
    records = [{"input": message, "output": label} for message, label in answers.items()]
    draw.shuffle(records)
    return "".join(json.dumps(record) + "\n" for record in records)


if __name__ == "__main__":
    for name, content in written().items():
        (EXAMPLES / name).write_text(content, encoding="utf-8")
