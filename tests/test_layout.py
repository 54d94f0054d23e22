"""Who may import whom, as docs/architecture.md says; and what must not be in the repository."""

import ast
import re
import subprocess

import pytest
from conftest import ROOT


def read_table():
    """Module -> modules that it may import, from the table of docs/architecture.md."""
    allowed = {}
    for line in (ROOT / "docs/architecture.md").read_text().splitlines():
        if match := re.match(r"\| (`[a-z`, ]+`) \| ([^|;]+)", line):
            names, imports_of_ours = (re.findall(r"`([a-z]+)`", part) for part in match.groups())
            allowed |= {name: set(imports_of_ours) for name in names}
    return allowed


CORE = read_table()


def imports(path):
    """All imported module names of a file, wherever the import stands."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def core_modules(names):
    return {
        name.split(".")[1]
        for name in names
        if name.startswith("h3fusion_core.") and name.split(".")[1] in CORE
    }


def test_every_module_of_the_core_is_in_the_table():
    modules = {path.stem for path in (ROOT / "h3fusion_core").glob("*.py")} - {"__init__"}
    assert modules == set(CORE)


@pytest.mark.parametrize("module", CORE)
def test_core_imports(module):
    names = imports(ROOT / "h3fusion_core" / f"{module}.py")
    assert core_modules(names) - {module} <= CORE[module]
    packages = {name.split(".")[0] for name in names}
    assert not packages & {"prefect", "streamlit", "flows", "app"}
    if module in ("moe", "losses"):
        assert packages <= {"torch", "h3fusion_core", "collections", "contextlib"}
    if module != "validate":
        assert "great_expectations" not in packages


def test_stages_import_the_core_alone():
    for path in (ROOT / "flows/stages").glob("*.py"):
        packages = {name.split(".")[0] for name in imports(path)}
        assert not packages & {"prefect", "streamlit", "flows", "torch", "transformers"}, path


def test_the_app_runs_without_the_flows_and_without_torch():
    for path in (ROOT / "app").glob("*.py"):
        names = imports(path)
        assert not {name.split(".")[0] for name in names} & {"flows", "prefect", "torch"}, path
        assert core_modules(names) <= {"config", "io", "generate"}, path


def test_flows_import_no_machine_learning():
    for name in ("pipeline", "deployments"):
        packages = {n.split(".")[0] for n in imports(ROOT / f"flows/{name}.py")}
        assert not packages & {"torch", "transformers", "h3fusion_core"}


def test_no_pickle_and_no_remote_code():
    for path in (ROOT / "h3fusion_core").glob("*.py"):
        text = path.read_text()
        assert not re.search(r"\bpickle\b|torch\.(load|save)\(|trust_remote_code", text), path


def test_the_readme_lists_every_file():
    readme = (ROOT / "README.md").read_text()
    tracked = subprocess.run(
        ["git", "ls-files", "h3fusion_core", "flows", "app"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    names = {path.rsplit("/", 1)[1] for path in tracked if not path.endswith("__init__.py")}
    assert not {name for name in names if name not in readme}
