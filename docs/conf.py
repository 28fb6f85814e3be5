"""The documentation site: Sphinx reads the Markdown pages by MyST, and the docstrings of tlcr. ``make docs`` builds it.

Sphinx with the PyData theme is what PyTorch and numpy use. MkDocs has had no release since 2024, and its Material theme
is at the end of its support.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import typing
from typing import Any
from unittest.mock import patch

from sphinx.application import Sphinx
from sphinx.ext.autodoc.mock import mock, undecorate

from tlcr.distribution import installed_version

project = "tlcr"
author = "The tlcr authors"
version = release = installed_version()

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]

# Pages. Links between them are those of a code host (file.md#heading); MyST checks each of them.
source_suffix = {".md": "markdown"}
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]

highlight_language = "none"
default_role = "literal"  # `name` in a docstring is code

# The API reference, from docstrings in Google's style.
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autosummary_generate = False  # the pages of the reference are written by hand: one for each folder of the package
napoleon_numpy_docstring = False
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"

# Adaptors import the trainer that they are for, and ask whether its version will do. Here no trainer is installed.
with mock(["loguru", "openrlhf", "ray", "skyrl", "swift", "verl", "vllm"]), patch("tlcr.hosts.guard.require"):
    for adaptor in ("openrlhf", "openrlhf_agent", "skyrl", "swift", "verl", "vllm_weights"):
        module = importlib.import_module(f"tlcr.hosts.{adaptor}")
        for public in module.__all__:  # what a trainer's decorator would return is a mock too
            setattr(module, public, undecorate(getattr(module, public)))

# Every reference must be found, but for those to other projects: their sites cannot be asked without a network.
nitpicky = True
elsewhere = "|".join(
    (
        *("accelerate", "argparse", "collections", "contextlib", "datasets", "datetime", "importlib", "jsonargparse"),
        *("asyncio", "logging", "np", "numpy", "packaging", "pathlib", "skyrl", "starlette", "torch", "transformers"),
        *("concurrent", "typing", "uvicorn"),
    )
)
nitpick_ignore_regex = [
    (r"py:.*", rf"({elsewhere})\..*"),
    # imported for the type checker only
    (r"py:class", r"Tensor|nn\.Module|Path|PreTrainedTokenizerBase|Normalise|Baseline|EngineName"),
    (r"py:class", r"tlcr\..*\.(T|E|ConfigT)"),  # type variables
    (r"py:class", r"tuple\[.*"),  # half a type: Sphinx cuts a signature with a default factory at every comma
]

html_theme = "pydata_sphinx_theme"
html_title = "tlcr"
html_static_path = ["_static"]
html_css_files = ["tlcr.css"]
html_show_sourcelink = False
html_sidebars: dict[str, list[str]] = {"contributing": [], "changelog": [], "security": []}
html_theme_options = {
    "show_prev_next": True,
    "navigation_with_keys": False,
    "show_nav_level": 2,
    "show_toc_level": 2,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
}
html_context = {"default_mode": "auto"}
copyright = author


def knob_table(cls: type) -> list[str]:
    """The knobs of a config dataclass as a table in reStructuredText: name, type, default and meaning."""
    hints = {name: hint for base in reversed(cls.__mro__) for name, hint in inspect.get_annotations(base).items()}
    rows = []
    for field in dataclasses.fields(cls):
        if "help" not in field.metadata:
            continue
        has_factory = field.default_factory is not dataclasses.MISSING
        default = field.default_factory() if has_factory else field.default
        bounds = {"ge": ">=", "gt": ">", "le": "<="}
        limits = [f"{sign} {field.metadata[key]:g}" for key, sign in bounds.items() if field.metadata[key] is not None]
        notes = [note for note in (field.metadata["unit"], *limits) if note]
        meaning = field.metadata["help"] + (f" ({', '.join(notes)})" if notes else "")
        rows += [f"   * - ``{field.name}``", f"     - ``{hints[field.name]}``", f"     - ``{default!r}``"]
        rows += [f"     - {plain(meaning)}. Source: {field.metadata['source']}"]
    if not rows:
        return []
    head = ["   * - knob", "     - type", "     - default", "     - meaning"]
    return ["", ".. list-table::", "   :header-rows: 1", "", *head, *rows, ""]


def plain(text: str) -> str:
    """Text that reStructuredText prints as it stands."""
    return re.sub(r"([\\*`|_])", r"\\\1", text)


def is_config(what: str, obj: Any) -> bool:
    return what == "class" and dataclasses.is_dataclass(obj) and obj.__module__.startswith("tlcr.config")


def add_knobs(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Ends the docstring of a config dataclass with the table of its knobs."""
    if is_config(what, obj):
        lines += knob_table(typing.cast(type, obj))


def read_plain_prose(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Lets reStructuredText and napoleon print our docstrings as they stand.

    An indented block after a colon is literal, and a |bar| is a bar. What stands before a colon is no type, neither in
    Returns and Yields nor where a docstring of an attribute begins: signatures have the types.
    """
    literal_from: int | None = None
    for number, line in enumerate(lines):
        depth = len(line) - len(line.lstrip())
        if literal_from is not None and line.strip() and depth < literal_from:
            literal_from = None
        if literal_from is None:
            lines[number] = re.sub(r"(``.+?``|`[^`]*`)|\|", lambda found: found[1] or r"\|", line)
        following = lines[number + 1 : number + 3]
        if len(following) == 2 and line.endswith(":") and not following[0].strip():
            indent = len(following[1]) - len(following[1].lstrip())
            if literal_from is None and following[1].strip() and indent >= depth + 4:
                literal_from = indent
                lines[number] = lines[number].rstrip(":") + "::"
    for number in range(1, len(lines)):
        if lines[number - 1] in ("Returns:", "Yields:"):
            lines[number] = re.sub(r"^( +)", r"\1: ", lines[number])
    if what in ("attribute", "data", "property") and lines:
        lines[0] = f": {lines[0]}"


def leave_out_knobs(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """The signature of a config dataclass without its fields, which its table has."""
    if is_config(what, obj) and knob_table(obj):
        return "", None
    return signature, returns


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", read_plain_prose, priority=400)  # before napoleon
    app.connect("autodoc-process-docstring", add_knobs)
    app.connect("autodoc-process-signature", leave_out_knobs)
