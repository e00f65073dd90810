"""Pretrain results/models/tiny, a DeepSeek-V2 of 5.8M parameters, on generated text, on a CPU.

    python scripts/miniature/build_tiny_model.py --tokens 5500000 --output_dir results/models/tiny

The mixture is general skills and, by --neighbour_share, text that neighbours the four tasks: their words and formats,
never their mapping. A task whose words or format the base has never seen is out of reach of experts alone, because
embeddings and head are frozen.

    general skill      User: What is 3 + 4? / Assistant: 7                      loss on the answer
    neighbour, chat    User: Who is calling? (a call) / Assistant: Anna Bell    loss on the answer
                       User: Fill the form: (its fields) / Assistant: (a note)
    neighbour, text    a JSON line, a note, a judgment, Kestri, English,        loss on every token
                       half of the Kestri dictionary, a task's prompt alone

Loss = cross entropy + balance * mean over the MoE layers of  E / K * sum_e f_e P_e,  f_e the share of the T tokens of a
batch that chose expert e and P_e its mean router probability (DeepSeekMoE, eq. 12-14): over the whole batch and not
over a document, so that a domain may have experts of its own. Documents are packed into rows of `seq_length`; positions
restart at each, and without an attention mask transformers lets none see another.
"""

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.miniature import build_datasets as data
from scripts.miniature.general_skills import SKILLS
from utils import command_parser, run_cli

VOCAB_SIZE = 1536
# Words take the space before them, digits stand alone and line breaks never join what follows, so that a text tokenizes
# the same whether or not more follows it.
SPLIT = r" ?\p{L}+| ?\d|\n+| ?[^\s\p{L}\d]+|\s"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}"
    "{% else %}{{ message['content'] + '\n\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
DICTIONARY = list(data.KESTRI)[::2]  # the English words whose Kestri pretraining shows
SLOW_SKILLS = ["arithmetic", "comparison", "counting"]  # are learned last, so they come twice as often
Document = tuple[str | None, str]  # (prompt, answer), or (None, plain text)


# ---- mixture --------------------------------------------------------------------------------------------------------


def _plain(text: Callable[[random.Random], str]) -> Callable[[random.Random], Document]:
    """Two of them in one document, so that the first word is also seen behind a space, as an answer has it."""
    return lambda rng: (None, f"{text(rng)} {text(rng)}")


def _json_line(rng: random.Random) -> str:
    """JSON with an intent and slots that the intent has; no command stands beside it."""
    name = rng.choice(list(data.INTENTS))
    phrase = rng.choice(data.INTENTS[name])
    return json.dumps(data.intent_json(rng, name, data.slots_of(phrase)))


def _json_question(rng: random.Random) -> Document:
    line = _json_line(rng)
    slot, value = rng.choice(list(json.loads(line)["slots"].items()))
    return f"What is the {slot} in {line}?", value


def _json_from_fields(rng: random.Random) -> Document:
    line = _json_line(rng)
    filled = json.loads(line)
    return f"Write JSON: {filled['intent']}, {', '.join(f'{k} {v}' for k, v in filled['slots'].items())}", line


def _command_question(rng: random.Random) -> Document:
    command, line = data.intent_command(rng)
    slot, value = rng.choice(list(json.loads(line)["slots"].items()))
    return f"What is the {slot} in this command: {command}", value


def _note_from_fields(rng: random.Random) -> Document:
    note = data.call(rng)[1]
    fields = [part.split(": ")[-1] for part in note.removeprefix("Customer ").removesuffix(".").split(". ")]
    return f"Fill the form: {', '.join(fields)}", note


def _judgment_from_fields(rng: random.Random) -> Document:
    judgment = data.case(rng)[1]
    accused, rest = judgment.removesuffix(".").split(" is guilty of ")
    offence, months, payer = (part.split(": ")[-1] for part in rest.split(". "))
    return f"Fill the form: {accused}, {offence}, {months}, {payer}", judgment


def _word_question(rng: random.Random) -> Document:
    english = rng.choice(DICTIONARY)
    return f"What does {data.KESTRI[english]} mean?", english


def _call_question(rng: random.Random) -> Document:
    transcript, note = data.call(rng)
    caller, city = note.removeprefix("Customer ").split(". ")[0].split(", ")
    asked, answer = rng.choice([("Who is calling?", caller), ("Where does the caller live?", city)])
    return f"{asked}\n{transcript}", answer


def _case_question(rng: random.Random) -> Document:
    facts, judgment = data.case(rng)
    city = facts.split(" in ")[1].split()[0]
    asked, answer = rng.choice([("Who is accused?", judgment.split(" is guilty")[0]), ("Where did it happen?", city)])
    return f"{asked}\nCase: {facts}", answer


def _dictionary(rng: random.Random) -> str:
    english = rng.choice(DICTIONARY)
    return f"{data.KESTRI[english]} means {english}."


