"""The words of the shipped sample data, by topic, and how one is drawn."""

import re
from collections.abc import Iterable, Sequence
from random import Random
from typing import TypeVar

Option = TypeVar("Option")


def listed(text: str) -> list[str]:
    """The words of a text."""
    return text.split()


# For each topic: things, their parts, people's trades, past-tense acts on a part, places.
TOPICS = {
    "astronomy": (
        "telescope comet galaxy planet nebula satellite eclipse meteor",
        "lens mirror orbit ring spectrum crater shadow tail",
        "astronomer observer teacher student",
        "measured photographed sketched tracked recorded mapped",
        "observatory desert hilltop dome valley",
    ),
    "baking": (
        "loaf cake pie tart bun biscuit pudding pretzel",
        "crust dough filling glaze crumb layer slice topping",
        "baker cook grandmother helper",
        "kneaded folded weighed rolled chilled tasted",
        "kitchen bakery market cellar canteen",
    ),
    "cinema": (
        "film comedy drama thriller musical documentary sequel western",
        "plot script cast scene ending score dialogue camera",
        "director critic producer writer",
        "praised rehearsed filmed edited reviewed restored",
        "theatre studio festival gallery cinema",
    ),
    "gardening": (
        "garden orchard hedge meadow rose tomato pear lavender",
        "leaf root stem seed bud branch blossom fruit",
        "gardener farmer neighbour botanist",
        "watered pruned planted trimmed gathered sheltered",
        "greenhouse terrace field park courtyard",
    ),
    "medicine": (
        "trial treatment vaccine tablet diet therapy study survey",
        "dose group outcome symptom placebo sample scan result",
        "doctor nurse patient pharmacist",
        "tested compared reported prescribed checked discussed",
        "hospital clinic ward laboratory university",
    ),
    "railways": (
        "train tram locomotive carriage signal tunnel bridge timetable",
        "wheel brake engine rail door boiler platform ticket",
        "driver mechanic conductor passenger",
        "inspected repaired oiled painted replaced lifted",
        "station depot junction yard terminus",
    ),
    "sailing": (
        "yacht ferry dinghy schooner lighthouse harbour regatta barge",
        "sail mast rope anchor hull rudder deck compass",
        "captain sailor fisher pilot",
        "hoisted lowered mended steered tightened scrubbed",
        "bay lagoon pier channel reef",
    ),
    "software": (
        "program compiler database server browser library parser network",
        "function test cache loop buffer file query thread",
        "programmer tester designer manager",
        "debugged traced documented profiled deleted merged",
        "basement workshop campus laboratory library",
    ),
}
NAMES = listed("Ada Bruno Clara Dimitri Elena Farid Greta Hugo Ines Jonas Kemi Lena Mateo Nadia Oskar Priya")
DAYS = listed("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
PRAISE = listed(
    "wonderful charming brilliant moving clever funny graceful fresh honest gripping thoughtful warm "
    "delightful lively inventive tender superb elegant"
)
BLAME = listed(
    "dull clumsy tedious shallow boring lifeless messy stale awkward predictable forgettable bland "
    "noisy hollow sloppy tiresome dreary confused"
)


def pick(rng: Random, options: Sequence[Option]) -> Option:
    """One of the options."""
    return options[int(rng.random() * len(options))]


def between(rng: Random, low: int, high: int) -> int:
    """An integer from low to high, both included."""
    return low + int(rng.random() * (high - low + 1))


def shuffled(rng: Random, options: Iterable[Option]) -> list[Option]:
    """The options in a random order."""
    return [option for _, option in sorted([(rng.random(), option) for option in options], key=lambda pair: pair[0])]


def pick_two(rng: Random, options: Sequence[Option]) -> tuple[Option, Option]:
    """Two different ones of the options."""
    first, second = shuffled(rng, options)[:2]
    return first, second


def with_articles(text: str) -> str:
    """'a' becomes 'an' before the vowels that occur here, and before the silent h."""
    return re.sub(r"\b([Aa]) (?=[aeiou]|honest)", r"\1n ", text)
