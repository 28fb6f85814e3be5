"""A model run here: chat template, batches, cache; its answers are those of the model alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from tlcr.chat import Answer, AnswerStore, Message, NoAnswer, Question, ask
from tlcr.chat import local as local_module
from tlcr.chat.local import LocalModel
from tlcr.config.loading import load_config
from tlcr.config.schema import EngineConfig, ModelConfig
from tlcr.engines import Engine
from tlcr.errors import ConfigError, DataError
from tlcr.experiment.pipeline import stage

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@pytest.fixture
def folder(tiny_folder: Path) -> Path:
    return tiny_folder


@pytest.fixture(autouse=True)
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLCR_PROGRESS", "0")


def questions(**changes: Any) -> list[Question]:
    texts = ("The food was good", "I would never recommend this place; the waiter was rude", "bad", "A dull film")
    values: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0.0, **changes}
    return [Question((Message("user", text),), **values) for text in texts]


def config(folder: Path) -> ModelConfig:
    return ModelConfig(path=str(folder), chat_template=TEMPLATE)


def answers_of(folder: Path, asked: list[Question], *, batch_size: int = 3, **engine: Any) -> list[Answer | NoAnswer]:
    name = "-".join(map(str, (batch_size, *engine.values())))
    with AnswerStore(folder.parent / f"{name}.sqlite") as store:
        cfg = EngineConfig(batch_size=batch_size, **engine)
        return ask(LocalModel(config(folder), store, cfg), asked, store, label="test")


def greedy(folder: Path, question: Question) -> tuple[list[int], int | None]:
    """One token after the other, without padding, cache or `generate`: ids before the end, and where it ended."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(f"user: {question.messages[0].content}\nassistant:", add_special_tokens=False)["input_ids"]
    prompt = len(ids)
    for count in range(question.max_new_tokens):
        with torch.no_grad():
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            return ids[prompt:], count
        ids.append(token)
    return ids[prompt:], None


def test_a_batch_of_different_lengths_gives_what_the_model_says_to_each_alone(folder: Path, tiny_tokenizer) -> None:
    found = answers_of(folder, questions())
    for question, answer in zip(questions(), found, strict=True):
        ids, end = greedy(folder, question)
        assert isinstance(answer, Answer)
        assert answer.text == tiny_tokenizer.decode(ids, skip_special_tokens=True)
        assert answer.finish == ("length" if end is None else "stop")
        assert answer.answer_tokens == (12 if end is None else end + 1)
        prompt = f"user: {question.messages[0].content}\nassistant:"
        assert answer.prompt_tokens == len(tiny_tokenizer(prompt)["input_ids"])
    assert len({answer.text for answer in found if isinstance(answer, Answer)}) > 1
    assert found == answers_of(folder, questions(), batch_size=1)


def test_an_answer_ends_at_any_end_that_the_model_names(folder: Path, tiny_tokenizer) -> None:
    """A later token that greedy decoding gives becomes one of two ends that the generation config names."""
    (question,) = questions()[:1]
    ids, _ = greedy(folder, question)
    at = next(k for k in range(1, 12) if ids[k] not in ids[:k])
    GenerationConfig(eos_token_id=[tiny_tokenizer.eos_token_id, ids[at]]).save_pretrained(folder)
    (answer,) = answers_of(folder, [question])
    assert answer == Answer(tiny_tokenizer.decode(ids[:at]), "stop", answer.prompt_tokens, at + 1)  # type: ignore[union-attr]


def test_a_model_is_asked_with_all_that_its_generation_prompt_opens(folder: Path, tiny_tokenizer) -> None:
    thinking = TEMPLATE.removesuffix("assistant:") + "{% if add_generation_prompt %}assistant:<think>{% endif %}"
    bare = TEMPLATE.removesuffix("assistant:")
    (question,) = questions()[:1]
    for template, prompt in ((thinking, "assistant:<think>"), (bare, "assistant:")):
        with AnswerStore(folder.parent / f"{len(template)}.sqlite") as store:
            model = LocalModel(ModelConfig(path=str(folder), chat_template=template), store, EngineConfig(batch_size=1))
            (answer,) = ask(model, [question], store, label="test")
        assert isinstance(answer, Answer)
        text = f"user: {question.messages[0].content}\n{prompt}"
        assert answer.prompt_tokens == len(tiny_tokenizer(text)["input_ids"])


@pytest.mark.parametrize("opening", ["<think>\n", ""])
def test_thoughts_that_the_template_opened_and_the_limit_cut_are_marked(folder: Path, opening: str) -> None:
    """Whoever reads the answer could not tell a draft in them from the answer proper."""
    template = (
        TEMPLATE.removesuffix("assistant:") + "{% if add_generation_prompt %}assistant:" + opening + "{% endif %}"
    )
    with AnswerStore(folder.parent / "cache.sqlite") as store:
        model = LocalModel(ModelConfig(path=str(folder), chat_template=template), store, EngineConfig(batch_size=4))
        found = ask(model, questions(), store, label="test")
        assert found == ask(model, questions(), store, label="test")
    cut = [answer for answer in found if isinstance(answer, Answer) and answer.finish == "length"]
    assert cut and all(answer.text.startswith("<think>") == bool(opening) for answer in cut)


