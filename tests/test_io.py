"""Nothing half-written is ever taken for a result, and errors are one line."""

import errno
import logging
import subprocess
import sys

import pytest

from h3fusion_core.io import (
    H3FusionError,
    Progress,
    atomic_path,
    read_json,
    read_jsonl,
    report_errors,
    sha256_folder,
    write_json,
    write_jsonl,
    write_text,
)


class KilledError(Exception):
    """Stands for anything that ends a writer."""


def test_a_failed_writer_leaves_what_was_there(tmp_path):
    path = tmp_path / "result"
    write_text(path, "old")
    with pytest.raises(KilledError), atomic_path(path) as partial:
        partial.write_text("half")
        raise KilledError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["result"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "model"
    with pytest.raises(KilledError), atomic_path(folder) as partial:
        partial.mkdir()
        (partial / "weights").write_text("half")
        raise KilledError
    assert not folder.exists()
    (tmp_path / ".model.partial").mkdir()  # what a killed process left
    with atomic_path(folder) as partial:
        partial.mkdir()
        (partial / "weights").write_text("whole")
    assert (folder / "weights").read_text() == "whole"


def test_json_errors_name_the_file(tmp_path):
    with pytest.raises(H3FusionError, match=r"x\.json: no such file"):
        read_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(H3FusionError, match=r"x\.json: not valid JSON"):
        read_json(tmp_path / "x.json")
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "nan.json", float("nan"))
    assert not (tmp_path / "nan.json").exists()


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (H3FusionError("rows.jsonl:3: missing key prompt"), "error: rows.jsonl:3: missing key"),
        (OSError(errno.ENOSPC, "No space left on device", "w.bin"), "error: w.bin: No space left"),
    ],
)
def test_an_expected_failure_is_one_line_and_a_code(error, line):
    with pytest.raises(SystemExit) as stop, report_errors():
        raise error
    assert str(stop.value).startswith(line)
    assert "\n" not in str(stop.value)


def test_a_stage_without_params_says_what_to_do(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "flows.stages.data"], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert result.stderr.strip() == (
        "error: params.yaml: no such file; `make profile PROFILE=default` writes one"
    )


def test_rows_survive_every_character(tmp_path):
    rows = [{"text": "line\u2028separator"}, {"text": "next\u0085line \n \r"}, {"text": ""}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert read_jsonl(tmp_path / "rows.jsonl") == rows
    write_jsonl(tmp_path / "none.jsonl", [])
    assert read_jsonl(tmp_path / "none.jsonl") == []


def test_folder_hashes_depend_on_names_and_contents(tmp_path):
    digests = set()
    for name, text in (("a", "1"), ("a", "2"), ("b", "1")):
        folder = tmp_path / (name + text)
        folder.mkdir()
        (folder / name).write_text(text)
        digests.add(sha256_folder(folder))
    assert len(digests) == 3


def test_progress_says_what_is_left(caplog):
    resumed = Progress("steps", total=10, done=8, interval_s=0.0)
    resumed.start -= 5.0  # one step took five seconds, so the last one will
    with caplog.at_level(logging.INFO, "h3fusion"):
        resumed.update(9)
    assert "5 s left" in caplog.records[-1].getMessage()
    caplog.clear()
    progress = Progress("steps", total=4, interval_s=0.0)
    with caplog.at_level(logging.INFO, "h3fusion"):
        for done in range(1, 5):
            progress.update(done)
    assert [record.getMessage()[:9] for record in caplog.records] == [
        f"steps {n}/4" for n in range(1, 5)
    ]
    assert "0 s left" in caplog.records[-1].getMessage()
