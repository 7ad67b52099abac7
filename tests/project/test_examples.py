"""Every example runs, prints what it should, and says in one line what is wrong with an option."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import unoptimized

ROOT = pathlib.Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
# multihost.py and the four short examples have tests of their own. These write to the folder --out.
WRITERS = ["digits", "port_from_torch", "recalibrate", "diagnose"]
NAMES = [*WRITERS, "data_parallel", "gradient_accumulation"]
# Without the eight devices of the other tests. Most of a fast run is compilation, without optimization and kept.
ENVIRONMENT = (
    os.environ
    | unoptimized.ENVIRONMENT
    | {
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or "",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "COLUMNS": "80",
    }
)


def start(name, *options):
    # Where the tests run in the background of a script, Ctrl-C is ignored, and would be in what they start.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [sys.executable, "-W", "error", EXAMPLES / f"{name}.py", *options],
            env=ENVIRONMENT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    finally:
        signal.signal(signal.SIGINT, before)


def run(name, *options):
    """Returns what the example prints, results and progress, after it has ended without an error."""
    with start(name, *options) as process:
        output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return output, errors


# What only the order of summation may change.
ROUNDING = 64 * float(np.finfo(np.float32).eps)


def numbers(text):
    return [float(number) for number in re.findall(r"[\d.]+e[+-]\d+", text)]


def check_digits(output):
    (found,) = re.findall(r"batches of 1 and of 256  agree, logits to (\S+)", output)
    assert float(found) < 1e-4


def check_port_from_torch(output):
    assert "to_torch returns the same state dicts, bit for bit" in output
    found = numbers(output)
    assert len(found) >= 4
    assert max(found) <= 1e-4


def check_diagnose(output):
    """The planted mistakes are found."""
    sections = re.split(r"─ (\w+)[\w ]* ─", output)
    kinds = {
        name: set(re.findall(r"^error: (\w+)", text, re.M))
        for name, text in zip(sections[1::2], sections[2::2], strict=True)
    }
    assert kinds["statistics"] >= {"untouched"}
    assert kinds["weights"] >= {"drift", "parting"}
    assert kinds["evaluated"] >= {"train_mode", "depends_on_batch"}


def check_data_parallel(output):
    (row,) = re.findall(r"│ largest (.*)", output)
    first, *others = numbers(row)
    assert (first, len(others)) == (0, 3)
    assert max(others) <= ROUNDING


def check_gradient_accumulation(output):
    """Gradients with fixed norms and the first norm's pooled statistics are exact, and nothing else is."""
    rows = [row for row in map(numbers, re.findall(r"│ \d+ of \d+ (.*)", output)) if row]
    assert len(rows) == 2
    assert [[n <= ROUNDING for n in row] for row in rows] == [[False, True, True, False, False]] * 2


CHECKS = {
    "digits": check_digits,
    "port_from_torch": check_port_from_torch,
    "diagnose": check_diagnose,
    "data_parallel": check_data_parallel,
    "gradient_accumulation": check_gradient_accumulation,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_fast_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output, errors = run(name, "--fast", *(("--out", "new/folder") if name in WRITERS else ()))
    assert "fast run of" in output.lower()
    assert [line for line in output.splitlines() if len(line) > 80] == []
    if name in CHECKS:
        CHECKS[name](output)
    # Where there is no terminal, a line in place of a bar.
    progress = {"digits": "training: 4 of 4", "recalibrate": "recalibrating: 3 of 3", "diagnose": "training: 60 of 60"}
    assert progress.get(name, "") in errors


@pytest.mark.slow
def test_interrupt(tmp_path):
    out = tmp_path / "out"
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background of a script
    try:
        process = start("diagnose", "--out", out)
    finally:
        signal.signal(signal.SIGINT, handler)
    with process:
        try:
            # The folder exists as soon as the options have been read.
            while not out.exists() and process.poll() is None:
                time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, output, errors) == (130, "", "diagnose.py: interrupted\n")
    assert list(out.iterdir()) == []


