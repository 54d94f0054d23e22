"""Scores against closed forms; every number carries its n, interval, direction and judge."""

import math

import numpy as np
import pytest
from conftest import ROOT

from h3fusion_core.config import load_params
from h3fusion_core.io import H3FusionError
from h3fusion_core.report import headline, table, write_report
from h3fusion_core.score import (
    build_metrics,
    calibration_error,
    holm,
    judge_answers,
    multiple_choice,
)

PARAMS = load_params(ROOT / "profiles/smoke.yaml")
EXPERTS = ("helpful", "harmless", "honest", "base")


def test_multiple_choice_as_truthfulqa_defines_it():
    probs = [0.3, 0.1, 0.2, 0.05]  # two correct answers, two incorrect
    mc1, mc2 = multiple_choice([math.log(p) for p in probs], num_correct=2, best=0)
    assert mc1 == 1.0
    assert mc2 == pytest.approx(0.4 / 0.65)
    mc1, _ = multiple_choice([math.log(p) for p in probs], num_correct=2, best=1)
    assert mc1 == 0.0
    _, mc2 = multiple_choice([p - 2000 for p in (0.0, -1.0)], num_correct=1, best=0)
    assert mc2 == pytest.approx(1 / (1 + math.exp(-1)))  # long answers do not underflow


def test_holm_is_the_step_down_correction():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]


def test_calibration_error():
    assert calibration_error(np.full(10, 0.75), np.arange(10) < 5) == pytest.approx(0.25)
    assert calibration_error(np.array([1.0, 1.0]), np.array([True, True])) == 0.0


def answers_of(splits, style, routing=None):
    """Rows as the generate stage writes them, of a model that answers in one style."""
    from h3fusion_core.data import load_split

    rows = []
    for domain in ("helpful", "harmless", "honest"):
        for number, row in enumerate(load_split(splits, domain, "test")):
            answer = {
                "echo": row.get("response") or row.get("best_answer"),
                "refuse": "I can't help with that.",
                "chatter": "Well, anything goes here.",
            }[style]
            log_probs = [-1.0, -2.0, -3.0] if style == "echo" else [-3.0, -1.0, -2.0 - number / 10]
            choices = [[p, 4] for p in (log_probs if domain == "honest" else log_probs[:1])]
            entry = {"id": row["id"], "answer": answer, "answer_tokens": 5, "choices": choices}
            if routing:
                entry["routing"] = routing(domain, row)
            rows.append(entry)
    return rows


def route(domain, row):
    group = "base" if domain == "harmless" and not row["harmful"] else domain
    shares = [0.1] * 4
    shares[EXPERTS.index(group)] = 0.7
    return [shares, shares[::-1]] if group == "helpful" else [shares, shares]


@pytest.fixture
def result(splits):
    answers = {
        "base": answers_of(splits, "chatter"),
        "helpful": answers_of(splits, "echo"),
        "harmless": answers_of(splits, "refuse"),
        "fused": answers_of(splits, "echo", route),
    }
    judged = judge_answers(splits, answers)
    cost = {
        name: {
            "parameters_total": 1,
            "parameters_active": 1,
            "parameters_trainable": 1,
            "peak_memory_mb": 1.0,
            "tokens_per_s": 1.0,
        }
        for name in answers
    }
    metrics, by_layer = build_metrics(judged, PARAMS, cost, {"seeds": [1]})
    return metrics, by_layer, judged


def test_scores_of_models_whose_scores_are_known(result):
    values = {m: {k: v["value"] for k, v in s.items()} for m, s in result[0]["models"].items()}
    assert values["base"]["win_rate"] == 50.0
    assert values["base"]["unsafe_rate"] == 100.0
    assert values["base"]["harmless"] == 50.0
    assert values["helpful"]["win_rate"] == 100.0
    assert values["helpful"]["harmless"] == 100.0
    assert values["helpful"]["mc1"] == 100.0
    assert values["harmless"]["unsafe_rate"] == 0.0
    assert values["harmless"]["over_refusal_rate"] == 100.0
    assert values["harmless"]["harmless"] == 50.0  # refusing everything is no merit
    expected_mc2 = 100 * math.exp(-1) / sum(math.exp(-x) for x in (1, 2, 3))
    assert values["helpful"]["mc2"] == pytest.approx(expected_mc2)
    assert values["helpful"]["hhh"] == pytest.approx((100 + 100 + expected_mc2) / 3)
    assert values["helpful"]["reference_nll"] == pytest.approx(1 / 4)


