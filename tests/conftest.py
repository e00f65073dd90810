"""Tiny random models, one per layout of the fused experts, and a runner of small process groups."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # bits that are compared may differ by the number of threads

import gc
import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

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


@pytest.fixture
def tiny_model():
    return make_model()


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """Byte-level BPE without merges of note, and the released chat format as its template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<bos>", "<eos>", "<pad>"]
    trainer = trainers.BpeTrainer(vocab_size=128, special_tokens=special, initial_alphabet=list("abcdefghijklmnop"))
    bpe.train_from_iterator(["User: what is it?\n\nAssistant: it is 0123456789, yes {} no."], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}User: {{ m.content }}\n\nAssistant:"
        "{% elif m.role == 'system' %}{{ m.content }}\n\n{% else %} {{ m.content }}{{ eos_token }}{% endif %}"
        "{% endfor %}"
    )
    return tokenizer


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory, tiny_tokenizer):
    """A saved folder: the deepseek_v2 model and the tokenizer, through the ordinary Auto classes."""
    folder = tmp_path_factory.mktemp("tiny")
    make_model().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def official():
    """The released data of the paper's authors, where it is at hand."""
    if not OFFICIAL.is_dir():
        pytest.skip("the released data is not at hand")
    return OFFICIAL


# --------------------------------------------------------------------------------------------------------------------
# processes

PRELOADED = ["pytest", "transformers.trainer", "transformers.models.auto.modeling_auto", "wandb", "train"]
PRELOADED += [f"transformers.models.{family}.modeling_{family}" for family in FAMILIES]


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
    context.set_forkserver_preload(PRELOADED)
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
    gc.freeze()  # what the server imported is not to be searched for garbage
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
