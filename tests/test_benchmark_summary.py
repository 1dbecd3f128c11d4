"""The table of claims: legal files are shown whole, anything else is refused by file and field."""

import json
from pathlib import Path

import pytest

from benchmarks import summary

ROW = {
    "claim": "cost of a probe",
    "value": 2.5,
    "unit": "gradients",
    "low": 2.25,
    "high": 2.75,
    "aim": "at most 3",
    "holds": True,
    "device": "one core",
    "date": "2026-11-22",
    "runs": 7,
    "command": "python -m benchmarks.probe.run",
}


def write(folder: Path, benchmark: str, rows: object) -> Path:
    path = folder / benchmark / "summary.json"
    path.parent.mkdir()
    path.write_text(json.dumps(rows))
    return path


def test_collect_reads_every_benchmark_in_the_order_of_names(tmp_path: Path) -> None:
    write(tmp_path, "b", [ROW, {**ROW, "holds": False}])
    write(tmp_path, "a", [{**ROW, "claim": "first"}])
    rows = summary.collect(tmp_path)
    assert [(name, row.claim, row.holds) for name, row in rows] == [
        ("a", "first", True),
        ("b", "cost of a probe", True),
        ("b", "cost of a probe", False),
    ]


def test_table_shows_every_row_with_all_its_values() -> None:
    rows = [("probe", summary.Row(**ROW)), ("probe", summary.Row(**{**ROW, "holds": False, "value": 2.6}))]
    lines = [line for line in summary.table(rows).splitlines() if "probe" in line]
    assert len(lines) == 2
    for word in ("cost of a probe", "2.5", "2.25 to 2.75", "gradients", "at most 3", "yes", "7", "one core"):
        assert word in lines[0]
    assert "2.6" in lines[1] and " no " in lines[1]


def test_the_page_begins_with_the_overview_and_what_does_not_hold() -> None:
    rows = [
        ("probe", summary.Row(**ROW)),
        ("probe", summary.Row(**{**ROW, "holds": False, "value": 2.6, "claim": "|bias|"})),
        ("speed", summary.Row(**ROW)),
    ]
    text = summary.page(rows, ["### a case"])
    assert text.index("In a minute") < text.index("### a case") < text.index("does not hold") < text.index("## probe")
    assert "Rows that miss their aim: probe 1 of 2, speed 0 of 1." in text
    assert "- probe: |bias|: 2.6 gradients, aim at most 3" in text
    header, _, held, missed = text[text.index("## probe") : text.index("## speed")].strip().splitlines()[-4:]
    for word in ("cost of a probe", "2.5", "2.25 to 2.75", "at most 3", "yes", "7", "one core"):
        assert word in held
    assert missed.replace("\\|", "").count("|") == header.count("|")  # a bar in a cell is no end of it
    assert "In a minute" not in summary.page(rows, [])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("claim", ""),
        ("claim", 3),
        ("value", "2.5"),
        ("value", True),
        ("value", None),
        ("low", 2.6),
        ("high", 2.4),
        ("aim", None),
        ("holds", "yes"),
        ("holds", 1),
        ("date", "22.11.2026"),
        ("runs", 0),
        ("runs", 1.5),
        ("command", None),
        ("colour", "red"),
    ],
)
def test_an_illegal_value_is_refused_by_file_row_and_field(tmp_path: Path, field: str, value: object) -> None:
    path = write(tmp_path, "probe", [ROW, {**ROW, field: value}])
    with pytest.raises(summary.SummaryError) as caught:
        summary.collect(tmp_path)
    assert str(path) in str(caught.value)
    assert "row 1" in str(caught.value)
    assert repr(field) in str(caught.value)


@pytest.mark.parametrize("field", list(ROW))
def test_a_missing_field_is_named(tmp_path: Path, field: str) -> None:
    write(tmp_path, "probe", [{name: value for name, value in ROW.items() if name != field}])
    with pytest.raises(summary.SummaryError, match=f"field '{field}' is missing"):
        summary.collect(tmp_path)


def test_an_infinite_value_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "probe", [{**ROW, "value": float("inf")}])
    with pytest.raises(summary.SummaryError, match="field 'value' must be a finite number"):
        summary.collect(tmp_path)


def test_a_torn_file_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "probe", [ROW])
    path.write_text(path.read_text()[:-5])
    with pytest.raises(summary.SummaryError, match="not valid JSON"):
        summary.collect(tmp_path)


def test_write_then_read_is_identity_and_checks_first(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    rows = [summary.Row(**ROW), summary.Row(**{**ROW, "low": None, "high": None, "aim": 3})]
    summary.write_summary(path, rows)
    assert summary.read_summary(path) == rows
    with pytest.raises(summary.SummaryError, match="'runs'"):
        summary.write_summary(path, [summary.Row(**{**ROW, "runs": 0})])
    assert summary.read_summary(path) == rows


def test_the_committed_summaries_are_valid() -> None:
    summary.collect()
