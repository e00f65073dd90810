"""Generate the miniature data sets: four task families and the general skills, seeded, without a download.

    python scripts/miniature/build_datasets.py [--seed 2407] [--output_dir datasets]

| file         | prompt                                             | answer                                         |
|--------------|----------------------------------------------------|------------------------------------------------|
| intent       | a spoken command                                   | JSON with the intent and its slots             |
| summary      | a telephone call between an agent and a caller     | a note of four fixed parts                     |
| law          | what the accused did, record and confession        | offence, article, sentence, who pays           |
| translation  | a sentence of Kestri, an invented language         | English                                        |
| general      | thirteen skills (arithmetic, facts, programs, ...) | a few words                                    |

Each of the four is a mapping that has to be learned: which phrase means which intent, which complaint has which name,
which act has which article and sentence, which word of Kestri is which of English. The rest (names, days, places) is
copied from the prompt. No prompt of an eval file occurs in a train file. A generator is `f(rng) -> (prompt, answer)`.
"""

import json
import random
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepseek.files import write_jsonl
from scripts.miniature.general_skills import (
    ADJECTIVES,
    CITIES,
    DAYS,
    DEVICES,
    GENRES,
    ITEMS,
    NAMES,
    NOUNS,
    ROOMS,
    SKILLS,
    SURNAMES,
    Generator,
    Pair,
)
from utils import command_parser, run_cli

N_TRAIN = {"intent": 1500, "summary": 1200, "law": 1500, "translation": 2000}
N_EVAL = 100  # rows of each task's eval file
N_EVAL_PER_SKILL = 12


# ---- intent: command -> JSON ----------------------------------------------------------------------------------------

_SLOTS: dict[str, Callable[[random.Random], str]] = {
    "time": lambda r: f"{r.randint(1, 12)} {r.choice(['am', 'pm'])}",
    "minutes": lambda r: str(r.randint(2, 90)),
    "people": lambda r: str(r.randint(2, 9)),
    "day": lambda r: r.choice(DAYS),
    "city": lambda r: r.choice(CITIES),
    "to": lambda r: r.choice(CITIES),
    "from": lambda r: r.choice(CITIES),
    "name": lambda r: r.choice(NAMES),
    "item": lambda r: r.choice(ITEMS),
    "room": lambda r: r.choice(ROOMS),
    "device": lambda r: r.choice(DEVICES),
    "genre": lambda r: r.choice(GENRES),
}
INTENTS = {  # the slots stand in the answer in alphabetical order, whatever the order in the command
    "set_alarm": ["wake me up at {time} on {day}", "on {day} I must get up at {time}", "alarm for {time} {day} please"],
    "set_timer": ["tell me when {minutes} minutes are over", "the {item} needs {minutes} minutes, count them"],
    "get_weather": ["will it rain in {city} on {day}", "do I need a coat on {day} in {city}", "is {city} sunny {day}"],
    "play_music": ["I want to hear {genre} in the {room}", "put on some {genre}", "some {genre} for the {room} please"],
    "turn_on": ["start the {device} in the {room}", "it is too dark in the {room}, the {device} please"],
    "turn_off": ["stop the {device} in the {room}", "nobody is in the {room}, so no {device} there"],
    "book_table": ["dinner for {people} in {city} on {day}", "we are {people} and want to eat in {city} {day}"],
    "book_flight": ["I have to fly from {from} to {to} on {day}", "get me to {to} from {from} by plane {day}"],
    "call_contact": ["ring {name}", "I want to talk to {name} at {time}", "get me {name} on the phone {day}"],
    "send_message": ["tell {name} that I come at {time}", "write {name} to bring {item} on {day}"],
    "add_item": ["we are out of {item}", "I must buy {item} on {day}", "{item} is missing, {name} needs it"],
    "find_event": ["what can I do in {city} on {day}", "any {genre} in {city} this {day}"],
}


def intent_json(rng: random.Random, name: str, slots: list[str]) -> dict:
    """A random filling: {"intent": name, "slots": {slot: value}}; the two cities of a flight differ."""
    values = {slot: _SLOTS[slot](rng) for slot in sorted(slots)}
    while "to" in values and values["to"] == values["from"]:
        values["to"] = _SLOTS["to"](rng)
    return {"intent": name, "slots": values}


def slots_of(phrase: str) -> list[str]:
    return [slot for slot in _SLOTS if f"{{{slot}}}" in phrase]


def intent_command(rng: random.Random) -> Pair:
    """(command, JSON)."""
    name = rng.choice(list(INTENTS))
    phrase = rng.choice(INTENTS[name])
    filled = intent_json(rng, name, slots_of(phrase))
    return phrase.format(**filled["slots"]), json.dumps(filled)


