"""Adapters as they are published, through everything that takes one; and publishing our own."""

import copy
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import eval_multigpu
from esft import ExpertConfig, add_adapter, load_esft_model, merge, unload
from scripts import merge_adapter, push_adapter
from tests.helpers import RUN, assert_same_tensors, hashes, make_model, noisy_adapter, tensors_of
from utils import ROOT, run_cli

EXPERTS = {1: (5, 2), 2: (7,)}
IDS = torch.arange(3, 15)[None]


def publish(adapter, folder, prefix="", shards=2, dtype=torch.bfloat16, change=lambda tensors: None):
    """Write an adapter the way the twelve published ones are: names without "model.", bf16, an index with shards, a
    config of three keys, and beside them the base's config.json and code."""
    folder.mkdir()
    tensors = {key.removeprefix("model."): t.to(dtype) for key, t in load_file(adapter / "adapter.safetensors").items()}
    tensors = {f"{prefix}{key}": tensor for key, tensor in tensors.items()}
    change(tensors)
    names, index = sorted(tensors), {}
    for number in range(shards):
        part = names[number::shards]
        file = f"model-{number + 1:05}-of-{shards:06}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "expert_cfg.json").write_text(json.dumps(ExpertConfig.load(adapter).to_dict()))
    (folder / "config.json").write_text('{"model_type": "deepseek_v2", "auto_map": {"AutoModel": "code.Model"}}')
    (folder / "code.py").write_text("raise RuntimeError('published code must not run')")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_tokenizer):
    """A bf16 base in shards, and adapters of our own with the shared experts trained or not."""
    folder = tmp_path_factory.mktemp("made")
    model = make_model(dtype=torch.bfloat16)
    model.save_pretrained(folder / "base", max_shard_size="30KB")
    tiny_tokenizer.save_pretrained(folder / "base")
    for name, shared in (("experts", False), ("shared", True)):
        noisy_adapter(copy.deepcopy(model), ExpertConfig(EXPERTS, shared_experts=shared), folder / name)
    noisy_adapter(copy.deepcopy(model), ExpertConfig(EXPERTS), folder / "lora", lora_rank=2)
    return folder


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("kind", ["experts", "shared"])
def test_loads_and_merges_as_our_own_does(kind, prefix, shards, made, tmp_path):
    """add_adapter, load_esft_model, unload, merge on disk and unmerge: bit for bit those of the adapter it was."""
    base, own = made / "base", made / kind
    published = publish(own, tmp_path / "published", prefix, shards)
    shared = f"{prefix}layers.1.mlp.shared_experts.gate_proj.weight"
    assert (shared in tensors_of(published)) == (kind == "shared")
    model = AutoModelForCausalLM.from_pretrained(base)
    before, wanted = state(model), state(add_adapter(AutoModelForCausalLM.from_pretrained(base), own))
    assert_same_tensors(state(add_adapter(model, published)), wanted)
    with pytest.raises(AssertionError):
        assert_same_tensors(state(model), before)
    assert_same_tensors(state(unload(model)), before)
    loaded, _ = load_esft_model(base, published)
    assert_same_tensors(state(loaded), wanted)

    merge_adapter.merge_adapter(base, [published], tmp_path / "out")
    merge(loaded).save_pretrained(tmp_path / "wanted", max_shard_size="30KB")
    assert_same_tensors(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "wanted"))
    merge_adapter.unmerge(tmp_path / "out", tmp_path / "again")
    assert hashes(tmp_path / "again") == hashes(base)


def test_on_a_base_in_fp32(made, tmp_path):
    """bf16 values in an fp32 model are exact; unloading restores fp32 bits that bf16 does not have."""
    published = publish(made / "shared", tmp_path / "published")
    model = make_model()
    before = state(model)
    after = state(add_adapter(model, published))
    for name, tensor in tensors_of(published).items():
        if ".experts." not in name:
            assert torch.equal(after[f"model.{name}"], tensor.float())
    assert torch.equal(
        after["model.layers.1.mlp.experts.down_proj"][5],
        tensors_of(published)["layers.1.mlp.experts.5.down_proj.weight"].float(),
    )
    assert_same_tensors(state(unload(model)), before)


