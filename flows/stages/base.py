"""Stage `base`: fetch the base model, check it, write it as safetensors."""

from pathlib import Path

from h3fusion_core.base import prepare_base
from h3fusion_core.config import load_params, load_runtime
from h3fusion_core.io import report_errors

if __name__ == "__main__":
    with report_errors():
        params, runtime = load_params(), load_runtime()
        prepare_base(params.base, Path("build/base"), runtime.cache_dir, params.seed)
