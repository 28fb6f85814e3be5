"""The loop that every training shares: what is counted, logged, evaluated, saved and resumed."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from tlcr.errors import CheckpointError
from tlcr.training import background
from tlcr.training.callbacks import Callback
from tlcr.training.checkpoint import latest_checkpoint
from tlcr.training.loop import TrainingLoop, settings_without
from tlcr.training.metrics import read_metrics
from tlcr.training.optim import begin_again, build_optimizer, build_scheduler

IDENTITY = {"settings": {"rate": 0.1, "inner": {"depth": 3}}, "seed": 5, "data": "ab" * 32}


class Adder:
    """A training whose step adds 1 to its only weight."""

    def __init__(
        self,
        folder: Path,
        *,
        identity: Mapping[str, Any] = IDENTITY,
        callbacks: tuple[Callback, ...] = (),
        total_steps: int = 4,
        evaluate_every: int = 2,
        save_every: int = 2,
        keep_checkpoints: int = 2,
        evaluate: bool = True,
        save_in_background: bool = False,
        masters: Mapping[str, torch.optim.Optimizer] | None = None,
    ) -> None:
        self.model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.model.weight)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)
        self.scheduler = build_scheduler(self.optimizer, schedule="linear", total_steps=total_steps, warmup_steps=0)
        self.loop = TrainingLoop(
            folder,
            total_steps=total_steps,
            evaluate_every=evaluate_every,
            save_every=save_every,
            keep_checkpoints=keep_checkpoints,
            accelerator=Accelerator(),
            models={"adder": self.model},
            optimizer=self.optimizer,
            masters=masters,
            scheduler=self.scheduler,
            identity=identity,
            config={"name": "adder"},
            evaluate=(lambda: {"weight": self.weight}) if evaluate else None,
            callbacks=callbacks,
            own_state=lambda: {"tripled": 3 * self.weight},
            save_in_background=save_in_background,
        )

    @property
    def weight(self) -> float:
        return self.model.weight.item()

    def step(self) -> dict[str, float]:
        rate = self.optimizer.param_groups[0]["lr"]
        self.model.weight.grad = torch.full((1, 1), -1 / rate)
        self.optimizer.step()
        return {"sum": self.weight}

    def run(self, take_step: Callable[[], dict[str, float]] | None = None) -> bool:
        return self.loop.run(take_step or self.step, label="adder")


class Listener(Callback):
    """Hears everything; answers what it is told to, at one step."""

    def __init__(self, on_step: int = -1, on_evaluate: int = -1) -> None:
        self.heard: list[tuple[str, int]] = []
        self._on_step, self._on_evaluate = on_step, on_evaluate

    def on_step(self, step: int, metrics: Mapping[str, float]) -> bool:
        self.heard.append(("step", step))
        return step == self._on_step

    def on_evaluate(self, step: int, metrics: Mapping[str, float]) -> bool:
        self.heard.append(("evaluate", step))
        return step == self._on_evaluate

    def on_save(self, step: int, path: Path) -> None:
        self.heard.append(("save", step))

    def on_end(self, step: int, metrics: Mapping[str, float]) -> None:
        self.heard.append(("end", step))


def rows(folder: Path) -> list[dict[str, Any]]:
    return [{key: row[key] for key in row if key != "time"} for row in read_metrics(folder / "metrics.jsonl")]


def test_steps_are_counted_logged_evaluated_and_saved_in_their_order(tmp_path: Path) -> None:
    listener = Listener()
    adder = Adder(tmp_path, callbacks=(listener,), total_steps=5)
    assert adder.loop.start(resume=False) is None
    assert adder.run() is False
    adder.loop.end()
    assert listener.heard == [
        *[("step", 1), ("evaluate", 2), ("step", 2), ("save", 2), ("step", 3)],
        *[("evaluate", 4), ("step", 4), ("save", 4), ("evaluate", 5), ("step", 5), ("end", 5)],
    ]
    assert rows(tmp_path) == [
        {"step": 1, "sum": 1.0},
        {"step": 2, "sum": 2.0, "eval/weight": 2.0},
        {"step": 3, "sum": 3.0},
        {"step": 4, "sum": 4.0, "eval/weight": 4.0},
        {"step": 5, "sum": 5.0, "eval/weight": 5.0},
    ]
    assert adder.loop.metrics == {"sum": 5.0, "eval/weight": 5.0} and adder.loop.evaluation == {"weight": 5.0}
    assert adder.scheduler.get_last_lr() == [0.0]  # once after each step
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000002", "step-000004"]


def test_without_an_evaluation_nothing_is_evaluated_and_zero_means_at_the_end_alone_and_no_checkpoint(
    tmp_path: Path,
) -> None:
    silent = Adder(tmp_path / "silent", evaluate=False)
    silent.loop.start(resume=False)
    silent.run()
    assert silent.loop.evaluation == {} and not any("eval/weight" in row for row in rows(tmp_path / "silent"))
    listener = Listener()
    last = Adder(tmp_path / "last", callbacks=(listener,), evaluate_every=0, save_every=0)
    last.loop.start(resume=False)
    last.run()
    assert [event for event in listener.heard if event[0] != "step"] == [("evaluate", 4)]
    assert not (tmp_path / "last" / "checkpoints").exists()


@pytest.mark.parametrize(("answer", "at"), [({"on_step": 3}, 3), ({"on_evaluate": 2}, 2)])
def test_a_callback_ends_the_training_after_its_step(tmp_path: Path, answer: dict[str, int], at: int) -> None:
    adder = Adder(tmp_path, callbacks=(Listener(**answer),))
    adder.loop.start(resume=False)
    assert adder.run() is True
    saved = latest_checkpoint(tmp_path / "checkpoints")
    assert adder.loop.step == at and saved is not None and saved.name == "step-000002"  # where save_every asks for it


def test_a_step_is_saved_once_however_often_that_is_asked(tmp_path: Path) -> None:
    listener = Listener()
    adder = Adder(tmp_path, callbacks=(listener,), save_every=1, total_steps=2)
    adder.loop.start(resume=False)
    adder.run()
    first = adder.loop.save()
    stamp = json.loads((first / "checkpoint.json").read_text())["saved_at"]
    assert adder.loop.save() == first
    assert json.loads((first / "checkpoint.json").read_text())["saved_at"] == stamp
    assert [event for event in listener.heard if event[0] == "save"] == [("save", 1), ("save", 2)]


def test_a_state_saved_apart_is_no_checkpoint_to_resume_from(tmp_path: Path) -> None:
    listener = Listener()
    adder = Adder(tmp_path, callbacks=(listener,))
    path = adder.loop.save_to(tmp_path / "apart", keep=1)
    assert path.parent == tmp_path / "apart" and (path / "checkpoint.json").is_file()
    assert latest_checkpoint(tmp_path / "checkpoints") is None and listener.heard == []


def test_a_resumed_training_takes_up_everything(tmp_path: Path) -> None:
    whole = Adder(tmp_path / "whole")
    whole.loop.start(resume=False)
    whole.run()

    def fail_at_3() -> dict[str, float]:
        if cut.loop.step == 3:
            raise OSError("the power went out")
        return cut.step()

    cut = Adder(tmp_path / "cut")
    cut.loop.start(resume=False)
    cut.loop._started -= 1000  # as if those two steps had taken so long
    with pytest.raises(OSError, match="power"):
        cut.run(fail_at_3)
    again = Adder(tmp_path / "cut")
    state = again.loop.start(resume=True)
    assert state is not None and state["tripled"] == 6.0
    assert (again.loop.step, again.weight) == (2, 2.0)
    assert again.loop.metrics == {"sum": 2.0, "eval/weight": 2.0} and again.loop.evaluation == {"weight": 2.0}
    assert again.scheduler.get_last_lr() == [0.5]
    assert 1000 < again.loop.seconds < 1100
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")[:2]  # the third step is taken again
    again.run()
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole") and again.weight == whole.weight


def test_a_training_resumed_at_its_end_saves_nothing_again(tmp_path: Path) -> None:
    first = Adder(tmp_path)
    first.loop.start(resume=False)
    first.run()
    listener = Listener()
    again = Adder(tmp_path, callbacks=(listener,))
    again.loop.start(resume=True)
    assert again.run() is False and again.loop.save() == tmp_path / "checkpoints" / "step-000004"
    assert listener.heard == []


def test_what_rounding_took_from_other_weights_is_in_the_checkpoint(tmp_path: Path) -> None:
    def other(dtype: torch.dtype) -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
        parameter = torch.nn.Parameter(torch.full((3,), 0.7, dtype=dtype))
        return parameter, build_optimizer([{"params": [parameter], "lr": 1e-5, "weight_decay": 0.0}])

    parameter, optimizer = other(torch.bfloat16)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    begin_again(optimizer)
    first = Adder(tmp_path, masters={"other": optimizer, "whole": other(torch.float32)[1]})
    first.loop.start(resume=False)
    first.run()
    resumed, found = other(torch.bfloat16)
    again = Adder(tmp_path, masters={"other": found, "whole": other(torch.float32)[1]})
    again.loop.start(resume=True)
    assert found.state[resumed].keys() == {"remainder"} and found.state[resumed]["remainder"].any()
    assert torch.equal(found.state[resumed]["remainder"], optimizer.state[parameter]["remainder"])
    names = {path.name for path in (tmp_path / "checkpoints" / "step-000004").iterdir()}
    assert any("optimizer-other" in name for name in names) and not any("optimizer-whole" in name for name in names)


def test_what_is_left_behind_is_what_was_evaluated_wherever_the_training_ends(tmp_path: Path) -> None:
    listener = Listener(on_step=3)
    stopped = Adder(tmp_path, callbacks=(listener,))
    stopped.loop.start(resume=False)
    assert stopped.run() and stopped.loop.evaluation == {"weight": 3.0} and listener.heard[-1] == ("evaluate", 3)
    ends = [
        {"step": 1, "sum": 1.0},
        {"step": 2, "sum": 2.0, "eval/weight": 2.0},
        {"step": 3, "sum": 3.0, "eval/weight": 3.0},
    ]
    assert rows(tmp_path) == ends
    shorter = Adder(tmp_path, total_steps=2, evaluate_every=0)  # as if 2 had been the end, and no evaluation was due
    state = tmp_path / "checkpoints" / "step-000002" / "checkpoint.json"
    record = json.loads(state.read_text())
    record["state"] |= {"metrics": {"sum": 2.0}, "evaluation": {"weight": 0.0}, "evaluated": 0}
    state.write_text(json.dumps(record))
    shorter.loop.start(resume=True)
    assert shorter.run() is False and shorter.loop.evaluation == {"weight": 2.0}
    assert shorter.loop.metrics == {"sum": 2.0, "eval/weight": 2.0} and rows(tmp_path) == ends[:2]


def test_the_log_is_on_the_disk_before_the_end_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listener = Listener()
    adder = Adder(tmp_path, callbacks=(listener,), save_every=0)
    adder.loop.start(resume=False)
    adder.run()
    monkeypatch.setattr(adder.loop.log, "sync", lambda: listener.heard.append(("sync", len(rows(tmp_path)))))
    adder.loop.end()
    assert listener.heard[-2:] == [("sync", 4), ("end", 4)]


def test_a_training_does_not_go_back_to_an_earlier_end(tmp_path: Path) -> None:
    """Its weights are of the step that it reached, whatever a record would say."""
    first = Adder(tmp_path)
    first.loop.start(resume=False)
    first.run()
    before = rows(tmp_path)
    with pytest.raises(CheckpointError, match=r"saved after step 4, and .* end after 3: set ppo.updates to at least 4"):
        Adder(tmp_path, total_steps=3).loop.start(resume=True)
    assert rows(tmp_path) == before
    again = Adder(tmp_path, total_steps=4)
    again.loop.start(resume=True)
    assert again.loop.step == 4


def test_a_fresh_start_empties_a_log_that_was_left(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "sum": 7.0}\n{"step": 1, "sum": 8.0}\n')
    Adder(tmp_path).loop.start(resume=False)
    assert rows(tmp_path) == []


@pytest.mark.parametrize(
    ("identity", "message"),
    [
        (
            {"settings": {"rate": 0.2, "inner": {"depth": 3}}, "seed": 5},
            r"with other settings \(rate was 0.1 and is 0.2\): restore them, name another output_dir, or delete .*",
        ),
        (
            {"settings": {"rate": 0.1, "inner": {"depth": 4}}, "seed": 6},
            r"with other settings and seed \(inner.depth was 3 and is 4; seed was 5 and is 6\)",
        ),
        ({"settings": {"rate": 0.1, "inner": {}}, "seed": 5}, r"with other settings \(inner.depth was 3 and is None\)"),
        ({**IDENTITY, "data": "0f" * 32}, r"with other data \(data was abababab\.\.\. and is 0f0f0f0f\.\.\.\)"),
    ],
)
def test_a_checkpoint_of_another_training_changes_nothing_and_names_what_differs(
    tmp_path: Path, identity: dict[str, Any], message: str
) -> None:
    first = Adder(tmp_path)
    first.loop.start(resume=False)
    first.run()
    other = Adder(tmp_path, identity=identity)
    with pytest.raises(CheckpointError, match=f"checkpoint .*step-000004 belongs to a run {message}") as caught:
        other.loop.start(resume=True)
    assert "\n" not in str(caught.value)
    assert (other.weight, other.loop.step) == (0.0, 0)
    assert len(rows(tmp_path)) == 4


def test_a_setting_that_did_not_exist_then_and_is_none_now_is_no_difference(tmp_path: Path) -> None:
    first = Adder(tmp_path)
    first.loop.start(resume=False)
    first.run()
    Adder(tmp_path, identity={"settings": {**IDENTITY["settings"], "new": None}, "seed": 5}).loop.start(resume=True)  # type: ignore[dict-item]


@pytest.mark.parametrize(("when", "step"), [("step", 1), ("step", 4), ("save", 4)])
def test_ctrl_c_ends_the_training_after_the_step_or_the_save_that_it_met(tmp_path: Path, when: str, step: int) -> None:
    class Press(Callback):
        def on_step(self, at: int, metrics: Mapping[str, float]) -> None:
            if when == "step" and at == step:
                os.kill(os.getpid(), signal.SIGINT)

        def on_save(self, at: int, path: Path) -> None:
            if when == "save" and at == step:
                os.kill(os.getpid(), signal.SIGINT)

    adder = Adder(tmp_path, callbacks=(Press(),), save_every=4 if when == "save" else 0)
    adder.loop.start(resume=False)
    with pytest.raises(KeyboardInterrupt, match=f"stopped after step {step}; .*step-00000{step}: .*--resume"):
        adder.run()


# ---- in the background


class Gate:
    """Lets writing begin when it is opened; a disk that is slow, or that is full, as a test needs it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: OSError | None = None) -> None:
        self.opened, self.writers = threading.Event(), 0
        write = background.write_checkpoint

        def gated(*args: Any, **options: Any) -> Path:
            self.writers += 1
            assert self.writers == 1 and self.opened.wait(60)
            try:
                if error is not None:
                    with pytest.MonkeyPatch.context() as patch:
                        patch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(error))
                        return write(*args, **options)
                return write(*args, **options)
            finally:
                self.writers -= 1

        monkeypatch.setattr(background, "write_checkpoint", gated)


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_training_goes_on_while_a_checkpoint_is_written_which_counts_once_it_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, listener = Gate(monkeypatch), Listener()
    adder = Adder(tmp_path, callbacks=(listener,), total_steps=5, save_every=2, evaluate=False, save_in_background=True)
    adder.loop.start(resume=False)

    def take_step() -> dict[str, float]:
        figures = adder.step()
        if adder.loop.step == 3:  # amid the fourth step, which changes the weight before the second is on disk
            assert latest_checkpoint(tmp_path / "checkpoints") is None and ("save", 2) not in listener.heard
            gate.opened.set()
        return figures

    adder.run(take_step)
    assert [event for event in listener.heard if event[0] == "save"] == [("save", 2), ("save", 4)]
    latest = latest_checkpoint(tmp_path / "checkpoints")
    assert latest is not None and latest.name == "step-000004"
    for step in (2, 4):
        weights = load_file(tmp_path / "checkpoints" / f"step-00000{step}" / "model-adder.safetensors")
        assert weights["weight"].item() == step
        state = json.loads((tmp_path / "checkpoints" / f"step-00000{step}" / "checkpoint.json").read_text())["state"]
        assert state["tripled"] == 3 * step


