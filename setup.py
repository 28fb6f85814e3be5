"""Build script: which compiled code goes into tlcr, and how. The metadata lives in pyproject.toml.

Environment variables (docs/installation.md tells more):
    TLCR_BUILD            auto (default), none, cpu or cuda
    TLCR_LOCAL_VERSION    a label that is added to the version: cu130 makes 0.1.0+cu130
    TORCH_CUDA_ARCH_LIST  the GPU architectures to compile for; has a default, of which nvcc takes what it knows
    CUDA_HOME, CXX        which CUDA toolkit and which C++ compiler
    MAX_JOBS              how many files are compiled at once
    NVCC_THREADS          for how many architectures one nvcc compiles at once
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from setuptools import Command, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.editable_wheel import editable_wheel
from setuptools.command.egg_info import egg_info
from setuptools.command.sdist import sdist

ARCH_LIST = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
"""The GPU architectures to compile for by default; the last one's PTX runs on all later architectures."""

KERNELS = Path("tlcr", "kernels")

OLDEST_TORCH = (2, 10)
"""The first torch whose stable ABI has all that csrc/torch uses. A library built beside any later one serves it too."""

LIBRARY, MODULE = "tlcr.libtlcr", "tlcr._C"


class Torch(NamedTuple):
    version: str
    cuda: str | None
    """The CUDA that it was built for; None: it is a CPU build."""


class Toolkit(NamedTuple):
    home: Path
    version: str
    architectures: tuple[str, ...]
    """The architectures that nvcc knows, written as "9.0"."""


class Decision(NamedTuple):
    extension: str | None
    """"cuda", "cpu" or None: a pure build."""
    remark: str | None
    """Why it is not a CUDA build."""


