"""A real vLLM samples for a policy on the CPU: as a server that reads weights from files, as one that takes them over
the network, and in the trainer's process. After each of ten updates its answers have the trainer's log-probabilities.

Usage: python .ci/engines.py [server] [network] [process]

The environment is that of .ci/vllm.py; for the last way tlcr's requirements are installed there too. VLLM=COMMAND
names a vllm that is there already, whose environment must have them.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / ".ci")]

from vllm import ON_ONE_CPU, about, installed, served, words  # noqa: E402

from tests.engines.real_vllm import rounds, say, small  # noqa: E402
from tlcr.config.schema import RolloutConfig  # noqa: E402
from tlcr.distribution import DISTRIBUTION, installed_version, requirements  # noqa: E402


def main() -> None:
    command, wanted = installed(), sys.argv[1:] or ["server", "network", "process"]
    if "server" in wanted:
        serve(command, [], "/collective_rpc", unused="/update_weights")
    if "network" in wanted:
        extra = ["--weight-transfer-config", '{"backend": "tlcr"}']
        extra += ["--worker-extension-cls", "tlcr.hosts.vllm_weights.Worker"]
        serve(command, extra, "/update_weights", unused="/collective_rpc", server_weights="network")
    if "process" in wanted:
        settings = {**os.environ, **ON_ONE_CPU, "VLLM_LOGGING_LEVEL": "ERROR", "PYTHONPATH": str(ROOT)}
        inside = [trainer_with_vllm(command), "-m", "tests.engines.real_vllm"]
        subprocess.run(inside, check=True, cwd=ROOT, env=settings)
    say("every answer had the log-probabilities of the policy of its round")


def serve(command: str, extra: list[str], route: str, *, unused: str, **settings: str) -> None:
    """route: by which weights are to come, and not by the unused one."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small().save_pretrained(folder / "model")
        words(512).save_pretrained(folder / "model")
        began = time.monotonic()
        arguments = ["serve", str(folder / "model"), "--dtype", "float32", "--max-model-len", "256", *extra]
        arguments += ["--logprobs-mode", "processed_logprobs", "--generation-config", "vllm", "--enable-lora"]
        os.environ |= {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "PYTHONPATH": str(ROOT)}
        with served(command, arguments, folder) as url:
            say(f"the server was ready after {time.monotonic() - began:.0f} s")
            rounds(RolloutConfig(engine="server", server=(url,), **settings))
        requests = (folder / "vllm.log").read_text()
        if f"POST {route} " not in requests or f"POST {unused} " in requests:
            sys.exit(f"the weights did not come by {route} alone")


def trainer_with_vllm(command: str) -> str:
    """The Python of a vLLM's environment, in which tlcr's requirements are then too, and its version."""
    python = str(Path(command).with_name("python"))
    if not os.environ.get("VLLM"):
        needed = [one for one in [*requirements(), *requirements("lora")] if one.name not in ("torch", "transformers")]
        packages = [f"{one.name}{one.specifier}" for one in needed]
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        # By hand: pip would build this folder anew, for a torch that is not the one it was built for.
        (libraries,) = Path(command).parents[1].glob("lib/python*/site-packages")
        about(libraries, DISTRIBUTION, installed_version())
    return python


if __name__ == "__main__":
    main()
