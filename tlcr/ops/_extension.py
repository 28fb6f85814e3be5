"""Loads the compiled kernels, ``libtlcr.so``, if they fit the installed torch; else says why not and what to do.

The library goes through torch's stable ABI and knows no Python, so one serves every Python and every torch from the
oldest whose functions it calls. A record of the build lies beside it and is read first: beside an older torch, or one
for another CUDA, it would fail with an undefined symbol.
"""

import functools
import importlib
import json
import re
import shlex
import warnings
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import torch

from tlcr.distribution import DISTRIBUTION
from tlcr.errors import ExtensionWarning

__all__ = ["build_info", "load", "unavailable"]

RECORD = Path(__file__).parent.parent / "_build.json"
LIBRARY = RECORD.with_name("libtlcr.so")
SOURCES = RECORD.parent.parent / "csrc"
UNBUILT = "it runs from its sources, which were never built"


class BuildRecord(NamedTuple):
    """What setup.py wrote when it built this installation."""

    version: str | None = None
    extension: str | None = None
    """"cuda", "cpu", or None: a pure installation."""
    remark: str | None = UNBUILT
    """Why it is not a CUDA build."""
    torch: str | None = None
    """The torch that it was compiled against."""
    oldest_torch: str | None = None
    """The first torch that has all functions that it calls."""
    cuda: str | None = None
    """Version of the CUDA toolkit that compiled it."""
    arch_list: str | None = None
    """The GPU architectures it has code for, in the manner of TORCH_CUDA_ARCH_LIST."""


def build_info() -> dict[str, Any]:
    """How this installation was built, and which parts of it are in use.

    Returns:
        The fields of the build record: `version`, `extension` ("cuda", "cpu" or None), `remark` (why it is not a CUDA
        build), `torch`, `oldest_torch`, `cuda` and `arch_list`. Then what the extension says of itself, each None where
        it is not loaded: `compiler`, `instruction_set` (of the CPU kernels on this processor, as ATEN_CPU_CAPABILITY
        allows). Then `python` and `pybind11`, of the module that a checkout has beside the library; None elsewhere,
        because the library serves every Python. Then `problem`: why an extension that is there is not loaded, else
        None. And `rebuild`: the command that builds this installation anew, against the torch that is installed.
    """
    record, problem = read_record(), _problem()
    facts = library_facts() if record.extension is not None and problem is None else {}
    said = {name: facts.get(name) for name in ("compiler", "instruction_set")}
    return {**record._asdict(), **said, **_module_facts(), "problem": problem, "rebuild": _rebuild()}


def library_facts() -> dict[str, Any]:
    """What the loaded library says of itself.

    Returns:
        `compiler`, `torch`, `cuda`, `instruction_set`, `multiplies_bfloat16` (whether this CPU has a product of
        bfloat16 matrices with a float32 result), and `operators`: the types of arguments and results by operator.
    """
    facts: dict[str, Any] = json.loads(torch.ops.tlcr.library_facts())
    return facts


def _module_facts() -> dict[str, str | None]:
    """What ``tlcr._C`` says of itself, which only a checkout has, and only for the Python that compiled it."""
    try:
        module = importlib.import_module("tlcr._C")
    except ImportError:
        return {"python": None, "pybind11": None}
    facts: dict[str, str | None] = module.build_info()
    return facts


@functools.cache
def unavailable(device_type: str) -> str | None:
    """Why there are no compiled kernels for "cpu" or "cuda" tensors, and what to do; None where there are."""
    problem, record = load(), read_record()
    if problem is None and device_type == "cuda" and record.extension != "cuda":
        return f"tlcr was built without CUDA kernels ({record.remark}); to build them: {_rebuild()}"
    return problem


@functools.cache
def load() -> str | None:
    """Load the extension; returns None, or why there is none to load and what to do.

    A pure installation causes no warning. An extension that exists but does not fit causes one, once.
    """
    record = read_record()
    if record.extension is None:
        return f"tlcr has no compiled kernels here: {record.remark}; to build them: {_rebuild()}"
    problem = _problem()
    if problem is None:
        return None
    problem = f"{problem}; to mend it: {_rebuild()}"
    warnings.warn(f"{problem} (until then the ops run without them)", ExtensionWarning, stacklevel=2)
    return problem


@functools.cache
def _problem() -> str | None:
    """Load the extension, if there is one. Returns why that is impossible, or None."""
    record = read_record()
    if record.extension is None:
        return None
    problem = mismatch(record, torch.__version__, torch.version.cuda)
    if problem is None and not LIBRARY.exists():
        problem = f"tlcr's compiled kernels cannot be loaded: {LIBRARY.parent} has no {LIBRARY.name}"
    if problem is None:
        problem = outdated(LIBRARY, SOURCES, with_cuda=record.extension == "cuda")
    if problem is None:
        try:
            torch.ops.load_library(str(LIBRARY))
        except OSError as error:
            return f"tlcr's compiled kernels cannot be loaded: {error.__cause__ or error}"
        problem = strange(library_facts()["operators"])
    return problem


