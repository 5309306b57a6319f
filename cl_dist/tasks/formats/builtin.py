"""Generated tasks for the quickstart and for tests, small enough to be learnt from scratch within a minute.

Most are classification: animals migrate, and the season decides where to. All of these tasks share words, animals and
the four answers; only the last word, the season, differs, and every season sends the animals somewhere else. So a model
can learn all of them together, but fine-tuning on one season overwrites the others unless something protects them.
`reverse` (generation) and `prose` (plain text) are examples of the other kinds of task.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

from cl_dist.errors import BadInput
from cl_dist.tasks.formats.files import enumerate_names
from cl_dist.tasks.formats.format import Format, RawTask, Source, Split
from cl_dist.tasks.types import Example, Kind

TRAIN_SAMPLES = 256
EVAL_SAMPLES = 64

LABELS = ("north", "south", "east", "west")
ANIMALS = ("fox", "owl", "deer", "crane", "mole", "swan", "bear", "toad")
FILLERS = ("old", "calm", "brisk", "pale", "quick", "vast", "young", "hazy", "idle", "jolly", "zany", "new")
SEASONS = ("spring", "summer", "autumn", "winter", "dawn", "noon", "dusk", "night")
SYLLABLES = ("ba", "co", "di", "fu", "ge", "ho", "ki", "lu", "me", "no")
VERBS = ("meets", "follows", "greets", "hears")


class Builtin(Format):
    """Generated tasks, with the same samples every time and on every machine."""

    name = "builtin"
    summary = "generated"
    USES = frozenset()
    HAS_PATH = False

    def read(self, source: Source) -> RawTask:
        """Generate the task with this name."""
        name = source.name
        if name in SEASONS:
            draw = partial(migration, season=name, destinations=draw_destinations(name))
            return generate(name, draw, "classification", LABELS)
        if name == "reverse":
            return generate(name, reversal, "generation")
        if name == "prose":
            return generate(name, sentence, "text")
        raise BadInput(f"no built-in task has this name; allowed: {enumerate_names((*SEASONS, 'reverse', 'prose'))}")


def generate(
    name: str, draw: Callable[[random.Random], Example], kind: Kind, labels: tuple[str, ...] | None = None
) -> RawTask:
    """Draw distinct samples, seeded by the task's name. The two splits have no sample in common."""
    rng = random.Random(f"builtin/{name}")
    samples: dict[Example, None] = {}
    while len(samples) < TRAIN_SAMPLES + EVAL_SAMPLES:
        samples[draw(rng)] = None
    drawn = list(samples)
    train, evaluation = drawn[:TRAIN_SAMPLES], drawn[TRAIN_SAMPLES:]
    return RawTask(as_split(train, f"{name}[train]"), as_split(evaluation, f"{name}[test]"), labels, kind)


def as_split(examples: list[Example], origin: str) -> Split:
    """Generated examples as a split."""
    return Split(examples, origin, range(len(examples)))


def draw_destinations(season: str) -> dict[str, str]:
    """Where each animal goes in a season. Every destination is equally frequent; the season's name is the seed."""
    destinations = list(LABELS) * (len(ANIMALS) // len(LABELS))
    random.Random(f"destinations/{season}").shuffle(destinations)
    return dict(zip(ANIMALS, destinations, strict=True))


def migration(rng: random.Random, season: str, destinations: dict[str, str]) -> Example:
    """One classification sample; the prompt has at most 40 characters."""
    animal = rng.choice(sorted(destinations))
    first, second, third = rng.sample(FILLERS, k=3)
    return Example(prompt=f"{first} {second} {third} {animal} {season}?", answer=destinations[animal])


def reversal(rng: random.Random) -> Example:
    """One generation sample: a short word to spell backwards."""
    word = "".join(rng.choices(SYLLABLES, k=3))
    return Example(prompt=f"reverse {word}:", answer=word[::-1])


def sentence(rng: random.Random) -> Example:
    """One document of a small language with a fixed grammar."""
    subject, thing = (f"{rng.choice(FILLERS)} {rng.choice(ANIMALS)}" for _ in range(2))
    return Example(prompt="", answer=f"the {subject} {rng.choice(VERBS)} the {thing}.")
