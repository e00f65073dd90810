"""How fast are conversations made into packs, and what do they take of memory?

    python scripts/experiments/data_speed.py --output=results/tables/data_speed

Makes conversations of 4 to 12 turns and measures, in turns in one run, tokens per second

    tokenizer      of the tokenizer alone, on the rendered text: the limit
    ours           from the file to packs, in one process on one core, and in two
    turn by turn   where each conversation is rendered and encoded up to every answer, as ours did before
    trl            of TRL's preparation of the same file with assistant_only_loss, where TRL is installed

Then the start of a second run, which finds the tokens made. With --tokens it writes a table of that many tokens, opens
it in two processes, walks through packs, and reports by how much the memory of each has grown (anonymous memory; the
pages of the file belong to all processes).
"""

import argparse
import functools
import importlib.util
import json
import random
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepseek.files import read_jsonl
from deepseek.loading import load_tokenizer
from scripts.experiments.common import TINY, publish, resident_bytes
from utils import command_parser, markdown_table, positive, run_cli, run_command

WORDS = ("court", "finds", "claim", "party", "damages", "under", "contract", "dismissed", "with", "costs", "order")
ONE_CORE = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--conversations", type=positive, default=20_000, metavar="N", help="conversations (default: 20000)")
    add("--rounds", type=positive, default=3, metavar="N", help="runs of each, in turns (default: 3)")
    add("--tokens", type=int, default=100_000_000, metavar="N", help="tokens of the memory test (default: 100000000)")
    add("--seed", type=int, default=0, metavar="N", help="seed of the conversations (default: 0)")
    add("--output", metavar="FILE", help="write FILE.md and FILE.json (default: print only)")
    return parser.parse_args(argv)


def write_conversations(path: Path, count: int, seed: int) -> None:
    generator = random.Random(seed)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            messages = []
            for role in ("user", "assistant") * generator.randint(2, 6):
                text = " ".join(generator.choices(WORDS, k=generator.randint(8, 34))).capitalize() + "."
                messages.append({"role": role, "content": text})
            file.write(json.dumps({"messages": messages}) + "\n")


# ------------------------------------------------------------------- measurements, each in a process of its own


def measure_ours(path: str, processes: int) -> dict:
    """Return seconds and tokens from the file to packs, and the seconds of a second start."""
    from training.data import Template, best_fit, encode_rows, open_rows

    tokenizer = load_tokenizer(TINY)
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        documents = encode_rows(open_rows(path), Template(tokenizer), processes)
        best_fit(documents.lengths.tolist(), 4096)
        seconds.append(time.perf_counter() - start)
    return {"tokens": int(documents.lengths.sum()), "seconds": seconds[0], "again": seconds[1]}


def measure_tokenizer(path: str) -> dict:
    """Encode texts that are rendered already."""
    tokenizer, conversations = load_tokenizer(TINY), [row["messages"] for row in read_jsonl(path)]
    texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in conversations]
    start = time.perf_counter()
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return {"tokens": sum(map(len, ids)), "seconds": time.perf_counter() - start}


def measure_turn_by_turn(path: str) -> dict:
    """Render and encode a conversation up to each answer, without it and with it, and compare the tokens."""
    tokenizer, tokens, start = load_tokenizer(TINY), 0, time.perf_counter()
    for messages in (row["messages"] for row in read_jsonl(path)):
        ends = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                for part, ask in ((messages[:i], True), (messages[: i + 1], False)):
                    text = tokenizer.apply_chat_template(part, tokenize=False, add_generation_prompt=ask)
                    ends.append(tokenizer(text, add_special_tokens=False)["input_ids"])
        whole = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)[
            "input_ids"
        ]
        assert all(whole[: len(head)] == head for head in ends)
        tokens += len(whole)
    return {"tokens": tokens, "seconds": time.perf_counter() - start}


def measure_trl(path: str) -> dict:
    """Let TRL's SFTTrainer prepare the file, with the loss on answers alone and packing."""
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    import datasets

    tokenizer = load_tokenizer(TINY)
    marked = tokenizer.chat_template.replace("{{ 'Assistant: ' + message['content'] + eos_token }}",
        "{{ 'Assistant:' }}{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}")  # fmt: skip
    tokenizer.chat_template = marked
    model = AutoModelForCausalLM.from_pretrained(TINY, trust_remote_code=False)
    table = datasets.load_dataset("json", data_files=path, split="train")
    start = time.perf_counter()
    options = {"assistant_only_loss": True, "packing": True, "max_length": 4096, "use_cpu": True, "report_to": "none"}
    args = SFTConfig(output_dir=tempfile.mkdtemp(), **options)
    trainer = SFTTrainer(model, args, train_dataset=table, processing_class=tokenizer)
    seconds = time.perf_counter() - start
    return {"tokens": sum(map(len, trainer.train_dataset["input_ids"])), "seconds": seconds}


