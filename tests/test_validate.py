"""Each rule stops the pipeline and names the rule, the file and the rows."""

import shutil

import pytest
from conftest import ROOT

from h3fusion_core.config import load_params
from h3fusion_core.io import H3FusionError, read_jsonl, write_jsonl
from h3fusion_core.validate import check_results, validate_splits

RULES = load_params(ROOT / "profiles/smoke.yaml").validate_


def test_good_data_passes_every_rule(splits):
    results = validate_splits(splits, RULES)
    assert len(results) > 60
    assert all(result["success"] for result in results), [r for r in results if not r["success"]]
    check_results(results)


@pytest.mark.parametrize(
    ("domain", "values", "message"),
    [
        ("helpful", {"prompt": "Explain train bread."}, "values_to_be_unique.prompt.*jsonl:2"),
        ("helpful", {"prompt": "Explain test owls."}, "not_be_in_set.prompt.*train.jsonl:4"),
        ("helpful", {"prompt": "  "}, "not_match_regex.prompt.*train.jsonl:4"),
        ("helpful", {"prompt": "Hi <|end|> there"}, "not_match_regex.prompt.*train.jsonl:4"),
        ("helpful", {"response": ""}, "between.response_words.*train.jsonl:4"),
        ("helpful", {"prompt": "word " * 500}, "between.prompt_words.*train.jsonl:4"),
        ("honest", {"incorrect_answers": ["No, it is not."]}, "contradictions.*train.jsonl:4"),
    ],
)
def test_a_bad_row_is_named(splits, tmp_path, domain, values, message):
    data = shutil.copytree(splits, tmp_path / "data")
    path = data / domain / "train.jsonl"
    rows = read_jsonl(path)
    rows[3] |= values
    write_jsonl(path, rows)
    with pytest.raises(H3FusionError, match=f"rules? .* broken(.|\n)*{message}"):
        check_results(validate_splits(data, RULES))


def test_class_balance_and_size_are_rules(splits, tmp_path):
    data = shutil.copytree(splits, tmp_path / "data")
    path = data / "harmless" / "train.jsonl"
    rows = read_jsonl(path)
    write_jsonl(path, [row | {"harmful": True} for row in rows[:9]])
    with pytest.raises(H3FusionError, match=r"3 data rules|2 data rules") as error:
        check_results(validate_splits(data, RULES))
    assert "row_count_to_be_between in harmless/train: observed 9" in str(error.value)
    assert "mean_to_be_between(harmful_share) in harmless/train: observed 1.0" in str(error.value)
