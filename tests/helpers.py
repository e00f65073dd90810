"""What several tests share: small random models, process groups, runs and their files."""

import gc
import json
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import eval_multigpu
import train
from deepseek.files import sha256
from deepseek.process_groups import Ranks, join
from esft import ExpertScores, save_adapter, to_esft
from evaluation import runner, workers
from training.config import RunConfig, read_config
from training.trainer import ESFTTrainer
from utils import run_cli

ROOT = Path(__file__).resolve().parents[1]


OFFICIAL = ROOT.parent / "shared" / "official"


SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


FAMILIES = {
    "deepseek_v2": {
        **SMALL,
        "intermediate_size": 64,
        "moe_intermediate_size": 16,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": None,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "topk_method": "greedy",
        "n_group": None,
        "topk_group": None,
    },
    "deepseek_v3": {  # routes within the best groups, by biased scores
        **SMALL,
        "intermediate_size": 64,
        "moe_intermediate_size": 16,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "n_group": 4,
        "topk_group": 2,
    },
    "qwen3_moe": {**SMALL, "head_dim": 8, "moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 3},
    "mixtral": {**SMALL, "intermediate_size": 16, "num_local_experts": 8, "num_experts_per_tok": 3},
    "olmoe": {**SMALL, "intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 3},
    "gpt_oss": {  # transposed, interleaved, biased
        **SMALL,
        "head_dim": 8,
        "intermediate_size": 32,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "layer_types": ["full_attention"] * 3,
    },
    "nemotron_h": {  # no gate
        **SMALL,
        "head_dim": 8,
        "layers_block_type": ["moe", "attention", "moe"],
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_group": 1,
        "topk_group": 1,
    },
}


def make_model(family: str = "deepseek_v2", dtype: torch.dtype = torch.float32, seed: int = 0, **changes):
    """A small random model of a family, in evaluation mode, with weights large enough that every expert matters."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**FAMILIES[family], **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.ndim > 1:
                param.normal_(std=0.15)
            elif "bias" in name:
                param.normal_(std=0.05)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.05)
    return model.to(dtype).eval()


PRELOADED = ["pytest", "transformers.trainer", "transformers.models.auto.modeling_auto", "wandb", "train"]
PRELOADED += ["evaluation.runner", *(f"transformers.models.{family}.modeling_{family}" for family in FAMILIES)]
multiprocessing.set_forkserver_preload(PRELOADED)
workers.START = "forkserver"  # a fork of a server that has imported torch starts at once


RANK_TIMEOUT = timedelta(seconds=60)


def join_world() -> Ranks:
    """Join the processes of `run_ranks`."""
    return join(RANK_TIMEOUT, "gloo")


def assert_near(what: str, found: torch.Tensor | None, wanted: torch.Tensor | None, tolerance: float) -> None:
    """Compare tensors up to `tolerance` times the largest entry."""
    assert (found is None) == (wanted is None), f"{what}: {found} instead of {wanted}"
    if wanted is not None:
        error, scale = (found - wanted).abs().max(), wanted.abs().max()
        assert error <= tolerance * scale + 1e-12, f"{what}: off by {error:.1e}, the largest entry is {scale:.1e}"


def run_ranks(world: int, fn: Callable, *args, timeout: float = 120) -> list:
    """[fn(rank, *args) for every rank], in `world` processes of one thread each that are joined by gloo and have the
    environment of torchrun. `fn` is of a module, and what it takes and gives can be pickled.

    The processes are forks of a server that has imported the libraries, so that they start in no time, and clean.

    Raises:
        RuntimeError: a rank failed (whichever was the first, with its traceback), died, or was not done after `timeout`
            seconds. No process is left.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("forkserver")
    call = pickle.dumps((fn, args))
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, str(rank)) for rank in range(world)]
        processes = [
            context.Process(target=_rank, args=(rank, world, store.port, timeout, files[rank], call), daemon=True)
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        ends, running = time.monotonic() + timeout + 2, list(processes)  # collectives give up before that, and tell
        while running and wait([process.sentinel for process in running], max(0, ends - time.monotonic())):
            running = [process for process in running if process.exitcode is None]
            if any(process.exitcode for process in processes):  # the others follow, or wait for it in vain
                ends = min(ends, time.monotonic() + 1)
        exits = {rank: process.exitcode for rank, process in enumerate(processes)}
        for process in processes:
            process.kill()
            process.join()
        ended = {rank: pickle.loads(file.read_bytes()) for rank, file in enumerate(files) if file.exists()}
    if dead := {rank: code for rank, code in exits.items() if code and rank not in ended}:
        raise RuntimeError(f"ranks died, with exit codes {dead}")
    if failed := sorted((*error, rank) for rank, (_, error) in ended.items() if error):
        _, text, rank = failed[0]
        raise RuntimeError(f"rank {rank} of {world}:\n{text}")
    if at_work := [rank for rank in range(world) if rank not in ended]:
        raise RuntimeError(f"ranks {at_work} not done after {timeout} s")
    return [ended[rank][0] for rank in range(world)]


def _rank(rank: int, world: int, port: int, timeout: float, file: Path, call: bytes) -> None:
    gc.freeze()  # what the server imported is exempt from garbage collection
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    store = dist.TCPStore("127.0.0.1", port)  # the parent's
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout))
    try:
        fn, args = pickle.loads(call)
        ended, failed = pickle.dumps((fn(rank, *args), None)), False
    except BaseException:
        ended, failed = pickle.dumps((None, (time.time(), traceback.format_exc()))), True
    part = file.with_suffix(".part")
    part.write_bytes(ended)
    part.rename(file)
    if failed:
        os._exit(1)  # at once: the others may wait for this rank
    if dist.is_initialized():
        dist.barrier()  # nobody leaves while another may still talk to it
        dist.destroy_process_group()


