"""Pico models and adapters, built once: no network, float32, seeded."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from h3fusion_core.base import prepare_base, read_base_sha256
from h3fusion_core.checkpoint import ADAPTER_INFO_FILE
from h3fusion_core.config import DOMAINS, PicoBase
from h3fusion_core.io import write_json, write_jsonl
from h3fusion_core.moe import PROJECTIONS

torch.set_num_threads(1)  # pico models gain nothing from more, and workers share the cores

ROOT = Path(__file__).resolve().parents[1]
PICO = PicoBase(source="pico", hidden_size=32, intermediate_size=48, num_layers=3, num_heads=2)


def make_adapter(base: Path, folder: Path, seed: int, **lora) -> Path:
    """Save a PEFT adapter whose delta is far from zero, as an aligned one is."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    settings = {"r": 4, "lora_alpha": 12, "target_modules": list(PROJECTIONS)} | lora
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    write_json(folder / ADAPTER_INFO_FILE, {"base_sha256": read_base_sha256(base)})
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "base"
    prepare_base(PICO, folder, cache_dir=folder, seed=0)
    return folder


@pytest.fixture(scope="session")
def tokenizer(base):
    return AutoTokenizer.from_pretrained(base)


@pytest.fixture
def model(base):
    return AutoModelForCausalLM.from_pretrained(base).eval()


@pytest.fixture(scope="session")
def adapters(base, tmp_path_factory):
    root = tmp_path_factory.mktemp("experts")
    return {
        domain: make_adapter(base, root / domain, seed) for seed, domain in enumerate(DOMAINS, 1)
    }


@pytest.fixture(scope="session")
def splits(tmp_path_factory):
    """Derived splits of a few rows, harmful and benign ones in unequal numbers."""
    root = tmp_path_factory.mktemp("splits")
    subjects = [
        "rivers",
        "bread",
        "chess",
        "moss",
        "glass",
        "bells",
        "ink",
        "kites",
        "salt",
        "owls",
    ]
    for split in ("train", "validation", "test"):
        rows = {domain: [] for domain in DOMAINS}
        for number, subject in enumerate(subjects):
            common = {"source": f"{split}.jsonl:{number + 1}", "category": None}
            tag = f"{split} {subject}"
            rows["helpful"].append(
                common
                | {"id": f"helpful-{split}-{number}", "prompt": f"Explain {tag}."}
                | {"response": f"{subject} are common."}
            )
            rows["harmless"].append(
                common
                | {"id": f"harmless-{split}-{number}", "harmful": number < 6}
                | {"prompt": f"{'Ruin' if number < 6 else 'Kill time with'} {tag}!"}
                | {"response": "I can't help with that." if number < 6 else "Gladly: begin now."}
            )
            rows["honest"].append(
                common
                | {"id": f"honest-{split}-{number}", "prompt": f"Is it true about {tag}?"}
                | {"best_answer": "No, it is not.", "correct_answers": ["No, it is not."]}
                | {"incorrect_answers": ["Yes, it is so.", "Yes."]}
            )
        for domain, values in rows.items():
            write_jsonl(root / domain / f"{split}.jsonl", values)
    return root
