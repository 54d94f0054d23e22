"""Every shipped profile is parsed, and a wrong key is named."""

import pytest
import torch
import yaml
from conftest import ROOT

from h3fusion_core.config import load_params, load_runtime
from h3fusion_core.io import H3FusionError

PROFILES = sorted((ROOT / "profiles").glob("*.yaml"))


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_profiles_are_whole(path):
    params = load_params(path)
    assert list(params.models) == ["base", "helpful", "harmless", "honest", "fused"]


def test_there_are_three_profiles():
    assert [path.stem for path in PROFILES] == ["default", "paper", "smoke"]


def test_the_paper_profile_is_the_papers():
    align = load_params(ROOT / "profiles/paper.yaml").align
    assert (align.lora.r, align.lora.alpha, align.lora.dropout) == (8, 4, 0.1)
    assert set(align.learning_rate.model_dump().values()) == {5e-4}
    assert (align.num_epochs, align.max_tokens) == (3, 300)


def changed(tmp_path, key, value):
    params = yaml.safe_load((ROOT / "profiles/default.yaml").read_text())
    *sections, last = key.split(".")
    section = params
    for name in sections:
        section = section[name]
    if value is None:
        del section[last]
    else:
        section[last] = value
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(params))
    return path


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("fuse.gatting_loss_weight", 1.0, "unknown key fuse.gatting_loss_weight"),
        ("fuse.top_k", None, "missing key fuse.top_k"),
        ("fuse.top_k", 5, "fuse.top_k is 5, but there are 4 experts"),
        ("fuse.top_k", "two", "fuse.top_k = 'two'"),
        ("align.learning_rate.honest", -1.0, "align.learning_rate.honest = -1.0"),
        ("data.validation_fraction", 1.0, "data.validation_fraction = 1.0"),
        ("fuse.drift_weights.kind", 1.0, "unknown key fuse.drift_weights.kind"),
        ("base.source", "ftp", "base"),
        ("models.base", None, "models.base is missing"),
        ("models.other", "x", None),
    ],
)
def test_a_wrong_key_is_named(tmp_path, key, value, message):
    path = changed(tmp_path, key, value)
    if message is None:
        assert "other" in load_params(path).models
        return
    with pytest.raises(H3FusionError) as error:
        load_params(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(H3FusionError, match="no such file"):
        load_params(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("a: [1")
    with pytest.raises(H3FusionError, match="not valid YAML"):
        load_params(tmp_path / "params.yaml")


def test_params_are_frozen():
    params = load_params(ROOT / "profiles/default.yaml")
    with pytest.raises(ValueError, match="frozen"):
        params.fuse.top_k = 1


def test_the_environment_changes_no_result(monkeypatch):
    monkeypatch.setenv("H3F_THREADS", "3")
    monkeypatch.setenv("H3F_SEED", "1")  # not a runtime setting: it has no effect
    load_runtime.cache_clear()
    assert load_runtime().torch_device() == "cpu"
    assert torch.get_num_threads() == 3
    torch.set_num_threads(1)
    assert set(type(load_runtime()).model_fields) == {"device", "threads", "cache_dir"}
    assert load_params(ROOT / "profiles/default.yaml").seed == 42
    monkeypatch.setenv("H3F_THREADS", "many")
    load_runtime.cache_clear()
    with pytest.raises(H3FusionError, match="threads = 'many'"):
        load_runtime()
    load_runtime.cache_clear()
