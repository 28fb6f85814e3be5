"""The supervised loop: one step however the batch is cut, resumed bit for bit, stopped cleanly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from transformers import PreTrainedModel

from tlcr.config.schema import TrainingConfig
from tlcr.errors import CheckpointError, ConfigError, DataError, TrainingDiverged
from tlcr.models.dpo import ReferencedComparison
from tlcr.models.preparing import enable_gradient_checkpointing
from tlcr.models.sft import completion_loss
from tlcr.text.padding import collate_completions
from tlcr.training.callbacks import Callback
from tlcr.training.checkpoint import latest_checkpoint
from tlcr.training.metrics import read_metrics
from tlcr.training.supervised import FitResult, LossParts, examples_digest, fit, mean_loss
from tlcr.types import EncodedAnswer, EncodedComparison, LabelledAnswer, LabelledPair

LENGTHS = [(2, 3), (1, 9), (5, 2), (3, 6), (1, 1), (4, 12), (2, 2), (6, 4), (3, 7), (2, 5)]  # of prompts and answers


def answers(count: int = 10) -> list[EncodedAnswer]:
    generator = torch.Generator().manual_seed(5)
    return [
        EncodedAnswer(tuple(torch.randint(3, 400, (p + a,), generator=generator).tolist()), p, True)
        for p, a in LENGTHS[:count]
    ]


def config(**changes: Any) -> TrainingConfig:
    values: dict = {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3, "schedule": "constant", "save_every": 0}
    return TrainingConfig(**{**values, "max_grad_norm": 1e9, **changes})


class Gradients(Callback):
    """Keeps the gradient of every step, by the parameter's name."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_step(self, step, metrics):
        self.steps.append({name: p.grad.clone() for name, p in self.model.named_parameters()})


def train(model: PreTrainedModel, folder: Path, cfg: TrainingConfig, **changes: Any) -> FitResult:
    options: dict = {
        "examples": answers(),
        "collate": partial(collate_completions, pad_token_id=0),
        "loss": completion_loss,
        "seed": 3,
    }
    return fit(model=model, cfg=cfg, folder=folder, **{**options, **changes})


def padded_wider(batch_of: Callable[..., dict[str, torch.Tensor]], by: int) -> Callable[..., dict[str, torch.Tensor]]:
    def collate(examples):
        return {name: torch.nn.functional.pad(value, (0, by)) for name, value in batch_of(examples).items()}

    return collate


# ---- the step does not depend on how the batch is cut


def losses_and_gradients(model, folder, cfg, **changes):
    gradients = Gradients(model)
    train(model, folder, cfg, callbacks=[gradients], **changes)
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl")], gradients.steps


@pytest.mark.parametrize(
    "cut",
    [
        {"micro_batch_size": 1},
        {"micro_batch_size": 3},
        {"micro_batch_size": 2, "sorted": True},
        {"padded": 7},
        {"permuted": True},
        {"micro_batch_size": 3, "gradient_checkpointing": True},
    ],
    ids=lambda cut: " ".join(cut),
)
def test_however_the_batch_is_cut_loss_and_gradients_are_the_same(tmp_path, tiny_causal_lm, cut):
    examples = answers(8)
    truth = losses_and_gradients(tiny_causal_lm().double(), tmp_path / "whole", config(), examples=examples)
    model = tiny_causal_lm().double()
    changes: dict = {"examples": examples[::-1] if cut.get("permuted") else examples}
    if cut.get("sorted"):
        changes["length"] = lambda answer: len(answer.ids)
    if cut.get("padded"):
        changes["collate"] = padded_wider(partial(collate_completions, pad_token_id=0), cut["padded"])
    if cut.get("gradient_checkpointing"):
        enable_gradient_checkpointing(model)
    found = losses_and_gradients(
        model, tmp_path / "cut", config(micro_batch_size=cut.get("micro_batch_size")), **changes
    )
    same(found, truth)


def same(found, truth, rtol: float = 1e-8):
    assert found[0] == pytest.approx(truth[0], rel=1e-12)
    for step, expected in zip(found[1], truth[1], strict=True):
        for name, gradient in expected.items():
            torch.testing.assert_close(step[name], gradient, rtol=rtol, atol=1e-5 * rtol, msg=name)


