"""A config with one planted fault each: doctor names it, the remedy works to the letter, and a run says the same."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import (
    ByT5Tokenizer,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tlcr.cli import main as cli
from tlcr.cli.parsers import build_parser
from tlcr.config.argument_parser import ArgumentParser
from tlcr.experiment.simulation import Simulator, Step

LABELS = {0: "negative", 1: "positive"}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
PAIRS = [
    {"prompt": f"How was meal {n}?", "chosen": " It was good.", "rejected": " It was not good."} for n in range(12)
]
EDITS = [{"prompt": p["prompt"], "rejected": p["rejected"], "revised": p["chosen"]} for p in PAIRS]
CHATS = [
    {
        "prompt": [{"role": "system", "content": "Be short."}, {"role": "user", "content": f"Meal {n}?"}],
        "chosen": [{"role": "assistant", "content": "Good."}],
        "rejected": [{"role": "assistant", "content": "Not good."}],
    }
    for n in range(12)
]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WITHOUT_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TEMPLATE
)


class Desk:
    """A folder with a model, its data and the config of a run that nothing stands in the way of."""

    def __init__(self, folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch
        self.model = folder / "model"
        shutil.copytree(model, self.model)
        self.good = model
        self.values: dict[str, Any] = {
            "output_dir": str(folder / "run"),
            "model": {"path": str(self.model)},
            "data": {
                "preferences": self.write("pairs.jsonl", PAIRS),
                "edits": self.write("edits.jsonl", EDITS),
                "max_prompt_tokens": 64,
                "max_answer_tokens": 64,
            },
            "rollout": {"max_new_tokens": 64},
        }

    def write(self, name: str, records: list[dict[str, Any]]) -> str:
        path = self.folder / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return str(path)

    def set(self, knob: str, value: object) -> None:
        *sections, name = knob.split(".")
        place = self.values
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value

    def edit_json(self, path: Path, **changes: object) -> None:
        values = {**json.loads(path.read_text(encoding="utf-8")), **changes}
        kept = {name: value for name, value in values.items() if value is not None}
        path.write_text(json.dumps(kept), encoding="utf-8")

    def reward(self, code: str) -> str:
        path = self.folder / "rewards.py"
        path.write_text(code, encoding="utf-8")
        self.set("reward.kind", "callable")
        return str(path)

    def config(self) -> str:
        path = self.folder / "config.yaml"
        path.write_text(yaml.safe_dump(self.values), encoding="utf-8")
        return str(path)


@dataclass(frozen=True)
class Fault:
    """What is planted, what doctor must say of which subject, and the remedy as its words say it."""

    plant: Callable[[Desk], object]
    subject: str
    fact: str
    remedy: str
    mend: Callable[[Desk, str], object]


def classifier(desk: Desk, name: str, cls: type[PreTrainedModel], **changes: object) -> str:
    """A folder with a classifier on the desk's model, and its tokenizer."""
    folder = desk.folder / name
    shutil.copytree(desk.good, folder)
    cls.from_pretrained(desk.good, **changes).save_pretrained(folder)
    return str(folder)


def without(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked: None if asked == name else find_spec(asked))


def pretend_installed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked: object() if asked == name else find_spec(asked))


def plant_small_disk(desk: Desk) -> None:
    usage = namedtuple("usage", "total used free")
    small, whole = desk.folder / "small", shutil.disk_usage
    small.mkdir()
    desk.set("output_dir", str(small / "run"))
    desk.monkeypatch.setattr(shutil, "disk_usage", lambda at: usage(9, 8, 1) if Path(at) == small else whole(at))


def plant_folder_without_rights(desk: Desk) -> None:
    """By what the operating system answers: an administrator may write everywhere."""
    closed, access = desk.folder / "closed", cli.os.access
    closed.mkdir()
    desk.set("output_dir", str(closed / "run"))
    desk.monkeypatch.setattr("os.access", lambda path, mode: Path(path) != closed and access(path, mode))


def plant_end_beyond_the_embeddings(desk: Desk) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(desk.model)
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    tokenizer.save_pretrained(desk.model)


