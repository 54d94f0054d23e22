"""What a model is shown and what it learns: template, labels, content mask, padding."""

import pytest

from h3fusion_core.chat import IGNORE, encode_answer, encode_example, encode_prompt, pad_batch
from h3fusion_core.io import H3FusionError

PROMPTS = ["Hi", "Why is the sky blue?", "user", "  two  spaces inside", "Zürich: 5 × 3 = ?"]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_prompt_mask_covers_the_prompt_and_what_closes_it(tokenizer, prompt):
    encoded = encode_prompt(tokenizer, prompt)
    marked = [
        token
        for token, content in zip(encoded.input_ids, encoded.prompt_mask, strict=True)
        if content
    ]
    assert tokenizer.decode(marked) == f"{prompt}<|end|><|assistant|>"
    answered = encode_example(tokenizer, prompt, "An answer.", 300)
    assert sum(answered.prompt_mask) == len(marked)


def test_labels_are_the_answer_and_its_end_of_turn(tokenizer):
    example = encode_example(tokenizer, "Name a river.", "The Elbe.", 300)
    labels = [label for label in example.labels if label != IGNORE]
    assert labels[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(labels[:-1]) == "The Elbe."
    learned = [i for i, label in enumerate(example.labels) if label != IGNORE]
    assert learned == list(range(learned[0], len(example.labels)))
    assert [example.input_ids[i] for i in learned] == labels
    head = encode_prompt(tokenizer, "Name a river.").input_ids
    assert example.input_ids[: len(head)] == head  # training shows what inference shows


def test_long_rows_are_cut(tokenizer):
    example = encode_example(tokenizer, "Name a river.", "The Elbe. " * 50, 64)
    assert len(example.input_ids) == len(example.labels) == len(example.prompt_mask) == 64


def test_padding_on_both_sides(tokenizer):
    examples = [encode_prompt(tokenizer, "Hi"), encode_prompt(tokenizer, "Hello there")]
    for side, padded in (("left", slice(0, 9)), ("right", slice(-9, None))):
        batch = pad_batch(examples, tokenizer.pad_token_id, side)
        assert (batch["input_ids"][0, padded] == tokenizer.pad_token_id).all()
        assert batch["attention_mask"].sum(1).tolist() == [len(e.input_ids) for e in examples]
        assert not batch["prompt_mask"][0, padded].any()
        assert (batch["labels"] == IGNORE).all()


def test_a_template_that_changes_the_prompt_is_refused(tokenizer):
    with pytest.raises(H3FusionError, match="changes the prompt"):
        template, tokenizer.chat_template = tokenizer.chat_template, "{{ messages[0].role }}"
        try:
            encode_prompt(tokenizer, "Hi there")
        finally:
            tokenizer.chat_template = template


def test_answers_end_once(tokenizer):
    assert encode_answer(tokenizer, "Hi", "Yes.").count(tokenizer.eos_token_id) == 1
