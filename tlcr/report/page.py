"""The report of a run: one HTML page that needs nothing but itself, and a table for the terminal.

Both show what `results.collect_results` found; no figure is computed twice. A part that the run does not have is
replaced by a sentence that says so.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from rich import box
from rich.console import Console
from rich.table import Table

from tlcr.config.schema import LOGIT_KINDS, SCORED_KINDS, RewardConfig
from tlcr.config.stages import CONFIG
from tlcr.files import atomic_write
from tlcr.report import analysis as analysis_page
from tlcr.report import figures, tokens
from tlcr.report.results import collect_results, models_folder, read_config, read_json, understood, write_results
from tlcr.report.tokens import number
from tlcr.training.checkpoint import as_plain
from tlcr.training.metrics import read_metrics

CURVES = {
    "eval/gold_per_{per}": "Gold per {per}, held-out prompts",
    "reward/mean_score": "Reward per token, KL aside (each arm's own scale)",
    "kl/per_token": "KL to the reference, nats per token",
    "length/mean": "Length, tokens per answer",
    "policy/entropy": "Entropy, nats per token",
    "length/ended_share": "Share of answers that end by themselves",
    "value/explained_variance": "Explained variance, against lambda-returns",
    "value/explained_variance_mc": "Explained variance, against what was paid",
    "policy/clip_fraction": "Share of tokens whose update was clipped",
    "mismatch/effective_share": "Effective sample size of the engine's tokens, as a share of them",
    "mismatch/kl": "KL of the engine to the policy, nats per token",
    "mismatch/log_weight": "Mean log importance weight of the engine's tokens, nats",
    "mismatch/weight_max": "Largest importance weight of the engine's tokens",
    "mismatch/cut_share": "Share of tokens whose importance weight was cut",
}

DISCRIMINATOR_METRICS = {
    "auc_positive_negative": ("ROC-AUC, positive against negative tokens", "0.5 is chance, 1 is perfect"),
    "auc_negative_rest": ("ROC-AUC, negative against all other tokens", "can it find what a reviser would remove?"),
    "auc_positive_rest": ("ROC-AUC, positive against all other tokens", "can it find what a reviser would add?"),
    "f1": ("F1 on edited tokens", "positive class, called positive where the reward is above 0"),
    "pairwise_accuracy": ("Pairwise accuracy", "the revised answer has the higher mean token score"),
    "pairwise_accuracy_preferences": ("Pairwise accuracy on preferences", "the same for chosen against rejected"),
    "ece_before": ("Calibration error as trained", "mean |confidence - truth|; 0 is perfect"),
    "ece_after": ("Calibration error after temperature", "fitted on the other half of the held-out pairs"),
    "mean_reward_negative": ("Mean reward of negative tokens", "should be below 0"),
    "mean_reward_neutral": ("Mean reward of kept tokens", "should be near 0"),
    "mean_reward_positive": ("Mean reward of positive tokens", "should be above 0"),
}

STAGES = {
    "sft": "SFT",
    "reward_model": "reward model",
    "q_model": "Q model",
    "dpo": "DPO",
    "discriminator": "discriminator",
    "ppo": "PPO",
}


HELD_OUT_TITLES = {
    "reward_model": "Sequence reward model (the baseline)",
    "q_model": "Q model (values of tokens, learned from preferences)",
    "dpo": "DPO (its log-ratio is a reward)",
    "sft": "Supervised fine-tuning (the reference)",
}
"""The stages whose held-out figures the page has, in its order."""


def write_report(run_folder: str | Path) -> Path:
    """Write results.json, results.md (its tables), frontier.svg and report.html of a run; return the page's path.

    Raises DataError where the folder does not exist or holds no run, or a file in it cannot be read.
    """
    folder = Path(run_folder)
    with understood(folder):
        results = write_results(folder)
        texts = {"results.md": render_tables(results), "report.html": render(folder, results)}
        if results["frontier"] is not None:
            texts["frontier.svg"] = figures.as_file(frontier_figure(results))
    for name, text in texts.items():
        with atomic_write(folder / name) as aside:
            aside.write_text(text, encoding="utf-8")
    return folder / "report.html"


def _template(name: str, *, html: bool) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tlcr.report"),
        autoescape=html,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["number"] = number
    return environment.get_template(name)


def _tables(results: Mapping[str, Any]) -> dict[str, Any]:
    """What the tables of page and Markdown show."""
    arms = list(dict.fromkeys(arm["name"] for arm in results["arms"]))
    rows = [{**arm, "colour": figures.arm_colour(arms.index(arm["name"]))} for arm in results["arms"]]
    return {
        "rows": rows,
        "arms": [{"name": arm, "colour": figures.arm_colour(index)} for index, arm in enumerate(arms)],
        "compares_kl": any(arm["kl_coef"] is not None for arm in results["arms"]),
        "seeds": sorted({seed["seed"] for arm in results["arms"] for seed in arm["seeds"]}),
        "frontier": results["frontier"],
        "measure": _measure(results),
        "per": results["per"],
        "other_per": "token" if results["per"] == "answer" else "answer",
        "best": [{**row, **row["best"]} for row in rows if row["best"] is not None],
        "machines": [_machine(entry) for entry in results["machines"]],
    }


def _measure(results: Mapping[str, Any]) -> str:
    """What the arms are judged by: gold, or the arm's own reward ("proxy") in a run without a scorer."""
    has_gold = any(arm["after"]["gold_per_token"] is not None for arm in results["arms"])
    return "gold" if has_gold or not results["arms"] else "proxy"


