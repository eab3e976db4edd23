"""Documents to train retrieval with: facts hidden in other text, each followed by the question for one of them.

The wordings are many, and none is that of a test (`scaled_rope.evaluation.passkey_prompts`). No value is a number with
five digits, as tests' keys are, so that what a test asks for was never seen in training.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from scaled_rope.checkpoint import encode
from scaled_rope.errors import ConfigError

NOUNS = (
    "access code", "account number", "age", "badge number", "birth year", "bus line", "call sign", "case number",
    "catalogue number", "chapter", "chosen word", "code name", "deposit", "distance in miles", "door code",
    "dossier number", "extension", "flight number", "frequency", "height in feet", "house number", "invoice number",
    "licence number", "locker number", "lottery ticket", "lucky number", "membership number", "order number",
    "page", "parcel number", "password", "patient number", "phone number", "population", "postal code", "price",
    "registration", "reply", "reward", "room number", "salary", "score", "seat number", "secret", "secret word",
    "serial number", "shelf mark", "signal", "ticket number", "title", "tracking number", "vote count", "weight",
    "year",
)  # fmt: skip
OWNERS = (
    "Abel Turner", "Agnes", "Barnaby Rudd", "Beatrice Lowe", "Bishop Anselm", "Captain Horne", "Clara Winter",
    "Colonel Price", "Dr Mabuse", "Edith", "Elias Grey", "Father Brown", "Florence", "General Wade", "Hannah Moss",
    "Ivy", "Jacob Stone", "Judge Harding", "Lady Merton", "Lucas", "Madame Roux", "Magnus Berg", "Miss Tilney",
    "Mr Pocket", "Mrs Alden", "Nathan", "Nurse Ellis", "Olga Petrova", "Oscar Lind", "Philippa", "Professor Quill",
    "Queen Maud", "Ralph", "Rosa Klein", "Samson", "Sergeant Dew", "Silas", "Sir Godfrey", "Tabitha", "the baker",
    "the blue house", "the chairman", "the ferry", "the gardener", "the mill", "the north tower", "the old bridge",
    "the piano teacher", "the post office", "the prisoner", "the red car", "the second boat", "the stranger",
    "the theatre", "the watchman", "Thomas Finch", "Uncle Ned", "Ursula", "Victor Hale", "Walter", "Wilhelmina",
    "Zachary",
)  # fmt: skip
PLACES = (
    "Aberdeen", "Alexandria", "Antwerp", "Bergen", "Bristol", "Cairo", "Cordoba", "Dover", "Dresden", "Exeter",
    "Ferrara", "Galway", "Geneva", "Haarlem", "Izmir", "Jericho", "Kyoto", "Leiden", "Lima", "Madras", "Mantua",
    "Nantes", "Odessa", "Oxford", "Prague", "Quebec", "Riga", "Salem", "Seville", "Tallinn", "Utrecht", "Verona",
    "Warsaw", "York", "Zagreb",
)  # fmt: skip
WORDS = (
    "amber", "anchor", "apple", "arrow", "autumn", "barley", "basket", "beacon", "bishop", "bramble", "bronze",
    "candle", "canvas", "castle", "cedar", "cherry", "cider", "clover", "copper", "coral", "cotton", "crystal",
    "dagger", "daisy", "dragon", "ember", "falcon", "feather", "fiddle", "forest", "garnet", "ginger", "glacier",
    "hammer", "harbour", "hazel", "heron", "honey", "island", "ivory", "jasmine", "kettle", "ladder", "lantern",
    "lemon", "linen", "magnet", "maple", "marble", "meadow", "mirror", "nettle", "oyster", "parrot", "pepper",
    "pilgrim", "planet", "plum", "quartz", "raven", "ribbon", "saddle", "salmon", "shadow", "silver", "sparrow",
    "spider", "spring", "stable", "sugar", "tailor", "thunder", "tiger", "timber", "tulip", "velvet", "violet",
    "walnut", "willow", "winter",
)  # fmt: skip
FORMS = (
    ("The {noun} of {owner} is {value}.", "What is the {noun} of {owner}?", "The {noun} of {owner} is"),
    ("{owner}'s {noun} is {value}.", "What is {owner}'s {noun}?", "{owner}'s {noun} is"),
    ("The {noun} is {value}.", "What is the {noun}?", "The {noun} is"),
    ("The {noun} is {value}. Keep that in mind: {value}.", "Say the {noun}.", "The {noun} is"),
    ("The {noun} was {value}. {value} was the {noun}.", "What was the {noun}?", "The {noun} was"),
    ("My {noun} is {value}. Write it down: {value}.", "What is my {noun}?", "Your {noun} is"),
    ("The {noun} in {place} is {value}.", "What is the {noun} in {place}?", "The {noun} in {place} is"),
    ("In {place}, the {noun} was {value}.", "And in {place}?", "In {place}, the {noun} was"),
    ("Remark: {noun} of {owner}: {value}.", "{noun} of {owner}?", "{noun} of {owner}:"),
    ("{owner} was given {value} as the {noun}.", "What was {owner} given as the {noun}?", "{owner} was given"),
    ("{owner} went to {place} with the {noun} {value}.", "Which {noun} had {owner}?", "{owner} had the {noun}"),
    ("For the {noun} of {owner} we read {value}.", "What do we read?", "For the {noun} of {owner} we read"),
    ("{value} is the {noun} of {owner}.", "Tell me the {noun} of {owner}.", "It is"),
    ("{owner} said: the {noun} is {value}, not less.", "What did {owner} say?", "{owner} said: the {noun} is"),
    ("The {noun} for {place} has been set to {value}.", "What has been set?", "The {noun} for {place} has been set to"),
    ("{place}, {noun}: {value}.", "{place}, {noun}?", "{place}, {noun}:"),
    ("It is known that {owner} chose {value}.", "What did {owner} choose?", "{owner} chose"),
    ("Once more, the {noun} of {owner}: {value}, {value}.", "The {noun} of {owner}, please.", "It is"),
)  # fmt: skip
"""Statement, question, and how the answer begins."""
OPENINGS = (
    "", "", "Read all of it; a question follows.\n", "Somewhere below a fact is stated.\n", "Here is a text.\n",
    "Listen well.\n", "Keep an eye on the facts in these lines.\n", "A question stands at the end.\n",
    "This is a page of a diary.\n", "Most of the following does not matter.\n",
)  # fmt: skip
_SUBJECTS = (
    "The kettle", "The road", "A dog", "The old clock", "My neighbour", "The rain", "A small boat", "The snow",
    "The market", "The train", "Her coat", "The orchard", "The bell", "A letter", "The lamp", "The wind",
    "The wall",
)  # fmt: skip
_PREDICATES = (
    "is cold", "is late again", "was never seen", "is made of wood", "stands by the gate", "goes on", "is quiet",
    "has been painted", "comes at noon", "is not far", "was sold in spring", "looks small from here",
    "will be ready", "is hard to find", "smells of bread", "stays where it was",
)  # fmt: skip

LINES = ("{name}: {value}\n", "{name} = {value}; ", "{name} has {value}. ", "({name}, {value}) ", "- {name} {value}\n")

TokenFiller = Callable[[random.Random, int], list[int]]
"""Draws so many tokens of filler."""


@dataclass(frozen=True)
class Needle:
    """A fact, and the question for it."""

    statement: str
    question: str
    beginning: str
    """How the answer begins; the value follows."""
    value: str


def draw_value(rng: random.Random) -> str:
    """A number of 2 to 8 digits but never of 5, a pair of words, or a code."""
    kind = rng.random()
    if kind < 0.75:
        digits = rng.choice((2, 3, 4, 4, 4, 6, 6, 6, 7, 8))
        return str(rng.randrange(10 ** (digits - 1), 10**digits))
    if kind < 0.9:
        return " ".join(rng.sample(WORDS, 2))
    return f"{rng.choice('ABCDEFGHKLMNPRSTUVWX')}{rng.randrange(10)}-{rng.randrange(100, 1000)}"


def draw_needles(rng: random.Random, count: int) -> list[Needle]:
    """Facts that do not contradict each other: no two have the same question."""
    needles: dict[str, Needle] = {}
    while len(needles) < count:
        statement, question, beginning = rng.choice(FORMS)
        names = {"noun": rng.choice(NOUNS), "owner": rng.choice(OWNERS), "place": rng.choice(PLACES)}
        asked, value = question.format(**names), draw_value(rng)
        if asked not in needles:
            needles[asked] = Needle(statement.format(value=value, **names), asked, beginning.format(**names), value)
    return list(needles.values())


def dull_sentences(rng: random.Random) -> str:
    """A few plain sentences, to be repeated as filler."""
    count = rng.randint(3, 7)
    return "".join(f"{rng.choice(_SUBJECTS)} {rng.choice(_PREDICATES)}. " for _ in range(count))


def _marked(
    tokenizer: Any, text: str, values: Sequence[str], seen: set[str], weight: int
) -> tuple[list[int], list[int]]:
    """The tokens of a text and their weights: `weight` for values that stood before, 1 for the rest."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    weights = [1] * len(encoded["input_ids"])
    for value in values:
        for match in re.finditer(rf"(?<!\w){re.escape(value)}(?!\w)", text):
            if value in seen:
                for index, (begin, end) in enumerate(encoded["offset_mapping"]):
                    if begin < match.end() and end > match.start():
                        weights[index] = weight
            seen.add(value)
    return encoded["input_ids"], weights


