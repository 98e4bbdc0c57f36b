"""Damaged and forged files of a report: each is rendered, or refused by one ValueError line,
whatever was changed in it.
"""

import base64
import copy
import json
import os
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest

from miue_fast import report
from miue_fast.data import kept
from miue_fast.data.kept import checksum
from miue_fast.report import figures, pages, schema

NUMBERS = (
    Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "report_cifar10_jpeg.json"
)
OTHERS = (None, True, -1, 3, 1e400, float("nan"), 10**30, "a\n<b>$", [], ["x"], {"a": None})


def packed(*levels):
    return base64.b64encode(zlib.compress(np.array(levels, dtype="<i2").tobytes())).decode()


@pytest.fixture(scope="module")
def small():
    """The committed report with few cells, and all there is to a report in them."""
    found = json.loads(NUMBERS.read_text())
    poisons = ["em", "mi-ue", next(e["name"] for e in found["poisons"] if "of" in e["options"])]
    found["poisons"] = [entry for entry in found["poisons"] if entry["name"] in poisons]
    found["order"] = ["clean", *poisons]
    wanted = [
        ("clean", "none"),
        ("em", "none"),
        ("mi-ue", "none"),
        ("mi-ue", "jpeg:quality=10"),
        ("em", "cutout"),
    ]
    cells = [
        c
        for c in found["cells"]
        if c["victim"] in ("small_resnet", "lenet5") and (c["poison"], c["defence"]) in wanted
    ]
    found["cells"] = [cell for cell in cells if cell["seed"] == 0]
    found["setting"]["victims"] = {
        name: found["setting"]["victims"][name] for name in ("small_resnet", "lenet5")
    }
    found["setting"]["recipes"] = {
        name: found["setting"]["recipes"][name] for name in ("small_resnet", "lenet5")
    }
    for entry in found["poisons"]:
        entry["pictures"] = {
            "titles": ["a", "b"],
            "shape": [2, 1, 2, 2],
            "levels": packed(*range(-4, 4)),
        }
    found["missing"] = [["mi-ue, vgg11, none, 0", "not made"]]
    for cell in found["cells"]:
        analysis = cell.get("analysis", {})
        analysis["layers"] = analysis["layers"][-2:] if analysis else None
        for name in ("scatter", "scatter_labels"):
            if name in analysis:
                analysis[name] = analysis[name][:3]
        for row in analysis["layers"] or ():
            row["mutual_information"] = {"histogram": row["mutual_information"]["histogram"]}
        if not analysis["layers"]:
            cell.pop("analysis", None)
    found["setting"]["analysis"]["estimators"] = ["histogram"]
    return {name: value for name, value in found.items() if name != "sha256"}


def places(value, path=()):
    """Every key and index at every depth; of a long list the first and the last item."""
    keys = (
        list(value)
        if isinstance(value, dict)
        else range(len(value))[:: max(1, len(value) - 1)]
        if isinstance(value, list)
        else ()
    )
    for key in keys:
        yield (*path, key)
        yield from places(value[key], (*path, key))


def variants(content):
    """(what, changed content): each key taken away, each value replaced by values of every other
    type.
    """
    for path in places(content):
        for other in (KeyError, *OTHERS):
            changed = copy.deepcopy(content)
            where = changed
            for key in path[:-1]:
                where = where[key]
            if other is KeyError:
                del where[path[-1]]
            else:
                where[path[-1]] = other
            yield f"{'.'.join(map(str, path))} = {other!r}", changed


def written(folder, content):
    """A report.json with a fitting checksum."""
    path = folder / "report.json"
    path.write_text(json.dumps({**content, "sha256": checksum(content)}))
    return path


def outcome(act):
    """ "fine", or the one line; anything else is an exception of the test."""
    try:
        act()
        return "fine"
    except ValueError as error:
        assert str(error).isprintable() and len(str(error)) <= 2000, str(error)
        return str(error)


def render(path, out):
    content = report.load(path)
    assert content is not None, "a forged report is not taken for a configuration"
    report.render(content, out)


def test_every_change_of_a_report_is_rendered_or_one_line(small, tmp_path, monkeypatch):
    """No figure is drawn here: test_changed_reports_that_are_taken_can_be_drawn."""
    for module in (figures, pages):
        monkeypatch.setattr(module, "missing", lambda: "no figures here")
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # a thousand pages that nobody keeps
    assert outcome(lambda: render(written(tmp_path, small), tmp_path / "out")) == "fine"
    seen = {True: 0, False: 0}
    for what, changed in variants(small):
        path = written(tmp_path, changed)
        if changed.get("format") == small["format"]:
            told = outcome(lambda path=path: render(path, tmp_path / "out"))
        else:
            told = outcome(lambda path=path: report.load(path) or report.read(path))
            assert told != "fine"
        seen[told == "fine"] += 1
        assert told == "fine" or told.startswith("report: ") or told.startswith("defence: "), (
            what,
            told,
        )
    assert seen[False] > 2000 and seen[True] > 300


