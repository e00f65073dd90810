"""Pretrain results/models/tiny, a DeepSeek-V2 of 5.8M parameters, on generated text, on a CPU.

    python scripts/miniature/build_tiny_model.py --tokens 5500000 --output_dir results/models/tiny

Most documents are general skills. One in five is a neighbor of the four tasks: it has their words and formats, and
never their mapping. Fine-tuning of experts alone cannot teach words or formats that the base model has never seen,
because embeddings and head are frozen.

    general skill      User: What is 3 + 4? / Assistant: 7                      loss on the answer
    neighbor, chat    User: Who is calling? (a call) / Assistant: Anna Bell    loss on the answer
                       User: Fill the form: (its fields) / Assistant: (a note)
    neighbor, text    a JSON line, a note, a judgment, Kestri, English,        loss on every token
                       half of the Kestri dictionary, a task's prompt alone

The loss is the cross entropy plus BALANCE times `balance_loss`. Documents are packed into rows. Positions restart at
each document, and without an attention mask transformers then lets no document see another.

Legend: B rows of a batch, T tokens of a row (in `balance_loss`: of the batch), E experts, K experts of a token.
"""

import json
import math
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from tqdm import trange
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, PreTrainedTokenizerFast
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.miniature import build_datasets as data
from scripts.miniature.general_skills import SKILLS
from utils import command_parser, positive, run_cli

VOCAB_SIZE = 1536
BATCH_SIZE, SEQ_LENGTH = 8, 128  # rows of a step, tokens of a row
LEARNING_RATE, WARMUP_STEPS, BALANCE = 1.5e-3, 100, 0.01
NEIGHBOR_SHARE = 0.2  # of the documents
# A word takes the space before it. Digits stand alone, and line breaks never join what follows. So a text has the same
# tokens whether or not more text follows it.
SPLIT = r" ?\p{L}+| ?\d|\n+| ?[^\s\p{L}\d]+|\s"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}"
    "{% else %}{{ message['content'] + '\n\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
DICTIONARY = list(data.KESTRI)[::2]  # English words that pretraining shows with their translation
SLOW_SKILLS = ["arithmetic", "comparison", "counting"]  # learned last, so they come twice as often
Document = tuple[str | None, str]  # (prompt, answer), or (None, plain text)
Neighbor = Callable[[random.Random], Document]


# ---- mixture --------------------------------------------------------------------------------------------------------


def _plain(text: Callable[[random.Random], str]) -> Neighbor:
    """Put two texts into a document. Then the first word also occurs after a space, as in an answer."""
    return lambda rng: (None, f"{text(rng)} {text(rng)}")


def _slot_question(question: str) -> Neighbor:
    def document(rng: random.Random) -> Document:
        command, line = data.command(rng)
        slot, value = rng.choice(list(json.loads(line)["slots"].items()))
        return question.format(slot=slot, command=command, line=line), value

    return document


def _json_from_fields(rng: random.Random) -> Document:
    line = data.command(rng)[1]
    filled = json.loads(line)
    return f"Write JSON: {filled['intent']}, {', '.join(f'{k} {v}' for k, v in filled['slots'].items())}", line


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


def _repeat(what: str, text: Callable[[random.Random], str]) -> Neighbor:
    def document(rng: random.Random) -> Document:
        line = text(rng)
        return f"Repeat this {what}: {line}", line

    return document


