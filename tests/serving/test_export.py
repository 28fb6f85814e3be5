"""``tlcr export --for vllm``: what vLLM cannot serve is refused; what it serves has the same reward at every token."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.hosts.test_client import answering
from tests.serving import recorded
from tlcr.cli import main as cli
from tlcr.config.schema import ModelConfig
from tlcr.errors import ConfigError
from tlcr.hosts.client import RewardClient
from tlcr.hosts.local import LocalScorer
from tlcr.models.inspection import TWO_CLASSES
from tlcr.models.loading import load_token_classifier
from tlcr.models.saving import save_model
from tlcr.serving.export import COMMAND_FILE, export_for_vllm

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


@pytest.mark.parametrize("kind", recorded.recording())
def test_every_token_is_what_a_real_vllm_said(
    kind: str, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """The recorded answers of vLLM, read by the client, beside the discriminator here. A shift by one token fails."""
    found = recorded.recording()[kind]
    recorded.save(kind, tiny_tokenizer, tmp_path)

    def reply(path: str, body: Any, heads: dict[str, str]) -> Any:
        if path == "/v1/models":
            return 200, found["models"], {}
        if path != "/pooling":
            return 404, {"detail": "Not Found"}, {}
        assert body["use_activation"] is False
        rows = [[*item.prompt_ids, *item.response_ids] for item in recorded.items()]
        assert body["input"] == rows
        return 200, found["pooling"], {}

    with answering(reply) as url:
        rewards = RewardClient(url, temperature=recorded.TEMPERATURE).token_rewards(recorded.items())
    local = LocalScorer(tmp_path).token_rewards(recorded.items())
    for one, other in zip(rewards, local, strict=True):
        assert one == pytest.approx(other, abs=2e-5)
        assert len(one) < 2 or one[1:] != pytest.approx(other[:-1], abs=1e-2)


def test_the_folder_is_complete_and_loads(
    discriminator: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (discriminator / "metrics.jsonl").write_text("{}\n", encoding="utf-8")
    output = tmp_path / "for vllm"
    monkeypatch.chdir(tmp_path)
    assert cli.main(["export", str(discriminator), "for vllm", "--for", "vllm"]) == 0
    assert capsys.readouterr().out == f"vllm serve '{output}' --dtype float32 --max-model-len 256\n"
    config = json.loads((output / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForTokenClassification"] and "auto_map" not in config
    assert not (output / "metrics.jsonl").exists()
    item = recorded.items()[1]
    assert LocalScorer(output).token_rewards([item]) == LocalScorer(discriminator).token_rewards([item])
    assert cli.main(["export", str(discriminator), str(output)]) == 2
    assert "is there already, and is not empty" in capsys.readouterr().err


def test_the_empty_folder_that_the_command_stands_in_is_filled(
    discriminator: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replaced by a new one it would be gone for whoever stands in it."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert cli.main(["export", str(discriminator), "."]) == 0
    assert {"config.json", COMMAND_FILE} <= set(os.listdir(".")) and os.listdir(".") == os.listdir(here)
    assert not [name for name in os.listdir(".") if name.startswith(".")]


def test_the_command_serves_the_folder_that_it_lies_in_from_anywhere(
    discriminator: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the folder was written under a relative name, and copied."""
    monkeypatch.chdir(tmp_path)
    export_for_vllm(discriminator, Path("for vllm"))
    copied, elsewhere, programs = tmp_path / "a copy", tmp_path / "elsewhere", tmp_path / "bin"
    shutil.copytree("for vllm", copied)
    elsewhere.mkdir()
    programs.mkdir()
    (programs / "vllm").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n', encoding="utf-8")
    (programs / "vllm").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    monkeypatch.setenv("CDPATH", str(tmp_path))  # of which cd tells where it went
    options = ["--dtype", "float32", "--max-model-len", "256", "--port", "8001"]
    for folder, where in ((tmp_path / "for vllm", tmp_path), (tmp_path / "for vllm", elsewhere), (copied, elsewhere)):
        script = os.path.relpath(folder / COMMAND_FILE, where)
        said = subprocess.run([script, "--port", "8001"], cwd=where, capture_output=True, text=True, check=True).stdout
        assert said.splitlines() == ["serve", str(folder), *options]


def test_a_class_of_ours_is_exported_under_the_name_that_vllm_knows(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers has no OLMo 2 token classifier: the folder's own code is left behind, the weights are the same."""
    from safetensors import safe_open
    from transformers import Olmo2Config, Olmo2ForCausalLM

    config = Olmo2Config(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    model = load_token_classifier(Olmo2ForCausalLM(config), ModelConfig(), id2label=TWO_CLASSES)
    save_model(model, tiny_tokenizer, tmp_path / "own")
    assert (tmp_path / "own" / "modeling_classifier.py").exists()
    export_for_vllm(tmp_path / "own", tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert written["architectures"] == ["Olmo2ForTokenClassification"] and "auto_map" not in written
    assert not list((tmp_path / "out").glob("*.py"))
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as weights:
        assert {"score.weight", "score.bias"} < set(weights.keys())
    assert "compare some before you train" in caplog.text


def test_what_vllm_would_serve_wrongly_is_refused(
    tmp_path: Path,
    discriminator: Path,
    tiny_gpt2: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    for part in discriminator.iterdir():
        (tmp_path / part.name).write_bytes(part.read_bytes())
    whole = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))

    def refused(**changes: Any) -> str:
        (tmp_path / "config.json").write_text(json.dumps({**whole, **changes}), encoding="utf-8")
        with pytest.raises(ConfigError) as caught:
            export_for_vllm(tmp_path, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    assert "the top 1 layers" in (said := refused(tlcr_bidirectional_layers=1)) and "tlcr serve" in said
    assert "has the labels [positive, negative]" in refused(id2label={"0": "positive", "1": "negative"})
    model = load_token_classifier(tiny_gpt2(), ModelConfig(), id2label=TWO_CLASSES)
    save_model(model, tiny_tokenizer, tmp_path / "gpt2")
    with pytest.raises(ConfigError, match="GPT2ForTokenClassification, whose causal model is called GPT2LMHeadModel"):
        export_for_vllm(tmp_path / "gpt2", tmp_path / "out")
    with pytest.raises(ConfigError, match="absent"):
        export_for_vllm(tmp_path / "absent", tmp_path / "out")