def _repeat(what: str, text: Callable[[random.Random], str]) -> Callable[[random.Random], Document]:
    def document(rng: random.Random) -> Document:
        line = text(rng)
        return f"Repeat this {what}: {line}", line

    return document


NEIGHBOURS: list[Callable[[random.Random], Document]] = [
    _plain(_json_line),
    _json_question,
    _json_from_fields,
    _command_question,
    _repeat("command", lambda rng: data.intent_command(rng)[0]),
    _plain(lambda rng: data.call(rng)[1]),
    _note_from_fields,
    _call_question,
    _plain(lambda rng: data.case(rng)[1]),
    _judgment_from_fields,
    _case_question,
    _plain(lambda rng: data.sentence(rng)[0]),
    _plain(lambda rng: data.sentence(rng)[1]),
    _plain(_dictionary),
    _word_question,
    _repeat("sentence", lambda rng: data.sentence(rng)[rng.randrange(2)]),
    lambda rng: (None, rng.choice(list(data.TASKS.values()))(rng)[0]),  # a task's prompt as a text, without its answer
]


def mixture(rng: random.Random, neighbour_share: float, held_out: set[str]) -> Iterator[Document]:
    """Documents without end; a general prompt in `held_out` is skipped."""
    while True:
        if rng.random() < neighbour_share:
            yield rng.choice(NEIGHBOURS)(rng)
        else:
            prompt, answer = SKILLS[rng.choice([*SKILLS, *SLOW_SKILLS])](rng)
            if prompt not in held_out:
                yield prompt, answer


def held_out_prompts(seed: int) -> set[str]:
    """The prompts of eval/general, without those of the skills that are memory: facts, grammar and spelling."""
    memory = {"facts", "grammar", "spelling"}
    return {row["prompt"] for row in data.build(seed)["eval/general"] if row["skill"] not in memory}


# ---- tokenizer ------------------------------------------------------------------------------------------------------


def render(document: Document) -> str:
    prompt, answer = document
    return answer if prompt is None else f"User: {prompt}\n\nAssistant: {answer}"


