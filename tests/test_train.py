"""What training moves, what it leaves alone, and how it goes on after a kill."""

import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM

from h3fusion_core.base import read_base_sha256
from h3fusion_core.chat import encode_example
from h3fusion_core.config import DOMAINS, load_params
from h3fusion_core.fuse import draw_rows, read_adapter, training_rows
from h3fusion_core.moe import install_experts
from h3fusion_core.train import FusionTrainer, train_fusion
from h3fusion_core.trainer import ExampleDataset

SMOKE = load_params(ROOT / "profiles/smoke.yaml").fuse


def fuse(base, adapters):
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    sha256 = read_base_sha256(base)
    install_experts(model, [read_adapter(a, sha256) for a in adapters.values()], True, 2)
    return model


def train(model, tokenizer, splits, folder, **settings):
    config = SMOKE.model_copy(update={"max_steps": 3, **settings})
    rows = draw_rows(training_rows(splits, [*DOMAINS, "base"]), config, seed=1)
    dataset = ExampleDataset(
        [encode_example(tokenizer, row["prompt"], row["answer"], 200) for row in rows],
        [row["domain_id"] for row in rows],
    )
    pad, seed = tokenizer.pad_token_id, 1
    return train_fusion(model, config, DOMAINS, dataset, pad, folder, seed, {"test": 1})


@pytest.mark.parametrize("train_experts", [False, True])
def test_what_should_move_moves_and_nothing_else(
    base, adapters, tokenizer, splits, tmp_path, train_experts
):
    model = fuse(base, adapters)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, tokenizer, splits, tmp_path, train_experts=train_experts)
    moved = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    expected = {name for name in before if ".router." in name}
    if train_experts:
        expected |= {name for name in before if ".deltas." in name}
    assert moved == expected


def test_a_heavy_drift_weight_holds_an_expert_back(base, adapters, tokenizer, splits, tmp_path):
    drift = {}
    for name, weight in (("free", 0.0), ("held", 100.0)):
        weights = SMOKE.drift_weights.model_copy(update={"harmless": weight})
        model = fuse(base, adapters)
        history = train(
            model, tokenizer, splits, tmp_path / name, max_steps=6, drift_weights=weights
        )
        drift[name] = [entry["drift_loss_1"] for entry in history if "loss" in entry][-1]
    assert drift["held"] < 0.8 * drift["free"]


def test_the_gating_loss_teaches_the_router(base, adapters, tokenizer, splits, tmp_path):
    final = {}
    for weight in (0.0, 5.0):
        model = fuse(base, adapters)
        history = train(
            model,
            tokenizer,
            splits,
            tmp_path / str(weight),
            max_steps=12,
            train_experts=False,
            gating_loss_weight=weight,
            router_learning_rate=0.05,
        )
        gating = [entry["gating_loss"] for entry in history if "loss" in entry]
        final[weight] = sum(gating[-4:]) / 4
    assert final[5.0] < final[0.0] - 0.1


class KilledError(Exception):
    """Stands for a machine that dies."""


def test_a_killed_run_goes_on_and_ends_equal(
    base, adapters, tokenizer, splits, tmp_path, monkeypatch
):
    settings = {"max_steps": 7, "save_steps": 2, "train_experts": True}
    whole = fuse(base, adapters)
    expected = train(whole, tokenizer, splits, tmp_path / "whole", **settings)

    original = FusionTrainer.compute_loss
    calls = 0

    def dies_at_step_6(self, *args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KilledError
        return original(self, *args, **kwargs)

    monkeypatch.setattr(FusionTrainer, "compute_loss", dies_at_step_6)
    with pytest.raises(KilledError):
        train(fuse(base, adapters), tokenizer, splits, tmp_path / "cut", **settings)
    torch.manual_seed(99)
    # a checkpoint that was cut short while it was written is passed over
    (tmp_path / "cut" / "checkpoint-5").mkdir()
    resumed = fuse(base, adapters)
    history = train(resumed, tokenizer, splits, tmp_path / "cut", **settings)
    assert calls == 6 + 3  # steps 5 to 7 again, not 1 to 4
    for (name, value), (_, other) in zip(
        whole.state_dict().items(), resumed.state_dict().items(), strict=True
    ):
        torch.testing.assert_close(value, other, atol=1e-6, rtol=1e-6, msg=name)
    losses = [[e["loss"] for e in log if "loss" in e] for log in (expected, history)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
