"""What a reward server costs: ``tlcr serve`` beside the same model called directly, and what it does under load.

    python -m benchmarks.serving [--discriminator FOLDER] [--output FILE.json] [--part NAME ...]

Load comes from locust, in a process of its own (``pip install locust``). The parts:

throughput: tokens per second of batches by ids, direct and served in alternation, medians and their ratio; the same
            per second of the processor in the process that has the model, which other work on the machine leaves alone.
latency:    p50 and p99 of single answers at half of the served throughput (locust).
checked:    10,000 answers asked by 64 clients, each compared with the direct one.
overload:   ten times as many clients as the queue holds, for a minute: statuses, and memory before, at most and after.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch

from benchmarks.record import largest, machine, versions, write
from tlcr.errors import HostError
from tlcr.hosts.client import RewardClient
from tlcr.hosts.contract import Item
from tlcr.serving.model import ServedModel
from tlcr.types import EncodedAnswer

T = TypeVar("T")

LOCUSTFILE = Path(__file__).with_name("serving_load.py")
PROMPT, ANSWER, BATCH = 64, 64, 32
"""Tokens of a prompt and of an answer, and answers of a request of the trainer's kind."""
PAIRS = 7
"""How often direct and served take turns."""


def made_discriminator(folder: Path, layers: int) -> None:
    """A random Llama of width 256 with a discriminator's head, 6M parameters with 6 layers."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from tlcr.config.schema import ModelConfig
    from tlcr.models.inspection import TWO_CLASSES
    from tlcr.models.loading import load_token_classifier
    from tlcr.models.saving import save_model

    torch.manual_seed(0)
    names = ["<pad>", "<bos>", "<eos>", *(f"t{n}" for n in range(4093))]
    words = Tokenizer(models.WordLevel({name: n for n, name in enumerate(names)}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        pad_token_id=0,
        eos_token_id=2,
    )
    model = load_token_classifier(LlamaForCausalLM(config), ModelConfig(), id2label=TWO_CLASSES)
    with torch.no_grad():
        model.score.weight.normal_()  # it begins at 0, where all rewards are alike
    save_model(model, tokenizer, folder)


def items(count: int, seed: int, *, spread: bool = False) -> list[Item]:
    """Random answers of one length, or of lengths from 4 to it."""
    generator = random.Random(seed)

    def ids(length: int) -> list[int]:
        return [generator.randrange(3, 400) for _ in range(generator.randint(4, length) if spread else length)]

    return [Item(ids(PROMPT), ids(ANSWER)) for _ in range(count)]


def rows(given: list[Item]) -> list[EncodedAnswer]:
    return [EncodedAnswer((*one.prompt_ids, *one.response_ids), len(one.prompt_ids), False) for one in given]


@contextmanager
def served(folder: Path, *flags: str) -> Iterator[tuple[str, psutil.Process]]:
    command = [sys.executable, "-m", "tlcr", "serve", "--discriminator", str(folder), "--port", "0", *flags]
    # One thread, as the model that is called directly, which has it by torch.set_num_threads.
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if found := re.search(r"on (http://\S+)", line):
                break
        else:
            sys.exit("the server did not start")
        threading.Thread(target=process.stderr.read, daemon=True).start()
        RewardClient(found[1]).info()
        yield found[1], psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(120)


def rates(work: Callable[[], Any], tokens: int, process: psutil.Process) -> tuple[float, float]:
    """Tokens per second, and per second of the processor in the process that has the model."""
    used, began = process.cpu_times(), time.perf_counter()
    work()
    seconds, now = time.perf_counter() - began, process.cpu_times()
    return tokens / seconds, tokens / (now.user + now.system - used.user - used.system)


def together(work: Callable[[T], Any], given: Sequence[T]) -> None:
    """Calls a function with each, in threads, and raises what one of them raised: what failed was not served."""
    with ThreadPoolExecutor(len(given)) as pool:
        for future in [pool.submit(work, one) for one in given]:
            future.result()


# ---- the parts


def throughput(folder: Path, model: ServedModel) -> dict[str, Any]:
    """Four requests at a time keep the server's queue filled, as workers of a trainer do."""
    requests = [items(BATCH, seed) for seed in range(4)]
    tokens = sum(len(row.ids) for request in requests for row in rows(request))

    def direct() -> None:
        for request in requests:
            model.opinions(rows(request))

    with served(folder, "--batch-tokens", str(BATCH * (PROMPT + ANSWER))) as (url, process):
        client = RewardClient(url)

        def over_http() -> None:
            together(client.token_rewards, requests)

        direct(), over_http()
        own = psutil.Process()
        pairs = [(rates(direct, tokens, own), rates(over_http, tokens, process)) for _ in range(PAIRS)]
    found: dict[str, Any] = {
        "answers_of_a_request": BATCH,
        "tokens_of_an_answer_with_its_prompt": PROMPT + ANSWER,
    }
    for clock, name in enumerate(("second", "processor_second")):
        ratios = sorted(over[clock] / alone[clock] for alone, over in pairs)
        found[f"direct_tokens_per_{name}"] = statistics.median(alone[clock] for alone, _ in pairs)
        found[f"served_tokens_per_{name}"] = statistics.median(over[clock] for _, over in pairs)
        found[f"ratio_per_{name}"] = statistics.median(ratios)
        found[f"quartiles_per_{name}"] = [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]]
    return found


