"""Thirteen general skills, which the miniature's base model has and may forget, and the words that all data share.

A skill is a function of a random generator that returns a prompt and its answer. `build_datasets.py` draws the eval
file from the skills, and `build_tiny_model.py` the pretraining text.
"""

import random
from collections.abc import Callable

Pair = tuple[str, str]  # (prompt, answer)
Generator = Callable[[random.Random], Pair]
_words = str.split

NAMES = _words(
    "Anna Ben Clara David Emma Felix Greta Hugo Ida Jonas Karl Lena Mila Noah Olga Paul Rosa Simon Tara Victor Wanda "
    "Yusuf"
)
SURNAMES = _words("Bell Stone Frost Lane Marsh Holm Voss Reed Wood Lake Hill Berg Falk Moor Dale Finch")
CITIES = _words("Paris Rome Oslo Berlin Madrid Lisbon Vienna Dublin Athens Prague Warsaw Cairo Tokyo Lima")
DAYS = _words("monday tuesday wednesday thursday friday saturday sunday")
ITEMS = _words("milk bread eggs rice tea coffee soap apples cheese salt butter honey")
ROOMS = _words("kitchen bedroom office garage bathroom hall")
DEVICES = _words("lamp heater fan radio oven television")
GENRES = _words("jazz rock folk opera blues techno")
WORDS = _words(
    "apple river stone cloud window garden horse table paper winter summer music bridge candle forest island mirror "
    "pencil silver thunder village water yellow blanket castle dragon engine feather hammer jacket kettle ladder "
    "mountain needle ocean pillow rabbit saddle ticket valley wagon basket button carpet finger guitar helmet lemon "
    "market orange pepper rocket school turtle violin whistle cat dog sun box key map cup hat pen red"
)
COLOURS = _words("red blue green yellow black white")
NOUNS = _words(
    "man woman child dog cat horse bird fish king farmer doctor teacher house boat tree river mountain bread apple "
    "stone book letter garden village"
)
ADJECTIVES = _words("old young big small red white good bad hungry tired")


def pairs(text: str) -> dict[str, str]:
    return dict(pair.split(":") for pair in text.split())


CAPITALS = pairs(
    "France:Paris Italy:Rome Norway:Oslo Germany:Berlin Spain:Madrid Portugal:Lisbon Austria:Vienna Ireland:Dublin "
    "Greece:Athens Poland:Warsaw Egypt:Cairo Japan:Tokyo Peru:Lima Cuba:Havana Kenya:Nairobi Russia:Moscow "
    "China:Beijing Finland:Helsinki Hungary:Budapest Sweden:Stockholm Canada:Ottawa Iran:Tehran Iraq:Baghdad "
    "Turkey:Ankara"
)
OPPOSITES = pairs(
    "hot:cold big:small old:young fast:slow high:low light:dark hard:soft early:late full:empty rich:poor wet:dry "
    "open:closed loud:quiet strong:weak happy:sad good:bad left:right day:night up:down near:far"
)
PASTS = pairs(
    "go:went see:saw buy:bought find:found hear:heard take:took write:wrote eat:ate give:gave run:ran sing:sang "
    "know:knew break:broke drink:drank speak:spoke fly:flew grow:grew bring:brought teach:taught sleep:slept"
)
PLURALS = pairs(
    "mouse:mice child:children man:men woman:women foot:feet tooth:teeth goose:geese knife:knives leaf:leaves "
    "city:cities box:boxes dog:dogs house:houses wolf:wolves baby:babies"
)
ORDINALS = ["first", "second", "third", "fourth", "fifth"]


def _sample(rng: random.Random, high: int) -> list[str]:
    return rng.sample(WORDS, rng.randint(3, high))


def arithmetic(rng: random.Random) -> Pair:
    a, b = rng.randint(0, 60), rng.randint(0, 39)
    return (f"What is {a} + {b}?", str(a + b)) if rng.random() < 0.5 else (f"What is {a + b} - {b}?", str(a))


