"""The losses of the fusion: language modelling, gating and drift (arXiv:2411.17792)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from h3fusion_core.moe import PROJECTIONS, SharedBaseMoE

IGNORE = -100  # a label that no loss counts
FACTORS = ("lora_A", "lora_B")


def token_log_probs(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the labelled tokens, in nats, and which positions are labelled.

    The vocabulary projection, a fifth of a small model's work, runs only from the first position
    that predicts a labelled token: N of them are left.

    Args:
        model: A transformers causal language model.
        input_ids, attention_mask, labels: (B, S); labels of -100 are not counted.

    Returns:
        log_probs, 0 where there is no label, and the mask of labels, both (B, N).
    """
    first = int((labels != IGNORE).any(dim=0).nonzero()[0])
    keep = torch.arange(first - 1, labels.shape[1] - 1, device=labels.device)
    logits = model(
        input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=keep, use_cache=False
    ).logits
    labels = labels[:, first:]
    nll = F.cross_entropy(logits.transpose(1, 2).float(), labels, reduction="none")
    return -nll, labels != IGNORE


def lm_loss(log_probs: Tensor, counted: Tensor) -> Tensor:
    """Mean negative log-likelihood of the labelled tokens of a batch, in nats a token."""
    return -log_probs.sum() / counted.sum()


def odds_ratio_loss(chosen: tuple[Tensor, Tensor], rejected: tuple[Tensor, Tensor]) -> Tensor:
    """How much likelier a model finds right answers than wrong ones (ORPO, arXiv:2403.07691).

    -log sigmoid(log odds(chosen) - log odds(rejected)), where an answer's probability is the
    geometric mean over its tokens; ln 2 when it makes no difference.

    Args:
        chosen, rejected: log_probs and counted, each (B, N), row by row answers to one prompt.
    """

    def log_odds(log_probs: Tensor, counted: Tensor) -> Tensor:
        mean = log_probs.sum(dim=1) / counted.sum(dim=1)
        return mean - torch.log1p(-mean.exp())

    return -F.logsigmoid(log_odds(*chosen) - log_odds(*rejected)).mean()


def gating_loss(router_logits: Sequence[Tensor], mask: Tensor, domain_id: Tensor) -> Tensor:
    """Cross-entropy of the router's mean opinion: -log p_bar[domain], averaged over the batch.

    0 when the router is right and certain, ln(num_experts) when it is uniform.

    Args:
        router_logits: One (B, S, E) for each layer, before softmax.
        mask: (B, S), true on the tokens that count.
        domain_id: (B,), the expert that each row needs, int64.
    """
    prompt_probs = mean_routing(router_logits, mask)
    return F.nll_loss(prompt_probs.log(), domain_id)


def mean_routing(router_logits: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Routing probabilities averaged over the layers and the masked tokens: (B, E)."""
    probs = torch.stack([logits.softmax(dim=-1) for logits in router_logits]).mean(dim=0)
    weights = mask.to(probs.dtype)
    return torch.einsum("bse,bs->be", probs, weights) / weights.sum(dim=1, keepdim=True)


def delta_distance(lora_A: Tensor, lora_B: Tensor, start_A: Tensor, start_B: Tensor) -> Tensor:
    """Frobenius norm of B A - B0 A0 without a full matrix, 0 with zero gradient at the start.

    B A - B0 A0 = U V with U = [B - B0, B0] and V = [A; A - A0], and
    |U V|^2 = tr((U^T U)(V V^T)). Differences go into the factors, not into the result, so that
    a small drift is not lost to cancellation.

    Args:
        lora_A, start_A: (R, in_features).
        lora_B, start_B: (out_features, R).
    """
    u = torch.cat([lora_B - start_B, start_B], dim=1)
    v = torch.cat([lora_A, lora_A - start_A], dim=0)
    squared = ((u.T @ u) * (v @ v.T)).sum()
    moved = squared > 0
    # the root's gradient at 0 is infinite, so 0 never reaches it
    return torch.where(moved, torch.where(moved, squared, 1.0).sqrt(), 0.0)


def drift_loss(
    layers: Sequence[SharedBaseMoE], start: Sequence[dict[str, Tensor]], expert: int
) -> Tensor:
    """How far an expert has left what alignment gave it.

    |dW - dW0| (Frobenius), summed over the three projections, mean over the layers.

    Args:
        layers: The mixture layers.
        start: For each layer, the state dict of its `deltas` when training began.
        expert: Index of the adapter.
    """
    distances = []
    for layer, layer_start in zip(layers, start, strict=True):
        now = dict(layer.deltas.named_parameters())
        distances += [
            delta_distance(
                *(
                    part[f"{name}.{factor}"][expert]
                    for part in (now, layer_start)
                    for factor in FACTORS
                )
            )
            for name in PROJECTIONS
        ]
    return torch.stack(distances).sum() / len(layers)
