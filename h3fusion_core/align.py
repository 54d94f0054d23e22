"""Alignment: one LoRA adapter on the FFN for each property, as any PEFT program can load it."""

import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from h3fusion_core.base import read_base_sha256
from h3fusion_core.chat import Encoded, encode_example
from h3fusion_core.checkpoint import ADAPTER_INFO_FILE
from h3fusion_core.config import Align, Domain
from h3fusion_core.data import load_split, reference_of
from h3fusion_core.io import atomic_path, sha256_folder, write_json
from h3fusion_core.moe import PROJECTIONS
from h3fusion_core.trainer import (
    Collator,
    CompletionTrainer,
    ExampleDataset,
    train_with_resume,
    training_arguments,
)

logger = logging.getLogger("h3fusion")


def align_expert(
    base: Path,
    data: Path,
    domain: str,
    config: Align,
    dtype: str,
    output: Path,
    checkpoints: Path,
    seed: int,
) -> list[dict[str, float]]:
    """Train one expert by LoRA on the FFN projections, attention frozen (arXiv:2411.17792).

    The honest records hold wrong answers beside the right ones; with `odds_ratio_weight` the
    honest expert learns to find them unlikely (arXiv:2403.07691).

    Args:
        base: Folder of the base model.
        data: Folder of the derived splits.
        domain: The property to align for.
        config: The `align` section of the params.
        dtype: Of the frozen base; the adapter is float32.
        output: Where the PEFT adapter is written.
        checkpoints: Where a killed run finds its checkpoints.
        seed: Of everything random.

    Returns:
        The training log: one dict for each step, validation loss after each epoch.
    """
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype)),
        LoraConfig(
            r=config.lora.r,
            lora_alpha=config.lora.alpha,
            lora_dropout=config.lora.dropout,
            use_rslora=config.lora.use_rslora,
            target_modules=list(PROJECTIONS),
            task_type="CAUSAL_LM",
        ),
    )

    def dataset(split: str) -> ExampleDataset:
        rows = load_split(data, domain, split)
        right = [(row["prompt"], reference_of(domain, row)) for row in rows]
        wrong = None
        if domain == Domain.HONEST and config.odds_ratio_weight:
            wrong = [encode(row["prompt"], row["incorrect_answers"][0]) for row in rows]
        return ExampleDataset([encode(*pair) for pair in right], [0] * len(rows), wrong)

    def encode(prompt: str, answer: str) -> Encoded:
        return encode_example(tokenizer, prompt, answer, config.max_tokens)

    train, validation = dataset("train"), dataset("validation")
    steps = config.num_epochs * -(-len(train) // config.batch_size)
    trainer = CompletionTrainer(
        odds_ratio_weight=config.odds_ratio_weight,
        model=model,
        args=training_arguments(
            checkpoints,
            seed,
            num_train_epochs=config.num_epochs,
            per_device_train_batch_size=config.batch_size,
            per_device_eval_batch_size=config.batch_size,
            learning_rate=getattr(config.learning_rate, domain),
            lr_scheduler_type="cosine",
            warmup_steps=round(config.warmup_fraction * steps),
            train_sampling_strategy="group_by_length",
            # later epochs are reordered when one is resumed in its middle
            save_strategy="steps" if config.num_epochs == 1 else "epoch",
            save_steps=config.save_steps,
            eval_strategy="epoch",
        ),
        train_dataset=train,
        eval_dataset=validation,
        data_collator=Collator(tokenizer.pad_token_id),
    )
    info: dict[str, Any] = {
        "domain": domain,
        "base_sha256": read_base_sha256(base),
        "data_sha256": sha256_folder(data / domain),
    }
    fingerprint = {
        **info,
        "base": sha256_folder(base),  # the chat template too
        "align": config.model_dump(),
        "dtype": dtype,
        "seed": seed,
    }
    history = train_with_resume(trainer, fingerprint)
    with atomic_path(output) as partial:
        model.save_pretrained(str(partial))
        write_json(partial / ADAPTER_INFO_FILE, info)
    shutil.rmtree(checkpoints)
    return history
