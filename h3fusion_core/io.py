"""Files: atomic writes, JSON lines, hashes, progress lines, and how errors reach a user."""

import hashlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

logger = logging.getLogger("h3fusion")


class H3FusionError(Exception):
    """A user's mistake: the message names the file, key or row, and what to do."""


@contextmanager
def report_errors() -> Iterator[None]:
    """Set up plain logging for a stage; turn an expected failure into one line and exit code 1."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
    logger.setLevel(logging.INFO)
    try:
        yield
    except H3FusionError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        sys.exit(f"error: {error.filename or 'file system'}: {reason}")
    except SafetensorError as error:
        sys.exit(f"error: a weights file could not be read or written: {error}")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a sibling path to write a file or folder to; it becomes `path` only on success.

    A killed or failed writer leaves `path` as it was: nothing half-written is taken for a result.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    _remove(partial)
    try:
        yield partial
        if path.is_dir():  # a folder can't be replaced in one step, a file can
            shutil.rmtree(path)
        os.replace(partial, path)
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in one step."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON; NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; a missing or broken one raises `H3FusionError` with its name."""
    if not path.is_file():
        raise H3FusionError(f"{path}: no such file; run `dvc repro` to make it")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise H3FusionError(f"{path}: not valid JSON ({error})") from error


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read a file of one JSON object a line; errors name the file and the line."""
    if not path.is_file():
        raise H3FusionError(f"{path}: no such file")
    rows = []
    try:
        # not splitlines(), which would also split a row at U+2028 inside a text
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        for number, line in enumerate(lines if lines != [""] else [], 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise H3FusionError(f"{path}:{number}: not valid JSON ({error})") from error
            if not isinstance(row, dict):
                raise H3FusionError(f"{path}:{number}: expected a JSON object")
            rows.append(row)
    except UnicodeDecodeError as error:
        raise H3FusionError(f"{path}: not UTF-8 (byte {error.start})") from error
    return rows


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_folder(folder: Path, pattern: str = "*") -> str:
    """Hex SHA-256 over the relative names and contents of the files below `folder`."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob(pattern)):
        if path.is_file():
            digest.update(f"{path.relative_to(folder)}:{sha256_file(path)}\n".encode())
    return digest.hexdigest()


class Progress:
    """Logs "done/total, elapsed, left" as plain lines, at most one every `interval_s` seconds.

    `done` units were finished before, by a run that goes on: they took no time of this one.
    """

    def __init__(self, name: str, total: int, done: int = 0, interval_s: float = 10.0) -> None:
        self.name, self.total, self.first, self.interval_s = name, total, done, interval_s
        self.start = self.last = time.monotonic()

    def update(self, done: int, note: str = "") -> None:
        """Report that `done` of `total` units are finished."""
        now = time.monotonic()
        if now - self.last < self.interval_s and done < self.total:
            return
        self.last = now
        elapsed_s = now - self.start
        left_s = elapsed_s / (done - self.first) * (self.total - done)
        logger.info(
            "%s %d/%d, %.0f s, %.0f s left %s", self.name, done, self.total, elapsed_s, left_s, note
        )
