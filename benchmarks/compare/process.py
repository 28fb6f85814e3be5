"""A process of a round: runs a module as `python -m` does, with the tlcr of one folder and no other.

    python -m benchmarks.compare.process FOLDER MODULE ...

The order of sys.path alone does not do that. An editable installation of tlcr adds a finder that is asked for every
module of tlcr that the folder does not have, such as `tlcr._C` of a commit that was installed without compiled kernels,
and finds it in the checkout: the commit would run with parts of another one. Here such a module is missing.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


class OnlyIn(MetaPathFinder):
    """Finds tlcr and its modules in a folder, and nowhere else."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.partition(".")[0] != "tlcr":
            return None
        spec = PathFinder.find_spec(name, [self.folder] if path is None else path, target)
        if spec is None:  # raised, because after None Python would try the next finder
            raise ModuleNotFoundError(f"No module named {name!r} in {self.folder}", name=name)
        return spec


def main() -> None:
    folder, module, *arguments = sys.argv[1:]
    sys.meta_path.insert(0, OnlyIn(folder))
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