@pytest.mark.parametrize("ending", ["the last step", "Ctrl-C", "an error", "a save apart"])
def test_whatever_ends_the_training_waits_for_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    gate = Gate(monkeypatch)
    adder = Adder(tmp_path, total_steps=3, save_every=2, evaluate=False, save_in_background=True)
    adder.loop.start(resume=False)

    def take_step() -> dict[str, float]:
        if adder.loop.step == 2:
            threading.Timer(0.2, gate.opened.set).start()
            if ending == "Ctrl-C":
                os.kill(os.getpid(), signal.SIGINT)
            if ending == "an error":
                raise ZeroDivisionError
            if ending == "a save apart":
                adder.loop.save_to(tmp_path / "apart", keep=1)
                assert (tmp_path / "checkpoints" / "step-000002").is_dir()
        return adder.step()

    expected = {"Ctrl-C": KeyboardInterrupt, "an error": ZeroDivisionError}.get(ending)
    with pytest.raises(expected) if expected else nullcontext():
        adder.run(take_step)
    assert (tmp_path / "checkpoints" / "step-000002").is_dir()
    latest = latest_checkpoint(tmp_path / "checkpoints")
    assert latest is not None and latest.name == ("step-000003" if ending == "Ctrl-C" else "step-000002")


def test_a_checkpoint_that_could_not_be_written_ends_the_training_at_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch, FULL)
    gate.opened.set()
    adder = Adder(tmp_path, total_steps=9, save_every=2, evaluate=False, save_in_background=True)
    adder.loop.start(resume=False)
    with pytest.raises(CheckpointError, match=r"cannot write .*step-000002: No space left on .*free some space"):
        adder.run()
    assert adder.loop.step in (3, 4) and list((tmp_path / "checkpoints").iterdir()) == []


