"""A ``Scorer`` behind HTTP: ``tlcr serve``, or a vLLM that serves the discriminator. Standard library only.

    scorer = RewardClient("http://localhost:8765")
    rewards = scorer.token_rewards([Item(prompt_ids, response_ids)])

``GET /v1/info`` tells them apart: vLLM has no such route. vLLM is asked for logits (``use_activation: false``), and
their rewards are computed here, at the discriminator's temperature, which vLLM knows nothing of.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import math
import random
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlcr.credentials import HIDDEN, without_secrets
from tlcr.errors import HostError
from tlcr.hosts.contract import Item, Span, checked

__all__ = ["RewardClient", "TextRewards", "config_for_vllm", "rewards_of_logits", "vocabulary_fingerprint"]

GONE = (502, 504)
COMES_BACK = (429, 503, *GONE)
"""Answers of HTTP after which the same request may succeed: the server has too much to do, or is starting."""

NO_ROUTE = (404, 500)
"""Answers of HTTP where a server has no such route. verl's router says 500 whatever the server behind it said."""

LONGEST_WAIT = 60.0
"""Seconds, whatever a server asks for."""

REQUEST_ITEMS, REQUEST_TOKENS = 256, 131072
"""The most answers and tokens of one request, where the server does not name less."""

POSITIVE = "positive"


@dataclass(frozen=True)
class TextRewards:
    """The rewards of an answer that was sent as text, and the characters [start, end) that each token wrote.

    Attributes:
        rewards: one for each of the discriminator's tokens, its end of sequence included where the answer ended.
        offsets: counted in the answer as it was sent, without end tokens; ``contract.project`` takes them.
    """

    rewards: list[float]
    offsets: list[Span]


