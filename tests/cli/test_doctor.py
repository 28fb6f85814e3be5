"""What doctor finds, what it advises, and when it blocks."""

from __future__ import annotations

import importlib.util
import io
import re
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig

from tlcr import distribution, ops
from tlcr.cli import doctor
from tlcr.cli import main as cli
from tlcr.cli.doctor import examine, machine, memory_table
from tlcr.config.loading import dump_config, load_config
from tlcr.config.schema import RunConfig
from tlcr.experiment.architecture import Architecture, Machine, build_on_meta, measure_model
from tlcr.experiment.memory import Estimate, Phase, Role, checkpoint_of
from tlcr.experiment.preflight import Finding, settings
from tlcr.training import disk

MIB, GIB = 2**20, 2**30


def shown(cfg: RunConfig, *, named: bool = True) -> tuple[bool, str]:
    text = io.StringIO()
    blocked = examine(cfg, named=named, console=Console(file=text, width=400))
    return blocked, text.getvalue()


def by_subject(cfg: RunConfig) -> dict[str, Finding]:
    return {finding.subject: finding for finding in (*machine(cfg), *settings(cfg))}


@pytest.fixture
def cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.fixture
def real_size(tmp_path: Path) -> str:
    """The config, without weights, of a model of 1.2 billion parameters in few layers, which are quick to simulate."""
    folder = tmp_path / "model"
    LlamaConfig(
        vocab_size=128_000, hidden_size=4096, intermediate_size=16_384, num_hidden_layers=3, tie_word_embeddings=True
    ).save_pretrained(folder)
    return str(folder)


def test_the_defaults_are_fit_to_run(tmp_path: Path) -> None:
    blocked, text = shown(load_config(None, {"output_dir": str(tmp_path / "run")}))
    assert not blocked, text
    assert "Nothing stands in the way of a run." in text
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(dump_config(RunConfig()))
    (tmp_path / "run" / "metrics.jsonl").touch()
    blocked, text = shown(load_config(None, {"output_dir": str(tmp_path / "run")}))
    assert not blocked and "Nothing stands in the way of a run, with --resume." in text
    assert "policy" in text and f"{measure_model(build_on_meta(RunConfig().model)).parameters:,}" in text