def test_the_gradient_is_that_of_the_mean_over_all_tokens_and_no_mean_of_means(tmp_path, tiny_causal_lm):
    examples = answers(8)
    losses, gradients = losses_and_gradients(
        tiny_causal_lm().double(), tmp_path, config(micro_batch_size=2), examples=examples
    )
    model = tiny_causal_lm().double()
    parts = [completion_loss(model, collate_completions([e], pad_token_id=0)) for e in examples]
    loss = sum(p.total for p in parts) / sum(int(p.weight) for p in parts)
    loss.backward()
    truth = [loss.item()], [{name: p.grad for name, p in model.named_parameters()}]
    same((losses, gradients), truth, rtol=1e-4)  # Llama's norms are float32 in a float64 model, gradients included
    mean_of_means = sum((p.total / p.weight).item() for p in parts) / len(parts)
    assert abs(mean_of_means - loss.item()) > 1e-4  # the mistake would be seen


def test_a_launchers_accumulation_of_gradients_divides_nothing(tmp_path, tiny_causal_lm, monkeypatch):
    """The sums over micro-batches are divided by their weight already."""
    truth = losses_and_gradients(tiny_causal_lm(), tmp_path / "plain", config(micro_batch_size=2))
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert Accelerator().gradient_accumulation_steps == 4
    same(losses_and_gradients(tiny_causal_lm(), tmp_path / "launched", config(micro_batch_size=2)), truth)


TWO_PROCESSES = """
import sys
from pathlib import Path
from safetensors.torch import save_file
from transformers import LlamaForCausalLM
from tlcr.training.callbacks import Callback
from tlcr.training.checkpoint import save_checkpoint
from tlcr.training.distributed import (
    any_process, barrier, on_all_processes, process_count, process_index, sum_over_processes
)
from tlcr.errors import CheckpointError, TrainingDiverged
from tlcr.training.trees import Tree
from tests.training.test_supervised import Gradients, answers, completion_loss, config, mean_loss, partial, train
from tests.training.test_supervised import collate_completions
import pytest
import torch

torch.set_num_threads(1)
folder = Path(sys.argv[1])
cfg = config(micro_batch_size=1, epochs=2, warmup_share=0.0, save_every=1)

def model():
    return LlamaForCausalLM.from_pretrained(folder / "start", dtype="float64").eval()

class StopOnOne(Callback):
    def on_step(self, step, metrics):
        return process_index() == 1 and step == 1

whole, cut = model(), model()
gradients = Gradients(whole)
result = train(whole, folder / "whole", cfg, callbacks=[gradients], examples=answers(9))
assert process_count() == 2 and result.steps == 4
stopped = train(cut, folder / "cut", cfg, callbacks=[StopOnOne()], examples=answers(9))
assert stopped.stopped and stopped.steps == 1, stopped
resumed = train(cut, folder / "cut", cfg, resume=True, examples=answers(9))
assert resumed.steps == 4
for a, b in zip(whole.parameters(), cut.parameters(), strict=True):
    assert torch.equal(a, b), "resuming two processes changed the run"
figures = mean_loss(whole, answers(9), collate=partial(collate_completions, pad_token_id=0), loss=completion_loss,
                    batch_size=4)

assert sum_over_processes(torch.tensor([1.0, process_index()])).tolist() == [2.0, 1.0]
assert any_process(process_index() == 1) and not any_process(False)
for broken in (0, 1):  # a full disk on one process fails the save on both, and neither waits for the other
    def full(*args):
        raise OSError(28, "No space left on device")
    with pytest.MonkeyPatch.context() as patch:
        if process_index() == broken:
            patch.setattr(Tree, "write", full)
        with pytest.raises(CheckpointError, match="cannot write .*step-000001: No space left on device"):
            save_checkpoint(folder / "full", 1, models={}, optimizers={}, schedulers={}, state={}, tensors={},
                            config={}, keep=1)
    barrier()
    assert not list((folder / "full").iterdir())

    def diverge():
        if process_index() == broken:
            raise TrainingDiverged("the KL is nan")
        return process_index()
    with pytest.raises(TrainingDiverged, match="the KL is nan"):  # on both, which then save the state together
        on_all_processes(diverge)
    barrier()  # else the other process may already be writing the next one

if process_index() == 0:
    save_file({f"{i}.{name}": g for i, step in enumerate(gradients.steps) for name, g in step.items()},
              folder / "gradients.safetensors")
    save_file({"loss": torch.tensor(figures["loss"], dtype=torch.float64)}, folder / "mean_loss.safetensors")
"""


