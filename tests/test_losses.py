"""Losses against closed forms and full matrices."""

import math

import pytest
import torch

from h3fusion_core.chat import Encoded, encode_example, pad_batch
from h3fusion_core.losses import (
    delta_distance,
    gating_loss,
    lm_loss,
    mean_routing,
    odds_ratio_loss,
    token_log_probs,
)


def test_gating_loss_is_zero_when_right_and_certain_and_ln_e_when_uniform():
    mask = torch.ones(2, 5, dtype=torch.bool)
    domain_id = torch.tensor([0, 2])
    certain = torch.full((2, 5, 3), -40.0)
    certain[0, :, 0] = certain[1, :, 2] = 40.0
    assert gating_loss([certain, certain], mask, domain_id) == pytest.approx(0.0, abs=1e-6)
    uniform = torch.zeros(2, 5, 3)
    assert gating_loss([uniform], mask, domain_id) == pytest.approx(math.log(3))
    assert gating_loss([certain], mask, domain_id.flip(0)) > 10  # wrong and certain


def test_gating_loss_averages_probabilities_over_layers_and_tokens():
    logits = [torch.tensor([[[2.0, 0.0], [0.0, 1.0]]]), torch.tensor([[[0.0, 3.0], [1.0, 0.0]]])]
    mean = (torch.sigmoid(torch.tensor([2.0, -1.0, -3.0, 1.0]))).mean()
    loss = gating_loss(logits, torch.ones(1, 2, dtype=torch.bool), torch.tensor([0]))
    assert loss == pytest.approx(-math.log(mean.item()), rel=1e-6)


def test_routing_ignores_padding_and_template_tokens():
    torch.manual_seed(0)
    logits = torch.randn(1, 6, 4)
    mask = torch.tensor([[False, True, True, False, True, False]])
    changed = logits.clone()
    changed[:, ~mask[0]] = 50 * torch.randn(1, 3, 4)
    torch.testing.assert_close(mean_routing([logits], mask), mean_routing([changed], mask))
    changed[:, 1] += torch.tensor([5.0, 0, 0, 0])
    assert not torch.allclose(mean_routing([logits], mask), mean_routing([changed], mask))


def factors(seed, rank=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, 20, generator=generator), torch.randn(30, rank, generator=generator)


@pytest.mark.parametrize("step", [1.0, 1e-3, 1e-6])
def test_drift_equals_the_norm_of_the_full_matrix(step):
    start_A, start_B = factors(0)
    change_A, change_B = factors(1)
    A, B = start_A + step * change_A, start_B + step * change_B
    full = (B.double() @ A.double() - start_B.double() @ start_A.double()).norm().float()
    torch.testing.assert_close(
        delta_distance(A, B, start_A, start_B), full, rtol=2e-2 if step == 1e-6 else 1e-4, atol=0
    )


def test_drift_is_zero_at_the_start_with_a_zero_gradient():
    start_A, start_B = factors(0)
    A, B = start_A.clone().requires_grad_(), start_B.clone().requires_grad_()
    distance = delta_distance(A, B, start_A, start_B)
    distance.backward()
    assert distance.item() == 0.0
    assert A.grad.abs().max() == 0.0
    assert B.grad.abs().max() == 0.0


def test_lm_loss_equals_transformers_and_ignores_padding(model, tokenizer):
    examples = [
        encode_example(tokenizer, "Name a river.", "The Elbe.", 200),
        encode_example(tokenizer, "What is bread?", "Bread is baked dough, often of wheat.", 200),
    ]
    batch = pad_batch(examples, tokenizer.pad_token_id)
    ours = lm_loss(
        *token_log_probs(model, batch["input_ids"], batch["attention_mask"], batch["labels"])
    )
    theirs = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        labels=batch["labels"],
    ).loss
    torch.testing.assert_close(ours, theirs)
    longest = max(len(e.input_ids) for e in examples)
    filler = Encoded(
        [tokenizer.pad_token_id] * (longest + 9), [-100] * (longest + 9), [False] * (longest + 9)
    )
    padded = pad_batch([*examples, filler], tokenizer.pad_token_id)
    again = lm_loss(
        *token_log_probs(
            model, padded["input_ids"][:2], padded["attention_mask"][:2], padded["labels"][:2]
        )
    )
    torch.testing.assert_close(again, ours)


def test_odds_ratio_loss_against_its_definition():
    counted = torch.tensor([[True, True, False], [True, True, True]])
    chosen = torch.tensor([[0.5, 0.5, 1.0], [0.2, 0.4, 0.1]]).log() * counted
    rejected = torch.tensor([[0.1, 0.9, 1.0], [0.3, 0.3, 0.3]]).log() * counted
    expected = []
    for row in range(2):
        p, q = (math.exp(x[row].sum() / counted[row].sum()) for x in (chosen, rejected))
        ratio = (p / (1 - p)) / (q / (1 - q))
        expected.append(-math.log(1 / (1 + 1 / ratio)))
    loss = odds_ratio_loss((chosen, counted), (rejected, counted))
    assert loss == pytest.approx(sum(expected) / 2, rel=1e-5)
    assert odds_ratio_loss((chosen, counted), (chosen, counted)) == pytest.approx(math.log(2))
    assert odds_ratio_loss((rejected, counted), (chosen, counted)) > loss
