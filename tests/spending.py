"""What a run of the tests costs: CPU time and compilations, beside a fixed piece of work on the same machine."""

import collections
import resource

import jax
import jax.numpy as jnp
import pytest
import unoptimized

COMPILING = "/jax/core/compile/backend_compile_duration"
TRACING = "/jax/core/compile/jaxpr_trace_duration"
LOWERING = "/jax/core/compile/jaxpr_to_mlir_module_duration"
# CPU seconds of a process from one yardstick to the next.
INTERVAL = 45


def cpu_seconds(*whose):
    """Of this process, and of those that it has started and waited for."""
    used = map(resource.getrusage, whose or (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in used)


def yardstick():
    """CPU seconds of tracing, compiling and running a program twelve times."""

    def loss(weights, x):
        for w in weights:
            x = jnp.tanh(x @ w) - jnp.mean(x, 0, keepdims=True)
        return jnp.sum(x * x)

    before = cpu_seconds()
    weights, x = [jnp.ones((4, 4))] * 6, jnp.ones((8, 4))
    kept = jax.config.jax_persistent_cache_min_compile_time_secs
    # What is not written to the cache is never found there.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
    for _ in range(12):
        jax.jit(jax.grad(lambda *a: loss(*a)), compiler_options=unoptimized.OPTIONS)(weights, x)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", kept)
    return cpu_seconds() - before


class Spending:
    """Counts in each process that runs tests; the one that the user started adds up and prints."""

    def __init__(self, config):
        self.config = config
        self.counts = collections.Counter()
        self.spans = []
        self.yardsticks = []
        self.since = self.measured = 0.0
        self.tests = {}
        self.workers = []

    def count(self, event, **_):
        self.counts["from cache"] += event == "/jax/compilation_cache/cache_hits"

    def add_span(self, event, start, end, **_):
        if event in (TRACING, LOWERING):
            # Programs are traced within others, and end before them.
            while self.spans and self.spans[-1][0] >= start:
                self.spans.pop()
            self.spans.append((start, end))
        elif event == COMPILING:
            self.counts["programs"] += 1
            self.counts["compiling"] += end - start

    def take(self):
        """What was counted since the last time."""
        now = cpu_seconds()
        taken = {**self.counts, "cpu": now - self.since, "tracing": sum(end - start for start, end in self.spans)}
        self.counts.clear()
        self.spans.clear()
        self.since = now
        return taken

    def pytest_collection_finish(self):
        self.take()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, call):
        report = yield
        if call.when == "teardown":
            report.user_properties.append(("spending", self.take()))
        return report

    def pytest_runtest_logfinish(self):
        if self.since - self.measured > INTERVAL and not self.config.getoption("numprocesses", None):
            self.yardsticks.append(yardstick())
            self.take()
            self.measured = self.since

    def pytest_runtest_logreport(self, report):
        spent = dict(report.user_properties).get("spending")
        if spent:
            self.tests[report.nodeid] = spent

    def totals(self):
        return {"cpu": cpu_seconds() - sum(self.yardsticks), "yardsticks": self.yardsticks}

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self):
        if hasattr(self.config, "workeroutput"):
            self.config.workeroutput["spending"] = self.totals()

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node):
        self.workers.append(getattr(node, "workeroutput", {}).get("spending", {"cpu": 0, "yardsticks": []}))

    def pytest_terminal_summary(self, terminalreporter):
        # Workers are children too, and report themselves what they used.
        own = {"cpu": cpu_seconds(resource.RUSAGE_SELF), "yardsticks": []} if self.workers else self.totals()
        everything = [own, *self.workers]
        cpu = sum(w["cpu"] for w in everything)
        pieces = [p for w in everything for p in w["yardsticks"]]
        line = f"tests: {cpu / 60:.1f} CPU minutes"
        if pieces:
            line += f", {cpu * len(pieces) / sum(pieces):.0f} yardsticks of {sum(pieces) / len(pieces):.2f} CPU seconds"
        if self.config.getoption("costs"):
            self.print_tables(terminalreporter)
        terminalreporter.write_line(line)

    def print_tables(self, terminalreporter):
        modules = collections.defaultdict(collections.Counter)
        for test, spent in self.tests.items():
            modules[test.partition("::")[0]].update(spent, tests=1)
        total = sum(modules.values(), collections.Counter())
        columns = ("cpu", "tracing", "compiling", "programs", "from cache", "tests")
        for title, rows in {"tests": self.tests, "modules": modules}.items():
            terminalreporter.section(f"most expensive {title}, in seconds")
            terminalreporter.write_line("".join(f"{c:>11}" for c in columns))
            for name, spent in [("all", total), *sorted(rows.items(), key=lambda row: -row[1]["cpu"])][:31]:
                numbers = (f"{spent.get(c, 0):11.1f}" if c in columns[:3] else f"{spent.get(c, 0):11}" for c in columns)
                terminalreporter.write_line("".join(numbers) + "  " + name)


def pytest_addoption(parser):
    parser.addoption("--costs", action="store_true", help="print the tests and modules that cost most")


def pytest_configure(config):
    spending = Spending(config)
    jax.monitoring.register_event_listener(spending.count)
    jax.monitoring.register_event_time_span_listener(spending.add_span)
    config.pluginmanager.register(spending, "spending")
