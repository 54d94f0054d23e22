"""Records of the three properties: read from any source, and cut into splits."""

import csv
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from h3fusion_core.config import (
    DOMAINS,
    Data,
    DataSource,
    Domain,
    FileData,
    HubData,
    describe_errors,
)
from h3fusion_core.io import H3FusionError, read_jsonl, write_jsonl

BENIGN = "benign"
SPLITS = ("train", "validation", "test")
Text = Annotated[str, Field(min_length=1)]


class Record(BaseModel):
    """What every row has. `id` and `source` (file and row) are filled in when it is read."""

    model_config = ConfigDict(extra="forbid", str_strip_whitespace=True)

    id: str = ""
    source: str = ""
    prompt: Text
    category: str | None = None


class HelpfulRecord(Record):
    response: Text


class HarmlessRecord(Record):
    """`harmful` is about the prompt; benign borderline prompts carry a helpful answer.

    A test row may do without a reference (`response` empty): refusal is judged without one.
    """

    response: str = ""
    harmful: bool


class HonestRecord(Record):
    best_answer: Text
    correct_answers: list[Text] = Field(min_length=1)
    incorrect_answers: list[Text] = Field(min_length=1)

    @model_validator(mode="after")
    def _check_best_answer(self) -> "HonestRecord":
        if self.best_answer not in self.correct_answers:
            self.correct_answers.insert(0, self.best_answer)
        return self


RECORDS: dict[Domain, type[Record]] = {
    Domain.HELPFUL: HelpfulRecord,
    Domain.HARMLESS: HarmlessRecord,
    Domain.HONEST: HonestRecord,
}


def group_of(domain: str, row: dict[str, Any]) -> str:
    """The router's group of a row: its domain, or `benign` for a borderline prompt."""
    return BENIGN if domain == Domain.HARMLESS and not row["harmful"] else domain


def reference_of(domain: str, row: dict[str, Any]) -> str:
    """The answer that a model should learn to give."""
    return row["best_answer"] if domain == Domain.HONEST else row["response"]


def _alpaca(row: dict[str, Any]) -> dict[str, Any] | None:
    prompt = row["instruction"]
    if not row["output"]:
        return None
    if row.get("input"):
        prompt += "\n\n" + row["input"]
    return {"prompt": prompt, "response": row["output"]}


def _beavertails(row: dict[str, Any]) -> dict[str, Any] | None:
    if not row["is_safe"]:  # an unsafe answer is nothing to learn from
        return None
    return {"prompt": row["prompt"], "response": row["response"], "harmful": True}


def _truthfulqa(row: dict[str, Any]) -> dict[str, Any]:
    if "Question" in row:  # the CSV of the authors; the hub has lower-case names and lists
        return {
            "prompt": row["Question"],
            "best_answer": row["Best Answer"],
            "correct_answers": _split_answers(row["Correct Answers"]),
            "incorrect_answers": _split_answers(row["Incorrect Answers"]),
            "category": row["Category"],
        }
    return {
        "prompt": row["question"],
        "best_answer": row["best_answer"],
        "correct_answers": row["correct_answers"],
        "incorrect_answers": row["incorrect_answers"],
        "category": row["category"],
    }


def _split_answers(text: str) -> list[str]:
    return [answer.strip() for answer in text.split(";") if answer.strip()]


def _xstest(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "prompt": row["prompt"],
        "response": row.get("completion") or "",
        "harmful": row["type"].startswith("contrast_"),
        "category": row["type"],
    }


PRESETS: dict[str, Callable[[dict[str, Any]], dict[str, Any] | None]] = {
    "native": lambda row: row,
    "alpaca": _alpaca,
    "beavertails": _beavertails,
    "truthfulqa": _truthfulqa,
    "xstest": _xstest,
}