def locust(url: str, users: int, seconds: int, wait: float) -> dict[str, Any]:
    """One run of locust: each user asks for one answer, and waits ``wait`` seconds on average after it."""
    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "-H", url, "-u", str(users)]
        command += ["-r", str(users), "-t", f"{seconds}s", "--csv", f"{name}/load", "--only-summary"]
        environment = {"TLCR_LOAD_WAIT": str(wait), "TLCR_LOAD_TOKENS": f"{PROMPT},{ANSWER}"}
        subprocess.run(command, check=False, capture_output=True, env={**os.environ, **environment})
        lines = (Path(name) / "load_stats.csv").read_text(encoding="utf-8").splitlines()
    names, values = lines[0].split(","), lines[-1].split(",")
    found = dict(zip(names, values, strict=True))
    return {
        "requests": int(found["Request Count"]),
        "failures": int(found["Failure Count"]),
        "per_second": float(found["Requests/s"]),
        "p50_ms": float(found["50%"]),
        "p99_ms": float(found["99%"]),
    }


def latency(folder: Path, model: ServedModel) -> dict[str, Any]:
    with served(folder) as (url, _):
        full = locust(url, users=32, seconds=20, wait=0.0)
        users = 16
        half = locust(url, users=users, seconds=30, wait=users / (full["per_second"] / 2))
    return {"full_load": full, "half_load": half}


def checked(folder: Path, model: ServedModel) -> dict[str, Any]:
    """Every answer of every client beside the one that the model gives when it is asked alone."""
    answers = items(500, 7, spread=True)
    wanted = [opinion.rewards_T.tolist() for row in rows(answers) for opinion in model.opinions([row])]
    others = [max(abs(a - b) for a, b in zip(one, other, strict=False)) for one, other in pairwise(wanted)]
    worst, counts, lock = [0.0], [0, 0], threading.Lock()
    with served(folder) as (url, _):

        def client_of(part: int) -> None:
            client, generator = RewardClient(url), random.Random(part)
            left = 10_000 // 64 + (part < 10_000 % 64)
            while left:
                picked = generator.sample(range(len(answers)), min(generator.randint(1, 12), left))
                found = client.token_rewards([answers[i] for i in picked])
                errors = [
                    abs(a - b)
                    for row, i in zip(found, picked, strict=True)
                    for a, b in zip(row, wanted[i], strict=True)
                ]
                with lock:
                    worst[0] = largest([worst[0], *errors])
                    counts[0] += len(picked)
                    counts[1] += len(errors)
                left -= len(picked)

        together(client_of, range(64))
    return {
        "clients": 64,
        "answers": counts[0],
        "tokens": counts[1],
        "largest_difference": worst[0],
        "least_difference_to_another_answer": min(others),
    }


def overload(folder: Path, model: ServedModel) -> dict[str, Any]:
    """The queue holds 16 requests; 160 clients ask without pause for a minute."""
    request = items(BATCH, 3)
    held = 16 * BATCH * (PROMPT + ANSWER)
    statuses: dict[str, int] = {}
    lock, over = threading.Lock(), threading.Event()
    with served(folder, "--queue-tokens", str(held), "--batch-tokens", str(held // 16)) as (url, process):
        client = RewardClient(url)
        client.token_rewards(request)
        before = most = process.memory_info().rss

        def ask() -> None:
            eager = RewardClient(url, tries=1)  # others wait for as long as the server asks
            while not over.is_set():
                try:
                    eager.token_rewards(request)
                    status = "200"
                except HostError as error:
                    found = re.search(r"answers (\d+)", str(error))
                    status = found[1] if found else "no answer"
                    time.sleep(0.2)
                with lock:
                    statuses[status] = statuses.get(status, 0) + 1

        with ThreadPoolExecutor(160) as pool:
            asking = [pool.submit(ask) for _ in range(160)]
            try:
                deadline = time.monotonic() + 60
                while time.monotonic() < deadline:
                    most = max(most, process.memory_info().rss)
                    time.sleep(0.1)
            finally:
                over.set()
        for one in asking:
            one.result()
        with urllib.request.urlopen(url + "/metrics") as response:
            figures = response.read().decode()
        queue = float(re.findall(r"^tlcr_queue_tokens (\S+)", figures, re.MULTILINE)[0])
        after = process.memory_info().rss
    mib = {"before": before / 2**20, "most": most / 2**20, "after": after / 2**20}
    return {"clients": 160, "queue_of_requests": 16, "statuses": statuses, "rss_mib": mib, "queue_tokens_after": queue}


PARTS = {"throughput": throughput, "latency": latency, "checked": checked, "overload": overload}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--discriminator", type=Path, help="a folder; default: a random one")
    parser.add_argument("--layers", type=int, default=6, help="of the random one; one layer is enough to check answers")
    parser.add_argument("--output", type=Path, help="a JSON file, in which these parts replace those of before")
    parser.add_argument("--part", nargs="*", choices=list(PARTS), default=list(PARTS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = arguments.discriminator or Path(name) / "discriminator"
        if arguments.discriminator is None:
            made_discriminator(folder, arguments.layers)
        model = ServedModel(str(folder), dtype="float32", device=torch.device("cpu"))
        for part in arguments.part:
            load = os.getloadavg()[0]
            found = {"facts": facts(load, model), **PARTS[part](folder, model)}
            print(json.dumps({part: found}, indent=1), flush=True)  # noqa: T201
            if arguments.output is not None:
                keep(arguments.output, part, found)


def facts(load: float, model: ServedModel) -> dict[str, Any]:
    """Of one part: where, when and by what it was measured, and how busy the machine was before."""
    packages = ("transformers", "starlette", "uvicorn", "locust")
    return {
        "date": datetime.date.today().isoformat(),
        "machine": machine(threads=1),
        "versions": versions(packages),
        "parameters": sum(weight.numel() for weight in model.model.parameters()),
        "load_before": load,
    }


def keep(path: Path, part: str, found: dict[str, Any]) -> None:
    """Writes a part into a file beside the parts that it has."""
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    write(path, {**kept, part: found})


if __name__ == "__main__":
    main()