def test_evaluates(made, tmp_path):
    """The evaluation command takes the published folder, and gives what its own form gives and the base does not."""
    published = publish(made / "shared", tmp_path / "published", shards=1)
    rows = [{"prompt": f"what is it {n}?", "answers": ["it is 0"]} for n in range(3)]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = {}
    for name, adapter in {"base": None, "own": made / "shared", "published": published}.items():
        flags = [f"--adapter_dir={adapter}"] if adapter else []
        eval_multigpu.main(
            [f"--eval_dataset={tmp_path / 'eval.jsonl'}", f"--base_model_path={made / 'base'}", "--max_new_tokens=6",
             f"--output_path={tmp_path / name}.jsonl", "--device=cpu", *flags]
        )  # fmt: skip
        lines = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        answers[name] = [json.loads(line)["example"]["raw_prediction"] for line in lines]
    assert answers["published"] == answers["own"] != answers["base"]


def drop(name):
    return lambda tensors: tensors.pop(name)


def cut(folder):
    path = folder / "model-00002-of-000002.safetensors"
    path.write_bytes(path.read_bytes()[:-64])


def switch(**flags):
    def change(folder):
        config = json.loads((folder / "expert_cfg.json").read_text())
        (folder / "expert_cfg.json").write_text(json.dumps(config | flags))

    return change


DOWN, SHARED = "layers.1.mlp.experts.5.down_proj.weight", "layers.2.mlp.shared_experts.up_proj.weight"
# how: (what to change in the tensors, what to do to the folder, the message)
SPOILED = {
    "a missing projection": (drop(DOWN), None, rf"model\.{DOWN} is missing"),
    "a missing shared projection": (drop(SHARED), None, rf"model\.{SHARED} is missing"),
    "an extra expert": (
        lambda t: t.update({DOWN.replace(".5.", ".6."): t[DOWN].clone()}),
        None,
        r"experts\.6\.down_proj",
    ),
    "another shape": (
        lambda t: t.update({DOWN: t[DOWN][:, :8].clone()}),
        None,
        rf"{DOWN} has shape \(32, 8\).*\(32, 16\)",
    ),
    "whole numbers": (lambda t: t.update({DOWN: t[DOWN].to(torch.int8)}), None, rf"{DOWN} has shape .* in I8"),
    "a truncated shard": (None, cut, r"model-00002-of-000002\.safetensors: missing, damaged or truncated"),
    "a missing shard": (None, lambda f: (f / "model-00002-of-000002.safetensors").unlink(), "is missing"),
    "shared experts that its config denies": (
        None,
        switch(shared_experts=False),
        r"shared_experts.* not in its expert_cfg",
    ),
    "modules that are not there": (None, switch(non_expert_modules=True), "embed_tokens.weight is missing"),
}
SPOILED = {how: (a or (lambda tensors: None), b or (lambda folder: None), c) for how, (a, b, c) in SPOILED.items()}