def measure_memory(path: str) -> dict:
    """Return by how much the anonymous memory of this process grows when it opens a table and walks through packs."""
    import datasets
    from training.data import Documents, Packs, best_fit

    before = resident_bytes("RssAnon")
    documents = Documents(datasets.Dataset.from_file(path))
    members = best_fit(documents.lengths.tolist(), 4096)
    packs = Packs(documents, documents.rows + 1, members, 4096)
    for index in range(0, len(packs), max(len(packs) // 200, 1)):
        packs[index]
    return {"tokens": int(documents.lengths.sum()), "packs": len(packs), "grown": resident_bytes("RssAnon") - before}


MEASUREMENTS = {
    "tokenizer": measure_tokenizer,
    "ours, 1 process": functools.partial(measure_ours, processes=1),
    "ours, 2 processes": functools.partial(measure_ours, processes=2),
    "turn by turn": measure_turn_by_turn,
    "trl": measure_trl,
    "memory": measure_memory,
}


# ------------------------------------------------------------------------------------------------ the command


def measure(name: str, *arguments: object) -> dict:
    """Run a measurement in a process of its own, on one core, with an empty cache of data sets."""
    with tempfile.TemporaryDirectory() as cache:
        env = {**ONE_CORE, "HF_DATASETS_CACHE": cache, "HF_HUB_OFFLINE": "1"}
        printed = run_command([__file__, "--measure", name, *arguments], quiet=True, env=env)
    return json.loads(printed.splitlines()[-1])


def write_table(path: Path, tokens: int) -> None:
    """Write documents of 100 to 2,000 tokens as encode_rows keeps them."""
    from datasets.arrow_writer import ArrowWriter

    from training.data import features

    generator, row = random.Random(0), 0
    with ArrowWriter(path=str(path), features=features(), writer_batch_size=1000) as writer:
        while tokens > 0:
            length = generator.randint(100, 2000)
            ids = list(range(length))
            writer.write(
                {"input_ids": ids, "labels": ids, "length": length, "learned": length, "row": row, "notes": []}
            )
            tokens, row = tokens - length, row + 1
        writer.finalize()


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    rounds: dict[str, list[dict]] = {name: [] for name in MEASUREMENTS if name != "memory"}
    if importlib.util.find_spec("trl") is None:
        del rounds["trl"]
        print("trl is not installed: left out")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "conversations.jsonl")
        write_conversations(path, args.conversations, args.seed)
        for number in range(args.rounds):
            for name, found in rounds.items():
                found.append(measure(name, path))
                print(f"round {number + 1}, {name}: {found[-1]['tokens'] / found[-1]['seconds']:,.0f} tokens/s")
        grown = []
        if args.tokens > 0:
            table = Path(folder, "table.arrow")
            write_table(table, args.tokens)
            with ThreadPoolExecutor(2) as pool:
                grown = list(pool.map(lambda _: measure("memory", table), range(2)))
    speeds = {name: statistics.median(r["tokens"] / r["seconds"] for r in found) for name, found in rounds.items()}
    rows = [(name, f"{speed:,.0f}", f"{speed / speeds['turn by turn']:.1f}x") for name, speed in speeds.items()]
    again = statistics.median(result["again"] for result in rounds["ours, 1 process"])
    text = markdown_table(("preparation", "tokens/s", "to turn by turn"), rows)
    text += f"\n\nA second start of {args.conversations:,} conversations takes {again:.1f} seconds."
    if grown:
        most = max(result["grown"] for result in grown) / 2**20
        text += f" With {grown[0]['tokens']:,} tokens, the memory of each of two processes grows by {most:,.0f} MiB."
    publish(args, __file__, argv, text, f"seed {args.seed}", rounds=rounds, memory=grown)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(MEASUREMENTS[sys.argv[2]](*sys.argv[3:])))
    else:
        run_cli(main)
