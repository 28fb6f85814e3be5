"""`tlcr evaluate-tokens`: which tokens count, by which rewards, and what a person and a program get to see."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.rewards.rollouts import character_tokenizer
from tlcr.cli import main as cli
from tlcr.config.schema import DataConfig, ModelConfig, RewardConfig
from tlcr.data.readers import read_marked_answers
from tlcr.errors import DataError
from tlcr.experiment.token_evaluation import error_scores, mark, marked_tokens
from tlcr.models.inspection import TWO_CLASSES
from tlcr.models.loading import load_sequence_classifier, load_token_classifier
from tlcr.models.saving import save_model
from tlcr.text.tokenization import token_pieces
from tlcr.types import ErrorSpan, MarkedAnswer

PROMPT = "The food was"
RESPONSES = [
    " good and the service was not bad",
    " cold, and I would never recommend this place",
    " dull; the soup was rude at all!",
]
MARKED = ["was not bad", "never recommend", "soup was rude"]


def record(response: str, *wrong: str, prompt: Any = PROMPT, label: str | None = "Wrong") -> dict[str, Any]:
    starts = [response.index(text) for text in wrong]
    spans = [{"start": start, "end": start + len(text)} for start, text in zip(starts, wrong, strict=True)]
    return {
        "prompt": prompt,
        "response": response,
        "spans": [span | ({} if label is None else {"label": label}) for span in spans],
    }


def write(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def answer(response: str, *wrong: str, prompt: str = PROMPT, kinds: tuple[str, ...] = ("Wrong",)) -> MarkedAnswer:
    spans = [
        ErrorSpan(start, start + len(text), kind)
        for text, kind in zip(wrong, kinds * len(wrong), strict=False)
        for start in [response.index(text)]
    ]
    return MarkedAnswer("one", prompt, response, tuple(spans))


# ---- marking


def test_the_marked_tokens_are_those_of_the_words_that_were_marked(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    (row,) = mark([answer(RESPONSES[0], "the service", "bad")], tiny_tokenizer, DataConfig())
    context = row.encoded.ids[: row.encoded.answer_start]
    pieces = token_pieces(tiny_tokenizer, row.encoded.answer_ids, context=context)
    wrong = [piece for piece, kinds in zip(pieces, row.kinds, strict=True) if kinds]
    assert "".join(wrong) == " the service bad"
    assert pieces[-1] == "<eos>" and row.is_counted == (*[True] * (len(pieces) - 1), False)


@pytest.mark.parametrize("shift", [-1, 0, 1])
def test_every_character_counts_where_it_is_a_token(shift: int) -> None:
    """One character further on in the span is one token further on in what counts."""
    tokenizer = character_tokenizer()
    marked = MarkedAnswer("one", "ab:", "cdefgh", (ErrorSpan(2 + shift, 4 + shift, "x"),))
    (row,) = mark([marked], tokenizer, DataConfig())
    assert [k for k, kinds in enumerate(row.kinds) if kinds] == [2 + shift, 3 + shift]


def test_a_longer_prompt_or_a_cut_one_moves_nothing(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    marked = [answer(RESPONSES[0], "service", prompt=prompt) for prompt in ("", PROMPT, PROMPT * 9)]
    kinds = [row.kinds for row in mark(marked, tiny_tokenizer, DataConfig(max_prompt_tokens=4))]
    assert kinds[0] == kinds[1] == kinds[2] and any(kinds[0])


def test_a_token_that_straddles_prompt_and_answer_is_placed_by_its_part_of_the_answer(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    marked = MarkedAnswer("one", "The fo", "od was good", (ErrorSpan(0, 2, "x"),))
    (row,) = mark([marked], tiny_tokenizer, DataConfig())
    assert row.characters[0] == (0, 2) and row.characters[1][0] == 2
    assert [bool(kinds) for kinds in row.kinds[:2]] == [True, False]


def test_an_answer_is_counted_as_far_as_it_is_read(
    tiny_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    whole, cut = (
        mark([answer("Naïve café owners", "café")], tiny_tokenizer, DataConfig(max_answer_tokens=limit))[0]
        for limit in (99, 4)
    )
    assert cut.kinds == whole.kinds[:4] and cut.characters == whole.characters[:4]
    assert "marked answers: 1 of 1 answers are longer than data.max_answer_tokens (4)" in caplog.text


def test_a_tokenizer_that_changes_the_text_leaves_the_marks_where_they_are() -> None:
    (row,) = mark([answer("A Good idea", "Good", prompt="it is: ")], character_tokenizer(lowercase=True), DataConfig())
    assert [k for k, kinds in enumerate(row.kinds) if kinds] == [2, 3, 4, 5]


def test_tokens_of_several_kinds_are_errors_once(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    both = answer(RESPONSES[0], "the service", "service", kinds=("Wrong", "Irrelevant"))
    tokens = marked_tokens(mark([both, answer(RESPONSES[1])], tiny_tokenizer, DataConfig()))
    assert set(tokens.kinds) == {"Wrong", "Irrelevant"}
    assert (tokens.kinds["Wrong"] | tokens.kinds["Irrelevant"]).tolist() == tokens.error_N.tolist()
    assert 0 < tokens.kinds["Irrelevant"].sum() < tokens.kinds["Wrong"].sum() == tokens.error_N.sum()
    assert tokens.answers == 2 and set(tokens.answer_N) == {0, 1}


def test_scores_are_negative_rewards_without_the_end_of_sequence(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = mark([answer(text) for text in RESPONSES[:2]], tiny_tokenizer, DataConfig())
    rewards = [[10.0 * number + k for k in range(len(row.kinds))] for number, row in enumerate(rows)]
    expected = [-value for values in rewards for value in values[:-1]]
    assert error_scores(rows, rewards).tolist() == expected
    assert len(marked_tokens(rows).error_N) == len(expected)


# ---- reading


def test_a_limit_of_what_is_learnt_from_is_none_of_what_is_judged(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    source = write(tmp_path / "a.jsonl", [record(text) for text in RESPONSES[:3]])
    read = read_marked_answers(source, DataConfig(limit=2), tiny_tokenizer).records
    assert [one.response for one in read] == list(RESPONSES[:3])


def test_records_are_read_and_their_kinds_are_named(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    records = [record(RESPONSES[0], "bad"), record(RESPONSES[1], "cold", label=None), record(RESPONSES[2])]
    read = read_marked_answers(write(tmp_path / "a.jsonl", records), DataConfig(), tiny_tokenizer).records
    assert read[0].spans == (ErrorSpan(30, 33, "Wrong"),) and read[0].response[30:33] == "bad"
    assert [span.label for span in read[1].spans] == ["error"] and read[2].spans == ()


def test_a_template_may_write_special_tokens_before_an_answer(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer = deepcopy(tiny_tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|message|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|message|>final{% endif %}"
        "<|message|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
    )
    prompt = [{"role": "user", "content": "How was it?"}]
    source = write(tmp_path / "a.jsonl", [record("It was not bad at all.", "not bad", prompt=prompt)])
    read = read_marked_answers(source, DataConfig(), tokenizer).records
    (row,) = mark(read, tokenizer, DataConfig())
    assert row.answer.response == "<|message|>final<|message|>It was not bad at all."
    wrong = [row.answer.response[slice(*row.characters[k])] for k, kinds in enumerate(row.kinds) if kinds]
    assert "".join(wrong) == " not bad"
    assert row.is_counted[-1] is False


def test_offsets_follow_the_answer_through_a_chat_template(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "{% for m in messages %}<{{ m.role }}> {{ m.content }}{% endfor %}"
    opening = "{% if add_generation_prompt %}<assistant>{% endif %}"
    monkeypatch.setattr(tiny_tokenizer, "chat_template", template + opening)
    prompt = [{"role": "user", "content": "How was it?"}]
    source = write(tmp_path / "a.jsonl", [record("It was bad.", "bad", prompt=prompt)])
    (read,) = read_marked_answers(source, DataConfig(), tiny_tokenizer).records
    assert read.response == " It was bad."
    assert [read.response[span.start : span.end] for span in read.spans] == ["bad"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spans": None}, "field 'spans' is not a list"),
        ({"spans": ["bad"]}, "span 1 is a str"),
        ({"spans": [{"start": 0, "end": 2}, {"start": 3, "end": 3}]}, "span 2 goes from 3 to 3"),
        ({"spans": [{"start": -1, "end": 2}]}, "span 1 goes from -1 to 2"),
        ({"spans": [{"start": 0, "end": 34}]}, "0 <= start < end <= 33"),
        ({"spans": [{"start": 0, "end": 2.0}]}, "whole numbers"),
        ({"spans": [{"start": 0, "end": 2, "label": 3}]}, "the label of span 1 is a int"),
        ({"response": ""}, "field 'response' is empty"),
    ],
)
def test_a_malformed_record_is_named(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, change: dict[str, Any], message: str
) -> None:
    source = write(tmp_path / "a.jsonl", [record(RESPONSES[0], "bad"), record(RESPONSES[0]) | change])
    with pytest.raises(DataError, match=r"record 2 \(line 2\).*" + message):
        read_marked_answers(source, DataConfig(), tiny_tokenizer)


def test_a_file_without_the_columns_is_refused(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    source = write(tmp_path / "a.jsonl", [{"prompt": "a", "response": "b"}])
    with pytest.raises(DataError, match="has the columns prompt, response; wanted are prompt, response, spans"):
        read_marked_answers(source, DataConfig(), tiny_tokenizer)


# ---- the command


@pytest.fixture(scope="module")
def models(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_causal_lm: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_model(tiny_causal_lm(), tiny_tokenizer, folder / "policy")
    save_model(tiny_causal_lm(1), tiny_tokenizer, folder / "dpo")
    discriminator = load_token_classifier(tiny_causal_lm(), ModelConfig(), id2label=TWO_CLASSES)
    reward_model = load_sequence_classifier(tiny_causal_lm(), ModelConfig())
    torch.manual_seed(0)
    with torch.no_grad():
        for model in (discriminator, reward_model):
            model.score.weight.normal_(std=2.0)
    save_model(discriminator, tiny_tokenizer, folder / "discriminator")
    save_model(reward_model, tiny_tokenizer, folder / "reward_model")
    return folder


def config(folder: Path, models: Path, *kinds: str) -> str:
    arms = "".join(f"- {{name: {kind}, reward: {{kind: {kind}}}}}\n" for kind in kinds)
    path = folder / "config.yaml"
    path.write_text(
        f"output_dir: {folder / 'run'}\nmodel: {{path: {models / 'policy'}}}\nsft: {{enabled: false}}\n"
        f"rollout: {{batch_size: 2}}\narms:\n{arms}"
        + "".join(f"{name}: {{path: {models / name}}}\n" for name in ("discriminator", "reward_model", "dpo"))
    )
    return str(path)


@pytest.fixture
def spans(tmp_path: Path) -> str:
    pairs = zip(RESPONSES, MARKED, strict=True)
    return write(tmp_path / "spans.jsonl", [record(response, wrong) for response, wrong in pairs])


def found(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    whole = json.loads((folder / "run" / "token_evaluation.json").read_text())
    lines = (folder / "run" / "token_evaluation.jsonl").read_text(encoding="utf-8").splitlines()
    return whole, [json.loads(line) for line in lines]


def test_the_figures_are_those_of_the_discriminator_s_own_rewards(
    tmp_path: Path,
    models: Path,
    spans: str,
    tiny_tokenizer: PreTrainedTokenizerFast,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From the saved model and the tokenizer's own offsets, by nothing of ours but the rule of half the letters."""
    from transformers import AutoModelForTokenClassification

    assert cli.main(["evaluate-tokens", config(tmp_path, models, "continuous"), "--spans", spans]) == 0
    whole, lines = found(tmp_path)
    model = AutoModelForTokenClassification.from_pretrained(models / "discriminator").eval()
    errors, scores = [], []
    for response, wrong, line in zip(RESPONSES, MARKED, lines, strict=True):
        text = PROMPT + response
        encoded = tiny_tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = torch.tensor([[*encoded["input_ids"], tiny_tokenizer.eos_token_id]])
        with torch.no_grad():
            reward_L = 2 * model(ids).logits[0].softmax(-1)[:, 1] - 1
        answer_start = next(k for k, (_, end) in enumerate(encoded["offset_mapping"]) if end > len(PROMPT))
        torch.testing.assert_close(torch.tensor(line["rewards"]["continuous"]), reward_L[answer_start:])
        first = text.index(wrong)
        for k, (start, end) in enumerate(encoded["offset_mapping"][answer_start:], start=answer_start):
            letters = [i for i in range(start, end) if not text[i].isspace()]
            errors.append(sum(first <= i < first + len(wrong) for i in letters) * 2 >= len(letters))
            scores.append(-float(reward_L[k]))
    figures = whole["rewards"]["continuous"]["figures"]
    assert figures["auc"]["value"] == pytest.approx(roc_auc_score(errors, scores))
    assert figures["share"]["value"] == pytest.approx(np.mean(errors))
    assert "f1_at_threshold" not in figures and whole["threshold_spans"] is None
    printed = capsys.readouterr().out
    assert f"{sum(errors)} of {len(errors)} tokens" in printed and f"{figures['auc']['value']:.3f}" in printed