@pytest.mark.slow
def test_two_processes_take_the_same_steps_and_resume(tmp_path, tiny_causal_lm):
    """Nine examples in batches of 8: shares of 4 and 4, then of 1 and none."""
    tiny_causal_lm().save_pretrained(tmp_path / "start")
    (tmp_path / "worker.py").write_text(TWO_PROCESSES)
    root = Path(__file__).parents[2]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *launch, str(tmp_path / "worker.py"), str(tmp_path)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]  # the main process alone writes
    files = latest_checkpoint(tmp_path / "whole" / "checkpoints").iterdir()
    assert sum(path.name.startswith("rng-") for path in files) == 4  # a pair for each process

    model = tiny_causal_lm().double()
    losses, gradients = losses_and_gradients(
        model, tmp_path / "alone", config(epochs=2, warmup_share=0.0), examples=answers(9)
    )
    stored = load_file(tmp_path / "gradients.safetensors")
    two = [{name: stored[f"{i}.{name}"] for name in gradients[i]} for i in range(4)]
    same(([row["loss"] for row in rows], two), (losses, gradients))
    alone = mean_loss(
        model, answers(9), collate=partial(collate_completions, pad_token_id=0), loss=completion_loss, batch_size=9
    )
    assert load_file(tmp_path / "mean_loss.safetensors")["loss"].item() == pytest.approx(alone["loss"], rel=1e-8)


# ---- resuming


class Crash(Callback):
    """Ends the run after a step, as a power cut would: nothing is saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, step, metrics):
        if step == self.step:
            raise ZeroDivisionError


class PressCtrlC(Crash):
    def on_step(self, step, metrics):
        if step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


def noisy_loss(model, batch):
    """A loss that draws random numbers, so that a random state which is not restored shows."""
    parts = completion_loss(model, batch)
    return LossParts(parts.total * (0.5 + torch.rand(())), parts.weight, {"tokens": (parts.weight, 1)})


def rows_without_time(folder: Path) -> list[dict]:
    return [
        {name: value for name, value in row.items() if not name.startswith("time")}
        for row in read_metrics(folder / "metrics.jsonl")
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("end", "error", "last_saved"), [(Crash(5), ZeroDivisionError, 4), (PressCtrlC(5), KeyboardInterrupt, 5)]
)
def test_a_stopped_run_resumes_bit_for_bit(tmp_path, tiny_causal_lm, dtype, end, error, last_saved):
    """Nine steps, stopped after the fifth: every parameter and every number equals the uninterrupted run's."""
    cfg = TrainingConfig(epochs=3, batch_size=4, micro_batch_size=3, learning_rate=1e-3, save_every=2)

    def evaluate(model):
        return {
            "drawn": float(torch.rand(())),
            **mean_loss(model, answers(4), collate=collate, loss=loss, batch_size=3),
        }

    collate, loss = partial(collate_completions, pad_token_id=0), completion_loss
    options: dict = {"loss": noisy_loss, "evaluate": evaluate}
    whole, cut = tiny_causal_lm().to(dtype), tiny_causal_lm().to(dtype)
    torch.manual_seed(1)
    truth = train(whole, tmp_path / "whole", cfg, **options)
    torch.manual_seed(1)
    with pytest.raises(error):
        train(cut, tmp_path / "cut", cfg, callbacks=[end], **options)
    assert latest_checkpoint(tmp_path / "cut" / "checkpoints").name == f"step-00000{last_saved}"

    torch.manual_seed(2)  # a new process would stand elsewhere, with another model
    again = tiny_causal_lm(seed=9).to(dtype)
    found = train(again, tmp_path / "cut", cfg, resume=True, **options)
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    rows = rows_without_time(tmp_path / "whole")
    assert rows_without_time(tmp_path / "cut") == rows
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert [row["step"] for row in rows if "eval/loss" in row] == [3, 6, 9]
    assert (found.steps, found.evaluation) == (9, truth.evaluation)
    assert found.metrics.keys() == truth.metrics.keys()


