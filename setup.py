"""Build script. The metadata lives in pyproject.toml; compiled extensions are declared here."""

from pathlib import Path

from setuptools import setup
from setuptools.command.sdist import sdist

KERNELS = Path("tlcr", "kernels")


class SourceDistribution(sdist):
    """An sdist in which tlcr/kernels is the link that it is in a checkout."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        (Path(base_dir) / KERNELS).symlink_to(Path("..", "kernels"))


setup(cmdclass={"sdist": SourceDistribution})
