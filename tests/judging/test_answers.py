"""`tlcr answer`: a tiny real model's answers, turn by turn, and what of them a killed run keeps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tlcr.chat import Answer, AnswerStore, NoAnswer, Question
from tlcr.chat import local as local_module
from tlcr.chat.local import LocalModel
from tlcr.chat.types import Deliver
from tlcr.cli import main as cli
from tlcr.config.judging import AnswerConfig
from tlcr.engines import Engine
from tlcr.judging.answers import answer_benchmark, answer_command, temperature_of
from tlcr.judging.formats import Benchmark, BenchmarkQuestion, read_answers

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
TEXTS = ("The food was good", "I would never recommend this place; the waiter was rude", "bad", "A dull film")


@pytest.fixture(autouse=True)
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLCR_PROGRESS", "0")


@pytest.fixture
def folder(tiny_folder: Path) -> Path:
    return tiny_folder


def prompts(folder: Path, turns: int, texts: tuple[str, ...] = TEXTS) -> str:
    path = folder / "question.jsonl"
    rows = [
        {"question_id": 81 + k, "category": ("math", "writing")[k % 2], "turns": [text, "And the film?"][:turns]}
        for k, text in enumerate(texts)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def instructions(folder: Path) -> str:
    path = folder / "prompts.json"
    path.write_text(json.dumps([{"instruction": text, "dataset": "koala"} for text in TEXTS]))
    return str(path)


def answer(model: Path, asked: str, *more: str) -> int:
    settings = ["--prompts", asked, "--output_dir", str(model.parent / "out"), "--max_new_tokens", "8"]
    return cli.main(["answer", str(model), "--model.chat_template", TEMPLATE, *settings, *more])


def greedy(folder: Path, text: str, count: int = 8) -> str:
    """One token after the other, without padding, cache, batches or `generate`."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    start = len(ids)
    for _ in range(count):
        with torch.no_grad():
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        ids.append(token)
    return tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


def test_the_second_turn_sees_the_first_answer_and_batches_do_not_matter(folder: Path) -> None:
    assert answer(folder, prompts(folder.parent, 2), "--temperature", "0", "--batch_size", "3") == 0
    found = read_answers(folder.parent / "out" / "data" / "mt_bench" / "model_answer" / "tiny.jsonl")
    assert found.model_id == "tiny" and list(found.answers) == [81, 82, 83, 84]
    for text, (first, second) in zip(TEXTS, found.answers.values(), strict=True):
        opening = f"user: {text}\nassistant:"
        assert first == greedy(folder, opening)
        later = f"user: {text}\nassistant: {first}\nuser: And the film?\nassistant:"
        assert second == greedy(folder, later)
    assert len(set(found.answers.values())) > 1
    statistics = json.loads((folder.parent / "out" / "data" / "mt_bench" / "statistics" / "tiny.json").read_text())
    assert (statistics["questions"], statistics["answers"], statistics["cut"]) == (4, 8, 8)


def test_alpaca_eval_s_file(folder: Path, caplog) -> None:
    more = ["--temperature", "0", "--model_id", "mine", "--limit", "2"]
    with caplog.at_level("INFO", "tlcr"):
        assert answer(folder, instructions(folder.parent), *more) == 0
    records = json.loads((folder.parent / "out" / "alpaca_eval" / "mine" / "model_outputs.json").read_text())
    assert records == [
        {
            "instruction": text,
            "output": greedy(folder, f"user: {text}\nassistant:"),
            "generator": "mine",
            "dataset": "koala",
        }
        for text in TEXTS[:2]
    ]
    assert "2 answers were cut off at 8 tokens; raise --max_new_tokens" in caplog.text


def test_answers_of_another_model_are_not_replaced(folder: Path, monkeypatch, capsys) -> None:
    """Every policy's folder is called "policy"."""
    policies = [folder.parent / arm / "policy" for arm in ("a", "b")]
    for policy in policies:
        shutil.copytree(folder, policy)
    asked, more = prompts(folder.parent, 2), ["--output_dir", str(folder.parent / "out"), "--limit", "1"]
    written = folder.parent / "out" / "data" / "mt_bench" / "model_answer" / "policy.jsonl"
    assert answer(policies[0], asked, *more) == 0
    kept = written.read_text()
    assert answer(policies[1], asked, *more) == 2
    said = capsys.readouterr().err
    assert f"holds answers of {policies[0]}, and those of {policies[1]} would replace them; name this" in said
    assert written.read_text() == kept
    assert answer(policies[1], asked, *more, "--model_id", "b") == 0
    monkeypatch.chdir(folder.parent)
    assert answer(Path("a", "policy"), asked, *more) == 0  # the same one by another path