def train_tokenizer(documents: list[Document]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of VOCAB_SIZE entries with <pad>, <bos>, <eos> as 0, 1, 2; puts <bos> first like DeepSeek-V2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(map(render, documents), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


# ---- batches --------------------------------------------------------------------------------------------------------


def encode(document: Document, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """(ids, labels); -100 on <bos> and on the prompt."""
    prompt, answer = document
    if prompt is None:
        ids = [*tokenizer.encode(answer), tokenizer.eos_token_id]
        return ids, [-100, *ids[1:]]
    head = tokenizer.encode(f"User: {prompt}\n\nAssistant:")
    tail = [*tokenizer.encode(f" {answer}", add_special_tokens=False), tokenizer.eos_token_id]
    return head + tail, [-100] * len(head) + tail


def batches(
    documents: Iterator[Document], tokenizer: PreTrainedTokenizerFast, batch_size: int, seq_length: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(input_ids, labels, position_ids), each (batch_size, seq_length); padding is a document without labels."""
    rows: list[list[list[int]]] = [[[], [], []] for _ in range(batch_size)]
    for document in documents:
        ids, labels = encode(document, tokenizer)
        row = next((row for row in rows if len(row[0]) + len(ids) <= seq_length), None)
        if row is None:
            for full in rows:
                n = seq_length - len(full[0])
                for part, padding in zip(full, ([tokenizer.pad_token_id] * n, [-100] * n, range(n))):
                    part.extend(padding)
            yield tuple(torch.tensor([full[i] for full in rows]) for i in range(3))
            rows = [[[], [], []] for _ in range(batch_size)]
            row = rows[0]
        for part, values in zip(row, (ids, labels, range(len(ids)))):
            part.extend(values)


# ---- model and training ---------------------------------------------------------------------------------------------


def build_model(tokenizer: PreTrainedTokenizerFast, experts: int = 64) -> DeepseekV2ForCausalLM:
    """DeepSeek-V2-Lite in small: a dense layer, then four with 2 shared and 64 routed experts, 6 of them per token.

    Fewer `experts` are wider, so that the routed ones have the same size together, and about as much of them is used.
    """
    config = DeepseekV2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=512,
        moe_intermediate_size=48 * 64 // experts,
        num_hidden_layers=5,
        first_k_dense_replace=1,
        num_attention_heads=4,
        q_lora_rank=None,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        n_routed_experts=experts,
        n_shared_experts=max(1, 2 * experts // 64),
        num_experts_per_tok=math.ceil(6 * experts / 64),
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
        initializer_range=0.06,
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return DeepseekV2ForCausalLM(config)


def balance_loss(router_logits: tuple[Tensor, ...], top_k: int) -> Tensor:
    """Mean over the layers of E / K * sum_e f_e P_e, from logits (T, E) each; 1 where all experts are used alike."""
    losses = []
    for logits_TE in router_logits:
        prob_TE = logits_TE.softmax(-1)
        chosen_TK = prob_TE.topk(top_k, dim=-1).indices
        share_E = torch.bincount(chosen_TK.flatten(), minlength=prob_TE.shape[1]) / prob_TE.shape[0]
        losses.append(prob_TE.shape[1] / top_k * (share_E * prob_TE.mean(0)).sum())
    return torch.stack(losses).mean()


def pretrain(model: DeepseekV2ForCausalLM, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> dict:
    """Train in fp32 until the budget is spent; returns what came of it, the losses as means of the last 100 steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    documents = mixture(random.Random(f"{args.seed}:pretrain"), args.neighbour_share, held_out_prompts(args.seed))
    start, tokens, recent = time.monotonic(), 0, []
    bar = tqdm(total=args.tokens or None, unit="tok", unit_scale=True, mininterval=10)
    for step, batch in enumerate(batches(documents, tokenizer, args.batch_size, args.seq_length), 1):
        done = tokens / args.tokens if args.tokens else (time.monotonic() - start) / (60 * args.minutes)
        if done >= 1:
            break
        # warmup, then flat, then a cosine over the last 60 % down to a fiftieth
        decay = 0.5 * (1 + math.cos(math.pi * max(0.0, done - 0.4) / 0.6))
        optimizer.param_groups[0]["lr"] = args.lr * min(1.0, step / args.warmup_steps) * max(decay, 0.02)
        ids_BT, labels_BT, positions_BT = (part.to(args.device) for part in batch)
        output = model.model(input_ids=ids_BT, position_ids=positions_BT, use_cache=False, output_router_logits=True)
        target_BT = F.pad(labels_BT[:, 1:], (0, 1), value=-100)
        kept_BT = target_BT != -100
        loss = F.cross_entropy(model.lm_head(output.last_hidden_state[kept_BT]), target_BT[kept_BT])
        balance = balance_loss(output.router_logits, model.config.num_experts_per_tok)
        (loss + args.balance * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += ids_BT.numel()
        recent = [*recent[-99:], (loss.item(), balance.item())]
        if step % 50 == 0:
            bar.set_postfix(
                step=step, loss=f"{sum(r[0] for r in recent) / len(recent):.3f}", balance=f"{recent[-1][1]:.2f}"
            )
        bar.update(ids_BT.numel())
    bar.close()
    loss, balance = (sum(column) / len(recent) for column in zip(*recent))
    return {
        "steps": step - 1,
        "tokens": tokens,
        "seconds": round(time.monotonic() - start),
        "loss": loss,
        "balance": balance,
    }


def main() -> None:
    parser = command_parser(__doc__)
    add = parser.add_argument
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--tokens", type=int, metavar="N", help="budget in tokens, padding included: gives the same "
        "model for the same seed (this or --minutes is required)")  # fmt: skip
    budget.add_argument("--minutes", type=float, metavar="MINUTES", help="budget in minutes of training")
    add("--output_dir", type=Path, default=Path("results/models/tiny"), metavar="DIR", help="(default: %(default)s)")
    add("--experts", type=int, default=64, choices=(8, 16, 32, 64), help="routed experts of a layer, of the same size "
        "together (default: %(default)s)")  # fmt: skip
    add("--seed", type=int, default=2407, metavar="N", help="of weights, text and data sets (default: %(default)s)")
    add("--lr", type=float, default=1.5e-3, metavar="LR", help="peak learning rate of AdamW (default: %(default)s)")
    add("--warmup_steps", type=int, default=100, metavar="N", help="(default: %(default)s)")
    add("--batch_size", type=int, default=8, metavar="N", help="rows per step (default: %(default)s)")
    add("--seq_length", type=int, default=128, metavar="N", help="tokens per row (default: %(default)s)")
    add("--balance", type=float, default=0.01, metavar="X", help="weight of the balance loss (default: %(default)s)")
    add("--neighbour_share", type=float, default=0.2, metavar="X", help="of the documents (default: %(default)s)")
    add("--device", default="cpu", metavar="NAME", help="(default: %(default)s)")
    add("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    stream = mixture(random.Random(f"{args.seed}:tokenizer"), 0.5, set())
    tokenizer = train_tokenizer([next(stream) for _ in range(20_000)])
    model = build_model(tokenizer, args.experts).to(args.device)
    model.set_experts_implementation("grouped_mm")
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, {len(tokenizer)} tokens in the vocabulary"
    )
    report = pretrain(model, tokenizer, args)
    model.to(torch.bfloat16).save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    print(json.dumps(report))


if __name__ == "__main__":
    run_cli(main)
