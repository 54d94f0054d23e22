"""The flow over a tiny DVC project: order, what was skipped, failures, and no process left."""

import ast
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from zoneinfo import ZoneInfo

import psutil
import pytest
import yaml
from prefect.artifacts import Artifact
from prefect.logging import disable_run_logger
from prefect.schedules import Cron
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.testing.utilities import prefect_test_harness

import flows.pipeline
from flows import deployments
from flows.pipeline import ROOT, build_report, list_stages, pipeline, run_stage, select_stages

# File order is not alphabetical.
DVC_YAML = """
stages:
  start:
    cmd: echo start >> order.txt; echo 1 > start.txt
    outs: [start.txt]
  align:
    foreach: [helpful, harmless]
    do:
      cmd: echo ${item} >> order.txt; cat start.txt > ${item}.txt
      deps: [start.txt]
      outs: ["${item}.txt"]
"""
STAGES = ["start", "align@helpful", "align@harmless"]
# Leaves a process behind that holds the output open, and fails.
FAILING = """
stages:
  broken:
    cmd: seq 30; sleep 300 & echo $! > pid; echo the last words; exit 3
  never:
    cmd: touch never.txt
"""
WAITING = """
stages:
  waiting:
    cmd: sleep 300 & echo $! > pid; wait
"""


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
        patch.setenv("PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY", "false")
        patch.setenv("DO_NOT_TRACK", "1")
        with prefect_test_harness(server_startup_timeout=120):
            yield


