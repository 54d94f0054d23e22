"""The whole pipeline on the smoke profile, in a copy: runs, is up to date, re-runs what it must."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

pytestmark = pytest.mark.slow


def run(folder, *command, check=True):
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(folder),
    }
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert not check or result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result


def executed(output):
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


def change(folder, section, key, value):
    path = folder / "params.yaml"
    params = yaml.safe_load(path.read_text())
    params[section][key] = value
    path.write_text(yaml.safe_dump(params, sort_keys=False))


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    tracked = run(ROOT, "git", "ls-files").stdout.split("\n")
    for name in filter(None, tracked):
        if name.startswith(("reports/", ".dvc/", "dvc.lock")) or not (ROOT / name).is_file():
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    shutil.copy(folder / "profiles/smoke.yaml", folder / "params.yaml")
    run(folder, "git", "init", "--quiet")
    run(folder, "dvc", "init", "--quiet")
    start = time.monotonic()
    result = run(folder, "dvc", "repro")
    return folder, result, time.monotonic() - start


def test_it_runs_and_reports(project):
    folder, result, seconds = project
    print(f"smoke pipeline: {seconds:.0f} s")
    assert len(executed(result.stdout)) == 13
    metrics = json.loads((folder / "reports/metrics.json").read_text())
    assert list(metrics["models"]) == ["base", "helpful", "harmless", "honest", "fused"]
    for name in ("report.md", "scores.png", "routing.png", "answers.jsonl"):
        assert (folder / "reports" / name).stat().st_size > 0
    shown = run(folder, sys.executable, "-m", "h3fusion_core.report").stdout
    assert "The fused model's hhh is" in shown
    assert run(folder, "dvc", "metrics", "show").stdout.count("hhh")
    run(folder, "dvc", "plots", "show", "--out", "plots")
    assert (folder / "plots/index.html").is_file()


def test_a_second_run_does_nothing(project):
    folder, _, _ = project
    start = time.monotonic()
    result = run(folder, "dvc", "repro")
    assert executed(result.stdout) == []
    assert time.monotonic() - start < 10
    assert "up to date" in run(folder, "dvc", "status").stdout


def test_a_gating_weight_trains_no_expert(project):
    folder, _, _ = project
    change(folder, "fuse", "gating_loss_weight", 0.3)
    assert executed(run(folder, "dvc", "repro").stdout) == ["fuse", "generate@fused", "score"]


def test_a_bad_row_stops_everything_before_training(project):
    folder, _, _ = project
    path = folder / "data/helpful/train.jsonl"
    good = path.read_text()
    lines = good.splitlines()
    row = json.loads(lines[4])
    lines[4] = json.dumps(row | {"prompt": row["prompt"] + " word" * 200})
    path.write_text("\n".join(lines) + "\n")
    change(
        folder,
        "data",
        "helpful",
        yaml.safe_load((folder / "params.yaml").read_text())["data"]["helpful"]
        | {"max_rows": None},
    )
    result = run(folder, "dvc", "repro", check=False)
    assert result.returncode != 0
    assert "error: 1 data rules are broken" in result.stderr
    assert "prompt_words" in result.stderr
    assert "data/helpful/train.jsonl:5" in result.stderr
    assert executed(result.stdout) == ["data", "validate"]
    path.write_text('{"response": "x"}\n' + good)
    result = run(folder, "dvc", "repro", check=False)
    assert "error: data/helpful/train.jsonl:1: missing key prompt" in result.stderr
    path.write_text(good)
