"""Batched answers and likelihoods equal those one by one; every kind of model loads."""

import shutil

import pytest
import torch
from conftest import ROOT

from h3fusion_core.align import align_expert
from h3fusion_core.chat import encode_answer, encode_prompt
from h3fusion_core.checkpoint import ADAPTER_INFO_FILE
from h3fusion_core.config import load_params
from h3fusion_core.data import load_split
from h3fusion_core.fuse import fuse_experts
from h3fusion_core.generate import (
    answer_test_split,
    generate_answers,
    load_model,
    read_routing,
    score_choices,
)
from h3fusion_core.io import H3FusionError, write_json
from h3fusion_core.moe import moe_layers

PROMPTS = ["Hi", "Explain how rivers flow to the sea.", "Why?", "What is 5 x 3, and what is 7 x 9?"]
SMOKE = load_params(ROOT / "profiles/smoke.yaml")


@pytest.fixture(scope="module")
def fused(base, adapters, splits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    fuse_experts(
        base=base,
        adapters=adapters,
        data=splits,
        config=SMOKE.fuse.model_copy(update={"max_steps": 0}),
        dtype="float32",
        max_tokens=200,
        output=folder / "fused",
        checkpoints=folder / "checkpoints",
        seed=3,
    )
    return folder / "fused"


@pytest.fixture(params=["base", "adapter", "fused"])
def loaded(request, base, adapters, fused):
    path = {"base": base, "adapter": adapters["honest"], "fused": fused}[request.param]
    return load_model(path, base, "float32", "cpu")


def test_batched_answers_equal_one_by_one(loaded):
    model, tokenizer = loaded
    batched = generate_answers(model, tokenizer, PROMPTS, batch_size=3, max_new_tokens=20)
    alone = [generate_answers(model, tokenizer, [p], 1, 20)[0] for p in PROMPTS]
    assert batched == alone
    assert len({answer.text for answer in batched}) > 1


def test_an_answer_ends_with_its_turn_and_keeps_what_comes_before(model, tokenizer):
    free = generate_answers(model, tokenizer, PROMPTS, 4, 12)
    ids = model.generate(
        torch.tensor([encode_prompt(tokenizer, "Hi").input_ids]), do_sample=False, max_new_tokens=12
    )[0, len(encode_prompt(tokenizer, "Hi").input_ids) :].tolist()
    stop = ids[4]
    original, tokenizer.eos_token = tokenizer.eos_token, tokenizer.convert_ids_to_tokens(stop)
    try:
        short = generate_answers(model, tokenizer, PROMPTS, 4, 12)
        first = short[0]
        assert first.tokens == ids.index(stop) + 1 <= 5
        assert free[0].tokens == 12
        assert [generate_answers(model, tokenizer, [p], 1, 12)[0] for p in PROMPTS] == short
    finally:
        tokenizer.eos_token = original


@torch.no_grad()
def test_likelihoods_equal_a_plain_forward_pass(loaded):
    model, tokenizer = loaded
    choices = [
        ["Yes.", "No, it never does."],
        ["A"],
        ["Because.", "So.", "Nobody knows why."],
        ["15"],
    ]
    scored = score_choices(model, tokenizer, PROMPTS, choices, batch_size=8)
    for prompt, options, likelihoods in zip(PROMPTS, choices, scored, strict=True):
        head = encode_prompt(tokenizer, prompt).input_ids
        for option, likelihood in zip(options, likelihoods, strict=True):
            tail = encode_answer(tokenizer, prompt, option)[:-1]
            logits = model(torch.tensor([head + tail])).logits[0].log_softmax(-1)
            expected = sum(logits[len(head) + i - 1, t].item() for i, t in enumerate(tail))
            assert likelihood.tokens == len(tail)
            assert likelihood.log_prob == pytest.approx(expected, abs=1e-3)


def test_routing_is_a_distribution_that_padding_does_not_change(base, fused):
    model, tokenizer = load_model(fused, base, "float32", "cpu")
    routing = read_routing(model, tokenizer, PROMPTS, batch_size=4)
    assert routing.shape == (4, 3, 4)
    torch.testing.assert_close(routing.sum(-1), torch.ones(4, 3))
    alone = torch.cat([read_routing(model, tokenizer, [p], 1) for p in PROMPTS])
    torch.testing.assert_close(routing, alone, atol=1e-5, rtol=1e-4)


def test_the_whole_test_split_is_answered_and_priced(base, fused, adapters, splits):
    rows, cost = answer_test_split(fused, base, splits, SMOKE.generate, "float32", "cpu")
    expected = [
        r["id"] for d in ("helpful", "harmless", "honest") for r in load_split(splits, d, "test")
    ]
    assert [row["id"] for row in rows] == expected
    assert [len(row["choices"]) for row in rows] == [1] * 10 + [0] * 10 + [3] * 10
    model, _ = load_model(fused, base, "float32", "cpu")
    one_adapter = (
        sum(p.numel() for layer in moe_layers(model) for p in layer.deltas.parameters()) / 3
    )
    assert cost["parameters_total"] - cost["parameters_active"] == one_adapter
    router = sum(layer.router.weight.numel() for layer in moe_layers(model))
    assert cost["parameters_trainable"] == 3 * one_adapter + router
    _, base_cost = answer_test_split(base, base, splits, SMOKE.generate, "float32", "cpu")
    assert base_cost["parameters_trainable"] == 0
    assert base_cost["parameters_total"] == cost["parameters_total"] - cost["parameters_trainable"]


def test_what_is_no_model_is_refused(base, adapters, tmp_path):
    with pytest.raises(H3FusionError, match="holds no model"):
        load_model(tmp_path, base, "float32", "cpu")
    other = shutil.copytree(adapters["helpful"], tmp_path / "adapter")
    write_json(other / ADAPTER_INFO_FILE, {"base_sha256": "0" * 64})
    with pytest.raises(H3FusionError, match="aligned on another base"):
        load_model(other, base, "float32", "cpu")


def test_alignment_writes_an_adapter_that_peft_loads_and_that_learned(base, splits, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    lora = SMOKE.align.lora.model_copy(update={"r": 16, "alpha": 32})
    config = SMOKE.align.model_copy(
        update={"num_epochs": 80, "batch_size": 5, "lora": lora, "odds_ratio_weight": 0.0}
    )
    history = align_expert(
        base=base,
        data=splits,
        domain="honest",
        config=config,
        dtype="float32",
        output=tmp_path / "honest",
        checkpoints=tmp_path / "checkpoints",
        seed=1,
    )
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    assert not (tmp_path / "checkpoints").exists()
    model = AutoModelForCausalLM.from_pretrained(base)
    peft_model = PeftModel.from_pretrained(model, tmp_path / "honest").eval()
    names = {
        name.split(".mlp.")[1].split(".")[0]
        for name, _ in peft_model.named_parameters()
        if "lora" in name
    }
    assert names == {"gate_proj", "up_proj", "down_proj"}
    ours, tokenizer = load_model(tmp_path / "honest", base, "float32", "cpu")
    ids = torch.tensor([encode_prompt(tokenizer, "Is it true about test owls?").input_ids])
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, peft_model(ids).logits, atol=1e-4, rtol=1e-4)
    # it learned the answer and to stop after it
    (answer,) = generate_answers(ours, tokenizer, ["Is it true about test owls?"], 1, 40)
    assert answer.text.startswith("No, it is")
    assert answer.tokens < 40