@pytest.fixture(scope="session")
def empty_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A git repository after `dvc init`."""
    root = tmp_path_factory.mktemp("dvc")
    subprocess.run(["git", "init", "--quiet"], cwd=root, check=True)
    subprocess.run([sys.executable, "-m", "dvc", "init", "--quiet"], cwd=root, check=True)
    return root


@pytest.fixture
def project(empty_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    shutil.copytree(empty_project, tmp_path, dirs_exist_ok=True)
    (tmp_path / "dvc.yaml").write_text(DVC_YAML)
    return tmp_path


def wait_until(condition: Callable[[], bool], timeout_s: float = 30.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return met


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def read_pid(project: Path) -> int | None:
    """The pid that a stage wrote, once it is written."""
    pid = project / "pid"
    return int(pid.read_text()) if pid.exists() and pid.read_text().strip() else None


def test_stages_come_from_dvc_in_file_order(project: Path) -> None:
    assert list_stages(project) == STAGES


def test_folder_without_dvc_fails_the_flow(tmp_path: Path) -> None:
    state = pipeline.fn(root=tmp_path)
    assert state.is_failed()
    assert state.message.startswith("dvc cannot list the stages of")


@pytest.mark.parametrize(
    ("wanted", "selected"),
    [
        (None, STAGES),
        (["align@helpful", "start"], ["start", "align@helpful"]),
        (["align"], ["align@helpful", "align@harmless"]),
        (["align@harmless"], ["align@harmless"]),
    ],
)
def test_selected_stages_keep_the_order_of_dvc(
    wanted: list[str] | None, selected: list[str]
) -> None:
    assert select_stages(STAGES, wanted) == selected


@pytest.mark.parametrize("wanted", [["align@fused"], ["start", "typo"], []])
def test_unknown_or_no_stages_are_an_error(wanted: list[str]) -> None:
    with pytest.raises(ValueError, match="stages: "):
        select_stages(STAGES, wanted)


def test_flow_runs_the_stages_in_order_and_reports(prefect_server: None, project: Path) -> None:
    assert pipeline(root=project) == dict.fromkeys(STAGES, "ran")
    assert (project / "order.txt").read_text().split() == ["start", "helpful", "harmless"]
    assert "- align@harmless: ran" in Artifact.get("scores").data


def test_states_tell_ran_skipped_cached_and_forced(project: Path) -> None:
    (project / "start.txt").write_text("1")
    with disable_run_logger():
        states = [run_stage.fn("align@helpful", project), run_stage.fn("align@helpful", project)]
        # Without its lock the stage is new to DVC, but its outputs are in the run cache.
        (project / "dvc.lock").unlink()
        states.append(run_stage.fn("align@helpful", project))
        states.append(run_stage.fn("align@helpful", project, force=True))
    assert [state.name for state in states] == ["Ran", "Skipped", "Cached", "Ran"]
    assert [state.data for state in states] == ["ran", "skipped", "cached", "ran"]
    assert (project / "order.txt").read_text().split() == ["helpful", "helpful"]


def test_failure_ends_the_flow_with_the_last_lines(prefect_server: None, project: Path) -> None:
    (project / "dvc.yaml").write_text(FAILING)
    started = time.monotonic()
    state = pipeline(root=project, return_state=True)
    assert state.is_failed()
    assert state.message.startswith("stage broken failed with exit code 255\n")
    assert "the last words\n" in state.message
    assert "\n30\n" in state.message
    assert "\n1\n" not in state.message
    assert not (project / "never.txt").exists()
    assert not is_running(read_pid(project))
    assert time.monotonic() - started < 15


def test_interrupt_kills_a_process_that_ignores_sigterm(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "dvc.yaml").write_text(WAITING.replace("sleep", "trap '' TERM; sleep"))
    monkeypatch.setattr(flows.pipeline, "GRACE_S", 0.5)

    def interrupt() -> None:
        wait_until(lambda: read_pid(project) is not None)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with disable_run_logger(), pytest.raises(KeyboardInterrupt):
        run_stage.fn("waiting", project)
    assert not is_running(read_pid(project))


def test_termination_of_the_command_ends_the_process_group(
    prefect_server: None, project: Path
) -> None:
    (project / "dvc.yaml").write_text(WAITING)
    # A copy of the package in the project makes the project the default root.
    shutil.copytree(
        ROOT / "flows", project / "flows", ignore=shutil.ignore_patterns("stages", "__pycache__")
    )
    command = subprocess.Popen(
        [sys.executable, "-m", "flows.pipeline"],
        cwd=project,
        env=os.environ | {"PREFECT_API_URL": PREFECT_API_URL.value()},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert wait_until(lambda: read_pid(project) is not None)
    command.terminate()
    _, stderr = command.communicate(timeout=20)
    assert command.returncode == 1
    assert stderr.splitlines()[-1] == "pipeline: interrupted"
    assert not is_running(read_pid(project))


def test_report_has_the_scores_and_what_they_came_from(project: Path) -> None:
    def score(value: float, low: float, high: float, higher_is_better: bool) -> dict:
        return {"value": value, "ci95": [low, high], "n": 80, "higher_is_better": higher_is_better}

    (project / "dvc.lock").write_bytes(b"abc")
    report = build_report(project, {"start": "skipped"})
    assert "git revision: `none`" in report  # nothing is committed yet
    assert "|" not in report

    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", "add", "dvc.yaml"], cwd=project, check=True)
    subprocess.run(["git", *identity, "commit", "-qm", "stages"], cwd=project, check=True)
    models = {
        "base": {"hhh": score(41, 38.04, 44.2, True)},
        "fused": {"hhh": score(52.43, 48, 56, True), "unsafe_rate": score(5, 0, 9, False)},
    }
    (project / "reports").mkdir()
    (project / "reports" / "metrics.json").write_text(json.dumps({"models": models}))
    lines = build_report(project, {"start": "skipped"}).splitlines()
    assert re.fullmatch(r"- git revision: `[0-9a-f]{40}`", lines[0])
    assert hashlib.sha256(b"abc").hexdigest() in lines[1]
    assert lines[2:] == [
        "- start: skipped",
        "",
        "| model | hhh ↑ | unsafe_rate ↓ |",
        "|---|---|---|",
        "| base | 41 [38, 44.2] n=80 | - |",
        "| fused | 52.4 [48, 56] n=80 | 5 [0, 9] n=80 |",
    ]


def test_deployment_is_served_one_run_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    served = {}
    monkeypatch.setattr(deployments.pipeline, "serve", lambda **options: served.update(options))
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:4200/api"}):
        deployments.main(["--cron", "30 1 * * 6", "--timezone", "Europe/Berlin"])
    assert (served["schedule"].cron, served["schedule"].timezone) == ("30 1 * * 6", "Europe/Berlin")
    assert served["global_limit"].limit == 1


def test_serving_without_a_server_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with temporary_settings({PREFECT_API_URL: None}), pytest.raises(SystemExit):
        deployments.main([])
    assert "PREFECT_API_URL is not set" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--cron", "every day"], ["--timezone", "Mars/Olympus"]])
def test_wrong_schedule_is_refused(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        deployments.main(options)
    assert options[1] in capsys.readouterr().err


def test_prefect_yaml_deploys_the_flow_on_a_schedule() -> None:
    (deployment,) = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    path, name = deployment["entrypoint"].split(":")
    assert (ROOT / path).is_file()
    assert name == pipeline.fn.__name__
    (schedule,) = deployment["schedules"]
    assert Cron(schedule["cron"], timezone=ZoneInfo(schedule["timezone"]).key)


@pytest.mark.parametrize("module", ["__init__", "pipeline", "deployments"])
def test_flows_import_prefect_and_the_standard_library_only(module: str) -> None:
    tree = ast.parse((ROOT / "flows" / f"{module}.py").read_text())
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module)
    top_level = {name.split(".")[0] for name in imported - {"flows.pipeline"}}
    assert top_level <= sys.stdlib_module_names | {"prefect"}
