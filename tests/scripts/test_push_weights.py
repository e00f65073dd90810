"""scripts/push_weights.py: a running server gets the weights of `merge`, or the user hears what it holds instead."""

import json
import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from esft import ExpertConfig, add_adapter, merge
from scripts import push_weights as script
from tests.helpers import BOTH, assert_same_tensors, make_model, noisy_adapter, refused, tensors_of


class FakeServer:
    """The weights of a small model, and what vLLM 0.33.0 and SGLang 0.5.23 do to theirs on these requests.

    vLLM loads a module from the start when a weight of it arrives, and the experts of a layer are one module: what does
    not arrive is uninitialized, here NaN. A module of which nothing arrives keeps its weights. SGLang writes into the
    weights that are there. `spoil` gives answers of its own: {path: status, or a function}.
    """

    def __init__(self, base):
        self.model, self.weights, self.paused = str(base), tensors_of(base), False
        self.requests: list[str] = []
        self.spoil, self.keys = {}, []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                server.answer(self, None)

            def do_POST(self):
                server.answer(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, handler, body) -> None:
        self.requests.append(f"{handler.command} {handler.path}")
        self.keys.append(handler.headers["Authorization"])
        status, told = self.spoil.get(handler.path, 200), {}
        if callable(status):
            status = status()
        if status == 200:
            status, told = self.do(handler.path, body)
        elif status is None:  # the connection breaks
            handler.close_connection = True
            return
        content = json.dumps(told or {"error": {"message": "CUDA error: \n out of memory"}}).encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    def do(self, path: str, body: dict | None) -> tuple[int, dict]:
        if path == "/v1/models":
            return 200, {"object": "list", "data": [{"id": "served", "root": self.model}]}
        if path == "/model_info":
            return 200, {"model_path": self.model}
        if path == "/pause?mode=wait":
            self.paused = True
            return 200, {"status": "paused"}
        if path == "/resume":
            self.paused = False
            return 200, {"status": "resumed"}
        if path == "/collective_rpc":
            assert self.paused and body["method"] == "reload_weights"
            self.load(body["kwargs"]["weights_path"], anew=True)
            return 200, {"results": [None]}
        assert path == "/update_weights_from_disk"
        self.load(body["model_path"], anew=False)
        self.model = body["model_path"]
        return 200, {"success": True, "message": "Succeeded to update model weights.", "num_paused_requests": 0}

    def load(self, folder, anew: bool) -> None:
        arrived = tensors_of(Path(folder))
        modules = {module_of(name) for name in arrived}
        for name, tensor in self.weights.items():
            if anew and module_of(name) in modules:
                self.weights[name] = torch.full_like(tensor, torch.nan)
        self.weights |= arrived


def module_of(name: str) -> str:
    """The module of vLLM that holds a tensor of the checkpoint: all routed experts of a layer are one."""
    before, experts, _ = name.partition(".experts.")
    return before + experts if experts else name.rpartition(".")[0]


@pytest.fixture
def server(parts):
    running = FakeServer(parts[0])
    yield running
    running.http.shutdown()
    running.http.server_close()


def words(server, parts, *more):
    base, adapter, out = parts
    return [
        f"--url={server.url}",
        f"--base_model_path={base}",
        f"--adapter_dir={adapter}",
        f"--output_dir={out}",
        *more,
    ]


def merged_in_memory(base, adapter, folder):
    model = merge(add_adapter(AutoModelForCausalLM.from_pretrained(base), adapter))
    model.save_pretrained(folder)
    return tensors_of(folder)


VLLM = ["GET /v1/models", "POST /pause?mode=wait", "POST /collective_rpc", "POST /resume"]
SGLANG = ["GET /model_info", "POST /update_weights_from_disk"]


