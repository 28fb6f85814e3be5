"""Progress: a bar in a terminal, plain lines elsewhere, silence on request."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from tlcr.training.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("tlcr.training.progress.time.monotonic", lambda: now[0])
    return now


def test_without_a_terminal_a_plain_line_comes_now_and_then(clock):
    out = io.StringIO()
    with Progress("sft", total=100, done=40, console=Console(file=out)) as progress:
        for step in range(41, 101):
            clock[0] += 1.0
            progress.on_step(step, {"loss": 1.25, "grad_norm": 3.0})
    lines = out.getvalue().splitlines()
    assert lines[0] == "sft: 55/100, 0:00:15 elapsed, 0:00:45 left  loss 1.25  grad_norm 3"
    assert lines[-1] == "sft: 100/100, 0:01:00 elapsed, 0:00:00 left  loss 1.25  grad_norm 3"
    assert len(lines) == 4


def test_a_terminal_gets_a_bar_with_the_time_left_and_the_chosen_metrics():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=150)
    with Progress("ppo", total=10, keys=("kl",), console=console) as progress:
        progress.on_step(3, {"loss": 1.25, "kl": 0.125})
    assert "3/10" in out.getvalue()
    assert "left" in out.getvalue()
    assert "kl 0.125" in out.getvalue()
    assert "loss" not in out.getvalue()


def test_what_a_terminal_shows_is_no_markup():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=150, color_system=None)
    with Progress("x[/y]", total=10, console=console) as progress:
        progress.on_step(3, {"[bold]loss": 1.25})
    assert "x[/y]" in out.getvalue() and "[bold]loss 1.25" in out.getvalue()


def test_it_can_be_silenced(monkeypatch):
    monkeypatch.setenv("TLCR_PROGRESS", "0")
    out = io.StringIO()
    with Progress("sft", total=1, console=Console(file=out, force_terminal=True)) as progress:
        progress.on_step(1, {"loss": 1.0})
    assert out.getvalue() == ""