def test_reports_at_the_edge_of_what_is_taken_can_be_drawn(small, tmp_path):
    """The values that the test above finds to be fine, where a figure is made from them."""
    changed = copy.deepcopy(small)
    analysis, pictures = changed["cells"][0]["analysis"], changed["poisons"][0]["pictures"]
    analysis["layers"][-1]["mutual_information"]["histogram"]["value"] = 10**30
    analysis["scatter"][0][0], analysis["scatter"][1][1], analysis["scatter_labels"][0] = (
        1e30,
        -1e30,
        2**63,
    )
    pictures["titles"][0] = "a\n<b>$"
    changed["poisons"][1]["pictures"] |= {
        "titles": ["$x_$" * 2500],
        "shape": [1, 3, 64, 1],
        "levels": packed(*[255] * 192),
    }
    for cell in changed["cells"]:
        cell["test"] = 1
    path = written(tmp_path, changed)
    assert outcome(lambda: render(path, tmp_path / "out")) == "fine"
    assert {"jpeg.png", "gap.png", "scatter.png", "noise.png"} <= {
        made.name for made in (tmp_path / "out").iterdir()
    }


BOMB = base64.b64encode(zlib.compress(bytes(1 << 24), 9)).decode()  # 16 MiB in 22 KB
PICTURES = [
    ({"levels": BOMB}, "expected 16 packed bytes, got more, or fewer"),
    (
        {"levels": BOMB, "shape": [2, 1, 1 << 20, 1 << 20]},
        "shape[2]: expected a whole number from 1 to 64, got 1048576",
    ),
    ({"levels": BOMB, "shape": [2, 3, 64, 64]}, "expected 49152 packed bytes"),
    ({"levels": packed(*range(7))}, "expected 16 packed bytes"),
    ({"levels": packed(*range(8))[:-8]}, "expected 16 packed bytes"),
    ({"levels": packed(*range(8)) + "A" * 8}, "expected 16 packed bytes"),
    (
        {"levels": base64.b64encode(zlib.compress(bytes(16)) + b"more").decode()},
        "expected 16 packed bytes",
    ),
    ({"levels": "no base64!"}, "expected 16 packed bytes"),
    ({"levels": base64.b64encode(b"no deflate").decode()}, "expected 16 packed bytes"),
    ({"levels": packed(*[-32768] * 8)}, "expected levels from -255 to 255, got -32768 to -32768"),
    ({"levels": packed(*[256] * 8)}, "expected levels from -255 to 255"),
    ({"shape": [1, 1, 2, 4]}, "shape: expected [2, 1 or 3, height, width]"),
    ({"shape": [2, 2, 2, 1]}, "shape: expected [2, 1 or 3, height, width]"),
    ({"titles": ["a"] * 9}, "titles: expected a list of 1 to 8 values, got '9 values'"),
]