@pytest.mark.parametrize(("name", "requests"), [("vllm", VLLM), ("sglang", SGLANG)])
@pytest.mark.parametrize("more", [{}, BOTH])
def test_the_server_has_the_weights_of_merge(name, requests, more, parts, server, tmp_path):
    base, adapter, _ = parts
    before = dict(server.weights)
    if more:
        noisy_adapter(AutoModelForCausalLM.from_pretrained(base), ExpertConfig({2: (0, 3)}, **more), adapter)
    wanted = merged_in_memory(base, adapter, tmp_path / "wanted")
    script.main(words(server, parts, f"--server={name}"))
    assert_same_tensors(server.weights, wanted)
    assert any(not torch.equal(server.weights[key], before[key]) for key in before)
    assert server.requests == requests and not server.paused
    # and back: the base again
    script.main(
        [f"--url={server.url}", f"--base_model_path={base}", f"--server={name}", f"--server_model={server.model}"]
    )
    assert_same_tensors(server.weights, before)


def test_experts_alone_would_cost_a_server_the_others(parts, server):
    """Why a whole folder is sent: the adapter's own folder leaves the layer's other experts without values in vLLM."""
    script.send(server.url, script.requests_of("vllm", str(parts[1])), 10)
    lost = {name for name, tensor in server.weights.items() if tensor.isnan().any()}
    others = {name for name in server.weights if re.search(r"layers\.[12]\.mlp\.experts\.", name)}
    assert lost == others - tensors_of(parts[1]).keys() and len(lost) == 2 * 8 * 3 - 9


def test_a_second_push_replaces_the_first(parts, server, tmp_path):
    base, _, _ = parts
    script.main(words(server, parts))
    noisy_adapter(AutoModelForCausalLM.from_pretrained(base), ExpertConfig({1: (0,)}), tmp_path / "second")
    second = (base, tmp_path / "second", parts[2])
    refused_words = words(server, second)
    with pytest.raises(ValueError, match="exists already"):
        script.main(refused_words)
    script.main([*refused_words, "--overwrite"])
    assert_same_tensors(server.weights, merged_in_memory(base, second[1], tmp_path / "wanted"))


def test_a_dry_run_tells_and_does_nothing(parts, server, capsys):
    base, adapter, out = parts
    script.main(words(server, parts, "--dry_run", "--server_path=/mnt/out"))
    told = capsys.readouterr().out.splitlines()
    assert server.requests == [] and not out.exists()
    tensors = tensors_of(adapter)
    assert told[: len(tensors)] == [
        f"  {name}  {tuple(tensor.shape)}  F32  {tensor.nbytes:,} bytes" for name, tensor in sorted(tensors.items())
    ]
    assert told[len(tensors)] == f"9 tensors, 0.02 MiB, would be merged into {out}"
    files = list(base.glob("*.safetensors"))
    assert f"would read {len(files)} files" in told[len(tensors) + 1]
    reload = '{"method": "reload_weights", "kwargs": {"weights_path": "/mnt/out"}}'
    assert told[-4:] == [f"  {VLLM[0]}", f"  {VLLM[1]} {{}}", f"  {VLLM[2]} {reload}", f"  {VLLM[3]} {{}}"]


# -------------------------------------------------------------------------------------------------------------- refused


def test_an_adapter_of_another_base_is_not_sent(parts, server, capsys):
    make_model(seed=1).save_pretrained(parts[0])
    refused(capsys, script.main, words(server, parts), "cannot use adapter", "another base model")
    refused(capsys, script.main, words(server, parts, "--dry_run"), "cannot use adapter", "another base model")
    assert server.requests == [VLLM[0]] and not parts[2].exists()


def test_a_server_of_another_model_is_not_touched(parts, server, capsys):
    server.model = "deepseek-ai/another"
    for name, request in (("vllm", VLLM[0]), ("sglang", SGLANG[0])):
        server.requests.clear()
        message = ("it serves deepseek-ai/another, not", "--server_model=deepseek-ai/another")
        refused(capsys, script.main, words(server, parts, f"--server={name}"), *message)
        assert server.requests == [request] and not parts[2].exists()
    script.main(words(server, parts, "--server_model=deepseek-ai/another"))
    assert len(server.requests) == 1 + len(VLLM)


def hang():
    time.sleep(1.5)


