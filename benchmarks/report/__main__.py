"""Write docs/benchmarks.md and its plots from the result files.

    python -m benchmarks.report
    python -m benchmarks.report --results mine --page mine/benchmarks.md     figures of another machine

Reads every JSON file of the folder, whatever its name, and shows what there is. Needs no GPU, and measures nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import record
from benchmarks.report.page import render, write
from benchmarks.report.rows import read_results

RESULTS = record.ROOT / record.RESULTS
PAGE = record.ROOT / "docs" / "benchmarks.md"


def main() -> None:
    options = arguments()
    page = render(read_results(options.results), folder=options.page.stem)
    write(page, options.page)


def arguments() -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--page", type=Path, default=PAGE, help="the Markdown file; its plots go to a folder beside it")
    options = parser.parse_args()
    if options.results != RESULTS and not options.results.is_dir():
        parser.error(f"--results {options.results} is no folder")
    return options


if __name__ == "__main__":
    main()
