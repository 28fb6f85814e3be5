"""A plugin of pytest (``-p tests.whole``): what failed runs again alone only after a run that reached all its tests.

Where workers die again and again, xdist gives up on the tests that are left. The exit status is that of a run with a
failed test, and what failed may then pass, while nothing has run the others.
"""

from __future__ import annotations

import pytest

KEY = "tlcr/whole"


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        return
    if not config.getoption("lf"):
        config.pluginmanager.register(Reached(config))
    elif not config.cache.get(KEY, False):
        raise pytest.UsageError(
            "--last-failed: the run before ended without a report of each of its tests, wanted one that reached all of "
            "them; run make test (or make test-slow) again"
        )


class Reached:
    """Keeps, beside what failed, whether every test that was collected has a report."""

    def __init__(self, config: pytest.Config) -> None:
        self._cache, self._wanted, self._reached = config.cache, set[str](), set[str]()
        self._cache.set(KEY, False)  # for a process that is killed

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._wanted.update(item.nodeid for item in session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        self._wanted.update(ids)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._reached.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        self._cache.set(KEY, bool(self._wanted) and self._wanted <= self._reached)
