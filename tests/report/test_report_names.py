"""Names of any kind in figures, pages, tables, log lines and messages: shown as they are, and never
taken for markup or a second line.
"""

import html.parser
import json
import re
import warnings
from pathlib import Path

import pytest
import torch

from miue_fast import data, report
from miue_fast.cli import commands
from miue_fast.data.kept import checksum
from miue_fast.evaluation import evaluate
from miue_fast.plots.evaluation import figure, label, plain_text

NUMBERS = (
    Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "report_cifar10_jpeg.json"
)
QUICK = {"victim": "linear", "epochs": 1, "progress": False}
EVIL = [
    *(
        "$x_$",
        "$$",
        "a$b$c\\",
        "\\frac{",
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "&lt;b&gt;",
        "a|b|c",
        "`rm -rf`",
    ),
    *(
        "_u_",
        "**bold**",
        "[x](javascript:alert(1))",
        "![](http://x/y.png)",
        "a\nmiue-fast: ok",
        "\x1b[2Jgone",
        "\u202egnp.exe",
    ),
    *("x" * 9000, "\x00"),
]


@pytest.fixture(scope="module")
def pair():
    """Two data sets whose classes have such names."""
    names = [f"{k}{name[:200]}" for k, name in enumerate(EVIL)]
    return [
        data.Dataset(
            torch.randint(
                0,
                256,
                (36, 3, 8, 8),
                dtype=torch.uint8,
                generator=torch.Generator().manual_seed(seed),
            ),
            torch.arange(36) % len(names),
            names,
            [f"{k:04d}" for k in range(36)],
        )
        for seed in (1, 2)
    ]


def test_evaluate_draws_and_prints_any_class_name(pair, tmp_path):
    clean, test = pair
    table = evaluate(
        clean,
        clean.images.float() * 0,
        test,
        victim="linear",
        epochs=1,
        eps=8 / 255,
        progress=False,
        unseen=clean.classes[1:],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # letters that the font does not have
        assert (
            figure(table, clean, clean.images, tmp_path / "a.png", columns=len(EVIL))
            .read_bytes()
            .startswith(b"\x89PNG")
        )
    (line,) = [line for line in str(table).split("\n") if "without poison" in line]
    assert (
        line.isprintable()
        and "13a\\nmiue-fast: ok" in line
        and "\\x1b[2Jgone" in line
        and "\\u202egnp.exe" in line
    )
    assert json.loads(json.dumps(table.to_dict()))["options"]["unseen"] == clean.classes[1:]


@pytest.mark.parametrize("suffix", [".pdf", ".svg", ".PNG", ".svgz", ".eps"])
def test_figures_of_every_kind_are_files_of_ours(pair, tmp_path, suffix):
    clean, test = pair
    table = evaluate(clean, clean.images.float() * 0, test, eps=8 / 255, **QUICK)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        first = figure(table, clean, clean.images, tmp_path / f"a{suffix}", columns=2).read_bytes()
        assert (
            figure(table, clean, clean.images, tmp_path / f"a{suffix}", columns=3).read_bytes()
            != first
        )
        (tmp_path / f"a{suffix}").write_bytes(b"mine")
        with pytest.raises(
            ValueError, match=r"^figure: output: expected a new name, .* which was changed since"
        ):
            figure(table, clean, clean.images, tmp_path / f"a{suffix}")
    assert (tmp_path / f"a{suffix}").read_bytes() == b"mine"


def test_text_in_figures_is_no_formula_whatever_the_users_settings_are():
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"text.usetex": True, "text.parse_math": True}):
        with plain_text():
            title = Figure().subplots().set_title("$x_$ 50 %")
            assert (title.get_usetex(), title.get_parse_math()) == (False, False)
        assert matplotlib.rcParams["text.usetex"] and matplotlib.rcParams["text.parse_math"]
    assert [label(name, 6) for name in ("_a", "$x$", "a\nb", "abcdefgh", "\u202e")] == [
        " _a",
        "$x$",
        "a\\nb",
        "abcdef",
        "\\u202e",
    ]