@pytest.mark.parametrize("how", SPOILED)
def test_a_spoiled_one_is_refused_by_name(how, made, tmp_path):
    """By loading, which leaves every bit of the model, and by merging, which writes nothing."""
    change, spoil, message = SPOILED[how]
    published = publish(made / "shared", tmp_path / "published", change=change)
    spoil(published)
    model = make_model(dtype=torch.bfloat16)
    before = state(model)
    with pytest.raises(ValueError, match=f"adapter .*published: .*{message}"):
        add_adapter(model, published)
    assert_same_tensors(state(model), before)
    assert not hasattr(model, "_esft")
    with pytest.raises(ValueError, match=f"adapter .*published: .*{message}"):
        merge_adapter.merge_adapter(made / "base", [published], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["published"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 2}, "of layer 2, and this model's MoE layers are 1 to 1"),
        ({"n_routed_experts": 4}, "expert 5 of layer 1, .* experts 0 to 3"),
        ({"moe_intermediate_size": 8}, r"has shape \(\d+, \d+\) in BF16, this model's is"),
    ],
)
def test_a_wrong_base_is_refused_without_a_fingerprint(changes, message, made, tmp_path):
    """The published ones have none: layers, experts and shapes tell. Another base of the same shape is taken."""
    published = publish(made / "experts", tmp_path / "published")
    model = make_model(**changes)
    model.save_pretrained(tmp_path / "other")
    before = state(model)
    with pytest.raises(ValueError, match=message):
        add_adapter(model, published)
    assert_same_tensors(state(model), before)
    with pytest.raises(ValueError, match=message):
        merge_adapter.merge_adapter(tmp_path / "other", [published], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------- publishing


class FakeApi:
    """Of huggingface_hub, what push_adapter uses; it keeps what was uploaded."""

    def __init__(self, private=True, fails=None):
        self.private, self.fails, self.pushed, self.calls = private, fails, {}, []

    def create_repo(self, repo_id, private=None, exist_ok=False):
        self.calls.append(("create_repo", repo_id, private, exist_ok))
        if self.fails:
            raise self.fails
        return f"https://hub.example/{repo_id}"

    def repo_info(self, repo_id):
        return SimpleNamespace(private=self.private)

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, commit_message):
        self.calls.append(("upload_folder", repo_id))
        for path in Path(folder_path).rglob("*"):
            assert any(path.match(pattern) for pattern in allow_patterns), path
            self.pushed[str(path.relative_to(folder_path))] = path.read_bytes()


