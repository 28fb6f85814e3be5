"""ms-swift: the real command, whose trainer ends up with an advantage for every token."""

from __future__ import annotations

import dataclasses
import json
import string
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

swift = pytest.importorskip("swift")

import golden  # noqa: E402
import page  # noqa: E402
import torch  # noqa: E402
from served import made_up  # noqa: E402
from swift.arguments import RLHFArguments  # noqa: E402
from swift.pipelines import rlhf_main  # noqa: E402
from swift.rewards.orm import orms  # noqa: E402
from swift.trainers.trainer_factory import TrainerFactory  # noqa: E402

from tlcr.errors import HostError  # noqa: E402
from tlcr.hosts import swift as adaptor  # noqa: E402
from tlcr.hosts.guard import require  # noqa: E402
from tlcr.hosts.remote import URL  # noqa: E402

GOLDEN = golden.load()
LETTERS = string.ascii_letters[:47]
ITEMS = GOLDEN["items"]
FULL = [(group, item) for group, item in zip(GOLDEN["group"], ITEMS, strict=True) if any(item["mask"])]

pytestmark = pytest.mark.usefixtures("address")


def counted(values: list[Any], mask: list[int]) -> list[Any]:
    return [value for value, counts in zip(values, mask, strict=True) if counts]


def frame() -> tuple[torch.Tensor, torch.Tensor]:
    """ms-swift's completion mask and ids of the golden answers: padded right, without the shortest prompt's columns."""
    first = min(len(item["prompt_ids"]) for item in ITEMS)
    ids = golden.padded([item["prompt_ids"] + item["response_ids"] for item in ITEMS])
    masks = golden.padded([[0] * len(item["prompt_ids"]) + item["mask"] for item in ITEMS])
    return torch.tensor(masks)[:, first:].bool(), torch.tensor(ids)[:, first:].long()


def test_every_private_name_is_there() -> None:
    require("ms-swift", "ms-swift", adaptor.TESTED, adaptor.NAMES)


def test_rewards_lie_on_their_tokens() -> None:
    mask_BT, ids_BT = frame()
    values = [torch.tensor(counted(item["rewards"], item["mask"])) for item in ITEMS]
    ids = [counted(item["response_ids"], item["mask"]) for item in ITEMS]
    found = adaptor.lay_out(values, ids, mask_BT, ids_BT)
    torch.testing.assert_close(found, torch.tensor(GOLDEN["hosts"]["swift"]["rewards_BT"]))


@pytest.mark.parametrize("shift", [1, -1])
def test_a_shift_by_one_token_is_caught(shift: int) -> None:
    mask_BT, ids_BT = frame()
    values = [torch.tensor(counted(item["rewards"], item["mask"])) for item in ITEMS]
    ids = [counted(item["response_ids"], item["mask"]) for item in ITEMS]
    with pytest.raises(HostError, match="others in their places"):
        adaptor.lay_out(values, ids, mask_BT.roll(shift, dims=1), ids_BT)


def test_advantages_are_centred_in_the_group() -> None:
    answers = [(f"prompt_{group}", item["rewards"], [bool(one) for one in item["mask"]]) for group, item in FULL]
    found = adaptor.group_advantages(answers, "none")
    rewards, masks = [item["rewards"] for _, item in FULL], [item["mask"] for _, item in FULL]
    expected = golden.centred_to_go(rewards, masks, [group for group, _ in FULL])
    for row, wanted, mask in zip(found, expected, masks, strict=True):
        assert row.tolist() == pytest.approx(counted(wanted[: len(mask)], mask), abs=1e-6)
    with pytest.raises(HostError, match="knows group, batch and none"):
        adaptor.group_advantages(answers, "gdpo")


def test_what_counts_are_the_labels_of_ms_swift() -> None:
    item = adaptor._item([5, 11, 7, 12, 41, 25], [-100, -100, -100, 12, -100, 25])
    assert (list(item.prompt_ids), list(item.response_ids), item.counted) == (
        [5, 11, 7],
        [12, 41, 25],
        [True, False, True],
    )
    with pytest.raises(HostError, match="without a token of its own"):
        adaptor._item([5, 11], [-100, -100])


def test_another_trainer_is_refused() -> None:
    with pytest.raises(HostError, match="another trainer asks"):
        orms["tlcr"]()(["text"], messages=[])


def test_the_plugin_is_registered() -> None:
    assert TrainerFactory.get_trainer_cls(SimpleNamespace(rlhf_type="grpo")) is adaptor.TokenRewardGRPOTrainer


# ---- the real command