def intent(rng: random.Random) -> Pair:
    command, answer = intent_command(rng)
    return f"Turn this command into JSON: {command}", answer


# ---- summary: call -> note ------------------------------------------------------------------------------------------

PROBLEMS = {
    "double charge": ["my card was charged twice", "I paid one bill two times"],
    "lost card": ["I cannot find my card", "my card fell out of my bag"],
    "late delivery": ["my parcel is not here yet", "I have waited a week for my parcel"],
    "broken screen": ["the glass of my phone has a crack", "my phone fell and I see nothing on it"],
    "wrong size": ["the shoes do not fit", "the coat is too small for me"],
    "no internet": ["no page opens at home", "my line has been dead all day"],
    "forgotten password": ["I cannot log in any more", "the page does not take my secret word"],
    "cancelled trip": ["my train did not run", "the flight I booked was dropped"],
}
ACTIONS = {
    "refund": ["we pay the money back", "you get your money back"],
    "replacement": ["we send you a new one", "you get another one"],
    "technician visit": ["somebody comes to your house", "we send a man with tools"],
    "voucher": ["we give you a gift code", "you get something for your next order"],
    "callback": ["my boss rings you", "we ring you again"],
}
MOODS = {
    "calm": ["Fine, thank you.", "All right, thanks."],
    "angry": ["This is too late!", "I am not happy at all!"],
    "worried": ["I hope that is true.", "Are you sure?"],
}


def call(rng: random.Random) -> Pair:
    """(transcript, note)."""
    caller, city, day = f"{rng.choice(NAMES)} {rng.choice(SURNAMES)}", rng.choice(CITIES), rng.choice(DAYS)
    problem, action, mood = rng.choice(list(PROBLEMS)), rng.choice(list(ACTIONS)), rng.choice(list(MOODS))
    transcript = (
        f"Agent: {rng.choice(['Good morning', 'Hello', 'Good evening'])}, what can I do for you?\n"
        f"Caller: I am {caller} from {city} and {rng.choice(PROBLEMS[problem])}.\n"
        f"Agent: I see, {rng.choice(ACTIONS[action])} on {day}.\nCaller: {rng.choice(MOODS[mood])}"
    )
    return transcript, f"Customer {caller}, {city}. Issue: {problem}. Agreed: {action}, due {day}. Mood: {mood}."


def summary(rng: random.Random) -> Pair:
    transcript, note = call(rng)
    return f"Summarize this call.\n{transcript}", note


# ---- law: case -> judgment ------------------------------------------------------------------------------------------

OFFENCES = {  # name: (article, base sentence in months, acts; {v} is the victim)
    "theft": (12, 2, ["took a bicycle that belongs to {v}", "left the shop of {v} with a coat and did not pay"]),
    "fraud": (27, 3, ["sold {v} a ring of false gold", "let {v} pay for a house that did not exist"]),
    "damage": (31, 1, ["broke the window of {v}", "painted the wall of {v} at night"]),
    "assault": (45, 4, ["hit {v} in the face", "pushed {v} down the stairs"]),
    "trespass": (52, 1, ["slept in the barn of {v} unasked", "climbed over the fence of {v}"]),
    "robbery": (63, 6, ["showed {v} a knife and got the purse", "took a bag from {v} by force"]),
    "libel": (74, 2, ["wrote lies about {v} in the paper", "told the town false things about {v}"]),
    "forgery": (88, 3, ["signed a letter with the name of {v}", "made a false passport for {v}"]),
}
RECORD = ["was convicted before", "has a record"], ["was never in court", "has no record"]
CONFESSION = ["admitted it", "confessed"], ["denied it", "said nothing"]


def case(rng: random.Random) -> Pair:
    """(case, judgment): the base sentence doubles for a record and doubles once more where there is no confession."""
    accused, victim = (f"{name} {rng.choice(SURNAMES)}" for name in rng.sample(NAMES, 2))
    offence, day, city = rng.choice(list(OFFENCES)), rng.choice(DAYS), rng.choice(CITIES)
    article, months, acts = OFFENCES[offence]
    record, confessed = rng.random() < 0.5, rng.random() < 0.5
    facts = (
        f"On {day} in {city} {accused} {rng.choice(acts).format(v=victim)}. "
        f"The accused {rng.choice(RECORD[not record])} and {rng.choice(CONFESSION[not confessed])}."
    )
    months *= (2 if record else 1) * (1 if confessed else 2)
    payer = "the accused" if record else "the state"
    judgment = f"{accused} is guilty of {offence}, article {article}. Prison: {months} months. Costs: {payer}."
    return facts, judgment