@pytest.mark.parametrize("change, told", PICTURES, ids=range(len(PICTURES)))
def test_embedded_perturbations_are_never_more_than_they_declare(small, tmp_path, change, told):
    changed = copy.deepcopy(small)
    changed["poisons"][1]["pictures"] |= change
    path = written(tmp_path, changed)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError) as error:
            report.load(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert str(error.value).startswith(f"report: {path}.poisons[1].pictures") and told in str(
        error.value
    )


def test_contradictions_are_told(small, tmp_path):
    for change, told in (
        (lambda r: r["order"].append("em"), "order: expected clean and then every poison once"),
        (lambda r: r["order"].reverse(), "order: expected clean and then every poison once"),
        (
            lambda r: r["poisons"].append(r["poisons"][0]),
            "order: expected clean and then every poison once",
        ),
        (
            lambda r: r["poisons"].pop(1),
            "options.of: expected another whole poison of the report, got 'mi-ue'",
        ),
        (lambda r: r["cells"].append(r["cells"][0]), "each pair once per defence and seed"),
        (lambda r: r["cells"][0].update(poison="lsp"), "a poison and a victim of the report"),
        (
            lambda r: r["setting"]["recipes"].pop("lenet5"),
            "recipes: expected one of each of small_resnet, lenet5",
        ),
        (
            lambda r: r["setting"]["analysis"].update(estimators=["knn"]),
            "layers: expected mutual information by knn",
        ),
        (
            lambda r: r["cells"][0]["analysis"]["scatter"].pop(),
            "scatter_labels: expected 2 labels, got 3",
        ),
        (
            lambda r: r["cells"][0].update(defence="jpeg"),
            "a defence with its options written out, jpeg:quality=10",
        ),
    ):
        changed = copy.deepcopy(small)
        change(changed)
        with pytest.raises(ValueError) as error:
            report.load(written(tmp_path, changed))
        assert told in str(error.value)


def test_files_that_are_no_report(tmp_path, monkeypatch):
    """A pipe is not waited for, a large file not read, and depth is no crash."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "nan").write_text('{"format": "miue_fast report 1", "classes": NaN}')
    (tmp_path / "latin").write_bytes(b'{"name": "\xe9"}')
    (tmp_path / "deep").write_text(
        '{"format": "miue_fast report 1", "a": ' + '{"a":' * 900 + "1" + "}" * 901
    )
    for name in ("pipe", "nan", "latin", "deep", "."):
        told = outcome(lambda name=name: report.load(tmp_path / name))
        assert told.startswith("report: ") and "expected a" in told, told
    monkeypatch.setattr(kept, "LARGEST", 10)
    (tmp_path / "large").write_text("{" + " " * 20 + "}")
    assert "a file of 22 bytes, where 10 are the most" in outcome(
        lambda: report.load(tmp_path / "large")
    )
    with pytest.raises(OSError):
        report.load(tmp_path / "nothing")


def test_a_byte_order_mark_is_no_damage(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(CONFIG).encode())
    assert report.read(tmp_path / "config.json").name == "n"


# ---- configurations

CONFIG = {
    **{
        "name": "n",
        "data": "train",
        "test": "test",
        "size": 16,
        "per_class": 8,
        "test_per_class": 8,
        "paper": "CIFAR-10",
    },
    "generation": {
        "model": "small_resnet",
        "width": 4,
        "alpha_0": 0.01,
        "flip": 0.5,
        "random_start": False,
        "preset": "paper",
    },
    "poisons": {
        "em": {"objective": "em"},
        "mi-ue": {},
        "theirs": {"path": "p.pt"},
        "part": {"of": "em", "ratio": 0.5},
    },
    "victims": {
        "lenet5": {"epochs": 1, "lr": 0.1, "batch": 8, "crop": 0},
        "tuned": {"model": "lenet5", "pretrain": {"per_class": 4, "epochs": 1}},
    },
    "runs": [
        {
            "victims": ["lenet5"],
            "poisons": ["clean", "em"],
            "defences": ["none", "jpeg:10"],
            "seeds": [0, 1],
        },
        {},
    ],
    "analysis": {
        **{
            "victims": ["lenet5"],
            "seeds": [0],
            "estimators": ["histogram"],
            "slices": 4,
            "points": 30,
            "layers": "lenet5",
        }
    },
}


def test_every_change_of_a_configuration_is_taken_or_one_line():
    assert outcome(lambda: report.check(copy.deepcopy(CONFIG))) == "fine"
    seen = {True: 0, False: 0}
    for _, changed in variants(CONFIG):
        told = outcome(lambda changed=changed: report.check(changed))
        seen[told == "fine"] += 1
    assert seen[False] > 500 and seen[True] > 50


@pytest.mark.parametrize("blank", ["", " ", "\t\n", "a\0b"], ids=ascii)
@pytest.mark.parametrize(
    "place", [("data",), ("test",), ("poisons", "theirs", "path")], ids=".".join
)
def test_a_blank_path_is_one_line(blank, place):
    changed = copy.deepcopy(CONFIG)
    where = changed
    for key in place[:-1]:
        where = where[key]
    where[place[-1]] = blank
    with pytest.raises(ValueError) as error:
        report.check(changed)
    assert (
        str(error.value)
        == f"report: {'.'.join(place)}: expected text that names a file or folder, got {blank!r}"
    )


def test_names_and_numbers_of_poisons_are_bounded_before_anything_is_trained():
    for change, told in (
        (
            {"poisons": {f"p{k}": {} for k in range(101)}},
            "report: poisons: expected 100 at most, got 101",
        ),
        (
            {"poisons": {"x" * 61: {}}},
            "report: poisons: expected names of letters, digits, - _ . (60 at most)",
        ),
        (
            {"victims": {"x" * 61: {"model": "lenet5"}}},
            "report: victims: expected names of letters",
        ),
        ({"name": "x" * 10_001}, "report: name: expected text of at most 10000 characters"),
    ):
        with pytest.raises(ValueError) as error:
            report.check({**copy.deepcopy(CONFIG), **change})
        assert str(error.value).startswith(told)


# ---- finished parts


def test_every_change_of_a_finished_part_is_taken_or_one_line(small):
    seen = {True: 0, False: 0}
    for kind, part in (("cell", small["cells"][0]), ("poison", small["poisons"][1])):
        assert (
            outcome(lambda kind=kind, part=part: schema.check_part("x.json", kind, part)) == "fine"
        )
        for _, changed in variants(part):
            told = outcome(
                lambda kind=kind, changed=changed: schema.check_part("x.json", kind, changed)
            )
            seen[told == "fine"] += 1
    assert seen[False] > 300
