"""Fusion: aligned adapters become the experts of one mixture."""

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from h3fusion_core.base import read_base_sha256
from h3fusion_core.chat import encode_example, encode_prompt
from h3fusion_core.checkpoint import ADAPTER_INFO_FILE, save_fused
from h3fusion_core.config import BASE_EXPERT, DOMAINS, Fuse, load_runtime
from h3fusion_core.data import BENIGN, group_of, load_split, reference_of
from h3fusion_core.io import H3FusionError, read_json, sha256_folder
from h3fusion_core.moe import PROJECTIONS, Delta, gated_ffns, install_experts, moe_layers
from h3fusion_core.router import fit_router
from h3fusion_core.train import train_fusion
from h3fusion_core.trainer import ExampleDataset

logger = logging.getLogger("h3fusion")

PEFT_PREFIX = "base_model.model."


def read_adapter(folder: Path, base_sha256: str) -> dict[str, Delta]:
    """Read a PEFT adapter as one low-rank delta for each FFN projection.

    Args:
        folder: What PEFT's `save_pretrained` wrote, with the base's hash in `h3fusion.json`.
        base_sha256: The base that it is to be fused on.

    Returns:
        (lora_A, lora_B) by module name, PEFT's scale (alpha / r, or alpha / sqrt(r) for rsLoRA)
        multiplied into lora_B.

    Raises:
        H3FusionError: Aligned on another base, or of a kind that a mixture can't represent.
    """
    info = read_json(folder / ADAPTER_INFO_FILE)
    trained_on = str(info.get("base_sha256"))
    if trained_on != base_sha256:
        raise H3FusionError(
            f"{folder}: aligned on the base with sha256 {trained_on[:12]}, but this base "
            f"has {base_sha256[:12]}; align it anew on this base"
        )
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig):
        raise H3FusionError(f"{folder}: {config.peft_type} is not LoRA")
    for key in ("use_dora", "modules_to_save", "layer_replication", "lora_bias"):
        if getattr(config, key):
            raise H3FusionError(f"{folder}: {key} has no low-rank form that a mixture could use")
    if config.bias != "none":
        raise H3FusionError(f"{folder}: bias = {config.bias}: only adapters without bias can fuse")
    try:
        weights = load_file(folder / "adapter_model.safetensors")
    except (OSError, SafetensorError) as error:
        raise H3FusionError(f"{folder}/adapter_model.safetensors: {error}") from error
    deltas = {}
    patterns = config.alpha_pattern or {}
    for key, lora_A in weights.items():
        name, kind, suffix = key.removeprefix(PEFT_PREFIX).rpartition(".lora_A.weight")
        if not kind or suffix:
            continue
        lora_B = weights.get(f"{PEFT_PREFIX}{name}.lora_B.weight")
        if lora_B is None:
            raise H3FusionError(f"{folder}: the adapter lacks the lora_B of {name}")
        rank = lora_A.shape[0]
        alpha = patterns.get(get_pattern_key(list(patterns), name), config.lora_alpha)
        scale = alpha / rank**0.5 if config.use_rslora else alpha / rank
        deltas[name] = (lora_A.float(), scale * lora_B.float())
    if 2 * len(deltas) != len(weights):
        raise H3FusionError(f"{folder}: holds tensors that are no LoRA of a linear layer")
    return deltas


def check_targets(model: torch.nn.Module, adapter: dict[str, Delta], folder: Path) -> None:
    """Refuse an adapter that does not cover exactly the projections of every FFN."""
    expected = {f"{name}.{p}" for name in gated_ffns(model) for p in PROJECTIONS}
    if not expected:
        raise H3FusionError("the base has no FFN with gate_proj, up_proj and down_proj")
    for problem, names in (
        ("lacks", expected - set(adapter)),
        ("also has", set(adapter) - expected),
    ):
        if names:
            raise H3FusionError(f"{folder}: the adapter {problem} {sorted(names)[0]}")