def test_ctrl_c_says_where_the_state_is_and_how_to_go_on(tmp_path, tiny_causal_lm):
    with pytest.raises(
        KeyboardInterrupt, match=r"stopped after step 1; .*step-000001: run the same command with --resume"
    ):
        train(tiny_causal_lm(), tmp_path, config(batch_size=2), callbacks=[PressCtrlC(1)])
    with pytest.raises(KeyboardInterrupt, match="stopped after step 5"):  # the last step counts too
        train(tiny_causal_lm(), tmp_path, config(batch_size=2), callbacks=[PressCtrlC(5)], resume=True)


def test_resuming_from_a_checkpoint_of_the_last_step_does_nothing_more(tmp_path, tiny_causal_lm):
    model = tiny_causal_lm()
    first = train(model, tmp_path, config(save_every=2))
    again = tiny_causal_lm(seed=9)
    second = train(again, tmp_path, config(save_every=2), resume=True)
    assert (second.steps, second.metrics) == (first.steps, first.metrics)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2


def test_a_checkpoint_of_another_run_is_refused(tmp_path, tiny_causal_lm):
    train(tiny_causal_lm(), tmp_path, config(save_every=1))
    with pytest.raises(CheckpointError, match="pass --resume"):
        train(tiny_causal_lm(), tmp_path, config())
    with pytest.raises(CheckpointError, match=r"learning_rate was 0.001 and is 0.5; seed was 3 and is 4\)"):
        train(tiny_causal_lm(), tmp_path, config(learning_rate=0.5), seed=4, resume=True)
    with pytest.raises(CheckpointError, match="examples was 10 and is 9"):
        train(tiny_causal_lm(), tmp_path, config(), examples=answers(9), resume=True)
    train(tiny_causal_lm(), tmp_path, config(micro_batch_size=1, save_every=7), resume=True)  # changes no result


def test_a_training_goes_on_with_the_examples_and_from_the_model_that_it_began_with(tmp_path, tiny_causal_lm):
    """As many others, or another start, would make it another training from there on."""
    started = {"model": "m", "dtype": "float32"}
    train(tiny_causal_lm(), tmp_path, config(save_every=1), origin=started)
    first, *others = answers()
    changed = [replace(first, ids=(*first.ids[:-1], 7)), *others]
    with pytest.raises(CheckpointError, match=r"other data \(data was [0-9a-f]{8}\.\.\. and is [0-9a-f]{8}"):
        train(tiny_causal_lm(), tmp_path, config(), examples=changed, origin=started, resume=True)
    with pytest.raises(CheckpointError, match=r"other origin \(origin\.model was m and is n\): restore them"):
        train(tiny_causal_lm(), tmp_path, config(), origin={**started, "model": "n"}, resume=True)
    with pytest.raises(CheckpointError, match="other data"):
        train(tiny_causal_lm(), tmp_path, config(), examples=changed, resume=True)
    train(tiny_causal_lm(), tmp_path, config(save_every=1), resume=True)  # whoever names no origin is not asked for one
    train(tiny_causal_lm(), tmp_path, config(), origin=started, resume=True)


def test_examples_are_known_by_all_that_is_trained_on_and_by_nothing_else():
    one, other = answers(2)
    pair = EncodedComparison(one, other)
    label = LabelledPair("a", *(LabelledAnswer("rejected", one, (0, 1, 2), (True, True, True)) for _ in range(2)))
    kept = replace(label, revised=replace(label.revised, counted=(True, True, False)))
    unlike: list[list[Any]] = [
        [one, other],
        [other, one],
        [one],
        [replace(one, answer_start=1), other],
        [pair],
        [label],
        [replace(label, revised=replace(label.revised, labels=(0, 1, 1)))],
        [kept],
        [(1, 2), (3,)],
        [(1,), (2, 3)],
        ["ab", "c"],
        ["a", "bc"],
        [{"ids": (1,)}],
        [],
    ]
    assert len({examples_digest(examples) for examples in unlike}) == len(unlike)
    assert examples_digest([pair]) == examples_digest((replace(pair),))
    # the log-probabilities of a reference are of its weights, in the bits of one machine
    referenced = [[ReferencedComparison(pair, -1.0, rejected)] for rejected in (-2.0, -2.5)]
    assert examples_digest(referenced[0]) == examples_digest(referenced[1])


