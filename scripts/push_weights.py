"""Put adapters into a running vLLM or SGLang: merge them on disk, and let the server read the merged folder.

    python scripts/push_weights.py --url=http://127.0.0.1:8000 --base_model_path=M --adapter_dir=A --output_dir=O
    python scripts/push_weights.py --url=http://127.0.0.1:8000 --base_model_path=M        # the base's weights again

The server must see the folder O. --server_path is its name there, if that is another. --dry_run writes and sends
nothing. It prints the adapters' tensors and the requests:

    vLLM      POST /pause?mode=wait             running requests end, new ones are refused, caches are emptied
              POST /collective_rpc              {"method": "reload_weights", "kwargs": {"weights_path": O}}
              POST /resume
    SGLang    POST /update_weights_from_disk    {"model_path": O}

vLLM has these requests only with VLLM_SERVER_DEV_MODE=1 in its environment. A key that the server asks for goes into
SERVER_API_KEY. If a request fails, the error says what was sent, and what the server holds then.

The merged folder is a whole checkpoint, because vLLM leaves experts that do not arrive uninitialized. docs/serving.md
says what was read and what was run.
"""

import argparse
import json
import os
import re
import sys
import urllib.request
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deepseek.checkpoint_files import open_base
from deepseek.files import named, read_json
from deepseek.shards import Shard, weight_files
from scripts.merge_adapter import GENERATION, merge_adapter, read_adapters
from utils import command_parser, counted, locked, note, positive, run_cli, size

MODEL_REQUEST = {"vllm": "/v1/models", "sglang": "/model_info"}  # names the model that is served
# what a server is like after a request that failed
LEFT = {
    "/pause?mode=wait": "Its weights are as before. If it is paused, send POST /resume. If it lacks this request, "
    "start vLLM with VLLM_SERVER_DEV_MODE=1.",
    "/collective_rpc": "It stays paused, and its weights may be half changed. Push again, or restart it.",
    "/resume": "Its weights are the new ones, and it stays paused. Send POST /resume.",
    "/update_weights_from_disk": "Its weights may be half changed. Push again, or restart it.",
}


def requests_of(server: str, folder: str) -> list[tuple[str, dict]]:
    """Return (path, body) of the requests that let a server read the weights of `folder`, in order."""
    if server == "sglang":
        return [("/update_weights_from_disk", {"model_path": folder})]
    reload = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
    return [("/pause?mode=wait", {}), ("/collective_rpc", reload), ("/resume", {})]


