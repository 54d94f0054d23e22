"""Validation of the derived splits with Great Expectations, before anything trains."""

import logging
from pathlib import Path
from typing import Any

import great_expectations as gx
import pandas as pd
from great_expectations import expectations as gxe
from great_expectations.core import ExpectationSuite
from great_expectations.data_context.types.base import ProgressBarsConfig

from h3fusion_core.config import DOMAINS, Domain, Validate
from h3fusion_core.data import SPLITS, load_split, reference_of
from h3fusion_core.io import H3FusionError

MAX_ROWS_SHOWN = 5


def validate_splits(data: Path, config: Validate) -> list[dict[str, Any]]:
    """Check every split of every property against its suite.

    Returns:
        One result for each rule: domain, split, rule, success, the number of rows that break it,
        and the files and rows of the first of them.
    """
    logging.getLogger("great_expectations").setLevel(logging.WARNING)
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    source = context.data_sources.add_pandas("splits")
    results = []
    for domain in DOMAINS:
        frames = {split: _to_frame(domain, load_split(data, domain, split)) for split in SPLITS}
        for split, frame in frames.items():
            others = [frames[other]["prompt"] for other in SPLITS if other != split]
            suite = _build_suite(domain, split, config, sorted(set(pd.concat(others))))
            asset = source.add_dataframe_asset(f"{domain}-{split}")
            batch = asset.add_batch_definition_whole_dataframe("whole").get_batch(
                {"dataframe": frame}
            )
            outcome = batch.validate(suite, result_format={"result_format": "COMPLETE"})
            for result in outcome.results:
                results.append(_describe(result, domain, split, frame))
    return results


def _to_frame(domain: str, rows: list[dict[str, Any]]) -> pd.DataFrame:
    frame = pd.DataFrame(rows)
    if frame.empty:
        raise H3FusionError(f"build/data/{domain}: a split has no rows; check data.{domain}")
    frame["response"] = [reference_of(domain, row) for row in rows]
    frame["prompt_words"] = frame["prompt"].str.split().str.len()
    frame["response_words"] = frame["response"].str.split().str.len()
    if domain == Domain.HARMLESS:
        frame["harmful_share"] = frame["harmful"].astype(float)
    if domain == Domain.HONEST:
        frame["contradictions"] = [
            len(set(row["correct_answers"]) & set(row["incorrect_answers"])) for row in rows
        ]
    return frame


def _build_suite(
    domain: str, split: str, config: Validate, other_prompts: list[str]
) -> ExpectationSuite:
    # refusal is judged without a reference, so a harmless test row need not have one
    min_response_words = 0 if (domain, split) == (Domain.HARMLESS, "test") else 1
    suite = ExpectationSuite(name=str(domain))
    expectations: list[Any] = [
        gxe.ExpectTableRowCountToBeBetween(min_value=config.min_rows),
        gxe.ExpectColumnValuesToNotBeNull(column="prompt"),
        gxe.ExpectColumnValuesToNotMatchRegex(column="prompt", regex=r"^\s*$"),
        gxe.ExpectColumnValuesToNotMatchRegex(column="prompt", regex=r"<\|[a-z_]+\|>"),
        gxe.ExpectColumnValuesToBeUnique(column="prompt"),
        gxe.ExpectColumnValuesToNotBeInSet(column="prompt", value_set=other_prompts),
        gxe.ExpectColumnValuesToBeBetween(
            column="prompt_words", min_value=1, max_value=config.max_prompt_words
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="response_words",
            min_value=min_response_words,
            max_value=config.max_response_words,
        ),
    ]
    if domain == Domain.HARMLESS:
        expectations.append(
            gxe.ExpectColumnMeanToBeBetween(
                column="harmful_share",
                min_value=config.min_class_fraction,
                max_value=1 - config.min_class_fraction,
            )
        )
    if domain == Domain.HONEST:
        expectations.append(gxe.ExpectColumnValuesToBeBetween(column="contradictions", max_value=0))
    for expectation in expectations:
        suite.add_expectation(expectation)
    return suite


def _describe(result: Any, domain: str, split: str, frame: pd.DataFrame) -> dict[str, Any]:
    settings = result.expectation_config
    column = settings.kwargs.get("column")
    bad_rows = result.result.get("unexpected_index_list") or []
    return {
        "domain": str(domain),
        "split": split,
        "rule": settings.type + (f"({column})" if column else ""),
        "success": bool(result.success),
        "rows": len(frame),
        "unexpected": len(bad_rows),
        "observed": result.result.get("observed_value"),
        "first_unexpected": [frame.loc[i, "source"] for i in bad_rows[:MAX_ROWS_SHOWN]],
        "exception": result.exception_info.get("exception_message"),
    }


def check_results(results: list[dict[str, Any]]) -> None:
    """Stop the pipeline when a rule is broken.

    Raises:
        H3FusionError: Names each broken rule with its split and the file and row numbers.
    """
    problems = []
    for result in results:
        if result["success"]:
            continue
        where = ", ".join(result["first_unexpected"])
        if result["unexpected"] > MAX_ROWS_SHOWN:
            where += f" and {result['unexpected'] - MAX_ROWS_SHOWN} more"
        if not where:
            where = result["exception"] or f"observed {result['observed']}"
        problems.append(f"{result['rule']} in {result['domain']}/{result['split']}: {where}")
    if problems:
        raise H3FusionError(
            f"{len(problems)} data rules are broken; mend the rows and run again\n  "
            + "\n  ".join(problems)
        )