def comparison(rng: random.Random) -> Pair:
    a, b = rng.sample(range(100), 2)
    larger = rng.random() < 0.5
    return f"Which is {'larger' if larger else 'smaller'}, {a} or {b}?", str(max(a, b) if larger else min(a, b))


def copying(rng: random.Random) -> Pair:
    words = " ".join(_sample(rng, 6))
    return f"Repeat: {words}", words


def reversing(rng: random.Random) -> Pair:
    words = _sample(rng, 5)
    return f"Reverse: {' '.join(words)}", " ".join(reversed(words))


def sorting(rng: random.Random) -> Pair:
    digits = rng.sample("0123456789", rng.randint(3, 6))
    return f"Sort: {' '.join(digits)}", " ".join(sorted(digits))


def counting(rng: random.Random) -> Pair:
    kinds = rng.sample(WORDS, 3)
    words = [rng.choice(kinds) for _ in range(rng.randint(3, 7))]
    return f"How often does {kinds[0]} occur in: {' '.join(words)}?", str(words.count(kinds[0]))


def picking(rng: random.Random) -> Pair:
    words = _sample(rng, 5)
    index = rng.randrange(len(words))
    return f"What is the {ORDINALS[index]} word of: {' '.join(words)}?", words[index]


def sequence(rng: random.Random) -> Pair:
    start, step = rng.randint(0, 40), rng.randint(1, 9)
    return f"Continue: {' '.join(str(start + i * step) for i in range(4))}", str(start + 4 * step)


def spelling(rng: random.Random) -> Pair:
    word = rng.choice([*WORDS, *NOUNS, *ITEMS, *DAYS])
    return f"Spell {word}.", " ".join(word)


def _ask_either(rng: random.Random, *asked: tuple[str, dict[str, str]]) -> Pair:
    """Draw one of two questions, then an entry of its table."""
    question, table = asked[0] if rng.random() < 0.5 else asked[1]
    word = rng.choice(list(table))
    return f"What is the {question} of {word}?", table[word]


def facts(rng: random.Random) -> Pair:
    return _ask_either(rng, ("capital", CAPITALS), ("opposite", OPPOSITES))


def grammar(rng: random.Random) -> Pair:
    return _ask_either(rng, ("past tense", PASTS), ("plural", PLURALS))


def program(rng: random.Random) -> Pair:
    a, b, word = rng.randint(0, 9), rng.randint(1, 9), rng.choice(WORDS)
    x, y = rng.sample("abcdxyz", 2)
    programs = [
        (f"{x} = {a}\n{y} = {x} + {b}\nprint({y})", str(a + b)),
        (f"{x} = {a}\n{y} = {b}\nprint({y}, {x})", f"{b} {a}"),
        (f"for {x} in range({b % 3 + 2}):\n    print('{word}')", " ".join([word] * (b % 3 + 2))),
        (f"{x} = {a}\nif {x} > {b}:\n    print('{word}')\nelse:\n    print('no')", word if a > b else "no"),
    ]
    code, output = rng.choice(programs)
    return f"What does this program print?\n{code}", output


def question(rng: random.Random) -> Pair:
    (giver, taker), thing, colour = rng.sample(NAMES, 2), rng.choice(WORDS[:60]), rng.choice(COLOURS)
    city, day = rng.choice(CITIES), rng.choice(DAYS)
    text = f"On {day} {giver} gave the {colour} {thing} to {taker} in {city}."
    questions = [
        (f"Who got the {thing}?", taker),
        (f"Who gave the {thing}?", giver),
        (f"Which colour had the {thing}?", colour),
        (f"Where did {giver} give it?", city),
        (f"When did {taker} get it?", day),
    ]
    asked, answer = rng.choice(questions)
    return f"{text} {asked}", answer


SKILLS: dict[str, Generator] = {
    skill.__name__: skill
    for skill in (arithmetic, comparison, copying, reversing, sorting, counting, picking, sequence, spelling, facts,
                  grammar, program, question)
}  # fmt: skip
