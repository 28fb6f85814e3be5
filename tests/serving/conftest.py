"""A discriminator's folder, and servers of it in threads of this process, on ports of their own."""

from __future__ import annotations

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tlcr.serving.settings import ServerSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from tlcr.serving.model import ServedModel
    from tlcr.serving.reading import Reader

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TEMPERATURE = 1.7


@pytest.fixture(scope="session")
def discriminator(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_causal_lm: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """A random discriminator with a chat template and a temperature that is not 1."""
    from copy import deepcopy

    from tlcr.config.schema import ModelConfig
    from tlcr.models.inspection import TWO_CLASSES
    from tlcr.models.loading import load_token_classifier
    from tlcr.models.saving import save_model

    folder = tmp_path_factory.mktemp("served")
    model = load_token_classifier(tiny_causal_lm(), ModelConfig(), id2label=TWO_CLASSES)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        model.score.weight.normal_(std=2.0)
    model.config.tlcr_temperature = TEMPERATURE
    tokenizer = deepcopy(tiny_tokenizer)
    tokenizer.chat_template = TEMPLATE
    save_model(model, tokenizer, folder)
    return folder


@pytest.fixture(scope="session")
def served(discriminator: Path) -> ServedModel:
    from tlcr.serving.model import ServedModel

    return ServedModel(str(discriminator), dtype="float32", device=torch.device("cpu"))


def reader_of(model: ServedModel, **limits: int) -> Reader:
    """What reads requests to a model, with the limits of a server with the defaults."""
    from tlcr.serving.reading import Reader

    assert model.positions is not None
    return Reader(model.tokenizer, model.vocabulary, **{"max_items": 1024, "longest_row": model.positions, **limits})


@dataclass
class Running:
    """A server that runs, and how to ask it."""

    url: str
    port: int
    app: Any
    connections: set[Any]
    headers: dict[str, str] = field(default_factory=dict)

    def ask(self, path: str, body: Any = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
        """Status, parsed body and heads of one request; a body is posted, bytes as they are."""
        data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, headers={**self.headers, **headers})
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                status, raw, heads = response.status, response.read(), dict(response.headers)
        except urllib.error.HTTPError as error:
            with error:
                status, raw, heads = error.code, error.read(), dict(error.headers)
        text = raw.decode()
        return status, json.loads(text) if text[:1] in "{[" else text, {k.lower(): v for k, v in heads.items()}

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)


@contextmanager
def running(model: Any, token: str | None = None, **changes: Any) -> Iterator[Running]:
    """A server in a thread, which stops gracefully at the end of the block."""
    import uvicorn

    from tlcr.serving.app import make_app
    from tlcr.serving.processes import _config, _listen

    settings = ServerSettings(**{"discriminator": model.name, "port": 0, **changes})
    listening = _listen(settings)
    app = make_app(settings, model, token)
    server = uvicorn.Server(_config(settings, app))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not server.started:
        assert thread.is_alive() and time.monotonic() < deadline, "the server did not start"
        time.sleep(0.005)
    port = listening.getsockname()[1]
    headers = {} if token is None else {"authorization": f"Bearer {token}"}
    try:
        yield Running(f"http://127.0.0.1:{port}", port, app, server.server_state.connections, headers)
    finally:
        server.should_exit = True
        thread.join(timeout=60)
        listening.close()
        assert not thread.is_alive(), "the server did not stop"


@pytest.fixture(scope="module")
def server(served: ServedModel) -> Iterator[Running]:
    """A server with the defaults, for all tests of a file."""
    with running(served) as found:
        yield found
