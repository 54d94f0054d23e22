"""The shared-base mixture equals a mixture of full experts, for any number of them."""

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from h3fusion_core.moe import (
    PROJECTIONS,
    gated_ffns,
    install_experts,
    moe_layers,
    record_router_logits,
)

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "gemma": (GemmaConfig, GemmaForCausalLM),
}


def build(family, layers=2):
    config, model = FAMILIES[family]
    torch.manual_seed(0)
    return model(
        config(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            initializer_range=0.3,
            pad_token_id=0,
        )
    ).eval()


def random_deltas(model, seed, rank=3):
    generator = torch.Generator().manual_seed(seed)
    deltas = {}
    for name, ffn in gated_ffns(model).items():
        for projection in PROJECTIONS:
            out_features, in_features = getattr(ffn, projection).weight.shape
            deltas[f"{name}.{projection}"] = (
                torch.randn(rank, in_features, generator=generator) * 0.3,
                torch.randn(out_features, rank, generator=generator) * 0.3,
            )
    return deltas


def naive_mixture(layer, x):
    """Token by token, over materialised experts: what the fast form must equal."""
    output = torch.zeros_like(x)
    for index in torch.cartesian_prod(torch.arange(x.shape[0]), torch.arange(x.shape[1])):
        token = x[tuple(index)]
        weights, experts = layer.router(token).softmax(-1).topk(layer.top_k)
        for weight, expert in zip(weights / weights.sum(), experts.tolist(), strict=True):
            full = {}
            for name in PROJECTIONS:
                full[name] = getattr(layer, name).weight
                if expert < layer.num_adapters:
                    stack = layer.deltas[name]
                    full[name] = full[name] + stack.lora_B[expert] @ stack.lora_A[expert]
            gate = layer.act_fn(F.linear(token, full["gate_proj"]))
            hidden = gate * F.linear(token, full["up_proj"])
            output[tuple(index)] += weight * F.linear(hidden, full["down_proj"])
    return output


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("num_adapters", "base_expert", "top_k"),
    [(2, False, 1), (2, False, 2), (3, True, 1), (3, True, 2), (3, True, 4), (5, True, 3)],
)
@torch.no_grad()
def test_equals_a_loop_over_full_experts(family, num_adapters, base_expert, top_k):
    model = build(family)
    deltas = [random_deltas(model, seed) for seed in range(num_adapters)]
    install_experts(model, deltas, base_expert, top_k)
    assert len(moe_layers(model)) == 2
    for layer in moe_layers(model):
        torch.nn.init.normal_(layer.router.weight)
        x = torch.randn(2, 5, 16)
        fast, naive = layer(x), naive_mixture(layer, x)
        torch.testing.assert_close(fast, naive, atol=1e-5, rtol=1e-5)
        plain = layer.down_proj(layer.act_fn(layer.gate_proj(x)) * layer.up_proj(x))
        assert (fast - plain).abs().max() > 1e-2  # the experts do something


@pytest.mark.parametrize("layers", [1, 4])
@torch.no_grad()
def test_experts_of_different_rank_and_any_depth(layers):
    model = build("llama", layers)
    deltas = [random_deltas(model, 1, rank=2), random_deltas(model, 2, rank=5)]
    install_experts(model, deltas, base_expert=False, top_k=2)
    assert len(moe_layers(model)) == layers
    layer, x = moe_layers(model)[-1], torch.randn(1, 4, 16)
    torch.testing.assert_close(layer(x), naive_mixture(layer, x), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_router_logits_are_recorded_by_layer_and_only_when_asked():
    model = build("llama", 3)
    install_experts(model, [random_deltas(model, 1)], base_expert=True, top_k=1)
    ids = torch.randint(0, 64, (2, 7))
    with record_router_logits(model) as recorded:
        model(ids)
    model(ids)
    assert [tuple(logits.shape) for logits in recorded] == [(2, 7, 2)] * 3


def test_memory_is_one_model_and_the_deltas():
    model = build("llama")
    before = sum(p.numel() for p in model.parameters())
    deltas = [random_deltas(model, seed) for seed in range(3)]
    install_experts(model, deltas, base_expert=True, top_k=2)
    routers = sum(layer.router.weight.numel() for layer in moe_layers(model))
    low_rank = sum(a.numel() + b.numel() for delta in deltas for a, b in delta.values())
    assert sum(p.numel() for p in model.parameters()) == before + routers + low_rank