def test_the_loss_of_a_kill_is_a_batch(folder: Path, monkeypatch) -> None:
    """The process dies in the third batch, within the second turn; the next one generates what is missing."""
    generated: list[int] = []
    generate = LocalModel._sample

    def dying(self: LocalModel, engine: Engine, asked: Any, question: Question) -> list[Answer]:
        if len(generated) == 3:
            raise SystemExit("killed")
        generated.append(len(asked))
        return generate(self, engine, asked, question)

    asked = prompts(folder.parent, 2)
    settings = ["--temperature", "0", "--batch_size", "2"]
    with monkeypatch.context() as patched:
        patched.setattr(LocalModel, "_sample", dying)
        with pytest.raises(SystemExit):
            answer(folder, asked, *settings)
    assert generated == [2, 2, 2]
    path = folder.parent / "out" / "data" / "mt_bench" / "model_answer" / "tiny.jsonl"
    assert not path.exists()
    rest: list[int] = []
    monkeypatch.setattr(
        LocalModel,
        "_sample",
        lambda self, engine, asked, question: rest.append(len(asked)) or generate(self, engine, asked, question),
    )
    assert answer(folder, asked, *settings) == 0
    assert rest == [2]
    resumed = read_answers(path).answers
    assert answer(folder, asked, *settings, "--output_dir", str(folder.parent / "whole")) == 0
    whole = read_answers(folder.parent / "whole" / "data" / "mt_bench" / "model_answer" / "tiny.jsonl")
    assert whole.answers == resumed


def test_a_model_is_loaded_once_for_all_turns_and_not_for_what_is_known(folder: Path, monkeypatch) -> None:
    loaded: list[Any] = []
    load = local_module.load_causal_lm
    monkeypatch.setattr(local_module, "load_causal_lm", lambda cfg, **to: loaded.append(cfg) or load(cfg, **to))
    for _ in range(2):
        assert answer(folder, prompts(folder.parent, 2)) == 0
    assert len(loaded) == 1


def test_a_policy_trained_anew_in_the_same_folder_answers_anew(folder: Path, tiny_causal_lm) -> None:
    asked = prompts(folder.parent, 1)
    path = folder.parent / "out" / "data" / "vicuna_bench" / "model_answer" / "tiny.jsonl"
    assert answer(folder, asked, "--temperature", "0") == 0
    before = read_answers(path).answers
    tiny_causal_lm(seed=1, max_position_embeddings=1024).save_pretrained(folder)
    assert answer(folder, asked, "--temperature", "0") == 0
    after = read_answers(path).answers
    assert after != before
    assert after[81] == (greedy(folder, f"user: {TEXTS[0]}\nassistant:"),)


def test_seeds_and_nucleus_change_what_is_sampled_and_nothing_else_does(folder: Path) -> None:
    def sampled(*more: str) -> dict[Any, Any]:
        out = folder.parent / "-".join(["sampled", *more])
        assert answer(folder, asked, "--temperature", "2", "--output_dir", str(out), *more) == 0
        return dict(read_answers(out / "data" / "vicuna_bench" / "model_answer" / "tiny.jsonl").answers)

    asked = prompts(folder.parent, 1)
    first = sampled()
    assert sampled("--endpoint.retries", "1") == first
    assert sampled("--seed", "1") != first
    narrow = sampled("--top_p", "0.0001")
    assert narrow == {81 + k: (greedy(folder, f"user: {text}\nassistant:"),) for k, text in enumerate(TEXTS)}


class Recorder:
    """A model that answers 'a', and keeps what it was asked."""

    identity = {"recorder": 1}  # noqa: RUF012
    spent = None

    def __init__(self, answers: dict[str, Answer | NoAnswer] | None = None) -> None:
        self.asked: list[Question] = []
        self._answers = answers or {}

    def answer_all(self, questions: Any, deliver: Deliver) -> None:
        self.asked += questions
        for index, question in enumerate(questions):
            deliver(index, self._answers.get(question.messages[-1].content, Answer(" a\n")))


def benchmark(name: Any, *categories: str) -> Benchmark:
    turns = 2 if name == "mt_bench" else 1
    return Benchmark(name, tuple(BenchmarkQuestion(k, c, (f"q{k}", f"r{k}")[:turns]) for k, c in enumerate(categories)))