def config_of(files: Path, out: Path, **changes) -> RunConfig:
    return read_config(arguments(files, out, **changes))


def refused(capsys, main, argv: list, *words: str) -> str:
    """Return the one sentence, with all `words`, in which a command says why it ends with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda: main([str(arg) for arg in argv]))
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and [line.startswith("error: ") for line in lines].index(True) == len(lines) - 1, lines
    assert all(word in lines[-1] for word in words), lines[-1]
    return lines[-1]


def fails(argv: list[str], capsys) -> str:
    """Return the sentence in which train.py says why it ends with exit code 2."""
    return refused(capsys, train.main, argv)


def losses(folder: Path) -> dict:
    """(key, step) -> loss or validation loss of a run's history."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {(key, row["step"]): row[key] for row in history for key in ("loss", "eval_loss", "grad_norm") if key in row}


def same(a: Path, b: Path) -> bool:
    left, right = tensors_of(a), tensors_of(b)
    bits = left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
    return bits and losses(a) == losses(b)


def at_step(monkeypatch, step: int, do) -> None:
    """Call `do(trainer)` where optimizer step `step` (from 1) begins."""
    original = ESFTTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step - 1:
            do(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(ESFTTrainer, "training_step", training_step)


class Killed(BaseException):
    pass


def trainer_of(config: RunConfig, monkeypatch) -> ESFTTrainer:
    """The trainer of a run, as it stands before its first step."""
    found = []

    def stop(self, **_):
        found.append(self)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ESFTTrainer, "train", stop)
        train.run(config)
    return found[0]


def kill(_):
    raise Killed


BOTH = {"shared_experts": True, "non_expert_modules": True}


SHARD = "30KB"


def noisy_adapter(model, config, folder, **options):
    """Save an adapter of `config` whose tensors all differ from the model's; returns the trained model."""
    torch.manual_seed(1)
    to_esft(model, config, **options)
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.add_(torch.randn_like(param) * 0.1)
    save_adapter(model, folder)
    return model


def tensors_of(folder):
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def files_of(folder):
    return {path.name: sorted(load_file(path)) for path in sorted(folder.glob("*.safetensors"))}


def hashes(folder):
    return {path.name: sha256(path) for path in sorted(folder.glob("*.safetensors"))}


def assert_same_tensors(found, wanted):
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert found[name].dtype == wanted[name].dtype and torch.equal(found[name], wanted[name]), name


RUN = {
    "config": {
        "method": "esft",
        "base_model_path": "results/models/tiny",
        "train_dataset": "law",
        "global_batch_size": 4,
        "seq_length": 256,
        "training": {"learning_rate": 0.0025, "lr_scheduler_type": "linear", "seed": 0},
    },
    "environment": {"torch": "2.13.0", "transformers": "5.23.0", "date": "2026-11-21"},
    "results": {"steps": 450, "best_step": 300, "train_loss": 0.2, "eval_loss": 0.125, "parameters": 1000},
}


