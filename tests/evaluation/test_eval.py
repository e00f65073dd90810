"""Generation against a loop without cache or padding, ranks against one process, errors before a model is loaded."""

import json
import logging
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import test_judge
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, GenerationConfig, PreTrainedTokenizerFast

import benchmarks
import esft
import eval_multigpu
from evaluation import code_runner, generation
from evaluation import runner as eval_ranks
from evaluation.generation import complete, generate, make_batches
from training.data import encode_prompt
from utils import run_cli

PROMPTS = [
    "add 1 and 2",
    "a",
    "say the words of the sentence in the other order please",
    "sort 3 2 1",
    "copy b",
    "a b c",
]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{{ eos_token if m.role == 'assistant' }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE without a pad token."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tok.train_from_iterator(PROMPTS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>")
    fast.chat_template = TEMPLATE
    return fast


@pytest.fixture(scope="module")
def model() -> DeepseekV2ForCausalLM:
    """Random weights, of a scale at which greedy answers differ between prompts."""
    torch.manual_seed(0)
    config = DeepseekV2Config(
        vocab_size=300, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1,
        first_k_dense_replace=1, kv_lora_rank=16, q_lora_rank=None, qk_nope_head_dim=8, qk_rope_head_dim=8,
        v_head_dim=8, max_position_embeddings=256, initializer_range=0.3, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return DeepseekV2ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model_dir(model, tokenizer, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def eval_file(tmp_path) -> str:
    path = tmp_path / "mine.jsonl"
    rows = [
        {"idx": i, "prompt": prompt, "raw_answers": ["a b"], "answers": ["a b"], "skill": "even" if i % 2 else "odd"}
        for i, prompt in enumerate(PROMPTS)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


@torch.no_grad()
def greedy(model, ids: list[int], steps: int) -> list[int]:
    """The reference: one prompt, no padding, no cache."""
    new: list[int] = []
    for _ in range(steps):
        new.append(int(model(torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax()))
    return new


def test_batched_answers_are_those_of_a_plain_loop(model, tokenizer):
    expected = [tokenizer.decode(greedy(model, encode_prompt(p, tokenizer), 6)) for p in PROMPTS]
    assert len(set(expected)) > 3
    options = {"max_new_tokens": 6, "progress": False}
    for batch_size in (1, 4, 16):
        assert generate(model, tokenizer, PROMPTS, batch_size=batch_size, **options) == expected
    assert generate(model, tokenizer, PROMPTS[:2], batch_size=2, template="released", **options) != expected[:2]
    assert generate(model, tokenizer, [], **options) == []


def test_an_answer_ends_before_any_of_the_end_tokens(model, tokenizer, monkeypatch):
    new = greedy(model, encode_prompt(PROMPTS[0], tokenizer), 6)
    stop = next(i for i in range(1, 6) if new[i] not in new[:i])
    monkeypatch.setattr(model.generation_config, "eos_token_id", [299, new[stop]])
    first, *others = complete(model, tokenizer, PROMPTS, max_new_tokens=6, progress=False)
    assert first == (tokenizer.decode(new[:stop]), stop + 1, False)
    assert any(other.truncated and other.tokens == 6 for other in others)


def test_the_models_own_sampling_settings_neither_warn_nor_count(model, tokenizer, monkeypatch, capfd):
    expected = generate(model, tokenizer, PROMPTS, max_new_tokens=6, progress=False)
    theirs = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9, repetition_penalty=9.0, max_length=20)
    monkeypatch.setattr(model, "generation_config", theirs)
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.train()
            assert generate(model, tokenizer, PROMPTS, max_new_tokens=6, progress=False) == expected
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert records == [] and capfd.readouterr().err == ""
    assert model.generation_config is theirs and model.training
    model.eval()


def test_a_batch_alone_forms_itself_again(tokenizer):
    batches = make_batches(PROMPTS, tokenizer, 4, "chat")
    assert sorted(i for batch in batches for i in batch) == list(range(len(PROMPTS)))
    assert [len(batch) for batch in batches] == [4, 2] and batches[0][0] == 2  # the longest comes first
    for batch in batches:
        assert make_batches([PROMPTS[i] for i in batch], tokenizer, 4, "chat") == [list(range(len(batch)))]


def run(model_dir: str, eval_file: str, output_path, *more: str) -> list[dict]:
    flags = [f"--model={model_dir}", f"--eval_dataset={eval_file}", f"--output_path={output_path}"]
    return eval_multigpu.main([*flags, "--max_new_tokens=4", "--eval_batch_size=2", "--device=cpu", *more])


def test_any_number_of_processes_writes_the_same(model_dir, eval_file, tmp_path, capsys):
    (one,) = run(model_dir, eval_file, tmp_path / "one.jsonl")
    text = (tmp_path / "one.jsonl").read_text()
    for world_size in (2, 3):
        path = tmp_path / "new" / f"{world_size}.jsonl"
        (other,) = run(model_dir, eval_file, path, f"--world_size={world_size}")
        assert path.read_text() == text and untimed(other) == untimed(one)
    assert [json.loads(line)["example"]["prompt"] for line in text.splitlines()] == PROMPTS
    saved = json.loads((tmp_path / "one.summary.json").read_text())
    assert saved == one and saved["n"] == 6 and saved["tokens"] == 24 and saved["truncated"] == 6
    assert saved["failed"] == 0 and saved["groups"].keys() == {"odd", "even"}
    assert saved["ci95"][0] <= saved["mean"] <= saved["ci95"][1]
    assert saved["arguments"]["max_new_tokens"] == 4 and "torch" in saved["environment"]
    printed = capsys.readouterr()
    assert re.search(r"mine +6 +rouge_l +\d", printed.out) and "failed" not in printed.out
    assert re.search(r"evaluating: 100%.* 6/6 .*tokens/s", printed.err)
    assert not list(tmp_path.rglob(".*"))


def test_threads_do_not_depend_on_the_machine(model_dir, eval_file, tmp_path, monkeypatch):
    threads, evaluate = [], eval_ranks.evaluate
    monkeypatch.setattr(
        eval_ranks, "evaluate", lambda *a, **k: threads.append(torch.get_num_threads()) or evaluate(*a, **k)
    )
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run(model_dir, eval_file, tmp_path / "out.jsonl")
        assert set(threads) == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------ interruptions


def untimed(summary: dict) -> dict:
    timing = ("seconds", "tokens_per_second", "arguments", "environment")
    return {key: value for key, value in summary.items() if key not in timing}


class Watched:
    """An evaluator that logs its process and the answer that it scores.

    While <folder>/armed is there, the answer "die" kills the process and "hang" waits; "raise" always raises.
    """

    primary = "length"

    def __init__(self, folder: Path):
        self.folder = folder

    def metrics(self, prediction: str, answers: list[str], row: dict) -> dict[str, float]:
        with open(self.folder / "log", "a") as log:
            log.write(f"{os.getpid()} {answers[0]}\n")
        if answers == ["raise"]:
            raise KeyError("a bug of the evaluator")
        if (self.folder / "armed").exists() and answers == ["die"]:
            os.kill(os.getpid(), signal.SIGKILL)
        while (self.folder / "armed").exists() and answers == ["hang"]:
            time.sleep(0.1)
        return {"length": float(len(prediction))}

    def scored(self) -> list[str]:
        """The answers scored since the last call."""
        path = self.folder / "log"
        words = [line.split()[1] for line in path.read_text().splitlines()] if path.exists() else []
        path.unlink(missing_ok=True)
        return words


@pytest.fixture
def watched(tmp_path, monkeypatch) -> Watched:
    evaluator = Watched(tmp_path)
    monkeypatch.setattr(eval_multigpu, "get_evaluator", lambda *_: evaluator)
    return evaluator


def write_rows(path: Path, answers: list[str], prompts: list[str] = PROMPTS) -> str:
    path.write_text("\n".join(json.dumps({"prompt": p, "answers": [a]}) for p, a in zip(prompts, answers)))
    return str(path)


def stop_after(monkeypatch, batches: int) -> None:
    """Ctrl-C before the batch after that many."""
    evaluate, calls = eval_ranks.evaluate, []

    def stopping(*args, **options):
        calls.append(1)
        if len(calls) > batches:
            raise KeyboardInterrupt
        return evaluate(*args, **options)

    monkeypatch.setattr(eval_ranks, "evaluate", stopping)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_a_killed_evaluation_goes_on_where_it_stopped(model_dir, tmp_path, watched, capsys):
    answers = ["a", "b", "hang", "x", "y", "z"]  # "hang" is in the first batch
    eval_file = write_rows(tmp_path / "mine.jsonl", answers)
    (unbroken,) = run(model_dir, eval_file, tmp_path / "unbroken.jsonl")
    assert len(watched.scored()) == 6

    (tmp_path / "armed").touch()
    partial, log = tmp_path / ".out.jsonl.partial", tmp_path / "log"
    script = (
        "import sys; sys.path += sys.argv[1:3]; import eval_multigpu, test_eval; from pathlib import Path\n"
        "watched = test_eval.Watched(Path(sys.argv[3]))\n"
        "eval_multigpu.get_evaluator = lambda *_: watched\n"
        "test_eval.run(*sys.argv[4:])"
    )
    words = [str(Path(eval_multigpu.__file__).parent), str(Path(__file__).parent), str(tmp_path)]
    words += [model_dir, eval_file, str(tmp_path / "out.jsonl"), "--world_size=2"]
    process = subprocess.Popen([sys.executable, "-c", script, *words])
    try:  # rank 0 hangs in the first batch, rank 1 has one batch, the second
        wait_for(lambda: partial.exists() and partial.read_bytes().count(b"indices") == 1)
        wait_for(lambda: "hang" in log.read_text())
    finally:
        process.kill()
        process.wait()
    pids = {int(line.split()[0]) for line in log.read_text().splitlines()}
    wait_for(lambda: all(map(gone, pids)))
    assert len(pids) == 2 and not (tmp_path / "out.jsonl").exists()

    (tmp_path / "armed").unlink()
    with open(partial, "ab") as file:
        file.write(b'\n{"indices": [0, 1], "resu')
    kept = json.loads(partial.read_bytes().split(b"\n")[2])["indices"]
    watched.scored()
    (resumed,) = run(model_dir, eval_file, tmp_path / "out.jsonl")
    assert sorted(watched.scored()) == [answer for i, answer in enumerate(answers) if i not in kept]
    assert "2 of 6 answers are there" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "unbroken.jsonl").read_bytes()
    assert untimed(resumed) == untimed(unbroken) and not partial.exists()


def test_a_rank_that_dies_ends_the_command_and_the_same_command_goes_on(model_dir, tmp_path, watched, capsys):
    eval_file = write_rows(tmp_path / "mine.jsonl", ["a", "die", "c", "d", "e", "f"])  # "die" is in the third batch
    (tmp_path / "armed").touch()
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda: run(model_dir, eval_file, tmp_path / "out.jsonl", "--world_size=2"))
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and re.match(r"error: rank 0 died \(SIGKILL\).* goes on", error)
    assert not multiprocessing.active_children() and not (tmp_path / "out.jsonl").exists()

    (tmp_path / "armed").unlink()
    watched.scored()
    run(model_dir, eval_file, tmp_path / "out.jsonl", "--world_size=3")
    again = watched.scored()
    assert "die" in again and len(again) <= 4  # the first batch was rank 0's, too
    run(model_dir, eval_file, tmp_path / "unbroken.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "unbroken.jsonl").read_bytes()


def test_what_a_rank_raises_names_it(model_dir, eval_file, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(model_dir, broken)
    (broken / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"^rank [01]: model .*broken.* cannot be loaded"):
        run(str(broken), eval_file, tmp_path / "out.jsonl", "--world_size=2")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (["--max_new_tokens=5"], "max_new_tokens"),
        (["--eval_batch_size=3"], "eval_batch_size"),
        (["--template=released"], "template"),
        (["--dtype=bfloat16"], "dtype"),
        (["--evaluator=general"], "evaluator"),
        (["--n_samples=5"], "dataset"),
        (["--seed=1"], None),
    ],
)
def test_another_command_starts_over(model_dir, eval_file, tmp_path, monkeypatch, capsys, more, word):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 2)
        run(model_dir, eval_file, tmp_path / "out.jsonl")
    (summary,) = run(model_dir, eval_file, tmp_path / "out.jsonl", *more)
    error = capsys.readouterr().err
    assert (f"another {word}: starting over" in error) == bool(word)
    assert ("4 of 6 answers are there" in error) == (not word)
    (fresh,) = run(model_dir, eval_file, tmp_path / "fresh.jsonl", *more)
    assert (tmp_path / "out.jsonl").read_text() == (tmp_path / "fresh.jsonl").read_text()
    assert untimed(summary) == untimed(fresh)


