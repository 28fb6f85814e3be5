"""Where chat templates of many kinds begin and end an answer, by rendering small templates of each kind."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
import warnings
from datetime import datetime
from typing import NamedTuple

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from tests.text.test_tokenization import byte_level
from tlcr.errors import ConfigError, DataError
from tlcr.text import rendering
from tlcr.text.tokenization import (
    encode_answer,
    opening,
    render_answer,
    render_prompt,
    render_prompt_and_answers,
    render_question,
)
from tlcr.text.turns import apply_template, opening_note, turn_end, turn_notes, without_beginning, without_end

ASK = [{"role": "user", "content": "Hi?"}]
EARLIER = [{"role": "user", "content": "Oh?"}, {"role": "assistant", "content": "So."}, *ASK]
THOUGHTS = "<think>\nHm.\n</think>\n\nGood."


def template(answer: str, prompt: str = "", end: str = "") -> str:
    """Users' turns in brackets; what is written for an assistant's message; what for a wanted one; what if none is."""
    return (
        "{% for m in messages %}{% if m.role == 'assistant' %}" + answer + "{% else %}[{{ m.content }}]{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}" + prompt + "{% else %}" + end + "{% endif %}"
    )


CHATML = template("<a>\n{{ m.content }}<eos>\n", "<a>\n")
R1 = template("<a>{{ m.content.split('</think>')[-1] }}<eos>", "<a><think>\n")
SPLIT = "{% set parts = m.content.split('</think>') %}{% set body = parts[-1].lstrip('\n') %}"
THOUGHT = SPLIT + "{% set thought = parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '' %}"
BLOCK = "<a>\n{% if loop.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ body }}<eos>\n"
EMPTY_BLOCK = template(THOUGHT + BLOCK, "<a>\n")
OPENED_BLOCK = template(THOUGHT + BLOCK, "<a>\n<think>\n")
SWITCHED_OFF = template(THOUGHT + BLOCK, "<a>\n<think>\n\n</think>\n\n")
CLOSED = template("<a></think>{{ m.content }}<eos>", "<a><think>")
NO_PROMPT = template("assistant: {{ m.content }}\n")
NO_PROMPT_LINE = template("### Assistant:\n{{ m.content }}\n")
SPACE = template(" {{ m.content | trim }}<eos>")
OTHER_HEADER = template("Assistant: {{ m.content }}\n", "ASSISTANT:")
ENDED = template("<a>{{ m.content }}", "<a>", end="<eos>")
COUNT = "{{ messages | length }}"
LAST_ONLY = "{{ messages[-1].content }}{% if add_generation_prompt %}<a>{% endif %}"


class Case(NamedTuple):
    template: str
    answer: str
    prompt: str
    """After "[Hi?]"."""
    rendered: str
    closing: str | None
    """None where the template does not write this conversation."""
    note: str | None = None


CASES = {
    "usual": Case(CHATML, "Good.", "<a>\n", "Good.", "<eos>\n"),
    "usual, white space kept": Case(CHATML, "  Good.\n", "<a>\n", "  Good.\n", "<eos>\n"),
    "opens thoughts that it leaves out": Case(
        R1, "Good.", "<a>", "Good.", "<eos>", r"ends the prompt with '<think>\\n'"
    ),
    "opens thoughts, answer has them": Case(R1, THOUGHTS, "<a>", THOUGHTS, None, "prompts do without it"),
    "opens thoughts, answer closes them": Case(
        R1, THOUGHTS.removeprefix("<think>\n"), "<a>", THOUGHTS, None, "an answer may begin with it"
    ),
    "writes a block of thoughts": Case(EMPTY_BLOCK, "Good.", "<a>\n", "<think>\n\n</think>\n\nGood.", "<eos>\n"),
    "writes the answer's thoughts": Case(EMPTY_BLOCK, THOUGHTS, "<a>\n", THOUGHTS, "<eos>\n"),
    "opens the block that it writes": Case(OPENED_BLOCK, "Good.", "<a>\n<think>\n", "\n</think>\n\nGood.", "<eos>\n"),
    "opens the answer's thoughts": Case(OPENED_BLOCK, THOUGHTS, "<a>\n<think>\n", "Hm.\n</think>\n\nGood.", "<eos>\n"),
    "has closed the block": Case(SWITCHED_OFF, "Good.", "<a>\n<think>\n\n</think>\n\n", "Good.", "<eos>\n"),
    "opens what it then closes": Case(
        CLOSED, "Good.", "<a>", "</think>Good.", "<eos>", "ends the prompt with '<think>'"
    ),
    "no generation prompt": Case(
        NO_PROMPT, "Good.", "assistant:", " Good.", "\n", "has no generation prompt: prompts get"
    ),
    "no generation prompt, own line": Case(
        NO_PROMPT_LINE, "Good.", "### Assistant:\n", "Good.", "\n", r"prompts get '### Assistant:\\n'"
    ),
    "no header at all": Case(SPACE, "Good.", "", " Good.", "<eos>"),
    "strips answers": Case(SPACE, "  Good. \n", "", " Good.", "<eos>"),
    "another header": Case(
        OTHER_HEADER, "Good.", "Assistant:", " Good.", "\n", "prompts end with 'Assistant:' instead"
    ),
    "end of a whole conversation": Case(ENDED, "Good.", "<a>", "Good.", "<eos>"),
}


def tokenizer_with(template: str) -> PreTrainedTokenizerFast:
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<a>", special=True)])
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("context", [ASK, EARLIER], ids=["one turn", "three turns"])
def test_prompt_and_answer_are_a_text_that_the_template_writes(name: str, context: list[dict[str, str]]) -> None:
    case = CASES[name]
    tokenizer = tokenizer_with(case.template)
    prompt, answer = render_prompt(tokenizer, context), render_answer(tokenizer, context, case.answer)
    assert prompt.endswith("[Hi?]" + case.prompt) and answer == case.rendered
    assert render_prompt_and_answers(tokenizer, context, [case.answer] * 2) == (prompt, [answer] * 2)
    if case.closing is not None:
        turns = [*context, {"role": "assistant", "content": case.answer}]
        whole = apply_template(tokenizer, turns, {}, add_generation_prompt=False)
        assert prompt + answer + case.closing == whole
    note = opening_note(opening(tokenizer, context))
    assert bool(note) == bool(case.note) and re.search(case.note or "", note or "")
    assert note is None or f"the chat template {note}" in turn_notes(tokenizer)


@pytest.mark.parametrize("name", CASES)
def test_a_rollouts_prompt_has_the_ids_that_it_has_in_training(name: str) -> None:
    case = CASES[name]
    tokenizer = tokenizer_with(case.template)
    prompt, answer = render_prompt(tokenizer, ASK), render_answer(tokenizer, ASK, case.answer)
    encoded = encode_answer(tokenizer, prompt, answer, max_prompt_tokens=99, max_answer_tokens=99)
    assert list(encoded.ids[: encoded.answer_start]) == tokenizer(prompt, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("text", [COUNT, LAST_ONLY])
def test_a_template_that_rewrites_the_past_is_used_as_it_is_with_a_note(text: str) -> None:
    tokenizer = tokenizer_with(text)
    asked = apply_template(tokenizer, ASK, {}, add_generation_prompt=True)
    assert render_prompt(tokenizer, ASK) == asked
    assert render_answer(tokenizer, ASK, " Yes. ") == " Yes. "
    assert "does not begin a whole conversation with the text of its prompt" in turn_notes(tokenizer)[0]


def test_a_model_that_is_asked_in_words_gets_all_that_its_template_opens() -> None:
    for text, question in ((R1, "[Hi?]<a><think>\n"), (CHATML, "[Hi?]<a>\n"), (NO_PROMPT, "[Hi?]assistant:")):
        assert render_question(tokenizer_with(text), ASK) == question


def test_a_template_that_refuses_answers_still_renders_prompts() -> None:
    refusing = template("{{ raise_exception('none here') }}", "<a>")
    tokenizer = tokenizer_with(refusing)
    assert render_prompt(tokenizer, ASK) == "[Hi?]<a>"
    assert turn_end(tokenizer) is None
    with pytest.raises(DataError, match="refuses this conversation: none here"):
        render_answer(tokenizer, ASK, "Yes.")


def test_an_error_inside_a_template_refuses_the_conversation() -> None:
    """``'<a>' + content`` is a TypeError for a content that is a list of parts."""
    tokenizer = tokenizer_with("{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}{% endfor %}")
    calling = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": ["A picture."]}]
    with pytest.raises(DataError, match=r"refuses this conversation: .*concatenate"):
        apply_template(tokenizer, calling, {}, add_generation_prompt=False)


@pytest.mark.parametrize(
    "body",
    ["{{ 1 / 0 }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ 'x' * 10 ** 17 }}", "{{ messages[7].x.y }}"],
)
def test_whatever_a_template_computes_is_one_sentence(body: str) -> None:
    with pytest.raises(DataError, match="refuses this conversation: "):
        apply_template(tokenizer_with(body), ASK, {}, add_generation_prompt=False)


@pytest.mark.parametrize(
    "body",
    [
        "{{ 10 ** (10 ** 9) }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'x' * 10 ** 10 }}",
        "{% set kept = namespace(text='x' * 2 ** 29) %}{{ kept.text | replace('x', 'xx') | upper }}",
    ],
)
def test_a_template_without_end_ends_in_one_sentence_and_the_next_one_is_rendered(
    body: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What computes for ever is killed, what fills the memory is refused it, and both by the system."""
    monkeypatch.setattr(rendering, "SECONDS", 0)  # and the one that is always added
    monkeypatch.setattr(rendering, "MEMORY", 200 << 20)
    monkeypatch.setattr(rendering, "_SERVANT", rendering._Servant(rendering._by_request))
    asked_for_too_much = r"the tokenizer's chat template (computes for more than 0 s; give|refuses this conversation: )"
    with pytest.raises(DataError, match=asked_for_too_much):
        apply_template(tokenizer_with(body), ASK, {}, add_generation_prompt=False)
    assert render_prompt(tokenizer_with(R1), ASK).startswith("[Hi?]")
    rendering._SERVANT.close()


