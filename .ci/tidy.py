"""Check csrc with clang-tidy: the checks stand in .clang-tidy, how each file is to be read stands here.

Usage: python .ci/tidy.py [FILE ...]

Without files: all of csrc. Needs the extra dev (clang-tidy) and torch, whose headers
csrc/torch includes. Nothing is built.
"""

import os
import platform
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIDY = Path(sys.executable).with_name("clang-tidy")
EMULATOR = "tests/cuda/emulator/include"
INSTRUCTION_SETS = {  # g++ takes them from a pragma in the file, which clang does not know
    "avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
}


def torch_headers() -> list[str]:
    from torch.utils.cpp_extension import include_paths

    folders = [*include_paths(), sysconfig.get_path("include")]
    return [f"-isystem{folder}" for folder in folders]


def flags(file: Path) -> tuple[list[str], list[str]]:
    """The options of clang-tidy and of its compiler for one file of csrc."""
    if file.suffix == ".cu":
        # As the tests compile it: plain C++, on a stand-in for CUDA's headers whose uint4 looks at its alignment and
        # therefore is no plain data; the device's is.
        checks = "-bugprone-undefined-memory-manipulation,-bugprone-raw-memory-call-on-non-trivial-type"
        emulated = ["-xc++", "-std=c++17", "-Wno-nontrivial-memcall", f"-I{EMULATOR}", "-Icsrc/kernels/cuda"]
        # The analyzer follows paths up to 225,000 nodes in each instantiation of a template: six times as long.
        emulated += ["-Xclang", "-analyzer-config", "-Xclang", "max-nodes=20000"]
        return [f"--checks={checks}"], emulated
    common = ["-std=c++20", "-Icsrc"]
    if file.parent.name == "cpu":
        wide = INSTRUCTION_SETS.get(file.name, []) if platform.machine() == "x86_64" else []
        known_to_gnu = ["-Wno-unknown-pragmas", "-Wno-unknown-warning-option", "-include.ci/gnu_vectors.h"]
        return [], [*common, *known_to_gnu, *wide]
    return [], [*common, *torch_headers()]


def check(file: Path) -> str:
    """What clang-tidy says of a file; nothing if it finds nothing."""
    options, compiler = flags(file)
    command = [str(TIDY), "--quiet", *options, str(file), "--", "-Wall", "-Wextra", *compiler]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0:
        return ""
    return f"{file}\n{done.stdout}{done.stderr}"


def sources() -> list[Path]:
    found = [path.relative_to(ROOT) for pattern in ("*.cpp", "*.cu") for path in (ROOT / "csrc").rglob(pattern)]
    slow = {"scoring.cu", "scoring.cpp"}  # first, so that the last process does not work alone
    return sorted(found, key=lambda path: (path.name not in slow, path.parent.name != "torch", path))


def main(names: list[str]) -> int:
    if not TIDY.is_file():
        sys.exit(f"there is no clang-tidy beside {sys.executable}; install the extra dev: pip install -e '.[dev]'")
    files = [Path(name).resolve().relative_to(ROOT) for name in names] or sources()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        said = [text for text in pool.map(check, files) if text]
    sys.stdout.write("\n".join(said))
    sys.stdout.write(f"clang-tidy: {len(files)} files, {len(said)} with findings\n")
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
