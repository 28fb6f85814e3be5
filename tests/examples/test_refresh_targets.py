"""What the edits say of good and of bad words, on edits that are counted by hand; and the command's table."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples import refresh_targets
from tlcr.config.loading import load_config
from tlcr.config.schema import RunConfig
from tlcr.data.embedded.language import domain_of, lexicon, prompts
from tlcr.errors import DataError
from tlcr.experiment import pipeline
from tlcr.experiment.run_folder import RunFolder
from tlcr.types import EditPair

PROMPT = prompts(1, 0)[0]


@pytest.fixture(scope="module")
def run() -> RunFolder:
    return RunFolder(RunConfig(), resume=True, path=Path("none"), models=Path("none"))


def words(run: RunFolder, *, good: bool) -> list[str]:
    """Two words of one token each, at either end of what is good in the prompt's domain."""
    domain = domain_of(PROMPT)
    by_value = sorted(lexicon().content.items(), key=lambda item: item[1].values[domain], reverse=good)
    return [word for word, _ in by_value if len(run.tokenizer.tokenize(f" {word}")) == 1][:2]


def edit(rejected: str, revised: str) -> EditPair:
    return EditPair("0", PROMPT, f" {rejected}", f" {revised}")


def test_targets_of_words_by_hand(run: RunFolder) -> None:
    """bad kept -> put kept: the good words are neutral, positive and neutral; the only bad one is negative."""
    (kept, put), (bad, _) = words(run, good=True), words(run, good=False)
    found = refresh_targets.said_by([edit(f"{bad} {kept}", f"{put} {kept}")], run)
    assert found == (1.0, pytest.approx((0.5 + 1.0 + 0.5) / 3), 0.0)


def test_the_more_good_words_a_policy_writes_the_smaller_their_target(run: RunFolder) -> None:
    (kept, put), (bad, _) = words(run, good=True), words(run, good=False)
    few = edit(f"{bad} {kept}", f"{put} {kept}")
    many = edit(f"{kept} {kept} {bad} {kept}", f"{kept} {kept} {put} {kept}")
    untouched = edit(f"{kept} {bad}", f"{kept} {bad}")
    assert refresh_targets.said_by([many], run).good == pytest.approx((6 * 0.5 + 1.0) / 7)
    assert refresh_targets.said_by([many], run).good < refresh_targets.said_by([few], run).good
    assert refresh_targets.said_by([untouched, few], run) == (0.5, pytest.approx(3 / 5), pytest.approx(1 / 3))


def test_answers_without_a_bad_word_are_refused(run: RunFolder) -> None:
    kept, put = words(run, good=True)
    with pytest.raises(DataError, match="no good words, or no bad ones"):
        refresh_targets.said_by([edit(kept, put)], run)


@pytest.mark.slow
def test_the_table_has_the_data_the_sft_model_and_every_policy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {
        "output_dir": str(tmp_path / "run"),
        "data.embedded_pairs": 60,
        "data.max_answer_tokens": 24,
        "rollout.max_new_tokens": 24,
        "sft.epochs": 1,
        "discriminator.epochs": 1,
        "ppo.updates": 1,
        "ppo.batch_size": 8,
        "ppo.minibatch_size": 8,
        "evaluation.prompts": 4,
        "kl_coefs": [0.1, 0.4],
        "seeds": [0, 1],
    }
    pipeline.run(load_config(None, small))
    capsys.readouterr()
    monkeypatch.setattr(refresh_targets, "ANSWERS", 32)
    assert refresh_targets.main([str(tmp_path / "run")]) == 0
    head, _, *rows = capsys.readouterr().out.splitlines()
    names = [line.split("|")[1].strip() for line in rows]
    assert names == ["edits of the data", "SFT model", "continuous, 0.4 coefficient", "continuous, 0.1 coefficient"]
    assert {line.count("|") for line in [head, *rows]} == {7}
    # both seeds share their models, so that two rows are of one of them, without an interval
    assert ["[" in line for line in rows] == [False, False, True, True]
