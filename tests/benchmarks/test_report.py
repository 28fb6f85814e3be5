"""The page on the benchmarks: the committed one is that of the committed results, and it says what the files say."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.report import figures, rows, tables
from benchmarks.report.__main__ import PAGE, RESULTS
from benchmarks.report.page import render, write
from tests.benchmarks import made_results as made

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The page on every kind of file but those of GPUs; names say nothing about what is in them."""
    folder = made.write(
        tmp_path_factory.mktemp("results"),
        b=made.ops_result(),
        a=made.ppo_result(),
        zz=made.ppo_result("SmolLM2-135M", "bfloat16", faster=1.4),
    )
    return render(rows.read_results(folder), folder="page")


def section(text: str, heading: str) -> str:
    """From a heading to the next one of its level or above."""
    level = re.escape(heading.split()[0])
    found = re.search(
        rf"^{re.escape(heading)}\n(.*?)(?=^#{{1,{len(level.replace(chr(92), ''))}}} |\Z)", text, re.M | re.S
    )
    assert found is not None, heading
    return found[1]


def cells(text: str) -> list[list[str]]:
    """The rows of the tables of a text, without their heads and rules."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rules = [index for index, line in enumerate(lines) if set(line) <= set("|-: ")]
    left_out = {*rules, *(index - 1 for index in rules)}
    kept = [line for index, line in enumerate(lines) if index not in left_out]
    return [[cell.strip().replace("\u00a0", " ") for cell in line.strip("|").split("|")] for line in kept]


def digest_of(svg: str) -> str:
    found = re.search(r'data-digest="(\w+)"', svg)
    assert found is not None
    return found[1]


# ---- the committed page


def test_the_committed_page_is_that_of_the_committed_results() -> None:
    page = render(rows.read_results(RESULTS), folder=PAGE.stem)
    assert PAGE.read_text(encoding="utf-8") == page.text, "make bench-report writes it anew"
    folder = PAGE.with_suffix("")
    committed = {f"{folder.name}/{path.name}": path.read_text(encoding="utf-8") for path in folder.glob("*.svg")}
    # Other versions of matplotlib draw other lines; the digest is that of the figures which they show.
    assert {name: digest_of(svg) for name, svg in committed.items()} == {
        name: digest_of(draw()) for name, draw in page.plots.items()
    }, "make bench-report draws them anew"


def test_the_page_shows_every_plot_and_no_other(everything: Any) -> None:
    assert set(re.findall(r"!\[[^\]]+\]\(([^)]+)\)", everything.text)) == set(everything.plots)
    assert {"page/b-speed.svg", "page/b-memory.svg", "page/b-bandwidth.svg", "page/ppo-cpu.svg"} <= set(
        everything.plots
    )


def test_plots_are_svg_files_for_light_and_dark_pages(everything: Any) -> None:
    from xml.etree import ElementTree

    for name, draw in everything.plots.items():
        svg = draw()
        root = ElementTree.fromstring(svg)
        assert root.tag == "{http://www.w3.org/2000/svg}svg" and root.get("role") == "img" and root.get("aria-label"), (
            name
        )
        assert "prefers-color-scheme:dark" in svg and "currentColor" in svg, name


def test_a_plot_s_digest_follows_its_figures() -> None:
    assert figures.digest({"a": [1.0, 2]}) == figures.digest({"a": [1.0, 2]}) != figures.digest({"a": [1.0, 3]})


def test_every_table_names_where_it_was_measured(everything: Any) -> None:
    lines = everything.text.splitlines()
    ends = [i for i, line in enumerate(lines) if line.startswith("|") and not lines[i + 1].startswith("|")]
    assert len(ends) > 10
    for end in ends:
        told = lines[end + 2]
        assert lines[end + 1] == "" and told.startswith("<sub>`python -m benchmarks."), (lines[end], told)
        assert made.COMMIT[:12] in told and "Made-up processor" in told and "torch 2.13.0" in told


@pytest.mark.parametrize(
    ("recorded", "shown"),
    [
        ("python benchmarks/ops.py --json ops_cpu.json", "python -m benchmarks.ops --json ops_cpu.json"),
        ("python benchmarks/ppo_step.py", "python -m benchmarks.ppo_step"),
        ("python -m benchmarks.ops --only fused_gae", "python -m benchmarks.ops --only fused_gae"),
        ("python mine.py benchmarks/ops.py", "python mine.py benchmarks/ops.py"),
    ],
)
def test_a_command_of_before_the_package_is_shown_as_it_is_today(tmp_path: Path, recorded: str, shown: str) -> None:
    folder = made.write(tmp_path, x=made.ppo_result() | {"command": recorded})
    text = render(rows.read_results(folder), folder="page").text
    assert f"<sub>`{shown}` on Made-up processor" in text
    assert ("it is in the result file" in text) == (recorded != shown)


def test_tables_are_whole(everything: Any) -> None:
    """Every line of a table has as many cells as its head: a bar in a name, or a lost line end, would show here."""
    widths: list[int] = []
    for line in [*everything.text.splitlines(), ""]:
        if line.startswith("|"):
            widths.append(len(re.findall(r"(?<!\\)\|", line)))
        elif widths:
            assert len(widths) > 2 and len(set(widths)) == 1, widths
            widths = []
    assert "||" not in everything.text and "None" not in everything.text and "nan" not in everything.text


def test_a_page_without_results_says_what_to_do() -> None:
    page = render([], folder="page")
    assert page.plots == {} and "No result file holds PPO rounds yet" in page.text
    assert (
        "No result file holds timings of ops yet" in page.text
        and "GPU figures of the ops are still to come" in page.text
    )
    assert "In short" not in page.text


# ---- GPU, and what did not run


def test_missing_gpu_figures_are_said_and_how_to_get_them(everything: Any) -> None:
    told = section(everything.text, "## GPU")
    assert "still to come" in told and "python -m benchmarks.ops --device cuda" in told and "make bench-report" in told
    assert "GPU: figures are still to come" in section(everything.text, "## In short")


def test_gpu_figures_are_shown_where_there_are_some(tmp_path: Path) -> None:
    files = rows.read_results(made.write(tmp_path, any_name=made.ops_result("cuda")))
    page = render(files, folder="page")
    assert "## Ops on GPU: Made-up GPU" in page.text and "GPU figures of the ops" not in page.text
    assert "GPU figures of PPO rounds are still to come:" in section(page.text, "## GPU")
    assert "by the clock “device”" in page.text and "| amortised | call | device |" in page.text


def test_what_did_not_run_is_listed_once_with_its_reason(everything: Any) -> None:
    assert cells(section(everything.text, "### What did not run")) == [
        ["torchrl", "fused_gae", "No module named 'torchrl'"]
    ]


def test_rivals_that_all_ran_are_not_made_up(tmp_path: Path) -> None:
    result = made.ops_result()
    result["rows"] = [row for row in result["rows"] if row["status"] == "measured"]
    page = render(rows.read_results(made.write(tmp_path, x=result)), folder="page")
    assert "Every rival ran." in section(page.text, "### What did not run")


# ---- speed


def test_the_fastest_rival_and_its_ratio(everything: Any) -> None:
    told = {row[0]: row for row in cells(section(everything.text, "### Speed").split("####")[0])}
    # 12 bytes of 1024 x 1024 at 8 GB/s and a microsecond; torch.compile takes 4 times that.
    seconds = 1e-6 + 12 * 2**20 / 8e9
    assert told["`fused_gae`, forward"] == [
        "`fused_gae`, forward",
        "B=1024 T=1024",
        f"{1e3 * seconds:.2f} ms ({0.98e3 * seconds:.2f} to {1.02e3 * seconds:.2f} ms)",
        "torch.compile",
        f"{4e3 * seconds:.2f} ms",
        "4.0×",  # noqa: RUF001
        "4.0× to 4.0× (8)",  # noqa: RUF001
    ]
    assert "`score_tokens`, with reference and KL, backward" in told
    assert not any("both" in name for name in told)  # its two parts are there


def test_where_a_rival_is_faster_is_said(everything: Any) -> None:
    lost = cells(section(everything.text, "#### Where a rival is faster"))
    assert len(lost) == 2 * 3 * len(made.SCORED) and {row[3] for row in lost} == {"Liger"}
    assert {row[5] for row in lost} == {"1.1×"}  # noqa: RUF001
    contests = 4 * 8 + len(lost)
    assert f"fastest in {contests - len(lost)} of {contests} comparisons" in everything.text.replace("\n", " ")


def test_the_shown_size_is_the_largest_that_the_most_rivals_ran_at(tmp_path: Path) -> None:
    shapes = [{"B": 64, "T": t} for t in (512, 1024, 2048, 4096)]
    found = [made.row("fused_gae", shape, "tlcr cpp", 1e-3) for shape in shapes]
    found += [made.row("fused_gae", shape, "eager torch", 2e-3) for shape in shapes]
    found += [made.row("fused_gae", shape, "TRL", 3e-3) for shape in shapes[:2]]
    (file,) = rows.read_results(made.write(tmp_path, x=made.ops_result() | {"rows": found}))
    (speed,) = tables.speeds(file)
    assert speed.contest.shape == {"B": 64, "T": 1024} and [row.implementation for row in speed.rivals] == [
        "eager torch",
        "TRL",
    ]
    assert speed.ratio == 2 and speed.sizes == 4


def test_a_reference_beside_a_kernel_is_not_what_tlcr_runs(tmp_path: Path) -> None:
    shape = {"B": 64, "T": 512}
    reference = made.row("fused_gae", shape, "tlcr reference", 1e-4)
    kernel = made.row("fused_gae", shape, "tlcr cpp", 1e-3)
    (file,) = rows.read_results(made.write(tmp_path, x=made.ops_result() | {"rows": [reference, kernel]}))
    assert tables.speeds(file)[0].ours.implementation == "tlcr cpp"
    (alone,) = rows.read_results(made.write(tmp_path, x=made.ops_result() | {"rows": [reference]}))
    assert tables.speeds(alone)[0].ours.implementation == "tlcr reference"


# ---- memory and bandwidth


def test_memory_is_told_of_all(everything: Any) -> None:
    told = {row[0]: row for row in cells(section(everything.text, "### Memory"))}
    assert told["`fused_gae`, forward"][2:] == [
        "12.0 MiB",
        "0 B",
        "torch.compile 4.00 MiB, eager torch 30.0 MiB, TRL 45.0 MiB, verl's loop 60.0 MiB",
    ]


def test_bandwidth_is_bytes_over_seconds_and_a_share_of_the_copy(everything: Any) -> None:
    told = {row[0]: row for row in cells(section(everything.text, "### Bandwidth"))}["`fused_reward`, forward"]
    # 12 MiB in 1.574 ms, and the made-up copy makes 10 GB/s.
    assert told[1:5] == ["3 s B T = 12.0 MiB", "B=1024 T=1024", "7.99 GB/s", "80%"]


# ---- growth


def growth_of(folder: Path, cost: made.Cost) -> Any:
    result = made.ops_result(cost=cost)
    result["rows"] = [row for row in result["rows"] if row["op"] == "fused_gae"]
    (file,) = rows.read_results(made.write(folder, x=result))
    found = tables.growths(file)
    return {growth.series.axis: growth for growth in found if growth.series.implementation == "tlcr cpp"}


def test_a_linear_op_doubles_with_its_size_and_is_not_named(tmp_path: Path, everything: Any) -> None:
    by_axis = growth_of(tmp_path, lambda shape: 1e-9 * math.prod(shape.values()))
    assert by_axis["B"].series.sizes == [16, 64, 256, 1024] and by_axis["B"].series.fixed == {"T": 1024}
    assert by_axis["T"].series.sizes == [256, 512, 1024, 2048, 4096] and by_axis["T"].series.fixed == {"B": 64}
    for growth in by_axis.values():
        assert growth.exponent == pytest.approx(1) and growth.last.doubling == pytest.approx(2)
        assert growth.interval == pytest.approx((1, 1)) and not any(step.faster for step in growth.steps)
    assert cells(section(everything.text, "#### What grows faster than linearly").split("<details>")[0]) == [
        ["nothing"] + [""] * 6
    ]


def test_super_linear_growth_is_named_with_its_exponent(tmp_path: Path) -> None:
    def cost(shape: Any) -> float:
        return float(1e-9 * shape["B"] * shape["T"] ** 1.5) if "T" in shape else made.linear(shape)

    growth = growth_of(tmp_path / "one", cost)["T"]
    assert growth.exponent == pytest.approx(1.5) and growth.faster_than_linear
    assert growth.last.doubling == pytest.approx(2**1.5)
    page = render(rows.read_results(made.write(tmp_path / "all", x=made.ops_result(cost=cost))), folder="page")
    named = cells(section(page.text, "#### What grows faster than linearly").split("<details>")[0])
    assert {(row[0], row[1], row[2]) for row in named if row[1] == "tlcr cpp"} == {
        (f"`{op}`, {direction}", "tlcr cpp", "T at B=64")
        for op in made.SMALL_OPS
        for direction in (("forward", "backward") if op == "ppo_loss" else ("forward",))
    }
    assert {row[4] for row in named} == {"2.8×"}  # noqa: RUF001


def test_a_single_steep_step_is_named_and_a_cache_that_it_leaves(tmp_path: Path) -> None:
    def cost(shape: Any) -> float:
        elements = math.prod(shape.values())
        return float(1e-9 * elements * (3 if elements >= 2**20 else 1))

    growth = growth_of(tmp_path, cost)["B"]
    assert [step.faster for step in growth.steps] == [False, False, True]
    assert growth.steepest.sizes == (256, 1024) and growth.steepest.exponent == pytest.approx(
        math.log(12) / math.log(4)
    )
    cache = 4 * 2**20  # which 3 MiB fit into and 12 MiB do not
    steep = tables.growth(growth.series, "processor", cache).steepest
    assert steep.leaves_cache and not tables.growth(growth.series, "processor", None).steepest.leaves_cache


def test_noise_is_not_growth(tmp_path: Path) -> None:
    result = made.ops_result()
    seconds = (1e-3, 2.3e-3, 4e-3, 8.8e-3)  # steps of 2.3, 1.7 and 2.2 for twice the size
    spread = [made.row("fused_gae", {"B": 2**k, "T": 64}, "tlcr cpp", s) for k, s in enumerate(seconds)]
    for row in spread:
        for timing in row["seconds"].values():
            timing["lower"], timing["upper"] = 0.8 * timing["median"], 1.2 * timing["median"]
    (file,) = rows.read_results(made.write(tmp_path, x=result | {"rows": spread}))
    (growth,) = tables.growths(file)
    assert growth.steepest.doubling == pytest.approx(2.3) and not growth.faster_than_linear


def test_too_few_sizes_are_no_curve(tmp_path: Path) -> None:
    two = [made.row("fused_gae", {"B": b, "T": 64}, "tlcr cpp", 1e-3) for b in (1, 2)]
    page = render(rows.read_results(made.write(tmp_path, x=made.ops_result() | {"rows": two})), folder="page")
    assert "not known: no axis has enough sizes" in page.text and "| nothing |" not in page.text


# ---- PPO


def test_ppo_rounds_are_told_with_ratios_to_trl(everything: Any) -> None:
    told = section(everything.text, "### PPO on the CPU")
    assert "**embedded size, float32**: 64 answers of 16 + 32 tokens" in told and "**SmolLM2-135M, bfloat16**" in told
    first = cells(told)[:3]
    # 0.69 s of phases, 2% beside them; 2048 tokens.
    assert first[0] == [
        *("tlcr", "200 ms", "60.0 ms", "30.0 ms", "400 ms", "704 ms (669 to 774 ms)"),
        *("2,910", "2.5×", "563 MiB", "0.55×"),  # noqa: RUF001
    ]
    assert first[1][7] == "4.2×" and first[2][7] == first[2][9] == ""  # noqa: RUF001
    assert cells(told)[3][7] == "1.4×"  # noqa: RUF001
    assert "tlcr, rollout 28%, score 9%, reward 4%, update 57%" in told


def test_a_ppo_file_without_trl_has_no_ratios(tmp_path: Path) -> None:
    result = made.ppo_result()
    result["rows"] = result["rows"][:2]
    page = render(rows.read_results(made.write(tmp_path, x=result)), folder="page")
    assert all(row[7] == row[9] == "" for row in cells(section(page.text, "### PPO on the CPU")))


# ---- files


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": 2}, "wanted schema 1"),
        ({"kind": "poem"}, "'kind': 'poem'"),
        ({"interpreted": True}, "says nothing of speed"),
        ({"commit": ...}, "KeyError: 'commit'"),
        ({"rows": [made.row("fused_gae", {"B": 1}, "x", 1.0) | {"status": "not run"}]}, "'not run'"),
    ],
)
def test_a_file_that_is_no_result_is_named(tmp_path: Path, change: Any, said: str) -> None:
    result = {key: value for key, value in (made.ops_result() | change).items() if value is not ...}
    with pytest.raises(SystemExit) as stopped:
        rows.read_results(made.write(tmp_path, odd=result))
    assert "odd.json" in str(stopped.value) and said in str(stopped.value)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "half.json").write_text(json.dumps(made.ops_result())[:100], encoding="utf-8")
    with pytest.raises(SystemExit, match=r"half\.json is no JSON"):
        rows.read_results(tmp_path)


def test_writing_takes_away_plots_that_are_no_longer_shown(tmp_path: Path) -> None:
    page = tmp_path / "docs" / "page.md"
    both = rows.read_results(made.write(tmp_path / "results", a=made.ppo_result(), b=made.ops_result()))
    write(render(both, folder="page"), page)
    (page.with_suffix("") / "mine.svg").write_text("<svg/>", encoding="utf-8")
    write(render([file for file in both if file.kind == "ppo_step"], folder="page"), page)
    assert sorted(path.name for path in page.with_suffix("").iterdir()) == ["mine.svg", "ppo-cpu.svg"]
    assert "page/ppo-cpu.svg" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0123, "12.3 ms"),
        (9.996e-4, "1.00 ms"),
        (1.5, "1.50 s"),
        (2.5e-7, "250 ns"),
        (123.4, "123 s"),
        (12345.0, "12,300 s"),
    ],
)
def test_durations_for_people(seconds: float, text: str) -> None:
    assert tables.duration(seconds).replace("\u00a0", " ") == text


def test_ranges_name_a_unit_once() -> None:
    assert tables.between(1e-3, 2e-3).split() == ["1.00", "to", "2.00", "ms"]
    assert tables.between(9e-4, 2e-3).split() == ["900", "µs", "to", "2.00", "ms"]