class BuildError(SystemExit):
    """The requested build is impossible; the message says why and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(f"tlcr: {message}")


def decide(wanted: str, torch: Torch | None, compiler: str | None, toolkit: Toolkit | str) -> Decision:
    """Decide what is built. A visible GPU is not needed: the build machine may differ from the one that runs.

    Args:
        wanted: TLCR_BUILD.
        torch: the torch to compile against, if there is one.
        compiler: what stands in the way of compiling C++, or None.
        toolkit: the CUDA toolkit, or why there is none.
    """
    if wanted not in ("auto", "none", "cpu", "cuda"):
        raise BuildError(f"TLCR_BUILD={wanted!r} is unknown, choose from auto, none, cpu, cuda")
    if wanted == "none":
        return Decision(None, "it was built with TLCR_BUILD=none")
    problem = compiler
    if torch is None:
        problem = (
            "there was no torch to compile against; pip hides it from a build unless it is installed first and "
            "--no-build-isolation is given"
        )
    elif tuple(map(int, re.findall(r"\d+", torch.version)[:2])) < OLDEST_TORCH:
        problem = f"torch {torch.version} lacks the headers; install torch {'.'.join(map(str, OLDEST_TORCH))} or later"
    if problem is not None:
        if wanted == "auto":
            return Decision(None, problem)
        raise BuildError(f"TLCR_BUILD={wanted} cannot be done: {problem}")
    assert torch is not None
    if wanted == "cpu":
        return Decision("cpu", "it was built with TLCR_BUILD=cpu")
    problem = cuda_problem(torch, toolkit)
    if problem is None:
        return Decision("cuda", None)
    if wanted == "auto":
        return Decision("cpu", problem)
    raise BuildError(f"TLCR_BUILD=cuda cannot be done: {problem}")


def cuda_problem(torch: Torch, toolkit: Toolkit | str) -> str | None:
    if torch.cuda is None:
        return f"torch {torch.version} is not a CUDA build; install one that is, then build tlcr"
    if isinstance(toolkit, str):
        return f"{toolkit}; install the CUDA toolkit {torch.cuda}, or say in CUDA_HOME where it is"
    if toolkit.version.split(".")[0] != torch.cuda.split(".")[0]:
        return (
            f"the nvcc in {toolkit.home} is of CUDA {toolkit.version} and torch {torch.version} of CUDA {torch.cuda}; "
            "say in CUDA_HOME where a toolkit of that major version is"
        )
    return None


def find_torch() -> Torch | None:
    try:
        torch = importlib.import_module("torch")
    except ModuleNotFoundError as error:
        if error.name == "torch":
            return None
        raise
    return Torch(torch.__version__, torch.version.cuda)


def find_compiler_problem() -> str | None:
    if not os.environ.get("CXX", "c++").strip():
        del os.environ["CXX"]  # torch, which compiles, would run a command of no words
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        return f"there was no C++ compiler {compiler!r}; install g++, or name a compiler in CXX"
    try:
        said = ask(*compiler.split(), "--version")
    except CannotAsk as reason:
        return f"{reason}; install g++, or name a compiler in CXX"
    if "clang version" in said:
        return "clang cannot compile the kernels; name g++ in CXX"
    return None


class CannotAsk(Exception):
    """A program cannot be run, or failed; the message says what happened."""


def ask(*command: str | Path) -> str:
    """What a program writes to stdout."""
    words = " ".join(map(str, command))
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise CannotAsk(f"{words} cannot be run ({error.strerror})") from None
    if done.returncode != 0:
        last = (done.stderr.strip() or done.stdout.strip() or "without a word").splitlines()[-1]
        raise CannotAsk(f"{words} failed with status {done.returncode} ({last})")
    return done.stdout


def find_toolkit() -> Toolkit | str:
    named, found = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"), shutil.which("nvcc")
    if named:
        homes = [Path(named)]
    else:  # an nvcc on PATH may be a script that stands elsewhere than its toolkit
        homes = [Path(found).resolve().parent.parent] if found else []
        homes.append(Path("/usr/local/cuda"))
    for home in homes:
        # conda keeps the headers in targets/*/include
        headers = (home, *home.glob("targets/*"))
        if (home / "bin/nvcc").exists() and any((place / "include/cuda_runtime.h").exists() for place in headers):
            return read_toolkit(home)
    return f"there was no CUDA toolkit (bin/nvcc and include/cuda_runtime.h) in {' or '.join(map(str, homes))}"


def read_toolkit(home: Path) -> Toolkit | str:
    nvcc = home / "bin/nvcc"
    try:
        release = re.search(r"release (\d+\.\d+)", ask(nvcc, "--version"))
        known = re.findall(r"compute_(\d+)(\d)\b", ask(nvcc, "--list-gpu-arch"))
    except CannotAsk as reason:
        return str(reason)
    if release is None:
        return f"{nvcc} --version names no release"
    return Toolkit(home, release[1], tuple(f"{major}.{minor}" for major, minor in known))


def arch_list(named: str | None, known: Iterable[str]) -> str:
    """TORCH_CUDA_ARCH_LIST as it was given, or the default without what nvcc does not know."""
    if named:
        return named
    known = set(known)
    kept = [arch for arch in ARCH_LIST if arch in known]
    if not kept:
        raise BuildError(f"nvcc knows none of {', '.join(ARCH_LIST)}; set TORCH_CUDA_ARCH_LIST, or get a newer one")
    return ";".join(kept) + "+PTX"


def local_label(environment: Mapping[str, str]) -> str:
    """TLCR_LOCAL_VERSION with its plus sign, or nothing."""
    label = environment.get("TLCR_LOCAL_VERSION", "")
    if label and not re.fullmatch(r"[a-z0-9]+(\.[a-z0-9]+)*", label):
        raise BuildError(
            f"TLCR_LOCAL_VERSION={label!r} is no local version label: lower-case letters and digits, in parts joined "
            "by dots, such as cu130.torch2.11"
        )
    return label and f"+{label}"


def cpp_extensions(kind: str, torch_version: str, toolkit: Toolkit | str) -> tuple[list[Extension], type[Command]]:
    """The library of the operators and tlcr._C, and the command that compiles them."""
    if isinstance(toolkit, Toolkit):  # torch reads it when it is imported here
        os.environ["CUDA_HOME"] = str(toolkit.home)
    from torch.utils import cpp_extension as torch_build

    class BuildExtension(torch_build.BuildExtension):
        """Keeps the objects of each torch, in an editable installation too: ninja compiles only what changed."""

        def finalize_options(self) -> None:
            super().finalize_options()
            self.force = True  # without ninja, a library built for another torch would be kept as up to date
            self.build_temp = f"build/{sys.implementation.cache_tag}-torch{torch_version}-{kind}"

        def run(self) -> None:
            in_checkout = self.inplace or self.editable_mode
            if not (in_checkout and Path(sysconfig.get_path("include"), "Python.h").exists()):
                # A wheel serves every Python, and the module knows one.
                self.extensions = [extension for extension in self.extensions if extension.name != MODULE]
            super().run()
            if self.inplace:  # no build that writes the record comes after it
                self.get_finalized_command("build_record").editable_mode = True
                self.run_command("build_record")

        def get_ext_filename(self, fullname: str) -> str:
            name: str = super().get_ext_filename(fullname)
            is_library = fullname.rpartition(".")[2] == LIBRARY.rpartition(".")[2]
            return name.replace(sysconfig.get_config_var("EXT_SUFFIX"), ".so") if is_library else name

    # No -std: torch adds the one that its headers need.
    flags = {"cxx": ["-O3", "-fvisibility=hidden", "-g0"]}
    target = f"{OLDEST_TORCH[0] << 56 | OLDEST_TORCH[1] << 48:#x}"
    options: dict[str, Any] = {
        "include_dirs": [str(Path("csrc").resolve())],
        "define_macros": [("TORCH_TARGET_VERSION", target)],
        "depends": files("csrc/**/*.h", "csrc/**/*.inl", "csrc/**/*.cuh"),
        "extra_compile_args": flags,
    }
    module = torch_build.CppExtension(MODULE, files("csrc/python/*.cpp"), extra_compile_args=flags["cxx"])
    module.libraries = []  # it calls nothing of torch
    cpp = files("csrc/torch/*.cpp", "csrc/kernels/cpu/*.cpp")
    if kind == "cpu":
        library = torch_build.CppExtension(LIBRARY, cpp, **options)
        library.libraries = ["torch_cpu"]
        return [library, module], BuildExtension
    # Rows are summed by one code where they are aligned and by another where they are not, to the same bits: so nvcc
    # makes a multiply-add of nothing but fma(), which the kernels write wherever one is worth having.
    flags["nvcc"] = ["-O3", "-fmad=false", "-Xfatbin", "-compress-all"]
    if threads := os.environ.get("NVCC_THREADS"):
        flags["nvcc"] += ["--threads", threads]
    options["define_macros"] += [("TLCR_CUDA", None), ("USE_CUDA", None)]  # the latter is read by torch's headers
    library = torch_build.CUDAExtension(LIBRARY, cpp + files("csrc/kernels/cuda/*.cu"), **options)
    library.libraries = ["torch_cpu", "torch_cuda", "cudart"]
    # A torch from pip comes with headers of the CUDA libraries that a small toolkit lacks.
    beside_torch = Path(torch_build.__file__).parents[2].glob("nvidia/*/include")
    library.include_dirs += sorted(map(str, beside_torch))
    return [library, module], BuildExtension


def files(*patterns: str) -> list[str]:
    return sorted(str(path) for pattern in patterns for path in Path().glob(pattern))


class Build(build):
    """The build. Its record is written last, and only if all steps before it succeeded."""

    sub_commands: ClassVar = [*build.sub_commands, ("build_record", None)]


class BuildRecord(Command):
    """Writes tlcr/_build.json, which tlcr reads before it loads the extension."""

    facts: ClassVar[Mapping[str, str | None]]
    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib = ""

    def finalize_options(self) -> None:
        self.build_lib = self.get_finalized_command("build_py").build_lib

    def run(self) -> None:
        version = self.get_finalized_command("egg_info").egg_version
        target = Path("" if self.editable_mode else self.build_lib, "tlcr", "_build.json")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps({"version": version, **self.facts}, indent=2) + "\n", encoding="utf-8")

    def get_source_files(self) -> list[str]:
        return []

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_lib, "tlcr", "_build.json"))]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Wheel(bdist_wheel):
    """A wheel for every Python: its library is loaded by torch and knows none."""

    def get_tag(self) -> tuple[str, str, str]:
        *_, platform = super().get_tag()
        return "py3", "none", platform


class EggInfo(egg_info):
    """The metadata, with the label in the version; an sdist's setup.cfg would win over an option given to setup()."""

    def finalize_options(self) -> None:
        self.tag_build = local_label(os.environ)
        super().finalize_options()


