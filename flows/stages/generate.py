"""Stage `generate@MODEL`: answers, likelihoods and routing of one model on the test split."""

import argparse
from pathlib import Path

from h3fusion_core.config import load_params, load_runtime
from h3fusion_core.generate import answer_test_split
from h3fusion_core.io import H3FusionError, report_errors, write_json, write_jsonl

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a key of `models` in params.yaml")
    name = parser.parse_args().model
    with report_errors():
        params, runtime = load_params(), load_runtime()
        if name not in params.models:
            raise H3FusionError(f"models.{name}: not in params.yaml; it has {list(params.models)}")
        rows, cost = answer_test_split(
            path=params.models[name],
            base=Path("build/base"),
            data=Path("build/data"),
            config=params.generate,
            dtype=params.dtype,
            device=runtime.torch_device(),
        )
        write_jsonl(Path(f"build/answers/{name}.jsonl"), rows)
        write_json(Path(f"build/answers/{name}.cost.json"), cost)