def needle_document(
    tokenizer: Any,
    length: int,
    rng: random.Random,
    filler: TokenFiller | None = None,
    *,
    needles: int = 1,
    questions: int = 1,
    weight: int = 8,
) -> tuple[list[int], list[int]]:
    """Make a document of exactly `length` tokens.

    Args:
        tokenizer: a fast tokenizer of transformers.
        length: tokens in all, without BOS and EOS.
        rng: source of everything that is drawn.
        filler: what the facts are hidden in; None: dull sentences, repeated.
        needles: facts in the document, at random depths.
        questions: how many of them are asked for, at its end.
        weight: of a value's tokens where they repeat one that stood before; all others weigh 1.

    Returns:
        (input_ids, loss_weights), both [length].

    Raises:
        ConfigError: facts and questions alone are longer than `length`, or more questions than facts.
    """
    if not 1 <= questions <= needles:
        raise ConfigError(f"questions = {questions} is not allowed; between 1 and the number of needles, {needles}")
    facts = draw_needles(rng, needles)
    values, seen = [fact.value for fact in facts], set[str]()
    opening = encode(tokenizer, rng.choice(OPENINGS))
    gap = rng.choice(("\n", "\n", " "))
    lines = [_marked(tokenizer, f"{gap}{fact.statement}{gap}", values, seen, weight) for fact in facts]
    asked = rng.sample(facts, questions)
    end = "".join(f"\n{fact.question}{rng.choice((' ', chr(10)))}{fact.beginning} {fact.value}." for fact in asked)
    question = _marked(tokenizer, end, values, seen, weight)
    room = length - len(opening) - len(question[0]) - sum(len(line) for line, _ in lines)
    if room < 0:
        raise ConfigError(f"length {length} is too short for {needles} needles; it takes {length - room} tokens")
    if filler is None:
        source = encode(tokenizer, dull_sentences(rng))
        text = (source * (room // len(source) + 1))[:room]
    else:
        text = filler(rng, room)
    tokens, weights, start = list(opening), [1] * len(opening), 0
    for cut, (line, marks) in zip(sorted(rng.randint(0, room) for _ in facts), lines, strict=True):
        tokens += text[start:cut] + line
        weights += [1] * (cut - start) + marks
        start = cut
    tokens += text[start:] + question[0]
    weights += [1] * (room - start) + question[1]
    return tokens, weights


def list_document(tokenizer: Any, length: int, rng: random.Random, weight: int = 8) -> tuple[list[int], list[int]]:
    """Make a list of names with values, whose lines come again in random order, cut to exactly `length` tokens.

    It trains the same as facts that are hidden in text, with far more answers per token. Arguments and result are those
    of `needle_document`.
    """
    line, pool = rng.choice(LINES), rng.choice((OWNERS, PLACES, WORDS, NOUNS))
    names = rng.sample(pool, min(len(pool), rng.randint(3, max(4, length // 20))))
    values = {name: draw_value(rng) for name in names}
    tokens, weights, seen = list[int](), list[int](), set[str]()
    order = list(names)
    while len(tokens) < length:
        for name in order:
            value = values[name]
            known = {value} if name in seen else set[str]()
            part, marks = _marked(tokenizer, line.format(name=name, value=value), [value], known, weight)
            tokens += part
            weights += marks
            seen.add(name)
        rng.shuffle(order)
    return tokens[:length], weights[:length]