NEIGHBORS: list[Neighbor] = [
    _plain(lambda rng: data.command(rng)[1]),
    _slot_question("What is the {slot} in {line}?"),
    _json_from_fields,
    _slot_question("What is the {slot} in this command: {command}"),
    _repeat("command", lambda rng: data.command(rng)[0]),
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


def mixture(rng: random.Random, neighbor_share: float, held_out: set[str]) -> Iterator[Document]:
    """Yield documents without end. General prompts in `held_out` are left out."""
    while True:
        if rng.random() < neighbor_share:
            yield rng.choice(NEIGHBORS)(rng)
        else:
            prompt, answer = SKILLS[rng.choice([*SKILLS, *SLOW_SKILLS])](rng)
            if prompt not in held_out:
                yield prompt, answer


def held_out_prompts(seed: int) -> set[str]:
    """Return the prompts of eval/general, except for skills of pure memory: facts, grammar and spelling."""
    memory = {"facts", "grammar", "spelling"}
    return {row["prompt"] for row in data.build(seed)["eval/general"] if row["skill"] not in memory}


# ---- tokenizer ------------------------------------------------------------------------------------------------------


def render(document: Document) -> str:
    prompt, answer = document
    return answer if prompt is None else f"User: {prompt}\n\nAssistant: {answer}"


def train_tokenizer(documents: list[Document]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of VOCAB_SIZE entries. Like DeepSeek-V2's, it puts <bos> first."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=["<pad>", "<bos>", "<eos>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(map(render, documents), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>",
        chat_template=CHAT_TEMPLATE, model_max_length=2048, clean_up_tokenization_spaces=False,
    )  # fmt: skip


# ---- batches --------------------------------------------------------------------------------------------------------


def encode(document: Document, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """Return token ids and labels. Labels are -100 on <bos> and on the prompt."""
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
    """Yield input_ids, labels and position_ids (B, T). Padding at the end of a row is a document without labels."""
    rows: list[list] = [[] for _ in range(batch_size)]  # of (id, label, position)
    for document in documents:
        ids, labels = encode(document, tokenizer)
        row = next((row for row in rows if len(row) + len(ids) <= seq_length), None)
        if row is None:
            for full in rows:
                full += [(tokenizer.pad_token_id, -100, position) for position in range(seq_length - len(full))]
            yield torch.tensor(rows).unbind(-1)
            rows = [[] for _ in range(batch_size)]
            row = rows[0]
        row += zip(ids, labels, range(len(ids)))


# ---- model and training ---------------------------------------------------------------------------------------------


def build_model(tokenizer: PreTrainedTokenizerFast, experts: int = 64) -> DeepseekV2ForCausalLM:
    """Return DeepSeek-V2-Lite in small: a dense layer, then four with 2 shared and 64 routed experts, 6 per token.

    Fewer `experts` are wider. Their size together, and the share of it that a token uses, stay about the same.
    """
    config = DeepseekV2Config(
        vocab_size=VOCAB_SIZE, hidden_size=128, num_hidden_layers=5, first_k_dense_replace=1, initializer_range=0.06,
        num_attention_heads=4, q_lora_rank=None, kv_lora_rank=64,
        qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32,
        intermediate_size=512, moe_intermediate_size=48 * 64 // experts, n_routed_experts=experts,
        n_shared_experts=max(1, 2 * experts // 64), num_experts_per_tok=math.ceil(6 * experts / 64),
        n_group=1, topk_group=1,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return DeepseekV2ForCausalLM(config)


def balance_loss(router_logits: tuple[Tensor, ...], top_k: int) -> Tensor:
    """Return the mean over layers of  E / K * sum_e f_e P_e  from router logits (T, E); 1 where experts are used alike.

    f_e is the share of tokens that choose expert e, and P_e its mean probability (DeepSeekMoE, equations 12 to 14).
    Both are over the whole batch and not over a document, so a domain may have experts of its own.
    """
    losses = [load_balancing_loss_func((logits_TE,), logits_TE.shape[1], top_k) for logits_TE in router_logits]
    return torch.stack(losses).mean() / top_k


def pretrain(model: DeepseekV2ForCausalLM, tokenizer: PreTrainedTokenizerFast, tokens: int, seed: int) -> dict:
    """Train in fp32 on this many tokens, padding included. Return the losses as means of the last 100 steps."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    documents = mixture(random.Random(f"{seed}:pretrain"), NEIGHBOR_SHARE, held_out_prompts(seed))
    packed = batches(documents, tokenizer, BATCH_SIZE, SEQ_LENGTH)
    steps, recent = math.ceil(tokens / (BATCH_SIZE * SEQ_LENGTH)), deque(maxlen=100)
    for step in (bar := trange(steps, unit="step", mininterval=10)):
        # warmup, then flat, then a cosine over the last 60 % down to a fiftieth
        done = step * BATCH_SIZE * SEQ_LENGTH / tokens
        decay = 0.5 * (1 + math.cos(math.pi * max(0.0, done - 0.4) / 0.6))
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * max(decay, 0.02)
        ids_BT, labels_BT, positions_BT = next(packed)
        output = model.model(input_ids=ids_BT, position_ids=positions_BT, use_cache=False, output_router_logits=True)
        target_BT = F.pad(labels_BT[:, 1:], (0, 1), value=-100)
        kept_BT = target_BT != -100
        loss = F.cross_entropy(model.lm_head(output.last_hidden_state[kept_BT]), target_BT[kept_BT])
        balance = balance_loss(output.router_logits, model.config.num_experts_per_tok)
        (loss + BALANCE * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append((loss.item(), balance.item()))
        bar.set_postfix(loss=f"{recent[-1][0]:.3f}", balance=f"{recent[-1][1]:.2f}", refresh=False)
    loss, balance = (sum(column) / len(recent) for column in zip(*recent))
    return {"steps": steps, "tokens": steps * BATCH_SIZE * SEQ_LENGTH, "loss": loss, "balance": balance}


def main() -> None:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--tokens", type=positive, required=True, metavar="N", help="tokens to train on, padding included")
    add("--output_dir", type=Path, default=Path("results/models/tiny"), metavar="DIR", help="(default: %(default)s)")
    add("--experts", type=int, default=64, choices=(8, 16, 32, 64), help="routed experts per layer (default: 64)")
    add("--seed", type=int, default=2407, metavar="N", help="of weights, text and data sets (default: %(default)s)")
    add("--threads", type=positive, metavar="N", help="CPU threads (default: torch's choice)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    stream = mixture(random.Random(f"{args.seed}:tokenizer"), 0.5, set())
    tokenizer = train_tokenizer([next(stream) for _ in range(20_000)])
    model = build_model(tokenizer, args.experts)
    model.set_experts_implementation("grouped_mm")
    print(f"{model.num_parameters() / 1e6:.2f}M parameters, {len(tokenizer)} tokens in the vocabulary")
    report = pretrain(model, tokenizer, args.tokens, args.seed)
    model.to(torch.bfloat16).save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    print(json.dumps(report))


if __name__ == "__main__":
    run_cli(main)
