"""Pure functions from the files of a finished run to the tables and figures of the app."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import plotly.graph_objects as go

PROPERTIES = ("helpful", "harmless", "honest")
# Models that are not named here stand between the experts and the fused model.
FIRST_MODELS = ("base", *PROPERTIES)
LAST_MODELS = ("fused",)

# Okabe and Ito's palette, without the yellow that vanishes on white.
MODEL_COLOURS = {
    "base": "#808080",
    "helpful": "#E69F00",
    "harmless": "#009E73",
    "honest": "#0072B2",
    "fused": "#D55E00",
}
OTHER_COLOURS = ("#56B4E9", "#CC79A7", "#8C6BB1", "#A6761D", "#66A61E")
LIGHT_SCALE = ((0.0, "#EEF3F8"), (1.0, "#08519C"))
DARK_SCALE = ((0.0, "#26323E"), (1.0, "#9CCEF9"))
SYMBOLS = ("circle", "square", "diamond", "cross", "triangle-up", "x", "star", "pentagon")

METRIC_LABELS = {
    "hhh": "HHH mean",
    "win_rate": "Win rate",
    "harmless": "Harmless score",
    "mc2": "MC2",
    "unsafe_rate": "Unsafe rate",
    "over_refusal_rate": "Over-refusal rate",
    "mc1": "MC1",
    "generated_truth": "Generated truth",
    "reference_nll": "Reference NLL",
}
NATS_METRICS = ("reference_nll",)
COST_LABELS = {
    "parameters_total": "Parameters",
    "parameters_active": "Active parameters",
    "parameters_trainable": "Trainable parameters",
    "peak_memory_mb": "Peak memory, MB",
    "tokens_per_s": "Tokens per second",
    "train_s": "Training, s",
}
REQUIRED_TEXT = ("id", "model", "domain", "prompt", "answer")


class ReportError(Exception):
    """A report file that is missing or can't be used; the message is written for the reader."""


@dataclass(frozen=True)
class Verdict:
    """One judgement of one answer, short enough for a badge."""

    label: str
    tone: Literal["good", "bad", "neutral"]


# Reading


def read_metrics(path: Path) -> dict[str, Any]:
    """Reads `metrics.json`.

    Raises:
        ReportError: The file is missing, isn't JSON, or has no scores in it.
    """
    try:
        metrics = json.loads(_read_text(path))
    except ValueError as error:
        raise ReportError(f"`{path}` is not valid JSON: {error}") from error
    if not _section(metrics, "models"):
        raise ReportError(f'`{path}` has no scores: its "models" are missing or empty.')
    return metrics


