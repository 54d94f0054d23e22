"""The closed-form start: right about prompts it has not seen, blind to what it must not see."""

import pytest
import torch
from torch import nn

from h3fusion_core.chat import Encoded, encode_prompt
from h3fusion_core.moe import gated_ffns
from h3fusion_core.router import fit_router

EXPERTS = 3


def fit(model, prompts, labels, **settings):
    arguments = {
        "num_experts": EXPERTS,
        "ridge_lambdas": (0.01, 1.0),
        "holdout_fraction": 0.25,
        "batch_size": 7,
        "pad_token_id": 1,
        "seed": 0,
    }
    ffns = list(gated_ffns(model).values())
    return fit_router(model, ffns, prompts, labels, **(arguments | settings))


def inputs_of(model, prompts):
    """The first layer's FFN input on each prompt's tokens, without batching."""
    seen = []
    ffn = next(iter(gated_ffns(model).values()))
    handle = ffn.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    with torch.no_grad():
        for prompt in prompts:
            model(torch.tensor([prompt.input_ids]))
    handle.remove()
    masks = [torch.tensor(prompt.prompt_mask) for prompt in prompts]
    return [x[mask] for x, mask in zip(seen, masks, strict=True)]


@pytest.fixture
def prompts(tokenizer):
    words = [["north", "wind"], ["12345", "67890"], ["ZZZ!", "QQQ?"]]
    texts = [f"{a} {b} " * (1 + n % 3) + a[: n % 4] for a, b in words for n in range(24)]
    return [encode_prompt(tokenizer, text.strip()) for text in texts], [0] * 24 + [1] * 24 + [
        2
    ] * 24


def test_it_is_right_about_prompts_that_it_has_not_seen(model, tokenizer, prompts):
    fits = fit(model, *prompts)
    assert len(fits) == 3
    assert all(layer.heldout_accuracy > 0.9 for layer in fits)
    assert all(layer.heldout_nll < 0.5 for layer in fits)  # ln 3 = 1.10 is no knowledge
    new = [encode_prompt(tokenizer, text) for text in ("wind wind north", "98 76", "Q?Q! Z?")]
    for label, x in enumerate(inputs_of(model, new)):
        assert (x @ fits[0].weight.T).softmax(-1).mean(0).argmax() == label


def test_labels_that_mean_nothing_give_an_unsure_router(model, prompts):
    encoded, labels = prompts
    shuffled = torch.tensor(labels)[torch.randperm(72, generator=torch.Generator().manual_seed(5))]
    fits = fit(model, encoded, shuffled.tolist())
    assert all(layer.heldout_nll > 0.9 for layer in fits)


def test_it_solves_the_ridge_regression(model, prompts):
    encoded, labels = prompts
    (first, *_) = fit(model, encoded, labels, ridge_lambdas=(0.1,))
    from sklearn.model_selection import train_test_split

    rows, _ = train_test_split(range(72), test_size=0.25, random_state=0, stratify=labels)
    per_prompt = inputs_of(model, encoded)
    x = torch.cat([per_prompt[row] for row in rows]).double()
    label = torch.cat([torch.full((len(per_prompt[row]),), labels[row]) for row in rows])
    weight = 1 / (EXPERTS * torch.bincount(label, minlength=EXPERTS)[label].double())
    target = nn.functional.one_hot(label, EXPERTS).double() - 1 / EXPERTS
    gram = (weight[:, None] * x).T @ x
    penalty = 0.1 * gram.diagonal().mean() * torch.eye(x.shape[1])
    expected = torch.linalg.solve(gram + penalty, (weight[:, None] * x).T @ target).T
    torch.testing.assert_close(
        first.weight.double() / first.temperature, expected, rtol=1e-2, atol=1e-3
    )


def test_template_tokens_and_padding_are_not_seen(model, prompts):
    encoded, labels = prompts
    again = fit(model, encoded, labels, batch_size=1)
    for batched, single in zip(fit(model, encoded, labels), again, strict=True):
        torch.testing.assert_close(batched.weight, single.weight, rtol=1e-2, atol=1e-2)
    everything = [Encoded(p.input_ids, p.labels, [True] * len(p.input_ids)) for p in encoded]
    other = fit(model, everything, labels)
    assert not torch.allclose(other[0].weight, again[0].weight, rtol=0.05, atol=0.05)
