"""Stage `score`: verdicts, scores, plots and the report."""

import datetime
import subprocess
from pathlib import Path

from h3fusion_core.config import load_params
from h3fusion_core.io import (
    read_json,
    read_jsonl,
    report_errors,
    sha256_folder,
    write_json,
    write_jsonl,
    write_text,
)
from h3fusion_core.report import draw_routing, draw_scores, write_report
from h3fusion_core.score import build_metrics, judge_answers, read_cost

ANSWERS, DATA, REPORTS = Path("build/answers"), Path("build/data"), Path("reports")

if __name__ == "__main__":
    with report_errors():
        params = load_params()
        answers = {name: read_jsonl(ANSWERS / f"{name}.jsonl") for name in params.models}
        judged = judge_answers(DATA, answers)
        run = {
            "git_revision": subprocess.run(
                ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
            ).stdout.strip(),
            "params_sha256": params.sha256(),
            "data_sha256": sha256_folder(DATA),
            "base_sha256": read_json(Path("build/base/base.json"))["sha256"],
            "seeds": [params.seed],
            "date": datetime.date.today().isoformat(),
        }
        cost = read_cost(ANSWERS, REPORTS / "training", list(params.models))
        metrics, by_layer = build_metrics(judged, params, cost, run)
        write_json(REPORTS / "metrics.json", metrics)
        write_jsonl(REPORTS / "answers.jsonl", judged)
        write_json(REPORTS / "routing_by_layer.json", by_layer)
        draw_scores(metrics["models"], REPORTS / "scores.png")
        draw_routing(by_layer, REPORTS / "routing.png")
        write_text(REPORTS / "report.md", write_report(metrics, judged))
