"""What the README generates from the registry is current."""

from pathlib import Path

from miue_fast import info

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_table_of_ops_and_backends_is_current():
    begin, end = "<!-- matrix:begin -->\n", "\n<!-- matrix:end -->"
    shown = README[README.index(begin) + len(begin) : README.index(end)]
    assert shown == info.markdown(), "run `python -m miue_fast.info --markdown` and paste it between the markers"