def test_finished_datasets_are_not_answered_again(model_dir, tmp_path, watched, monkeypatch):
    files = [write_rows(tmp_path / f"{name}.jsonl", [name] * 6) for name in ("one", "two")]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 4)
        run(model_dir, ",".join(files), tmp_path / "out.jsonl")
    assert watched.scored() == ["one"] * 6 + ["two"] * 2
    run(model_dir, ",".join(files), tmp_path / "out.jsonl")
    assert watched.scored() == ["two"] * 4
    assert len(list(tmp_path.glob("out.*.jsonl"))) == 2 and not list(tmp_path.glob(".*"))


def test_two_evaluations_cannot_share_an_output(model_dir, eval_file, tmp_path):
    with eval_ranks.Partial(tmp_path / ".out.jsonl.partial", {}), pytest.raises(ValueError, match="another evalua"):
        run(model_dir, eval_file, tmp_path / "out.jsonl")


# ------------------------------------------------------------------------------------------------ failures


def test_a_sample_that_fails_does_not_stop_the_others(model_dir, tmp_path, watched, capsys):
    prompts = [*PROMPTS, "too long " * 200]
    eval_file = write_rows(tmp_path / "mine.jsonl", ["a", "raise", "c", "d", "e", "f", "g"], prompts)
    (summary,) = run(model_dir, eval_file, tmp_path / "out.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["example"]["prompt"] for line in lines] == prompts
    assert [i for i, line in enumerate(lines) if "error" in line] == [1, 6]
    assert lines[1]["error"] == "KeyError: 'a bug of the evaluator'" and lines[1]["example"]["raw_prediction"]
    assert re.search(r"prompt has \d+ tokens.* context of 256$", lines[6]["error"])
    assert lines[6]["example"]["raw_prediction"] is None and all(lines[i]["score"] is None for i in (1, 6))
    scores = [line["score"] for line in lines if "error" not in line]
    assert (summary["n"], summary["failed"]) == (7, 2) and summary["mean"] == pytest.approx(20 * sum(scores), abs=1e-3)
    assert "2 failed" in capsys.readouterr().out


def test_what_failed_is_tried_again_after_an_interruption(model_dir, eval_file, tmp_path, monkeypatch, model):
    generate = DeepseekV2ForCausalLM.generate
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 2)
        patch.setattr(DeepseekV2ForCausalLM, "generate", out_of_memory(generate, above=0, times=3))
        run(model_dir, eval_file, tmp_path / "out.jsonl")
    (summary,) = run(model_dir, eval_file, tmp_path / "out.jsonl")
    (fresh,) = run(model_dir, eval_file, tmp_path / "fresh.jsonl")
    assert untimed(summary) == untimed(fresh) and fresh["failed"] == 0