def test_the_flags_of_the_page_are_ms_swifts() -> None:
    known = {field.name for field in dataclasses.fields(RLHFArguments)}
    flags = page.flags("swift")
    assert len(flags) > 10 and flags <= known, flags - known


def model_folder(folder: Path) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    special = {"<pad>": 0, "<unk>": 1, "<eos>": 2}  # then a token a letter; transformers makes Qwen's tokenizer of any
    letters = Tokenizer(models.BPE({**special, **{letter: 3 + i for i, letter in enumerate(LETTERS)}}, []))
    letters.pre_tokenizer, letters.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokens = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, **tokens)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=50, num_key_value_heads=2, eos_token_id=2, pad_token_id=0, **sizes)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return str(folder)


def command(folder: Path, *more: str) -> list[str]:
    data, plugin = folder / "data.jsonl", folder / "plugin.py"
    prompts = ["fLh", "jeenVg", "i", "dd"]
    rows = [json.dumps({"messages": [{"role": "user", "content": prompt}]}) for prompt in prompts]
    data.write_text("\n".join(rows) + "\n", encoding="utf-8")
    plugin.write_text("import tlcr.hosts.swift\n", encoding="utf-8")
    flags: dict[str, Any] = {
        "rlhf_type": "grpo",
        "model": model_folder(folder / "model"),
        "model_type": "qwen2",
        "template": "dummy",
        "tuner_type": "full",
        "torch_dtype": "float32",
        "dataset": data,
        "external_plugins": plugin,
        "reward_funcs": "tlcr",
        "reward_weights": 0,
        "use_vllm": False,
        "use_cpu": True,
        "attn_impl": "sdpa",
        "num_generations": 4,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_completion_length": 8,
        "max_length": 32,
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "dataloader_num_workers": 0,
        "scale_rewards": "none",
        "beta": 0,
        "learning_rate": 1e-3,
        "output_dir": folder / "output",
    }
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))] + list(more)


def test_the_command_trains_on_dense_advantages(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    theirs = adaptor.TokenRewardGRPOTrainer._postprocess_batch

    def watch(self: Any, samples: Any, batches: Any) -> None:
        theirs(self, samples, batches)
        seen.append((samples, batches, self.split_by_mini_batches(samples), dict(self._metrics["train"])))

    monkeypatch.setattr(adaptor.TokenRewardGRPOTrainer, "_postprocess_batch", watch)
    monkeypatch.setattr(server, "made_up", True)
    rlhf_main(command(tmp_path))
    assert len(seen) == 2
    for samples, batches, chunks, metrics in seen:
        answers: dict[str, list[list[float]]] = {}
        for sample in samples:
            answers.setdefault(sample.prompt_id, []).append(made_up(sample.response_token_ids))
        assert [len(group) for group in answers.values()] == [4] * len(answers)
        centred = {
            name: golden.centred_to_go(rows, [[1] * len(row) for row in rows], [0] * 4)
            for name, rows in answers.items()
        }
        for chunk, batch in zip(chunks, batches, strict=True):
            found_BT, mask_BT = batch["grpo_batch"].advantages, batch["grpo_batch"].completion_mask.bool()
            for row, sample in enumerate(chunk):
                rewards = made_up(sample.response_token_ids)
                number = answers[sample.prompt_id].index(rewards)
                expected = torch.tensor(centred[sample.prompt_id][number][: len(rewards)])
                torch.testing.assert_close(found_BT[row][mask_BT[row]], expected, atol=1e-5, rtol=1e-5)
        assert metrics["tlcr/reward/masked_paid"][-1] == 0


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--reward_weights", "1"], "give the function tlcr the weight 0"),
        (["--dynamic_sample", "true"], "set it to false"),
    ],
)
def test_settings_that_would_misplace_rewards(tmp_path: Path, more: list[str], says: str) -> None:
    with pytest.raises(HostError, match=says):
        rlhf_main(command(tmp_path, *more))


def test_a_server_that_is_gone_ends_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(URL, "http://127.0.0.1:9")
    with pytest.raises(HostError, match="cannot be reached"):
        rlhf_main(command(tmp_path))


def test_rewards_that_are_none_end_the_command(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "made_up", True)
    monkeypatch.setattr(server, "wrong", "nan")
    with pytest.raises(HostError, match="is nan"):
        rlhf_main(command(tmp_path))


def test_a_plugin_beside_the_adaptor_would_hide_ms_swift() -> None:
    """It puts the plugin's folder first on the path, and ours has a ``swift.py``: hence a file of the user's own."""
    assert Path(adaptor.__file__).name == "swift.py"
    assert str(Path(adaptor.__file__).parent) not in sys.path