STATE_OF_AN_EARLIER_VERSION = {
    "identity": {
        "settings": {
            "epochs": 3,
            "batch_size": 4,
            "learning_rate": 0.001,
            "weight_decay": 0.1,
            "warmup_share": 0.05,
            "schedule": "cosine",
            "max_grad_norm": 1.0,
        },
        "examples": 10,
        "seed": 3,
    },
    "metrics": {"loss": 7.151407639185588, "grad_norm": 2.1189756393432617, "epoch": 5 / 3},
    "evaluation": {"loss": 5.819731521606445},
    "seconds": 1000.5,
}
"""What version 0.1.0 wrote of a training with the settings below."""


def test_a_checkpoint_of_an_earlier_version_is_resumed(tmp_path, tiny_causal_lm):
    cfg = TrainingConfig(epochs=3, batch_size=4, micro_batch_size=3, learning_rate=1e-3, save_every=2)
    whole = tiny_causal_lm()
    train(whole, tmp_path / "whole", cfg)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_causal_lm(), tmp_path / "cut", cfg, callbacks=[PressCtrlC(5)])
    manifest = tmp_path / "cut" / "checkpoints" / "step-000005" / "checkpoint.json"
    written = json.loads(manifest.read_text())
    assert written["state"].keys() == {*STATE_OF_AN_EARLIER_VERSION, "evaluated"}
    del written["state"]["identity"]["data"]
    assert written["state"]["identity"] == STATE_OF_AN_EARLIER_VERSION["identity"]
    del written["checksum"], written["checksums"]  # which it did not write
    manifest.write_text(json.dumps(written | {"state": STATE_OF_AN_EARLIER_VERSION}))

    again = tiny_causal_lm(seed=9)
    result = train(again, tmp_path / "cut", cfg, resume=True)
    assert result.steps == 9 and result.evaluation == {"loss": 5.819731521606445}
    assert 1000.5 < result.seconds < 1100
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    assert rows_without_time(tmp_path / "cut") == rows_without_time(tmp_path / "whole")


# ---- order, evaluation, callbacks


def test_every_epoch_is_a_new_permutation_that_the_seed_fixes(tmp_path, tiny_causal_lm):
    def order(seed: int) -> list[int]:
        seen: list[int] = []

        def collate(examples):
            seen.extend(e.ids[0] for e in examples)
            return collate_completions(examples, pad_token_id=0)

        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        train(tiny_causal_lm(), folder, config(batch_size=4, epochs=2), collate=collate, seed=seed)
        return seen

    first = order(seed=1)
    ids = sorted(e.ids[0] for e in answers())
    assert sorted(first[:10]) == sorted(first[10:]) == ids
    assert first[:10] != first[10:]
    assert order(seed=1) == first
    assert order(seed=2) != first
    assert sorted(order(seed=2**62)[:10]) == ids  # a time in nanoseconds is no smaller


@pytest.mark.parametrize(("every", "at"), [(0, [3, 6]), (2, [2, 4, 6]), (4, [4, 6])])
def test_evaluation_comes_when_due_and_in_evaluation_mode(tmp_path, tiny_causal_lm, every, at):
    def evaluate(model):
        assert not model.training
        assert not torch.is_grad_enabled()
        return {"figure": 0.5}

    cfg = config(batch_size=4, epochs=2, evaluate_every=every)
    result = train(tiny_causal_lm(), tmp_path, cfg, evaluate=evaluate)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if row.get("eval/figure") == 0.5] == at
    assert result.evaluation == {"figure": 0.5}


