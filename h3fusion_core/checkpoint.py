"""A fused model on disk: a reference to its base with the hash, and the experts in safetensors."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from h3fusion_core.base import read_base_sha256
from h3fusion_core.config import Fuse
from h3fusion_core.io import H3FusionError, atomic_path, read_json, write_json
from h3fusion_core.moe import PROJECTIONS, gated_ffns, install_experts

CONFIG_FILE = "fusion.json"
WEIGHTS_FILE = "experts.safetensors"
ADAPTER_INFO_FILE = "h3fusion.json"  # beside a PEFT adapter: what it was aligned on


def save_fused(
    model: PreTrainedModel, base: Path, experts: Sequence[str], config: Fuse, output: Path
) -> None:
    """Write router and experts, and a reference to the base with its hash."""
    state = {
        name: value.contiguous()
        for name, value in model.state_dict().items()
        if ".router." in name or ".deltas." in name
    }
    with atomic_path(output) as partial:
        partial.mkdir()
        save_file(state, partial / WEIGHTS_FILE)
        write_json(
            partial / CONFIG_FILE,
            {
                "base": os.path.relpath(base, output),
                "base_sha256": read_base_sha256(base),
                "experts": list(experts),
                "base_expert": config.base_expert,
                "top_k": config.top_k,
            },
        )


def load_fused(
    path: str | Path, dtype: str = "float32", device: str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a fused model, ready for `.generate()` like any transformers model.

    Raises:
        H3FusionError: The base is not the one that the experts were aligned on, or a file is
            missing or damaged.
    """
    path = Path(path)
    config = read_json(path / CONFIG_FILE)
    base = (path / config["base"]).resolve()
    actual = read_base_sha256(base)
    if actual != config["base_sha256"]:
        raise H3FusionError(
            f"{path}: fused on the base with sha256 {config['base_sha256'][:12]}, but {base} has "
            f"{actual[:12]}; run `dvc repro fuse`"
        )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    try:
        state = load_file(path / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise H3FusionError(f"{path / WEIGHTS_FILE}: {error}") from error
    expected = {
        f"{name}.deltas.{p}.{factor}"
        for name in gated_ffns(model)
        for p in PROJECTIONS
        for factor in ("lora_A", "lora_B")
    } | {f"{name}.router.weight" for name in gated_ffns(model)}
    if set(state) != expected:
        odd = sorted(set(state) ^ expected)[0]
        raise H3FusionError(f"{path / WEIGHTS_FILE}: does not fit its base at {odd}")
    adapters = []
    for index in range(len(config["experts"]) - config["base_expert"]):
        adapters.append(
            {
                f"{name}.{p}": (
                    state[f"{name}.deltas.{p}.lora_A"][index],
                    state[f"{name}.deltas.{p}.lora_B"][index],
                )
                for name in gated_ffns(model)
                for p in PROJECTIONS
            }
        )
    install_experts(model, adapters, config["base_expert"], config["top_k"])
    model.load_state_dict(state, strict=False)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model.to(device)  # type: ignore[arg-type]
    return model.eval(), tokenizer
