"""What a report looks like: as text, in colour, as HTML and as a picture. Judging is tested in the other modules."""

import dataclasses
import html.parser
import json
import re

import numpy as np
import pytest

from jaxbn import diagnose
from jaxbn.diagnose._rules import finding
from jaxbn.diagnose._view import content, picture

NAMES = ["stem_norm", *(f"ResNetBlock_{i // 3}/BatchNorm_{i % 3}" for i in range(47))]
C = 8


def layer(path, *, measured=True, own=0.01, seen=None):
    numbers = {}
    if measured:
        ones = np.ones(C)
        numbers = {"values": 1024.0, "shift": own * ones, "ratio": 1.2e-3 * ones, "divergence": 1e-9 * ones}
        numbers |= {"own": own, "passed_on": 2 * own}
    return diagnose.LayerReport(path=path, mean=np.linspace(-3, 3, C), var=np.logspace(-3, 1, C), seen=seen, **numbers)


def drift(path, number):
    evidence = (
        f"one input normalized in training and in evaluation differs by {number} (rms); mean shifted by 6.3 running "
        "std at most, 3.9 in the median; variance ratio 0.92 to 1; worst channels [7, 1, 0]"
    )
    return finding((path, "linen"), "error", "drift", evidence)


def report(names=NAMES, *, measured=True):
    """All severities, findings that are alike in all layers and findings that are not, and checks not made."""
    layers = [layer(name, measured=measured, own=0.01 * 1.15**i, seen=100) for i, name in enumerate(names)]
    found = [finding(("", "linen"), "error", "depends_on_batch", "outputs differ by 0.5")]
    found += [drift(name, number) for number, name in enumerate(names[:9])]
    found += [finding((name, "linen"), "warning", "initial_weight", "30 batches", enough="more") for name in names]
    found += [finding((names[-1], "linen"), "note", "eps_dominates", "variance down to 1e-7")]
    unknown = [
        diagnose.NotChecked(("drift", "parting", "few_values", "not_finite_input", "train_mode"), tuple(names), "data"),
        diagnose.NotChecked(("short_memory",), tuple(names[1:]), "decay"),
    ]
    return diagnose.Report(layers, found, names[0], 0.73, unknown)


def words(text):
    """The text without line breaks: in what was not broken inside a word, phrases are found again."""
    return re.sub(r"\s+", " ", text)


REPORTS = {"measured": report(), "stored": report(measured=False), "two": report(NAMES[:2])}


