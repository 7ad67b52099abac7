"""What a run of the tests says about its own cost."""

import types

import pytest
import spending


@pytest.fixture
def counted(monkeypatch):
    monkeypatch.setattr(spending, "cpu_seconds", lambda *whose: 60.0)
    options = {"costs": True}
    return spending.Spending(types.SimpleNamespace(getoption=lambda name, default=None: options.get(name, default)))


def test_what_is_traced_within_another_counts_once(counted):
    counted.add_span(spending.TRACING, 1, 2)
    counted.add_span(spending.TRACING, 0, 3)
    counted.add_span(spending.LOWERING, 3, 4)
    counted.add_span(spending.COMPILING, 4, 6)
    counted.count("/jax/compilation_cache/cache_hits")
    counted.count("/jax/compilation_cache/cache_misses")
    assert counted.take() == {"cpu": 60, "tracing": 4, "compiling": 2, "programs": 1, "from cache": 1}
    assert counted.take() == {"cpu": 0, "tracing": 0}


def test_the_last_line_adds_the_workers_to_the_process_that_started_them(counted):
    lines = []
    for cpu, yardsticks in ((90, [1.0, 2.0]), (210, [])):
        counted.pytest_testnodedown(
            types.SimpleNamespace(workeroutput={"spending": {"cpu": cpu, "yardsticks": yardsticks}})
        )
    counted.tests = {"a.py::test": {"cpu": 2.0, "programs": 3}, "b.py::test": {"cpu": 5.0}}
    counted.pytest_terminal_summary(types.SimpleNamespace(section=lines.append, write_line=lines.append))
    assert lines[-1] == "tests: 6.0 CPU minutes, 240 yardsticks of 1.50 CPU seconds"
    assert [line.split()[-1] for line in lines[2:5]] == ["all", "b.py::test", "a.py::test"]
    assert lines[4].split()[:5] == ["2.0", "0.0", "0.0", "3", "0"]