def _rewards(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The reward of every arm, as the config has it; defaults that an old config lacks are filled in."""
    own = config.get("reward") or {}
    rewards = [arm.get("reward") or own for arm in config.get("arms") or []] or [own]
    return [{**as_plain(RewardConfig()), **reward} for reward in rewards]


def _machine(entry: Mapping[str, Any]) -> str:
    """One of results["machines"] in words: "PPO on AMD EPYC, AVX512, 1 thread"."""
    machine = entry["machine"]
    facts = [machine["processor"], machine["instructions"], _count(machine["threads"], "thread", "threads")]
    if machine["processes"] > 1:
        facts.append(_count(machine["processes"], "process", "processes"))
    if machine["gpu"] is not None:
        facts.append(machine["gpu"])
    return f"{', '.join(STAGES[stage] for stage in entry['stages'])} on {', '.join(facts)}"


def _count(number: int, one: str, several: str) -> str:
    return f"{number} {one if number == 1 else several}"


def render_tables(results: Mapping[str, Any]) -> str:
    """The tables as Markdown."""
    return _template("results.md.j2", html=False).render(**_tables(results))


def render(folder: Path, results: Mapping[str, Any]) -> str:
    """The page as text."""
    arms = list(dict.fromkeys(arm["name"] for arm in results["arms"]))
    config = read_config(folder)
    rewards = _rewards(config)
    embedded = (config.get("model") or {}).get("path") == "embedded"
    analysis_path = models_folder(folder) / "analysis" / "analysis.json"
    analysis = read_json(analysis_path) if analysis_path.exists() else None
    with understood(analysis_path):
        analysed = analysis_page.section(analysis)
        edit = tokens.drawn_edit((analysis or {}).get("example"), embedded_task=embedded)
    curves = _curves(folder, results, arms)
    # a page that has nothing else to begin with begins with the first curve
    begins_with_curve = results["frontier"] is None and (analysis or {}).get("example") is None
    first_curve = Markup(curves.pop(0)) if curves and begins_with_curve else None
    name = folder.resolve().name
    return _template("report.html.j2", html=True).render(
        **_tables(results),
        name=name,
        verdicts=verdicts(results),
        keeps_best=bool((config.get("ppo") or {}).get("keep_best")),
        uses_discriminator=any(reward["kind"] in LOGIT_KINDS for reward in rewards),
        others=_other_rewards(rewards),
        edit=edit,
        frontier_plot=_frontier_plots(results),
        proxy_plot=_proxy_plot(results, arms),
        first_curve=first_curve,
        curves_plot=figures.panels(curves) if curves else None,
        discriminator=_discriminator(models_folder(folder)),
        drift_plot=_drift_plot(results, arms),
        analysis=analysed,
        labels=results["stages"].get("labels"),
        labels_plot=_labels_plot(results["stages"].get("labels")),
        stages={name: held for name in HELD_OUT_TITLES if (held := _held_out(results["stages"].get(name)))},
        held_out_titles=HELD_OUT_TITLES,
        answers=tokens.answers(folder, results, embedded_task=embedded),
        token_measures=tokens.measures(embedded),
        config=(folder / CONFIG).read_text(encoding="utf-8") if (folder / CONFIG).exists() else None,
        embedded=embedded,
        command=shlex.join(["tlcr", "run", f"{name}/config.yaml", "--output_dir", f"{name}-again"]),
        versions=results["versions"],
    )


def verdicts(results: Mapping[str, Any]) -> list[str]:
    """What the seeds say of the first arm against each other one, a sentence each."""
    sentences = []
    per = results["per"]
    for c in (results["frontier"] or {}).get("comparisons", []):
        if c["difference"] is None:
            continue
        sentence = (
            f"At {number(c['kl'])} nats per {per} {c['arm']} earns {number(c['arm_gold']['mean'])} gold per {per} and "
            f"{c['other']} {number(c['other_gold']['mean'])}, a difference of {number(c['difference'])}"
        )
        if c["interval"] is None:
            sentence += "; one seed says nothing about chance."
        else:
            low, high = c["interval"]
            sentence += f" (95% interval {number(low)} to {number(high)} over {len(c['seeds'])} seeds)"
            better = c["arm"] if low > 0 else c["other"] if high < 0 else None
            sentence += f": {better} is ahead." if better else ": the seeds do not tell them apart."
        sentences.append(sentence)
    return sentences


def _other_rewards(rewards: Sequence[Mapping[str, Any]]) -> list[str]:
    """What rewards that read no discriminator pay for, in words, each once."""
    score, words = "the score that a reward model gives to a whole answer", []
    for reward in rewards:
        kind = reward["kind"]
        own = {
            "callable": f"the function {reward['callable']}",
            "q": "a token-level Q function learned from preferences",
            "dpo": "the log-ratio of a policy trained by DPO",
            "random": "random numbers, a control",
        }.get(kind)
        scored = kind in SCORED_KINDS or bool(reward["sequence_coef"])
        if own or scored:
            words.append(f"{own} together with {score}" if own and scored else own or score)
    return list(dict.fromkeys(words))


def print_results(run_folder: str | Path, console: Console | None = None) -> None:
    """Print the table of a run: gold, KL, length and ended share of every arm, and what the seeds say."""
    with understood(Path(run_folder)):
        results = collect_results(run_folder)
    console = console or Console()
    if not results["arms"]:
        console.print(
            f"No policy has been evaluated in {run_folder} yet; 'tlcr run' trains and evaluates the arms.", markup=False
        )
        return
    counts = sorted({len(arm["seeds"]) for arm in results["arms"]})
    several = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    seeds = "one seed" if counts == [1] else f"mean ± sd over {several} seeds"
    per, measure = results["per"], _measure(results)
    judged = "gold" if measure == "gold" else "own reward"
    compares_kl = any(arm["kl_coef"] is not None for arm in results["arms"])
    title = f"Held-out prompts, {seeds}"
    same_start = compares_kl and measure == "gold"  # an own reward is on its arm's own scale
    if compares_kl:  # names are longer then, and what all arms begin with is said once
        before = results["arms"][0]["before"]
        start = f"{judged} {_mean(before[f'{measure}_per_{per}'])}, " if same_start else ""
        start += f"{_mean(before['length'], 1)} tokens"
        title = f"After PPO; before: {start}. {title}"
    # Few columns, so that it stands in 80 characters without cutting a figure.
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("arm @ KL coefficient" if compares_kl else "arm", overflow="fold")
    for heading in (f"{judged} per {per}", f"KL per {per}", "tokens", "ended"):
        table.add_column(heading, justify="right", no_wrap=True)
    for arm in results["arms"]:
        before, after = arm["before"], arm["after"]
        value, length = _spread(after[f"{measure}_per_{per}"]), _mean(after["length"], 1)
        table.add_row(
            arm["name"] if arm["kl_coef"] is None else f"{arm['name']} @ {arm['kl_coef']}",
            value if same_start else f"{_mean(before[f'{measure}_per_{per}'])} → {value}",
            _spread(after[f"kl_per_{per}"]),
            length if compares_kl else f"{_mean(before['length'], 1)} → {length}",
            _mean(after["ended_share"], 2),
        )
    console.print(table)
    if measure == "proxy":
        console.print("No scorer was set (evaluation.scorer): an arm's own reward says nothing of another arm's.")
    for sentence in verdicts(results):
        console.print(sentence, highlight=False, markup=False)


def _mean(mean: Mapping[str, Any] | None, digits: int = 3) -> str:
    return number(None if mean is None else mean["mean"], digits)


def _spread(mean: Mapping[str, Any] | None, digits: int = 3) -> str:
    spread = f" ± {number(mean['sd'], digits)}" if mean is not None and mean["sd"] is not None else ""
    return _mean(mean, digits) + spread


# ---- plots


def _along(results: Mapping[str, Any], measure: str) -> dict[str, tuple[list[figures.Curve], figures.Curve]]:
    """Each arm's paths as (KL, measure), both per token or per answer: that of every seed, and their mean at the same
    stop. measure: gold or proxy."""
    measure, against = f"{measure}_per_{results['per']}", f"kl_per_{results['per']}"
    found: dict[str, tuple[list[figures.Curve], figures.Curve]] = {}
    for arm, by_seed in results["paths"].items():
        ways = [
            [
                (p["stop"], p[against], p[measure])
                for p in way
                if p.get(against) is not None and p.get(measure) is not None
            ]
            for way in by_seed.values()
        ]
        ways = [way for way in ways if way]
        if ways:
            kl = dict(figures.mean_curve([[(stop, x) for stop, x, _ in way] for way in ways]))
            height = dict(figures.mean_curve([[(stop, y) for stop, _, y in way] for way in ways]))
            mean = [(kl[stop], height[stop]) for stop in kl]
            found[arm] = [[(x, y) for _, x, y in way] for way in ways], mean
    return found


def _frontier_plots(results: Mapping[str, Any]) -> Markup | None:
    if results["frontier"] is None:
        return None
    return figures.wide_and_narrow(frontier_figure(results), frontier_figure(results, narrow=True))


def frontier_figure(results: Mapping[str, Any], *, measure: str = "gold", narrow: bool = False) -> str:
    """Gold against KL for every arm, as an SVG picture.

    Args:
        results: `frontier`, `paths`, `per` and the names of `arms`, as ``collect_results`` has them.
        measure: what the gold is called.
        narrow: for a narrow screen.

    Returns:
        The picture.
    """
    arms = list(dict.fromkeys(arm["name"] for arm in results["arms"]))
    along = _along(results, "gold")
    by_arm = {arm: seeds for arm, (seeds, _) in along.items()}
    means = {arm: mean for arm, (_, mean) in along.items()}
    levels = [level["kl"] for level in results["frontier"]["levels"]]
    per = results["per"]
    label = f"{measure.capitalize()} per {per} against KL for every arm"
    return figures.frontier_plot(by_arm, means, arms, levels, per, label, measure=measure, narrow=narrow)


def _proxy_plot(results: Mapping[str, Any], arms: Sequence[str]) -> Markup | None:
    gold, proxy = (_along(results, measure) for measure in ("gold", "proxy"))
    both = {arm: (gold[arm][1], proxy[arm][1]) for arm in gold if arm in proxy}
    if not both:
        return None
    against = f"KL, nats per {results['per']}"
    return figures.panels(figures.paired_panels(both, arms, against, "Gold and the arm's own reward against KL"))


def _drift_plot(results: Mapping[str, Any], arms: Sequence[str]) -> Markup | None:
    """How the discriminator judges the policy's own answers as training goes on; None where words have no gold."""
    by_arm: dict[str, tuple[figures.Curve, figures.Curve]] = {}
    for name in arms:
        ways = [seed["curve"] for arm in results["arms"] if arm["name"] == name for seed in arm["seeds"]]
        auc, ece = (
            figures.mean_curve([[(p["update"], p[measure]) for p in way if p.get(measure) is not None] for way in ways])
            for measure in ("discriminator_auc", "discriminator_ece")
        )
        if len(auc) > 1 and len(ece) > 1:
            by_arm[name] = auc, ece
    if not by_arm:
        return None
    label = "AUC and calibration error of the discriminator on the policy's own answers"
    return figures.panels(figures.paired_panels(by_arm, arms, "PPO update", label))


def _curves(folder: Path, results: Mapping[str, Any], arms: Sequence[str]) -> list[str]:
    """A plot for each metric of training that was logged twice or more."""
    titled = []
    rows = {
        (arm["name"], path): read_metrics(path)
        for arm in results["arms"]
        for seed in arm["seeds"]
        if (path := folder / "ppo" / seed["folder"] / "metrics.jsonl").exists()
    }
    for template, title in CURVES.items():
        key = template.format(per=results["per"])
        by_arm: dict[str, list[figures.Curve]] = {}
        for (name, _), own in rows.items():
            curve = [(float(row["step"]), float(row[key])) for row in own if row.get(key) is not None]
            if len(curve) > 1:
                by_arm.setdefault(name, []).append(curve)
        if by_arm:
            titled.append((title.format(per=results["per"]), by_arm))
    return figures.curve_panels(titled, arms)


def _labels_plot(labels: Mapping[str, Any] | None) -> Markup | None:
    if not labels or not labels.get("edited_share_histogram"):
        return None
    return Markup(figures.histogram_plot(labels["edited_share_histogram"], "Pairs by their share of edited tokens"))


def _held_out(stage: Mapping[str, Any] | None) -> dict[str, Any]:
    """A stage's metrics on held-out data, which it logged as eval/<name>; none where it was not evaluated."""
    metrics = (stage or {}).get("metrics", {})
    return {key.removeprefix("eval/"): value for key, value in metrics.items() if key.startswith("eval/")}


def _discriminator(folder: Path) -> dict[str, Any] | None:
    path = folder / "discriminator" / "evaluation.json"
    if not path.exists():
        return None
    evaluation = read_json(path)
    with understood(path):
        metrics = evaluation.get("metrics", {})
        plot = None
        if evaluation.get("reliability"):
            plot = Markup(figures.reliability_plot(evaluation["reliability"], "Reliability of the discriminator"))
        rows = [
            {"title": title, "hint": hint, "value": metrics[key], "why": evaluation.get("undefined", {}).get(key)}
            for key, (title, hint) in DISCRIMINATOR_METRICS.items()
            if key in metrics
        ]
    return {"rows": rows, "plot": plot, "tokens": metrics.get("tokens"), "edited_share": metrics.get("edited_share")}


def write_analysis_page(folder: Path, analysis: Mapping[str, Any], name: str) -> Path:
    """analysis.html of a discriminator: what the report shows of it, and its calibration, as a page of its own."""
    plot = figures.reliability_plot(analysis["reliability"], "Reliability of the discriminator")
    text = _template("analysis_page.html.j2", html=True).render(
        name=name, analysis=analysis_page.section(analysis), reliability_plot=Markup(plot)
    )
    with atomic_write(folder / "analysis.html") as aside:
        aside.write_text(text, encoding="utf-8")
    return folder / "analysis.html"