class RewardClient:
    """Scores answers by a server. Threads may share one; every request has a connection of its own.

    A request that finds the server busy, starting or gone is sent again after a pause, which doubles each time and is
    as long as the server asks for. Once one was given up because the server is gone, those of the next minute are sent
    a single time, until one is answered: a thousand answers wait for such a server as long as one does. Scoring changes
    nothing, so that a request may be sent twice.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        timeout: float = 180.0,
        tries: int = 8,
        temperature: float | None = None,
    ) -> None:
        """Asks nothing yet: a server may start after its clients.

        Args:
            url: the server's, such as ``http://localhost:8765``; ``http://any:TOKEN@localhost:8765`` has its token too.
            token: what ``tlcr serve`` or vLLM (``--api-key``) wants to be sent; None: that of the address, if any.
            timeout: seconds that one try may take.
            tries: how often a request is sent before it is given up; with pauses, 8 tries last one to two minutes.
            temperature: the discriminator's, for vLLM; None: that of the folder which vLLM names, on this machine.

        Raises:
            HostError: the address is none of HTTP, no header can hold the token, or a number is out of its bounds.
        """
        self.url, password = _address(url)
        self._token = password if token is None else token
        if self._token is not None and not (self._token.isprintable() and all(ord(c) < 256 for c in self._token)):
            raise HostError(
                "the reward server's token has a line break or another character that a header of HTTP cannot hold; "
                "give it without, as tlcr serve reads it"
            )
        if tries < 1 or timeout <= 0:
            raise HostError(f"tries is {tries} and timeout {timeout}; wanted at least 1 and more than 0 seconds")
        if temperature is not None and not (math.isfinite(temperature) and temperature > 0):
            raise HostError(f"temperature is {temperature}; wanted a finite number above 0")
        self.timeout, self.tries, self._temperature = timeout, tries, temperature
        self._server: Tlcr | Vllm | None = None
        self._asked: Future[Tlcr | Vllm] | None = None
        self._lock = threading.Lock()
        self._given_up = -math.inf

    def __repr__(self) -> str:
        return f"RewardClient({self.url!r})"

    def token_rewards(self, items: Sequence[Item]) -> list[list[float]]:
        """The rewards of each answer's tokens, as ``tlcr.hosts.contract`` defines them.

        Args:
            items: the answers. One without tokens has no rewards, and is not sent.

        Returns:
            One list for each item, in their order.

        Raises:
            HostError: the server cannot be reached, refuses a request, or answers what rewards cannot be.
        """
        server = self._known()
        rewards: list[list[float]] = [[] for _ in items]
        sent = [number for number, item in enumerate(items) if len(item.response_ids)]
        lengths = {number: len(items[number].prompt_ids) + len(items[number].response_ids) for number in sent}
        for part in _parts(lengths, server.request_items, server.request_tokens):
            with self._understood():
                for number, row in zip(part, server.rewards([items[i] for i in part]), strict=True):
                    rewards[number] = row
        return checked(rewards, items)

    def text_rewards(self, answers: Sequence[Mapping[str, Any]]) -> list[TextRewards]:
        """The rewards of texts, for trainers whose tokenizer is another; only ``tlcr serve`` gives them.

        Args:
            answers: each ``{"prompt": text}`` or ``{"messages": [...]}``, with ``"response": text``, and ``"ended":
                False`` where the answer was cut off; with messages also ``tools``, ``documents`` and
                ``chat_template_kwargs``. The server refuses other names.

        Returns:
            One for each answer, in their order.

        Raises:
            HostError: as for ``token_rewards``, the server is vLLM, or JSON cannot hold an answer.
        """
        server = self._known()
        if not isinstance(server, Tlcr):
            raise HostError(
                f"{self.url} is a vLLM, which reads ids only with the discriminator's tokenizer; serve it by tlcr serve"
            )
        rewards: list[Any] = []
        offsets: list[list[Span]] = []
        lengths = {number: _json_length(number, answer) + len(",") for number, answer in enumerate(answers)}
        for part in _parts(lengths, server.request_items, server.text_bytes):
            with self._understood():
                for row in server.score([dict(answers[number]) for number in part]):
                    rewards.append(row["rewards"])
                    offsets.append([(begin, end) for begin, end in row["offsets"]])
                    if len(rewards[-1]) != len(offsets[-1]):
                        raise HostError(
                            f"{self.url} gives {len(rewards[-1])} rewards and {len(offsets[-1])} offsets for answer "
                            f"{len(rewards) - 1}; is this tlcr serve?"
                        )
        sound = checked(rewards, [Item((), range(len(spans))) for spans in offsets])
        return [TextRewards(row, spans) for row, spans in zip(sound, offsets, strict=True)]

    def info(self) -> Mapping[str, Any]:
        """What the server says of itself: labels, temperature, tokenizer, limits, versions."""
        return self._known().info

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Refuses a policy whose ids mean other tokens than the discriminator's.

        Args:
            tokenizer: the policy's, of transformers.

        Raises:
            HostError: vocabularies or ends of sequence differ. A vLLM says nothing of its tokenizer and passes.
        """
        info, ours = self._known().info, vocabulary_fingerprint(tokenizer)
        with self._understood():
            theirs = info.get("tokenizer", {}).get("fingerprint")
            if theirs is not None and theirs != ours:
                raise HostError(
                    f"the policy's tokenizer ({ours}) is not that of the discriminator behind {self.url} ({theirs}), "
                    "so that its ids mean other tokens; send text by text_rewards and project the rewards, or train a "
                    "discriminator with this tokenizer"
                )

    # ---- requests

    def _known(self) -> Tlcr | Vllm:
        """The server, which is asked once what it is. Threads that want to know at the same time share the answer."""
        with self._lock:
            if self._server is not None:
                return self._server
            asked, is_first = self._asked or Future(), self._asked is None
            self._asked = asked
        if is_first:
            try:
                self._server = self._found_out()
                asked.set_result(self._server)
            except BaseException as error:
                ended = HostError(f"{self.url} was not asked what it is: the thread that did was interrupted")
                asked.set_exception(error if isinstance(error, Exception) else ended)
                raise
            finally:
                with self._lock:
                    self._asked = None
        return asked.result()

    def _found_out(self) -> Tlcr | Vllm:
        info = self.ask("/v1/info", none_for=NO_ROUTE)
        with self._understood():
            return Vllm(self, self._temperature) if info is None else Tlcr(self, info)

    def ask(self, path: str, body: Any = None, *, none_for: Collection[int] = ()) -> Any:
        """The JSON that the server answers; a body is posted.

        Args:
            path: the route.
            body: what is sent, as JSON; None: a GET.
            none_for: statuses that are an answer too, None.

        Returns:
            The answer.

        Raises:
            HostError: the server is not reached within all tries, or refuses.
        """
        data = None if body is None else _json(body)
        problem = ""
        impatient = time.monotonic() - self._given_up < LONGEST_WAIT
        for attempt in range(1, self.tries + 1):
            is_gone = False
            try:
                answer = self._once(path, data)
            except urllib.error.HTTPError as error:
                is_gone = error.code in GONE
                if error.code in none_for:
                    return None
                problem, wait = _sentence(error, self._token), _seconds(error.headers.get("retry-after"))
                if error.code not in COMES_BACK:
                    raise HostError(f"{self.url}{path} answers {error.code}: {problem}") from error
                problem = f"answers {error.code}: {problem}"
            except (OSError, http.client.HTTPException) as error:  # URLError and time-outs are OSErrors
                reason = getattr(error, "reason", error)
                said = without_secrets(str(reason), self._token)
                problem, wait, is_gone = f"cannot be reached: {said or type(reason).__name__}", 0.0, True
            except (ValueError, RecursionError) as error:
                raise HostError(f"{self.url}{path} answers what is not JSON: {error}") from error
            else:
                self._given_up = -math.inf
                return answer
            if not is_gone:  # one that has too much to do is there, and a place may become free
                self._given_up, impatient = -math.inf, False
            if impatient or attempt == self.tries:
                break
            # Clients that were refused together do not come again together.
            pause = max(wait, min(2.0**attempt / 4, LONGEST_WAIT / 2)) * random.uniform(1, 1.5)
            time.sleep(min(pause, LONGEST_WAIT))
        if is_gone and not impatient:
            self._given_up = time.monotonic()
        after = f"{attempt} tries" if attempt > 1 else "one try"
        raise HostError(f"{self.url}{path} {problem}; given up after {after}. Is the reward server running?")

    @contextmanager
    def _understood(self) -> Iterator[None]:
        """A server that answers in another form than its kind does is named, whatever reading its answer leads to.

        Errors that repeat what it said are without the token.
        """
        try:
            yield
        except HostError as error:
            error.args = (without_secrets(str(error), self._token),)
            raise
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            said = without_secrets(f"{type(error).__name__}: {error}", self._token)
            raise HostError(
                f"{self.url} answers in a form that neither tlcr serve nor vLLM has ({said}); is this the address of a "
                "reward server?"
            ) from error

    def _once(self, path: str, data: bytes | None) -> Any:
        request = urllib.request.Request(self.url + path, data=data)
        request.add_header("Content-Type", "application/json")
        if self._token is not None:
            request.add_unredirected_header("Authorization", f"Bearer {self._token}")
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
            return json.loads(response.read())