def out_of_memory(generate, above: int, times: int = 10**9):
    """`generate` that fails with more than `above` samples, `times` times."""
    failures = iter(range(times))

    def failing(self, input_ids, **options):
        if len(input_ids) > above and next(failures, None) is not None:
            raise torch.OutOfMemoryError("no memory left")
        return generate(self, input_ids=input_ids, **options)

    return failing


def test_a_batch_that_is_too_large_is_answered_one_by_one(model_dir, eval_file, tmp_path, monkeypatch):
    run(model_dir, eval_file, tmp_path / "alone.jsonl", "--eval_batch_size=1")
    monkeypatch.setattr(DeepseekV2ForCausalLM, "generate", out_of_memory(DeepseekV2ForCausalLM.generate, above=1))
    (summary,) = run(model_dir, eval_file, tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == (tmp_path / "alone.jsonl").read_text() and not summary["failed"]


def test_when_every_sample_fails_the_command_does(model_dir, eval_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(DeepseekV2ForCausalLM, "generate", out_of_memory(DeepseekV2ForCausalLM.generate, above=0))
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda: run(model_dir, eval_file, tmp_path / "out.jsonl"))
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and not (tmp_path / "out.jsonl").exists()
    assert error == "error: every sample of mine failed, the first: OutOfMemoryError: no memory left"


def test_a_gpu_that_has_failed_ends_the_command(model_dir, eval_file, tmp_path, monkeypatch):
    def failing(self, **options):
        raise torch.AcceleratorError("device-side assert triggered")

    monkeypatch.setattr(DeepseekV2ForCausalLM, "generate", failing)
    with pytest.raises(OSError, match=r"GPU failed .*say the words.*device-side assert"):
        run(model_dir, eval_file, tmp_path / "out.jsonl")


def test_several_datasets_get_a_file_each(model_dir, eval_file, tmp_path, monkeypatch):
    other = tmp_path / "general.jsonl"
    other.write_text(json.dumps({"prompt": "a", "answers": ["b"]}))
    loads = []
    load = esft.load_base_model
    monkeypatch.setattr(esft, "load_base_model", lambda *a, **k: loads.append(a) or load(*a, **k))
    summaries = run(model_dir, f"{eval_file},{other}", tmp_path / "out.jsonl", "--n_samples=3")
    assert [(s["dataset"], s["n"], s["primary"]) for s in summaries] == [
        ("mine", 3, "rouge_l"),
        ("general", 1, "exact_match"),
    ]
    written = {path.name for path in tmp_path.glob("out*")}
    assert written == {f"out.{name}.{kind}" for name in ("mine", "general") for kind in ("jsonl", "summary.json")}
    assert len(loads) == 1


@pytest.mark.parametrize(
    ("gpus", "flags", "sentence"),
    [
        (0, ["--device=cuda"], "torch sees no GPU"),
        (0, ["--device=auto", "--gpus_per_rank=2"], "needs GPUs"),
        (4, ["--device=cuda", "--world_size=3", "--gpus_per_rank=2"], "needs 6 GPUs and torch sees 4"),
        (0, ["--adapter_dir=nowhere"], "--adapter_dir nowhere"),
        (0, ["--adapter_dir=testz"], "did you mean 'tests'"),
        (0, ["--adapter_dir=tests"], "expert_cfg.json"),
        (0, ["--adapter_dir=results/models/tiny"], "--base_model_path"),
        (0, ["--eval_dataset=datasets/train/law.jsonl"], "training data"),
        (0, ["--eval_dataset=nothing_known"], "nothing_known"),
        (0, ["--eval_dataset=a/x.jsonl,b/x.jsonl"], "different names"),
        (0, ["--eval_dataset=,"], "nothing to evaluate on"),
        (0, ["--num_fewshot=0"], "--num_fewshot is of the suites"),
        (0, ["--eval_dataset=", "--suite=x", "--judge_model=m"], "is of data sets: give --eval_dataset"),
        (0, ["--suite=gone.yaml"], "--suite gone.yaml: no such file"),
        (0, ["--suite=x.yaml", "--num_fewshot=-1"], "--num_fewshot -1 must be at least 0"),
        (0, ["--output_path=out.json"], r"must end in \.jsonl"),
        (0, ["--with_base"], "give --adapter_dir"),
        (0, ["--evaluator=code"], "--allow_code_execution"),
        (0, ["--evaluator=code", "--allow_code_execution"], '"test"'),
        (0, ["--judge_base_url=http://h"], "needs --judge_model"),
        (0, ["--judge_model=m", "--judge_base_url=h"], "--judge_base_url must be an address"),
        (0, ["--judge_model=m", "--judge_key_env=sk-abc"], "NAME of an environment variable"),
        (0, ["--judge_model=m", "--judge_cache=README.md"], "cannot be written"),
        (0, ["--output_path=README.md/out.jsonl"], "cannot be written"),
    ],
)
def test_errors_are_one_sentence_before_the_model(monkeypatch, capsys, eval_file, tmp_path, gpus, flags, sentence):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(esft, "load_base_model", lambda *a, **k: pytest.fail("a model was loaded"))
    monkeypatch.chdir(Path(__file__).parents[1])
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda: run("model", eval_file, tmp_path / "out.jsonl", *flags))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and re.search(sentence, error)