@pytest.mark.slow
def test_the_tour_prints_what_is_stored():
    run("run_tour", "--check")


WITHOUT = """
import runpy, sys
name, missing = sys.argv[1:]
sys.modules[missing] = None
sys.argv = [name]
runpy.run_path(name, run_name="__main__")
"""


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        *((name, "jax") for name in [*NAMES, "multihost"]),
        ("run_tour", "jax"),
        pytest.param("digits", "sklearn", marks=pytest.mark.slow),
        pytest.param("port_from_torch", "flax", marks=pytest.mark.slow),
    ],
)
def test_a_package_that_is_missing(name, missing):
    command = [sys.executable, "-W", "error", "-c", WITHOUT, EXAMPLES / f"{name}.py", missing]
    ended = subprocess.run(command, env=ENVIRONMENT | {"PYTHONPATH": str(EXAMPLES)}, capture_output=True, text=True)
    expected = f"{name}.py: {missing}: needed for this example; pip install 'jaxbn[examples]'\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "", expected)


@pytest.fixture
def command(monkeypatch):
    """The module _command, without its answers to Ctrl-C, which would end pytest, and to errors."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    before = signal.getsignal(signal.SIGINT)
    import _command

    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield _command
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("printed", "agrees"),
    [
        ("error 5e-07\nloss 0.12\n", True),
        ("error 1e-06\nloss 0.12\n", True),
        ("error 3e-06\nloss 0.12\n", False),
        ("error 1e-07\nloss 0.12\n", False),
        ("error 5e-07\nloss 0.13\n", False),
        ("error 0.05\nloss 0.12\n", False),
        ("error nan\nloss 0.12\n", False),
        ("error 5e-07\n", False),
    ],
)
def test_what_agrees_with_the_stored_output(command, printed, agrees):
    import run_tour

    assert run_tour.agree(printed, "error 5e-07\nloss 0.12\n") == agrees


def test_the_tour_has_no_traces_of_a_run():
    """So that storing the same output twice is no change."""
    for cell in json.loads((EXAMPLES / "tour.ipynb").read_text())["cells"]:
        assert cell["metadata"] == {}
        assert {output["name"] for output in cell.get("outputs", ())} <= {"stdout"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", "0"], "argument --epochs: expected a whole number, at least 1, got 0"),
        (["--epochs", "many"], "argument --epochs: expected a whole number, at least 1, got many"),
        (["--seed", "-1"], "argument --seed: expected a whole number, from 0 to 4294967295, got -1"),
        (["--fats"], "unrecognized arguments: --fats"),
        (["--out", "file"], "argument --out: expected a folder to write to, got file (File exists)"),
        (["--out", "file/folder"], "argument --out: expected a folder to write to, got file/folder (Not a directory)"),
    ],
)
def test_options_are_checked_first(command, options, message, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("file").touch()
    monkeypatch.setattr(sys, "argv", ["example.py", *options])
    with pytest.raises(SystemExit) as error:
        command.parse_arguments("An example.", epochs=1, out=True)
    assert error.value.code == 2
    assert capsys.readouterr() == ("", f"example.py: error: {message}; see --help\n")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_is_being_written_is_not_interrupted(command, tmp_path):
    def write():
        with command.uninterrupted():
            signal.raise_signal(signal.SIGINT)
            written.touch()

    written = tmp_path / "written"
    with pytest.raises(KeyboardInterrupt):
        write()
    assert written.exists()
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_lines_where_there_is_no_terminal(monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    from _progress import Progress

    progress = Progress("abcde", "training", 2)
    for step in progress:
        progress.note = f"at {step}" if step > "b" else ""
    assert capsys.readouterr() == ("", "training: 2 of 5\ntraining: 4 of 5, at d\ntraining: 5 of 5, at e\n")