@pytest.fixture
def run_folder(made, tmp_path):
    """An adapter with all that a run leaves beside it, and private things in its run.json."""
    folder = tmp_path / "run"
    shutil.copytree(made / "shared", folder)
    run = copy.deepcopy(RUN)
    run["config"] |= {
        "base_model_path": str(Path.home() / "models" / "DeepSeek-V2-Lite"),
        "train_dataset": "/srv/secret-customer/cases.jsonl",
        "output_dir": "../elsewhere/law",
        "note": f"kept in {Path.home()}/x",
    }
    run["config"]["training"] |= {"hub_token": "hf_abc", "logging_dir": "C:\\Users\\me\\logs", "n_sample_tokens": 5}
    (folder / "run.json").write_text(json.dumps(run))
    for name in ("checkpoint-9/states/rank-0.safetensors", "checkpoint-9/adapter.safetensors", "trainer_state.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"private")
    return folder


def do_push(monkeypatch, api, *flags, token="hf_test"):
    monkeypatch.setattr(push_adapter, "HfApi", lambda: api)
    monkeypatch.setattr(push_adapter, "get_token", lambda: token)
    push_adapter.main([str(flag) for flag in flags])


def test_what_is_pushed_is_the_adapter_and_its_story(run_folder, monkeypatch, tmp_path):
    api = FakeApi()
    do_push(monkeypatch, api, f"--adapter_dir={run_folder}", "--repo_id=you/law", "--private")
    assert api.calls == [("create_repo", "you/law", True, True), ("upload_folder", "you/law")]
    assert api.pushed.keys() == {"README.md", "adapter.safetensors", "expert_cfg.json", "run.json"}
    assert api.pushed["adapter.safetensors"] == (run_folder / "adapter.safetensors").read_bytes()
    for name, content in api.pushed.items():
        (tmp_path / "fetched").mkdir(exist_ok=True)
        (tmp_path / "fetched" / name).write_bytes(content)
    wanted = logits(add_adapter(make_model(), run_folder))
    assert torch.equal(logits(add_adapter(make_model(), tmp_path / "fetched")), wanted)
    assert not (run_folder / "README.md").exists()


def test_lora_on_selected_experts_is_pushed_whole_and_without_its_paths(made, monkeypatch, tmp_path):
    adapter, fetched, api = shutil.copytree(made / "lora", tmp_path / "lora"), tmp_path / "fetched", FakeApi()
    config = json.loads((adapter / "adapter_config.json").read_text())
    private = str(Path.home() / "models" / "base")
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": private}))
    do_push(monkeypatch, api, f"--adapter_dir={adapter}", "--repo_id=you/law")
    assert api.pushed.keys() == {"README.md", "adapter_model.safetensors", "adapter_config.json", "base.json"}
    assert b"| trained | 3 routed experts in 2 layers |" in api.pushed["README.md"]
    assert json.loads(api.pushed["adapter_config.json"]) == config | {"base_model_name_or_path": "base"}
    fetched.mkdir()
    for name, content in api.pushed.items():
        (fetched / name).write_bytes(content)
    wanted = logits(add_adapter(make_model(), adapter))
    assert torch.equal(logits(add_adapter(make_model(), fetched)), wanted)
    with pytest.raises(ValueError, match="routers' weights differ"):  # its note came along
        add_adapter(make_model(seed=1), fetched)


def test_nothing_private_is_pushed(run_folder, monkeypatch):
    api = FakeApi()
    do_push(monkeypatch, api, f"--adapter_dir={run_folder}", "--repo_id=you/law")
    pushed = b"\n".join(api.pushed[name] for name in ("README.md", "run.json", "expert_cfg.json")).decode()
    for private in (
        str(Path.home()) + "/",
        "secret-customer",
        "/srv",
        "elsewhere",
        "hf_abc",
        "hub_token",
        "Users",
        "\\",
    ):
        assert private not in pushed, private
    config = json.loads(api.pushed["run.json"])["config"]
    assert config["base_model_path"] == "DeepSeek-V2-Lite" and config["train_dataset"] == "cases.jsonl"
    assert config["note"] == "kept in ~/x" and config["training"]["n_sample_tokens"] == 5
    own = json.loads((run_folder / "run.json").read_text())["config"]
    assert own["training"]["hub_token"] == "hf_abc"  # the file itself is left alone


def test_the_card_says_what_was_trained_on_what(run_folder, monkeypatch, capsys):
    do_push(
        monkeypatch, FakeApi(fails=AssertionError("the network")), f"--adapter_dir={run_folder}", "--repo_id=you/law",
        "--base_id=deepseek-ai/DeepSeek-V2-Lite", "--license=mit", "--dry_run", token=None,
    )  # fmt: skip
    out = capsys.readouterr().out
    page, _, listed = out.partition("would be pushed to you/law:")
    assert [line.split()[0] for line in listed.split("\n") if line] == [
        "README.md", "adapter.safetensors", "expert_cfg.json", "run.json",
    ]  # fmt: skip
    data = ModelCard(page).data
    assert data.base_model == "deepseek-ai/DeepSeek-V2-Lite" and data.license == "mit" and "esft" in data.tags
    assert data.to_dict()["base_model_relation"] == "adapter"
    for row in (
        "| base | deepseek-ai/DeepSeek-V2-Lite (model type deepseek_v2) |",
        "| data | cases.jsonl |",
        "| method | esft |",
        "| trained | 3 routed experts in 2 layers and the shared experts |",
        "| steps | 450 |",
        "| learning rate | 0.0025, linear |",
        "| training loss | 0.2000 |",
        "| validation loss | 0.1250, after step 300 |",
        "| versions | torch 2.13.0, transformers 5.23.0 |",
        "| 1 | 2 | 5 2 |",
        "| 2 | 1 | 7 |",
    ):
        assert row in page, row
    # what it tells to run is what there is
    merge_command = re.search(r"python scripts/merge_adapter.py (.*)", page)[1]
    assert merge_adapter.parse_args(merge_command.split()).adapter_dir == [Path("law")]
    exec(re.search(r"from esft import .*", page)[0], {})


def test_a_card_of_ones_own_is_kept_and_a_run_is_not_needed(run_folder, monkeypatch):
    (run_folder / "run.json").unlink()
    api = FakeApi()
    do_push(monkeypatch, api, f"--adapter_dir={run_folder}", "--repo_id=you/law")
    assert b"| trained | 3 routed experts" in api.pushed["README.md"] and "run.json" not in api.pushed
    (run_folder / "README.md").write_text("mine")
    do_push(monkeypatch, api, f"--adapter_dir={run_folder}", "--repo_id=you/law")
    assert api.pushed["README.md"] == b"mine"


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("deepseek-ai/DeepSeek-V2-Lite", "deepseek-ai/DeepSeek-V2-Lite"),
        ("law", None),
        ("datasets/train", None),
        ("data/mine.jsonl", None),
        ("a/b/c", None),
        ("/a/b", None),
        (None, None),
    ],
)
def test_hub_ids_are_told_from_paths(name, found):
    assert push_adapter.hub_id(name) == found


