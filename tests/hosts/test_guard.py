"""A trainer that an adaptor does not fit is refused in one sentence, before training."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from types import ModuleType

import pytest

from tlcr.errors import HostError, HostWarning
from tlcr.hosts import guard

TESTED = ">=1.11,<=1.16.0"


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Installs a trainer `made_up` of a version."""

    class Trainer:
        def _score(self, inputs: object, extra: int = 0) -> None: ...

        def _any(self, *inputs: object, **options: object) -> None: ...

    module = ModuleType("made_up.training")
    module.Trainer = Trainer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "made_up", ModuleType("made_up"))
    monkeypatch.setitem(sys.modules, "made_up.training", module)

    def install(version: str) -> None:
        monkeypatch.setattr(guard, "version", lambda name: {"made-up": version}[name])

    return install


def require(**names: str | None) -> None:
    wanted = {f"made_up.training:Trainer.{name}": parameters for name, parameters in names.items()}
    guard.require("Made Up", "made-up", TESTED, wanted)


@pytest.mark.parametrize("version", ["1.11", "1.11.0", "1.12.3", "1.16.0", "1.16.0rc1", "1.16.0+local"])
def test_a_tested_version_passes_in_silence(trainer: Callable[[str], None], version: str) -> None:
    trainer(version)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        require(_score="self, inputs", _any="self, whatever")


@pytest.mark.parametrize("version", ["1.10.9", "0.29.1", "1.11.0rc1"])
def test_an_older_one_is_refused(trainer: Callable[[str], None], version: str) -> None:
    trainer(version)
    with pytest.raises(HostError) as raised:
        require(_score=None)
    assert str(raised.value) == (
        f"tlcr works with Made Up {TESTED} and {version} is installed; pip install 'made-up{TESTED}'"
    )


@pytest.mark.parametrize("version", ["1.16.1", "2.0"])
def test_a_newer_one_with_all_names_warns(trainer: Callable[[str], None], version: str) -> None:
    trainer(version)
    with pytest.warns(HostWarning, match=f"{version} is newer"):
        require(_score="self, inputs")


def test_a_newer_one_without_a_name_is_refused(trainer: Callable[[str], None]) -> None:
    trainer("2.0")
    with pytest.raises(HostError) as raised:
        require(_score=None, _gone=None)
    said = str(raised.value)
    for part in ("Made Up 2.0", "made_up.training.Trainer._gone is not there", TESTED, "pip install"):
        assert part in said, part


@pytest.mark.parametrize(
    ("parameters", "fits"),
    [
        ("self, inputs", True),
        ("self, inputs, extra", True),
        ("self", False),  # inputs has no default
        ("self, inputs, prompts", False),  # and prompts is not taken
        ("inputs, self", False),
    ],
)
def test_parameters_are_compared(trainer: Callable[[str], None], parameters: str, fits: bool) -> None:
    trainer("1.12.0")
    if fits:
        require(_score=parameters)
    else:
        with pytest.raises(HostError, match=r"_score takes \(self, inputs, extra\) and not"):
            require(_score=parameters)


def test_a_missing_module_and_a_missing_package_are_told_apart(trainer: Callable[[str], None]) -> None:
    trainer("1.12.0")
    with pytest.raises(HostError, match=r"made_up\.other.X is not there"):
        guard.require("Made Up", "made-up", TESTED, {"made_up.other:X": None})


def test_a_trainer_that_is_not_installed() -> None:
    with pytest.raises(HostError, match=r"^Made Up is not installed; pip install 'made-up-and-absent>=1'$"):
        guard.require("Made Up", "made-up-and-absent", ">=1", {})