# ---- what servers speak


class Tlcr:
    """``tlcr serve``: rewards."""

    def __init__(self, client: RewardClient, info: Any) -> None:
        labels = info.get("labels") if isinstance(info, dict) else None
        _require_labels(labels, f"{client.url}/v1/info", "those of a discriminator that tlcr serve serves")
        self.client, self.info = client, info
        limits = info.get("limits", {})
        self.request_items = min(REQUEST_ITEMS, limits.get("items", REQUEST_ITEMS))
        self.request_tokens = min(REQUEST_TOKENS, limits.get("request_tokens", REQUEST_TOKENS))
        # A text's tokens are known to the server alone: no more than the bytes of its JSON, which the body holds too.
        self.text_bytes = min(self.request_tokens, limits.get("body_bytes", math.inf) - len('{"items":[]}'))

    def rewards(self, items: Sequence[Item]) -> list[list[float]]:
        """One list for each item."""
        sent = [{"prompt_ids": _plain(one.prompt_ids), "response_ids": _plain(one.response_ids)} for one in items]
        return [row["rewards"] for row in self.score(sent)]

    def score(self, sent: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """``data`` of ``/v1/token_rewards``, as long as ``sent``."""
        answer = self.client.ask("/v1/token_rewards", {"items": sent})
        return _data(answer, len(sent), "rewards", f"{self.client.url}/v1/token_rewards")


class Vllm:
    """A vLLM that serves the discriminator's folder: logits of every token, prompt and answer alike."""

    request_items, request_tokens = REQUEST_ITEMS, REQUEST_TOKENS

    def __init__(self, client: RewardClient, temperature: float | None) -> None:
        self.client = client
        models = client.ask("/v1/models", none_for=NO_ROUTE)
        if not isinstance(models, dict) or not models.get("data"):
            raise HostError(
                f"{client.url} has neither /v1/info (tlcr serve) nor /v1/models (vLLM); is this the address?"
            )
        served = models["data"][0]
        self.model, self.limit = served["id"], served.get("max_model_len")
        folder = Path(str(served.get("root") or self.model))
        config = config_for_vllm(folder)
        if temperature is None and config is None:
            raise HostError(
                f"{client.url} is a vLLM, which does not tell the discriminator's temperature, and {str(folder)!r} is "
                "not on this machine; give it: RewardClient(url, temperature=...), with tlcr_temperature of the "
                "discriminator's config.json (1.0 where there is none)"
            )
        self.temperature = float((config or {}).get("tlcr_temperature", 1.0)) if temperature is None else temperature
        self.info = {"server": "vllm", "model": self.model, "temperature": self.temperature, "max_tokens": self.limit}

    def rewards(self, items: Sequence[Item]) -> list[list[float]]:
        """One list for each item: the last of its rows of logits are the answer's."""
        rows = [_plain(item.prompt_ids) + _plain(item.response_ids) for item in items]
        body = {"model": self.model, "input": rows, "use_activation": False}
        where = f"{self.client.url}/pooling"
        data = _data(self.client.ask("/pooling", body), len(items), "data", where)
        rewards = []
        for number, (found, row, item) in enumerate(zip(data, rows, items, strict=True)):
            logits = found["data"]
            if found.get("index", number) != number or not isinstance(logits, list) or len(logits) != len(row):
                raise HostError(
                    f"{where} gives {len(logits) if isinstance(logits, list) else 'no'} rows of logits for the "
                    f"{len(row)} tokens of answer {number}; is the model a token classifier (token_classify)?"
                )
            answer = logits[len(item.prompt_ids) :]
            rewards.append(rewards_of_logits(answer, self.temperature, where))
        return rewards


def rewards_of_logits(logits: Sequence[Sequence[float]], temperature: float, where: str = "logits") -> list[float]:
    """p(positive) - p(negative) of each token, p = softmax(logits / temperature), in float64.

    Args:
        logits: for each token two numbers [negative, positive], or three [negative, neutral, positive].
        temperature: the discriminator's.
        where: what the logits come from, for the error's text.

    Returns:
        One reward for each token.

    Raises:
        HostError: a token has another number of logits, or one that is not finite.
    """
    rewards = []
    for token, row in enumerate(logits):
        if not isinstance(row, list) or len(row) not in (2, 3) or not all(map(math.isfinite, row)):
            raise HostError(
                f"{where} has {row!r} for token {token}; wanted 2 or 3 finite numbers: the discriminator's weights are "
                "broken, or another model is served"
            )
        top = max(row)
        weights = [math.exp((value - top) / temperature) for value in row]
        rewards.append((weights[-1] - weights[0]) / math.fsum(weights))
    return rewards


def config_for_vllm(folder: Path) -> dict[str, Any] | None:
    """config.json of a discriminator that vLLM serves, whose numbers are then those of ``tlcr serve``.

    Args:
        folder: what vLLM was started with, a path or a name on the hub.

    Returns:
        The config; None where the folder is not on this machine.

    Raises:
        HostError: vLLM serves the folder with other rewards; ``tlcr export --for vllm`` refuses it too.
    """
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if layers := config.get("tlcr_bidirectional_layers", 0):
        raise HostError(
            f"the top {layers} layers of the discriminator {str(folder)!r} are bidirectional, and vLLM reads them as "
            f"causal ones, with other rewards; serve it by 'tlcr serve --discriminator {folder}', or train one with "
            "discriminator.bidirectional_layers 0"
        )
    if names := config.get("id2label"):
        labels = [names[number] for number in sorted(names, key=int)]
        _require_labels(labels, f"the discriminator {str(folder)!r}", "those that 'tlcr train discriminator' gives")
    return config


def vocabulary_fingerprint(tokenizer: Any) -> str:
    """A digest of what a tokenizer's ids mean: its vocabulary, and its beginning and end of sequence.

    Args:
        tokenizer: one of transformers, of any version.

    Returns:
        16 hexadecimal digits. Tokenizers with the same ones may be used with one another's ids.
    """
    meaning = [tokenizer.bos_token_id, tokenizer.eos_token_id, sorted(tokenizer.get_vocab().items())]
    return hashlib.sha256(json.dumps(meaning).encode()).hexdigest()[:16]


# ---- addresses


def _address(url: str) -> tuple[str, str | None]:
    """The address without user and password, which urllib would take for the host's name, and the password."""
    try:
        parts = urllib.parse.urlsplit(url)
        wanted = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a host or a port that is none; the error repeats what stands before it too
        wanted = False
    if not wanted:
        shown = re.sub(r"^(\w+://)?.*@", rf"\1{HIDDEN}@", url, flags=re.DOTALL)
        encoded = ", with %2F for a / in the password and the like" if shown != url else ""
        raise HostError(f"the reward server's address is {shown!r}; wanted http://HOST:PORT{encoded}")
    if parts.username and parts.password is None:
        raise HostError("the reward server's address has a user without a password; wanted http://any:TOKEN@HOST:PORT")
    bare = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl().rstrip("/")
    return bare, urllib.parse.unquote(parts.password) if parts.password else None


# ---- reading answers


def _parts(lengths: Mapping[int, int], most_items: int, most: int) -> Iterator[list[int]]:
    """Indices of items in requests that the server takes; one longer item goes alone, for the server to refuse.

    Args:
        lengths: what each item takes, by its index.
        most_items: how many items a request has at the most.
        most: what the items of a request take together at the most.

    Yields:
        The indices of a request.
    """
    part: list[int] = []
    taken = 0
    for number, length in lengths.items():
        if part and (len(part) == most_items or taken + length > most):
            yield part
            part, taken = [], 0
        part.append(number)
        taken += length
    if part:
        yield part


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _json_length(number: int, answer: Mapping[str, Any]) -> int:
    try:
        return len(_json(dict(answer)))
    except (TypeError, ValueError) as error:
        raise HostError(
            f"answers[{number}] cannot be sent as JSON ({error}); wanted texts under 'prompt' or 'messages' and "
            "'response'"
        ) from error


def _require_labels(labels: Any, where: str, whose: str) -> None:
    if isinstance(labels, list) and len(labels) in (2, 3) and (labels[0], labels[-1]) == ("negative", POSITIVE):
        return
    raise HostError(f"{where} has the labels {labels!r}; wanted negative, (neutral,) positive, {whose}")


def _plain(ids: Sequence[int]) -> list[int]:
    """Python's integers, also of an array or a tensor."""
    return list(map(int, ids))


def _data(answer: Any, count: int, name: str, where: str) -> list[dict[str, Any]]:
    """The entries of an answer, one for each row that was sent, each with ``name``."""
    data = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(data, list) or len(data) != count:
        found = f"{len(data)} entries" if isinstance(data, list) else "none"
        raise HostError(f"{where} was sent {count} answers and has {found} under 'data'; is this a reward server?")
    for number, row in enumerate(data):
        if not isinstance(row, dict) or name not in row:
            raise HostError(f"{where} has no {name} for answer {number}; is this a reward server?")
    return data


def _sentence(error: urllib.error.HTTPError, token: str | None) -> str:
    """What the server says of a refusal, without the token that it was sent."""
    try:
        text = error.read().decode(errors="replace")
    except (OSError, http.client.HTTPException):
        text = ""
    try:
        found = json.loads(text)["error"]
        found = found["message"] if isinstance(found, dict) else found  # vLLM's
    except (ValueError, KeyError, TypeError):
        found = text or error.reason
    return " ".join(without_secrets(str(found), token).split())[:500]


def _seconds(retry_after: str | None) -> float:
    try:
        return max(float(retry_after or 0), 0.0)
    except ValueError:  # a date; ours and vLLM send seconds
        return 0.0
