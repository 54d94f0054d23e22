"""What one model says to the test prompts: greedy answers, likelihoods of choices, routing."""

import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from h3fusion_core import checkpoint
from h3fusion_core.base import read_base_sha256
from h3fusion_core.chat import Encoded, encode_answer, encode_prompt, pad_batch
from h3fusion_core.config import DOMAINS, Domain, Generate
from h3fusion_core.data import load_split
from h3fusion_core.io import H3FusionError, Progress, read_json
from h3fusion_core.losses import mean_routing
from h3fusion_core.moe import moe_layers, record_router_logits


@dataclass(frozen=True)
class Answer:
    """A generated answer; `tokens` counts what was generated, the end of turn included."""

    text: str
    tokens: int


@dataclass(frozen=True)
class Likelihood:
    """Log-probability of a text after a prompt, in nats, summed over its tokens."""

    log_prob: float
    tokens: int


def load_model(
    path: Path, base: Path, dtype: str, device: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a fused model, a PEFT adapter (merged into its base) or a plain model folder.

    Raises:
        H3FusionError: The folder holds none of the three, or an adapter of another base.
    """
    if (path / checkpoint.CONFIG_FILE).is_file():
        return checkpoint.load_fused(path, dtype, device)
    if (path / "adapter_config.json").is_file():
        trained_on = read_json(path / checkpoint.ADAPTER_INFO_FILE)["base_sha256"]
        if trained_on != read_base_sha256(base):
            raise H3FusionError(f"{path}: aligned on another base than {base}; align it anew")
        from peft import PeftModel  # costs seconds that the other models need not pay

        model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
        model = PeftModel.from_pretrained(model, path).merge_and_unload()
        tokenizer = AutoTokenizer.from_pretrained(base)
    elif (path / "config.json").is_file():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
        tokenizer = AutoTokenizer.from_pretrained(path)
    else:
        raise H3FusionError(f"{path}: holds no model, adapter or fused model; run `dvc repro`")
    model.to(device)  # type: ignore[arg-type]
    return model.eval(), tokenizer


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    batch_size: int,
    max_new_tokens: int,
) -> list[Answer]:
    """Answer prompts greedily in left-padded batches of similar length.

    Returns:
        The answers in the order of the prompts; equal to answering them one by one.
    """
    stops = {tokenizer.eos_token_id}
    own = model.generation_config.eos_token_id  # Gemma's end of turn, say, is no eos_token
    stops |= set(own) if isinstance(own, list) else {own} - {None}
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(stops),
        pad_token_id=tokenizer.pad_token_id,
    )
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i].input_ids))
    answers: dict[int, Answer] = {}
    progress = Progress("answers", len(order))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = pad_batch([encoded[i] for i in rows], tokenizer.pad_token_id, side="left")
        with torch.inference_mode():
            output: Tensor = model.generate(  # type: ignore[operator]
                input_ids=batch["input_ids"].to(model.device),
                attention_mask=batch["attention_mask"].to(model.device),
                generation_config=config,
            )
        for row, ids in zip(rows, output[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
            end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
            ids = ids[: end + 1]  # what follows is padding
            text = str(tokenizer.decode(ids, skip_special_tokens=True))
            answers[row] = Answer(text.strip(), len(ids))
        progress.update(len(answers))
    return [answers[i] for i in range(len(prompts))]


def score_choices(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    choices: Sequence[Sequence[str]],
    batch_size: int,
) -> list[list[Likelihood]]:
    """Log-likelihoods of given answers; the answers of a prompt share its KV cache.

    The end-of-turn token is not counted, as in lm-evaluation-harness.
    """
    heads = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    tails = [
        [encode_answer(tokenizer, prompt, choice)[:-1] for choice in options]
        for prompt, options in zip(prompts, choices, strict=True)
    ]
    order = [i for i in range(len(prompts)) if tails[i]]
    order.sort(key=lambda i: len(heads[i].input_ids))
    results: dict[int, list[Likelihood]] = {i: [] for i in range(len(prompts)) if not tails[i]}
    progress = Progress("likelihoods", len(prompts))
    rows_per_batch = max(1, batch_size // 4)  # each has several choices
    for start in range(0, len(order), rows_per_batch):
        rows = order[start : start + rows_per_batch]
        head = pad_batch([heads[i] for i in rows], tokenizer.pad_token_id, side="left")
        flat = [(slot, tail) for slot, row in enumerate(rows) for tail in tails[row]]
        likelihoods = _score_tails(model, head, flat, tokenizer.pad_token_id)
        for slot, row in enumerate(rows):
            results[row] = [
                likelihood
                for likelihood, (owner, _) in zip(likelihoods, flat, strict=True)
                if owner == slot
            ]
        progress.update(len(results))
    return [results[i] for i in range(len(prompts))]


@torch.inference_mode()
def _score_tails(
    model: PreTrainedModel,
    head: dict[str, Tensor],
    tails: Sequence[tuple[int, list[int]]],
    pad_token_id: int,
) -> list[Likelihood]:
    """Log-likelihood of each tail after the head (B, S) that it names by its row."""
    device = model.device
    ids, mask = head["input_ids"].to(device), head["attention_mask"].to(device)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    # the head's last token is fed with the tails, so that one pass has the logits of all of them
    cache = model(
        input_ids=ids[:, :-1],
        attention_mask=mask[:, :-1],
        position_ids=positions[:, :-1],
        use_cache=True,
        logits_to_keep=1,
    ).past_key_values
    owner = torch.tensor([row for row, _ in tails], device=device)
    cache.batch_select_indices(owner)
    batch = pad_batch([Encoded(t, t, [False] * len(t)) for _, t in tails], pad_token_id)
    tail, tail_mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
    inputs = torch.cat([ids[owner, -1:], tail[:, :-1]], dim=1)
    steps = torch.arange(inputs.shape[1], device=device)
    log_probs = (
        model(
            input_ids=inputs,
            attention_mask=torch.cat([mask[owner], tail_mask[:, :-1]], dim=1),
            position_ids=positions[owner, -1:] + steps,
            past_key_values=cache,
            use_cache=True,
        )
        .logits.float()
        .log_softmax(dim=-1)
    )
    token_log_probs = log_probs.gather(2, tail[..., None])[..., 0] * tail_mask
    return [
        Likelihood(total, len(tokens))
        for total, (_, tokens) in zip(token_log_probs.sum(dim=1).tolist(), tails, strict=True)
    ]


@torch.inference_mode()
def read_routing(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    batch_size: int,
) -> Tensor:
    """Routing probabilities of each layer, averaged over a prompt's tokens.

    Returns:
        (num_prompts, num_layers, num_experts).
    """
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i].input_ids))
    layers = moe_layers(model)
    routing = torch.zeros(len(prompts), len(layers), layers[0].num_experts)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = pad_batch([encoded[i] for i in rows], tokenizer.pad_token_id)
        batch = {name: value.to(model.device) for name, value in batch.items()}
        with record_router_logits(model) as router_logits:
            model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                logits_to_keep=1,
                use_cache=False,
            )
        for layer, logits in enumerate(router_logits):
            routing[rows, layer] = mean_routing([logits], batch["prompt_mask"]).cpu()
    return routing


def answer_test_split(
    path: Path, base: Path, data: Path, config: Generate, dtype: str, device: str
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Everything that scoring needs from one model, over the whole test split.

    Returns:
        One row for each test prompt (`id`, `answer`, `answer_tokens`, `choices` as pairs of
        log-probability and tokens: a helpful reference's, or an honest question's correct answers'
        and then the incorrect ones'; for a fused model `routing`, by layer and expert), and the
        model's cost.
    """
    model, tokenizer = load_model(path, base, dtype, device)
    rows = [(domain, row) for domain in DOMAINS for row in load_split(data, domain, "test")]
    prompts = [row["prompt"] for _, row in rows]
    start = time.perf_counter()
    answers = generate_answers(model, tokenizer, prompts, config.batch_size, config.max_new_tokens)
    seconds = time.perf_counter() - start
    choices: list[list[str]] = []
    for domain, row in rows:
        match domain:
            case Domain.HELPFUL:
                choices.append([row["response"]])
            case Domain.HARMLESS:
                choices.append([])  # judged by what the model says
            case Domain.HONEST:
                choices.append(row["correct_answers"] + row["incorrect_answers"])
    likelihoods = score_choices(model, tokenizer, prompts, choices, config.batch_size)
    result = [
        {
            "id": row["id"],
            "answer": answer.text,
            "answer_tokens": answer.tokens,
            "choices": [[choice.log_prob, choice.tokens] for choice in options],
        }
        for (_, row), answer, options in zip(rows, answers, likelihoods, strict=True)
    ]
    if moe_layers(model):
        routing = read_routing(model, tokenizer, prompts, config.batch_size)
        for entry, layers in zip(result, routing.tolist(), strict=True):
            entry["routing"] = layers
    cost = {
        **count_parameters(model, path),
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "tokens_per_s": sum(answer.tokens for answer in answers) / seconds,
    }
    return result, cost


def count_parameters(model: PreTrainedModel, path: Path) -> dict[str, int]:
    """Parameters in memory, those that one token uses, and those that training may have moved."""
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = 0
    for layer in moe_layers(model):
        one_adapter = sum(p.numel() for p in layer.deltas.parameters()) // layer.num_adapters
        idle += max(0, layer.num_adapters - layer.top_k) * one_adapter
    trained = 0
    for name in ("adapter_model.safetensors", checkpoint.WEIGHTS_FILE):
        if (path / name).is_file():
            trained = sum(tensor.numel() for tensor in load_file(path / name).values())
    return {
        "parameters_total": total,
        "parameters_active": total - idle,
        "parameters_trainable": trained,
    }
