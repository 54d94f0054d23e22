"""A fused model is what its experts were: parity with PEFT, refusals, saving and loading."""

import json
import shutil

import pytest
import torch
from conftest import ROOT, make_adapter
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from h3fusion_core.base import read_base_sha256
from h3fusion_core.checkpoint import (
    ADAPTER_INFO_FILE,
    CONFIG_FILE,
    WEIGHTS_FILE,
    load_fused,
    save_fused,
)
from h3fusion_core.config import DOMAINS, load_params
from h3fusion_core.fuse import (
    check_targets,
    draw_rows,
    fuse_experts,
    read_adapter,
    training_rows,
)
from h3fusion_core.io import H3FusionError, write_json
from h3fusion_core.moe import install_experts, moe_layers

IDS = torch.randint(5, 200, (2, 12), generator=torch.Generator().manual_seed(0))
SMOKE = load_params(ROOT / "profiles/smoke.yaml").fuse


def one_hot(model, expert):
    """Let every router choose one expert, whatever it sees (the FFN input is no zero vector)."""
    for layer in moe_layers(model):
        layer.top_k = 1
        layer.router.weight.data.zero_()
        layer.router.register_forward_hook(
            lambda module, args, output: torch.nn.functional.one_hot(
                torch.full(output.shape[:-1], expert), output.shape[-1]
            ).float()
        )


@torch.no_grad()
def merged_logits(base, adapter):
    model = AutoModelForCausalLM.from_pretrained(base)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload().eval()(IDS).logits


@torch.no_grad()
def expert_logits(base, adapters, expert):
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    sha256 = read_base_sha256(base)
    install_experts(model, [read_adapter(a, sha256) for a in adapters], True, 1)
    one_hot(model, expert)
    return model(IDS).logits


def test_each_expert_alone_is_its_aligned_model_and_no_other(base, model, adapters):
    outputs = [expert_logits(base, adapters.values(), i) for i in range(len(DOMAINS) + 1)]
    for output, folder in zip(outputs, adapters.values(), strict=False):
        torch.testing.assert_close(output, merged_logits(base, folder), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(outputs[-1], model(IDS).logits, atol=1e-6, rtol=1e-6)
    for i, output in enumerate(outputs):
        assert all((output - other).abs().max() > 1e-2 for other in outputs[:i])


@pytest.mark.parametrize(
    "lora",
    [
        {"r": 2, "lora_alpha": 16},
        {"r": 9, "lora_alpha": 3, "use_rslora": True},
        {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 40}},
    ],
    ids=["alpha over r", "rslora", "patterns"],
)
def test_scaling_is_that_of_peft(base, tmp_path, lora):
    adapter = make_adapter(base, tmp_path / "adapter", 7, **lora)
    torch.testing.assert_close(
        expert_logits(base, [adapter], 0), merged_logits(base, adapter), atol=1e-5, rtol=1e-5
    )


def test_adapters_of_another_base_are_refused(base, adapters, tmp_path):
    other = shutil.copytree(adapters["honest"], tmp_path / "honest")
    write_json(other / ADAPTER_INFO_FILE, {"base_sha256": "0" * 64})
    with pytest.raises(H3FusionError, match=r"honest: aligned on the base with sha256 000000"):
        read_adapter(other, read_base_sha256(base))


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias"),
        ({"target_modules": ["gate_proj", "up_proj"]}, "lacks .*down_proj"),
        ({"target_modules": ["gate_proj", "up_proj", "down_proj", "q_proj"]}, "also has .*q_proj"),
        ({"layers_to_transform": [0, 1]}, r"lacks model\.layers\.2"),
    ],
)
def test_what_a_mixture_cannot_represent_is_refused(base, model, tmp_path, lora, message):
    settings = {"r": 2, "target_modules": ["gate_proj", "up_proj", "down_proj"]} | lora
    peft_model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **settings)
    )
    folder = tmp_path / "adapter"
    peft_model.save_pretrained(folder)
    write_json(folder / ADAPTER_INFO_FILE, {"base_sha256": read_base_sha256(base)})
    with pytest.raises(H3FusionError, match=message):
        check_targets(model, read_adapter(folder, read_base_sha256(base)), folder)


