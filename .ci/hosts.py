"""Run the tests of an adaptor beside the trainer that it is for, each trainer in an environment of its own.

Usage: python .ci/hosts.py [NAME ...]        # all, or some of those in HOSTS

The environments stand in .venv-hosts/NAME and are kept; tlcr is installed anew each time, as its users install it: from
a wheel without compiled kernels, and without its dependencies where their versions and the trainer's do not agree.
What needs a GPU to be installed (vllm, flash-attn, deepspeed) is left out, and the tests put stubs in its place.
Ends with a line for each trainer: its version, and minutes.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from wheels import ROOT, run, unpacked_sdist, wheel

TORCH = "torch==2.13.0"


class Host(NamedTuple):
    distribution: str
    """The trainer for pip; empty: it is no package."""
    packages: tuple[str, ...]
    """Installed with what they need."""
    alone: tuple[str, ...] = ()
    """Installed without: what they need has no build for a CPU."""
    tests: str = ""
    """The test's file, where it is not that of the name."""
    has_dependencies: bool = False
    """tlcr is installed with its dependencies."""


VERL = ("TransferQueue==0.1.11", "cachetools", "fastapi", "uvicorn")
"""What verl imports and does not name; its extras bring them, together with vLLM."""

SKYRL = (
    "accelerate aiohttp cloudpathlib datasets func_timeout hf_transfer hydra-core==1.3.2 jaxtyping loguru omegaconf "
    "peft==0.18.1 polars ray==2.56.0 skyrl-gym==0.4.0 tensorboard tensordict torchdata transformers<=5.8.0,>=5.6.1 "
    "fastapi uvicorn"
)
OPENRLHF = (
    "accelerate aiohttp datasets einops jsonlines loralib nvidia-ml-py optree peft pylatexenc ray[default]==2.55.0 "
    "tensorboard torchdata torchmetrics transformers==5.15.0"
)

HOSTS = {
    "trl": Host("trl", ("trl==1.16.0",), has_dependencies=True),
    "trl-lowest": Host("trl", ("trl==1.11.0", "requests"), tests="trl", has_dependencies=True),  # imported, not named
    "verl": Host("verl", ("verl==0.9.1", *VERL)),
    "verl-lowest": Host("verl", ("verl==0.9.0", *VERL), tests="verl"),
    "openrlhf": Host("openrlhf", tuple(OPENRLHF.split()), alone=("openrlhf==0.11.2",)),
    "openrlhf-lowest": Host("openrlhf", tuple(OPENRLHF.split()), alone=("openrlhf==0.11.0",), tests="openrlhf"),
    "skyrl": Host("skyrl", tuple(SKYRL.split()), alone=("skyrl==0.3.0",)),
    "slime": Host("", ("ray==2.60.0", "pyyaml", "tqdm")),  # what slime imports, for a checkout of it that SLIME names
    "swift": Host("ms-swift", ("ms-swift==4.6.0", "msgspec")),
}


def environment(name: str, host: Host) -> str:
    """The Python of an environment with the trainer, made where there is none of these versions."""
    folder = ROOT / ".venv-hosts" / name
    python, made = str(folder / "bin" / "python"), folder / "made"
    if made.exists() and made.read_text(encoding="utf-8") == repr(host):
        return python
    shutil.rmtree(folder, ignore_errors=True)
    run([sys.executable, "-m", "venv", str(folder)], cwd=ROOT)
    install = [python, "-m", "pip", "install", "--quiet"]
    # torch first and alone: under this pin it is the build that the machine's package index is set up for.
    run([*install, TORCH, "numpy", "packaging", "pytest"], cwd=ROOT)
    if host.packages:
        run([*install, TORCH, *host.packages], cwd=ROOT)
    if host.alone:
        run([*install, "--no-deps", *host.alone], cwd=ROOT)
    made.write_text(repr(host), encoding="utf-8")
    return python


def test(name: str, host: Host, built: Path) -> str:
    """Runs one trainer's tests; returns a line of the table."""
    started = time.monotonic()
    python = environment(name, host)
    install = [python, "-m", "pip", "install", "--quiet"]
    if host.has_dependencies:
        run([*install, TORCH, str(built)], cwd=ROOT)  # what is missing; the next line would install all of them again
    run([*install, "--force-reinstall", "--no-deps", str(built)], cwd=ROOT)
    folder = ROOT / "tests" / "hosts" / "in"
    file = folder / f"test_{host.tests or name}.py"
    command = [python, "-m", "pytest", "-q", "-c", str(folder / "pytest.ini"), "--rootdir", str(folder), str(file)]
    # In a folder where "tlcr" is the installed one alone.
    tested = time.monotonic()
    run(command, cwd=folder, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", PYTHONDONTWRITEBYTECODE="1")
    now = time.monotonic()
    minutes = f"tests {(now - tested) / 60:.1f} min, in all {(now - started) / 60:.1f} min"
    return f"{name:12} {version(python, host):10} {minutes}"


def version(python: str, host: Host) -> str:
    if not host.distribution:
        return "-"
    code = f"import importlib.metadata as m; print(m.version({host.distribution!r}))"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def main(names: list[str]) -> None:
    unknown = [name for name in names if name not in HOSTS]
    if unknown:
        sys.exit(f"there is no trainer {unknown[0]!r}; there are {', '.join(HOSTS)}")
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "wheel"
        folder.mkdir()
        built = wheel(sys.executable, unpacked_sdist(sys.executable, Path(work)), folder, TLCR_BUILD="none")
        lines = [test(name, HOSTS[name], built) for name in names or HOSTS]
    sys.stdout.write("\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