@pytest.mark.parametrize("flag", ["--world_size=0", "--max_new_tokens=-1", "--eval_batch_size=x", "--evaluator=judge"])
def test_a_flag_out_of_range_is_refused(capsys, flag):
    with pytest.raises(SystemExit) as stop:
        eval_multigpu.parse_args(["--eval_dataset=x", "--model=m", "--output_path=o.jsonl", flag])
    assert stop.value.code == 2 and flag.split("=")[0] in capsys.readouterr().err


def test_an_adapter_changes_the_answers(tiny_model, tiny_tokenizer, tmp_path):
    tiny_model.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    eval_file = tmp_path / "mine.jsonl"
    eval_file.write_text(json.dumps({"prompt": "a", "answers": ["b"]}))
    esft.to_esft(tiny_model, esft.ExpertConfig({1: tuple(range(8))}))
    with torch.no_grad():
        for parameter in tiny_model.parameters():
            if parameter.requires_grad:
                parameter.mul_(-20)
    esft.save_adapter(tiny_model, tmp_path / "adapter")
    outputs = []
    for name, more in {"base": [], "adapted": [f"--adapter_dir={tmp_path / 'adapter'}"]}.items():
        run(str(tmp_path / "base"), str(eval_file), tmp_path / f"{name}.jsonl", *more)
        outputs.append(json.loads((tmp_path / f"{name}.jsonl").read_text())["example"]["raw_prediction"])
    assert outputs[0] != outputs[1]