def strange(operators: Mapping[str, str]) -> str | None:
    """Why the loaded operators cannot be called: one takes or returns other types than its schema says. Else None.

    torch passes a stack of untyped values to them, so a call would read an integer as a pointer.
    """
    for name, found in operators.items():
        schema = getattr(torch.ops.tlcr, name).default._schema
        arguments, results = (
            [value.type.annotation_str for value in values] for values in (schema.arguments, schema.returns)
        )
        wanted = [*arguments, "->", *results]
        if found.split() != wanted:
            return f"tlcr's compiled kernels are of another version: {name} is {found.strip()}, not {' '.join(wanted)}"
    return None


def mismatch(record: BuildRecord, torch_version: str, torch_cuda: str | None) -> str | None:
    """Why an extension built as `record` says cannot be loaded beside this torch; None where it can.

    Torch keeps its stable interface within a major version, and adds to it. The CUDA runtime keeps its own within one.
    """
    needed = record.oldest_torch or record.torch  # an older record has no such field
    oldest, found = (tuple(map(int, _parts(version, 2))) for version in (needed, torch_version))
    if not oldest <= found < (oldest[0] + 1,):
        return f"tlcr's compiled kernels need torch>={needed},<{oldest[0] + 1} and meet torch {torch_version}"
    if record.extension == "cuda" and _parts(record.cuda, 1) != _parts(torch_cuda, 1):
        met = "a CPU build" if torch_cuda is None else f"for CUDA {torch_cuda}"
        return f"tlcr's compiled kernels were built with CUDA {record.cuda}, and meet torch {torch_version}, {met}"
    return None


def gpu_problem() -> str | None:
    """Why the CUDA kernels cannot run on a GPU that torch sees; None where they run on all. This initialises CUDA."""
    archs = read_record().arch_list
    if archs is None:
        return None
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if not has_code_for(archs, capability):
            number = ".".join(map(str, capability))
            return (
                f"tlcr's CUDA kernels were compiled for {archs}, and GPU {index} ({torch.cuda.get_device_name(index)}) "
                f"is of {number}; hide it by CUDA_VISIBLE_DEVICES, or compile them for it: "
                f"TORCH_CUDA_ARCH_LIST={number} {_rebuild()}"
            )
    return None


def has_code_for(archs: str, capability: tuple[int, int]) -> bool:
    """Whether code for `archs`, in the manner of TORCH_CUDA_ARCH_LIST, runs on a GPU of this compute capability.

    Machine code runs on its own major version from its own minor version on, and PTX on all that is not older. Code for
    the features of one architecture (9.0a) runs on that one alone, and for those of a family (10.0f) within its major
    version.
    """
    for arch in re.split(r"[ ;,]+", archs.strip()):
        found = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", arch)
        if found is None:
            return True  # a name, such as Hopper: torch knows what it stands for
        built, features = (int(found[1]), int(found[2])), found[3]
        if features == "a":
            runs = built == capability
        else:
            runs = built[0] == capability[0] and built <= capability
            runs = runs or (found[4] is not None and features == "" and built <= capability)
        if runs:
            return True
    return False


def outdated(library: Path, sources: Path, *, with_cuda: bool) -> str | None:
    """Why a library in a checkout is older than its sources: one of them changed later. None without sources.

    Python's calls into the library may have changed with the sources, and a call would then crash. Beside an installed
    package there may be a folder of that name that another package left.
    """
    if not (sources / "kernels" / "arguments.h").exists():
        return None
    compiled = (path for path in sources.rglob("*") if path.is_file() and (with_cuda or path.parent.name != "cuda"))
    newest = max(compiled, key=lambda path: path.stat().st_mtime, default=None)
    if newest is None or newest.stat().st_mtime <= library.stat().st_mtime:
        return None
    return f"tlcr's compiled kernels are older than {newest}, from which they are made"


@functools.cache
def read_record() -> BuildRecord:
    return BuildRecord(**json.loads(RECORD.read_text(encoding="utf-8"))) if RECORD.exists() else BuildRecord()


def _parts(version: str | None, count: int) -> list[str]:
    return re.findall(r"\d+", version or "")[:count]


def _rebuild() -> str:
    """The command that builds this installation anew, against the torch that is installed."""
    source, editable = _source()
    if editable:
        return f"pip install --no-build-isolation --no-deps --editable {shlex.quote(source or '.')}"
    # pip keeps the wheels that it builds, and would take the old one again.
    how = f"--no-build-isolation --no-deps --force-reinstall --no-cache-dir --no-binary {DISTRIBUTION}"
    return f"pip install {how} {shlex.quote(source or DISTRIBUTION)}"


def _source() -> tuple[str | None, bool]:
    """The folder that tlcr was installed from, if it was one, and whether it runs from there."""
    try:
        written = distribution(DISTRIBUTION).read_text("direct_url.json")
    except PackageNotFoundError:
        return str(RECORD.parent.parent), True
    origin = json.loads(written) if written else {}
    if "dir_info" not in origin:
        return None, False
    return unquote(urlsplit(origin["url"]).path), bool(origin["dir_info"].get("editable"))