def ask(url: str, timeout: float, body: dict | None = None) -> bytes:
    """Send a POST with `body`, or a GET without one, and return the answer.

    Raises:
        OSError, HTTPException: there is no answer in time, or its status is not 2xx.
    """
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("SERVER_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=timeout) as answer:
        return answer.read()


def cause_of(error: BaseException) -> str:
    """Return in a few words why a request failed."""
    if isinstance(error, HTTPError):
        said = " ".join(error.read().decode(errors="replace").split())
        return f"status {error.code}" + f": {said:.300}" * bool(said)
    if isinstance(error, TimeoutError) or isinstance(getattr(error, "reason", None), TimeoutError):
        return "no answer in time"
    return str(error.reason if isinstance(error, URLError) else error) or type(error).__name__


def served_model(url: str, server: str, timeout: float) -> str:
    """Return the model that a server serves, by the path or hub id that it was started with."""
    request = MODEL_REQUEST[server]
    try:
        answer = ask(url + request, timeout)
    except (OSError, HTTPException) as error:
        raise ValueError(
            f"cannot push to {url}: GET {request} failed ({cause_of(error)}). Start a server of the base there."
        ) from error
    with named(f"the answer of {url}{request}"):
        model = json.loads(answer)
        return str(model["data"][0]["root"] if server == "vllm" else model["model_path"])


def send(url: str, requests: list[tuple[str, dict]], timeout: float) -> None:
    """Send requests in order.

    Raises:
        ValueError: one failed. The message says what was sent before it, what was not, and what the server holds.
    """
    for number, (path, body) in enumerate(requests):
        try:
            ask(url + path, timeout, body)
        except (OSError, HTTPException, KeyboardInterrupt) as error:
            before, after = (
                ", ".join(f"POST {path}" for path, _ in part) or "nothing"
                for part in (requests[:number], requests[number + 1 :])
            )
            state = f"Sent before: {before}. Not sent: {after}. {LEFT[path]}"
            if isinstance(error, KeyboardInterrupt):
                note(f"POST {path} to {url} was interrupted. {state}")
                raise
            raise ValueError(f"cannot push to {url}: POST {path} failed ({cause_of(error)}). {state}") from error


def show(args: argparse.Namespace, folder: str) -> None:
    """Print what would be written and sent: the adapters' tensors, the bytes to read, the requests."""
    model, _ = open_base(args.base_model_path)
    sources = read_adapters(model, args.adapter_dir)[1] if args.adapter_dir else {}
    total = 0
    for name, path, key in sorted((name, source.path, key) for name, source in sources.items() for key in source.keys):
        with Shard(path) as shard:
            entry = shard.header[key]
        begin, end = entry["data_offsets"]
        total += end - begin
        print(f"  {name}  {tuple(entry['shape'])}  {entry['dtype']}  {end - begin:,} bytes")
    files = [args.base_model_path / name for name in weight_files(args.base_model_path)]
    if sources:
        print(f"{counted(len(sources), 'tensor')}, {size(total)}, would be merged into {args.output_dir}")
    print(f"the server would read {counted(len(files), 'file')}, {size(sum(file.stat().st_size for file in files))}")
    print(f"would be sent to {args.url}:\n  GET {MODEL_REQUEST[args.server]}")
    for path, body in requests_of(args.server, folder):
        print(f"  POST {path} {json.dumps(body)}")


def end_tokens(folder: Path) -> int | list[int] | None:
    """Return the tokens at which generation stops, as a checkpoint notes them."""
    path = folder / GENERATION
    return read_json(path).get("eos_token_id") if path.is_file() else None


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--url", required=True, help="address of the server, e.g. http://127.0.0.1:8000")
    add("--server", choices=MODEL_REQUEST, default="vllm", help="what runs there (default: vllm)")
    add("--base_model_path", "--model", type=Path, required=True, metavar="DIR", help="folder of the base")
    add("--adapter_dir", type=Path, nargs="+", metavar="DIR", help="folders of adapters that share no expert; without "
        "it the server reads the base again")  # fmt: skip
    add("--output_dir", type=Path, metavar="DIR", help="folder for the merge: new or empty, and seen by the server")
    add("--server_path", metavar="DIR", help="the folder to read, as the server sees it (default: as given here)")
    add("--server_model", metavar="NAME", help="the base, as the server names it (default: --base_model_path)")
    add("--overwrite", action="store_true", help="replace an earlier merge in --output_dir")
    add("--hard_links", action="store_true", help="share the disk space of unchanged weight files with the base")
    add("--timeout", type=positive, default=1800, metavar="SECONDS", help="for one answer (default: 1800)")
    add("--dry_run", action="store_true", help="print what would be written and sent, and do neither")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    args.url = args.url.rstrip("/")
    if not re.fullmatch(r"https?://[^/\s]+(/\S*)?", args.url):
        raise ValueError(f"cannot push to {args.url!r}: it is not an address. Give one such as http://127.0.0.1:8000.")
    if bool(args.adapter_dir) != bool(args.output_dir):
        raise ValueError("cannot push: --adapter_dir and --output_dir go together. Give both, or neither for the base.")
    base, output = args.base_model_path, args.output_dir
    local = (output or base).absolute()
    folder = args.server_path or str(local)
    if args.dry_run:
        show(args, folder)
        return
    served = served_model(args.url, args.server, min(args.timeout, 60))
    if served not in (str(base), folder, args.server_model) and Path(served).resolve() != base.resolve():
        raise ValueError(
            f"cannot push to {args.url}: it serves {served}, not {base}. If this is the same base under another name, "
            f"give --server_model={served}."
        )
    if args.adapter_dir:
        options = {"overwrite": args.overwrite, "hard_links": args.hard_links, "keep_replaced": False}
        with locked(output):
            changed = merge_adapter(base, args.adapter_dir, output, **options)
        print(f"{output}: {changed} tensors of {base} replaced or edited")
    send(args.url, requests_of(args.server, folder), args.timeout)
    print(f"{args.url} has the weights of {local}")
    if (ends := end_tokens(local)) != end_tokens(base):  # a server reads them when it starts
        note(f'the server keeps its end tokens. Send "stop_token_ids": {ends} with each request, or restart it.')


if __name__ == "__main__":
    run_cli(main)
