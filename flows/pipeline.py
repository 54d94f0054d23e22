"""The pipeline as a Prefect flow: one task for each DVC stage, in the order of `dvc.yaml`.

DVC alone decides what has to run; the flow adds the log, the states and a report.
`python -m flows.pipeline` runs it once.
"""

import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

ROOT = Path(__file__).resolve().parents[1]
DVC = (sys.executable, "-m", "dvc")
GRACE_S = 10.0  # shorter than the 30 s after which Prefect kills the flow's own process
TAIL_LINES = 20


def list_stages(root: Path) -> list[str]:
    """Names of the stages in `dvc.yaml`, in file order; `foreach` stages as `name@item`."""
    listing = subprocess.run(
        [*DVC, "stage", "list", "--name-only"], cwd=root, capture_output=True, text=True
    )
    if listing.returncode != 0:
        raise ValueError(f"dvc cannot list the stages of {root}: {listing.stderr.strip()}")
    return listing.stdout.split()


def select_stages(known: list[str], wanted: list[str] | None) -> list[str]:
    """The wanted stages in DVC's order; a bare `foreach` name stands for all of its items.

    Raises:
        ValueError: nothing is selected, or a name is unknown.
    """
    if wanted is None:
        selected = known
    else:
        groups = {name.split("@")[0] for name in known}
        if unknown := [name for name in wanted if name not in known and name not in groups]:
            raise ValueError(f"stages: unknown {unknown}, dvc.yaml has {known}")
        selected = [name for name in known if name in wanted or name.split("@")[0] in wanted]
    if not selected:
        raise ValueError("stages: nothing to run")
    return selected


def end_process_group(process: subprocess.Popen[str]) -> None:
    """Ends every process of the group that `process` leads: SIGTERM, then SIGKILL after a grace."""
    deadline = time.monotonic() + GRACE_S
    try:
        os.killpg(process.pid, signal.SIGTERM)
        while time.monotonic() < deadline:
            process.poll()  # reaps the leader, which counts as a member until then
            os.killpg(process.pid, 0)
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # the group is empty
    process.wait()


def relay(lines: Iterable[str], log: logging.LoggerAdapter[Any], tail: deque[str]) -> None:
    """Logs each line as it comes and keeps the last ones in `tail`."""
    for line in lines:
        if line := line.rstrip():
            log.info(line)
            tail.append(line)


@task(task_run_name="{stage}")
def run_stage(stage: str, root: Path, force: bool = False) -> State[str]:
    """Lets DVC bring one stage up to date; whatever way this ends, no process of it stays.

    Returns:
        A state with the name and the data `ran`, `skipped` (nothing changed) or `cached` (outputs
        restored from an earlier run), or a failed state whose message has the last lines.
    """
    command = [*DVC, "--wait-for-lock", "repro", "-s", stage, *(["--force"] if force else [])]
    environment = os.environ | {
        # `python` in a stage's command is this interpreter, with or without an activated venv.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "PYTHONUNBUFFERED": "1",
        "TQDM_MININTERVAL": "30",  # every update of a progress bar is a line of the log
    }
    process = subprocess.Popen(
        command,
        cwd=root,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    # A thread reads, so that a process left behind with the pipe open cannot hold up the task.
    reader = threading.Thread(
        target=relay, args=(process.stdout, get_run_logger(), tail), daemon=True
    )
    try:
        reader.start()
        exit_code = process.wait()
    finally:
        end_process_group(process)
        reader.join(GRACE_S)

    if exit_code != 0:
        last_lines = "\n".join(tail)
        return Failed(message=f"stage {stage} failed with exit code {exit_code}\n{last_lines}")
    outcome = "ran"
    if f"Stage '{stage}' didn't change, skipping" in tail:
        outcome = "skipped"
    elif f"Stage '{stage}' is cached - skipping run, checking out outputs" in tail:
        outcome = "cached"
    return Completed(name=outcome.capitalize(), data=outcome)


def build_report(root: Path, outcomes: dict[str, str]) -> str:
    """Markdown: revision, hash of `dvc.lock`, what each stage did, and the scores if there are any.

    A score is shown as its value, 95 % interval and n, with the better direction in the header.
    """
    revision = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        cwd=root,
        capture_output=True,
        text=True,
    ).stdout.strip()
    lock = root / "dvc.lock"
    lock_sha256 = hashlib.sha256(lock.read_bytes()).hexdigest() if lock.exists() else "none"
    lines = [f"- git revision: `{revision or 'none'}`", f"- dvc.lock sha256: `{lock_sha256}`"]
    lines += [f"- {stage}: {outcome}" for stage, outcome in outcomes.items()]

    metrics = root / "reports" / "metrics.json"
    if metrics.exists():
        models = json.loads(metrics.read_text())["models"]
        columns = {name: score for scores in models.values() for name, score in scores.items()}
        arrows = [f"{name} {'↑' if s['higher_is_better'] else '↓'}" for name, s in columns.items()]
        lines += ["", f"| model | {' | '.join(arrows)} |", "|---" * (len(columns) + 1) + "|"]
        for model, scores in models.items():
            cells = [format_score(scores[name]) if name in scores else "-" for name in columns]
            lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join(lines)


def format_score(score: dict[str, Any]) -> str:
    """`52.4 [48.1, 56] n=200`: three significant digits."""
    low, high = score["ci95"]
    return f"{score['value']:.3g} [{low:.3g}, {high:.3g}] n={score['n']}"


@flow(name="pipeline")
def pipeline(
    stages: list[str] | None = None, force: bool = False, root: Path | None = None
) -> dict[str, str] | State[Any]:
    """Runs the DVC stages one after the other and stops at the first that fails.

    Args:
        stages: names to run, all by default; a bare `foreach` name stands for all of its items.
        force: runs the stages even where DVC finds nothing changed.
        root: folder of `dvc.yaml`, this repository by default.

    Returns:
        For each stage `ran`, `skipped` or `cached`; a failed state if one of them failed.
    """
    root = root or ROOT
    try:
        selected = select_stages(list_stages(root), stages)
    except ValueError as error:
        return Failed(message=str(error))
    outcomes: dict[str, str] = {}
    for stage in selected:
        state = run_stage(stage, root, force, return_state=True)
        if not state.is_completed():
            return Failed(message=state.message)
        outcomes[stage] = state.result()
    create_markdown_artifact(build_report(root, outcomes), key="scores")
    return outcomes


def main() -> None:
    """Runs the flow once; the last line says how it ended, and the exit code agrees."""
    # SIGTERM unwinds like an interrupt, so that Prefect's temporary server is stopped as well.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        outcomes = pipeline()
    except KeyboardInterrupt:
        sys.exit("pipeline: interrupted")
    except Exception as error:
        # The log above has the details.
        sys.exit(f"pipeline: {str(error).splitlines()[0]}")
    print("pipeline: " + ", ".join(f"{stage} {outcome}" for stage, outcome in outcomes.items()))


if __name__ == "__main__":
    main()
