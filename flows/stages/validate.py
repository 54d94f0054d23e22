"""Stage `validate`: hold the data to its rules before anything trains on it."""

from pathlib import Path

from h3fusion_core.config import load_params
from h3fusion_core.io import report_errors, write_json
from h3fusion_core.validate import check_results, validate_splits

if __name__ == "__main__":
    with report_errors():
        params = load_params()
        results = validate_splits(Path("build/data"), params.validate_)
        write_json(Path("reports/validation.json"), results)
        check_results(results)
