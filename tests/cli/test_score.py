"""`tlcr score`: what a person sees, what a program reads, and which tokens the numbers stand on."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tlcr.cli import main as cli
from tlcr.cli.score import Answer, coloured, read_answers
from tlcr.config.schema import ModelConfig
from tlcr.errors import DataError
from tlcr.models.inspection import TWO_CLASSES
from tlcr.models.loading import load_sequence_classifier, load_token_classifier
from tlcr.models.saving import save_model

PROMPT, RESPONSE = "The food was", " good and the service was not bad"


@pytest.fixture(scope="module")
def discriminator(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_causal_lm: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    folder = tmp_path_factory.mktemp("discriminator")
    model = load_token_classifier(tiny_causal_lm(), ModelConfig(), id2label=TWO_CLASSES)
    with torch.no_grad():
        model.score.weight.normal_(std=2.0)
    save_model(model, tiny_tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def reward_model(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_causal_lm: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    folder = tmp_path_factory.mktemp("reward_model")
    model = load_sequence_classifier(tiny_causal_lm(), ModelConfig())
    with torch.no_grad():
        model.score.weight.normal_(std=2.0)
    save_model(model, tiny_tokenizer, folder)
    return folder


def expected_rewards(folder: Path, tokenizer: PreTrainedTokenizerFast, prompt: str, response: str) -> list[float]:
    """2p - 1 at each response token and the end of sequence, from the saved model and nothing else of ours."""
    from transformers import AutoModelForTokenClassification

    model = AutoModelForTokenClassification.from_pretrained(folder).eval()
    whole = tokenizer(prompt + response, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    with torch.no_grad():
        positive_L = model(torch.tensor([whole])).logits[0].softmax(-1)[:, 1]
    return (2 * positive_L[start:] - 1).tolist()


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["score", *arguments]) == 0
    return capsys.readouterr().out


def test_json_has_the_reward_of_every_response_token(
    discriminator: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    capsys: pytest.CaptureFixture[str],
    device: torch.device,
) -> None:
    out = run(["--discriminator", str(discriminator), "--prompt", PROMPT, "--response", RESPONSE, "--json"], capsys)
    record = json.loads(out)
    expected = expected_rewards(discriminator, tiny_tokenizer, PROMPT, RESPONSE)
    assert record["rewards"] == pytest.approx(expected, abs=1e-5)
    assert record["score"] == pytest.approx(sum(expected) / len(expected), abs=1e-5)
    assert "".join(record["tokens"][:-1]) == RESPONSE
    assert record["tokens"][-1] == "<eos>"
    assert (record["prompt"], record["response"]) == (PROMPT, RESPONSE)
    assert record["rewards"][:-1] != pytest.approx(expected[1:], abs=1e-5)  # one token late is another answer


def test_a_file_is_scored_in_its_order_whatever_the_batch(
    discriminator: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = [("The food was", " cold"), ("", "A wonderful film with a dull ending"), ("the soup", "")]
    file = tmp_path / "answers.jsonl"
    lines = [json.dumps({"prompt": prompt, "response": response}) for prompt, response in answers]
    file.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    one, three = (
        [
            json.loads(line)
            for line in run(
                ["--discriminator", str(discriminator), str(file), "--json", "--batch-size", size], capsys
            ).splitlines()
        ]
        for size in ("1", "3")
    )
    assert [(record["prompt"], record["response"]) for record in one] == answers
    for alone, together in zip(one, three, strict=True):
        assert together["tokens"] == alone["tokens"]
        assert together["rewards"] == pytest.approx(alone["rewards"], abs=1e-5)


def test_standard_input_is_read_without_a_file(
    reward_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    piped = tmp_path / "piped"
    piped.write_text(json.dumps({"prompt": PROMPT, "response": RESPONSE}))
    with piped.open() as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        record = json.loads(run(["--reward-model", str(reward_model), "--json"], capsys))
    assert set(record) == {"prompt", "response", "score"}


def test_a_reward_model_is_read_at_the_end_of_sequence(
    reward_model: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForSequenceClassification

    file = tmp_path / "answers.jsonl"
    file.write_text(
        "".join(json.dumps({"prompt": PROMPT, "response": text}) + "\n" for text in (RESPONSE, " bad")),
        encoding="utf-8",
    )
    records = [
        json.loads(line)
        for line in run(["--reward-model", str(reward_model), str(file), "--json"], capsys).splitlines()
    ]
    model = AutoModelForSequenceClassification.from_pretrained(reward_model).eval()
    for record in records:
        ids = tiny_tokenizer(record["prompt"] + record["response"], add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            last = model(torch.tensor([[*ids, tiny_tokenizer.eos_token_id]])).logits.item()
            before = model(torch.tensor([ids])).logits.item()
        assert record["score"] == pytest.approx(last, abs=1e-4)
        assert record["score"] != pytest.approx(before, abs=1e-3)


def test_people_see_the_answer_and_its_extremes(discriminator: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = run(["--discriminator", str(discriminator), "--prompt", "[bold]x", "--response", RESPONSE], capsys)
    assert shown.startswith("[bold]x\n" + RESPONSE + "<eos>")
    assert "mean " in shown and "lowest " in shown and "highest " in shown


def test_colours_go_from_orange_over_white_to_blue_and_stay_legible() -> None:
    text = coloured(["bad", " so", "\n", "good"], [-1.0, 0.0, 0.5, 1.0])
    assert text.plain == "bad so\u23ce\ngood"
    assert [str(span.style) for span in text.spans] == [
        "black on rgb(234,150,52)",
        "black on rgb(255,255,255)",
        "black on rgb(167,201,239)",
        "black on rgb(80,146,222)",
    ]
    out = io.StringIO()
    Console(file=out, force_terminal=True, color_system="truecolor", width=80).print(text)
    assert "48;2;234;150;52" in out.getvalue()


def test_messages_go_through_the_chat_template(
    discriminator: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(discriminator)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}Assistant:"
    folder = tmp_path / "templated"
    save_model(load_token_classifier(str(discriminator), ModelConfig(path=str(discriminator))), tokenizer, folder)
    file = tmp_path / "chat.jsonl"
    file.write_text(
        json.dumps({"prompt": [{"role": "Human", "content": "How do I bake bread?"}], "response": " Mix flour."}),
        encoding="utf-8",
    )
    record = json.loads(run(["--discriminator", str(folder), str(file), "--json"], capsys))
    prompt = "Human: How do I bake bread?\nAssistant:"
    assert record["rewards"] == pytest.approx(expected_rewards(folder, tiny_tokenizer, prompt, " Mix flour."), abs=1e-5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"prompt": "a", "response": "b"}\n{"prompt": "a"',
            ":2: not JSON (Expecting ',' delimiter, column 15); wanted",
        ),
        ('{"response": "b", "prompt": ' + "[" * 100000, ":1: not JSON (it has more than 100 levels"),
        ('{"response": "b", "n": ' + "9" * 5000 + "}", ":1: not JSON ("),
        ('{"prompt": "a", "answer": "b"}', ":1: no text under 'response'"),
        ('["a", "b"]', ":1: no text under 'response'"),
        ('{"response": "b", "question": "a"}', ":1: no 'prompt'; wanted {'prompt': ..., 'response': ...}, with ''"),
        ('{"prompt": 3, "response": "b"}', ":1: 'prompt' is neither text nor a list"),
        ('{"prompt": [{"role": "user"}], "response": "b"}', ":1: 'prompt' is neither text nor a list"),
    ],
)
def test_a_bad_record_is_named_by_its_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        list(read_answers(str(file)))
    assert str(caught.value).startswith(f"{file}{message}")


def test_good_records_are_read_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    messages = [{"role": "user", "content": "hi"}]
    file.write_text(
        '{"prompt": "", "response": "b"}\n' + json.dumps({"prompt": messages, "response": "c", "id": 1}) + "\n",
        encoding="utf-8",
    )
    assert list(read_answers(str(file))) == [Answer("", "b"), Answer(messages, "c")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--response", "x"], "name one model to score with"),
        (["--response", "x", "--discriminator", "a", "--reward-model", "b"], "name one model to score with"),
        (["file.jsonl", "--response", "x", "--discriminator", "a"], "both FILE file.jsonl and --response"),
        (["--prompt", "x", "--discriminator", "a"], "--prompt is given without --response"),
        (["absent.jsonl", "--discriminator", "{discriminator}"], "absent.jsonl cannot be read: No such file"),
        (["--response", "x", "--discriminator", "absent-folder"], "absent-folder"),
        (["--response", "x", "--discriminator", "{reward_model}"], "no trained TokenClassification model"),
        (["--response", "x", "--reward-model", "{discriminator}"], "has 2 outputs"),
    ],
)
def test_a_wrong_use_is_one_line(
    arguments: list[str], message: str, discriminator: Path, reward_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [part.format(discriminator=discriminator, reward_model=reward_model) for part in arguments]
    assert cli.main(["score", *filled]) == 2
    shown = capsys.readouterr().err.splitlines()[-1]
    assert shown.startswith("tlcr: error: ") and message in shown


def test_what_stands_before_a_bad_record_is_scored_whatever_the_batch(
    discriminator: Path, reward_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The third has no response, is a conversation for which this tokenizer has no template, or is too long."""
    good = [{"prompt": "a", "response": " b"}, {"prompt": "", "response": " cold"}]
    for bad, message in (
        ({"prompt": "a"}, "no text under 'response'"),
        ({"prompt": [{"role": "user", "content": "a"}], "response": "b"}, "has no chat template"),
        ({"prompt": "a", "response": " good" * 900}, "the answer ' good good"),
    ):
        file = tmp_path / "answers.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in [*good, bad, *good]))
        for model in (["--discriminator", str(discriminator)], ["--reward-model", str(reward_model)]):
            assert cli.main(["score", *model, str(file), "--json"]) == 2
            said = capsys.readouterr()
            assert [json.loads(line)["response"] for line in said.out.splitlines()] == [" b", " cold"]
            assert message in said.err


