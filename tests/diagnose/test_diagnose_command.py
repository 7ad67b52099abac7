"""What the command reads and prints, and what diagnosis refuses, in whole messages."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from diagnosis import MEAN, VAR, C, OnlyNorm, X, at, of_data, statistics
from flax import nnx, serialization

from jaxbn import diagnose
from jaxbn._extras import need


def spoiled_report():
    """All three severities, and numbers that JSON does not have."""
    changes = {"var": at(-1.0, at(1e-7, at(np.nan, VAR), 0), 1), "mean": at(0.0, MEAN, 0), "bias": at(99.0, VAR)}
    return diagnose.diagnose_statistics(statistics(**changes), decay=0.99, steps=100)


def test_ranking_text_and_json():
    report = spoiled_report()
    ranks = [("error", "warning", "note").index(f.severity) for f in report.findings]
    assert ranks == sorted(ranks)
    assert set(ranks) == {0, 1, 2}
    text = str(report)
    for f in report.findings:
        assert f.kind in text
        assert f.evidence[:40] in text
    loaded = json.loads(report.to_json(channels=True))
    assert loaded["layers"][0]["var"][2] == "nan"
    assert [f["kind"] for f in loaded["findings"]] == [f.kind for f in report.findings]
    assert json.loads(report.to_json())["layers"][0]["channels"] == C


def test_table_in_colour(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    report = spoiled_report()
    report = dataclasses.replace(report, layers=[dataclasses.replace(report.layers[0], path="a[0]")])
    report.print()
    printed = capsys.readouterr().out
    assert "a[0]" in printed
    assert "negative_variance" in printed


@pytest.mark.slow
def test_picture(tmp_path):
    for number, report in enumerate((spoiled_report(), diagnose.diagnose_linen(OnlyNorm(), of_data(X), X))):
        report.draw(tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").read_bytes().startswith(b"\x89PNG")


def save(kind, tree, folder):
    path = folder / f"net{kind}"
    flat = {"norm.mean": tree["batch_stats"]["norm"]["mean"], "norm.var": tree["batch_stats"]["norm"]["var"]}
    if kind == ".npz":
        np.savez(path, **flat)
    elif kind == ".safetensors":
        pytest.importorskip("safetensors.numpy").save_file(flat, path)
    elif kind == ".msgpack":
        path.write_bytes(serialization.to_bytes(tree))
    else:
        ocp = pytest.importorskip("orbax.checkpoint")
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, tree)
    return path


@pytest.mark.parametrize("kind", [".npz", ".safetensors", ".msgpack", ""])
def test_command(kind, tmp_path, capsys):
    healthy = save(kind, statistics(), tmp_path)
    assert diagnose.main([str(healthy), "--plain"]) == 0
    assert "1 norm layer: no findings" in capsys.readouterr().out
    (tmp_path / "bad").mkdir()
    bad = save(kind, statistics(mean=np.zeros(C), var=np.ones(C)), tmp_path / "bad")
    assert diagnose.main([str(bad), "--json", "--draw", str(tmp_path / "a.png")]) == 1
    assert json.loads(capsys.readouterr().out)["findings"][0]["kind"] == "untouched"
    assert (tmp_path / "a.png").exists()


def test_command_from_the_shell(tmp_path):
    path = save(".npz", statistics(var=-VAR), tmp_path)
    command = [sys.executable, "-W", "error", "-m", "jaxbn.diagnose", path]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (finished.returncode, finished.stderr) == (1, "")
    assert "negative_variance" in finished.stdout


def test_command_says_what_it_cannot_read(tmp_path, capsys):
    (tmp_path / "net.onnx").write_bytes(b"")
    for item in ("ema", "state"):
        (tmp_path / "3" / item).mkdir(parents=True)
        (tmp_path / "3" / item / "_METADATA").touch()
    (tmp_path / "3" / "config").mkdir()
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04")
    (tmp_path / "steps" / "3").mkdir(parents=True)
    for path, message in (
        (tmp_path / "none.npz", f"path: expected a checkpoint, got {tmp_path}/none.npz, which does not exist"),
        (
            tmp_path / "bad.npz",
            f"path: expected a file that numpy.savez wrote, got {tmp_path}/bad.npz; it is damaged, or something else",
        ),
        (
            tmp_path / "net.onnx",
            "path: expected .npz, .safetensors, .pt, .pth, .ckpt, .bin, .tar, .keras, .h5, .hdf5, .msgpack or a folder "
            "of Orbax, got net.onnx; for other files load the tree yourself and call "
            "jaxbn.diagnose.diagnose_statistics",
        ),
        (
            tmp_path / "3",
            f"path: expected the folder of one item, got {tmp_path}/3, which has the items ema, state; give "
            f"{tmp_path}/3/ema",
        ),
        (
            tmp_path / "steps",
            f"path: expected a folder that Orbax saved, got {tmp_path}/steps/3, which has no file _METADATA",
        ),
    ):
        assert diagnose.main([str(path)]) == 2
        assert capsys.readouterr().err == message + "\n"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: diagnose.diagnose_statistics({"dense": {"kernel": MEAN}}),
            ValueError,
            "tree: expected running statistics, arrays named mean and var (Flax, jaxbn), running_mean and "
            "running_var (PyTorch) or moving_mean and moving_variance (Keras), got dense/kernel; give the "
            "tree that has batch_stats",
        ),
        (
            lambda: diagnose.diagnose_statistics({"norm": {"mean": MEAN, "var": VAR[:2]}}),
            ValueError,
            "norm: expected mean and var of the same shape, got (6,) and (2,); the file is damaged, "
            "or these are not running statistics",
        ),
        (
            lambda: diagnose.diagnose_statistics(statistics(), replica_axis=0),
            ValueError,
            "replica_axis: expected norm/mean with an axis 0 of replicas before its channels, got shape (6,); "
            "leave replica_axis out if it was saved from one device",
        ),
        (
            lambda: diagnose.diagnose_statistics(statistics(), decay=1.5),
            ValueError,
            "decay: expected the weight of the old statistics, between 0 and 1, got 1.5; "
            "it is Flax's momentum, and 0.9 where PyTorch's is 0.1",
        ),
        (
            lambda: diagnose.diagnose_statistics(statistics(), steps=-1),
            ValueError,
            "steps: expected how many batches were seen, a whole number or None, got -1",
        ),
        (
            lambda: diagnose.diagnose_linen(OnlyNorm(), {"params": {}}, X),
            ValueError,
            "variables: expected a collection 'batch_stats', got 'params'; pass all that model.init returned, "
            "with what apply(..., mutable=['batch_stats']) put in its place",
        ),
        (
            lambda: diagnose.diagnose_linen(OnlyNorm(), statistics(), []),
            ValueError,
            "batches: expected at least one batch, got none; an iterator may have been used up",
        ),
        (
            lambda: diagnose.diagnose_linen(OnlyNorm(), statistics(), 3),
            TypeError,
            "batches: expected an array, or a list of batches, got int",
        ),
        (
            lambda: diagnose.diagnose_nnx(nnx.Linear(C, C, rngs=nnx.Rngs(0)), X),
            ValueError,
            "model: expected calls of BatchNorm layers (Flax's or jaxbn's, Linen or NNX), got none; see that call "
            "runs the model that was given, and not one of its own",
        ),
        (
            lambda: need("no_such_package", "here"),
            ImportError,
            "no_such_package: needed here; pip install 'jaxbn[tools]'",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message


def test_what_was_not_checked(tmp_path, capsys, monkeypatch):
    flat = {"a.running_mean": MEAN, "a.running_var": VAR, "a.weight": VAR, "a.bias": MEAN}
    flat |= {"b.running_mean": MEAN, "b.running_var": VAR, "b.num_batches_tracked": np.array(100)}
    np.savez(tmp_path / "net.npz", **flat)
    assert diagnose.main([str(tmp_path / "net.npz"), "--plain"]) == 0
    assert "".join(capsys.readouterr().out.partition("not checked")[1:]) == (
        """not checked
  initial_weight in a: needs decay and steps
  short_memory: needs decay
  replicas: needs the statistics of all devices, and replica_axis
  drift, parting, few_values, not_finite_input, train_mode, depends_on_batch:
      needs the model and batches, in diagnose_linen or diagnose_nnx
  initial_weight in b: needs decay
  zero_scale in b: needs the scale of the layer in the same tree, if it has one
  huge_bias in b: needs the bias of the layer in the same tree, if it has one

2 norm layers: no findings
"""
    )
    report = diagnose.diagnose_statistics(flat, decay=0.9)
    assert json.loads(report.to_json())["not_checked"][0] == {
        "kinds": ["initial_weight"],
        "layers": ["a"],
        "needs": "steps",
    }
    monkeypatch.setenv("COLUMNS", "200")
    report.print()
    assert "initial_weight in a: needs steps" in capsys.readouterr().out
    assert [n.kinds for n in diagnose.diagnose_statistics(flat, decay=0.9, steps=100).not_checked][:1] == [
        ("replicas",)
    ]
