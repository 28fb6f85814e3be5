"""A real vLLM samples for a policy on the CPU, as a server and in the trainer's process: after each of ten updates its
answers have the trainer's log-probabilities.

Usage: python .ci/engines.py [server] [process]

The environment is that of .ci/vllm.py; for the second way tlcr's requirements are installed there too. VLLM=COMMAND
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

from vllm import installed, served, words  # noqa: E402

from tests.engines.real_vllm import rounds, say, small  # noqa: E402
from tlcr.config.schema import RolloutConfig  # noqa: E402
from tlcr.distribution import requirements  # noqa: E402


def main() -> None:
    command, wanted = installed(), sys.argv[1:] or ["server", "process"]
    if "server" in wanted:
        with tempfile.TemporaryDirectory() as name:
            small().save_pretrained(Path(name) / "model")
            words(512).save_pretrained(Path(name) / "model")
            began = time.monotonic()
            arguments = ["serve", str(Path(name) / "model"), "--dtype", "float32", "--max-model-len", "256"]
            arguments += ["--logprobs-mode", "processed_logprobs", "--generation-config", "vllm", "--enable-lora"]
            os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
            with served(command, arguments, Path(name)) as url:
                say(f"the server was ready after {time.monotonic() - began:.0f} s")
                rounds(RolloutConfig(engine="server", server=(url,)))
    if "process" in wanted:
        python = str(Path(command).with_name("python"))
        if not os.environ.get("VLLM"):
            needed = [
                one for one in [*requirements(), *requirements("lora")] if one.name not in ("torch", "transformers")
            ]
            packages = [f"{one.name}{one.specifier}" for one in needed]
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
        settings |= {"VLLM_LOGGING_LEVEL": "ERROR", "PYTHONPATH": str(ROOT)}
        inside = [python, "-m", "tests.engines.real_vllm"]
        subprocess.run(inside, check=True, cwd=ROOT, env={**os.environ, **settings})
    say("every answer had the log-probabilities of the policy of its round")


if __name__ == "__main__":
    main()