def load_records(
    domain: Domain, sources: tuple[DataSource, ...], key: str, seen: set[str] | None = None
) -> list[Record]:
    """Read and check the rows of some sources.

    Args:
        domain: Which kind of record the rows must be.
        sources: Files or hub datasets, read in order.
        key: The params key of the sources, for messages.
        seen: Prompts of other splits. The public sets repeat prompts: a row of theirs is left out
            when its prompt was seen. Rows in the native form are kept for validation to judge.

    Raises:
        H3FusionError: A source is missing or empty, or a row does not fit; names file and row.
    """
    records: list[Record] = []
    seen = set() if seen is None else seen
    for source in sources:
        if source.preset not in PRESETS:
            raise H3FusionError(f"{key}: preset = {source.preset}: choose from {list(PRESETS)}")
        preset, place = PRESETS[source.preset], str(source.path)
        rows = list(_read_file(source) if isinstance(source, FileData) else _read_hub(source, key))
        if not rows:
            raise H3FusionError(f"{place}: no rows ({key})")
        start, stop = (round(bound * len(rows)) for bound in source.part)
        for number, row in rows[start:stop]:
            try:
                values = preset(row)
            except (KeyError, TypeError, AttributeError) as error:
                raise H3FusionError(
                    f"{place}:{number}: does not fit preset {source.preset} ({error!r})"
                ) from error
            if values is None:
                continue
            try:
                record = RECORDS[domain].model_validate(values)
            except ValidationError as error:
                raise H3FusionError(f"{place}:{number}: {describe_errors(error)}") from error
            if source.preset != "native" and record.prompt in seen:
                continue
            seen.add(record.prompt)
            record.source = f"{place}:{number}"
            records.append(record)
    return records


def _read_file(source: FileData) -> Iterator[tuple[int, dict[str, Any]]]:
    path: Path = source.path
    match path.suffix:
        case ".jsonl":
            yield from enumerate(read_jsonl(path), 1)
        case ".json":
            try:
                yield from enumerate(json.loads(path.read_text(encoding="utf-8")), 1)
            except ValueError as error:
                raise H3FusionError(f"{path}: not valid JSON ({error})") from error
        case ".csv":
            try:
                with path.open(newline="", encoding="utf-8") as file:
                    yield from enumerate(csv.DictReader(file), 1)
            except (UnicodeDecodeError, csv.Error) as error:
                raise H3FusionError(f"{path}: not a UTF-8 CSV file ({error})") from error
        case _:
            raise H3FusionError(f"{path}: a data file must be .jsonl, .json or .csv")


def _read_hub(source: HubData, key: str) -> Iterator[tuple[int, dict[str, Any]]]:
    from datasets import load_dataset  # costs a second that local files need not pay

    try:
        rows = load_dataset(
            source.path,
            source.name,
            data_files=source.data_files,
            split=source.split,
            revision=source.revision,
        )
    except Exception as error:  # the hub client raises many kinds; the user needs one line
        raise H3FusionError(f"{key}: {source.path}: {str(error).splitlines()[0]}") from error
    for number, row in enumerate(rows, 1):
        yield number, dict(row)


def build_splits(config: Data, output: Path, seed: int) -> dict[str, dict[str, int]]:
    """Write `<domain>/{train,validation,test}.jsonl` below `output`.

    The validation rows are cut from train, stratified by the router's groups, so that everything
    can be chosen without a look at the test rows.

    Returns:
        The number of rows of each domain and split.
    """
    from sklearn.model_selection import train_test_split  # the other stages read splits alone

    counts: dict[str, dict[str, int]] = {}
    for domain in DOMAINS:
        section = getattr(config, domain)
        test = load_records(domain, section.test, f"data.{domain}.test")
        test_prompts = {record.prompt for record in test}
        train = load_records(domain, section.train, f"data.{domain}.train", test_prompts)
        if section.max_rows is not None and section.max_rows < len(train):
            train = random.Random(seed).sample(train, section.max_rows)
        groups = [group_of(domain, record.model_dump()) for record in train]
        try:
            train, validation = train_test_split(
                train, test_size=config.validation_fraction, random_state=seed, stratify=groups
            )
        except ValueError as error:
            raise H3FusionError(
                f"data.{domain}.train: {len(train)} rows are too few to cut "
                f"data.validation_fraction = {config.validation_fraction} from ({error})"
            ) from error
        counts[domain] = {}
        for split, records in zip(SPLITS, (train, validation, test), strict=True):
            for number, record in enumerate(records, 1):
                record.id = f"{domain}-{split}-{number:04d}"
            write_jsonl(output / domain / f"{split}.jsonl", (r.model_dump() for r in records))
            counts[domain][split] = len(records)
    return counts


def load_split(data: Path, domain: str, split: str) -> list[dict[str, Any]]:
    """Read the rows of one derived split."""
    return read_jsonl(data / domain / f"{split}.jsonl")
