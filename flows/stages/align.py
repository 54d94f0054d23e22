"""Stage `align@PROPERTY`: train one expert."""

import argparse
from pathlib import Path

from h3fusion_core.align import align_expert
from h3fusion_core.config import DOMAINS, load_params
from h3fusion_core.io import H3FusionError, report_errors, write_json

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("domain", help=", ".join(DOMAINS))
    domain = parser.parse_args().domain
    with report_errors():
        if domain not in DOMAINS:
            raise H3FusionError(f"{domain}: no such property; choose from {', '.join(DOMAINS)}")
        params = load_params()
        history = align_expert(
            base=Path("build/base"),
            data=Path("build/data"),
            domain=domain,
            config=params.align,
            dtype=params.dtype,
            output=Path("build/experts") / domain,
            checkpoints=Path("checkpoints") / domain,
            seed=params.seed,
        )
        write_json(Path(f"reports/training/{domain}.json"), history)