def test_another_adapter_in_the_same_folder_starts_over(tiny_model, tiny_model_dir, tmp_path, monkeypatch, capsys):
    eval_file = write_rows(tmp_path / "mine.jsonl", ["a"] * 6)
    esft.to_esft(tiny_model, esft.ExpertConfig({1: tuple(range(8))}))
    command = (str(tiny_model_dir), eval_file, tmp_path / "out.jsonl", f"--adapter_dir={tmp_path / 'adapter'}")
    esft.save_adapter(tiny_model, tmp_path / "adapter")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 1)
        run(*command)
    with torch.no_grad():
        for parameter in tiny_model.parameters():
            if parameter.requires_grad:
                parameter.mul_(-20)
    esft.save_adapter(tiny_model, tmp_path / "adapter")
    run(*command)
    assert "with another adapter: starting over" in capsys.readouterr().err


def test_without_an_output_path_no_other_evaluation_is_overwritten(model_dir, adapter_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        write_rows(tmp_path / f"{name}.jsonl", ["a"] * 2)
    flags = [f"--model={model_dir}", "--device=cpu", "--max_new_tokens=2"]
    for name in ("one", "two", "one"):
        eval_multigpu.main([*flags, f"--eval_dataset={tmp_path / name}.jsonl"])
    model, adapter = Path(model_dir).name, Path(adapter_dir).name
    kept = contents(tmp_path / "results" / "completions", "*")
    assert kept.keys() == {f"{model}.one.jsonl", f"{model}.two.jsonl"}
    shutil.copytree(adapter_dir, tmp_path / "mine" / adapter)
    flags.append(f"--eval_dataset={tmp_path / 'one'}.jsonl")
    eval_multigpu.main([*flags, f"--adapter_dir={adapter_dir}"])
    assert f"{adapter}.one.jsonl" in contents(tmp_path / "results" / "completions", "*")
    with pytest.raises(ValueError, match=rf"{adapter}.one.summary.json is of {adapter_dir}: give an --output_path"):
        eval_multigpu.main([*flags, f"--adapter_dir={tmp_path / 'mine' / adapter}"])
    summary = tmp_path / "results" / "completions" / f"{model}.one.summary.json"
    for text in ("[]", "{", '{"arguments": {}}'):
        summary.write_text(text)
        with pytest.raises(ValueError, match=rf"{model}.one.summary.json is of something else: give an --output_path"):
            eval_multigpu.main(flags)
    summary.unlink()
    summary.mkdir()
    with pytest.raises(ValueError, match="cannot be written: it is a folder"):
        eval_multigpu.main(flags)


def test_help_names_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit):
        eval_multigpu.parse_args(["--help"])
    text = capsys.readouterr().out
    flags = re.findall(r"^  (--\w+)", text, flags=re.MULTILINE)
    optional = set(flags) - {"--base_model_path"}
    assert len(optional) == 25 and text.count("(default:") == len(optional) and text.count("(required)") == 1