def test_a_file_without_a_record_is_an_error(
    discriminator: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_text("\n")
    assert cli.main(["score", "--discriminator", str(discriminator), str(file), "--json"]) == 2
    assert f"{file} has no records; wanted one object a line" in capsys.readouterr().err
    with Path(os.devnull).open() as nothing:
        monkeypatch.setattr("sys.stdin", nothing)
        assert cli.main(["score", "--discriminator", str(discriminator)]) == 2
    assert "standard input has no records" in capsys.readouterr().err


def test_nothing_to_score_at_a_terminal_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stdin", terminal)
    assert cli.main(["score", "--discriminator", "x"]) == 2
    assert "nothing to score" in capsys.readouterr().err


def test_an_end_in_the_answer_is_scored_once_and_said(
    discriminator: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "answers.jsonl"
    lines = [json.dumps({"prompt": PROMPT, "response": RESPONSE + end}) + "\n" for end in ("", "<eos>", "<eos>\n")]
    file.write_text("".join(lines), encoding="utf-8")
    plain, *ended = map(
        json.loads, run(["--discriminator", str(discriminator), str(file), "--json"], capsys).splitlines()
    )
    for record in ended:
        assert record["tokens"] == plain["tokens"] and record["tokens"].count("<eos>") == 1
        assert record["rewards"] == pytest.approx(plain["rewards"], abs=1e-6)
    assert "2 of 3 records have a text that ends with an end token" in caplog.text


def test_a_text_longer_than_the_positions_names_the_flags(
    reward_model: Path, discriminator: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for model in (["--reward-model", str(reward_model)], ["--discriminator", str(discriminator)]):
        assert cli.main(["score", *model, "--response", " good" * 900]) == 2
        said = capsys.readouterr().err
        assert "and the model reads at most" in said and "lower --max-prompt-tokens or --max-answer-tokens" in said


def test_a_score_that_is_no_number_is_an_error(
    reward_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = load_sequence_classifier(reward_model, ModelConfig())
    with torch.no_grad():
        model.score.weight.fill_(float("nan"))
    save_model(model, tiny_tokenizer, tmp_path / "nan")
    assert cli.main(["score", "--reward-model", str(tmp_path / "nan"), "--response", RESPONSE, "--json"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "gives the answer ' good and the service was not bad' the score nan" in err


def test_columns_that_are_not_read_are_counted(
    reward_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record = {"prompt": PROMPT, "response": RESPONSE}
    lines = [record, {**record, "system": "Be kind.", "tools": []}, {**record, "system": "Be brief."}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert cli.main(["score", "--reward-model", str(reward_model), str(tmp_path / "a.jsonl"), "--json"]) == 0
    (said,) = [message for message in caplog.messages if "does not read" in message]
    assert said.startswith("2 of 3 records have 'system', which tlcr score does not read")
