"""The embedded dataset is what its card says, and bad input is named by file and row."""

import csv
import json
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from sklearn.feature_extraction.text import CountVectorizer

from h3fusion_core.config import DOMAINS, FileData, HubData, load_params
from h3fusion_core.data import build_splits, group_of, load_records, load_split, reference_of
from h3fusion_core.io import H3FusionError, read_jsonl
from h3fusion_core.judges import is_refusal

DATA = ROOT / "data"
MAX_SIMILARITY = 0.6  # Jaccard over word pairs: a filled-in template is far above it
REAL_DATA = Path(os.environ.get("H3F_REAL_DATA", "absent"))


def rows_of(domain, split):
    return read_jsonl(DATA / domain / f"{split}.jsonl")


def jaccard(prompts, others):
    vectorizer = CountVectorizer(ngram_range=(2, 2), binary=True, token_pattern=r"[\w']+")
    matrix = vectorizer.fit_transform([f"start {p} end" for p in [*prompts, *others]])
    a, b = matrix[: len(prompts)], matrix[len(prompts) :]
    shared = (a @ b.T).toarray().astype(float)
    sizes = a.sum(axis=1).A1[:, None] + b.sum(axis=1).A1[None, :]
    return shared / (sizes - shared)


def test_counts_of_the_data_card():
    card = (DATA / "README.md").read_text()
    for domain in DOMAINS:
        train, test = len(rows_of(domain, "train")), len(rows_of(domain, "test"))
        assert re.search(rf"\| {domain} \| {train} \| {test} \|", card)
    for split in ("train", "test"):
        rows = rows_of("harmless", split)
        assert sum(row["harmful"] for row in rows) * 2 == len(rows)
        assert len({row["category"] for row in rows if row["harmful"]}) >= 10


def test_no_near_duplicates_within_and_across_splits():
    prompts = [row["prompt"] for d in DOMAINS for s in ("train", "test") for row in rows_of(d, s)]
    similarity = jaccard(prompts, prompts)
    np.fill_diagonal(similarity, 0.0)
    i, j = np.unravel_index(similarity.argmax(), similarity.shape)
    assert similarity.max() < MAX_SIMILARITY, (prompts[i], prompts[j])


def test_no_opening_fills_the_set():
    for domain in DOMAINS:
        prompts = [row["prompt"] for row in rows_of(domain, "train")]
        openings = Counter(" ".join(prompt.lower().split()[:3]) for prompt in prompts)
        assert openings.most_common(1)[0][1] <= 0.1 * len(prompts)


def test_harmful_requests_are_refused_and_nothing_else_is():
    for split in ("train", "test"):
        for row in rows_of("harmless", split):
            if not row["harmful"]:
                assert not is_refusal(row["response"]), row
            assert len(row["response"].split()) <= 70
    refusals = [is_refusal(r["response"]) for r in rows_of("harmless", "train") if r["harmful"]]
    assert np.mean(refusals) > 0.95


def test_length_does_not_give_the_honest_answer_away():
    rows = rows_of("honest", "train") + rows_of("honest", "test")
    assert all(2 <= len(row["correct_answers"]) <= 4 for row in rows)
    assert all(2 <= len(row["incorrect_answers"]) <= 4 for row in rows)
    assert all(row["best_answer"] in row["correct_answers"] for row in rows)
    words = [
        np.mean([len(answer.split()) for row in rows for answer in row[key]])
        for key in ("correct_answers", "incorrect_answers")
    ]
    assert abs(words[0] - words[1]) < 1.0


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="H3F_REAL_DATA names no folder of benchmarks")
def test_nothing_is_copied_from_a_benchmark():
    with (REAL_DATA / "TruthfulQA.csv").open() as file:
        public = [row["Question"] for row in csv.DictReader(file)]
    with (REAL_DATA / "xstest_prompts.csv").open() as file:
        public += [row["prompt"] for row in csv.DictReader(file)]
    public += [
        row["instruction"] for row in json.loads((REAL_DATA / "alpaca_700.json").read_text())
    ]
    ours = [row["prompt"] for d in DOMAINS for s in ("train", "test") for row in rows_of(d, s)]
    assert jaccard(ours, public).max() < MAX_SIMILARITY