@pytest.fixture(scope="module")
def forged(tmp_path_factory):
    """(folder of pages, report) of a report that says such things wherever text is free."""
    folder = tmp_path_factory.mktemp("forged")
    found = json.loads(NUMBERS.read_text())
    found["name"] = " ".join(EVIL[:-2]) + "x" * 5000
    found["cells"] = found["cells"][:3]
    for number, cell in enumerate(found["cells"]):
        cell |= {"device": EVIL[4 + number], "cpu_level": EVIL[13 + number], "torch": EVIL[number]}
    found["poisons"][0]["options"] |= {name: name for name in EVIL} | {"model": EVIL[4]}
    found["missing"] = [[name, other] for name, other in zip(EVIL, EVIL[::-1])]
    for number, entry in enumerate(found["poisons"]):
        entry["pictures"]["titles"] = [*EVIL, *EVIL][number : number + 8]
    del found["sha256"]
    path = folder / "report.json"
    path.write_text(json.dumps({**found, "sha256": checksum(found)}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert (
            commands.main(["report", str(path), "--out", str(folder / "out")]) == 2
        )  # not finished
    return folder / "out", found


def test_figures_of_a_report_take_any_name(forged):
    assert {"noise.png", "scatter.png"} <= {path.name for path in forged[0].iterdir()}


def test_markdown_shows_names_and_makes_nothing_of_them(forged):
    text = (forged[0] / "report.md").read_text()
    assert not re.search(r"(?<!\\)<|[^\S\n ]|[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text), (
        "HTML, or a character that is not for showing"
    )
    for mark in ("`", "$", "~"):
        assert not re.search(rf"(?<!\\)(\\\\)*{re.escape(mark)}", text.replace(f"\\{mark}", "")), (
            mark
        )
    assert re.findall(r"(?<!\\)\]\(([^)]*)\)", text) == [
        f"{name}.png" for name in ("summary", "scatter", "noise")
    ]
    assert re.findall(r"^#+ .*", text, re.M)[1:] == [
        line for line in re.findall(r"^## [A-Z][\w ]+$", text, re.M)
    ]
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1, table[:200]
    assert (
        "&lt;script>alert(1)&lt;/script>" in text
        and "a\\|b\\|c" in text
        and "&amp;lt;b&amp;gt;" in text
        and "\\_u\\_" in text
    )


class Tags(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen, self.text = [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, *(name for name, _ in attributes)))

    def handle_data(self, content):
        self.text.append(content)


def test_html_shows_names_and_makes_nothing_of_them(forged):
    text = (forged[0] / "report.html").read_text()
    tags = Tags()
    tags.feed(text)
    simple = [
        "title",
        "style",
        "h1",
        "h2",
        "p",
        "div",
        "table",
        "tr",
        "td",
        "th",
        "figure",
        "figcaption",
    ]
    attributes = {
        ("html", "lang"),
        ("meta", "charset"),
        ("meta", "name", "content"),
        ("img", "alt", "src"),
    }
    assert {*tags.seen} <= attributes | {(tag,) for tag in simple}
    for name in (EVIL[4], EVIL[5], "&lt;b&gt;", "a|b|c", "`rm -rf`", "$x_$"):
        assert any(name in content for content in tags.text), name
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text) and re.search(
        r"\\u202egnp\.exe", text
    )


def test_long_names_are_cut(forged):
    for name in ("report.md", "report.html"):
        assert (
            len((forged[0] / name).read_text().split("## " if name.endswith("md") else "<h2>")[0])
            < 2000
        )


def test_the_terminal_gets_one_line_each(tmp_path, forged, capsys):
    assert (
        commands.main(
            [
                "report",
                str(forged[0].parent / "report.json"),
                "--out",
                str(tmp_path / "a\nmiue-fast: ok\x1b[1m"),
            ]
        )
        == 2
    )
    found = capsys.readouterr()
    lines = found.out.split("\n")[:-1]
    assert len(lines) == 5 and all(
        line.isprintable() and "a\\nmiue-fast: ok\\x1b[1m" in line for line in lines
    )
    lines = [line for line in found.err.split("\n")[:-1] if line.startswith("miue-fast: ")]
    assert len(lines) == len(EVIL) and all(
        line.isprintable() and line.startswith("miue-fast: missing: ") for line in lines
    )


def test_complaints_are_one_harmless_line(tmp_path, capsys):
    assert (
        commands.main(["report", str(tmp_path / "a\nmiue-fast: ok\x1b[1m"), "--out", str(tmp_path)])
        == 2
    )
    told = capsys.readouterr().err
    assert (
        told.count("\n") == 1
        and told[:-1].isprintable()
        and told.endswith("\\x1b[1m: No such file or directory\n")
    )


def test_a_poison_of_an_odd_name_is_in_the_legend():
    """matplotlib leaves out what begins with an underscore."""
    import matplotlib.axes

    found, seen = json.loads(NUMBERS.read_text().replace('"tap"', '"_tap"')), []
    real = matplotlib.axes.Axes.legend

    def legend(axis, *args, **options):
        made = real(axis, *args, **options)
        seen.extend(entry.get_text() for entry in made.get_texts())
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matplotlib.axes.Axes, "legend", legend)
        assert "jpeg" in report.figures.draw(found)
    assert {" _tap", "mi-ue", "clean"} <= {*seen}


def test_names_in_a_configuration_are_plain():
    for name in ("", " ", ".", "a b", "a/b", "$x$", "<b>", "a\n", "\u202ea", "|"):
        with pytest.raises(
            ValueError, match=r"^report: (poisons|victims): expected names of letters, digits"
        ):
            report.check(
                {
                    "name": "x",
                    "data": "x",
                    "test": "y",
                    "poisons": {name: {}},
                    "victims": {},
                    "runs": [],
                }
            )
        with pytest.raises(
            ValueError, match=r"^report: (poisons|victims): expected names of letters, digits"
        ):
            report.check(
                {
                    "name": "x",
                    "data": "x",
                    "test": "y",
                    "poisons": {},
                    "victims": {name: {"model": "lenet5"}},
                    "runs": [],
                }
            )