@pytest.mark.parametrize("error", [KeyboardInterrupt, TimeoutError])
def test_after_an_interruption_the_next_request_gets_its_own_answer(error: type[BaseException]) -> None:
    """What a signal's handler raises comes between a request and its answer."""

    def work(asked: bytes) -> str:
        time.sleep(0.5 if asked == b"one" else 0)
        return asked.decode()

    def interrupt(*_: object) -> None:
        raise error

    servant = rendering._Servant(work)
    assert servant.ask(b"zero") == "zero"
    first, before = servant._pid, signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(error):
            servant.ask(b"one")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert servant.ask(b"two") == "two" and servant.ask(b"three") == "three"
    with pytest.raises(ChildProcessError):
        os.waitpid(first, os.WNOHANG)  # it has ended, and was waited for
    servant.close()


def test_a_process_that_was_forked_renders_with_a_child_of_its_own() -> None:
    tokenizer = tokenizer_with(CHATML)
    here = render_prompt(tokenizer, ASK)
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # python 3.12 warns of threads
        pid = os.fork()
    if pid == 0:
        os.write(write, render_prompt(tokenizer, ASK).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(read, 1000).decode() == here == render_prompt(tokenizer, ASK)
    os.close(read)
    os.close(write)


def test_the_process_that_renders_holds_no_connection_of_its_parent() -> None:
    """Else a client would wait for the end of a connection that the server has closed."""
    ours, theirs = socket.socketpair()
    servant = rendering._Servant(lambda _: "text")
    assert servant.ask(b"") == "text"
    theirs.close()
    ours.settimeout(5)
    assert ours.recv(1) == b""
    ours.close()
    servant.close()


def test_closing_does_not_wait_for_processes_that_were_forked_since() -> None:
    """They hold the pipe on which the process that renders waits for requests; a program waited for them at its end."""
    servant = rendering._Servant(lambda _: "text")
    assert servant.ask(b"") == "text"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # python 3.12 warns of threads
        pid = os.fork()
    if pid == 0:
        time.sleep(20)
        os._exit(0)
    servant.close()
    assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the other process has ended before"
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_values_that_json_does_not_have_are_shown_as_transformers_shows_them() -> None:
    tokenizer, when = tokenizer_with("{{ when }}{{ messages[0]['content'] }}"), datetime(2026, 3, 1)
    shown = apply_template(tokenizer, ASK, {"when": when}, add_generation_prompt=False)
    assert shown == tokenizer.apply_chat_template(ASK, tokenize=False, when=when)


def test_several_templates_without_a_default_are_named() -> None:
    tokenizer = tokenizer_with(CHATML)
    tokenizer.chat_template = {"rag": CHATML, "tool_use": CHATML}
    assert turn_end(tokenizer) is None
    with pytest.raises(ConfigError, match=r"several chat templates \(rag, tool_use\).*; set model.chat_template"):
        render_prompt(tokenizer, ASK)
    assert "several chat templates" in turn_notes(tokenizer)[0]


@pytest.mark.parametrize(
    ("text", "end"),
    [(CHATML, "<eos>"), (SPACE, "<eos>"), (NO_PROMPT, None), (COUNT, None), (ENDED, "<eos>"), (None, None)],
)
def test_the_token_that_ends_a_turn(text: str | None, end: str | None) -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = text
    assert turn_end(tokenizer) == end


def test_another_end_of_turn_than_that_of_answers_is_a_note() -> None:
    tokenizer = tokenizer_with(CHATML.replace("<eos>", "<|im_end|>"))
    tokenizer.add_tokens([AddedToken("<|im_end|>", special=True)])
    assert turn_end(tokenizer) == "<|im_end|>"
    (note,) = turn_notes(tokenizer)
    assert "ends turns with '<|im_end|>', and answers end with '<eos>'" in note
    assert turn_notes(byte_level()) == ()


class TestEndsInTexts:
    @pytest.mark.parametrize("written", ["<eos>", "<eos>\n", " \n<eos> ", "<|im_end|>\n", "<|im_end|>\n<eos>", "</s>"])
    def test_an_end_in_the_text_is_not_doubled(self, written: str) -> None:
        tokenizer = tokenizer_with(CHATML)
        tokenizer.add_tokens([AddedToken("<|im_end|>", special=True), AddedToken("</s>", special=True)])
        for answer in ("Good.", "a<eos>b"):
            given = encode_answer(tokenizer, "p", answer + written, max_prompt_tokens=9, max_answer_tokens=None)
            space = " \n" if written.startswith(" ") else ""
            assert given == encode_answer(tokenizer, "p", answer + space, max_prompt_tokens=9, max_answer_tokens=None)
            assert given.ids[-1] == tokenizer.eos_token_id and given.ids[-2] != tokenizer.eos_token_id

    def test_ends_and_beginnings_are_taken_off_however_many_there_are(self) -> None:
        tokenizer = tokenizer_with("{{ bos_token }}" + CHATML)
        many = 100_000
        assert without_end(tokenizer, "Good. " + "<eos> \n<eos>" * many) == "Good. "
        assert without_beginning(tokenizer, "<bos>\n" * many + " hi") == "\n hi"
        assert render_prompt(tokenizer, "<bos>" * many + "hi") == "<bos>hi"

    def test_a_name_that_is_no_special_token_of_the_tokenizer_is_text(self) -> None:
        tokenizer = byte_level()
        assert without_end(tokenizer, "<s>old</s> ") == "<s>old</s> "
        tokenizer.add_tokens([AddedToken("</s>", special=False)])
        assert without_end(tokenizer, "<s>old</s> ") == "<s>old</s> "

    def test_a_changed_tokenizer_has_other_ends(self) -> None:
        tokenizer = tokenizer_with(CHATML)
        assert without_end(tokenizer, "Good.<pad>") == "Good.<pad>"
        tokenizer.eos_token = "<pad>"
        assert without_end(tokenizer, "Good.<pad>") == "Good."

    def test_a_beginning_is_written_once(self) -> None:
        tokenizer = tokenizer_with("{{ bos_token }}" + CHATML)
        assert without_beginning(tokenizer, " <bos><bos>hi<bos>") == "hi<bos>"
        assert render_prompt(tokenizer, "<bos><bos>hi") == "<bos>hi"
        tokenizer.chat_template = "{{ bos_token }}{{ bos_token }}" + CHATML
        assert render_prompt(tokenizer, ASK) == "<bos>[Hi?]<a>\n"
