"""The answers that people corrected and marked: what is made of them, and the baselines, on records written here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from examples.qa_feedback import baselines, prepare
from tlcr.config.schema import DataConfig, ModelConfig
from tlcr.data.readers import read_edits, read_marked_answers
from tlcr.data.splits import Shares
from tlcr.errors import DataError
from tlcr.experiment.token_evaluation import MarkedRow, mark
from tlcr.models.heads import backbone
from tlcr.models.inspection import TWO_CLASSES
from tlcr.models.loading import load_token_classifier
from tlcr.models.saving import save_model
from tlcr.types import MarkedAnswer

REAL = Path(__file__).parents[3] / "shared" / "data" / "qa_feedback_dev.json"


def raw(question: str, *titles: str, answer: str = "It was bad.", corrected: str = "It was good. ") -> dict[str, Any]:
    start = answer.find("bad")
    errors = (
        [{"error type": "Wrong-Grounding", "explanation": "", "start": start, "end": start + 3}] if start >= 0 else []
    )
    return {
        "question": question,
        "passages": [[title, f"{title}\n\nThe first one.", "Then a second sentence here.", "End."] for title in titles],
        "prediction 1": answer,
        "prediction 2": "Another.",
        "feedback": {"errors": errors, "missing-info": [], "corrected-prediction": corrected},
        "preference": [0, 1],
    }


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- preparation


def test_questions_about_one_article_stay_together_and_the_order_does_not_matter() -> None:
    records = [
        raw("a?", "X"),
        raw("b?", "Y"),
        raw("c?", "X", "Z"),
        raw("d?"),
        raw("e?", "Z"),
        raw("f?"),
        raw("g?", "W"),
    ]
    groups = [{record["question"] for record in group} for group in prepare.articles_in_common(records)]
    assert sorted(map(sorted, groups)) == [["a?", "c?", "e?"], ["b?"], ["d?"], ["f?"], ["g?"]]
    for held_out in (1, 2, 3, 4):
        train, out = prepare.split_questions(records, held_out)
        assert (len(train), len(out)) == (7 - held_out, held_out)
        together = {record["question"] for record in out} & {"a?", "c?", "e?"}
        assert len(together) in (0, 3)
        again = prepare.split_questions(records[::-1], held_out)
        assert [record["question"] for record in again[1]] == [record["question"] for record in out]


def test_what_cannot_be_held_out_is_refused() -> None:
    with pytest.raises(DataError, match="of 2 questions 1 cannot be held out"):
        prepare.split_questions([raw("a?", "X"), raw("b?", "X")], 1)
    with pytest.raises(DataError, match="of 1 questions 1 cannot be held out"):
        prepare.split_questions([raw("a?")], 1)


def test_a_prompt_has_whole_sentences_of_every_passage_and_the_question_last() -> None:
    record = raw("Which?", "X", "Long title")
    assert prepare.prompt_of(record, 0) == "Question: Which?\n\nAnswer:\n"
    # four words a passage: "X" and "The first one." are four; "Long title ..." are five
    assert prepare.prompt_of(record, 8) == "X\n\nThe first one.\n\nQuestion: Which?\n\nAnswer:\n"
    assert prepare.prompt_of(record, 18).startswith("X\n\nThe first one. Then a second sentence here.\n\nLong title")
    assert prepare.prompt_of(raw("Which?"), 50) == "Question: Which?\n\nAnswer:\n"


def test_every_file_holds_what_it_should(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    blank = {f"none {k}?" for k in range(8)}  # nothing remained of these answers
    records = [raw(f"{k}?") for k in range(40)] + [raw(question, corrected=" ") for question in sorted(blank)]
    source = tmp_path / "raw.json"
    source.write_text(json.dumps(records))
    with caplog.at_level("INFO", logger="prepare"):
        prepare.main(["--data", str(source), "--output", str(tmp_path), "--held-out", "10"])
    edits, held_out = lines(tmp_path / "edits.jsonl"), lines(tmp_path / "edits_held_out.jsonl")
    spans, threshold = lines(tmp_path / "spans.jsonl"), lines(tmp_path / "spans_threshold.jsonl")
    assert [record["id"] for record in held_out] == [record["id"] for record in spans] and len(spans) == 10
    left_out = blank - {record["question"] for record in held_out}
    used = {record["question"] for record in edits} | {record["question"] for record in held_out}
    assert left_out and used == {record["question"] for record in records} - left_out
    assert len(edits) + len(held_out) == len(used)
    assert f"{len(left_out)} training questions left out" in caplog.text
    edit = next(record for record in edits if record["rejected"] == "It was bad.")
    assert edit["revised"] == "It was good." and edit["passages"] == []
    marked = next(record for record in spans if record["spans"])
    (span,) = marked["spans"]
    assert marked["response"][span["start"] : span["end"]] == "bad" and span["label"] == "Wrong-Grounding"
    # what is put aside for the threshold is what tlcr puts aside in training
    read = read_edits(DataConfig(edits=str(tmp_path / "edits.jsonl")), tiny_tokenizer)
    put_aside = Shares().split("reward", read, DataConfig().held_out).held_out
    assert [record["id"] for record in threshold] == [pair.id for pair in put_aside]


@pytest.mark.skipif(not REAL.is_file(), reason=f"needs the real data, which lies at {REAL} where it is")
def test_real_answers_can_be_read(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    prepare.main(["--data", str(REAL), "--output", str(tmp_path)])
    edits = read_edits(DataConfig(edits=str(tmp_path / "edits.jsonl")), tiny_tokenizer).records
    spans = read_marked_answers(str(tmp_path / "spans.jsonl"), DataConfig(), tiny_tokenizer).records
    assert (len(edits), len(spans)) == (390, 100)
    assert not {pair.prompt for pair in edits} & {answer.prompt for answer in spans}
    assert {span.label for answer in spans for span in answer.spans} >= {"Irrelevant", "Wrong-Grounding", "Redundant"}


# ---- baselines


@pytest.fixture
def row(tiny_tokenizer: PreTrainedTokenizerFast) -> MarkedRow:
    return mark([MarkedAnswer("one", "Q: ", "The soup was cold!", ())], tiny_tokenizer, DataConfig())[0]


def test_length_features_say_where_a_token_stands(row: MarkedRow) -> None:
    tokens = sum(row.is_counted)
    features = baselines.length_features(row)
    assert len(features) == tokens == len(row.characters) - 1  # all but the end of sequence
    assert features[0] == {"number": 0, "share": 0, "tokens": tokens}
    assert features[-1] == {"number": tokens - 1, "share": (tokens - 1) / tokens, "tokens": tokens}


def test_lexical_features_are_of_the_whole_word_around_a_token(row: MarkedRow) -> None:
    source = baselines.Source("Was the SOUP good?", ["It is cold.", "Soup."])
    features = baselines.lexical_features(row, source)
    by_word = {}
    for token, (start, _) in zip(features, row.characters, strict=False):
        word = next(name.removeprefix("word ") for name in token if name.startswith("word "))
        by_word[word] = (token["in question"], token["in passages"])
        assert word in ("the", "soup", "was", "cold", "!")
        assert row.answer.response.lower().find(word) - 1 <= start < row.answer.response.lower().find(word) + len(word)
    assert by_word == {
        "the": (True, False),
        "soup": (True, True),
        "was": (True, False),
        "cold": (False, True),
        "!": (False, False),
    }


def test_surprise_is_what_the_language_model_says_of_the_token_itself(
    row: MarkedRow, tiny_causal_lm: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny_causal_lm()
    longer = mark(
        [MarkedAnswer("two", "Q: Why? ", "The waiter was rude, and cold.", ())], tiny_tokenizer, DataConfig()
    )[0]
    found = baselines.surprise_features([row, longer], model, tiny_tokenizer.pad_token_id)
    for own, of_row in zip(found, (row, longer), strict=True):
        ids = torch.tensor([of_row.encoded.ids])
        with torch.no_grad():
            logprobs_LV = model(ids).logits[0].log_softmax(-1)
        start = of_row.encoded.answer_start
        expected = [-float(logprobs_LV[k - 1, ids[0, k]]) for k in range(start, ids.shape[1] - 1)]
        assert [token["surprise"] for token in own] == pytest.approx(expected, abs=1e-4)


def test_surprise_refuses_an_answer_whose_first_token_nothing_predicts(
    tiny_causal_lm: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    (bare,) = mark([MarkedAnswer("bare", "", "The soup was cold!", ())], tiny_tokenizer, DataConfig())
    assert bare.encoded.answer_start == 0
    with pytest.raises(DataError, match="answer 'bare' has no prompt"):
        baselines.surprise_features([bare], tiny_causal_lm(), tiny_tokenizer.pad_token_id)


def test_a_probe_sees_the_state_that_has_read_the_token_itself(
    row: MarkedRow, tiny_causal_lm: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny_causal_lm()
    longer = mark([MarkedAnswer("two", "Q: Why? ", "The waiter was rude, and cold.", ())], tiny_tokenizer, DataConfig())
    found = baselines.hidden_states([row, *longer], model, tiny_tokenizer.pad_token_id)
    for own, of_row in zip(found, (row, *longer), strict=True):
        with torch.no_grad():
            states_LH = model(torch.tensor([of_row.encoded.ids]), output_hidden_states=True).hidden_states[-1][0]
        np.testing.assert_allclose(own, states_LH[of_row.encoded.answer_start : -1].numpy(), atol=1e-5)
    scores = baselines.log_odds(baselines.fitted(found, _above(found)), found)
    assert roc_auc_score(_above(found), scores) > 0.9


def test_saliency_is_the_gradient_times_the_embedding_of_the_token_itself(
    row: MarkedRow, tiny_causal_lm: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = load_token_classifier(tiny_causal_lm(), ModelConfig(), id2label=TWO_CLASSES)
    longer = mark([MarkedAnswer("two", "Q: Why? ", "The waiter was rude, and cold.", ())], tiny_tokenizer, DataConfig())
    found = baselines.saliency_features([row, *longer], model, tiny_tokenizer.pad_token_id)
    for own, of_row in zip(found, (row, *longer), strict=True):
        places = baselines.places(of_row)
        embedding_LH = model.get_input_embeddings()(torch.tensor(of_row.encoded.ids)).detach().requires_grad_()
        logits_LC = model(inputs_embeds=embedding_LH[None]).logits[0]
        (logits_LC[places, 1] - logits_LC[places, 0]).mean().backward()
        assert embedding_LH.grad is not None
        expected = (embedding_LH.grad * embedding_LH).sum(-1)[places].tolist()
        assert [token["saliency"] for token in own] == pytest.approx(expected, abs=1e-6)
    assert not model.get_input_embeddings()._forward_hooks


def test_attention_is_what_the_last_token_pays(
    row: MarkedRow, tiny_causal_lm: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = load_token_classifier(tiny_causal_lm(), ModelConfig(), id2label=TWO_CLASSES)
    before = model.config._attn_implementation
    longer = mark([MarkedAnswer("two", "Q: Why? ", "The waiter was rude, and cold.", ())], tiny_tokenizer, DataConfig())
    found = baselines.attention_features([row, *longer], model, tiny_tokenizer.pad_token_id)
    assert model.config._attn_implementation == before
    model.set_attn_implementation("eager")
    for own, of_row in zip(found, (row, *longer), strict=True):
        with torch.no_grad():
            output = backbone(model)(torch.tensor([of_row.encoded.ids]), output_attentions=True, use_cache=False)
        from_last_L = output.attentions[-1][0].mean(0)[-1]
        expected = from_last_L[baselines.places(of_row)].tolist()
        assert [token["attention"] for token in own] == pytest.approx(expected, abs=1e-6)


def _above(states: list[np.ndarray]) -> np.ndarray:
    """Tokens whose first state is above the median: what a linear regression can tell."""
    first_N = np.concatenate(states)[:, 0]
    return first_N > np.median(first_N)


def test_a_regression_learns_what_tells_and_says_it_in_log_odds() -> None:
    """Half of the words "bad" are errors in one answer, all in the others; "good" never is."""
    answers = [[{"word bad": 1.0}, {"word good": 1.0}] for _ in range(10)]
    is_error_N = np.tile([True, False], 10)
    scores = baselines.log_odds(baselines.fitted(answers, is_error_N), [[{"word good": 1.0}], [{"word bad": 1.0}]])
    assert scores[0] < 0 < scores[1]


def write_task(folder: Path, tiny_tokenizer: PreTrainedTokenizerFast, lm: PreTrainedModel) -> str:
    """Answers in which the word "bad" is an error; a discriminator that knows nothing; the config of both."""
    answers = [("It was bad at all.", "It was at all."), ("The soup was bad.", "The soup was good.")]
    records = [
        raw(f"{k}?", "X" if k < 3 else f"Y{k}", answer=answers[k % 2][0], corrected=answers[k % 2][1])
        for k in range(60)
    ]
    (folder / "raw.json").write_text(json.dumps(records))
    prepare.main(["--data", str(folder / "raw.json"), "--output", str(folder / "data"), "--held-out", "20"])
    save_model(lm, tiny_tokenizer, folder / "model")
    discriminator = load_token_classifier(lm, ModelConfig(), id2label=TWO_CLASSES)
    save_model(discriminator, tiny_tokenizer, folder / "discriminator")
    path = folder / "config.yaml"
    path.write_text(
        f"output_dir: {folder / 'run'}\nmodel: {{path: {folder / 'model'}}}\nsft: {{enabled: false}}\n"
        f"data: {{edits: {folder / 'data' / 'edits.jsonl'}}}\ndiscriminator: {{path: {folder / 'discriminator'}}}\n"
    )
    return str(path)


def test_the_sources_are_those_of_every_record(tmp_path: Path) -> None:
    """Also of those to choose thresholds on, which need not be among the edits."""
    for name in ("edits", "spans", "spans_threshold"):
        record = {"id": name, "question": f"{name}?", "passages": [name]}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    sources = baselines.read_sources(tmp_path)
    assert {key: source.question for key, source in sources.items()} == {
        "edits": "edits?",
        "spans": "spans?",
        "spans_threshold": "spans_threshold?",
    }


def test_all_methods_are_judged_on_the_same_tokens(
    tmp_path: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tiny_causal_lm: Callable[..., PreTrainedModel],
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write_task(tmp_path, tiny_tokenizer, tiny_causal_lm())
    baselines.main([config, "--data", str(tmp_path / "data")])
    written = json.loads((tmp_path / "run" / "baselines.json").read_text())
    methods = written["methods"]
    names = ["discriminator", "constant", "length", "lexical", "lexical and length", "surprise", "probe"]
    names += ["saliency", "attention", "corrections"]
    assert list(methods) == names
    assert len({json.dumps(method["counts"]) for method in methods.values()}) == 1
    auc = {name: method["figures"]["auc"]["value"] for name, method in methods.items()}
    assert auc["constant"] == 0.5
    # what is wrong is a word, so that words tell, and the corrections take out just that
    assert auc["lexical"] > 0.95 and auc["corrections"] > 0.95
    assert methods["lexical"]["figures"]["f1_at_threshold"]["value"] > 0.9
    above = written["discriminator_above"]["lexical"]["auc"]
    assert above["value"] == pytest.approx(auc["discriminator"] - auc["lexical"])
    assert "surprise" in capsys.readouterr().out


def test_the_corrections_are_those_of_the_same_answers_in_the_same_order(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, tiny_causal_lm: Callable[..., PreTrainedModel]
) -> None:
    config = write_task(tmp_path, tiny_tokenizer, tiny_causal_lm())
    run = baselines.open_run(baselines.load_config(config), resume=False, whole=False)
    score_N = baselines.corrections(run, tmp_path / "data")
    answers = read_marked_answers(str(tmp_path / "data" / "spans.jsonl"), run.cfg.data, run.tokenizer).records
    tokens = baselines.marked_tokens(mark(answers, run.tokenizer, run.cfg.data))
    assert set(score_N) == {-1, 1}
    assert roc_auc_score(tokens.error_N, score_N) > 0.95
    assert roc_auc_score(tokens.error_N, np.roll(score_N, 1)) < 0.9