def test_an_error_of_the_training_is_the_one_that_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate(monkeypatch, FULL)
    adder = Adder(tmp_path, total_steps=9, save_every=2, evaluate=False, save_in_background=True)
    adder.loop.start(resume=False)

    def take_step() -> dict[str, float]:
        if adder.loop.step == 2:
            gate.opened.set()
            raise ZeroDivisionError
        return adder.step()

    with pytest.raises(ZeroDivisionError):
        adder.run(take_step)
    assert "step-000002: No space left on device" in caplog.text
    assert "the training had ended by itself (ZeroDivisionError)" in caplog.text


# ---- room on the disk


def test_checkpoints_that_cannot_fit_are_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="tlcr.training.loop")
    Adder(tmp_path / "fits").loop.start(resume=False)
    assert "fits: a checkpoint takes 0 MiB, and up to 3 at a time 0 MiB, of " in caplog.text
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=3 * 12 - 1))
    with pytest.raises(CheckpointError, match="that are free for them: keep fewer checkpoints, free some space, or"):
        Adder(tmp_path / "full").loop.start(resume=False)
    Adder(tmp_path / "full", keep_checkpoints=1).loop.start(resume=False)


def test_settings_without_what_may_change() -> None:
    assert settings_without({"a": (1, 2), "b": 3}, ("b",)) == {"a": [1, 2]}