def plant_engine(desk: Desk) -> None:
    """A model whose attention knows no pages, with the tokenizer that is there."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    GPTNeoXForCausalLM(
        GPTNeoXConfig(vocab_size=400, max_position_embeddings=1024, bos_token_id=1, eos_token_id=2, **sizes)
    ).save_pretrained(desk.model)
    desk.set("rollout.engine", "paged")


def run_the_python_of(desk: Desk, remedy: str) -> None:
    """Runs the command of a remedy where it would be typed, and names the folder that it writes."""
    desk.monkeypatch.chdir(desk.folder)
    exec(re.search(r'python -c "(.*)"', remedy)[1], {})  # type: ignore[index]
    desk.set("model.path", re.search(r"and name '(.*)' as the model", remedy)[1])  # type: ignore[index]


def plant_slow_tokenizer(desk: Desk) -> None:
    ByT5Tokenizer().save_pretrained(desk.folder / "slow")
    desk.set("model.tokenizer", str(desk.folder / "slow"))


def plant_reward(code: str, name: str = "reward") -> Callable[[Desk], None]:
    return lambda desk: desk.set("reward.callable", f"{desk.reward(code)}:{name}")


def plant_reward_model(desk: Desk, name: str, outputs: int) -> None:
    desk.set("reward", {"kind": "sequence"})
    desk.set("reward_model.path", classifier(desk, name, LlamaForSequenceClassification, num_labels=outputs))


def plant_discriminator(desk: Desk) -> None:
    desk.set("discriminator.path", classifier(desk, "tokens", LlamaForTokenClassification))


def plant_dpo(desk: Desk) -> None:
    desk.set("reward", {"kind": "dpo"})
    other = desk.folder / "other"
    shutil.copytree(desk.good, other)
    change_tokenizer(other)
    desk.set("dpo.path", str(other))


def change_tokenizer(model: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    tokenizer.eos_token = "<bos>"
    tokenizer.save_pretrained(model)


def plant_value_start(desk: Desk) -> None:
    plant_reward_model(desk, "judge", 1)
    change_tokenizer(desk.folder / "judge")
    desk.set("ppo.value_init", "reward_model")


def plant_refreshed(desk: Desk) -> None:
    desk.set("discriminator.path", classifier(desk, "tokens", LlamaForTokenClassification, id2label=LABELS))
    change_tokenizer(desk.folder / "tokens")
    desk.set("reward", {"kind": "continuous", "refresh": {"every": 5}})
    desk.set("reviser", {"backend": "local", "model": {"path": str(desk.good)}})  # which revises in place of edits
    desk.set("data.edits", None)


def plant_chats(desk: Desk, template: str | None = None) -> None:
    desk.write("pairs.jsonl", CHATS)
    if template is not None:
        desk.set("model.chat_template", template)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


WEIGHTS = "model.safetensors"
FAULTS: dict[str, Fault] = {
    "a data file that is not there": Fault(
        lambda desk: desk.set("data.edits", str(desk.folder / "edit.jsonl")),
        "data.edits",
        "there is no file or folder",
        "check the path",
        lambda desk, _: desk.set("data.edits", str(desk.folder / "edits.jsonl")),
    ),
    "a data file that git-lfs did not fetch": Fault(
        lambda desk: (desk.folder / "pairs.jsonl").write_text(POINTER),
        "data.preferences",
        "is a Git LFS pointer",
        "download the file itself",
        lambda desk, _: desk.write("pairs.jsonl", PAIRS),
    ),
    "an empty data file": Fault(
        lambda desk: desk.write("edits.jsonl", []),
        "data.edits",
        "is empty (0 bytes)",
        "write or download it again",
        lambda desk, _: desk.write("edits.jsonl", EDITS),
    ),
    "edits that are not named": Fault(
        lambda desk: desk.values["data"].pop("edits"),
        "data.edits",
        "data.edits is not set, and the discriminator needs it",
        "name a file",
        lambda desk, _: desk.set("data.edits", str(desk.folder / "edits.jsonl")),
    ),
    "columns that no format has": Fault(
        lambda desk: desk.write("pairs.jsonl", [{"question": "a", "good": "b", "bad": "c"}]),
        "data.preferences",
        "has the columns bad, good, question; wanted are prompt, chosen, rejected",
        "rename the columns",
        lambda desk, _: desk.write("pairs.jsonl", PAIRS),
    ),
    "records of which none can be used": Fault(
        lambda desk: desk.write("edits.jsonl", [{**edit, "revised": 5} for edit in EDITS]),
        "data.edits",
        "none of the 12 records of",
        "mend them",
        lambda desk, _: desk.write("edits.jsonl", EDITS),
    ),
    "one record that cannot be used": Fault(
        lambda desk: desk.write("edits.jsonl", [*EDITS, {**EDITS[0], "revised": 5}]),
        "data.edits",
        "1 of 13 records of",
        "data.on_malformed=skip",
        lambda desk, _: desk.set("data.on_malformed", "skip"),
    ),
    "edits that change nothing": Fault(
        lambda desk: desk.write("edits.jsonl", [{**edit, "revised": edit["rejected"]} for edit in EDITS]),
        "data.edits",
        "has an edited token, so there is nothing to learn",
        "name pairs of a rejected answer and its revision that differ",
        lambda desk, _: desk.set("data.edits", desk.write("others.jsonl", EDITS)),
    ),
    "nothing held out": Fault(
        lambda desk: (desk.set("data.held_out", 0.0), desk.set("discriminator.calibrate", False)),
        "data.held_out",
        "no prompt is held out to evaluate a policy on",
        "set data.held_out above 0, such as 0.1",
        lambda desk, _: desk.set("data.held_out", 0.1),
    ),
    "conversations without a chat template": Fault(
        plant_chats,
        "data.preferences",
        "has no chat template",
        "set model.chat_template",
        lambda desk, _: desk.set("model.chat_template", TEMPLATE),
    ),
    "a chat template that refuses the roles": Fault(
        lambda desk: plant_chats(desk, WITHOUT_SYSTEM),
        "data.preferences",
        "chat template refuses this conversation: System role not supported",
        "mend them",
        lambda desk, _: desk.write("pairs.jsonl", [{**chat, "prompt": chat["prompt"][1:]} for chat in CHATS]),
    ),
    "a chat template that is not there": Fault(
        lambda desk: desk.set("model.chat_template", "template.jinja"),
        "model.chat_template",
        "is neither a Jinja template nor a file that exists",
        "correct the path",
        lambda desk, _: desk.set(
            "model.chat_template", str((desk.folder / "t.jinja", (desk.folder / "t.jinja").write_text(TEMPLATE))[0])
        ),
    ),
    "a model folder that is not there": Fault(
        lambda desk: desk.set("model.path", str(desk.folder / "modle")),
        "model.path",
        "there is no folder",
        "correct the path in model.path",
        lambda desk, _: desk.set("model.path", str(desk.model)),
    ),
    "weights that git-lfs did not fetch": Fault(
        lambda desk: (desk.model / WEIGHTS).write_text(POINTER),
        "model.path",
        "is a Git LFS pointer",
        "download the file",
        lambda desk, _: shutil.copy(desk.good / WEIGHTS, desk.model),
    ),
    "weights that were cut": Fault(
        lambda desk: cut(desk.model / WEIGHTS),
        "model.path",
        "is cut off or damaged",
        "download or copy the file again",
        lambda desk, _: shutil.copy(desk.good / WEIGHTS, desk.model),
    ),
    "an adapter beside the weights": Fault(
        lambda desk: (desk.model / "adapter_config.json").write_text('{"peft_type": "LORA"}'),
        "model.path",
        "has whole weights and an adapter",
        "remove adapter_config.json if the adapter is merged",
        lambda desk, _: (desk.model / "adapter_config.json").unlink(),
    ),
    "a tokenizer without offsets": Fault(
        plant_slow_tokenizer,
        "model.path",
        "is a ByT5Tokenizer, which gives no character offsets",
        "name a fast one (a folder with tokenizer.json) with model.tokenizer",
        lambda desk, _: desk.set("model.tokenizer", str(desk.good)),
    ),
    "a tokenizer without an end of sequence": Fault(
        lambda desk: desk.edit_json(desk.model / "tokenizer_config.json", eos_token=None),
        "model.path",
        "has no end-of-sequence token",
        "set eos_token in its tokenizer_config.json",
        lambda desk, _: desk.edit_json(desk.model / "tokenizer_config.json", eos_token="<eos>"),
    ),
    "a padding token of another model": Fault(
        lambda desk: desk.set("model.pad_token", "<|none|>"),
        "model.path",
        "model.pad_token '<|none|>' is not in the vocabulary",
        "name a token that is, such as '<eos>'",
        lambda desk, _: desk.set("model.pad_token", "<eos>"),
    ),
    "a token without an embedding": Fault(
        plant_end_beyond_the_embeddings,
        "model.path",
        "has tokens that the model",
        "m.resize_token_embeddings(len(t))",
        run_the_python_of,
    ),
    "a GGUF file that is not there": Fault(
        lambda desk: (pretend_installed("gguf", desk.monkeypatch), desk.set("model.gguf_file", "model-q4.gguf")),
        "model.gguf_file",
        "there is no file",
        "correct model.gguf_file, or leave it out",
        lambda desk, _: desk.values["model"].pop("gguf_file"),
    ),
    "answers longer than the positions": Fault(
        lambda desk: desk.set("rollout.max_new_tokens", 2000),
        "rollout.max_new_tokens",
        "and the model reads at most 1024 (max_position_embeddings)",
        "lower data.max_prompt_tokens or rollout.max_new_tokens",
        lambda desk, _: desk.set("rollout.max_new_tokens", 900),
    ),
    "more bidirectional layers than layers": Fault(
        lambda desk: desk.set("discriminator.bidirectional_layers", 5),
        "discriminator.bidirectional_layers",
        "has 2 layers",
        "set it to at most 2",
        lambda desk, _: desk.set("discriminator.bidirectional_layers", 2),
    ),
    "a discriminator with labels of its own": Fault(
        plant_discriminator,
        "discriminator.path",
        "has the labels [LABEL_0, LABEL_1]",
        "rename id2label in its config.json",
        lambda desk, _: desk.edit_json(desk.folder / "tokens" / "config.json", id2label=LABELS),
    ),
    "a reward model with two outputs": Fault(
        lambda desk: plant_reward_model(desk, "two", 2),
        "reward_model.path",
        "has 2 outputs; wanted 1",
        "name one that was trained with one output",
        lambda desk, _: plant_reward_model(desk, "one", 1),
    ),
    "a DPO policy with another tokenizer": Fault(
        plant_dpo,
        "dpo.path",
        "the model in dpo.path has another tokenizer",
        "name one trained from the policy's model",
        lambda desk, _: desk.set("dpo.path", str(desk.model)),
    ),
    "a value model that starts from a reward model with another tokenizer": Fault(
        plant_value_start,
        "reward_model.path",
        "the model in reward_model.path and reads the policy's ids, but that model has another tokenizer",
        "set ppo.value_init: policy",
        lambda desk, _: desk.set("ppo.value_init", "policy"),
    ),
    "a refreshed discriminator with another tokenizer": Fault(
        plant_refreshed,
        "discriminator.path",
        "the discriminator in discriminator.path has another tokenizer",
        "or set reward.refresh.every: 0",
        lambda desk, _: desk.set("reward.refresh.every", 0),
    ),
    "SFT switched off on the embedded model": Fault(
        lambda desk: (desk.values.update(model={}, data={}), desk.set("sft.enabled", False)),
        "sft.enabled",
        "a model of random weights that only SFT trains",
        "set sft.enabled: true",
        lambda desk, _: desk.set("sft.enabled", True),
    ),
    "the embedded model on prompts of the user": Fault(
        lambda desk: desk.values.update(model={}),
        "evaluation.scorer",
        "the scorer of the embedded task does not know the prompts",
        "set evaluation.scorer",
        lambda desk, _: desk.set("evaluation.scorer", "tests.experiment.helpers:count_letters"),
    ),
    "a reward in a module that is not installed": Fault(
        lambda desk: (desk.set("reward.kind", "callable"), desk.set("reward.callable", "my_rewards:reward")),
        "reward.callable",
        "there is no module 'my_rewards'",
        "put its folder on PYTHONPATH",
        lambda desk, _: (
            (desk.folder / "my_rewards.py").write_text("def reward(**given): return [0.0]"),
            desk.monkeypatch.syspath_prepend(desk.folder),
        ),
    ),
    "a reward under another name": Fault(
        plant_reward("def other(**given): ..."),
        "reward.callable",
        "has no function 'reward'",
        "correct the name",
        lambda desk, _: desk.set("reward.callable", f"{desk.folder / 'rewards.py'}:other"),
    ),
    "a reward with other parameters": Fault(
        plant_reward("def reward(prompts, responses): ..."),
        "reward.callable",
        "it is called with the keywords prompts, responses, response_ids, mask, ended",
        "or **unused for those that it ignores",
        lambda desk, _: desk.reward("def reward(prompts, responses, **unused): ..."),
    ),
    "a reward whose module raises": Fault(
        plant_reward("import json\njson.loads('{')"),
        "reward.callable",
        "importing it raises JSONDecodeError",
        "mend that module",
        lambda desk, _: desk.reward("def reward(**given): ..."),
    ),
    "a scorer with other parameters": Fault(
        lambda desk: desk.set("evaluation.scorer", "math:sqrt"),
        "evaluation.scorer",
        "it is called with (prompts, responses)",
        "give it these parameters, in this order",
        lambda desk, _: desk.set("evaluation.scorer", "tests.experiment.helpers:count_letters"),
    ),
    "a tracker that is not installed": Fault(
        lambda desk: (without("wandb", desk.monkeypatch), desk.set("tracker", "wandb")),
        "wandb",
        "tracker: wandb needs it, and it is not installed",
        "set tracker: none",
        lambda desk, _: desk.set("tracker", "none"),
    ),
    "batches that cannot be cut": Fault(
        lambda desk: desk.set("ppo", {"batch_size": 10, "minibatch_size": 4}),
        "ppo.batch_size",
        "ppo.batch_size is 10 and ppo.minibatch_size 4",
        "make the batch a multiple of the minibatch",
        lambda desk, _: desk.set("ppo.batch_size", 12),
    ),
    "an output_dir that is empty": Fault(
        lambda desk: desk.set("output_dir", ""),
        "output_dir",
        "it is empty",
        "name a folder",
        lambda desk, _: desk.set("output_dir", str(desk.folder / "another")),
    ),
    "an output_dir that is a file": Fault(
        lambda desk: desk.set("output_dir", desk.write("taken", [])),
        "output_dir",
        "is a file, not a folder",
        "name another output_dir",
        lambda desk, _: desk.set("output_dir", str(desk.folder / "another")),
    ),
    "an output_dir that cannot be written to": Fault(
        plant_folder_without_rights,
        "output_dir",
        "cannot be written to",
        "name another output_dir",
        lambda desk, _: desk.set("output_dir", str(desk.folder / "another")),
    ),
    "an engine that cannot run the model": Fault(
        plant_engine,
        "rollout.engine",
        "transformers' continuous batching cannot run GPTNeoXForCausalLM (",
        "set rollout.engine: generate",
        lambda desk, _: desk.set("rollout.engine", "generate"),
    ),
    "a disk that is too small": Fault(
        plant_small_disk,
        "disk",
        "(checkpoints of 1 runs at a time, models of 1)",
        "name an output_dir on a larger disk",
        lambda desk, _: desk.set("output_dir", str(desk.folder / "another")),
    ),
}


@pytest.fixture(scope="module")
def good_model(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tiny_causal_lm: Callable[..., PreTrainedModel],
) -> Path:
    path = tmp_path_factory.mktemp("good") / "model"
    tiny_causal_lm(max_position_embeddings=1024).save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def parsers() -> tuple[ArgumentParser, dict[str, ArgumentParser]]:
    """Making them takes half of the time of these tests."""
    return build_parser()


@pytest.fixture(scope="module")
def peak_of_step() -> Callable[[Simulator, Step], int]:
    """Simulates each step of a model once. No fault here is one of memory, and all examine the same few models."""
    simulate, known = Simulator.peak, dict[tuple[object, ...], int]()

    def peak(self: Simulator, step: Step) -> int:
        rest = {name: value for name, value in vars(self).items() if name not in ("_model", "_peaks")}
        key = step, type(self._model), self._model.config.to_json_string(use_diff=False), repr(rest)
        if key not in known:
            known[key] = simulate(self, step)
        return known[key]

    return peak


@pytest.fixture
def desk(
    tmp_path: Path,
    good_model: Path,
    parsers: tuple[ArgumentParser, dict[str, ArgumentParser]],
    peak_of_step: Callable[[Simulator, Step], int],
    monkeypatch: pytest.MonkeyPatch,
) -> Desk:
    monkeypatch.setenv("COLUMNS", "3000")
    monkeypatch.setattr(cli, "build_parser", lambda: parsers)
    monkeypatch.setattr(Simulator, "peak", peak_of_step)
    return Desk(tmp_path, good_model, monkeypatch)


def doctor(desk: Desk, capsys: pytest.CaptureFixture[str]) -> list[tuple[str, str, str]]:
    """Subject, fact and remedy of all that blocks, as the command prints them."""
    code = cli.main(["doctor", desk.config()])
    printed = capsys.readouterr().out
    found = re.findall(r"^blocked +(\S+) +(.*?) *\n(?: +to do: (.*?) *\n)?", printed, re.MULTILINE)
    assert code == bool(found), printed
    return found


def test_nothing_stands_in_the_way_of_the_desk(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(desk, capsys) == []


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_doctor_names_the_fault_and_a_remedy_that_works(
    fault: Fault, desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    fault.plant(desk)
    ((subject, fact, remedy),) = doctor(desk, capsys)
    assert subject == fault.subject
    assert fault.fact in fact
    assert fault.remedy in remedy

    before = sorted(desk.folder.rglob("*"))
    assert cli.main(["run", desk.config()]) == cli.WRONG
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("tlcr: error: ")
    assert fact in said and remedy in said
    assert sorted(desk.folder.rglob("*")) == before

    fault.mend(desk, remedy)
    assert doctor(desk, capsys) == []