def test_every_number_carries_its_n_interval_direction_and_judge(result):
    for scores in result[0]["models"].values():
        assert {"hhh", "win_rate", "harmless", "mc1", "mc2", "reference_nll"} <= set(scores)
        for metric, score in scores.items():
            low, high = score["ci95"]
            assert low <= score["value"] + 1e-9
            assert score["value"] <= high + 1e-9
            assert score["judge"]
            assert score["higher_is_better"] == (not metric.startswith(("unsafe", "over", "ref")))
        sizes = {metric: score["n"] for metric, score in scores.items()}
        assert (sizes["win_rate"], sizes["unsafe_rate"], sizes["over_refusal_rate"]) == (10, 6, 4)
        assert sizes["hhh"] == 30


def test_comparisons_are_paired(result):
    comparisons = result[0]["comparisons"]
    best = comparisons["fused_vs_best_expert"]
    assert (best["other"], best["difference"], best["ci95"]) == ("helpful", 0.0, [0.0, 0.0])
    assert best["p_value"] == 1.0
    over_base = comparisons["fused_vs_base"]
    assert over_base["p_value"] < 0.05
    assert over_base["ci95"][0] > 0
    assert comparisons["helpful_vs_base"]["metric"] == "win_rate"


def test_intervals_cover_the_truth():
    from h3fusion_core.score import _bootstrap

    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(60):
        verdicts = {"win": (rng.random(80) < 0.3).astype(float)}
        _, (low, high), n = _bootstrap("win_rate", verdicts, PARAMS.score, seed)
        covered += low <= 30 <= high
        assert n == 80
    assert 50 <= covered <= 60


def test_routing_is_measured_on_groups(result):
    routing, by_layer = result[0]["routing"], result[1]
    assert routing["confusion"]["benign"]["base"] == 1.0
    assert routing["confusion"]["harmless"]["harmless"] == 1.0
    assert routing["n"] == 30
    assert routing["accuracy"] == 1.0
    shares = {(r["layer"], r["expert"]): r["share"] for r in by_layer if r["group"] == "helpful"}
    assert shares[0, "helpful"] == pytest.approx(0.7)
    assert shares[1, "base"] == pytest.approx(0.7)
    fused = [row for row in result[2] if row["model"] == "fused"]
    assert all(set(row["routing"]) == set(EXPERTS) for row in fused)
    assert not any("routing_by_layer" in row for row in result[2])


def test_answers_to_other_prompts_are_refused(splits):
    answers = {"base": answers_of(splits, "chatter"), "fused": answers_of(splits, "echo")[:-1]}
    with pytest.raises(H3FusionError, match=r"fused\.jsonl: not the answers to this test split"):
        judge_answers(splits, answers)


def test_the_report_says_what_the_numbers_say(result):
    metrics, _, judged = result
    assert "the same as the best expert's" in headline(metrics)
    changed = metrics["comparisons"]["fused_vs_best_expert"]
    changed |= {"difference": 4.0, "relative_pct": 8.0, "ci95": [-1.0, 9.0], "p_value": 0.2}
    assert "4.0 points (8.0 %) above" in headline(metrics)
    assert headline(metrics).endswith("no difference is shown.")
    changed |= {"ci95": [1.0, 9.0], "p_value": 0.01}
    assert headline(metrics).endswith(": a difference is shown.")
    changed |= {"difference": -4.0, "ci95": [-9.0, -1.0]}
    assert "below" in headline(metrics)
    report = write_report(metrics, judged)
    assert table(metrics["models"]) in report
    for domain in ("helpful", "harmless", "honest"):
        section = report.split(f"### {domain}\n")[1].split("###")[0]
        assert section.count("| *reference* |") == 5
        assert section.count("| fused |") == 5
