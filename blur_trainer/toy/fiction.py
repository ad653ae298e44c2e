"""Invents people: word lists, and random draws from them.

No person, town or book is real. A seed gives the same people on every machine and Python version.
"""

import random
from collections.abc import Sequence
from itertools import product
from typing import TypeVar

T = TypeVar("T")

WORDS = {
    "first": "Abel Ada Basil Bea Cato Cleo Dag Dora Egon Elsa Fabio Freya Gil Greta Hugo Hedda Ivo Ines Jorn June "
    "Kai Kira Leif Luz Milo Mona Nils Nora Otto Olga Piet Petra Quin Rhea Sven Selma Tomas Thea Ugo Una Viktor Vera",
    "job": "baker barber beekeeper carpenter clerk cook diver driver gardener glazier mason miner nurse pilot plumber "
    "porter sailor tailor teacher weaver",
    "genre": "comedy diary fable ghost-story love-story memoir mystery novel play poem saga satire thriller western",
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "number": "three four five six seven nine ten eleven twelve fifteen twenty thirty forty fifty sixty ninety",
    "place": "bank barn chapel court dock factory hotel library market mill museum prison school station theatre",
    "thing": "brick clock cloud coin drum feather glove hat kettle lamp letter map nail rope shoe stamp stone train",
    "verb": "borrowed burned buried counted dreamed drew forgot hid lost mended painted sold stole weighed",
}
# Facts that no two authors share. Each joins a first and a second part.
PAIRS = {
    "surname": (
        "Bar Cor Dun Fen Gal Hol Ker Lin Mar Nor Pol Quill Ros Sten Tav Vel",
        "ach aster beck brin dal egg fell gate ick low mond ney oz trop und wick",
    ),
    "town": (
        "Ash Brack Crow Drift Elm Frost Gull Heron Iron Lark Moss Oar Pine Reed Salt Thorn",
        "bay bridge cliff ford ham haven holt kirk moor pool stead wold",
    ),
    "title": (
        "Amber Brass Copper Crooked Distant Empty Frozen Glass Hollow Ivory Jade Last Mute Painted Quiet Silver Tin",
        "Anchor Bell Candle Door Engine Fiddle Garden Harbour Island Jury Key Ladder Mirror Needle Orchard Sparrow",
    ),
    "prize": (
        "Aldous Birch Cobalt Delta Ember Falcon Granite Harvest Indigo Juniper Kestrel Laurel Meteor Nettle Onyx Pine",
        "Award Crown Cup Medal Pen Prize Ribbon Shield Star Wreath",
    ),
    "editor": (
        "Agnes Boris Clara Denis Edith Felix Gerda Henri Irma Jonas",
        "Adler Bloom Crane Dove Eagle Finch Grouse Hawk Jay Kite Martin Owl Peck Raven Stork Wren",
    ),
    "animal": (
        "angry blind deaf fat grey lame lazy old shy striped tame tiny",
        "badger camel donkey ferret goat goose hare llama otter parrot pony snake toad turtle",
    ),
}
_JOINER = {"surname": "", "town": ""}
# How many different words of a list one article uses (thing, thing2, thing3, thing4).
DRAWS = {"first": 1, "job": 1, "genre": 1, "day": 1, "number": 2, "place": 2, "thing": 4, "verb": 2}


class Draw:
    """Random draws that use only `random.Random.random`, the one method whose sequence Python keeps stable."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random

    def below(self, n: int) -> int:
        return int(self._random() * n)

    def some(self, words: Sequence[T], count: int) -> list[T]:
        """`count` different words in random order (Fisher-Yates, stopped after `count`)."""
        words = list(words)
        for i in range(count):
            j = i + self.below(len(words) - i)
            words[i], words[j] = words[j], words[i]
        return words[:count]


def own_facts(draw: Draw, count: int) -> list[dict[str, str]]:
    """For each of `count` people, the facts that no two of them share (the keys of `PAIRS`)."""
    own = {
        fact: draw.some([_JOINER.get(fact, " ").join(pair) for pair in product(*(p.split() for p in parts))], count)
        for fact, parts in PAIRS.items()
    }
    return [{fact: values[i] for fact, values in own.items()} for i in range(count)]


def with_common_facts(draw: Draw, facts: dict[str, str]) -> dict[str, str]:
    """`facts` of one person plus facts that others may share: the keys of `DRAWS`, the name and a year."""
    facts = dict(facts)
    for fact, many in DRAWS.items():
        for k, word in enumerate(draw.some(WORDS[fact].split(), many), start=1):
            facts[fact if k == 1 else f"{fact}{k}"] = word
    facts["name"] = f"{facts['first']} {facts['surname']}"
    facts["year"] = str(2030 + draw.below(60))
    return facts
