"""Stage `data`: read the sources of the three properties and cut them into splits."""

from pathlib import Path

from h3fusion_core.config import load_params
from h3fusion_core.data import build_splits
from h3fusion_core.io import report_errors, write_json

if __name__ == "__main__":
    with report_errors():
        params = load_params()
        counts = build_splits(params.data, Path("build/data"), params.seed)
        write_json(Path("reports/data.json"), counts)