def test_every_reward_of_tokens_can_be_compared_each_with_a_threshold_of_its_own(
    tmp_path: Path, models: Path, spans: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = ("continuous", "discrete", "attention", "prefix_difference", "uniform", "dpo", "spans", "random")
    others = [record(" bad and rude", "bad"), record(" good, then cold", "cold")]
    arguments = ["--spans", spans, "--threshold-spans", write(tmp_path / "others.jsonl", others), "--show", "1"]
    assert cli.main(["evaluate-tokens", config(tmp_path, models, *kinds), *arguments]) == 0
    whole, lines = found(tmp_path)
    assert set(whole["rewards"]) == set(kinds) == set(lines[0]["rewards"])
    assert len({evaluation["threshold"] for evaluation in whole["rewards"].values()}) > 3
    for line in lines:
        values = {kind: np.array(line["rewards"][kind]) for kind in kinds}
        signs = np.where(np.abs(values["continuous"]) > RewardConfig.band, np.sign(values["continuous"]), 0)
        assert np.array_equal(signs, values["discrete"])
        assert np.allclose(values["uniform"], values["uniform"][0])
        # what the reward model's score is shared out to, in two ways
        assert values["attention"].sum() == pytest.approx(values["uniform"].sum(), abs=1e-5)
        assert all(len(of_kind) == len(line["tokens"]) for of_kind in values.values())
        assert "".join(line["tokens"][:-1]) == line["response"]
    printed = capsys.readouterr().out
    assert printed.count("The food was") == len(kinds)  # one answer of each


def test_arms_that_pay_whole_answers_are_left_out_with_a_note(
    tmp_path: Path, models: Path, spans: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "whole.py").write_text("def score(responses, **_): return [1.0] * len(responses)\n", encoding="utf-8")
    arms = [
        {"name": "tokens", "reward": {"kind": "continuous"}},
        {"name": "whole", "reward": {"kind": "sequence"}},  # whose model is not there: it must not be asked for
        {"name": "end", "reward": {"kind": "sum_at_end"}},
        {"name": "mine", "reward": {"kind": "callable", "callable": f"{tmp_path}/whole.py:score"}},
    ]
    arguments = ["--spans", spans, "--arms", json.dumps(arms), "--reward_model.path", str(tmp_path / "absent")]
    assert cli.main(["evaluate-tokens", config(tmp_path, models, "continuous"), *arguments]) == 0
    assert list(found(tmp_path)[0]["rewards"]) == ["tokens"]
    said = "whole (reward.kind sequence), end (reward.kind sum_at_end), mine (reward.kind callable)"
    assert f"left out, because they pay for whole answers only: {said}" in caplog.text


def test_each_seed_s_own_judges_are_evaluated(tmp_path: Path, models: Path, spans: str) -> None:
    arguments = ["--spans", spans, "--seeds", "[3,4]", "--models_per_seed", "true"]
    assert cli.main(["evaluate-tokens", config(tmp_path, models, "random"), *arguments]) == 0
    assert list(found(tmp_path)[0]["rewards"]) == ["random seed-3", "random seed-4"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--spans is missing"),
        (["--spans", "SPANS", "--threshold-spans", "SPANS"], "3 answers are both in --spans and in --threshold-spans"),
        (["--spans", "nowhere.jsonl"], "there is no file or folder 'nowhere.jsonl'"),
        (
            ["--spans", "SPANS", "--arms", '[{"name": "s", "reward": {"kind": "sequence"}}]'],
            "every arm pays for whole answers",
        ),
        (
            ["--spans", "SPANS", "--discriminator.path", "null"],
            "holds no finished stage; run 'tlcr train discriminator",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_refused_with_what_to_do(
    tmp_path: Path,
    models: Path,
    spans: str,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [spans if argument == "SPANS" else argument for argument in arguments]
    assert cli.main(["evaluate-tokens", config(tmp_path, models, "continuous"), *given]) == 2
    assert message in capsys.readouterr().err