def scores_of(rows: list[list[float]], function: str = "token") -> ExpertScores:
    return ExpertScores({function: {layer: dict(enumerate(row)) for layer, row in enumerate(rows)}})


EXPERTS = {"experts": {"1": [3, 5], "2": [0, 6, 2]}, "shared_experts": False, "non_expert_modules": False}


TRAIN_KEYS = {
    "seq_length": 48,
    "max_steps": 6,
    "batch_size": 2,
    "learning_rate": 1e-2,
    "validation_fraction": 0.2,
    "eval_steps": 2,
    "save_steps": 2,
    "disable_tqdm": True,
}


def arguments(files: Path, out: Path, **changes) -> list[str]:
    paths = {
        "base_model_path": files / "m32",
        "train_dataset": files / "data.jsonl",
        "expert_config": files / "experts.json",
        "output_dir": out,
    }
    pairs = {**paths, **TRAIN_KEYS, **changes}
    return [f"{key}={value}" for key, value in pairs.items() if value is not None]


# --------------------------------------------------------------------------------------------------------------------
# evaluation

PROMPTS = [
    "add 1 and 2",
    "a",
    "say the words of the sentence in the other order please",
    "sort 3 2 1",
    "copy b",
    "a b c",
]
KEY = "sk-this-is-the-secret-key"


def run_eval(model_dir: str, eval_file: str, output_path, *more: str) -> list[dict]:
    """Run eval_multigpu.py on the CPU, with short answers in small batches."""
    flags = [f"--model={model_dir}", f"--eval_dataset={eval_file}", f"--output_path={output_path}"]
    return eval_multigpu.main([*flags, "--max_new_tokens=4", "--eval_batch_size=2", "--device=cpu", *more])


def write_rows(path: Path, answers: list[str], prompts: list[str] = PROMPTS) -> str:
    path.write_text("\n".join(json.dumps({"prompt": p, "answers": [a]}) for p, a in zip(prompts, answers)))
    return str(path)


def untimed(summary: dict) -> dict:
    timing = ("seconds", "tokens_per_second", "arguments", "environment")
    return {key: value for key, value in summary.items() if key not in timing}


def contents(folder: Path, pattern: str) -> dict[str, str]:
    """Return the texts of the files of an evaluation, without its summaries."""
    return {path.name: path.read_text() for path in sorted(folder.glob(pattern)) if "summary" not in path.name}


def stop_after(monkeypatch, batches: int) -> None:
    """Press Ctrl-C before the batch after that many."""
    evaluate, calls = runner.evaluate, []

    def stopping(*args, **options):
        calls.append(1)
        if len(calls) > batches:
            raise KeyboardInterrupt
        return evaluate(*args, **options)

    monkeypatch.setattr(runner, "evaluate", stopping)


class Watched:
    """An evaluator that logs its process and the answer that it scores.

    While <folder>/armed is there, the answer "die" kills the process and "hang" waits. "raise" always raises.
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
        """Return the answers scored since the last call."""
        path = self.folder / "log"
        words = [line.split()[1] for line in path.read_text().splitlines()] if path.exists() else []
        path.unlink(missing_ok=True)
        return words


def reply(text: object) -> bytes:
    """Return the body of an answer of /chat/completions."""
    return json.dumps({"choices": [{"message": {"content": text}}]}).encode()


class JudgeServer:
    """A judge's endpoint. `answer(request number, prompt)` returns a body, or (status, headers, body)."""

    def __init__(self):
        self.answer = lambda number, prompt: reply("Fine.\nScore: 8")
        self.requests: list[tuple] = []  # path, headers, body
        lock, server = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(server.requests)
                    server.requests.append((self.path, self.headers, body))
                what = server.answer(number, body["messages"][0]["content"])
                status, headers, content = what if isinstance(what, tuple) else (200, {}, what)
                self.send_response(status)
                plain = {"Content-Length": str(len(content)), "Content-Type": "application/json"}
                for name, value in {**plain, **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


def learned_runs(document) -> list[list[int]]:
    """Return the tokens of each run of labels. A label is the token itself."""
    runs, previous = [], -100
    for token, label in zip(document.input_ids, document.labels):
        assert label in (-100, token)
        if label != -100:
            runs = [*runs, [token]] if previous == -100 else [*runs[:-1], [*runs[-1], token]]
        previous = label
    return runs