def test_a_model_is_held_to_the_choices_and_takes_the_likeliest(folder: Path, tiny_tokenizer) -> None:
    """The choices begin with different tokens, so the likeliest first token decides."""
    from transformers import AutoModelForCausalLM

    choices = ("good", "never", "soup was cold")
    ids = [tiny_tokenizer(choice)["input_ids"] for choice in choices]
    assert len({row[0] for row in ids}) == 3 and len({len(row) for row in ids}) > 1
    model = AutoModelForCausalLM.from_pretrained(folder)
    asked = questions(choices=choices)
    for question, answer in zip(asked, answers_of(folder, asked), strict=True):
        prompt = tiny_tokenizer(f"user: {question.messages[0].content}\nassistant:")["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt])).logits[0, -1]
        best = max(range(3), key=lambda choice: float(logits[ids[choice][0]]))
        assert answer == Answer(choices[best], "stop", len(prompt), len(ids[best]) + 1)
    free = answers_of(folder, questions(), batch_size=2)
    assert [answer.text for answer in free if isinstance(answer, Answer)] != [choices[0]] * 4
    sampled = answers_of(folder, questions(choices=choices, temperature=5.0), batch_size=4)
    assert {answer.text for answer in sampled if isinstance(answer, Answer)} <= set(choices)


def test_what_was_answered_is_not_generated_again(folder: Path, monkeypatch) -> None:
    first = answers_of(folder, questions()[:2])
    loaded: list[ModelConfig] = []
    load = local_module.load_causal_lm
    monkeypatch.setattr(local_module, "load_causal_lm", lambda cfg, **on: loaded.append(cfg) or load(cfg, **on))
    assert answers_of(folder, questions()[:2]) == first
    assert loaded == []
    assert answers_of(folder, questions())[:2] == first
    assert len(loaded) == 1


def test_sampling_is_repeatable_and_differs_from_attempt_to_attempt(folder: Path) -> None:
    state = torch.random.get_rng_state()
    first = answers_of(folder, questions(temperature=1.0), batch_size=2)
    assert torch.equal(torch.random.get_rng_state(), state)
    (folder.parent / "2.sqlite").unlink()
    torch.manual_seed(123)
    assert answers_of(folder, questions(temperature=1.0), batch_size=2) == first
    assert answers_of(folder, questions(temperature=1.0, attempt=1), batch_size=2) != first
    assert answers_of(folder, questions(), batch_size=2) != first


def test_a_question_that_leaves_no_room_for_its_answer_gets_none(folder: Path) -> None:
    long = Question((Message("user", "bad " * 2000),), 12, 0.0)
    refused, answered = answers_of(folder, [long, questions()[0]])
    assert isinstance(refused, NoAnswer) and refused.final and "the model reads 1024" in refused.reason
    assert isinstance(answered, Answer)


def test_a_run_that_is_told_to_stop_keeps_the_batches_that_are_done(folder: Path, monkeypatch) -> None:
    from tlcr.training.interrupt import StopSignals

    asked = iter([False, True])
    monkeypatch.setattr(StopSignals, "received", lambda self: next(asked))
    with pytest.raises(KeyboardInterrupt):
        answers_of(folder, questions())
    with AnswerStore(folder.parent / "3.sqlite") as store:
        model = LocalModel(config(folder), store, EngineConfig(batch_size=3))
        kept = [store.get(question.key(model.identity)) is not None for question in questions()]
    assert sum(kept) == 3


def test_a_model_without_a_chat_template_says_so(folder: Path) -> None:
    with (
        AnswerStore(folder.parent / "a.sqlite") as store,
        pytest.raises(ConfigError, match="has no chat template"),
    ):
        model = LocalModel(ModelConfig(path=str(folder)), store, EngineConfig(batch_size=1))
        ask(model, questions(), store, label="test")


def settings(tmp_path: Path, folder: Path, rejected: list[str]) -> dict[str, Any]:
    records = [
        {"prompt": f"Q{k}: food?", "chosen": " It was warm and on time.", "rejected": text}
        for k, text in enumerate(rejected)
    ]
    source = tmp_path / "pairs.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    return {
        "output_dir": str(tmp_path / "run"),
        "data.preferences": str(source),
        "reviser.backend": "local",
        "reviser.model.path": str(folder),
        "reviser.model.chat_template": TEMPLATE,
        "reviser.max_new_tokens": 8,
        "reviser.batch_size": 2,
    }


def give_room(folder: Path) -> None:
    """The tiny tokenizer makes thousands of tokens of the reviser's request."""
    longer = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 8192}
    (folder / "config.json").write_text(json.dumps(longer))


def test_a_model_that_only_babbles_revises_nothing_and_the_message_says_where_to_look(
    tmp_path: Path, folder: Path
) -> None:
    give_room(folder)
    cfg = load_config(None, settings(tmp_path, folder, [" It was bad.", " It was cold.", " It was late."]))
    with pytest.raises(DataError, match=r"none of the 3 answers is a usable revision.*set_aside\.jsonl"):
        stage(cfg, "revisions")
    aside = (tmp_path / "run" / "revisions" / "set_aside.jsonl").read_text().splitlines()
    found = [json.loads(line)["outcome"] for line in aside]
    assert len(found) == 3 and set(found) <= {"truncated", "unreadable"}


def test_a_local_model_that_revises_well_makes_edits(tmp_path: Path, folder: Path, monkeypatch) -> None:
    """The generation is replaced, nothing else: what the model is shown and how its answer is used."""
    shown: list[str] = []

    def sample(self: LocalModel, engine: Engine, prompts: list[list[int]], question: Question) -> list[Answer]:
        shown.extend(self._tokenizer.decode(ids) for ids in prompts)
        return [Answer("rude\n<|Start Of Modified Response|>\nIt was good, but late.") for _ in prompts]

    monkeypatch.setattr(LocalModel, "_sample", sample)
    give_room(folder)
    stage(load_config(None, settings(tmp_path, folder, [" It was bad, but late."])), "revisions")
    (made,) = (tmp_path / "run" / "revisions" / "revisions.jsonl").read_text().splitlines()
    assert json.loads(made)["revised"] == " It was good, but late."
    (text,) = shown
    assert text.startswith("user: You are a careful copy editor") and text.endswith("nothing else.\nassistant:")
