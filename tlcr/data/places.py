"""Whether a source of records is there and can be one: what can be known of it without reading it.

Imports no large package, so that a config that names a missing file is refused at once.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from tlcr.errors import DataError
from tlcr.text.files import is_lfs_pointer

__all__ = [
    "BUILDERS",
    "JSON_SUFFIXES",
    "SEPARATORS",
    "find_source",
    "inner_suffix",
    "kind_of_file",
    "looks_like_a_path",
    "nearest_name",
]

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
SEPARATORS = {".csv": ",", ".tsv": "\t"}
BUILDERS = {".parquet": "parquet", ".arrow": "arrow"}
SUFFIXES = (*JSON_SUFFIXES, *SEPARATORS, *BUILDERS)


def find_source(source: str) -> Path | None:
    """The file or folder that a source names.

    Args:
        source: a path, or the name of a hub dataset.

    Returns:
        The path; None where the source is the name of a hub dataset.

    Raises:
        DataError: there is no such file, it is empty, of an unknown kind, a Git LFS pointer, or cannot be opened.
    """
    path = Path(source)
    if path.is_file():
        _check_file(path)
    elif not path.is_dir():
        if looks_like_a_path(source):
            raise DataError(f"there is no file or folder {source!r}{nearest_name(path)}; check the path")
        return None
    return path


def kind_of_file(path: Path) -> str:
    """The suffix that says how a file is read, without .gz. Raises DataError where it is unknown."""
    suffix = inner_suffix(path)
    if suffix not in SUFFIXES or (suffix in BUILDERS and path.suffix == ".gz"):
        raise DataError(
            f"{path}: unknown kind of file {''.join(path.suffixes[-2:])!r}; known are {', '.join(SUFFIXES)}, and "
            ".gz of text: convert the file or rename it"
        )
    return suffix


def inner_suffix(path: Path) -> str:
    """The suffix in lower case, of a name that ends in .gz the one before."""
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()


def _check_file(path: Path) -> None:
    kind_of_file(path)
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty (0 bytes); write or download it again")
    try:
        pointer = is_lfs_pointer(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check its permissions and the disk") from error
    if pointer:
        raise DataError(
            f"{path} is a Git LFS pointer, which stands for a file that was not downloaded; run 'git lfs pull' in its "
            "folder, or download the file itself"
        )


def looks_like_a_path(source: str) -> bool:
    """Whether a source that is not there was meant as a path: the names of hub datasets have one slash at most."""
    path = Path(source)
    return (
        source.startswith((".", "/", "~"))
        or len(path.parts) > 2
        or path.suffix.lower() in (*SUFFIXES, ".gz")
        or (len(path.parts) == 2 and path.parent.is_dir())
    )


def nearest_name(path: Path) -> str:
    """ " (nearest name: ...)", if the folder holds a similar name."""
    if not path.parent.is_dir():
        return ""
    names = difflib.get_close_matches(path.name, sorted(entry.name for entry in path.parent.iterdir()), n=1)
    return f" (nearest name: {str(path.parent / names[0])!r})" if names else ""
