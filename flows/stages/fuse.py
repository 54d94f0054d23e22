"""Stage `fuse`: make the experts one mixture and train its router."""

from pathlib import Path

from h3fusion_core.config import DOMAINS, load_params
from h3fusion_core.fuse import fuse_experts
from h3fusion_core.io import report_errors, write_json

if __name__ == "__main__":
    with report_errors():
        params = load_params()
        router_start, history = fuse_experts(
            base=Path("build/base"),
            adapters={domain: Path("build/experts") / domain for domain in DOMAINS},
            data=Path("build/data"),
            config=params.fuse,
            dtype=params.dtype,
            max_tokens=params.align.max_tokens,
            output=Path("build/fused"),
            checkpoints=Path("checkpoints/fuse"),
            seed=params.seed,
        )
        write_json(Path("reports/router_start.json"), router_start)
        write_json(Path("reports/training/fuse.json"), history)
