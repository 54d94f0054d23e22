"""From prompts and answers to tokens: chat template, completion labels, content mask, batches."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from h3fusion_core.io import H3FusionError
from h3fusion_core.losses import IGNORE


@dataclass(frozen=True)
class Encoded:
    """Tokens of one prompt, alone or with an answer.

    `labels` holds the answer's tokens, the end-of-turn token included, and IGNORE elsewhere.
    `prompt_mask` marks what can tell a router of the prompt: its own text, and the template's
    tokens after it, which have attended to it and from which the answer begins. Padding and the
    template's tokens before it are the same for every prompt.
    """

    input_ids: list[int]
    labels: list[int]
    prompt_mask: list[bool]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> Encoded:
    """Encode a prompt as the chat template ends it, ready for an answer."""
    text = _render(tokenizer, prompt)
    # a template may itself contain the prompt's words, and the user's turn comes last
    start = text.rfind(prompt)
    if start < 0:
        raise H3FusionError(f"the chat template changes the prompt {prompt[:40]!r}; strip it")
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    mask = [stop > start for _, stop in encoding["offset_mapping"]]
    ids = encoding["input_ids"]
    return Encoded(ids, [IGNORE] * len(ids), mask)


def encode_answer(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> list[int]:
    """Tokens of an answer as they follow the encoded prompt, the end-of-turn token last."""
    before, whole = _render(tokenizer, prompt), _render(tokenizer, prompt, answer)
    if not whole.startswith(before):
        raise H3FusionError("the chat template does not continue its own generation prompt")
    text = whole[len(before) :].rstrip()  # what a template writes after the turn is not learned
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids if ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]


def encode_example(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, max_tokens: int
) -> Encoded:
    """Encode a prompt with its answer for training, cut at `max_tokens`."""
    head = encode_prompt(tokenizer, prompt)
    completion = encode_answer(tokenizer, prompt, answer)
    return Encoded(
        (head.input_ids + completion)[:max_tokens],
        (head.labels + completion)[:max_tokens],
        (head.prompt_mask + [False] * len(completion))[:max_tokens],
    )


def _render(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str | None = None) -> str:
    messages = [{"role": "user", "content": prompt}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=answer is None
    )
    assert isinstance(text, str)
    return text


def pad_batch(examples: list[Encoded], pad_token_id: int, side: str = "right") -> dict[str, Tensor]:
    """Pad examples to one length.

    Returns:
        input_ids, attention_mask, labels, prompt_mask, each (batch_size, seq_len).
    """
    length = max(len(example.input_ids) for example in examples)

    def pad(values: list[Any], filler: Any) -> list[Any]:
        padding = [filler] * (length - len(values))
        return padding + values if side == "left" else values + padding

    return {
        "input_ids": torch.tensor([pad(e.input_ids, pad_token_id) for e in examples]),
        "attention_mask": torch.tensor([pad([1] * len(e.input_ids), 0) for e in examples]),
        "labels": torch.tensor([pad(e.labels, IGNORE) for e in examples]),
        "prompt_mask": torch.tensor([pad(e.prompt_mask, False) for e in examples]),
    }
