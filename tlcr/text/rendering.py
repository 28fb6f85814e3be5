"""Chat templates, rendered in a process of its own with bounds on time and memory.

A template is code that came with a model. jinja's sandbox keeps it from files, but not from counting for ever or from
filling the memory, and nothing in a process can end a long operation of that process. So a child renders: the system
ends it when its seconds are up (RLIMIT_CPU) and refuses it memory (RLIMIT_AS). One child serves as long as it lives.
"""

from __future__ import annotations

import atexit
import json
import os
import resource
import signal
import struct
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from transformers import PreTrainedTokenizerBase

from tlcr.errors import DataError

__all__ = ["render"]

SECONDS = 10
"""CPU time for one conversation; the longest that is seen takes some hundredths of a second."""
MEMORY = 1 << 30
"""Bytes beyond what the process had when it began."""
LENGTH = struct.Struct(">Q")


class _Speaker:
    """What rendering needs of a tokenizer."""

    def __init__(self, special_tokens: Mapping[str, Any]) -> None:
        self.special_tokens_map = special_tokens

    def get_chat_template(self, chat_template: str, tools: object = None) -> str:
        return chat_template


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    source: str,
    *,
    add_generation_prompt: bool,
    values: Mapping[str, Any],
) -> str:
    """The text of a conversation by a chat template.

    Args:
        tokenizer: its special tokens are given to the template; one with a way of its own to render uses that.
        messages: the conversation.
        source: the template.
        add_generation_prompt: end with what the template writes before an answer that is wanted.
        values: other values for the template.

    Returns:
        The text.

    Raises:
        DataError: the template refuses the conversation, fails, computes for more than ``SECONDS``, or wants more than
            ``MEMORY``.
    """
    request = {
        "conversation": [dict(message) for message in messages],
        "chat_template": source,
        "tokenize": False,
        "add_generation_prompt": add_generation_prompt,
        **values,
    }
    own = type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template
    try:
        asked = None if own else json.dumps([dict(tokenizer.special_tokens_map), request]).encode()
    except (TypeError, ValueError):  # times, bytes: values that JSON does not have
        asked = None
    if asked is not None:
        return _SERVANT.ask(asked)
    once = _Servant(lambda _: str(tokenizer.apply_chat_template(**request)))
    try:
        return once.ask(b"")
    finally:
        once.close()


def _by_request(asked: bytes) -> str:
    special_tokens, request = json.loads(asked)
    return str(PreTrainedTokenizerBase.apply_chat_template(_Speaker(special_tokens), **request))  # type: ignore[arg-type]


class _Servant:
    """A forked child that answers requests with ``work``, one at a time, and is started again where it ended."""

    def __init__(self, work: Callable[[bytes], str]) -> None:
        self._work, self._lock = work, threading.Lock()
        self._owner = self._pid = 0

    def ask(self, asked: bytes) -> str:
        with self._lock:
            if self._owner != os.getpid():  # not yet started, or by a process that was forked since
                self._start()
            try:
                _write(self._to, asked)
                done, text = json.loads(_read(self._from))
            except (BrokenPipeError, EOFError):
                raise DataError(f"the tokenizer's chat template {self._how_it_ended()}") from None
            except BaseException:  # a signal's, such as Ctrl-C: the next request would read the answer to this one
                self._abandon()
                raise
        if not done:
            raise DataError(f"the tokenizer's chat template refuses this conversation: {text}")
        return str(text)

    def close(self) -> None:
        """Ends the child. It would not read the end of its requests while a process that was forked since lives."""
        if self._owner == os.getpid():
            self._abandon()
        self._owner = 0

    def _hang_up(self) -> None:
        self._owner = 0  # first, so that nobody uses the pipes of a child that is given up, whatever interrupts this
        os.close(self._to)
        os.close(self._from)

    def _abandon(self) -> None:
        """Ends the child, whatever it does; it keeps nothing."""
        self._hang_up()
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)

    def _start(self) -> None:
        requests, self._to = os.pipe()
        self._from, answers = os.pipe()
        with warnings.catch_warnings():
            # Python warns of threads, whose locks a child could find taken. This one takes none but those of jinja.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._pid = os.fork()
        if self._pid == 0:
            try:
                _close_all_but(requests, answers)
                self._serve(requests, answers)
            finally:
                os._exit(0)
        os.close(requests)
        os.close(answers)
        self._owner = os.getpid()

    def _serve(self, requests: int, answers: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        _limit(resource.RLIMIT_CORE, 0)
        with suppress(FileNotFoundError), open("/proc/self/statm", encoding="ascii") as file:
            _limit(resource.RLIMIT_AS, int(file.read().split()[0]) * resource.getpagesize() + MEMORY)
        while True:
            try:
                asked = _read(requests)
            except EOFError:
                return
            used = resource.getrusage(resource.RUSAGE_SELF)
            _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + SECONDS + 1)
            try:
                answer = json.dumps([True, self._work(asked)]).encode()
            except Exception as error:  # noqa: BLE001 - jinja's own, and any of python in what a template calls or computes
                answer = json.dumps([False, str(error) or type(error).__name__]).encode()
            _write(answers, answer)

    def _how_it_ended(self) -> str:
        """Why there is no answer, as what the template did."""
        self._hang_up()
        code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        if code == -signal.SIGXCPU:
            return f"computes for more than {SECONDS} s; give model.chat_template another one"
        return f"ended the process that renders it (code {code}); give model.chat_template another one"


def _close_all_but(*kept: int) -> None:
    """Lets go of the files, locks and connections of the process that this one was forked from."""
    first = 3  # after input, output and errors
    for last in (*sorted(kept), resource.getrlimit(resource.RLIMIT_NOFILE)[0]):
        os.closerange(first, last)
        first = last + 1


def _limit(what: int, value: int) -> None:
    hard = resource.getrlimit(what)[1]
    with suppress(ValueError, OSError):  # a stricter one is there
        resource.setrlimit(what, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _write(handle: int, data: bytes) -> None:
    left = memoryview(LENGTH.pack(len(data)) + data)
    while left:
        left = left[os.write(handle, left) :]


def _read(handle: int) -> bytes:
    return _exactly(handle, LENGTH.unpack(_exactly(handle, LENGTH.size))[0])


def _exactly(handle: int, count: int) -> bytes:
    parts = []
    while count:
        part = os.read(handle, min(count, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


_SERVANT = _Servant(_by_request)
atexit.register(_SERVANT.close)