# ------------------------------------------------------------------------------------------------ base and adapter


@pytest.fixture(scope="module")
def adapter_dir(model_dir, tmp_path_factory) -> str:
    """An adapter that changes every answer."""
    model = DeepseekV2ForCausalLM.from_pretrained(model_dir, dtype="float32")
    esft.to_esft(model, esft.ExpertConfig({1: tuple(range(8))}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(-20)
    folder = tmp_path_factory.mktemp("adapter")
    esft.save_adapter(model, folder)
    return str(folder)


def score_by_length(monkeypatch) -> None:
    """Scores that differ between samples and models, which no tiny model gets otherwise."""
    lengths = benchmarks.Evaluator("letters", {"letters": lambda text, gold: float(sum(map(ord, text)) % 101)})
    monkeypatch.setattr(eval_multigpu, "get_evaluator", lambda *_: lengths)


def contents(folder: Path, pattern: str) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(folder.glob(pattern)) if "summary" not in path.name}


def test_base_and_adapter_in_one_call_give_what_two_calls_give(
    model_dir, adapter_dir, eval_file, tmp_path, monkeypatch, capsys
):
    score_by_length(monkeypatch)
    other = write_rows(tmp_path / "other.jsonl", ["x"] * 3)
    files, adapter = f"{eval_file},{other}", f"--adapter_dir={adapter_dir}"
    (tmp_path / "two").mkdir()
    bases = run(model_dir, files, tmp_path / "two" / "b.jsonl")
    alone = run(model_dir, files, tmp_path / "two" / "a.jsonl", adapter)
    capsys.readouterr()
    loads, load = [], esft.load_base_model
    with monkeypatch.context() as patch:
        patch.setattr(esft, "load_base_model", lambda *a, **k: loads.append(a) or load(*a, **k))
        both = run(model_dir, files, tmp_path / "one" / "a.jsonl", adapter, "--with_base")
    assert len(loads) == 1
    printed = capsys.readouterr().out
    separate = contents(tmp_path / "two", "*.jsonl")
    assert separate["a.mine.jsonl"] != separate["b.mine.jsonl"]
    joint = contents(tmp_path / "one", "*.jsonl")
    assert joint == {
        "a.mine.jsonl": separate["a.mine.jsonl"],
        "a.mine.base.jsonl": separate["b.mine.jsonl"],
        "a.other.jsonl": separate["a.other.jsonl"],
        "a.other.base.jsonl": separate["b.other.jsonl"],
    }
    for base, one, summary in zip(bases, alone, both):
        compared = summary.pop("against_base")
        assert untimed(summary) == untimed(one)
        assert (compared["base"], compared["adapter"], compared["n"]) == (base["mean"], one["mean"], base["n"])
        name = f"a.{one['dataset']}"
        assert json.loads((tmp_path / "one" / f"{name}.summary.json").read_text())["against_base"] == compared
        saved = json.loads((tmp_path / "one" / f"{name}.base.summary.json").read_text())
        assert untimed(saved) == untimed(base)
        row = rf"{one['dataset']} +{base['n']} +letters +{base['mean']:.1f} +{one['mean']:.1f} +[+-]"
        (line,) = re.findall(rf"^{row}.*$", printed, flags=re.MULTILINE)
        assert line.endswith(" *") == compared["certain"]
        assert compared["certain"] == (not compared["ci95"][0] <= 0 <= compared["ci95"][1])
    assert printed.count("dataset") == 1 and ("excludes 0" in printed) == (" *\n" in printed)


def test_base_and_adapter_on_ranks_and_after_an_interruption(
    model_dir, adapter_dir, eval_file, tmp_path, monkeypatch, capsys
):
    flags = (f"--adapter_dir={adapter_dir}", "--with_base")
    run(model_dir, eval_file, tmp_path / "unbroken" / "a.jsonl", *flags)
    wanted = contents(tmp_path / "unbroken", "*")
    assert wanted.keys() == {"a.jsonl", "a.base.jsonl"} and wanted["a.jsonl"] != wanted["a.base.jsonl"]
    for batches, world_size in ((1, 2), (4, 1)):  # while the base answers, and while the adapter does
        folder = tmp_path / str(batches)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_after(patch, batches)
            run(model_dir, eval_file, folder / "a.jsonl", *flags)
        capsys.readouterr()
        run(model_dir, eval_file, folder / "a.jsonl", *flags, f"--world_size={world_size}")
        assert f"{2 * batches} of 12 answers are there" in capsys.readouterr().err
        assert contents(folder, "*") == wanted and not list(folder.glob(".*"))


def test_an_adapter_of_another_base_is_refused_before_the_base_answers(
    model_dir, adapter_dir, eval_file, tmp_path, monkeypatch
):
    other = tmp_path / "other"
    shutil.copytree(model_dir, other)
    model = DeepseekV2ForCausalLM.from_pretrained(other, dtype="float32")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mlp.gate." in name:
                parameter.add_(1)
    model.save_pretrained(other)
    monkeypatch.setattr(eval_ranks, "evaluate", lambda *a, **k: pytest.fail("the base answered"))
    with pytest.raises(ValueError, match="router"):
        run(str(other), eval_file, tmp_path / "out.jsonl", f"--adapter_dir={adapter_dir}", "--with_base")
    assert not list(tmp_path.glob("*out*"))


# ------------------------------------------------------------------------------------------------ judge, and code


@pytest.fixture
def judged(tmp_path, monkeypatch):
    """A server that grades (test_judge.py), the flags to reach it, and rows of law and of another task."""
    server = test_judge.Server()
    monkeypatch.setenv("MY_KEY", test_judge.KEY)
    write_rows(tmp_path / "law.jsonl", [f"gold {i}" for i in range(6)])
    write_rows(tmp_path / "general.jsonl", ["a", "b"], PROMPTS[:2])
    flags = ["--judge_model=grader", f"--judge_base_url={server.url}", "--judge_key_env=MY_KEY"]
    yield server, [*flags, f"--judge_cache={tmp_path / 'cache'}"]
    server.http.shutdown()
    server.http.server_close()


def test_a_judge_grades_its_tasks_and_no_other(model_dir, tmp_path, judged, capfd):
    server, flags = judged
    server.answer = lambda number, prompt: test_judge.reply("Hm." if "gold 3" in prompt else "Score: 7")
    files = f"{tmp_path / 'law.jsonl'},{tmp_path / 'general.jsonl'}"
    law, general = run(model_dir, files, tmp_path / "out.jsonl", *flags)
    assert (law["primary"], law["mean"], law["missing"]["judge"]) == ("judge", 70, 1)
    assert law["metrics"].keys() == {"judge", "rouge_l", "chrf", "bleu"} and law["missing"]["rouge_l"] == 0
    assert law["judge"] == {"model": "grader", "base_url": server.url, "failed": {test_judge.NO_SCORE: 1}}
    assert general["primary"] == "exact_match" and "judge" not in general
    lines = [json.loads(line) for line in (tmp_path / "out.law.jsonl").read_text().splitlines()]
    assert [line["score"] for line in lines] == [0.7, 0.7, 0.7, None, 0.7, 0.7]
    assert len(server.requests) == 7  # one of them to see whether it is there
    run(model_dir, files, tmp_path / "again.jsonl", *flags)
    assert (tmp_path / "again.law.jsonl").read_text() == (tmp_path / "out.law.jsonl").read_text()
    assert len(server.requests) == 7
    printed = capfd.readouterr()
    assert "so general keeps its metrics" in printed.err and f"1 not graded: {test_judge.NO_SCORE}" in printed.out
    assert "without judge" not in printed.out and f"are kept in {tmp_path / 'cache'}, too" in printed.err
    texts = [*printed, *(path.read_text() for path in tmp_path.rglob("*") if path.is_file())]
    assert not any(test_judge.KEY in text for text in texts)
    assert not list(tmp_path.glob(".*"))


def test_what_the_judge_failed_on_is_asked_again_without_new_answers(model_dir, tmp_path, judged, monkeypatch):
    server, flags = judged
    command = (model_dir, str(tmp_path / "law.jsonl"), tmp_path / "out.jsonl", *flags)
    server.answer = lambda number, prompt: (400, {}, b"no") if "gold 2" in prompt else test_judge.reply("Score: 4")
    (summary,) = run(*command)
    assert summary["missing"]["judge"] == 1 and summary["judge"]["failed"] == {"HTTP 400 Bad Request: no": 1}
    server.answer = lambda number, prompt: test_judge.reply("Score: 10")
    before = len(server.requests)
    with monkeypatch.context() as patch:
        patch.setattr(esft, "load_base_model", lambda *a, **k: pytest.fail("a model was loaded"))
        (summary,) = run(*command)
    assert len(server.requests) == before + 1 and summary["missing"]["judge"] == 0 and summary["mean"] == 50
    assert not list(tmp_path.glob(".*"))


def test_where_the_judge_failed_on_one_of_several_no_model_is_loaded_again(
    model_dir, adapter_dir, tmp_path, judged, monkeypatch
):
    server, flags = judged
    files = f"{tmp_path / 'law.jsonl'},{tmp_path / 'general.jsonl'}"
    command = (model_dir, files, tmp_path / "out.jsonl", f"--adapter_dir={adapter_dir}", "--with_base", *flags)
    server.answer = lambda number, prompt: (400, {}, b"no") if "gold 2" in prompt else test_judge.reply("Score: 4")
    run(*command)
    server.answer = lambda number, prompt: test_judge.reply("Score: 4")
    with monkeypatch.context() as patch:
        patch.setattr(esft, "load_base_model", lambda *a, **k: pytest.fail("a model was loaded"))
        law, general = run(*command)
    assert law["mean"] == law["against_base"]["base"] == 40 and general["n"] == 2
    assert not list(tmp_path.glob(".*"))


def test_rows_that_are_not_graded_are_not_called_graded(model_dir, tmp_path, judged, capsys):
    _, flags = judged
    rows = [json.loads(line) for line in (tmp_path / "law.jsonl").read_text().splitlines()]
    rows[0]["evaluator"] = "summary"
    (tmp_path / "mine.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (summary,) = run(model_dir, str(tmp_path / "mine.jsonl"), tmp_path / "out.jsonl", *flags)
    assert summary["primary"] == "score" and "grades 1 of 6 rows of mine" in capsys.readouterr().err
    judged_by = [json.loads(line)["metrics"].get("judge") for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert judged_by[0] == 80 and judged_by[1:] == [None] * 5


def test_a_judge_with_base_compares_its_grades(model_dir, adapter_dir, tmp_path, judged):
    server, flags = judged
    grades = iter(range(100))
    server.answer = lambda number, prompt: test_judge.reply(f"Score: {2 if next(grades) < 7 else 9}")
    flags = [*flags, "--judge_parallel=1", f"--adapter_dir={adapter_dir}", "--with_base"]
    (summary,) = run(model_dir, str(tmp_path / "law.jsonl"), tmp_path / "out.jsonl", *flags)
    compared = summary["against_base"]
    assert (compared["base"], compared["adapter"], compared["certain"]) == (20, 90, True)


def test_without_a_key_the_offline_metric_stands_in(model_dir, tmp_path, judged, monkeypatch, capsys):
    server, flags = judged
    flags = [flag for flag in flags if not flag.startswith("--judge_base_url")]  # which leaves OpenAI's
    for value in (None, " "):
        monkeypatch.delenv("MY_KEY") if value is None else monkeypatch.setenv("MY_KEY", value)
        (summary,) = run(model_dir, str(tmp_path / "law.jsonl"), tmp_path / "out.jsonl", *flags)
        printed = capsys.readouterr()
        assert summary["primary"] == "rouge_l" and "judge" not in summary and not server.requests
        said = "no judge graded (MY_KEY is not set in the environment); in its place: rouge_l on law"
        assert f"note: {said}" in printed.err and printed.out.endswith(f"\n{said}\n")
    run(model_dir, str(tmp_path / "law.jsonl"), tmp_path / "out.jsonl")
    said = "no judge graded (no --judge_model was given); in its place: rouge_l on law"
    assert capsys.readouterr().out.endswith(f"\n{said}\n")


def test_a_server_of_one_s_own_is_asked_without_a_key(model_dir, tmp_path, judged, monkeypatch, capsys):
    server, flags = judged
    monkeypatch.delenv("MY_KEY")
    (summary,) = run(model_dir, str(tmp_path / "law.jsonl"), tmp_path / "out.jsonl", *flags)
    assert summary["primary"] == "judge" and summary["mean"] == 80
    assert not any("Authorization" in headers for _, _, headers, _ in server.requests)
    printed = capsys.readouterr()
    assert f"asking grader at {server.url}, without a key" in printed.err and "no judge" not in printed.out


def test_a_judge_that_refuses_is_one_sentence_before_the_model(model_dir, tmp_path, judged, monkeypatch, capsys):
    server, flags = judged
    server.answer = lambda number, prompt: (401, {}, f"bad key {test_judge.KEY}".encode())
    monkeypatch.setattr(esft, "load_base_model", lambda *a, **k: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda: run(model_dir, str(tmp_path / "law.jsonl"), tmp_path / "out.jsonl", *flags))
    *_, error = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "HTTP 401" in error and test_judge.KEY not in error


def test_math_and_code_from_rows(model_dir, tmp_path, monkeypatch, capsys):
    answers = {"right": "    return 4", "loops": "    while True: pass", "sum": "2 + 2 is 4", "word": "blue"}
    rows = [
        {
            "prompt": f"def {name}():\n",
            "test": "def check(f): assert f() == 4",
            "entry_point": name,
            "evaluator": "code",
        }
        for name in ("right", "loops")
    ]
    rows += [{"prompt": "sum", "answers": ["#### 4"], "evaluator": "math"}, {"prompt": "word", "answers": ["blue"]}]
    path = tmp_path / "general.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    by_prompt = {
        row["prompt"]: generation.Completion(answers[row.get("entry_point", row["prompt"])], 1, False) for row in rows
    }
    monkeypatch.setattr(benchmarks, "complete", lambda model, tokenizer, prompts, **_: [by_prompt[p] for p in prompts])
    monkeypatch.setattr(code_runner.run, "__defaults__", (code_runner.Limits(wall=2, cpu=1),))
    with pytest.raises(ValueError, match="--allow_code_execution"):
        run(model_dir, str(path), tmp_path / "out.jsonl")
    (summary,) = run(model_dir, str(path), tmp_path / "out.jsonl", "--allow_code_execution")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["score"] for line in lines] == [1, 0, 1, 1]
    assert (summary["primary"], summary["mean"], summary["metrics"]["pass@1"], summary["failed"]) == (
        "score",
        75,
        50,
        0,
    )
    assert re.search(r"programs that the model writes are run, .* audit hook", capsys.readouterr().err)
