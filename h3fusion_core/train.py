"""Training of a fused model: its router, and its experts when asked (arXiv:2411.17792)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from h3fusion_core.config import Fuse
from h3fusion_core.losses import drift_loss, gating_loss
from h3fusion_core.moe import moe_layers, record_router_logits
from h3fusion_core.trainer import (
    Collator,
    CompletionTrainer,
    ExampleDataset,
    train_with_resume,
    training_arguments,
)

TRAINABLE_FILE = "trainable.safetensors"


class FusionTrainer(CompletionTrainer):
    """Trains a fused model: lm_loss + lambda gating_loss + sum_i gamma_i drift_loss_i.

    The gating loss looks at the prompt alone: what a router sees first at inference. Router and
    experts have learning rates of their own (arXiv:2411.17792).
    """

    model: PreTrainedModel

    def __init__(self, config: Fuse, experts: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.config = config
        self.drift_weights = [getattr(config.drift_weights, name) for name in experts]
        self.layers = moe_layers(self.model)
        self.start = [
            {name: value.clone() for name, value in layer.deltas.state_dict().items()}
            for layer in self.layers
        ]
        self.parts: dict[str, float] = {}

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over the parameters that are trained, router and experts apart."""
        router: list[nn.Parameter] = []
        experts: list[nn.Parameter] = []
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                (router if ".router." in name else experts).append(parameter)
        groups = [{"params": router, "lr": self.config.router_learning_rate}]
        if experts:
            groups.append({"params": experts, "lr": self.config.expert_learning_rate})
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The total loss; its parts go into the next log line."""
        with record_router_logits(model) as router_logits:
            loss = super().compute_loss(model, inputs)
        gating = gating_loss(router_logits, inputs["prompt_mask"], inputs["domain_id"])
        total = loss + self.config.gating_loss_weight * gating
        parts = {"lm_loss": loss.item(), "gating_loss": gating.item()}
        if self.config.train_experts:
            for expert, weight in enumerate(self.drift_weights):
                drift = drift_loss(self.layers, self.start, expert)
                total = total + weight * drift
                parts[f"drift_loss_{expert}"] = drift.item()
        if model.training:
            self.parts = parts
        return (total, {}) if return_outputs else total

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the parts of the loss to a training log line."""
        super().log({**logs, **self.parts} if "loss" in logs else logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # only what is trained: the frozen base would be half a gigabyte at every checkpoint
        folder = Path(str(output_dir or self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_file(_trainable_state(self.model), folder / TRAINABLE_FILE)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        state = load_file(Path(resume_from_checkpoint) / TRAINABLE_FILE)
        self.model.load_state_dict(state, strict=False)


def _trainable_state(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().contiguous() for n, p in model.named_parameters() if p.requires_grad}


def train_fusion(
    model: PreTrainedModel,
    config: Fuse,
    experts: Sequence[str],
    dataset: ExampleDataset,
    pad_token_id: int,
    folder: Path,
    seed: int,
    fingerprint: dict[str, Any],
) -> list[dict[str, float]]:
    """Train the router, and the experts when `config.train_experts`, in place.

    Args:
        model: The fused model; everything but router and experts stays frozen.
        config: The `fuse` section of the params.
        experts: Names of the experts that are adapters, in the order of their index.
        dataset: The rows in the order in which they are visited, `max_steps * batch_size` of them.
        pad_token_id: Filler of a batch.
        folder: Where checkpoints are kept while it trains.
        seed: Of everything random.
        fingerprint: What must be equal for a checkpoint to be of use.

    Returns:
        The log history: one dict for each step.
    """
    for layer in moe_layers(model):
        layer.router.requires_grad_(True)
        layer.deltas.requires_grad_(config.train_experts)
    arguments = training_arguments(
        folder,
        seed,
        max_steps=config.max_steps,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.router_learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, config.max_steps // 10),
        train_sampling_strategy="sequential",
        save_steps=config.save_steps,
    )
    trainer = FusionTrainer(
        config=config,
        experts=experts,
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=Collator(pad_token_id),
    )
    history = train_with_resume(trainer, fingerprint)
    model.requires_grad_(False)
    model.eval()
    return history
