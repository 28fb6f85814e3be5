"""The report: complete in itself, escaped, its figures those of results.json, and no part missing without a word."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console

from tests.report.run_folders import MACHINE, NASTY, add_stages, evaluation, write_run
from tlcr.cli.main import main
from tlcr.errors import DataError
from tlcr.report.figures import ARM_COLOURS, STEPS, _between, arm_colour, arm_marker, curve_panels, mean_curve
from tlcr.report.page import HELD_OUT_TITLES, print_results, verdicts, write_report
from tlcr.report.results import gold_at_kl, read_runs
from tlcr.report.tokens import number

ARMS = {"continuous": 0.6, "sum-at-end": 0.35, "sequence": 0.2}


class Page(HTMLParser):
    """The tags of a page, the text of its table cells by table id, and whether every tag is closed in its place."""

    VOID = frozenset({"meta", "br", "hr", "img", "input", "link", "use", "path", "rect"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: dict[str, list[list[str]]] = {}
        self._table: str | None = None
        self.feed(text)
        assert not self.open

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self._table = dict(attrs).get("id")
        if self._table and tag == "tr":
            self.rows.setdefault(self._table, []).append([])
        if self._table and tag in ("td", "th"):
            self.rows[self._table][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in self.VOID:
            return
        assert self.open.pop() == tag
        if tag == "table":
            self._table = None

    def handle_data(self, data: str) -> None:
        if self._table and {"td", "th"} & set(self.open):
            self.rows[self._table][-1][-1] += data


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("runs") / "made-up", ARMS)
    add_stages(folder)
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def text(run: Path) -> str:
    return (run / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def test_nothing_comes_from_outside(text: str, page: Page) -> None:
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "img", "base", "object", "embed")
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "action"):
                assert value is not None and value.startswith("#"), (tag, name, value)
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)


def test_what_the_model_wrote_is_text(text: str, page: Page) -> None:
    assert NASTY not in text
    assert "&lt;script&gt;" in text
    assert sum(tag == "script" for tag, _ in page.tags) == 0  # the page works without JavaScript


def test_every_anchor_leads_somewhere(page: Page) -> None:
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    links = [a["href"] for tag, a in page.tags if tag == "a"]
    assert links and all(link is not None and link[1:] in ids for link in links)


def test_the_headline_holds_the_figures_of_results_json(run: Path, page: Page) -> None:
    results = json.loads((run / "results.json").read_text())
    header, *rows = page.rows["headline"]
    assert len(rows) == len(results["arms"]) == 3
    for row, arm in zip(rows, results["arms"], strict=True):
        assert len(row) == len(header)
        cells = [" ".join(cell.split()) for cell in row]
        gold, kl = arm["after"]["gold_per_token"], arm["after"]["kl_per_token"]
        assert cells[0] == arm["name"]
        assert cells[1].startswith(number(arm["before"]["gold_per_token"]["mean"]))
        assert cells[2] == f"{number(gold['mean'])} ± {number(gold['sd'])}"
        assert cells[4] == f"{number(kl['mean'])} ± {number(kl['sd'])}"
        assert cells[6].startswith(number(arm["after"]["length"]["mean"], 1))
    exact = {float(a["data-value"] or "nan") for _, a in page.tags if "data-value" in a}
    assert {arm["after"]["gold_per_token"]["mean"] for arm in results["arms"]} <= exact
    paired = {row[0]: row for row in page.rows["paired"][1:]}
    for comparison in results["frontier"]["comparisons"]:
        assert paired[comparison["other"]][4].strip() == number(comparison["difference"])
    assert 0.8765 in exact  # the discriminator's AUC


def test_the_other_models_are_judged_on_held_out_data(text: str) -> None:
    assert ">0.712<" in text and ">0.432<" not in text


def test_a_changed_figure_shows(tmp_path: Path) -> None:
    """The page follows the files: another gold there is another figure here."""
    folder = write_run(tmp_path / "run", {"continuous": 0.6}, seeds=(0,))
    before = write_report(folder).read_text()
    path = folder / "ppo" / "continuous" / "seed-0" / "evaluation.json"
    evaluation = json.loads(path.read_text())
    evaluation["after"]["gold_per_token"] = 0.98765
    path.write_text(json.dumps(evaluation))
    after = write_report(folder).read_text()
    assert "0.988" in after and "0.988" not in before


def test_tokens_are_coloured_by_sign_and_size(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", {"continuous": 0.6}, seeds=(0,), answers=1)
    path = folder / "ppo" / "continuous" / "seed-0" / "samples.jsonl"
    line = json.loads(path.read_text().splitlines()[0])
    line |= {
        "tokens": ["a", "b", "c"],
        "reward": [1.0, -1.0, 0.0],
        "advantage": [],
        "value": [0, 0, 0],
        "kl": [0, 0.5, 1],
    }
    path.write_text(json.dumps(line) + "\n")
    tokens = [a for tag, a in Page(write_report(folder).read_text()).tags if a.get("class") == "t"]
    styles = [dict(part.split(":") for part in (a.get("style") or "").split(";") if part) for a in tokens]
    assert [style["--reward"] for style in styles] == ["#2f7ed8d7", "#e6820ed7", "#e6820e00"]
    assert [style["--kl"] for style in styles] == ["#e6820e00", "#2f7ed86c", "#2f7ed8d7"]
    assert all("--advantage" not in style and "--value" not in style for style in styles)
    assert tokens[1]["data-figures"] == "“b”: reward −1.000, value 0.000, kl 0.500"  # noqa: RUF001
    assert "There is no advantage in these samples." in (folder / "report.html").read_text()


def test_arms_keep_their_colour(text: str) -> None:
    for colour in ARM_COLOURS[:3]:
        assert text.lower().count(colour.lower()) > 3  # dots, frontier and curves
    assert ARM_COLOURS[3].lower() not in text.lower()
    assert text.count("<svg") == text.count('role="img"') == 12  # two frontiers, three proxies, five curves, two more
    assert "#123456" not in text  # the ink became the page's own colour


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        ("ppo", "No policy has been trained and evaluated in this run yet"),
        ("discriminator", "No discriminator was trained and evaluated in this run"),
        ("labels", "No token labels were made in this run"),
        ("config.yaml", "has no config.yaml"),
        ("ppo/continuous/seed-0/samples.jsonl", "No answers were kept in this run"),
        ("ppo/continuous/seed-0/metrics.jsonl", "There are no training curves"),
    ],
)
def test_what_is_missing_is_said(tmp_path: Path, missing: str, sentence: str) -> None:
    folder = write_run(tmp_path / "run", {"continuous": 0.6}, seeds=(0,))
    add_stages(folder)
    assert sentence not in write_report(folder).read_text()
    target = folder / missing
    target.rename(tmp_path / "taken-away")
    text = write_report(folder).read_text()
    Page(text)
    assert sentence in text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("analysis/analysis.json", '{"kinds": [{"side": "left", "kind": "x"}]}'),
        ("analysis/analysis.json", "[1]"),
        ("discriminator/evaluation.json", '{"metrics": 3}'),
        ("discriminator/evaluation.json", '{"metrics": {"f1": "high"}}'),
        ("sft/done.json", '{"metrics": []}'),
        ("config.yaml", "arms: 3"),
        ("config.yaml", "arms: ["),
    ],
)
def test_a_file_of_another_form_is_named(name: str, text: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write_run(folder, ARMS)
    add_stages(folder)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match="as tlcr wrote it") as caught:
        write_report(folder)
    assert str(folder) in str(caught.value)


def test_a_run_that_did_nothing_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    text = write_report(tmp_path).read_text()
    Page(text)
    assert "versions that it was made with are not recorded" in text
    with pytest.raises(DataError, match="there is no run folder"):
        write_report(tmp_path / "nowhere")


def test_a_folder_without_a_run_keeps_what_it_holds(tmp_path: Path) -> None:
    for name in ("results.json", "results.md", "report.html", "frontier.svg"):
        (tmp_path / name).write_text("a stranger's", encoding="utf-8")
    for show in (write_report, print_results):
        with pytest.raises(DataError, match=r"holds no run \(no config.yaml, no ppo\); name the output_dir of a run"):
            show(tmp_path)
    assert {path.read_text(encoding="utf-8") for path in tmp_path.iterdir()} == {"a stranger's"}
    assert len(list(tmp_path.iterdir())) == 4
    assert main(["report", str(tmp_path)]) == 2


def test_without_a_scorer_the_arms_own_rewards_are_shown(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", {"continuous": 0.6, "sequence": 0.2}, seeds=(0,), scored=False)
    text = write_report(folder).read_text()
    header, row, _ = Page(text).rows["headline"]
    assert "Own reward per token" in header[1]
    assert [cell.strip() for cell in row[1:3]] == ["0.000", "1.800"]
    assert "There is no gold score in this run" in text
    assert 'href="#frontier"' not in text and "Gold against KL" not in text
    assert "| arm | own reward per token |" in (folder / "results.md").read_text()
    out = io.StringIO()
    print_results(folder, Console(file=out, width=80))
    assert "own reward per token" in out.getvalue() and "0.000 → 1.800" in out.getvalue()
    assert "–" not in out.getvalue()  # noqa: RUF001


def test_own_rewards_begin_on_a_scale_of_each_arm_s_own(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", {"a": 0.6, "b": 0.2}, seeds=(0,), scored=False, kl_coefs=(0.1, 0.2))
    for arm, own_reward in (("a", 5.0), ("b", -3.0)):
        for path in (folder / "ppo" / arm).rglob("evaluation.json"):
            evaluation = json.loads(path.read_text())
            evaluation["before"]["proxy_per_token"] = own_reward
            path.write_text(json.dumps(evaluation))
    out = io.StringIO()
    print_results(folder, Console(file=out, width=80))
    title, *rows = [line for line in out.getvalue().splitlines() if "before" in line or "@ 0." in line]
    assert "After PPO; before: 22.0 tokens" in title
    assert ["5.000 →" in row for row in rows] == ["a @" in row for row in rows] and len(rows) == 4
    assert ["-3.000 →" in row.replace("\u2212", "-") for row in rows] == ["b @" in row for row in rows]


@pytest.mark.parametrize(
    ("reward", "sentence"),
    [
        ("{kind: callable, callable: 'mine.py:score'}", "Here answers are paid by the function mine.py:score."),
        ("{kind: random}", "Here answers are paid by random numbers, a control."),
        ("{kind: dpo}", "Here answers are paid by the log-ratio of a policy trained by DPO."),
        ("{kind: uniform}", "Here answers are paid by the score that a reward model gives to a whole answer."),
        (
            "{kind: dpo, sequence_coef: 1.0}",
            "Here answers are paid by the log-ratio of a policy trained by DPO together with the score that a reward "
            "model gives to a whole answer.",
        ),
    ],
)
def test_a_page_tells_of_its_own_run(tmp_path: Path, reward: str, sentence: str) -> None:
    folder = write_run(tmp_path / "run", {"own": 0.6}, seeds=(0,))
    (folder / "config.yaml").write_text(f"model: {{path: a/model}}\narms:\n- name: own\n  reward: {reward}\n")
    text = write_report(folder).read_text()
    assert sentence in text
    for word in ("reviser", "iscriminator", "Token labels", "invented"):
        assert word not in text, word


def test_the_kl_is_the_exact_one_where_it_was_saved(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", {"continuous": 0.6}, seeds=(0,))
    path = folder / "ppo" / "continuous" / "seed-0" / "evaluation.json"
    evaluation = json.loads(path.read_text())
    evaluation["after"] |= {"kl_per_token": -0.002, "exact_kl_per_token": 0.0031}
    path.write_text(json.dumps(evaluation))
    (row,) = Page(write_report(folder).read_text()).rows["headline"][1:]
    assert row[4].strip() == "0.003"
    del evaluation["after"]["exact_kl_per_token"]
    path.write_text(json.dumps(evaluation))
    (row,) = Page(write_report(folder).read_text()).rows["headline"][1:]
    assert row[4].strip() == "−0.002"  # noqa: RUF001


def test_a_run_that_was_judged_again_by_others_is_its_ends_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Else its curve would go from the new scorer to that of training and back, and gold at equal KL be read there."""
    folder = write_run(tmp_path / "run", {"continuous": 0.6}, seeds=(0,))
    (path,) = folder.glob("ppo/continuous/seed-0/evaluation.json")
    same = {"prompts": 8, "scorer": None}
    evaluation = json.loads(path.read_text()) | {"settings": same, "on_the_way": same}
    path.write_text(json.dumps(evaluation))
    best = path.parent / "best" / "best.json"
    best.parent.mkdir()
    best.write_text(json.dumps({"update": 20, "max_kl": 0.5, "evaluation": evaluation["after"]}))
    (run,) = read_runs(folder)
    assert [point["update"] for point in run.curve] == [0, 10, 20, 30, 40, 50, 60] and run.best is not None
    path.write_text(json.dumps(evaluation | {"settings": same | {"scorer": "scorer.py:score"}}))
    (run,) = read_runs(folder)
    assert [point["update"] for point in run.curve] == [0, 60] and run.best is None
    assert run.curve[-1]["gold_per_token"] == evaluation["after"]["gold_per_token"]
    assert "evaluated again with {'prompts': 8, 'scorer': 'scorer.py:score'}" in caplog.text


