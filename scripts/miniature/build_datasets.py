"""Generate the miniature data sets from a seed: four tasks, questions about general skills, and preferences.

    python scripts/miniature/build_datasets.py [--seed 2407] [--output_dir datasets]

| file         | prompt                                             | answer                                         |
|--------------|----------------------------------------------------|------------------------------------------------|
| intent       | a spoken command                                   | JSON with the intent and its slots             |
| summary      | a telephone call between an agent and a caller     | a note of four fixed parts                     |
| law          | what the accused did, record and confession        | offence, article, sentence, who pays           |
| translation  | a sentence of Kestri, an invented language         | English                                        |
| general      | thirteen skills (arithmetic, facts, programs, ...) | a few words                                    |

Each task is a mapping to learn: from a phrase to its intent, from a complaint to its name, from an act to its article
and sentence, from a word of Kestri to English. Everything else (names, days, places) is copied from the prompt. A
prompt of an eval file never occurs in a train file. Preferences are cases with two judgments, of which the rejected one
lets the wrong side pay.
"""

import functools
import json
import random
import re
import sys
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepseek.files import write_jsonl
from scripts.miniature import general_skills as skills
from scripts.miniature.general_skills import ADJECTIVES, CITIES, DAYS, NAMES, NOUNS, SKILLS, SURNAMES, Generator, Pair
from training.data import conversation
from utils import command_parser, run_cli

N_TRAIN = {"intent": 1500, "summary": 1200, "law": 1500, "translation": 2000}
N_PREFERENCES = 400
N_EVAL = 100  # rows of each task's eval file
N_EVAL_PER_SKILL = 12
N_TRAIN_PER_SKILL = 80


# ---- intent: command -> JSON ----------------------------------------------------------------------------------------

