"""Compiles tlcr's extension beside its sources, of the kind that TLCR_BUILD says, and fails where it is not loaded.

python -m benchmarks.gpu.build cuda
"""

from __future__ import annotations

import subprocess
import sys


def main(device: str) -> None:
    subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], check=True)
    # Only now: tlcr looks for its kernels when it is imported. Without them, later steps would test and time torch's.
    from tlcr.ops import _extension, build_info

    if (problem := _extension.unavailable(device)) is not None:
        raise SystemExit(f"what was built is not loaded: {problem}")
    sys.stdout.write(f"built for torch {build_info()['torch']}\n")


if __name__ == "__main__":
    main(sys.argv[1])
