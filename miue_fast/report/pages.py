"""A collected report as report.md (figures beside it) and as one self-contained report.html."""

import base64
import contextlib
import html
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .. import data
from ..support.messages import printable
from .content import FIGURE, TABLE, TEXT, sections
from .figures import draw, missing
from .schema import check_report

CAPTIONS = {
    "summary": (
        "Clean test accuracy of the first victim by what it was trained on, mean over the seeds; "
        "lines from the smallest to the largest seed. Dashed: chance."
    ),
    "jpeg": (
        "Clean test accuracy against the JPEG quality of the training images; "
        "bands from the smallest to the largest seed."
    ),
    "gap": "Mutual-information gap against accuracy gap, one point per poison.",
    "scatter": (
        "Features of poisoned training images on their first two principal components, by class; "
        "the first analysed victim."
    ),
    "noise": "Perturbations alone, each at full contrast.",
    "images": "Images as the victims see them.",
}
NUMBERS = "report.json"
PAGES = {"report.md", "report.html", *(f"{name}.png" for name in CAPTIONS)}
STYLE = """:root{color-scheme:light dark;--text:#222;--ground:#fff;--soft:#555;--line:#ccc;\
--head:#f3f3f3}
@media (prefers-color-scheme:dark){:root{--text:#ddd;--ground:#181a1b;--soft:#aaa;--line:#444;\
--head:#26292b}}
body{font:15px/1.5 system-ui,sans-serif;max-width:72em;margin:2em auto;padding:0 1em;\
color:var(--text);background:var(--ground);overflow-wrap:anywhere}
div{overflow-x:auto}table{border-collapse:collapse;margin:1em 0;font-size:13px;\
overflow-wrap:normal}
td,th{border:1px solid var(--line);padding:.25em .6em;text-align:left}
th{background:var(--head)}img{max-width:100%;background:#fff}figure{margin:1em 0}\
figcaption{font-size:13px;color:var(--soft)}"""


def render(report: Mapping[str, Any], folder: str | Path, sources: Any = None) -> list[Path]:
    """Writes report.md, its figures and report.html into `folder`, which may hold them already.

    Args:
        report: the dict of `run`, or the content of a report.json.
        sources: the Sources of `run`; with them the poisoned images are shown too.

    Returns the paths that were written. Without matplotlib there are no figures, and the report
    says so. Errors: ValueError, OSError.
    """
    check_report(report)
    folder = data.check_writable(Path(folder))
    check_pages("report", folder)
    figures, parts = draw(report, sources), sections(report)
    wanted = [block[1] for _, blocks in parts for block in blocks if block[0] == FIGURE]
    files = {f"{name}.png": figures[name] for name in wanted if name in figures}
    files["report.md"] = _markdown(report, parts, figures).encode()
    files["report.html"] = _html(report, parts, figures).encode()
    replace(folder, files, gone=PAGES - files.keys())
    return sorted(folder / name for name in files)


def check_pages(op: str, folder: str | Path) -> None:
    """Raises ValueError if a file that a report writes into `folder` exists and belongs to somebody
    else.
    """
    data.Owned(folder).check(op, sorted({NUMBERS, *PAGES}))


def replace(folder: Path, files: Mapping[str, bytes], gone: Iterable[str] = ()) -> None:
    """Writes {name: bytes} into the folder of a report and removes the files in `gone`. Only its
    own files are touched. Errors: ValueError, OSError.
    """
    own = data.Owned(folder)
    own.write(
        {
            name: lambda file, content=content: file.write(content)
            for name, content in files.items()
        },
        tidy=False,
    )
    with (
        contextlib.suppress(ValueError),
        data.only_writer(folder),
    ):  # a run at work there adds to the list, and tidies it itself
        own.remove(sorted(gone))


def _title(report):
    return f"Evidence: {printable(report['name'])}"


def _markdown(report, parts, figures):
    lines = [f"# {_escaped(_title(report))}", ""]
    for heading, blocks in parts:
        kept = [block for block in blocks if block[0] != FIGURE or block[1] in figures]
        if not kept:
            continue
        lines += [f"## {heading}", ""]
        for kind, *rest in kept:
            if kind == TEXT:
                lines += ["**".join(map(_escaped, rest[0].split("**"))), ""]
            elif kind == TABLE:
                head, rows = rest
                lines += [_row(head), "|" + "---|" * len(head), *map(_row, rows), ""]
            else:
                lines += [f"![{CAPTIONS[rest[0]]}]({rest[0]}.png)", "", CAPTIONS[rest[0]], ""]
    if reason := missing():
        lines += [reason, ""]
    return "\n".join(lines)


def _escaped(text):
    """Text for Markdown that stands there as it is: no HTML, link, code, formula or emphasis can be
    made of it.
    """
    text = printable(text, most=None).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"[\\`*|~$]|\](?=[(\[:])|(?<!\w)_|_(?!\w)", r"\\\g<0>", text)


def _row(cells):
    return "| " + " | ".join(_escaped(str(cell)) for cell in cells) + " |"


def _plain(text):
    return html.escape(printable(text, most=None))


def _html(report, parts, figures):
    body = [f"<h1>{_plain(_title(report))}</h1>"]
    for heading, blocks in parts:
        kept = [block for block in blocks if block[0] != FIGURE or block[1] in figures]
        if not kept:
            continue
        body.append(f"<h2>{_plain(heading)}</h2>")
        for kind, *rest in kept:
            if kind == TEXT:
                body.append(f"<p>{_plain(rest[0]).replace('**', '')}</p>")
            elif kind == TABLE:
                head, rows = rest
                body.append(
                    "<div><table><tr>" + "".join(f"<th>{_plain(c)}</th>" for c in head) + "</tr>"
                )
                body += [
                    "<tr>" + "".join(f"<td>{_plain(c)}</td>" for c in row) + "</tr>" for row in rows
                ]
                body.append("</table></div>")
            else:
                picture = base64.b64encode(figures[rest[0]]).decode()
                caption = _plain(CAPTIONS[rest[0]])
                body.append(
                    f'<figure><img alt="{caption}" src="data:image/png;base64,{picture}">'
                    f"<figcaption>{caption}</figcaption></figure>"
                )
    if missing():
        body.append(f"<p>{_plain(missing())}</p>")
    return (
        (
            '<!doctype html><html lang="en"><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width,initial-scale=1">'
            f"<title>{_plain(_title(report))}</title><style>{STYLE}</style>"
        )
        + "\n".join(body)
        + "</html>\n"
    )
