"""The router's closed-form start: ridge regression on what each layer's FFN sees of a prompt."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from h3fusion_core.chat import Encoded, pad_batch
from h3fusion_core.io import H3FusionError, Progress

logger = logging.getLogger("h3fusion")


@dataclass(frozen=True)
class RouterFit:
    """One layer's router: weight (E, D) with the temperature inside, and held-out quality."""

    weight: Tensor
    ridge_lambda: float
    temperature: float
    heldout_nll: float
    heldout_accuracy: float


def fit_router(
    model: nn.Module,
    ffns: Sequence[Any],
    prompts: Sequence[Encoded],
    labels: Sequence[int],
    num_experts: int,
    ridge_lambdas: Sequence[float],
    holdout_fraction: float,
    batch_size: int,
    pad_token_id: int,
    seed: int,
) -> list[RouterFit]:
    """Fit every layer's router without a gradient.

    For each layer, the centred one-hot label is regressed on the FFN's input over the prompts'
    own and closing tokens, each class weighing the same; Gram matrices are streamed, so memory
    does not grow with the data. The ridge penalty and one inverse temperature for each layer are
    those with the lowest negative log-likelihood on prompts that were held out of the regression:
    a router must be right, and as sure as it should be, about prompts that it has never seen.

    Args:
        model: The base model.
        ffns: Its FFN modules, first layer to last.
        prompts: Encoded prompts, without answers: a router sees the prompt first.
        labels: The expert that each prompt needs, 0 to num_experts - 1.
        num_experts: Experts to choose from.
        ridge_lambdas: Penalties to try, relative to the mean variance of the input.
        holdout_fraction: Share of the prompts held out, stratified by label.
        batch_size: Prompts in one forward pass.
        pad_token_id: Filler of a batch.
        seed: Of the split.

    Returns:
        One fit for each layer.
    """
    try:
        fit_rows, heldout_rows = train_test_split(
            range(len(prompts)), test_size=holdout_fraction, random_state=seed, stratify=labels
        )
    except ValueError as error:
        raise H3FusionError(f"fuse.holdout_fraction = {holdout_fraction}: {error}") from error
    label = torch.tensor(labels)
    device = next(model.parameters()).device
    hidden_size = ffns[0].gate_proj.weight.shape[1]

    tokens_of = torch.zeros(num_experts)
    for row in fit_rows:
        tokens_of[label[row]] += sum(prompts[row].prompt_mask)
    gram = torch.zeros(len(ffns), hidden_size, hidden_size, device=device)
    cross = torch.zeros(len(ffns), hidden_size, num_experts, device=device)

    def accumulate(layer: int, x: Tensor, token_label: Tensor) -> None:
        target = nn.functional.one_hot(token_label, num_experts).float() - 1 / num_experts
        weighted = x / (num_experts * tokens_of.to(device)[token_label, None])
        gram[layer] += weighted.T @ x
        cross[layer] += weighted.T @ target

    _visit(model, ffns, prompts, label, fit_rows, batch_size, pad_token_id, accumulate)
    scale = gram.diagonal(dim1=1, dim2=2).mean(dim=1)
    identity = torch.eye(hidden_size, dtype=torch.float64, device=device)
    candidates = torch.stack(
        [
            torch.linalg.solve(
                gram.double() + penalty * scale[:, None, None] * identity, cross.double()
            )
            for penalty in ridge_lambdas
        ],
        dim=1,
    ).float()  # (layers, lambdas, D, E)

    heldout_logits: list[list[Tensor]] = [[] for _ in ffns]
    heldout_labels: list[Tensor] = []

    def evaluate(layer: int, x: Tensor, token_label: Tensor) -> None:
        heldout_logits[layer].append(torch.einsum("td,lde->lte", x, candidates[layer]).cpu())
        if layer == 0:
            heldout_labels.append(token_label.cpu())

    _visit(model, ffns, prompts, label, heldout_rows, batch_size, pad_token_id, evaluate)
    token_label = torch.cat(heldout_labels).numpy()
    fits = []
    for layer, parts in enumerate(heldout_logits):
        by_lambda = torch.cat(parts, dim=1).double().numpy()
        best = min(
            (_fit_temperature(logits, token_label, num_experts), index)
            for index, logits in enumerate(by_lambda)
        )
        (nll, temperature, accuracy), index = best
        weight = candidates[layer, index].T * temperature
        fits.append(RouterFit(weight.cpu(), ridge_lambdas[index], temperature, nll, accuracy))
    return fits


def _visit(
    model: nn.Module,
    ffns: Sequence[Any],
    prompts: Sequence[Encoded],
    label: Tensor,
    rows: Sequence[int],
    batch_size: int,
    pad_token_id: int,
    visitor: Callable[[int, Tensor, Tensor], None],
) -> None:
    """Run prompts through the model; give `visitor` each layer's FFN inputs."""
    device = next(model.parameters()).device
    order = sorted(rows, key=lambda row: len(prompts[row].input_ids))
    progress = Progress("reading prompts", len(order))
    current: tuple[Tensor, Tensor]

    def hook(layer: int) -> Callable[..., None]:
        def before_ffn(module: nn.Module, args: tuple[Tensor]) -> None:
            mask, token_label = current
            visitor(layer, args[0][mask].float(), token_label)

        return before_ffn

    handles = [ffn.register_forward_pre_hook(hook(i)) for i, ffn in enumerate(ffns)]
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = pad_batch([prompts[row] for row in chosen], pad_token_id)
            mask = batch["prompt_mask"].to(device)
            row_of_token = batch["prompt_mask"].nonzero()[:, 0]
            current = mask, label[chosen][row_of_token].to(device)
            with torch.no_grad():
                model(
                    input_ids=batch["input_ids"].to(device),
                    attention_mask=batch["attention_mask"].to(device),
                    logits_to_keep=1,
                    use_cache=False,
                )
            progress.update(start + len(chosen))
    finally:
        for handle in handles:
            handle.remove()


def _fit_temperature(
    logits: np.ndarray, label: np.ndarray, num_experts: int
) -> tuple[float, float, float]:
    """The inverse temperature with the lowest class-balanced NLL: (nll, temperature, accuracy)."""
    count = np.bincount(label, minlength=num_experts)
    token_weight = 1 / (np.count_nonzero(count) * count[label])

    def nll(log_temperature: float) -> float:
        scaled = logits * np.exp(log_temperature)
        log_probs = scaled - np.logaddexp.reduce(scaled, axis=1, keepdims=True)
        return float(-(token_weight * log_probs[np.arange(len(label)), label]).sum())

    best = minimize_scalar(nll, bounds=(-3.0, 7.0), method="bounded")
    accuracy = float((token_weight * (logits.argmax(axis=1) == label)).sum())
    return float(best.fun), float(np.exp(best.x)), accuracy
