"""Functions that knobs name: imported once, and refused with what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tlcr.config.functions import import_function, import_reward, import_scorer
from tlcr.errors import ConfigError


def module(folder: Path, text: str, name: str = "own.py") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_file_runs_once_however_often_it_is_named(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    text = f"import pathlib\np = pathlib.Path({str(ran)!r})\np.write_text('x' * (1 + p.exists()))"
    path = module(tmp_path, f"{text}\ndef f(**_): ...\ndef g(a, b): ...")
    assert import_reward(f"{path}:f") is import_function(f"{path}:f", "knob")
    import_scorer(f"{path}:g")
    assert ran.read_text() == "x"


def test_two_files_of_one_name_are_two_modules(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    one, other = (module(tmp_path / name, f"def f(): return {name!r}") for name in ("a", "b"))
    assert [import_function(f"{path}:f", "knob")() for path in (one, other)] == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def f(:", r"raises SyntaxError: .*own\.py:1\); mend that module"),
        ("x = 1\nx.y", r"raises AttributeError: 'int' object has no attribute 'y' \(.*own\.py:2\)"),
        ("from json import nothing", r"raises ImportError: cannot import name 'nothing'"),
        ("import no_such_module_at_all", "there is no module 'no_such_module_at_all'; install it"),
        ("import sys\nsys.exit(0)", r"importing it raises SystemExit: 0 \(.*own\.py:2\); mend that module"),
        ("f = 3", r"own\.py has no function 'f'; correct the name"),
    ],
)
def test_a_module_that_cannot_be_used(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"knob is '.*own.py:f'.*{said}"):
        import_function(f"{module(tmp_path, text)}:f", "knob")


@pytest.mark.parametrize(
    "parameters",
    ["**_", "*, prompts, **_", "prompts, responses, response_ids, mask, ended", "*, response_ids, mask=None, **more"],
)
def test_a_reward_takes_its_keywords_in_any_form(tmp_path: Path, parameters: str) -> None:
    import_reward(f"{module(tmp_path, f'def f({parameters}): ...')}:f")


@pytest.mark.parametrize("parameters", ["prompts, responses", "", "x, /, **_", "prompts, /, **_"])
def test_a_reward_that_cannot_be_called_is_refused(tmp_path: Path, parameters: str) -> None:
    with pytest.raises(ConfigError, match=r"which takes \(.*\), but it is called with the keywords prompts, .* ended"):
        import_reward(f"{module(tmp_path, f'def f({parameters}): ...')}:f")


def test_a_scorer_takes_prompts_and_responses(tmp_path: Path) -> None:
    import_scorer(f"{module(tmp_path, 'def f(questions, answers, scale=1.0): ...')}:f")
    with pytest.raises(ConfigError, match=r"called with \(prompts, responses\) \(too many positional arguments\)"):
        import_scorer(f"{module(tmp_path, 'def f(answers): ...', 'other.py')}:f")