class SourceDistribution(sdist):
    """An sdist in which tlcr/kernels is the link that it is in a checkout."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        (Path(base_dir) / KERNELS).symlink_to(Path("..", "kernels"))


class EditableInstallation(editable_wheel):
    """A path file; setuptools would write an import hook, which type checkers do not follow."""

    def finalize_options(self) -> None:
        self.mode = self.mode or "compat"
        super().finalize_options()


def main() -> None:
    wanted = os.environ.get("TLCR_BUILD") or "auto"
    # A pure build needs none of them, so that none of them can stand in its way.
    none = None, None, "no CUDA toolkit was looked for"
    torch, compiler, toolkit = none if wanted == "none" else (find_torch(), find_compiler_problem(), find_toolkit())
    kind, remark = decision = decide(wanted, torch, compiler, toolkit)
    commands: dict[str, type[Command]] = {
        "bdist_wheel": Wheel,
        "build": Build,
        "build_record": BuildRecord,
        "editable_wheel": EditableInstallation,
        "egg_info": EggInfo,
        "sdist": SourceDistribution,
    }
    facts: dict[str, str | None] = {
        **decision._asdict(),
        "torch": None,
        "oldest_torch": None,
        "cuda": None,
        "arch_list": None,
    }
    what = "a pure package, WITHOUT compiled kernels"
    extensions: list[Extension] = []
    if kind is not None and torch is not None:
        oldest = ".".join(map(str, OLDEST_TORCH))
        facts |= {"torch": torch.version, "oldest_torch": oldest}
        what = f"a CPU extension for torch {oldest} and later, with the headers of torch {torch.version}"
        if kind == "cuda" and isinstance(toolkit, Toolkit):
            archs = arch_list(os.environ.get("TORCH_CUDA_ARCH_LIST"), toolkit.architectures)
            os.environ["TORCH_CUDA_ARCH_LIST"] = archs  # torch reads it when it compiles
            facts |= {"cuda": toolkit.version, "arch_list": archs}
            what = f"{what.replace('CPU', 'CUDA')}, CUDA {toolkit.version}, {archs}"
        extensions, commands["build_ext"] = cpp_extensions(kind, torch.version, toolkit)
    BuildRecord.facts = facts
    sys.stderr.write(f"tlcr: building {what}{f', because {remark}' if remark else ''}\n")
    setup(ext_modules=extensions, cmdclass=commands)


if __name__ == "__main__":
    main()
