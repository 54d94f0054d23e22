"""The shared-base mixture: experts that are low-rank deltas over one frozen FFN.

Expert i is W + B_i A_i for each of gate, up and down. W_gate x and W_up x are computed once for all
experts, and because W_down is linear it is applied once, to the weighted sum of the experts'
hidden states. The result equals the mixture of full experts; the memory is one model's.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
Delta = tuple[Tensor, Tensor]  # lora_A (R, in_features), lora_B (out_features, R), scale included


class LoraStack(nn.Module):
    """The deltas of all adapters for one projection: dW_i = lora_B[i] @ lora_A[i], in float32.

    Args:
        deltas: One pair (A, B) for each adapter, its scale multiplied into B. Ranks may differ:
            the smaller ones are padded with zeros, which changes nothing.
    """

    def __init__(self, deltas: Sequence[Delta]) -> None:
        super().__init__()
        rank = max(a.shape[0] for a, _ in deltas)
        self.lora_A = nn.Parameter(
            torch.stack([F.pad(a.float(), (0, 0, 0, rank - a.shape[0])) for a, _ in deltas])
        )
        self.lora_B = nn.Parameter(
            torch.stack([F.pad(b.float(), (0, rank - b.shape[1])) for _, b in deltas])
        )

    def forward(self, x: Tensor, adapter: int) -> Tensor:
        """Apply one adapter's delta: (T, in_features) -> (T, out_features)."""
        low_rank = F.linear(x.to(self.lora_A.dtype), self.lora_A[adapter])
        return F.linear(low_rank, self.lora_B[adapter]).to(x.dtype)


class SharedBaseMoE(nn.Module):
    """A mixture of LoRA experts in the place of a transformer's gated FFN.

    Args:
        mlp: The FFN to replace; its projections are kept as they are and stay frozen.
        deltas: For each projection, one delta for each adapter.
        base_expert: Add the base itself as a last expert; its delta is zero, so it costs nothing.
        top_k: Experts that each token uses.
    """

    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear
    act_fn: nn.Module

    def __init__(
        self, mlp: nn.Module, deltas: Mapping[str, Sequence[Delta]], base_expert: bool, top_k: int
    ) -> None:
        super().__init__()
        for name in (*PROJECTIONS, "act_fn"):
            setattr(self, name, getattr(mlp, name))
        self.deltas = nn.ModuleDict({name: LoraStack(deltas[name]) for name in PROJECTIONS})
        self.num_adapters = len(deltas["gate_proj"])
        self.num_experts = self.num_adapters + base_expert
        self.top_k = top_k
        weight = self.gate_proj.weight
        self.router = nn.Linear(
            weight.shape[1], self.num_experts, bias=False, dtype=torch.float32, device=weight.device
        )
        self.deltas.to(weight.device)
        self.recorded: list[Tensor] | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Mix the experts: (B, S, D) -> (B, S, D).

        Routing is softmax in float32 over all experts, the top k kept and renormalised
        (arXiv:2411.17792; the same order as Mixtral's).
        """
        shape = hidden_states.shape
        x = hidden_states.reshape(-1, shape[-1])
        router_logits = self.router(x.float())  # (T, E), before softmax
        if self.recorded is not None:
            self.recorded.append(router_logits.view(*shape[:-1], self.num_experts))
        routing_weights, selected_experts = router_logits.softmax(dim=-1).topk(self.top_k)
        routing_weights = routing_weights / routing_weights.sum(dim=-1, keepdim=True)

        gate, up = self.gate_proj(x), self.up_proj(x)
        mixed = torch.zeros_like(gate)
        output_delta = torch.zeros_like(x)
        for expert in range(self.num_experts):
            rows, slot = torch.where(selected_experts == expert)
            if rows.numel() == 0:
                continue
            expert_gate, expert_up = gate[rows], up[rows]
            if expert < self.num_adapters:
                inputs = x[rows]
                expert_gate = expert_gate + self.deltas["gate_proj"](inputs, expert)
                expert_up = expert_up + self.deltas["up_proj"](inputs, expert)
            weight = routing_weights[rows, slot, None].to(x.dtype)
            hidden = self.act_fn(expert_gate) * expert_up * weight
            mixed.index_add_(0, rows, hidden)
            if expert < self.num_adapters:
                output_delta.index_add_(0, rows, self.deltas["down_proj"](hidden, expert))
        return (self.down_proj(mixed) + output_delta).view(shape)


def gated_ffns(model: nn.Module) -> dict[str, nn.Module]:
    """The FFNs that can hold experts, by module name: those with gate, up and down projections."""
    return {
        name: module
        for name, module in model.named_modules()
        if all(isinstance(getattr(module, p, None), nn.Linear) for p in PROJECTIONS)
    }


def moe_layers(model: nn.Module) -> list[SharedBaseMoE]:
    """The mixture layers of a fused model, first to last."""
    return [module for module in model.modules() if isinstance(module, SharedBaseMoE)]


def install_experts(
    model: nn.Module, adapters: Sequence[dict[str, Delta]], base_expert: bool, top_k: int
) -> None:
    """Replace every gated FFN of `model` by a mixture, in place, and freeze all parameters.

    Args:
        model: A transformer whose FFNs have gate, up and down projections.
        adapters: For each expert, the delta of each projection by module name.
        base_expert: Add the base itself as a last expert.
        top_k: Experts that each token uses.
    """
    for name, mlp in gated_ffns(model).items():
        deltas = {p: [adapter[f"{name}.{p}"] for adapter in adapters] for p in PROJECTIONS}
        model.set_submodule(name, SharedBaseMoE(mlp, deltas, base_expert, top_k))
    model.requires_grad_(False)


@contextmanager
def record_router_logits(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the router logits of the forward passes inside: a list of (B, S, E), by layer."""
    recorded: list[Tensor] = []
    layers = moe_layers(model)
    for layer in layers:
        layer.recorded = recorded
    try:
        yield recorded
    finally:
        for layer in layers:
            layer.recorded = None