SLOTS = {  # and "time"
    "minutes": range(2, 91), "people": range(2, 10), "day": DAYS, "city": CITIES, "to": CITIES, "from": CITIES,
    "name": NAMES, "item": skills.ITEMS, "room": skills.ROOMS, "device": skills.DEVICES, "genre": skills.GENRES,
}  # fmt: skip
INTENTS = {
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


def slot_value(rng: random.Random, slot: str) -> str:
    if slot == "time":
        return f"{rng.randint(1, 12)} {rng.choice(['am', 'pm'])}"
    return str(rng.choice(SLOTS[slot]))


def command(rng: random.Random) -> Pair:
    """Return a command and its JSON, with the slots in alphabetical order. The two cities of a flight differ."""
    name = rng.choice(list(INTENTS))
    phrase = rng.choice(INTENTS[name])
    slots = {slot: slot_value(rng, slot) for slot in sorted(re.findall(r"{(\w+)}", phrase))}
    while "to" in slots and slots["to"] == slots["from"]:
        slots["to"] = slot_value(rng, "to")
    return phrase.format(**slots), json.dumps({"intent": name, "slots": slots})


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
    """Return the transcript of a call and a note of it."""
    caller, city, day = f"{rng.choice(NAMES)} {rng.choice(SURNAMES)}", rng.choice(CITIES), rng.choice(DAYS)
    problem, action, mood = rng.choice(list(PROBLEMS)), rng.choice(list(ACTIONS)), rng.choice(list(MOODS))
    transcript = (
        f"Agent: {rng.choice(['Good morning', 'Hello', 'Good evening'])}, what can I do for you?\n"
        f"Caller: I am {caller} from {city} and {rng.choice(PROBLEMS[problem])}.\n"
        f"Agent: I see, {rng.choice(ACTIONS[action])} on {day}.\nCaller: {rng.choice(MOODS[mood])}"
    )
    return transcript, f"Customer {caller}, {city}. Issue: {problem}. Agreed: {action}, due {day}. Mood: {mood}."


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
    """Return a case and its judgment. A record doubles the sentence, and a denial doubles it again."""
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


# ---- translation: Kestri -> English ---------------------------------------------------------------------------------

IRREGULAR = {"man": "men", "woman": "women", "child": "children", "fish": "fish"}
VERBS = skills.pairs(  # past tense: infinitive
    "saw:see found:find bought:buy followed:follow heard:hear loved:love lost:lose carried:carry painted:paint "
    "forgot:forget"
)
PLACES = {"near": "te", "behind": "lu", "under": "ga"}


def _kestri_words() -> dict[str, str]:
    """Return an invented word of two syllables for each English word. The seed of the data does not change it."""
    rng, words = random.Random("kestri"), {}
    for english in [*NOUNS, *ADJECTIVES, *VERBS]:
        kestri = ""
        while not kestri or kestri in words.values():
            kestri = "".join(rng.choice("bdfghklmnprstvz") + rng.choice("aeiou") for _ in range(2))
        words[english] = kestri
    return words


KESTRI = _kestri_words()


def sentence(rng: random.Random) -> Pair:
    """Return a sentence in Kestri and in English.

    Kestri has no article. The adjective follows its noun, and the preposition its place. `ki` marks the plural, `mo`
    behind the verb the past, and `su` the future.
    """
    kestri, english = [], []
    for noun in rng.sample(NOUNS, 2):
        adjectives = [rng.choice(ADJECTIVES)] if rng.random() < 0.5 else []
        plural = rng.random() < 0.25
        kestri.append([KESTRI[noun], *(["ki"] if plural else []), *(KESTRI[word] for word in adjectives)])
        english.append(["the", *adjectives, IRREGULAR.get(noun, f"{noun}s") if plural else noun])
    verb = rng.choice(list(VERBS))
    future = rng.random() < 0.4
    kestri.insert(1, [KESTRI[verb], "su" if future else "mo"])
    english.insert(1, [f"will {VERBS[verb]}" if future else verb])
    if rng.random() < 0.4:
        place, noun = rng.choice(list(PLACES)), rng.choice(NOUNS)
        kestri.append([KESTRI[noun], PLACES[place]])
        english.append([place, "the", noun])
    return " ".join(chain(*kestri)), " ".join(chain(*english))


# ---- files ----------------------------------------------------------------------------------------------------------


def asked(question: str, generator: Generator) -> Generator:
    """Return a generator that puts `question` before every prompt."""

    def pair(rng: random.Random) -> Pair:
        prompt, answer = generator(rng)
        return question + prompt, answer

    return pair


TASKS: dict[str, Generator] = {
    "intent": asked("Turn this command into JSON: ", command),
    "summary": asked("Summarize this call.\n", call),
    "law": asked("Give the judgment.\nCase: ", case),
    "translation": asked("Translate from Kestri to English: ", sentence),
}


def distinct(generator: Generator, rng: random.Random) -> Iterator[Pair]:
    """Yield pairs without end. No prompt comes twice."""
    seen = set()
    while True:
        prompt, answer = generator(rng)
        if prompt not in seen:
            seen.add(prompt)
            yield prompt, answer


def eval_row(idx: int, prompt: str, answer: str) -> dict:
    return {"idx": idx, "prompt": prompt, "raw_answers": [answer], "answers": [answer]}


def preference(prompt: str, judgment: str) -> dict:
    facts, _, payer = judgment.rpartition(": ")
    wrong = {"the accused.": "the state.", "the state.": "the accused."}[payer]
    return {"prompt": prompt, "chosen": judgment, "rejected": f"{facts}: {wrong}"}


def build(seed: int) -> dict[str, list[dict]]:
    """Return the rows of every file, by its name: "train/intent", "eval/intent", ..."""
    files: dict[str, list[dict]] = {}
    for name, generator in TASKS.items():
        pairs = distinct(generator, random.Random(f"{seed}:{name}"))
        files[f"eval/{name}"] = [eval_row(i, *next(pairs)) for i in range(N_EVAL)]
        files[f"train/{name}"] = [conversation(*next(pairs)) for _ in range(N_TRAIN[name])]
        if name == "law":
            files["preferences/law"] = [preference(*next(pairs)) for _ in range(N_PREFERENCES)]
    files["eval/general"] = []
    for skill, generator in SKILLS.items():
        pairs = distinct(generator, random.Random(f"{seed}:{skill}"))
        for _ in range(N_EVAL_PER_SKILL):
            files["eval/general"].append(eval_row(len(files["eval/general"]), *next(pairs)) | {"skill": skill})
    asked = {row["prompt"] for row in files["eval/general"]}
    files["train/general"] = []
    for skill, generator in SKILLS.items():
        drawn = iter(functools.partial(generator, random.Random(f"{seed}:train:{skill}")), None)
        others = (pair for pair in drawn if pair[0] not in asked)
        files["train/general"] += [conversation(*pair) for pair in islice(others, N_TRAIN_PER_SKILL)]
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