@pytest.mark.parametrize("name", REPORTS)
@pytest.mark.parametrize("rich", [False, True])
def test_text_fits_80_columns_and_breaks_no_word(name, rich, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    given = REPORTS[name]
    text = str(given)
    if rich:
        given.print()
        # A pipe has no colours.
        assert capsys.readouterr().out == text + "\n"
    assert max(map(len, text.splitlines())) <= 80
    for phrase in (given.findings[1].evidence, given.findings[1].cause, given.findings[1].cure, given.summary()):
        assert phrase in words(text)
    assert [line.split()[0] for line in text.splitlines()[1 : 1 + len(given.layers)]] == [
        one.path for one in given.layers
    ]


def test_columns():
    def header(**options):
        return re.split(r"  +", given.to_text(**options).splitlines()[0])

    given = REPORTS["measured"]
    assert header() == ["layer", "shift max", "own", "passed on", "finding"]
    every = ["layer", "channels", "running std", "seen", "values", "shift max", "median", "var ratio", "KL max", "own"]
    assert header(verbose=True) == [*every, "passed on", "finding"]
    given = REPORTS["stored"]
    assert header() == header(verbose=True) == ["layer", "channels", "running std", "seen", "finding"]
    # A column that says nothing of any layer is left out.
    given = diagnose.Report([layer("norm", measured=False)], [])
    assert header() == ["layer", "channels", "running std", "finding"]


def test_layers_with_the_same_finding_are_one_entry():
    given = REPORTS["measured"]
    text = words(str(given))
    assert "warning: initial_weight in 48 of 48 layers layers stem_norm, ResNetBlock_0/BatchNorm_0, " in text
    assert "ResNetBlock_0/BatchNorm_1 and 45 more evidence 30 batches cause" in text
    assert text.count(given.findings[-2].cause) == 1
    # Evidence that differs is given for one of them.
    assert "error: drift in 9 of 48 layers layers stem_norm, ResNetBlock_0/BatchNorm_0, " in text
    assert "evidence for example in stem_norm: one input normalized" in text
    assert "differs by 1 (rms)" not in text
    assert "error: depends_on_batch evidence outputs differ by 0.5 cause" in text
    assert text.endswith("verbose=True, or --wide, shows all layers and figures")
    whole = words(given.to_text(verbose=True))
    assert all(f"layer {f.layer} evidence {f.evidence}" in whole for f in given.findings if f.kind == "drift")
    assert f"layers {', '.join(NAMES)} evidence 30 batches" in whole
    assert "verbose" not in whole
    # A list without one of four layers would be no shorter.
    few = words(str(diagnose.Report(given.layers, given.findings[1:5])))
    assert all(f"layer {f.layer} evidence {f.evidence}" in few for f in given.findings[1:5])
    assert "verbose" not in few
    # To programs they are findings of their own.
    assert len(json.loads(given.to_json())["findings"]) == len(given.findings) == 59


def test_a_layer_with_several_findings_is_listed_once():
    nan = np.full(3, np.nan)
    norms = {f"l{i}": {"mean": nan, "var": nan, "scale": nan, "bias": nan} for i in range(5)}
    lines = str(diagnose.diagnose_statistics(norms)).splitlines()
    (start,) = [i for i, line in enumerate(lines) if line.startswith("error: not_finite")]
    assert lines[start : start + 2] == ["error: not_finite in 5 of 5 layers", "  layers    l0, l1, l2 and 2 more"]


@pytest.mark.parametrize("columns", ["0", "7"])
def test_a_console_without_width(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    REPORTS["two"].print()
    assert "norm layers" in capsys.readouterr().out


def test_what_was_not_checked_says_where():
    text = str(REPORTS["measured"])
    assert "  drift, parting, few_values, not_finite_input, train_mode: needs data\n" in text
    assert "short_memory in ResNetBlock_0/BatchNorm_0, ResNetBlock_0/BatchNorm_1, " in words(text)
    assert "ResNetBlock_0/BatchNorm_2 and 44 more: needs decay" in words(text)
    # Nothing else is cut there.
    given = diagnose.Report(REPORTS["measured"].layers, [], not_checked=REPORTS["measured"].not_checked)
    assert str(given).endswith("verbose=True, or --wide, shows all layers and figures")


@pytest.mark.parametrize(
    ("width", "short"),
    [
        (46, "encoder/stage_3/block_12/attention/BatchNorm_1"),
        (45, "encoder/.../block_12/attention/BatchNorm_1"),
        (41, "encoder/.../attention/BatchNorm_1"),
        (24, "encoder/.../BatchNorm_1"),
        (20, "encoder/...tchNorm_1"),
    ],
)
def test_names_are_shortened_in_the_middle(width, short):
    assert content.shorten("encoder/stage_3/block_12/attention/BatchNorm_1", width) == short


def test_a_wider_terminal_has_whole_names(capsys, monkeypatch):
    long = "encoder/stage_3/block_12/attention/projection/BatchNorm_1"
    given = diagnose.Report([layer(long), layer("a[0]")], [])
    assert str(given).splitlines()[1].startswith("encoder/.../projection/BatchNorm_1 ")
    monkeypatch.setenv("COLUMNS", "120")
    given.print()
    printed = capsys.readouterr().out
    # Brackets are no markup.
    assert [line.split()[0] for line in printed.splitlines()[1:3]] == [long, "a[0]"]
    assert long in given.to_text(verbose=True)


def test_a_verbose_table_is_not_squeezed(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    REPORTS["measured"].print(verbose=True)
    assert capsys.readouterr().out == REPORTS["measured"].to_text(verbose=True) + "\n"


class Parser(html.parser.HTMLParser):
    """Tags that are open, all tags with attributes, and the text without style."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += "" if "style" in self.open else f" {data}"


def test_html_for_jupyter():
    text = REPORTS["measured"]._repr_html_()
    parser = Parser(text)
    assert parser.open == []
    names = {name for _, attributes in parser.tags for name in attributes}
    assert names == {"class", "title"}, "nothing from elsewhere"
    assert {tag for tag, _ in parser.tags}.isdisjoint({"script", "link", "img", "iframe"})
    assert not re.search(r"url\(|@import|https?:", text)
    shown = words(parser.text)
    assert all(f"layer {f.layer} evidence {f.evidence}" in shown for f in REPORTS["measured"].findings[1:10])
    for phrase in (REPORTS["measured"].summary(), "var ratio", "not checked", "short_memory", *NAMES):
        assert phrase in shown


def test_html_is_readable_on_light_and_dark_pages():
    """A rule that sets a background sets the colour on it, too; all other text has the colour of the page."""
    style = re.search("<style>(.*)</style>", REPORTS["measured"]._repr_html_(), re.DOTALL)[1]
    rules = dict(re.findall(r"\.jaxbn-report (.*?) \{ (.*?) \}", style))
    colours = {
        selector: tuple(re.findall(r"(?:^|; )(background|color): (#?\w+)", rule)) for selector, rule in rules.items()
    }
    badges = {selector: pairs for selector, pairs in colours.items() if pairs and pairs != (("color", "inherit"),)}
    assert set(badges) == {".error", ".warning", ".note", ".none"}

    def luminance(colour):
        digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
        parts = np.array([int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)])
        return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]

    for (_, behind), (_, text) in badges.values():
        low, high = sorted((luminance(behind), luminance(text)))
        # WCAG 2.1, level AA.
        assert (high + 0.05) / (low + 0.05) >= 4.5


def test_html_escapes():
    bad = "<script>alert('&')</script>"
    given = diagnose.Report([layer(bad)], [finding((bad, None), "error", "drift", bad)], bad)
    given = dataclasses.replace(given, not_checked=[diagnose.NotChecked((bad,), (bad,), bad)])
    parser = Parser(given._repr_html_())
    assert "script" not in {tag for tag, _ in parser.tags}
    assert parser.text.count(bad) == 6


@pytest.mark.parametrize("name", REPORTS)
def test_everything_in_a_picture_is_inside_and_apart(name):
    given = REPORTS[name]
    figure = picture.figure_of(given)
    figure.draw_without_rendering()
    *panels, bar = figure.axes
    (legend,) = figure.legends
    assert [label.get_text() for label in panels[0].get_yticklabels()] == [one.path for one in given.layers]
    assert [text.get_text() for text in legend.get_texts()][:4] == ["error", "warning", "note", "no finding"]
    assert bar.get_ylabel() == "share of channels"
    labels = [*panels[0].get_yticklabels(), legend, figure._suptitle, bar.yaxis.label]
    labels += [label for axes in panels for label in (*axes.get_xticklabels(), axes.xaxis.label)]
    boxes = [label.get_window_extent() for label in labels]
    width, height = figure.get_size_inches() * figure.dpi
    assert all(b.x0 >= 0 and b.y0 >= 0 and b.x1 <= width and b.y1 <= height for b in boxes)
    assert not any(box.overlaps(axes.get_window_extent()) for box in boxes for axes in figure.axes)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(3 <= len(axes.get_xticks()) <= 8 for axes in panels)


def test_bars_and_histograms():
    names = NAMES[:3]
    layers = [layer(names[0], own=0.5), layer(names[1], own=np.nan), layer(names[2], measured=False)]
    figure = picture.figure_of(diagnose.Report(layers, [drift(names[0], 1)]))
    bars, shifts, _, _ = figure.axes
    assert [bar.get_width() for bar in bars.patches] == [0.5, 0, 0]
    assert [text.get_text() for text in bars.texts] == [" NaN or infinite"]
    shares = shifts.collections[0].get_array()
    assert [row.compressed().sum() for row in shares[:1]] == [1]
    # The others were not measured, or have no finite value.
    assert shares.mask[1:].all()


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 2.2, [0, 0.1, 0.2, 0.5, 1, 2]),
        (-150, 40, [-100, -10, -1, -0.1, 0, 0.1, 1, 10]),
        (0.5, 2, [0.5, 1, 2]),
        (1e-12, 3, [1e-12, 1e-10, 1e-8, 1e-6, 1e-4, 1e-2, 1]),
    ],
)
def test_ticks_are_round_and_few(low, high, ticks):
    axes = picture.need("matplotlib.figure", "here").Figure().subplots()
    axes.set_xlim(low, high)
    picture._ticks(axes, low, high)
    np.testing.assert_allclose(axes.get_xticks(), ticks)


def test_errors_of_a_picture_come_before_the_work(tmp_path, capsys):
    """The checkpoint, which does not exist, is not looked at."""
    (tmp_path / "file").touch()
    for path, error, message in (
        (
            tmp_path / "none" / "a.png",
            FileNotFoundError,
            f"path: expected a picture in a folder that exists, got {tmp_path}/none/a.png; make the folder "
            f"{tmp_path}/none first",
        ),
        (
            tmp_path / "a.doc",
            ValueError,
            "path: expected a picture in a format that matplotlib writes, such as .png, .pdf or .svg, got a.doc; "
            "rename it",
        ),
        (
            tmp_path,
            ValueError,
            f"path: expected the name of a picture, got the folder {tmp_path}; add a name, such as report.png",
        ),
    ):
        with pytest.raises(error) as caught:
            REPORTS["two"].draw(path)
        assert str(caught.value) == message
        assert diagnose.main(["none.npz", "--draw", str(path)]) == 2
        assert capsys.readouterr().err == message + "\n"


def test_npz_files(tmp_path, capsys):
    stats = {"mean": np.ones(C, np.float32), "var": np.ones(C, np.float32)}
    np.savez(tmp_path / "flat.npz", **{f"batch_stats/norm/{name}": v for name, v in stats.items()})
    with np.load(tmp_path / "flat.npz") as file:
        assert [layer.path for layer in diagnose.diagnose_statistics(file).layers] == ["norm"]
    np.savez(tmp_path / "tree.npz", batch_stats={"norm": stats})
    assert diagnose.main([str(tmp_path / "tree.npz")]) == 2
    assert capsys.readouterr().err == (
        f"path: expected named arrays, got {tmp_path}/tree.npz with Python objects in it; save a flat dictionary: "
        "numpy.savez(path, **flax.traverse_util.flatten_dict(variables, sep='/'))\n"
    )


def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        diagnose.main(["--help"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
    arrays = {"mean": np.zeros(C), "var": np.ones(C)}
    np.savez(tmp_path / "net.npz", **{f"{name}/{key}": array for name in NAMES for key, array in arrays.items()})
    printed = []
    for options in ([], ["--plain"], ["--wide"], ["--wide", "--plain"]):
        assert diagnose.main([str(tmp_path / "net.npz"), *options]) == 1
        printed.append(capsys.readouterr().out)
    short, plain, wide, wide_plain = printed
    assert short == plain
    assert wide == wide_plain
    assert "and 45 more" in short
    # In the table and with the finding.
    assert all(wide.count(name) == 2 for name in NAMES)