def law(rng: random.Random) -> Pair:
    facts, judgment = case(rng)
    return f"Give the judgment.\nCase: {facts}", judgment


# ---- translation: Kestri -> English ---------------------------------------------------------------------------------

IRREGULAR = {"man": "men", "woman": "women", "child": "children", "fish": "fish"}
VERBS = {  # past tense: future tense
    "saw": "will see",
    "found": "will find",
    "bought": "will buy",
    "followed": "will follow",
    "heard": "will hear",
    "loved": "will love",
    "lost": "will lose",
    "carried": "will carry",
    "painted": "will paint",
    "forgot": "will forget",
}
PLACES = {"near": "te", "behind": "lu", "under": "ga"}


def _kestri_words() -> dict[str, str]:
    """English -> Kestri, an invented word of two syllables each; the same whatever the seed of the data."""
    rng, used = random.Random("kestri"), set()
    words = {}
    for english in [*NOUNS, *ADJECTIVES, *VERBS]:
        kestri = ""
        while not kestri or kestri in used:
            kestri = "".join(rng.choice("bdfghklmnprstvz") + rng.choice("aeiou") for _ in range(2))
        used.add(kestri)
        words[english] = kestri
    return words


KESTRI = _kestri_words()


def sentence(rng: random.Random) -> Pair:
    """(Kestri, English).

    Kestri has no article, puts the adjective behind its noun, marks the plural with `ki`, the past with `mo` and the
    future with `su` behind the verb, and puts the preposition behind its place.
    """
    kestri, english = [], []
    for noun in rng.sample(NOUNS, 2):
        adjective = rng.choice(ADJECTIVES) if rng.random() < 0.5 else None
        plural = rng.random() < 0.25
        kestri.append([KESTRI[noun], *(["ki"] if plural else []), *([KESTRI[adjective]] if adjective else [])])
        english.append(
            ["the", *([adjective] if adjective else []), IRREGULAR.get(noun, f"{noun}s") if plural else noun]
        )
    verb = rng.choice(list(VERBS))
    future = rng.random() < 0.4
    kestri.insert(1, [KESTRI[verb], "su" if future else "mo"])
    english.insert(1, [VERBS[verb] if future else verb])
    if rng.random() < 0.4:
        place, noun = rng.choice(list(PLACES)), rng.choice(NOUNS)
        kestri.append([KESTRI[noun], PLACES[place]])
        english.append([place, "the", noun])
    return " ".join(chain(*kestri)), " ".join(chain(*english))


def translation(rng: random.Random) -> Pair:
    kestri, english = sentence(rng)
    return f"Translate from Kestri to English: {kestri}", english


TASKS: dict[str, Generator] = {
    "intent": intent,
    "summary": summary,
    "law": law,
    "translation": translation,
}

# ---- files ----------------------------------------------------------------------------------------------------------


def distinct(generator: Generator, rng: random.Random) -> Iterator[Pair]:
    """Pairs whose prompts never repeat."""
    seen = set()
    while True:
        prompt, answer = generator(rng)
        if prompt not in seen:
            seen.add(prompt)
            yield prompt, answer


def eval_row(idx: int, prompt: str, answer: str) -> dict:
    return {"idx": idx, "prompt": prompt, "raw_answers": [answer], "answers": [answer]}


def build(seed: int) -> dict[str, list[dict]]:
    """All rows of all files: {"train/intent": [{"messages": ..}], "eval/intent": [{"idx", ..}], ...}."""
    files: dict[str, list[dict]] = {}
    for name, generator in TASKS.items():
        pairs = distinct(generator, random.Random(f"{seed}:{name}"))
        files[f"eval/{name}"] = [eval_row(i, *next(pairs)) for i in range(N_EVAL)]
        files[f"train/{name}"] = [
            {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}
            for prompt, answer in (next(pairs) for _ in range(N_TRAIN[name]))
        ]
    files["eval/general"] = []
    for skill, generator in SKILLS.items():
        pairs = distinct(generator, random.Random(f"{seed}:{skill}"))
        for _ in range(N_EVAL_PER_SKILL):
            files["eval/general"].append(eval_row(len(files["eval/general"]), *next(pairs)) | {"skill": skill})
    return files


def main() -> None:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--seed", type=int, default=2407, metavar="N", help="seed of every file (default: %(default)s)")
    add("--output_dir", type=Path, default=Path("datasets"), metavar="DIR", help="folder (default: %(default)s)")
    args = parser.parse_args()
    for name, rows in build(args.seed).items():
        path = args.output_dir / f"{name}.jsonl"
        write_jsonl(path, rows)
        print(f"{path}: {len(rows)} rows, {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    run_cli(main)