def test_it_simulates_the_steps_of_an_installation_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those are the specifications, which read values that fake tensors have not."""
    for op in ops.OPS:
        for device in ("cpu", "cuda"):
            monkeypatch.setitem(op.implementations, ("auto", device), op.implementations["reference", device])
    blocked, text = shown(RunConfig())
    assert not blocked and "Nothing stands in the way of a run." in text


def test_it_names_the_implementation_that_each_op_takes(tmp_path: Path) -> None:
    _, text = shown(load_config(None, {"output_dir": str(tmp_path)}), named=False)
    for status in ops.available():
        assert status.op in text
        assert f"'auto' takes {status.auto} on {status.device}" in text
    assert "Memory of one process" not in text


@pytest.mark.parametrize(
    ("facts", "gpu", "level", "fact", "remedy"),
    [
        (
            {"extension": None, "remark": "there was no torch"},
            False,
            "note",
            "no compiled kernels: there was no to",
            True,
        ),
        ({"extension": "cpu", "problem": "built for torch 2.1"}, True, "warning", "built for torch 2.1", True),
        ({"extension": "cpu", "remark": "no nvcc"}, False, "ok", "avx2 code; no CUDA code: no nvcc", False),
        ({"extension": "cpu", "remark": "no nvcc"}, True, "warning", "avx2 code; no CUDA code: no nvcc", True),
        ({"extension": "cuda", "cuda": "13.0"}, True, "ok", "avx2 code; CUDA 13.0 code for 8.0;9.0", False),
    ],
)
def test_it_says_how_tlcr_was_built(
    facts: dict, gpu: bool, level: str, fact: str, remedy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = {"torch": "2.11.0", "compiler": "gcc 12", "instruction_set": "avx2", "arch_list": "8.0;9.0", "problem": None}
    monkeypatch.setattr(ops, "build_info", lambda: {**info, **facts, "rebuild": "pip install ."})
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    (found,) = doctor._build()
    assert (found.level, found.subject, found.remedy) == (level, "build", "pip install ." if remedy else "")
    assert fact in found.fact


@pytest.mark.slow
def test_too_little_memory_blocks_and_says_what_to_set(
    real_size: str, cpu_only: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_free_memory", lambda: 8 * GIB)
    blocked, text = shown(load_config(None, {"model.path": real_size}))
    assert blocked
    assert "this machine has 8.0 GiB free" in text
    assert "to do: a smaller model, or more memory: with " in text
    for change in ("model.dtype: bfloat16", "model.gradient_checkpointing: true", "lora.rank: 16"):
        assert change in text


@pytest.mark.slow
def test_the_smallest_change_that_fits_is_named(
    real_size: str, cpu_only: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_free_memory", lambda: 60 * GIB)
    _, text = shown(load_config(None, {"model.path": real_size}))
    assert re.search(r"discriminator needs about \d+\.\d GiB; this machine has 60\.0 GiB free", text)
    assert re.search(r"to do: discriminator\.micro_batch_size: \d+ \(then \d+\.\d GiB\)", text)


@pytest.mark.slow
def test_a_gpu_that_a_run_leaves_alone_is_no_memory_of_it(real_size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(doctor, "_free_memory", lambda: 8 * GIB)
    cfg = load_config(None, {"model.path": real_size})
    blocked, text = shown(cfg)
    assert blocked and "this machine has 8.0 GiB free" in text
    assert by_subject(cfg)["GPU"].fact == "left alone: ACCELERATE_USE_CPU keeps a run on the CPU"


def test_parallel_runs_are_counted_together(cpu_only: None, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = load_config(None, {"parallel": 4, "seeds": [0, 1, 2, 3]})
    monkeypatch.setattr(doctor, "_free_memory", lambda: 620 * MIB)
    blocked, text = shown(cfg)
    assert blocked
    assert "ppo (4 at a time) needs" in text
    assert "to do: parallel: 1 (then " in text
    assert not shown(load_config(None, {"seeds": [0, 1, 2, 3]}))[0]


def test_models_of_each_seed_are_counted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """`parallel` trains them side by side too, as many as there are seeds."""
    sft = Estimate("sft", (Role("model", 1, GIB),), (Phase("training", 0),))
    place = doctor._Place(Machine(gpu=False), "this machine", 3 * GIB)

    def fact(**changes: object) -> Finding:
        cfg = load_config(None, {"seeds": [0, 1, 2, 3], "parallel": 3, **changes})
        (found,) = doctor._fits(cfg, Architecture(build_on_meta(cfg.model)), place, [sft])
        return found

    several = fact(models_per_seed=True)
    assert several.fact == "sft (3 at a time) needs about 3.0 GiB; this machine has 3.0 GiB free"
    assert (several.level, several.remedy) == ("blocked", "parallel: 1 (then 1.0 GiB)")
    assert fact(models_per_seed=True, seeds=[0, 1]).fact.startswith("sft (2 at a time) needs about 2.0 GiB;")
    assert fact().fact.startswith("sft needs about 1.0 GiB;")


@pytest.mark.parametrize(
    ("gpus", "changes", "sentence"),
    [
        (8, {"sharding.kind": "full"}, None),
        (None, {"sharding.kind": "full"}, "and there is one process"),
        (1, {"sharding.kind": "full"}, "and there is one process"),
        (3, {}, "on 3 process(es)"),
        (16, {"sharding.kind": "hybrid"}, None),
        (8, {"sharding.kind": "hybrid"}, "hybrid wants 8 processes in equal groups"),
        (2, {"parallel": 2, "seeds": [0, 1]}, "set parallel: 1 to share each policy"),
        (2, {"reward.refresh.every": 5}, "reward.refresh trains the discriminator in one process"),
    ],
)
def test_settings_are_judged_for_the_gpus_that_are_named(
    gpus: int | None, changes: dict[str, object], sentence: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_memory", lambda *_: iter(()))
    monkeypatch.setattr(doctor, "machine", lambda _: iter(()))
    text = io.StringIO()
    cfg = load_config(None, {"output_dir": str(tmp_path / "run"), **changes})
    blocked = examine(cfg, named=True, gpus=gpus, console=Console(file=text, width=400))
    assert blocked == (sentence is not None), text.getvalue()
    assert (sentence or "Nothing stands in the way of a run.") in text.getvalue()


@pytest.mark.parametrize("size", [8_030_261_248, 405_853_388_800])
def test_no_figure_of_the_memory_is_cut_in_eighty_columns(size: int) -> None:
    """What a cut figure loses is its unit. Names are folded where nothing else does."""
    names = ("policy", "value model", "reference", "discriminator", "reward model", "DPO policy")
    roles = tuple(Role(name, size, 4 * size, 4 * size, 8 * size) for name in names)
    found = Estimate("ppo", roles, (Phase("generation", 41 * MIB), Phase("update", 17 * GIB)))
    text = io.StringIO()
    Console(file=text, width=80).print(memory_table([found], RunConfig()))
    printed = text.getvalue()
    assert "…" not in printed and max(map(len, printed.splitlines())) <= 80
    (header,) = (line for line in printed.splitlines() if "weights" in line)
    assert header.split() == ["parameters", "weights", "gradients", "optimiser", "total"]
    figures = [disk.in_words(part) for part in (4 * size, 4 * size, 8 * size, 16 * size)]
    assert len(re.findall(rf" {size:,} +{' +'.join(figures)} *$", printed, re.MULTILINE)) == len(names)
    assert re.search(rf"^ ppo +{disk.in_words(found.total)} *$", printed, re.MULTILINE)
    assert re.search(r"^   generation +\(not added\) +41 MiB *$", printed, re.MULTILINE)


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 64 * GIB),
        ({"memory.max": "max", "memory.current": 9 * GIB}, 64 * GIB),
        ({"memory.max": 10 * GIB, "memory.current": 9 * GIB}, GIB),
        (
            {"memory.max": 10 * GIB, "memory.current": 9 * GIB, "memory.stat": f"anon 1\ninactive_file {6 * GIB}\n"},
            7 * GIB,
        ),
        ({"memory.max": 10 * GIB, "memory.current": 11 * GIB}, 0),
        (
            {
                "memory/memory.limit_in_bytes": 10 * GIB,
                "memory/memory.usage_in_bytes": 9 * GIB,
                "memory/memory.stat": f"inactive_file 1\ntotal_inactive_file {2 * GIB}\n",
            },
            3 * GIB,
        ),
        ({"memory/memory.limit_in_bytes": 2**63 - 4096, "memory/memory.usage_in_bytes": 9 * GIB}, 64 * GIB),
    ],
)
def test_files_that_were_read_are_free_memory_in_a_control_group(
    files: dict[str, object], free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = namedtuple("memory", "available")
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory(64 * GIB))
    (tmp_path / "memory").mkdir()
    for name, content in files.items():
        (tmp_path / name).write_text(f"{content}\n")
    assert doctor._free_memory(tmp_path) == free


def test_a_model_that_cannot_be_read_blocks(tmp_path: Path) -> None:
    blocked, text = shown(load_config(None, {"model.path": str(tmp_path)}))
    assert blocked
    assert "give a folder that transformers can load" in text


def test_a_full_disk_blocks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(GIB, GIB, 2**20))
    blocked, text = shown(load_config(None, {"output_dir": str(tmp_path)}))
    assert blocked
    assert "lower ppo.keep_checkpoints, or name an output_dir on a larger disk" in text


def test_a_folder_that_cannot_be_written_blocks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    found = by_subject(load_config(None, {"output_dir": str(tmp_path / "a" / "b")}))["output_dir"]
    assert (found.level, found.fact) == ("blocked", f"{tmp_path} cannot be written to")


def test_what_a_config_needs_and_is_not_installed_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    cfg = load_config(None, {"tracker": "tensorboard", "model.path": "owner/name", "model.gguf_file": "model.gguf"})
    found = by_subject(cfg)
    assert (found["tensorboard"].level, found["tensorboard"].remedy) == (
        "blocked",
        "pip install tensorboard, or set tracker: none",
    )
    assert (found["gguf"].level, found["gguf"].remedy) == ("blocked", "pip install gguf")
    reviser = {"backend": "local", "model.path": "owner/name", "model.gguf_file": "model.gguf"}
    of_reviser = load_config(None, {f"reviser.{name}": value for name, value in reviser.items()})
    assert by_subject(of_reviser)["gguf"].fact.startswith("reviser.model.gguf_file needs the package gguf")
    assert not {"tensorboard", "wandb", "gguf"} & set(by_subject(RunConfig()))


def test_a_reviser_behind_an_endpoint_wants_its_packages_and_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    def facts(**changes: object) -> list[tuple[str, str]]:
        values = {
            "reviser.backend": "endpoint",
            "reviser.endpoint.model": "m",
            "reviser.endpoint.key_variable": "MY_KEY",
        }
        found = settings(load_config(None, values | changes))
        return [(finding.level, finding.fact) for finding in found if finding.subject == "reviser"]

    for name in ("MY_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    priced = {"reviser.endpoint.prompt_price": 1.0, "reviser.endpoint.answer_price": 1.0}
    assert facts(**priced) == [("blocked", "the environment variable MY_KEY holds no API key")]
    assert facts(**priced, **{"reviser.endpoint.base_url": "http://localhost:1/v1"}) == []
    monkeypatch.setenv("MY_KEY", "k")
    assert facts(**priced) == []
    assert facts() == [("note", "no prices are named, so no cost is shown and none is capped")]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openai" else object())
    assert facts(**priced) == [("blocked", "reviser.backend endpoint needs openai, and that is not installed")]
    assert [finding for finding in settings(RunConfig()) if finding.subject == "reviser"] == []
    servers = load_config(None, {"rollout.engine": "server", "rollout.server": ["http://localhost:1"]})
    (found,) = (finding for finding in settings(servers) if finding.subject == "rollout.engine")
    assert (found.level, found.fact) == ("blocked", "rollout.engine server needs openai, and that is not installed")


def test_a_dependency_out_of_bounds_blocks_and_names_the_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = ["rich>=999", "absent-package>=1", "torch", 'x; extra == "dev"']
    monkeypatch.setattr(distribution, "requires", lambda _: needed)
    found = by_subject(RunConfig())
    assert (found["rich"].level, found["rich"].remedy) == ("blocked", "pip install 'rich>=999'")
    assert "tlcr needs >=999" in found["rich"].fact
    assert found["absent-package"].fact.startswith("not installed")
    assert found["packages"].fact.startswith(f"torch {torch.__version__}")
    assert "x" not in found


def test_a_missing_data_file_blocks_but_a_hub_name_does_not(tmp_path: Path) -> None:
    cfg = load_config(None, {"data.edits": str(tmp_path / "no.jsonl"), "data.preferences": "someone/preferences"})
    found = by_subject(cfg)
    assert found["data.edits"].level == "blocked"
    assert "data.preferences" not in found


def test_more_threads_than_cores_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.get_num_threads", lambda: 10_000)
    found = by_subject(RunConfig())["processor"]
    assert found.level == "warning"
    assert found.remedy.startswith("export OMP_NUM_THREADS=")


def test_bfloat16_without_the_instructions_is_a_warning(monkeypatch: pytest.MonkeyPatch, cpu_only: None) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx2": True, "avx512_bf16": False})
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert by_subject(load_config(None, {"model.dtype": "bfloat16"}))["bfloat16"].level == "warning"
    assert by_subject(RunConfig())["bfloat16"].level == "note"


def test_the_command_ends_with_1_where_something_blocks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--output_dir", str(tmp_path)]) == 0
    assert cli.main(["doctor", "--output_dir", str(tmp_path), "--data.edits", str(tmp_path / "no.jsonl")]) == 1
    assert "must be put right" in capsys.readouterr().out


def test_a_checkpoint_takes_its_bytes_over_the_rate(tmp_path: Path) -> None:
    cfg = load_config(None, {"output_dir": str(tmp_path / "run"), "ppo.save_every": 7, "model.dtype": "bfloat16"})
    architecture = Architecture(build_on_meta(cfg.model))
    # bfloat16 weights, and of AdamW two moments and the rest of the masters: 12 bytes of each parameter
    of_ppo = 12 * (architecture.size.parameters + architecture.size.with_head(1))
    assert checkpoint_of("ppo", cfg, architecture) == of_ppo
    # of a discriminator that learns on the weights alone: its optimiser lives for one refresh
    learning = load_config(None, {"model.dtype": "bfloat16", "reward.refresh.every": 5})
    assert checkpoint_of("ppo", learning, architecture) == of_ppo + 2 * architecture.size.with_head(2)
    text = io.StringIO()
    examine(cfg, named=True, write_rate=2.0**-20, console=Console(file=text, width=400))
    line = next(line for line in text.getvalue().splitlines() if line.startswith("ok    checkpoint"))
    assert f"ppo {of_ppo / 2**10 / 60:.0f} min (" in line and "every 7 steps)" in line
    assert "as --write_rate has it" in line


def test_the_rate_of_a_disk_is_measured_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "write_seconds", lambda folder: 0.5)
    _, text = shown(load_config(None, {"output_dir": str(tmp_path / "run")}))
    assert f"at 128 MiB/s, measured: 64 MiB written to {tmp_path} and synced in 0.50 s, by one process" in text
    monkeypatch.undo()
    assert disk.write_seconds(tmp_path, 2**20) > 0
    assert list(tmp_path.iterdir()) == []