def test_every_row_needs_the_expert_of_its_own_group(splits):
    rows = training_rows(splits, [*DOMAINS, "base"])
    assert [row["domain_id"] for row in rows] == [0] * 10 + [1] * 6 + [3] * 4 + [2] * 10
    assert all(row["prompt"].startswith("Kill time") for row in rows if row["domain_id"] == 3)
    without_base = training_rows(splits, list(DOMAINS))
    assert [row["domain_id"] for row in without_base] == [0] * 10 + [1] * 6 + [0] * 4 + [2] * 10


def test_rows_are_drawn_by_the_weights_of_their_groups(splits):
    weights = {"helpful": 0, "harmless": 1, "honest": 1, "benign": 2}
    config = SMOKE.model_copy(
        update={"max_steps": 500, "group_weights": type(SMOKE.group_weights)(**weights)}
    )
    rows = training_rows(splits, [*DOMAINS, "base"])
    drawn = [row["group"] for row in draw_rows(rows, config, seed=0)]
    assert len(drawn) == config.max_steps * config.batch_size
    share = {group: drawn.count(group) / len(drawn) for group in weights}
    assert share == pytest.approx(
        {"helpful": 0, "harmless": 0.25, "honest": 0.25, "benign": 0.5}, abs=0.04
    )


@pytest.fixture(scope="module")
def fused(base, adapters, splits, tmp_path_factory):
    root = tmp_path_factory.mktemp("fused")
    start, history = fuse_experts(
        base=base,
        adapters=adapters,
        data=splits,
        config=SMOKE,
        dtype="float32",
        max_tokens=200,
        output=root / "fused",
        checkpoints=root / "checkpoints",
        seed=3,
    )
    return root / "fused", start, history


def test_fusing_writes_a_small_folder_and_a_full_log(fused):
    folder, start, history = fused
    assert sorted(path.name for path in folder.iterdir()) == [WEIGHTS_FILE, CONFIG_FILE]
    config = json.loads((folder / CONFIG_FILE).read_text())
    assert config["experts"] == [*DOMAINS, "base"]
    assert len(start) == 3
    steps = [entry for entry in history if "loss" in entry]
    assert len(steps) == SMOKE.max_steps
    assert steps[0]["drift_loss_0"] == 0.0
    assert steps[-1]["drift_loss_0"] > 0.0


@torch.no_grad()
def test_saved_and_loaded_is_what_was_built_and_generates_with_a_cache(base, adapters, tmp_path):
    built = AutoModelForCausalLM.from_pretrained(base).eval()
    sha256 = read_base_sha256(base)
    install_experts(built, [read_adapter(a, sha256) for a in adapters.values()], True, 2)
    torch.manual_seed(0)
    for layer in moe_layers(built):
        torch.nn.init.normal_(layer.router.weight)
    save_fused(built, base, [*DOMAINS, "base"], SMOKE, tmp_path / "fused")
    loaded, _ = load_fused(tmp_path / "fused")
    torch.testing.assert_close(loaded(IDS).logits, built(IDS).logits, atol=0, rtol=0)
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    settings["attention_mask"] = torch.ones_like(IDS)
    cached = loaded.generate(IDS, use_cache=True, **settings)
    assert torch.equal(cached, loaded.generate(IDS, use_cache=False, **settings))
    moe_layers(loaded)[0].router.weight.data.mul_(-1)
    assert not torch.allclose(loaded(IDS).logits, built(IDS).logits, atol=1e-4)


def test_loading_refuses_another_base_and_damaged_files(fused, tmp_path):
    folder, _, _ = fused
    broken = shutil.copytree(folder, tmp_path / "fused")
    config = json.loads((broken / CONFIG_FILE).read_text())
    config["base"] = str((folder / config["base"]).resolve())
    (broken / CONFIG_FILE).write_text(json.dumps(config))
    weights = broken / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(H3FusionError, match=WEIGHTS_FILE):
        load_fused(broken)
    (broken / CONFIG_FILE).write_text(json.dumps(config | {"base_sha256": "1" * 64}))
    with pytest.raises(H3FusionError, match="fused on the base with sha256 111111"):
        load_fused(broken)
    with pytest.raises(H3FusionError, match="no such file"):
        load_fused(tmp_path)
