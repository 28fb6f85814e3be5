"""Finds the two commits by their names and installs each into a separate folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console

from benchmarks.record import ROOT


class Revision(NamedTuple):
    """What is compared: a commit, or the files of the checkout as they are."""

    name: str
    commit: str
    dirty: bool = False

    def __str__(self) -> str:
        return f"{self.name} ({self.commit[:12]}{' and changes' if self.dirty else ''})"


def git(*arguments: str, folder: Path | None = None) -> str | None:
    """The output of git, or None if git fails."""
    done = subprocess.run(["git", "-C", folder or ROOT, *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def revisions(base: str, head: str, *, dirty: bool = False) -> tuple[Revision, Revision]:
    """Both revisions, with their commits.

    Raises SystemExit for a revision that git does not know, and if head is HEAD and files differ from it, unless the
    caller wants to compare these files.
    """
    found = []
    for name in (base, head):
        commit = git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
        if commit is None:
            raise SystemExit(f"{name!r} is no revision of {ROOT}: name a commit, branch or tag; git log shows them")
        found.append(Revision(name, commit))
    changed = git("status", "--porcelain") if head == "HEAD" else ""
    if changed and not dirty:
        raise SystemExit(
            f"the checkout differs from HEAD; commit or stash these, or ask for them with --dirty:\n{changed}"
        )
    if dirty:
        found[1] = Revision("the checkout", found[1].commit, dirty=True)
    return found[0], found[1]


@contextmanager
def installed(revision: Revision, kept: Path, console: Console) -> Iterator[Path]:
    """A folder with this revision's tlcr installed; that of a commit is kept, one for each build environment."""
    built_as = os.environ.get("TLCR_BUILD", "auto")
    folder = kept / f"{revision.commit[:12]}-{sys.implementation.cache_tag}-torch{torch.__version__}-{built_as}"
    if folder.is_dir() and not revision.dirty:
        yield folder
        return
    kept.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept, prefix=".partial-") as aside:
        console.print(f"[dim]building {revision}[/dim]", highlight=False)
        source, target = Path(aside, "source"), Path(aside, "installed")
        if revision.dirty:
            copy_checkout(source)
        else:
            clone = ["git", "clone", "--quiet", "--shared", "--no-checkout", str(ROOT), str(source)]
            run(clone, f"cloning {revision}")
            run(
                ["git", "-C", str(source), "checkout", "--quiet", "--detach", revision.commit],
                f"checking out {revision}",
            )
        pip = [
            sys.executable,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "install",
            "--quiet",
            "--no-index",
            "--no-deps",
        ]
        run([*pip, "--no-build-isolation", "--target", str(target), str(source)], f"building {revision}")
        if revision.dirty:
            yield target
            return
        target.rename(folder)
    yield folder


def copy_checkout(target: Path) -> None:
    """Copy the files that git tracks or would track: no build products and no other ignored files."""
    listed = git("ls-files", "-z", "--cached", "--others", "--exclude-standard") or ""
    for name in filter(None, listed.split("\0")):
        source = ROOT / name
        if source.is_symlink() or source.exists():  # false for a file that is deleted and not committed
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name, follow_symlinks=False)


def run(command: Sequence[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{what} failed with code {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}")


def compiled(folder: Path) -> bool:
    return (folder / "tlcr/libtlcr.so").exists() or any(folder.glob("tlcr/_C*.so"))  # the latter in older commits