def test_splits_are_cut_without_overlap_and_in_balance(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_params(ROOT / "profiles/default.yaml").data
    counts = build_splits(config, tmp_path / "a", seed=1)
    build_splits(config, tmp_path / "b", seed=1)
    build_splits(config, tmp_path / "c", seed=2)
    for domain in DOMAINS:
        splits = {s: load_split(tmp_path / "a", domain, s) for s in counts[domain]}
        assert {s: len(rows) for s, rows in splits.items()} == counts[domain]
        assert counts[domain]["train"] + counts[domain]["validation"] == len(
            rows_of(domain, "train")
        )
        prompts = [row["prompt"] for rows in splits.values() for row in rows]
        assert len(set(prompts)) == len(prompts)
        validation = f"{domain}/validation.jsonl"
        same, other = ((tmp_path / x / validation).read_text() for x in ("b", "c"))
        assert (tmp_path / "a" / validation).read_text() == same != other
    groups = Counter(
        group_of("harmless", r) for r in load_split(tmp_path / "a", "harmless", "train")
    )
    assert groups["benign"] == groups["harmless"]


def load(domain, path, **settings):
    return load_records(domain, (FileData(source="file", path=path, **settings),), "data.x.train")


@pytest.mark.parametrize(
    ("domain", "line", "message"),
    [
        ("helpful", '{"response": "x"}', r"rows\.jsonl:2: missing key prompt"),
        ("helpful", '{"prompt": " ", "response": "x"}', r"rows\.jsonl:2: prompt = ' '"),
        ("helpful", '{"prompt": "p", "response": "x", "y": 1}', r":2: unknown key y"),
        ("harmless", '{"prompt": "p", "response": "x"}', r":2: missing key harmful"),
        ("honest", '{"prompt": "p", "best_answer": "b"}', r":2: missing key correct_answers"),
        ("helpful", '{"prompt": "p', r"rows\.jsonl:2: not valid JSON"),
        ("helpful", "[1]", r"rows\.jsonl:2: expected a JSON object"),
    ],
)
def test_a_bad_row_is_named(tmp_path, domain, line, message):
    good = {
        "helpful": {"prompt": "p", "response": "r"},
        "harmless": {"prompt": "p", "response": "r", "harmful": True},
        "honest": {
            "prompt": "p",
            "best_answer": "a",
            "correct_answers": ["a"],
            "incorrect_answers": ["b"],
        },
    }
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(good[domain]) + "\n" + line + "\n")
    with pytest.raises(H3FusionError, match=message):
        load(domain, path)


def test_a_bad_file_is_named(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(H3FusionError, match=r"empty\.jsonl: no rows \(data\.x\.train\)"):
        load("helpful", tmp_path / "empty.jsonl")
    with pytest.raises(H3FusionError, match=r"absent\.jsonl: no such file"):
        load("helpful", tmp_path / "absent.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xfc"}\n')
    with pytest.raises(H3FusionError, match=r"latin\.jsonl: not UTF-8"):
        load("helpful", tmp_path / "latin.jsonl")
    (tmp_path / "rows.xml").write_text("x")
    with pytest.raises(H3FusionError, match=r"must be \.jsonl, \.json or \.csv"):
        load("helpful", tmp_path / "rows.xml")
    with pytest.raises(H3FusionError, match="preset = alpacca"):
        load("helpful", tmp_path / "rows.xml", preset="alpacca")


def test_presets_read_the_public_forms(tmp_path):
    alpaca = tmp_path / "alpaca.json"
    alpaca.write_text(json.dumps([{"instruction": "Add.", "input": "1, 2", "output": "3"}]))
    (record,) = load("helpful", alpaca, preset="alpaca")
    assert (record.prompt, record.response) == ("Add.\n\n1, 2", "3")
    assert record.source == f"{alpaca}:1"

    truthful = tmp_path / "t.csv"
    truthful.write_text(
        "Category,Question,Best Answer,Correct Answers,Incorrect Answers\n"
        "Myths,Is it so?,No,No; It is not,Yes; It is\n"
        "Myths,Is it not?,Yes,Yes,No\n"
    )
    first, second = load("honest", truthful, preset="truthfulqa")
    assert first.correct_answers == ["No", "It is not"]
    assert first.incorrect_answers == ["Yes", "It is"]
    (half,) = load("honest", truthful, preset="truthfulqa", part=(0.5, 1.0))
    assert half.prompt == second.prompt

    beavers = tmp_path / "b.jsonl"
    rows = [
        {"prompt": "p", "response": "I can't help with that.", "is_safe": True, "category": {}},
        {"prompt": "p", "response": "(removed)", "is_safe": False, "category": {}},
    ]
    beavers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (safe,) = load("harmless", beavers, preset="beavertails")
    assert safe.harmful
    assert reference_of("harmless", safe.model_dump()) == "I can't help with that."
    with pytest.raises(H3FusionError, match=r"does not fit preset alpaca .*instruction"):
        load("helpful", beavers, preset="alpaca")

    xstest = tmp_path / "x.csv"
    xstest.write_text("id,prompt,type\n1,Kill a process?,homonyms\n2,Bad?,contrast_homonyms\n")
    assert [r.harmful for r in load("harmless", xstest, preset="xstest")] == [False, True]


def test_a_hub_dataset_is_read_from_a_folder_in_the_hubs_layout(tmp_path):
    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    (folder / "train-00000.jsonl").write_text(
        '{"instruction": "Hi", "input": "", "output": "Ho"}\n'
    )
    source = HubData(source="hub", path=str(tmp_path / "set"), split="train", preset="alpaca")
    (record,) = load_records("helpful", (source,), "data.helpful.train")
    assert (record.prompt, record.response) == ("Hi", "Ho")
    absent = HubData(source="hub", path=str(tmp_path / "absent"), split="train")
    with pytest.raises(H3FusionError, match=r"data\.helpful\.train: .*absent"):
        load_records("helpful", (absent,), "data.helpful.train")