def test_each_benchmark_has_its_own_settings_unless_others_are_chosen(tmp_path: Path) -> None:
    """FastChat's temperature_config, also for Vicuna's categories; 0.7 for the others and for AlpacaEval."""
    mt = {
        **{"writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0},
        **{"stem": 0.1, "humanities": 0.1},
    }
    cases = [
        ("mt_bench", mt, 1024),
        ("vicuna", {"fermi": 0.7, "math": 0.0}, 1024),
        ("alpaca_eval", {"math": 0.7}, 2048),
    ]
    for name, temperatures, limit in cases:
        model = Recorder()
        with AnswerStore(tmp_path / f"{name}.sqlite") as store:
            answer_benchmark(benchmark(name, *temperatures), AnswerConfig(), model, store)
        assert [question.temperature for question in model.asked[: len(temperatures)]] == list(temperatures.values())
        assert {(question.max_new_tokens, question.top_p) for question in model.asked} == {(limit, 1.0)}
    question = BenchmarkQuestion(1, "math", ("?",))
    assert temperature_of(question, "mt_bench", 1.3) == temperature_of(question, "alpaca_eval", 1.3) == 1.3
    assert temperature_of(BenchmarkQuestion(1, "stem", ("?",)), "mt_bench", 0.0) == 0.0


def test_a_turn_without_an_answer_ends_its_question_and_is_counted(tmp_path: Path, monkeypatch, caplog) -> None:
    """Question 0 has no room for its first turn; 1 is cut in its second; 2 is refused in its first."""
    model = Recorder(
        {"q0": NoAnswer("too long", final=True), "r1": Answer("half", "length"), "q2": Answer("No.", "refusal", 3, 2)}
    )
    monkeypatch.setattr("tlcr.judging.answers.chat_model", lambda cfg, store: model)
    path = prompts(tmp_path, 2, ("q0", "q1", "q2"))
    Path(path).write_text(Path(path).read_text().replace("And the film?", "r1"))
    cfg = AnswerConfig(prompts=path, output_dir=str(tmp_path / "out")).of("m")
    written = answer_command(cfg)
    assert read_answers(written).answers == {81: ("", ""), 82: ("a", "half"), 83: ("No.", "half")}
    assert [len(question.messages) for question in model.asked] == [1, 1, 1, 3, 3]
    assert [message.content for message in model.asked[3].messages] == ["q1", "a", "r1"]
    found = json.loads((tmp_path / "out" / "data" / "mt_bench" / "statistics" / "m.json").read_text())
    counts = {name: found[name] for name in ("answers", "cut", "empty", "declined", "refused", "tokens_mean")}
    assert counts == {"answers": 6, "cut": 2, "empty": 2, "declined": 2, "refused": 1, "tokens_mean": 2.0}


def test_answers_of_an_endpoint_that_fails_are_asked_for_again(tmp_path: Path, monkeypatch, capsys) -> None:
    pytest.importorskip("openai", reason="the endpoint is an extra")
    from tests.chat.chat_server import ChatServer, completion, serving
    from tests.http_server import Reply
    from tlcr.chat import endpoint as endpoint_module

    monkeypatch.setattr(endpoint_module, "BACKOFF", lambda state: 0.01)
    down = Reply({"error": {"message": "down"}}, 500)

    def behave(request: dict[str, Any]) -> Reply:
        text = request["messages"][-1]["content"]
        return down if text == "bad" and len(server.requests) < 12 else Reply(completion(f"on {text[:3]}"))

    with serving(ChatServer(behave)) as server:
        command = ["answer", "big", "--backend", "endpoint", "--endpoint.base_url", server.address, "--top_p", "0.9"]
        command += ["--prompts", prompts(tmp_path, 1), "--output_dir", str(tmp_path / "out"), "--endpoint.retries", "1"]
        assert cli.main(command) == 2
        assert "1 prompts got no answer" in capsys.readouterr().err
        asked = len(server.requests)
        server.behave = lambda request: Reply(completion(f"on {request['messages'][-1]['content'][:3]}"))
        assert cli.main(command) == 0
        assert len(server.requests) == asked + 1
        assert {request["top_p"] for request in server.requests} == {0.9}
        assert {request["model"] for request in server.requests} == {"big"}
    found = read_answers(tmp_path / "out" / "data" / "vicuna_bench" / "model_answer" / "big.jsonl")
    assert found.answers == {81: ("on The",), 82: ("on I w",), 83: ("on bad",), 84: ("on A d",)}


def test_a_folder_is_named_however_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_folder: Path, capsys
) -> None:
    prompts(tmp_path, 1)
    options = ["--prompts", str(tmp_path / "question.jsonl"), "--output_dir", str(tmp_path / "out")]
    monkeypatch.chdir(tiny_folder)
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    options += ["--model.chat_template", template, "--max_new_tokens", "4"]
    assert cli.main(["answer", ".", *options]) == 0
    assert (tmp_path / "out" / "data" / "vicuna_bench" / "model_answer" / f"{tiny_folder.name}.jsonl").is_file()
    link = tmp_path / "policy"
    link.symlink_to(tiny_folder)
    assert cli.main(["answer", str(link), *options]) == 0  # by its own name, whatever it leads to
    assert (tmp_path / "out" / "data" / "vicuna_bench" / "model_answer" / "policy.jsonl").is_file()
    capsys.readouterr()
    assert cli.main(["answer", "/", *options]) == 2
    assert "'/' gives no name; set --model_id; it names a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "there are no prompts to answer; name the benchmark's file with --prompts"),
        (["--prompts", "absent.jsonl"], "absent.jsonl cannot be read"),
        (["--prompts", "question.jsonl", "--format", "mt_bench"], "has 1 turns; mt_bench has 2"),
        (["--prompts", "question.jsonl", "--model_id", "a/b"], "--model_id is 'a/b'; it names a file"),
        (["--prompts", "question.jsonl", "--model.path", "other"], "two models are named, tiny and other"),
        (["--prompts", "question.jsonl", "--top_p", "0"], "top_p is 0.0; it must be greater than 0"),
    ],
)
def test_a_wrong_command_is_one_line(more: list[str], message: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    prompts(tmp_path, 1)
    assert cli.main(["answer", "tiny", *more]) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1
