"""The arm `continuous` of the quickstart by each engine, from the same SFT model and discriminator: gold, KL and cost.

Usage: python .ci/quickstart_engines.py OUTPUT [--ways generate paged vllm server ahead] [--seeds 0 1 2]

The model is the embedded one with two heads of 32 in place of four of 16, which vLLM's attention on CPUs has not. The
ways take turns within each seed; `ahead` is `server` with rollout.ahead 1, by the same vLLM. A command that was cut
goes on where it was; a training that was cut begins anew, so that its cost is that of all of it. The vLLM is that of
.ci/engines.py. OUTPUT/costs.jsonl has what each PPO run took of the clock and of the processor, with its start and its
evaluations.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / ".ci")]

from engines import trainer_with_vllm  # noqa: E402
from vllm import ON_ONE_CPU, installed, processor_seconds, served  # noqa: E402

from tests.engines.real_vllm import say  # noqa: E402
from tlcr.cli.main import main as tlcr  # noqa: E402
from tlcr.data import embedded  # noqa: E402

CONFIG = str(ROOT / "examples" / "quickstart.yaml")
ARM = ["--arms", "[{name: continuous, kl_coefs: [0.15]}]", "--parallel", "1"]
WAYS = ("generate", "paged", "vllm", "server", "ahead")
BY_SERVER = {"server", "ahead"}


def main() -> None:
    options = arguments()
    output: Path = options.output.resolve()
    make_base(output / "base")
    done = {(row["way"], row["seed"]) for row in read_costs(output)}
    lacking = [(seed, way) for seed in options.seeds for way in options.ways if (way, seed) not in done]
    with ExitStack() as stack:
        python, address = dict.fromkeys(WAYS, sys.executable), ""
        if any(way == "vllm" for _, way in lacking):
            python["vllm"] = trainer_with_vllm(installed())
        if any(way in BY_SERVER for _, way in lacking):
            words = ["serve", str(output / "base" / "sft"), "--dtype", "float32", "--max-num-seqs", "128"]
            words += ["--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"]
            address = stack.enter_context(served(installed(), words, output))
        for seed, way in lacking:
            train(way, python[way], output, options.seeds[: options.seeds.index(seed) + 1], address)
    for way in options.ways:
        evaluate(output / way, options.seeds)
    table(output, options.ways, options.seeds)


def make_base(folder: Path) -> None:
    """The stages before PPO."""
    if (folder / "discriminator" / "done.json").exists():
        return
    embedded.build_model = partial(embedded.build_model, heads=2)
    for stage in ("sft", "discriminator"):
        if tlcr(["train", stage, CONFIG, "--output_dir", str(folder), "--resume", *ARM]):
            sys.exit(f"{stage} failed")


def train(way: str, python: str, output: Path, seeds: list[int], address: str) -> None:
    """The last of the seeds; the others are there."""
    if not (output / way).exists():
        copied(output / "base", output / way)
    # what a cut command left of it: its cost is not in costs.jsonl, and that of the rest would be too little
    shutil.rmtree(policy(output / way, seeds[-1]), ignore_errors=True)
    knobs = ["--rollout.engine", "server" if way in BY_SERVER else way]
    if way in BY_SERVER:
        knobs += ["--rollout.server", f"[{address}]", "--rollout.ahead", str(int(way == "ahead"))]
    before = clocks()
    tell(python, "run", output / way, seeds, ["--resume", *knobs])
    wall, trainer, everything = (now - then for now, then in zip(clocks(), before, strict=True))
    row = {"way": way, "seed": seeds[-1], "wall": wall, "trainer": trainer, "server": everything - trainer}
    say(json.dumps(row))
    with (output / "costs.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def copied(source: Path, target: Path, change: Callable[[Path], None] = lambda folder: None) -> None:
    """A copy, changed by a function, that has its name once it is whole; what a cut command left of it is deleted."""
    part = target.with_name(f"{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(source, part)
    change(part)
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)


def policy(folder: Path, seed: int) -> Path:
    return folder / "ppo" / "continuous" / f"seed-{seed}"


def read_costs(output: Path) -> list[dict]:
    path = output / "costs.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def evaluate(folder: Path, seeds: list[int]) -> None:
    """Once more by `generate`, in a copy: so that no difference comes from how the evaluations were sampled."""
    copy = folder.with_name(f"{folder.name}-by-generate")
    if not all((policy(copy, seed) / "evaluation.json").exists() for seed in seeds):
        knobs = ["--rollout.engine", "generate"]
        copied(folder, copy, lambda part: tell(sys.executable, "evaluate", part, seeds, knobs))


def tell(python: str, command: str, folder: Path, seeds: list[int], knobs: list[str]) -> None:
    settings = {**os.environ, **ON_ONE_CPU, "VLLM_LOGGING_LEVEL": "ERROR", "PYTHONPATH": str(ROOT)}
    words = [python, "-m", "tlcr", command, CONFIG, *ARM, "--output_dir", str(folder), "--seeds", str(seeds), *knobs]
    subprocess.run(words, check=True, cwd=ROOT, env=settings)


def clocks() -> tuple[float, float, float]:
    """Seconds: of the wall, of the processor by commands that have ended, and by all that this one has started."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.monotonic(), children.ru_utime + children.ru_stime, processor_seconds(os.getpid())


def table(output: Path, ways: list[str], seeds: list[int]) -> None:
    costs = read_costs(output)
    say("| way | gold per token | the same policies by `generate` | KL | tokens an answer | wall | trainer | server |")
    say("|---|---|---|---|---|---|---|---|")
    for way in ways:
        own, same = (after(output / name, seeds) for name in (way, f"{way}-by-generate"))
        cells = [spread(own["gold_per_token"], 3), spread(same["gold_per_token"], 3)]
        cells += [spread(own["kl_per_token"], 3), spread(own["length"], 1)]
        for clock in ("wall", "trainer", "server"):
            taken = [row[clock] for row in costs if row["way"] == way and row["seed"] in seeds]
            cells.append(f"{statistics.median(taken):.0f} s" if clock != "server" or way in BY_SERVER else "")
        say(f"| {way} | {' | '.join(cells)} |")


def after(folder: Path, seeds: list[int]) -> dict[str, list[float]]:
    """What the policies are worth after PPO, by seed."""
    paths = [policy(folder, seed) / "evaluation.json" for seed in seeds]
    found = [json.loads(path.read_text())["after"] for path in paths]
    return {name: [one[name] for one in found] for name in ("gold_per_token", "kl_per_token", "length")}


def spread(values: list[float], digits: int) -> str:
    """Mean and standard deviation over the seeds."""
    shown = f"{statistics.mean(values):.{digits}f}"
    return f"{shown} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else shown


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="everything goes here")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    return parser.parse_args()


if __name__ == "__main__":
    main()
