"""What SECURITY.md promises of the sources: no pickle, no code from data, no shell, no archives."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FORBIDDEN = {
    *("pickle.load", "pickle.loads", "torch.load", "joblib.load", "numpy.load", "np.load", "marshal.loads"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec", "compile", "os.system", "os.popen"),
    *("tarfile.open", "zipfile.ZipFile", "shutil.unpack_archive"),
}


def calls(source: str) -> Iterator[tuple[str, int]]:
    """The calls that are forbidden, and those of a shell or of a model's own code, with their lines."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in FORBIDDEN:
                yield name, node.lineno
            for argument in node.keywords:
                if argument.arg in ("shell", "trust_remote_code") and ast.unparse(argument.value) == "True":
                    yield f"{argument.arg}=True", node.lineno


def test_no_source_runs_what_it_reads() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {call}"
        for path in sorted((ROOT / "tlcr").rglob("*.py"))
        for call, line in calls(path.read_text(encoding="utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize(
    "line", ["torch.load(path)", "eval(text)", "yaml.load(x)", "run(c, shell=True)", "f(trust_remote_code=True)"]
)
def test_such_a_call_would_be_found(line: str) -> None:
    assert len(list(calls(line))) == 1
    assert list(calls("safe_load(x); model.eval(); f(shell=False); re.compile(x)")) == []