@pytest.mark.parametrize(
    ("api", "flags", "token", "message"),
    [
        (FakeApi(), ["--repo_id=you/law"], None, "there is no token of the hub"),
        (
            FakeApi(fails=LocalEntryNotFoundError("no route")),
            ["--repo_id=you/law"],
            "t",
            "cannot push to you/law: no route",
        ),
        (FakeApi(private=False), ["--repo_id=you/law", "--private"], "t", "there already and is public"),
        (FakeApi(), ["--repo_id=law"], "t", "'law': it is not a hub id"),
        (FakeApi(), ["--repo_id=you/la w"], "t", "'you/la w': it is not a hub id"),
        (FakeApi(), ["--repo_id=you/law", "--adapter_dir=nowhere"], "t", "nowhere: no such expert config or adapter"),
    ],
)
def test_what_cannot_be_pushed_is_one_sentence_and_exit_code_2(api, flags, token, message, made, monkeypatch, capsys):
    command = [f"--adapter_dir={made / 'experts'}", *flags]
    with pytest.raises(SystemExit, match="2"):
        run_cli(lambda: do_push(monkeypatch, api, *command, token=token))
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line) and not api.pushed


# ------------------------------------------------------------------------------------------------------------- fetching


def shell(script, *arguments, **environ):
    command = ["bash", str(ROOT / "scripts" / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environ}, check=False)


def test_download_prints_its_commands():
    done = shell("download.sh", "base", "law", "data", DRY_RUN="1")
    lines = [line.split() for line in done.stdout.splitlines()]
    assert done.returncode == 0 and len(lines) == 3 + 2 * 8
    base = ["deepseek-ai/ESFT-vanilla-lite", "--local-dir", "results/models/ESFT-vanilla-lite"]
    assert lines[0][1:] == ["download", *base, "--exclude", "*.py"]
    for words, score in zip(lines[1:3], ("token", "gate")):
        name = f"ESFT-{score}-law-lite"
        assert words[2:5] == [f"deepseek-ai/{name}", "--local-dir", f"results/checkpoints/{name}"]
    source = "https://raw.githubusercontent.com/deepseek-ai/ESFT/main/datasets"
    assert [words[-2:] for words in lines[3::2]] == [
        [f"datasets/released/{split}/{task}.jsonl.part", f"{source}/{split}/{task}.jsonl"]
        for split in ("train", "eval")
        for task in ("intent", "law", "summary", "translation")
    ]


def test_the_released_script_fetches_all_adapters_to_where_its_evaluation_looks():
    lines = [line.split() for line in shell("download_adapters.sh", DRY_RUN="1").stdout.splitlines()]
    tasks = ("math", "code", "intent", "summary", "law", "translation")
    assert [(words[2], words[-1]) for words in lines] == [
        (f"deepseek-ai/ESFT-{score}-{task}-lite", f"all_models/adapters/{score}/{task}")
        for score in ("token", "gate")
        for task in tasks
    ]


def test_download_explains_itself_and_refuses_what_it_does_not_know():
    for arguments in ([], ["--help"]):
        done = shell("download.sh", *arguments)
        assert done.returncode == 0 and "DRY_RUN" in done.stdout and "set -e" not in done.stdout
    done = shell("download.sh", "laws", DRY_RUN="1")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: cannot download 'laws'") and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "told, public",
    [
        ("--data=/mnt/private/x.jsonl", "--data=x.jsonl"),
        ("file:///mnt/private/x.json", "x.json"),
        ("from /data/a/b.json, and ~/c/d.txt", "from b.json, and d.txt"),
        ("see https://example.org/a/b/c", "see https://example.org/a/b/c"),
        ("you/adapter at 1/2/3", "you/adapter at 1/2/3"),
        ({"HF_TOKEN_VALUE": "x", "n_sample_tokens": 2, "tokenizer": "t"}, {"n_sample_tokens": 2, "tokenizer": "t"}),
    ],
)
def test_what_is_private_is_cut(told, public):
    assert push_adapter.public(told) == public
