"""Ask for known vulnerabilities of the versions that are tested: pip-audit, by PyPI's answers and by those of OSV.

Usage: python .ci/audit.py [--without-an-answer-too]

Exit code 1: a version has a known vulnerability. Exit code 2: none was found, and neither service answered for every
version; with --without-an-answer-too that is a warning and no failure, because a network that is down says nothing of a
change.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ROOT / ".ci" / "versions" / "newest.txt"
PIP_AUDIT = "pip-audit==2.10.1"
SERVICES = ("pypi", "osv")


def asked(service: str, requirements: Path) -> tuple[list[dict[str, Any]], str]:
    """What a service says of each version, and the last line of what pip-audit says where it says nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        options = ["--disable-pip", "--no-deps", "--progress-spinner", "off", "--format", "json", "--output", report]
        done = subprocess.run(
            [
                *(Path(sys.executable).with_name("uv"), "tool", "run", "--from", PIP_AUDIT, "pip-audit"),
                *("--vulnerability-service", service, *options, "--requirement", requirements),
            ],
            capture_output=True,
            text=True,
        )
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return (
            (json.loads(report.read_text(encoding="utf-8"))["dependencies"], "") if report.exists() else ([], lines[-1])
        )


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--without-an-answer-too", action="store_true", help="do not fail where nobody answers")
    lenient = parser.parse_args(arguments).without_an_answer_too
    names = [line.partition(" ")[0] for line in VERSIONS.read_text(encoding="utf-8").splitlines() if "==" in line]
    unanswered, known = set(names), {}
    for service in SERVICES:
        found, problem = asked(service, VERSIONS)
        answered = {f"{one['name']}=={one['version']}" for one in found if "skip_reason" not in one}
        unanswered -= answered
        known |= {
            (one["name"], vulnerability["id"]): (one["version"], vulnerability)
            for one in found
            for vulnerability in one.get("vulns", [])
        }
        reason = problem or next((one["skip_reason"] for one in found if "skip_reason" in one), "")
        _say(f"{service} answered for {len(answered)} of {len(names)} versions{f': {reason}' if reason else ''}")
    for (name, number), (version, vulnerability) in sorted(known.items()):
        mended = ", ".join(vulnerability["fix_versions"]) or "no version yet"
        _say(f"FOUND {number} in {name} {version}, mended in {mended}: {vulnerability.get('description', '')[:300]}")
    if known:
        return 1
    if unanswered:
        _say(
            f"NOT AUDITED: {len(unanswered)} of {len(names)} versions, such as {min(unanswered)}: no service that "
            "knows of vulnerabilities answered for them; run make audit where pypi.org or api.osv.dev can be reached"
        )
        return 0 if lenient else 2
    _say(f"none of {len(names)} versions has a known vulnerability")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