FAILS = {
    "no development mode": ("/pause?mode=wait", 404, ["status 404", "Sent before: nothing", "VLLM_SERVER_DEV_MODE=1"]),
    "the server's error": ("/collective_rpc", 500, ["status 500", "CUDA error: \\n out of memory", "half changed"]),
    "a broken connection": ("/collective_rpc", lambda: None, ["stays paused", "Not sent: POST /resume"]),
    "no answer": ("/collective_rpc", hang, ["no answer in time", "Sent before: POST /pause?mode=wait"]),
    "the last request": ("/resume", 503, ["status 503", "weights are the new ones", "Not sent: nothing"]),
    "sglang": ("/update_weights_from_disk", 400, ["status 400", "half changed. Push again, or restart it."]),
}


@pytest.mark.parametrize("how", FAILS)
def test_a_push_that_fails_half_way_says_what_the_server_holds(how, parts, server, capsys, tmp_path):
    path, answer, message = FAILS[how]
    server.spoil[path] = answer
    before = dict(server.weights)
    more = ["--server=sglang"] if how == "sglang" else []
    refused(capsys, script.main, words(server, parts, "--timeout=1", *more), f"POST {path} failed", *message)
    requests = SGLANG if more else VLLM
    assert server.requests == requests[: requests.index(f"POST {path}") + 1]
    assert server.paused == (path in ("/collective_rpc", "/resume"))
    assert_same_tensors(
        server.weights, merged_in_memory(*parts[:2], tmp_path / "wanted") if path == "/resume" else before
    )


def test_an_interrupted_push_says_what_was_sent(parts, server, monkeypatch, capsys):
    ask = script.ask

    def stop(url, timeout, body=None):
        if url.endswith("/collective_rpc"):
            raise KeyboardInterrupt
        return ask(url, timeout, body)

    monkeypatch.setattr(script, "ask", stop)
    with pytest.raises(KeyboardInterrupt):
        script.main(words(server, parts))
    told = capsys.readouterr().err
    assert "was interrupted. Sent before: POST /pause?mode=wait. Not sent: POST /resume. It stays paused" in told


def test_where_nothing_answers_nothing_is_written(parts, server, capsys):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        free = f"--url=http://127.0.0.1:{unused.getsockname()[1]}"
    refused(capsys, script.main, words(server, parts, free), "GET /v1/models failed", "refused")
    for odd in ({}, {"data": []}, [1], {"data": [{"root": 1}]}):
        server.do = lambda path, body, odd=odd: (200, odd or {"x": 1})
        refused(capsys, script.main, words(server, parts), "cannot")
    assert not parts[2].exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--url=127.0.0.1:8000"], "'127.0.0.1:8000': it is not an address"),
        (["--url=file:///etc/passwd"], "it is not an address"),
        (["--url=http://x", "--adapter_dir=a"], "--adapter_dir and --output_dir go together"),
        (["--url=http://x", "--output_dir=o"], "--adapter_dir and --output_dir go together"),
    ],
)
def test_flags_that_cannot_be_used(flags, message, capsys):
    refused(capsys, script.main, [*flags, "--base_model_path=m"], message)


def test_a_key_goes_into_the_header_alone(parts, server, monkeypatch, capsys):
    monkeypatch.setenv("SERVER_API_KEY", "sk-secret")
    server.spoil["/resume"] = 401
    refused(capsys, script.main, words(server, parts), "status 401")
    assert server.keys == ["Bearer sk-secret"] * 4
    script.main(words(server, parts, "--dry_run"))
    printed = capsys.readouterr()
    assert "sk-secret" not in printed.out + printed.err


def test_end_tokens_that_a_running_server_does_not_learn_are_told(parts, server, capsys):
    _, adapter, out = parts
    script.main(words(server, parts))
    assert "stop_token_ids" not in capsys.readouterr().err
    (adapter / "run.json").write_text(json.dumps({"end_token_ids": [7]}))
    script.main(words(server, parts, "--overwrite"))
    assert 'Send "stop_token_ids": [1, 7] with each request' in capsys.readouterr().err
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [1, 7]