@pytest.mark.parametrize("stage", HELD_OUT_TITLES)
def test_a_stage_that_was_evaluated_alone_shows_its_figures(stage: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", {"a": 0.3}, seeds=(0,))
    (folder / "config.yaml").write_text("model:\n  path: embedded\nreward:\n  kind: sequence\n")
    (folder / stage).mkdir()
    record = {"metrics": {"loss": 0.4321, "eval/pairwise_accuracy": 0.7123}, "seconds": 1.0}
    (folder / stage / "done.json").write_text(json.dumps(record))
    section = write_report(folder).read_text(encoding="utf-8").partition("<h2>Other models</h2>")[2]
    section = section.partition("</section>")[0]
    assert f"<h3>{HELD_OUT_TITLES[stage]}, on held-out data</h3>" in section
    assert "<td>pairwise accuracy</td><td>0.712</td>" in section and "0.432" not in section


def test_no_two_plots_share_a_name(text: str) -> None:
    names = re.findall(r'<clipPath id="([^"]+)"', text)
    assert names and len(names) == len(set(names))


def test_an_engines_mismatch_is_drawn_where_a_run_has_one(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", {"a": 0.3}, seeds=(0,))
    title = "Effective sample size of the engine"
    assert title not in write_report(folder).read_text(encoding="utf-8")
    (log,) = folder.glob("ppo/*/*/metrics.jsonl")
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    log.write_text("".join(json.dumps(row | {"mismatch/effective_share": 0.9}) + "\n" for row in rows))
    assert title in write_report(folder).read_text(encoding="utf-8")


def test_the_discriminators_drift_is_drawn_where_words_have_a_gold(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", {"a": 0.3, "b": 0.2}, seeds=(0, 1))
    label = "AUC and calibration error of the discriminator on the policy's own answers"
    assert label not in write_report(folder).read_text(encoding="utf-8")
    for log in folder.glob("ppo/a/*/metrics.jsonl"):
        rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        for row in rows:
            if "eval/length" in row:
                row |= {"eval/discriminator_auc": 0.9, "eval/discriminator_ece": 0.1}
        log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = write_report(folder).read_text(encoding="utf-8")
    assert f"{label}: a" in text and f"{label}: b" not in text  # b pays what no discriminator says
    curve = json.loads((folder / "results.json").read_text())["arms"][0]["seeds"][0]["curve"]
    assert [p["update"] for p in curve if p.get("discriminator_auc") == 0.9] == [
        10,
        20,
        30,
        40,
        50,
    ]  # the ends are in evaluation.json


def test_page_and_tables_say_which_policy_was_kept_and_why(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", {"a": 0.3, "b": 0.2}, seeds=(0, 1))
    assert "The policy that was kept" not in write_report(folder).read_text(encoding="utf-8")
    for seed, update in ((0, 20), (1, 40)):
        best = folder / "ppo" / "a" / f"seed-{seed}" / "best" / "best.json"
        best.parent.mkdir()
        judged = evaluation(0.5 + 0.1 * seed, 0.25)
        best.write_text(json.dumps({"update": update, "max_kl": 0.5, "evaluation": judged}))
    text = write_report(folder).read_text(encoding="utf-8")
    (_, row) = Page(text).rows["best"]
    results = json.loads((folder / "results.json").read_text())
    last = results["arms"][0]["after"]["gold_per_token"]
    assert row[:2] == ["a", "20, 40"] and row[2].startswith(number(0.55)) and row[3].startswith(number(last["mean"]))
    assert row[4].startswith(number(0.5)) and row[6].startswith(number(0.25))  # own reward and KL of the kept ones
    assert "a KL of at most 0.5 nats per token" in text
    assert results["arms"][1]["best"] is None and results["arms"][0]["seeds"][1]["best"]["update"] == 40
    line = next(row for row in (folder / "results.md").read_text().splitlines() if "| 20, 40 |" in row)
    assert line.startswith(f"| a | 20, 40 | {number(0.55)} [")


def test_that_no_policy_was_near_enough_to_be_kept_is_said(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", {"a": 0.3}, seeds=(0,))
    config = folder / "config.yaml"
    config.write_text(config.read_text() + "ppo:\n  keep_best: true\n")
    assert "No policy was kept" in write_report(folder).read_text(encoding="utf-8")


def test_updates_are_whole_numbers() -> None:
    (plot,) = curve_panels([("Gold", {"a": [[(0.0, 1.0), (1.0, 2.0), (2.0, 3.0)]]})], ["a"])
    axis = plot[plot.index('id="matplotlib.axis_1"') : plot.index('id="matplotlib.axis_2"')]
    assert re.findall(r">([^<>\n]+)</text>", axis) == ["0", "1", "2", "PPO update"]


def test_the_page_is_the_same_each_time(run: Path, text: str) -> None:
    assert write_report(run).read_text(encoding="utf-8") == text


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine arms, more than there are colours, at two coefficients."""
    arms = {f"arm-{number}": 0.6 - 0.05 * number for number in range(9)}
    folder = write_run(tmp_path_factory.mktemp("runs") / "grid", arms, seeds=(0, 1), kl_coefs=(0.1, 0.02), updates=20)
    write_report(folder)
    return folder


def test_a_grid_has_a_row_for_each_arm_and_coefficient(grid: Path) -> None:
    text = (grid / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    header, *rows = page.rows["headline"]
    assert "KLcoefficient" in header[1] and len(rows) == 18 and all(len(row) == len(header) for row in rows)
    assert [row[1] for row in rows[:2]] == ["0.02", "0.1"]
    assert len(page.rows["matched"]) == len(page.rows["paired"]) + 1 == 10
    results = json.loads((grid / "results.json").read_text())
    level = results["frontier"]["levels"][0]["arms"]["arm-0"]
    cells = [" ".join(cell.split()) for cell in page.rows["matched"][1]]
    assert cells[1] == f"{number(level['mean'])} {number(level['interval'][0])} to {number(level['interval'][1])}"
    assert "at one KL coefficient after the other" in text and "Gold and what was maximised" in text
    # beyond the seven colours the figure names its lines itself
    assert "arm-8</text>" in text


@pytest.mark.parametrize("folder", ["run", "grid"])
def test_the_frontier_is_a_picture_of_its_own(folder: str, request: pytest.FixtureRequest) -> None:
    """That results.md shows: with a size, colours for dark pages, and every arm named, however few they are."""
    path: Path = request.getfixturevalue(folder)
    svg = (path / "frontier.svg").read_text(encoding="utf-8")
    root = ElementTree.fromstring(svg)
    assert root.tag.endswith("svg") and float(root.attrib["width"]) > 800 and "prefers-color-scheme:dark" in svg
    for arm in json.loads((path / "results.json").read_text())["arms"]:
        assert f"{arm['name']}</text>" in svg
    assert "(frontier.svg)" in (path / "results.md").read_text(encoding="utf-8")


def test_a_line_of_the_frontier_is_straight_where_the_tables_read_it_so() -> None:
    points = [(-0.01, 0.0), (0.25, 2.0), (9.0, 0.0)]
    way = _between(points)
    assert len(way) == 2 * STEPS + 1
    assert np.array(way)[[0, STEPS, 2 * STEPS]] == pytest.approx(np.array(points))
    curve = [{"kl_per_token": kl, "gold_per_token": gold} for kl, gold in points]
    for kl, gold in way:
        assert gold_at_kl(curve, kl - 1e-12) == pytest.approx(gold, abs=1e-6)
    assert list(_between(points[:1])) == [pytest.approx(points[0])] and list(_between([])) == []


def test_arms_of_one_colour_differ_in_marker() -> None:
    looks = [(arm_colour(index), arm_marker(index)) for index in range(49)]
    assert len(set(looks)) == 49


def test_the_tables_in_markdown_are_whole(grid: Path, run: Path, tmp_path: Path) -> None:
    for folder, columns, rows in ((grid, 7, 18), (run, 6, 3)):
        text = (folder / "results.md").read_text(encoding="utf-8")
        tables = [block.splitlines() for block in re.findall(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE)]
        assert len(tables) == 3
        for table in tables:
            assert len({line.count("|") for line in table}) == 1 and re.fullmatch(r"(\|---)+\|", table[1])
        assert tables[0][0].count("|") == columns + 1 and len(tables[0]) == rows + 2
        results = json.loads((folder / "results.json").read_text())
        first = results["arms"][0]["after"]["gold_per_token"]
        assert (
            f"{number(first['mean'])} [{number(first['interval'][0])}, {number(first['interval'][1])}]" in tables[0][2]
        )
        assert len(tables[2]) == len(results["frontier"]["comparisons"]) + 2
        difference = results["frontier"]["comparisons"][0]["difference"]
        assert f"| {number(difference)} [" in tables[2][2]
    (tmp_path / "config.yaml").touch()
    write_report(tmp_path)
    assert "No policy has been trained" in (tmp_path / "results.md").read_text(encoding="utf-8")


def test_page_and_tables_say_where_each_stage_ran(run: Path, tmp_path: Path) -> None:
    """Processor, instruction set and threads: with others the last bits of a result differ."""
    said = "SFT, reward model, discriminator on A CPU, AVX2, 2 threads; PPO on A CPU, AVX2, 1 thread"
    shared = write_run(tmp_path / "shared", {"continuous": 0.6}, seeds=(0,))
    add_stages(shared)
    record = json.loads((shared / "sft" / "done.json").read_text())
    record["machine"] = MACHINE | {"processes": 2, "gpu": "A GPU"}
    (shared / "sft" / "done.json").write_text(json.dumps(record))
    elsewhere = "SFT on A CPU, AVX2, 2 threads, 2 processes, A GPU; reward model, discriminator on A CPU"
    write_report(shared)
    for folder, sentence in ((run, said), (shared, elsewhere)):
        for name in ("report.html", "results.md"):
            assert sentence in (folder / name).read_text(encoding="utf-8"), (folder, name)


def test_whole_answers_are_compared_per_answer(tmp_path: Path) -> None:
    """Page, tables, plots and terminal take gold and KL per answer, and nothing that is compared is per token."""
    folder = write_run(tmp_path / "run", {"ours": 0.5, "theirs": 0.2}, seeds=(0, 1), updates=20)
    with (folder / "config.yaml").open("a", encoding="utf-8") as file:
        file.write("evaluation:\n  scorer: scorer.py:score\n")
    write_report(folder)
    results = json.loads((folder / "results.json").read_text())
    assert results["frontier"]["measure"] == "gold_per_answer" and results["frontier"]["against"] == "kl_per_answer"
    after = results["arms"][0]["after"]
    text = (folder / "report.html").read_text(encoding="utf-8")
    header, row, _ = Page(text).rows["headline"]
    assert header[2:5] == ["Gold per answerafter", "Gold per tokenafter", "KLnats per answer"]
    for column, measure in ((2, "gold_per_answer"), (3, "gold_per_token"), (4, "kl_per_answer")):
        assert row[column].startswith(number(after[measure]["mean"])), measure
    assert "gold per answer</text>" in text and "gold per token</text>" not in text
    assert "KL to the reference, nats per answer" in text
    tables = (folder / "results.md").read_text(encoding="utf-8")
    assert "Gold per answer at matched KL (nats per answer)" in tables and "per token" not in tables
    assert f"| ours | {number(after['gold_per_answer']['mean'])} [" in tables
    file = io.StringIO()
    print_results(folder, Console(file=file, width=80))
    assert "KL per answer" in file.getvalue() and "per token" not in file.getvalue()


def test_the_table_stands_in_eighty_columns(run: Path) -> None:
    file = io.StringIO()
    print_results(run, Console(file=file, width=80))
    printed = file.getvalue()
    assert max(map(len, printed.splitlines())) <= 80
    results = json.loads((run / "results.json").read_text())
    for arm in results["arms"]:
        row = next(line for line in printed.splitlines() if line.strip().startswith(arm["name"]))
        gold = arm["after"]["gold_per_token"]
        assert f"→ {number(gold['mean'])} ± {number(gold['sd'])}" in row
        assert number(arm["after"]["kl_per_token"]["mean"]) in row
    assert "over 3 seeds" in printed and "…" not in printed
    assert "continuous is ahead" in " ".join(printed.split())


def test_the_names_of_many_coefficients_stay_whole(tmp_path: Path) -> None:
    arms = {"attention-credit": 0.6, "sum-at-end": 0.3}
    folder = write_run(tmp_path / "run", arms, seeds=(0, 1, 2), kl_coefs=(0.1, 0.02), updates=20)
    file = io.StringIO()
    print_results(folder, Console(file=file, width=80))
    printed = file.getvalue()
    assert max(map(len, printed.splitlines())) <= 80
    for name in ("attention-credit @ 0.1", "attention-credit @ 0.02", "sum-at-end @ 0.02"):
        assert name in printed
    assert "→" not in printed and "before: gold −0.050, 22.0 tokens" in printed  # noqa: RUF001


def test_the_table_says_when_there_is_nothing(tmp_path: Path) -> None:
    folder, file = tmp_path / "x[" / "y]" / "[bold]z", io.StringIO()
    folder.mkdir(parents=True)
    (folder / "config.yaml").touch()
    print_results(folder, Console(file=file, width=1000))
    assert f"No policy has been evaluated in {folder} yet" in file.getvalue()


def test_verdicts_claim_no_more_than_the_seeds_do() -> None:
    side = {"mean": 0.5, "sd": 0.1, "seeds": 3}
    base = {"arm": "a", "other": "b", "kl": 0.5, "arm_gold": side, "other_gold": side, "seeds": [0, 1, 2]}

    def verdict(**figures: object) -> str:
        (sentence,) = verdicts({"per": "answer", "frontier": {"comparisons": [base | figures]}})
        return sentence

    assert verdict(difference=0.2, interval=None).startswith("At 0.500 nats per answer a earns 0.500 gold per answer")

    assert verdict(difference=0.2, interval=[0.1, 0.3]).endswith("a is ahead.")
    assert verdict(difference=-0.2, interval=[-0.3, -0.1]).endswith("b is ahead.")
    assert verdict(difference=0.2, interval=[-0.1, 0.5]).endswith("the seeds do not tell them apart.")
    assert verdict(difference=0.2, interval=None, seeds=[0]).endswith("one seed says nothing about chance.")
    undefined = base | {"difference": None, "interval": None}
    assert verdicts({"per": "token", "frontier": {"comparisons": [undefined]}}) == []
    assert verdicts({"per": "token", "frontier": None}) == []


def test_figures_for_people() -> None:
    assert number(-0.0004) == "0.000"
    assert number(-1.5, 1) == "−1.5"  # noqa: RUF001
    assert number(None) == "–"  # noqa: RUF001
    assert mean_curve([[(0, 1.0), (1, 3.0)], [(0, 3.0), (1, 5.0), (2, 9.0)]]) == [(0, 2.0), (1, 4.0)]
    assert mean_curve([]) == []
