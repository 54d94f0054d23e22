"""What alignment and fusion share: the transformers Trainer, its data, its progress, resuming."""

import hashlib
import json
import logging
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from h3fusion_core.chat import Encoded, pad_batch
from h3fusion_core.config import load_runtime
from h3fusion_core.io import H3FusionError, Progress, write_json
from h3fusion_core.losses import IGNORE, lm_loss, odds_ratio_loss, token_log_probs

logger = logging.getLogger("h3fusion")

FINGERPRINT_FILE = "fingerprint.json"


class ExampleDataset(torch.utils.data.Dataset):
    """Encoded examples, each with the expert that it needs and perhaps a wrong answer."""

    def __init__(
        self,
        examples: Sequence[Encoded],
        domain_ids: Sequence[int],
        rejected: Sequence[Encoded] | None = None,
    ) -> None:
        self.rows: list[dict[str, Any]] = []
        cut = 0
        for index, (example, domain_id) in enumerate(zip(examples, domain_ids, strict=True)):
            parts = [example] + ([rejected[index]] if rejected else [])
            if any(set(part.labels) == {IGNORE} for part in parts):
                cut += 1  # the prompt alone fills the row
                continue
            row = {"example": example, "input_ids": example.input_ids, "domain_id": domain_id}
            self.rows.append(row | ({"rejected": rejected[index]} if rejected else {}))
        if cut:
            logger.warning("%d of %d rows have no room for an answer: left out", cut, len(examples))
        if not self.rows:
            raise H3FusionError("align.max_tokens leaves no row room for an answer; raise it")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


class Collator:
    """Pads rows of an `ExampleDataset` to a batch, with `domain_id` (B,).

    Wrong answers, where there are any, follow as rows B to 2 B.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        domain_id = torch.tensor([row["domain_id"] for row in rows])
        examples = [row["example"] for row in rows]
        examples += [row["rejected"] for row in rows if "rejected" in row]
        return {**pad_batch(examples, self.pad_token_id), "domain_id": domain_id}


class CompletionTrainer(Trainer):
    """A Trainer whose loss counts the answer's tokens alone.

    Args:
        odds_ratio_weight: Of the odds ratio loss on batches that hold wrong answers.
    """

    def __init__(self, odds_ratio_weight: float = 0.0, **kwargs: Any) -> None:
        self.odds_ratio_weight = odds_ratio_weight
        super().__init__(callbacks=[ProgressCallback()], **kwargs)
        self.remove_callback(PrinterCallback)  # its raw dicts drown the progress lines
        self.model_accepts_loss_kwargs = False  # the loss is a mean over its own batch

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Mean nats a token of the answers, and the odds ratio loss where there are wrong ones."""
        log_probs, counted = token_log_probs(
            model, inputs["input_ids"], inputs["attention_mask"], inputs["labels"]
        )
        rows = len(inputs["domain_id"])
        chosen = log_probs[:rows], counted[:rows]
        loss = lm_loss(*chosen)
        if len(log_probs) > rows:
            rejected = log_probs[rows:], counted[rows:]
            loss = loss + self.odds_ratio_weight * odds_ratio_loss(chosen, rejected)
        return (loss, {}) if return_outputs else loss


class ProgressCallback(TrainerCallback):
    """Writes plain progress lines with a time left, in a terminal and in a log alike."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.progress = Progress("training step", state.max_steps, state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        loss = next(
            (f"loss {log['loss']:.3f}" for log in state.log_history[::-1] if "loss" in log), ""
        )
        self.progress.update(state.global_step, loss)


def training_arguments(folder: Path, seed: int, **kwargs: Any) -> TrainingArguments:
    """The Trainer's arguments that alignment and fusion share."""
    runtime = load_runtime()
    return TrainingArguments(
        output_dir=str(folder),
        seed=seed,
        data_seed=seed,
        use_cpu=runtime.torch_device() == "cpu",
        report_to=[],
        logging_steps=1,
        logging_nan_inf_filter=False,  # a NaN must be seen
        save_total_limit=1,
        disable_tqdm=True,
        log_level="error",
        remove_unused_columns=False,
        prediction_loss_only=True,
        label_names=["labels"],
        dataloader_pin_memory=False,
        **kwargs,
    )


def train_with_resume(trainer: Trainer, fingerprint: dict[str, Any]) -> list[dict[str, float]]:
    """Train, going on from the last whole checkpoint of a killed run of the same inputs.

    Args:
        trainer: Its `output_dir` holds the checkpoints.
        fingerprint: What must be equal for a checkpoint to be of use.

    Returns:
        The log history: one dict for each logged step.
    """
    folder = Path(str(trainer.args.output_dir))
    digest = hashlib.sha256(json.dumps(fingerprint, sort_keys=True, default=str).encode())
    stamp = {"fingerprint": digest.hexdigest()}
    stamp_file = folder / FINGERPRINT_FILE
    if not stamp_file.is_file() or json.loads(stamp_file.read_text()) != stamp:
        shutil.rmtree(folder, ignore_errors=True)
        write_json(stamp_file, stamp)
    checkpoint = _last_whole_checkpoint(folder)
    if checkpoint is not None:
        logger.info("resuming from %s", checkpoint)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    history = [
        {key: value for key, value in entry.items() if key != "total_flos"}
        for entry in trainer.state.log_history
    ]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    if not all(loss == loss and abs(loss) != float("inf") for loss in losses):
        raise H3FusionError("the training loss became NaN or infinite; lower the learning rate")
    return history


def _last_whole_checkpoint(folder: Path) -> Path | None:
    # the Trainer writes trainer_state.json last, so a checkpoint without one was cut short
    checkpoints = sorted(
        folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True
    )
    for checkpoint in checkpoints:
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())
        except (OSError, ValueError):
            shutil.rmtree(checkpoint)
            continue
        return checkpoint
    return None
