"""The configuration: `params.yaml` for what changes results, `H3F_*` for what does not."""

import hashlib
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from h3fusion_core.io import H3FusionError


class Domain(StrEnum):
    """The three properties, in the one order that is used everywhere."""

    HELPFUL = "helpful"
    HARMLESS = "harmless"
    HONEST = "honest"


DOMAINS = tuple(Domain)
BASE_EXPERT = "base"

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A frozen part of `params.yaml`; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class BaseSection(Section):
    """`system_prompt`, where given, stands in the saved chat template in place of its own."""

    system_prompt: str | None = None


class WheelBase(BaseSection):
    """A GGUF checkpoint inside a wheel of the package index."""

    source: Literal["wheel"]
    requirement: str
    sha256: str
    member: str
    member_sha256: str


class HubBase(BaseSection):
    """A model of the hub; `revision` pins it."""

    source: Literal["hub"]
    repo_id: str
    revision: str = "main"


class FolderBase(BaseSection):
    """A local folder as `save_pretrained` writes it."""

    source: Literal["folder"]
    path: Path


class PicoBase(BaseSection):
    """A randomly initialised Llama with a byte tokenizer, for tests."""

    source: Literal["pico"]
    hidden_size: Count
    intermediate_size: Count
    num_layers: Count
    num_heads: Count


class FileData(Section):
    """A local file: .jsonl, .json or .csv."""

    source: Literal["file"]
    path: Path
    preset: str = "native"
    part: tuple[Fraction, Fraction] = (0.0, 1.0)  # of the rows, in file order


class HubData(Section):
    """A dataset of the hub, with the arguments of `datasets.load_dataset`."""

    source: Literal["hub"]
    path: str
    name: str | None = None
    data_files: str | None = None
    split: str
    revision: str | None = None
    preset: str = "native"
    part: tuple[Fraction, Fraction] = (0.0, 1.0)


DataSource = Annotated[FileData | HubData, Field(discriminator="source")]


class DomainData(Section):
    """Where one property's rows come from; `max_rows` caps the train rows (seeded sample)."""

    train: tuple[DataSource, ...] = Field(min_length=1)
    test: tuple[DataSource, ...] = Field(min_length=1)
    max_rows: Count | None = None


class Data(Section):
    validation_fraction: Annotated[float, Field(gt=0, lt=1)]  # of the train rows
    helpful: DomainData
    harmless: DomainData
    honest: DomainData


class Validate(Section):
    max_prompt_words: Count
    max_response_words: Count
    min_rows: Count
    min_class_fraction: Fraction  # share of the rarer class of `harmful`


class Lora(Section):
    r: Count
    alpha: Count
    dropout: Fraction
    use_rslora: bool


class LearningRates(Section):
    helpful: Positive
    harmless: Positive
    honest: Positive


class Align(Section):
    lora: Lora
    odds_ratio_weight: NonNegative  # of wrong answers, where a record has them; 0: not used
    learning_rate: LearningRates
    num_epochs: Count
    batch_size: Count
    max_tokens: Count
    warmup_fraction: Fraction
    save_steps: Count


class DriftWeights(Section):
    """The paper's gamma, for each expert."""

    helpful: NonNegative
    harmless: NonNegative
    honest: NonNegative


class GroupWeights(Section):
    """How often each group's rows are drawn in a training epoch, against 1."""

    helpful: NonNegative
    harmless: NonNegative
    honest: NonNegative
    benign: NonNegative


class Fuse(Section):
    top_k: Count
    base_expert: bool  # the base itself as a further expert, for benign borderline prompts
    router_init: Literal["closed_form", "random"]
    ridge_lambdas: tuple[Positive, ...] = Field(min_length=1)  # relative to the mean variance
    holdout_fraction: Annotated[float, Field(gt=0, lt=1)]  # of train prompts, for the temperature
    train_experts: bool
    max_steps: Annotated[int, Field(ge=0)]
    batch_size: Count
    router_learning_rate: Positive
    expert_learning_rate: Positive
    gating_loss_weight: NonNegative  # the paper's lambda
    drift_weights: DriftWeights
    group_weights: GroupWeights
    save_steps: Count


class Generate(Section):
    batch_size: Count
    max_new_tokens: Count


class Score(Section):
    bootstrap_samples: Count


class Params(Section):
    """The whole of `params.yaml`."""

    seed: int
    base: Annotated[WheelBase | HubBase | FolderBase | PicoBase, Field(discriminator="source")]
    dtype: Literal["float32", "bfloat16", "float16"]
    data: Data
    validate_: Validate = Field(alias="validate")
    align: Align
    fuse: Fuse
    models: dict[str, Path]  # what is compared: name -> folder of a model or adapter
    generate: Generate
    score: Score

    def sha256(self) -> str:
        """Hex SHA-256 of the values, whatever the file's comments and order."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    @model_validator(mode="after")
    def _check_across_sections(self) -> "Params":
        experts = len(DOMAINS) + self.fuse.base_expert
        if self.fuse.top_k > experts:
            raise ValueError(f"fuse.top_k is {self.fuse.top_k}, but there are {experts} experts")
        if BASE_EXPERT not in self.models:
            raise ValueError("models.base is missing: every score is relative to the base")
        return self


class Runtime(BaseSettings):
    """What may differ between machines and changes no result: `H3F_DEVICE`, `H3F_THREADS`, ..."""

    model_config = SettingsConfigDict(env_prefix="H3F_", frozen=True)

    # "auto" takes a GPU where there is one
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?|mps)$")] = "auto"
    threads: Annotated[int, Field(ge=0)] = 0  # 0: torch decides
    cache_dir: Path = Path.home() / ".cache" / "h3fusion"

    def torch_device(self) -> str:
        """The device by its torch name; also tells torch how many threads it may use."""
        import torch  # the app and the tests of the configuration need none

        if self.threads:
            torch.set_num_threads(self.threads)
        if self.device != "auto":
            return self.device
        return "cuda" if torch.cuda.is_available() else "cpu"


def load_params(path: Path = Path("params.yaml")) -> Params:
    """Read and check `params.yaml`.

    Raises:
        H3FusionError: The file is missing or not YAML, or a key is unknown, missing or wrong;
            the message names each key with its value.
    """
    if not path.is_file():
        raise H3FusionError(f"{path}: no such file; `make profile PROFILE=default` writes one")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise H3FusionError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        raise H3FusionError(f"{path}: {describe_errors(error)}") from error


@cache
def load_runtime() -> Runtime:
    """Read the `H3F_*` environment variables."""
    try:
        return Runtime()
    except ValidationError as error:
        raise H3FusionError(f"environment variables H3F_*: {describe_errors(error)}") from error


def describe_errors(error: ValidationError) -> str:
    """One line from pydantic's errors: key, problem and value of each."""
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"]) or "(top level)"
        match item["type"]:
            case "extra_forbidden":
                lines.append(f"unknown key {key}")
            case "missing":
                lines.append(f"missing key {key}")
            case "value_error":
                lines.append(str(item["ctx"]["error"]))
            case _:
                lines.append(f"{key} = {_shorten(item['input'])}: {item['msg']}")
    return "; ".join(lines)


def _shorten(value: Any, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."