def read_answers(path: Path) -> list[dict[str, Any]]:
    """Reads `answers.jsonl`, one row for each model and test prompt.

    Raises:
        ReportError: The file is missing or empty, or a line of it isn't an answer.
    """
    rows = []
    # Split at "\n" alone: str.splitlines would also cut at separators inside an answer.
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ReportError(f"`{path}`, line {number}, is not valid JSON: {error}") from error
        if not isinstance(row, dict):
            raise ReportError(f"`{path}`, line {number}, is not a JSON object.")
        for key in REQUIRED_TEXT:
            if not isinstance(row.get(key), str):
                raise ReportError(f'`{path}`, line {number}: "{key}" is missing or not text.')
        rows.append(row)
    if not rows:
        raise ReportError(f"`{path}` holds no answers.")
    return rows


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ReportError(f"`{path}` is missing.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"`{path}` can't be read: {error}") from error


def _section(parent: object, key: str) -> dict[str, Any]:
    """The object at `key`; empty where it is absent or something else."""
    value = parent.get(key) if isinstance(parent, dict) else None
    return value if isinstance(value, dict) else {}


def _number(value: object) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


# Models


def order_models(models: Iterable[str]) -> list[str]:
    """Base, the three experts, all others by name, fused; each once."""

    def rank(model: str) -> tuple[int, str]:
        if model in FIRST_MODELS:
            return FIRST_MODELS.index(model), ""
        if model in LAST_MODELS:
            return len(FIRST_MODELS) + 1 + LAST_MODELS.index(model), ""
        return len(FIRST_MODELS), model

    return sorted(set(models), key=rank)


def named_models(rows: Iterable[Mapping[str, Any]], metrics: Mapping[str, Any]) -> list[str]:
    """Every model and expert that the answers or the scores name, in order."""
    names = set(_section(metrics, "models"))
    for row in rows:
        names |= {row["model"], *routing_shares(row)}
    return order_models(names)


def model_colours(models: Iterable[str]) -> dict[str, str]:
    """A colour for each model, the same wherever the same set of models is shown."""
    colours = dict(MODEL_COLOURS)
    others = [model for model in order_models(models) if model not in colours]
    for i, model in enumerate(others):
        colours[model] = OTHER_COLOURS[i % len(OTHER_COLOURS)]
    return colours


# Answers


def prompts_table(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One line for each test prompt, by property and id: id, domain, prompt, harmful.

    `harmful` is None where the data does not say.
    """
    columns = ["id", "domain", "prompt", "harmful"]
    records = [{column: row.get(column) for column in columns} for row in rows]
    table = pd.DataFrame(records, columns=columns, dtype=object)
    table = table.drop_duplicates("id").sort_values("id", kind="stable")
    by_domain = {domain: i for i, domain in enumerate(_properties_first(table["domain"]))}
    return table.sort_values(
        "domain", key=lambda domains: domains.map(by_domain), kind="stable", ignore_index=True
    )


def filter_prompts(
    prompts: pd.DataFrame, text: str = "", domain: str | None = None, harmful: bool | None = None
) -> pd.DataFrame:
    """The prompts that match all that is given.

    Each word of `text` must stand somewhere in the prompt or its id, in any case.
    """
    keep = pd.Series(True, index=prompts.index)
    searched = (prompts["id"] + " " + prompts["prompt"]).str.casefold()
    for word in text.casefold().split():
        keep &= searched.str.contains(word, regex=False).astype(bool)
    if domain is not None:
        keep &= prompts["domain"] == domain
    if harmful is not None:
        keep &= pd.Series([h is harmful for h in prompts["harmful"]], index=prompts.index)
    return prompts[keep].reset_index(drop=True)


def answers_to(rows: Sequence[Mapping[str, Any]], prompt_id: str) -> dict[str, Mapping[str, Any]]:
    """The answer row of each model to one prompt, models in order."""
    by_model = {row["model"]: row for row in rows if row["id"] == prompt_id}
    return {model: by_model[model] for model in order_models(by_model)}


def verdicts(row: Mapping[str, Any]) -> list[Verdict]:
    """The judgements of one answer.

    To refuse is good on a harmful prompt and bad on any other. A value that is absent gives no
    verdict.
    """
    found = []
    refused = row.get("refused")
    if isinstance(refused, bool):
        label = "refused" if refused else "answered"
        if row["domain"] == "harmless" and isinstance(row.get("harmful"), bool):
            found.append(Verdict(label, "good" if refused == row["harmful"] else "bad"))
        else:
            found.append(Verdict(label, "bad" if refused else "neutral"))
    by_classifier = row.get("refused_by_classifier")
    if isinstance(by_classifier, bool) and by_classifier != refused:
        found.append(
            Verdict(f"classifier: {'refused' if by_classifier else 'answered'}", "neutral")
        )
    win = _number(row.get("win"))
    if win is not None and row["model"] != "base":
        if win == 0.5:
            found.append(Verdict("tie with base", "neutral"))
        else:
            found.append(
                Verdict("win over base", "good") if win else Verdict("loss to base", "bad")
            )
    rouge_l = _number(row.get("rouge_l"))
    if rouge_l is not None:
        found.append(Verdict(f"ROUGE-L {rouge_l:.2f}", "neutral"))
    mc1 = _number(row.get("mc1"))
    if mc1 is not None:
        found.append(Verdict("MC1 right", "good") if mc1 else Verdict("MC1 wrong", "bad"))
    mc2 = _number(row.get("mc2"))
    if mc2 is not None:
        found.append(Verdict(f"MC2 {mc2:.2f}", "neutral"))
    return found


def routing_shares(row: Mapping[str, Any]) -> dict[str, float]:
    """The mean routing weight of each expert over the prompt's tokens, largest first."""
    weights = {name: _number(weight) for name, weight in _section(row, "routing").items()}
    shares = {name: weight for name, weight in weights.items() if weight is not None and weight > 0}
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def texts(row: Mapping[str, Any], key: str) -> list[str]:
    """The list of texts at `key`; empty where it is absent or something else."""
    value = row.get(key)
    return [text for text in value if isinstance(text, str)] if isinstance(value, list) else []


# Scores


def scores_table(metrics: Mapping[str, Any]) -> pd.DataFrame:
    """One line for each model and metric that has a value, both in their order.

    Columns: model, metric, value, ci_low, ci_high, n, higher_is_better, judge. What a file leaves
    out is missing in the table.
    """
    records = []
    models = _section(metrics, "models")
    for model in order_models(models):
        for metric in models[model] if isinstance(models[model], dict) else {}:
            score = _section(models[model], metric)
            value = _number(score.get("value"))
            if value is None:
                continue
            ci_low, ci_high = _interval(score.get("ci95"))
            n, higher = _number(score.get("n")), score.get("higher_is_better")
            records.append(
                {
                    "model": model,
                    "metric": metric,
                    "value": value,
                    "ci_low": ci_low,
                    "ci_high": ci_high,
                    "n": None if n is None else round(n),
                    "higher_is_better": higher if isinstance(higher, bool) else None,
                    "judge": str(score.get("judge") or ""),
                }
            )
    columns = ["model", "metric", "value", "ci_low", "ci_high", "n", "higher_is_better", "judge"]
    table = pd.DataFrame(records, columns=columns)
    table["n"] = table["n"].astype("Int64")
    for column in ("value", "ci_low", "ci_high"):
        table[column] = table[column].astype(float)
    table["higher_is_better"] = table["higher_is_better"].astype(object)
    return table


def _interval(value: object) -> tuple[float | None, float | None]:
    if not isinstance(value, list) or len(value) != 2:
        return None, None
    return _number(value[0]), _number(value[1])


def metric_names(scores: pd.DataFrame) -> list[str]:
    """The metrics of a scores table: the known ones in their order, then all others by name."""
    present = set(scores["metric"])
    return [m for m in METRIC_LABELS if m in present] + sorted(present - set(METRIC_LABELS))


def metric_label(metric: str) -> str:
    """The name of a metric for a reader."""
    return METRIC_LABELS.get(metric, metric.replace("_", " "))


def metric_unit(metric: str) -> str:
    """The unit that the values of a metric have."""
    return "nats per token" if metric in NATS_METRICS else "0-100"


def direction_label(higher_is_better: object) -> str:
    """How to read a value: "higher is better", "lower is better", or nothing if unknown."""
    if not isinstance(higher_is_better, bool):
        return ""
    return "higher is better" if higher_is_better else "lower is better"


def metric_direction(scores: pd.DataFrame, metric: str) -> str:
    """The direction that the file gives for a metric; empty where it gives none."""
    labels = [
        direction_label(h) for h in scores.loc[scores["metric"] == metric, "higher_is_better"]
    ]
    return next((label for label in labels if label), "")


def overview_table(scores: pd.DataFrame) -> pd.DataFrame:
    """Models by metrics, the values alone; an arrow in the heading says which way is better."""
    arrows = {"higher is better": " ↑", "lower is better": " ↓", "": ""}
    wide = scores.pivot(index="model", columns="metric", values="value")
    wide = wide.loc[order_models(wide.index), metric_names(scores)]
    wide.columns = pd.Index(
        [metric_label(m) + arrows[metric_direction(scores, m)] for m in metric_names(scores)]
    )
    wide.index.name = "Model"
    return wide


def details_table(scores: pd.DataFrame) -> pd.DataFrame:
    """A scores table as a reader wants it: names, intervals as text, directions in words."""
    return pd.DataFrame(
        {
            "Model": scores["model"],
            "Metric": [metric_label(metric) for metric in scores["metric"]],
            "Value": scores["value"],
            "95 % interval": [
                interval_label(low, high)
                for low, high in zip(scores["ci_low"], scores["ci_high"], strict=True)
            ],
            "n": scores["n"],
            "Direction": [direction_label(higher) for higher in scores["higher_is_better"]],
            "Judge": scores["judge"],
        }
    )


def interval_label(low: float | None, high: float | None) -> str:
    """ "1.20 to 3.40", or nothing where an end is missing."""
    if low is None or high is None or pd.isna(low) or pd.isna(high):
        return ""
    return f"{low:.2f} to {high:.2f}"


def comparisons_table(metrics: Mapping[str, Any]) -> pd.DataFrame:
    """The paired comparisons of the run, one line each; empty if the run has none."""
    records = []
    for name, comparison in _section(metrics, "comparisons").items():
        if not isinstance(comparison, dict):
            continue
        low, high = _interval(comparison.get("ci95"))
        records.append(
            {
                "Comparison": name.replace("_", " "),
                "Other": str(comparison.get("other", "")),
                "Metric": metric_label(str(comparison.get("metric", ""))),
                "Difference": _number(comparison.get("difference")),
                "95 % interval": interval_label(low, high),
                "Relative, %": _number(comparison.get("relative_pct")),
                "p (Holm)": _number(comparison.get("p_value")),
                "n": _number(comparison.get("n")),
            }
        )
    return pd.DataFrame(records)


def cost_table(metrics: Mapping[str, Any]) -> pd.DataFrame:
    """What each model costs, one line each; empty if the run did not measure it."""
    cost = _section(metrics, "cost")
    records = [
        {"Model": model}
        | {label: _number(_section(cost, model).get(key)) for key, label in COST_LABELS.items()}
        for model in order_models(cost)
    ]
    return pd.DataFrame(records).dropna(axis="columns", how="all")


def routing_facts(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The single numbers of the routing section, by their reader's name."""
    labels = {
        "accuracy": "Accuracy",
        "entropy": "Entropy",
        "calibration_error": "Calibration error",
    }
    values = {label: _number(_section(metrics, "routing").get(k)) for k, label in labels.items()}
    return {label: value for label, value in values.items() if value is not None}


def confusion_table(metrics: Mapping[str, Any]) -> pd.DataFrame:
    """Share of each expert (columns) for the prompts of each domain (rows).

    Rows and columns have the same order, so that the properties lie on the diagonal.
    """
    confusion = _section(_section(metrics, "routing"), "confusion")
    shares = {
        domain: {expert: _number(share) for expert, share in _section(confusion, domain).items()}
        for domain in confusion
    }
    table = pd.DataFrame.from_dict(shares, orient="index", dtype=float)
    return table.loc[_properties_first(table.index), _properties_first(table.columns)]


def _properties_first(names: Iterable[str]) -> list[str]:
    names = set(names)
    return [p for p in PROPERTIES if p in names] + sorted(names - set(PROPERTIES))


def run_facts(metrics: Mapping[str, Any]) -> dict[str, str]:
    """What identifies the run, as text; long hashes are cut to 12 characters."""
    facts = {}
    for key, value in _section(metrics, "run").items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        is_hash = key.endswith("sha256") or key == "git_revision"
        facts[key.replace("_", " ")] = text[:12] if is_hash else text
    return facts


# Figures


def metric_figure(
    scores: pd.DataFrame, metric: str, colours: Mapping[str, str], dark: bool = False
) -> go.Figure:
    """Horizontal bars of one metric with its 95 % intervals, the first model at the top."""
    rows = scores[scores["metric"] == metric]
    details = details_table(rows)[["95 % interval", "n"]].astype(str)
    figure = go.Figure()
    for i, model in enumerate(rows["model"]):
        figure.add_bar(
            x=rows["value"].iloc[[i]],
            y=[escape(model)],
            orientation="h",
            marker_color=colours[model],
            error_x=_error_bars(rows.iloc[[i]], "#EEEEEE" if dark else "#222222"),
            customdata=details.iloc[[i]],
            hovertemplate="%{y}: %{x:.2f}<br>95 %: %{customdata[0]}<br>n = %{customdata[1]}"
            "<extra></extra>",
        )
    # The values stand behind the error bars, where nothing covers them.
    figure.add_scatter(
        x=rows[["value", "ci_high"]].max(axis=1).clip(lower=0),
        y=[escape(model) for model in rows["model"]],
        mode="text",
        text=[f"  {value:.2f}" for value in rows["value"]],
        textposition="middle right",
        hoverinfo="skip",
    )
    low = min(0.0, rows[["value", "ci_low"]].min(axis=None))
    high = max(0.0, rows[["value", "ci_high"]].max(axis=None))
    figure.update_xaxes(
        range=[low * 1.05, high + 0.2 * (high - low or 1)],
        title=" · ".join(filter(None, [metric_unit(metric), metric_direction(scores, metric)])),
    )
    figure.update_yaxes(autorange="reversed", ticksuffix=" ", type="category")
    return _finish(figure, height=90 + 38 * len(rows))


def safety_figure(scores: pd.DataFrame, colours: Mapping[str, str]) -> go.Figure | None:
    """Unsafe rate against over-refusal with both intervals; None if no model has both."""
    pair = {
        metric: scores[scores["metric"] == metric].set_index("model")
        for metric in ("over_refusal_rate", "unsafe_rate")
    }
    x, y = pair["over_refusal_rate"], pair["unsafe_rate"]
    models = order_models(set(x.index) & set(y.index))
    if not models:
        return None
    figure = go.Figure()
    for i, model in enumerate(models):
        figure.add_scatter(
            x=[x.at[model, "value"]],
            y=[y.at[model, "value"]],
            error_x=_error_bars(x.loc[[model]], colours[model]),
            error_y=_error_bars(y.loc[[model]], colours[model]),
            mode="markers",
            name=escape(model),
            marker={"color": colours[model], "symbol": SYMBOLS[i % len(SYMBOLS)], "size": 13},
            hovertemplate="over-refusal %{x:.1f} %<br>unsafe %{y:.1f} %",
        )
    figure.add_annotation(
        x=0, y=0, ax=34, ay=-34, text="better", arrowhead=2, arrowcolor="#808080", standoff=4
    )
    figure.update_xaxes(range=[-4, 104], title="Refuses benign prompts, %")
    figure.update_yaxes(range=[-4, 104], title="Answers unsafe prompts, %")
    figure.update_layout(legend={"orientation": "h", "y": -0.2, "yanchor": "top", "x": 0})
    return _finish(figure, height=460, legend=True)


def confusion_figure(confusion: pd.DataFrame, dark: bool = False) -> go.Figure:
    """A confusion table as a heat map with the share in each cell; 0 is close to the page."""
    figure = go.Figure()
    figure.add_heatmap(
        z=confusion,
        x=[escape(name) for name in confusion.columns],
        y=[escape(name) for name in confusion.index],
        zmin=0,
        zmax=1,
        colorscale=DARK_SCALE if dark else LIGHT_SCALE,
        showscale=False,
        xgap=2,
        ygap=2,
        texttemplate="%{z:.2f}",
        hovertemplate="%{y} prompts to %{x}: %{z:.3f}<extra></extra>",
    )
    figure.update_xaxes(title="Expert", showgrid=False, type="category")
    figure.update_yaxes(
        title="Prompts", autorange="reversed", showgrid=False, ticksuffix=" ", type="category"
    )
    return _finish(figure, height=130 + 60 * len(confusion))


def _error_bars(rows: pd.DataFrame, colour: str) -> dict[str, Any]:
    """Both arms of the 95 % intervals; an arm of length 0 where an interval is missing."""
    above, below = rows["ci_high"] - rows["value"], rows["value"] - rows["ci_low"]
    return {
        "type": "data",
        "array": above.fillna(0).clip(lower=0),
        "arrayminus": below.fillna(0).clip(lower=0),
        "color": colour,
        "thickness": 1.5,
        "width": 5,
    }


def _finish(figure: go.Figure, height: int, legend: bool = False) -> go.Figure:
    """Same margins everywhere; no dragging, which would catch a finger that scrolls the page."""
    figure.update_xaxes(tickfont_size=14, title_font_size=14)
    figure.update_yaxes(tickfont_size=14, title_font_size=14)
    return figure.update_layout(
        height=height,
        margin={"l": 10, "r": 10, "t": 10, "b": 10},
        dragmode=False,
        showlegend=legend,
        bargap=0.35,
        barmode="overlay",
        font_size=14,
    )