def fuse_experts(
    base: Path,
    adapters: dict[str, Path],
    data: Path,
    config: Fuse,
    dtype: str,
    max_tokens: int,
    output: Path,
    checkpoints: Path,
    seed: int,
) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Fuse adapters of one base into a mixture, start its router in closed form, and train it.

    Args:
        base: Folder of the base model.
        adapters: Folder of each expert's adapter, by property.
        data: Folder of the derived splits; only train rows are read.
        config: The `fuse` section of the params.
        dtype: Of the frozen base.
        max_tokens: Training rows are cut there.
        output: Where the fused model is written.
        checkpoints: Where a killed run finds its checkpoints.
        seed: Of everything random.

    Returns:
        The router's start, one dict for each layer, and the training log, one for each step.
    """
    set_seed(seed)
    base_sha256 = read_base_sha256(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype)).eval()
    model.to(load_runtime().torch_device())
    deltas = []
    for folder in adapters.values():
        deltas.append(read_adapter(folder, base_sha256))
        check_targets(model, deltas[-1], folder)
    experts = [*adapters, BASE_EXPERT] if config.base_expert else list(adapters)
    rows = training_rows(data, experts)

    router_fits = []
    if config.router_init == "closed_form":
        router_fits = fit_router(
            model,
            list(gated_ffns(model).values()),
            [encode_prompt(tokenizer, row["prompt"]) for row in rows],
            [row["domain_id"] for row in rows],
            len(experts),
            config.ridge_lambdas,
            config.holdout_fraction,
            config.batch_size * 4,
            tokenizer.pad_token_id,
            seed,
        )
    install_experts(model, deltas, config.base_expert, config.top_k)
    for layer, fit in zip(moe_layers(model), router_fits, strict=bool(router_fits)):
        layer.router.weight.data.copy_(fit.weight)

    history = []
    if config.max_steps:
        visited = draw_rows(rows, config, seed)
        dataset = ExampleDataset(
            [encode_example(tokenizer, r["prompt"], r["answer"], max_tokens) for r in visited],
            [row["domain_id"] for row in visited],
        )
        fingerprint = {
            "base": sha256_folder(base),  # the chat template too
            "max_tokens": max_tokens,
            "adapters": [sha256_folder(folder, "*.safetensors") for folder in adapters.values()],
            "data_sha256": sha256_folder(data),
            "fuse": config.model_dump(),
            "dtype": dtype,
            "seed": seed,
        }
        history = train_fusion(
            model,
            config,
            list(adapters),
            dataset,
            tokenizer.pad_token_id,
            checkpoints,
            seed,
            fingerprint,
        )
    save_fused(model, base, experts, config, output)
    shutil.rmtree(checkpoints, ignore_errors=True)
    start = [
        {
            "layer": index,
            "ridge_lambda": fit.ridge_lambda,
            "temperature": fit.temperature,
            "heldout_nll": fit.heldout_nll,
            "heldout_accuracy": fit.heldout_accuracy,
        }
        for index, fit in enumerate(router_fits)
    ]
    return start, history


def expert_of_group(group: str, experts: Sequence[str]) -> int:
    """Which expert a group of prompts needs: its own, and for benign borderline prompts the base.

    Without a base expert they need the helpful one: their answer is a helpful one.
    """
    if group == BENIGN:
        group = BASE_EXPERT if BASE_EXPERT in experts else DOMAINS[0]
    return experts.index(group)


def training_rows(data: Path, experts: Sequence[str]) -> list[dict[str, Any]]:
    """The train rows of all properties: prompt, answer, group, and the expert that each needs."""
    rows = []
    for domain in DOMAINS:
        for row in load_split(data, domain, "train"):
            group = group_of(domain, row)
            rows.append(
                {
                    "prompt": row["prompt"],
                    "answer": reference_of(domain, row),
                    "group": group,
                    "domain_id": expert_of_group(group, experts),
                }
            )
    missing = set(range(len(experts))) - {row["domain_id"] for row in rows}
    if missing:
        names = [experts[index] for index in sorted(missing)]
        raise H3FusionError(
            f"{data}: no training row needs the expert {', '.join(names)}; "
            "fuse.base_expert needs benign rows in the harmless set"
        )
    return rows


def draw_rows(rows: list[dict[str, Any]], config: Fuse, seed: int) -> list[dict[str, Any]]:
    """The rows of a training run in their order, each group as often as its weight says."""
    sizes: dict[str, int] = {}
    for row in rows:
        sizes[row["group"]] = sizes.get(row["group"], 0) + 1
    weights = [getattr(config.group_weights, r["group"]) / sizes[r["group"]] for r in rows]
    if not any(weights):
        raise H3FusionError("fuse.group_weights: every weight is 0")
    drawn = torch.multinomial(
        torch.tensor(weights),
        config.max_steps * config.batch_size,
        replacement=True,
        generator=torch.Generator().manual_seed(seed),
    )
    return [rows[index] for index in drawn.tolist()]
