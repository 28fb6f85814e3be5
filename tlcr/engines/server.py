"""vLLM behind HTTP, one server or many: token ids in, token ids and log-probabilities out, weights by files, or over
the network where a server takes them so.

What a server says is checked: a short answer to a fixed prompt is scored by the policy itself after each change of the
weights, each answer must be one to its prompt, and the version of the weights must be the same after a rollout as
before. A server that fails, in time or by what it says, is left out, and what it answered is asked of the others.
"""

from __future__ import annotations

import logging
import secrets
import shutil
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from tlcr.config.schema import EngineConfig
from tlcr.engines.probe import NotThePolicys, check_probe, probe_prompt, probe_sampling
from tlcr.engines.protocol import Answer, Sampling
from tlcr.engines.vllm_client import Client, Fault
from tlcr.errors import BackendUnavailable
from tlcr.files import atomic_write, write_json
from tlcr.models.lora.adapters import adapter_of
from tlcr.models.lora.files import adapter_weights, whole_weights, write_adapter
from tlcr.training.distributed import on_main_process, process_count
from tlcr.training.profiling import part

logger = logging.getLogger(__name__)

FILE_BYTES = 2**30
"""Weights in one file, or one message; as many are in memory at a time (ours)."""


class Server:
    """``vllm serve`` at each address of ``server``.

    Args:
        cfg: addresses, time limit, and the sampling that probes use too.
        policy: the model itself, not a data-parallel wrapper.
        folder: where weights are written for the servers to read, so on a disk that they share; what else is in it is
            deleted. None: a temporary folder, for servers on this machine.

    Raises:
        BackendUnavailable: the packages of the extra ``openai`` are not installed.
    """

    def __init__(self, cfg: EngineConfig, policy: PreTrainedModel, folder: Path | None) -> None:
        self._cfg, self._policy, self._folder = cfg, policy, folder
        self._clients = [Client(address, cfg.server_timeout) for address in cfg.server]
        self._alive = list(self._clients)
        self._lock = threading.Lock()
        self._run, self._version = secrets.token_hex(4), 0
        self._reason = ""

    # ---- weights

    def refresh(self) -> None:
        """See ``Engine``. The main process writes the weights and tells the servers; the others wait. A sharded policy
        is inside ``gathered``."""
        self._version += 1
        with part("rollout: weights to servers"):
            on_main_process(self._send_weights)
        if process_count() > 1:
            known: list[Any] = [(self._run, {client.address: client.state for client in self._alive})]
            broadcast_object_list(known)
            self._run, states = known[0]
            self._alive = [client for client in self._alive if client.address in states]
            for client in self._alive:
                client.state = states[client.address]
            self._require_one()

    def _send_weights(self) -> None:
        folder = Path(tempfile.mkdtemp(prefix="tlcr-weights-")) if self._folder is None else self._folder.resolve()
        try:
            shutil.rmtree(folder, ignore_errors=True)  # what a run left that was killed
            if adapter_of(self._policy) is not None:
                self._send_adapter(folder)
            whole = [client for client in self._alive if client.state.given != self._label]
            self._send_whole(whole, folder / self._label)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self._each(self._check_weights, at_a_time=1)

    def _send_adapter(self, folder: Path) -> None:
        """To those that take adapters, after the weights that it stands on, which they are given once."""
        write_adapter(self._policy, adapter_weights(self._policy), folder / "adapter")
        takers = [client for client in self._alive if client.state.may_take_adapters]
        bare: list[Client] = []
        self._each(lambda client: None if client.has_base_of(self._before) else bare.append(client), takers)
        self._each(lambda client: client.tries_adapters(folder / "adapter", f"{self._label}-trial"), bare)
        bare = [client for client in bare if client in self._alive and client.state.may_take_adapters]
        self._send_whole(bare, folder / "base", merged=False)
        takers = [client for client in takers if client in self._alive and client.state.may_take_adapters]
        self._each(lambda client: client.take_adapter(folder / "adapter", self._label), takers)

    def _send_whole(self, clients: Sequence[Client], folder: Path, *, merged: bool = True) -> None:
        """folder: where files are written, if they are. merged: see ``whole_weights``."""
        if not clients:
            return
        if self._cfg.server_weights == "files":
            with atomic_write(folder) as aside:
                _write_weights(self._policy, aside, merged=merged)
            self._each(lambda client: client.take_weights(folder, self._label), clients)
            return

        def those_left(action: Callable[[Client], object]) -> None:
            self._each(action, [client for client in clients if client in self._alive])

        # A line for each time: meanwhile an evaluation, or another run, may have had the servers join its own.
        those_left(lambda client: client.begin_weights())
        for some in _in_chunks(self._policy, merged=merged):
            those_left(partial(Client.take, weights=some))
        those_left(lambda client: client.end_weights(self._label))

    @property
    def _before(self) -> str:
        """The name of the weights before those of now."""
        return f"{self._run}-{self._version - 1}"

    @property
    def _label(self) -> str:
        """The name of the weights of now, which no other run has."""
        return f"{self._run}-{self._version}"

    def _check_weights(self, client: Client) -> None:
        """Raises Fault unless a short answer has the policy's own log-probabilities."""
        how, vocabulary = probe_sampling(self._cfg), self._policy.config.get_text_config().vocab_size
        ids, logprobs = client.answer(probe_prompt(self._policy), how, seed=0, vocabulary=vocabulary)
        try:
            client.probe = check_probe(self._policy, how, ids, logprobs, client.probe)
        except NotThePolicys as error:
            raise Fault(str(error)) from error

    # ---- answers

    def sample(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, generator: torch.Generator | None = None
    ) -> list[Answer]:
        """See ``Engine``. Each prompt has a seed of its own, so that it does not matter which server answers it."""
        seeds = torch.randint(2**63 - 1, (len(prompts),), generator=generator).tolist()
        found: dict[int, tuple[Client, Answer]] = {}
        with part("rollout: servers"):
            while lacking := [row for row in range(len(prompts)) if row not in found]:
                found |= self._ask(lacking, prompts, seeds, sampling)
                self._each(lambda client: client.check_version(self._label))
                found = {row: answer for row, answer in found.items() if answer[0] in self._alive}
        return [found[row][1] for row in range(len(prompts))]

    def _ask(
        self, rows: Sequence[int], prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling
    ) -> dict[int, tuple[Client, Answer]]:
        """Answers of the rows, each from the server with the fewest requests under way."""
        waiting, found = deque(rows), {}
        device, vocabulary = self._policy.device, self._policy.config.get_text_config().vocab_size

        def work() -> None:
            while True:
                with self._lock:
                    if not (waiting and self._alive):
                        return
                    row = waiting.popleft()
                    client = min(self._alive, key=lambda client: (client.under_way, client.asked))
                    client.under_way += 1
                    client.asked += 1
                try:
                    ids, logprobs = client.answer(prompts[row], sampling, seeds[row], vocabulary)
                except Fault as fault:
                    self._leave_out(client, fault)
                    waiting.appendleft(row)
                    continue
                finally:
                    with self._lock:
                        client.under_way -= 1
                logprobs_T = torch.tensor(logprobs, device=device) if sampling.logprobs else None
                found[row] = client, Answer(torch.tensor(ids, dtype=torch.long, device=device), logprobs_T)

        workers = min(sampling.batch_size, len(rows))
        with ThreadPoolExecutor(workers, "server") as pool:
            for done in [pool.submit(work) for _ in range(workers)]:
                done.result()
        self._require_one()
        return found

    # ---- servers

    def _each(
        self, action: Callable[[Client], object], clients: Sequence[Client] | None = None, at_a_time: int | None = None
    ) -> None:
        """Does it with every server that is left, or with some, and leaves out those with which it cannot be done."""
        clients = list(self._alive) if clients is None else clients

        def attempt(client: Client) -> None:
            try:
                action(client)
            except Fault as fault:
                self._leave_out(client, fault)

        with ThreadPoolExecutor(at_a_time or max(1, len(clients)), "server") as pool:
            list(pool.map(attempt, clients))
        self._require_one()

    def _leave_out(self, client: Client, fault: Fault) -> None:
        with self._lock:
            if client not in self._alive:
                return
            self._alive.remove(client)
            client.hang_up()
            self._reason = f"{client.address} {fault}"
            logger.warning(
                "the server at %s is left out from now on: it %s; %d are left", client.address, fault, len(self._alive)
            )

    def _require_one(self) -> None:
        if not self._alive:
            raise BackendUnavailable(
                f"engine 'server' has no server left of {len(self._cfg.server)}, the last because: "
                f"{self._reason}; see to it and continue with --resume, or set engine: generate"
            )

    def close(self) -> None:
        """See ``Engine``."""
        for client in self._clients:
            client.close()


def _write_weights(policy: PreTrainedModel, folder: Path, *, merged: bool = True) -> None:
    """The whole policy as files of safetensors. merged: see ``whole_weights``."""
    folder.mkdir()
    policy.config.save_pretrained(folder)
    files: dict[str, str] = {}
    for number, some in enumerate(_in_chunks(policy, merged=merged), 1):
        name = f"model-{number:05}.safetensors"
        save_file(dict(some), folder / name, metadata={"format": "pt"})
        files.update(dict.fromkeys(some, name))
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": files})


def _in_chunks(policy: PreTrainedModel, *, merged: bool) -> Iterator[Mapping[str, Tensor]]:
    """The whole policy on the CPU, gathered and merged one weight after the other."""
    held: dict[str, Tensor] = {}
    for name, weight in whole_weights(policy, merged=merged):
        held[name] = weight.detach().cpu().contiguous()
        if sum(tensor.nbytes for tensor in held.values()) > FILE_BYTES:
            yield held
            held = {}
    if held:
        yield held