def test_callbacks_hear_everything_and_may_end_the_training(tmp_path, tiny_causal_lm):
    class Listener(Callback):
        def __init__(self) -> None:
            self.heard: list[tuple] = []

        def on_step(self, step, metrics):
            self.heard.append(("step", step))

        def on_evaluate(self, step, metrics):
            self.heard.append(("evaluate", step))
            return metrics["figure"] < 1 and step == 2

        def on_save(self, step, path):
            assert path == tmp_path / "checkpoints" / f"step-{step:06d}"
            self.heard.append(("save", step))

        def on_end(self, step, metrics):
            self.heard.append(("end", step))

    listener = Listener()
    cfg = config(batch_size=2, evaluate_every=1, save_every=1)
    result = train(tiny_causal_lm(), tmp_path, cfg, evaluate=lambda model: {"figure": 0.5}, callbacks=[listener])
    first = [("evaluate", 1), ("step", 1), ("save", 1)]
    assert listener.heard == [*first, ("evaluate", 2), ("step", 2), ("save", 2), ("end", 2)]
    assert (result.stopped, result.steps) == (True, 2)


def test_gradients_are_clipped_and_the_rate_follows_the_schedule(tmp_path, tiny_causal_lm):
    gradients_of = {}
    for norm in (1e9, 0.01):
        model = tiny_causal_lm()
        gradients = Gradients(model)
        cfg = config(batch_size=5, max_grad_norm=norm, epochs=2, schedule="linear", warmup_share=0.25)
        train(model, tmp_path / str(norm), cfg, callbacks=[gradients])
        gradients_of[norm] = torch.cat([g.flatten() for g in gradients.steps[0].values()])
    rows = read_metrics(tmp_path / "0.01" / "metrics.jsonl")
    assert rows[0]["grad_norm"] == pytest.approx(gradients_of[1e9].norm().item(), rel=1e-5)
    torch.testing.assert_close(gradients_of[0.01].norm().item(), 0.01, rtol=1e-4, atol=0)
    assert [row["learning_rate"] for row in rows] == pytest.approx([0.5e-3, 1e-3, 1e-3 * 2 / 3, 1e-3 / 3])


# ---- what goes wrong


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_divergence_stops_with_the_state_before_it_saved(tmp_path, tiny_causal_lm, what):
    model = tiny_causal_lm()
    steps, before = [], {}

    def poisoned(model, batch):
        parts = completion_loss(model, batch)
        steps.append(1)
        if len(steps) < 3:
            return parts
        before.update({name: value.clone() for name, value in model.state_dict().items()})
        if what == "loss":
            return LossParts(parts.total * float("nan"), parts.weight)
        return LossParts(parts.total + (parts.total.detach() - parts.total).abs().sqrt(), parts.weight)

    with pytest.raises(TrainingDiverged, match=r"step 3 has .* saved in .*step-000002: lower learning_rate") as caught:
        train(model, tmp_path, config(batch_size=2), loss=poisoned)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    saved = json.loads((tmp_path / "checkpoints" / "step-000002" / "checkpoint.json").read_text())
    assert saved["step"] == 2
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_full_disk_while_saving_ends_the_run_with_the_remedy(tmp_path, tiny_causal_lm, monkeypatch):
    class FillDisk(Callback):
        def on_step(self, step, metrics):
            if step == 2:
                monkeypatch.setattr("tlcr.files.os.fsync", full)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"metrics.jsonl: No space left on device; .*free some space"):
        train(tiny_causal_lm(), tmp_path, config(batch_size=2, save_every=1), callbacks=[FillDisk()])
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]


def test_a_batch_in_which_nothing_counts_changes_no_gradient(tmp_path, tiny_causal_lm):
    def uncounted(model, batch):
        return LossParts(completion_loss(model, batch).total * 0, 0, {"accuracy": (0, 0)})

    train(tiny_causal_lm(), tmp_path, config(), loss=uncounted)
    row = read_metrics(tmp_path / "metrics.jsonl")[0]
    assert (row["loss"], row["grad_norm"]) == (0.0, 0.0)
    assert "accuracy" not in row


def test_no_examples_and_other_kinds_of_parallelism_are_refused(tmp_path, tiny_causal_lm):
    with pytest.raises(DataError, match="there are no examples to train on"):
        train(tiny_causal_lm(), tmp_path, config(), examples=[])
    sharded: Any = SimpleNamespace(distributed_type=DistributedType.FSDP)
    with pytest.raises(ConfigError, match="the accelerator is for FSDP"):
        train(tiny_causal_lm(), tmp_path, config(), accelerator=sharded)
