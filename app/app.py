"""The answers and the scores of a finished run, in the browser: `streamlit run app/app.py`."""

import os
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import streamlit as st
import tables

T = TypeVar("T")

PROJECT = Path(__file__).resolve().parents[1]
TONE_BADGES = {
    "good": ("green", ":material/check:"),
    "bad": ("red", ":material/close:"),
    "neutral": ("gray", ""),
}
CARDS_IN_ROW = 3
CHART = {"displayModeBar": False, "scrollZoom": False}


def reports_folder() -> Path:
    """`H3F_REPORTS`, or `reports`; a relative path starts at the project's folder."""
    return PROJECT / os.environ.get("H3F_REPORTS", "reports")


@st.cache_data(show_spinner=False, max_entries=4)
def load_metrics(path: Path, written_ns: int) -> dict[str, Any]:
    """The scores; read again when the file is written anew."""
    return tables.read_metrics(path)


@st.cache_data(show_spinner=False, max_entries=4)
def load_answers(path: Path, written_ns: int) -> list[dict[str, Any]]:
    """The answers; read again when the file is written anew."""
    return tables.read_answers(path)


def try_load(load: Callable[[Path, int], T], path: Path) -> T | tables.ReportError:
    """What `load` reads, or why it can't."""
    try:
        written_ns = path.stat().st_mtime_ns
    except OSError:
        # Reading it fails too, with the reason.
        written_ns = 0
    try:
        return load(path, written_ns)
    except tables.ReportError as error:
        return error


def page_is_dark() -> bool:
    """Whether the reader's page is dark; what a figure draws in colours of its own needs it."""
    return st.context.theme.type == "dark"


def show_problem(error: tables.ReportError) -> None:
    """One message: what is wrong with which file, and what makes it."""
    st.error(f"{error}\n\n`make run` (or `dvc repro`) makes it.", icon=":material/folder_off:")


def text_block(text: str, small: bool = False) -> None:
    """A text as it is: never read as Markdown or HTML, long words broken."""
    style = "white-space: pre-wrap; overflow-wrap: anywhere"
    if small:
        style += "; font-size: 0.875em; opacity: 0.75"
    st.html(f'<div style="{style}">{escape(text)}</div>')


def badges(verdicts: Sequence[tables.Verdict]) -> None:
    """The verdicts of one answer in a line that wraps."""
    parts = []
    for verdict in verdicts:
        colour, icon = TONE_BADGES[verdict.tone]
        parts.append(f":{colour}-badge[{icon} {verdict.label}]")
    st.markdown(" ".join(parts))


def card_title(title: str, colour: str) -> None:
    """The name of a card under a rule in the model's colour."""
    st.html(
        f'<div style="border-top: 4px solid {colour}; padding-top: 0.5rem; font-weight: 600;'
        f' overflow-wrap: anywhere">{escape(title)}</div>'
    )


def routing_bar(shares: Mapping[str, float], colours: Mapping[str, str]) -> None:
    """Which experts read the prompt, as a thin bar and in words."""
    parts = "".join(
        f'<div style="flex: {share}; background: {colours[expert]}"></div>'
        for expert, share in shares.items()
    )
    words = " · ".join(f"{expert} {share:.0%}" for expert, share in shares.items())
    st.html(
        f'<div style="display: flex; gap: 2px; height: 6px; margin-top: 0.5rem">{parts}</div>'
        '<div style="font-size: 0.875em; opacity: 0.75; margin-top: 0.35rem">'
        f"Routed to {escape(words)}</div>"
    )


def answer_card(row: Mapping[str, Any], colours: Mapping[str, str]) -> None:
    """One model's answer to the chosen prompt."""
    card_title(row["model"], colours[row["model"]])
    badges(tables.verdicts(row))
    if row["answer"].strip():
        text_block(row["answer"])
    else:
        st.caption("The answer is empty.")
    shares = tables.routing_shares(row)
    if shares:
        routing_bar(shares, colours)
    if isinstance(row.get("answer_tokens"), int):
        text_block(f"{row['answer_tokens']} tokens", small=True)


def reference_card(row: Mapping[str, Any]) -> None:
    """What a good answer looks like, with the true and false answers where there are any."""
    card_title("Reference answer", "currentColor")
    reference = row.get("reference")
    if isinstance(reference, str) and reference.strip():
        text_block(reference)
    else:
        st.caption("The data has none for this prompt.")
    for title, key in (("True", "correct_answers"), ("False", "incorrect_answers")):
        answers = tables.texts(row, key)
        if answers:
            with st.expander(f"{title} answers ({len(answers)})"):
                text_block("\n".join(f"• {answer}" for answer in answers))


def choose_prompt(prompts: pd.DataFrame) -> str | None:
    """The id of the prompt that the reader picks; None if the filters leave none."""
    search, which = st.columns([2, 3])
    text = search.text_input("Search the prompts", placeholder="Words or an id")
    with which.container(horizontal=True):
        domain = st.segmented_control(
            "Property", ["all", *tables.PROPERTIES], default="all", required=True
        )
        harmful = None
        if domain == "harmless":
            kind = st.segmented_control(
                "Kind", ["all", "harmful", "benign"], default="all", required=True
            )
            harmful = {"all": None, "harmful": True, "benign": False}[kind]
    found = tables.filter_prompts(prompts, text, None if domain == "all" else domain, harmful)
    if found.empty:
        st.info("No test prompt matches. Try fewer words or another property.")
        return None
    labels = dict(zip(found["id"], found["prompt"], strict=True))
    return st.selectbox(
        f"Prompt ({len(found)} of {len(prompts)})",
        list(labels),
        format_func=lambda prompt_id: f"{' '.join(labels[prompt_id].split())[:100]} · {prompt_id}",
    )


def show_prompt(row: Mapping[str, Any]) -> None:
    """The chosen prompt in full, with what the data says about it."""
    facts = [row["domain"]]
    if isinstance(row.get("harmful"), bool):
        facts.append("harmful" if row["harmful"] else "benign")
    if isinstance(row.get("category"), str):
        facts.append(row["category"])
    with st.container(border=True):
        text_block(" · ".join([*facts, row["id"]]), small=True)
        text_block(row["prompt"])


def compare_tab(rows: list[dict[str, Any]], colours: Mapping[str, str]) -> None:
    """Pick a prompt; see what each model answers."""
    prompt_id = choose_prompt(tables.prompts_table(rows))
    if prompt_id is None:
        return
    answers = tables.answers_to(rows, prompt_id)
    all_models = tables.order_models(row["model"] for row in rows)
    usual = [m for m in all_models if m in tables.FIRST_MODELS + tables.LAST_MODELS]
    chosen = st.multiselect("Models", all_models, default=usual or all_models)
    first = next(iter(answers.values()))
    show_prompt(first)
    cards = [model for model in tables.order_models(chosen) if model in answers]
    absent = [model for model in chosen if model not in answers]
    if absent:
        text_block(f"No answer to this prompt from {', '.join(absent)}.", small=True)
    # One place more than there are models: the reference stands last.
    for start in range(0, len(cards) + 1, CARDS_IN_ROW):
        columns = st.columns(CARDS_IN_ROW)
        for i, column in enumerate(columns, start=start):
            if i < len(cards):
                with column.container(border=True, height="stretch", gap="xsmall"):
                    answer_card(answers[cards[i]], colours)
            elif i == len(cards):
                with column.container(border=True, height="stretch", gap="xsmall"):
                    reference_card(first)


def scores_tab(metrics: Mapping[str, Any], colours: Mapping[str, str]) -> None:
    """What the run measured."""
    scores = tables.scores_table(metrics)
    if scores.empty:
        st.info("The run has no scores yet.")
    else:
        st.subheader("All models")
        st.caption("↑ higher is better, ↓ lower is better. Intervals and judges are below.")
        show_table(tables.overview_table(scores).reset_index())
        show_metric(scores, colours)
    show_comparisons(metrics)
    left, right = st.columns(2, gap="medium")
    with left:
        show_safety(scores, colours)
    with right:
        show_routing(metrics)
    show_cost(metrics)
    show_run(metrics)


def show_table(table: pd.DataFrame, formats: Mapping[str, str] | None = None) -> None:
    """A table whose first column stays in sight on a narrow screen.

    Numbers have two decimals where `formats` says nothing else.
    """
    config: dict[str, Any] = {
        name: st.column_config.NumberColumn(format=(formats or {}).get(name, "%.2f"))
        for name in table.select_dtypes("float")
    }
    config[table.columns[0]] = st.column_config.Column(pinned=True)
    st.dataframe(table, hide_index=True, column_config=config, placeholder="-")


def show_metric(scores: pd.DataFrame, colours: Mapping[str, str]) -> None:
    """One metric as bars, and every score with its interval, n and judge."""
    st.subheader("One metric")
    metric = st.selectbox(
        "Metric", tables.metric_names(scores), format_func=tables.metric_label, width=320
    )
    st.plotly_chart(
        tables.metric_figure(scores, metric, colours, page_is_dark()),
        config=CHART,
        alt=f"{tables.metric_label(metric)} of each model with 95 % intervals",
    )
    shown = scores[scores["metric"] == metric]
    if st.toggle("Show every metric in the table"):
        shown = scores
    show_table(tables.details_table(shown))


def show_safety(scores: pd.DataFrame, colours: Mapping[str, str]) -> None:
    """Harm beside over-refusal: a model that refuses everything is not harmless."""
    figure = tables.safety_figure(scores, colours)
    if figure is not None:
        st.subheader("Unsafe answers against over-refusal")
        st.caption("The best model is at the lower left. Bars are 95 % intervals.")
        st.plotly_chart(figure, config=CHART, alt="Unsafe rate against over-refusal rate")


def show_comparisons(metrics: Mapping[str, Any]) -> None:
    """The paired comparisons."""
    comparisons = tables.comparisons_table(metrics)
    if not comparisons.empty:
        st.subheader("Paired comparisons")
        st.caption("Difference in points on the same prompts; p is corrected by Holm's method.")
        show_table(
            comparisons,
            {"Difference": "%+.2f", "Relative, %": "%+.2f", "p (Holm)": "%.4f", "n": "%d"},
        )


def show_routing(metrics: Mapping[str, Any]) -> None:
    """Where the router sends the held-out prompts of each property."""
    confusion = tables.confusion_table(metrics)
    if confusion.empty:
        return
    st.subheader("Routing")
    st.caption("Share of each expert on held-out prompts; each row is one kind of prompt.")
    facts = tables.routing_facts(metrics)
    text_block(" · ".join(f"{label} {value:.3f}" for label, value in facts.items()))
    st.plotly_chart(
        tables.confusion_figure(confusion, page_is_dark()),
        config=CHART,
        alt="Routing confusion matrix",
    )


def show_cost(metrics: Mapping[str, Any]) -> None:
    """What each model costs to hold, to train and to run."""
    cost = tables.cost_table(metrics)
    if not cost.empty:
        st.subheader("Cost")
        show_table(cost, {name: "compact" for name in cost.columns if "arameters" in name})


def show_run(metrics: Mapping[str, Any]) -> None:
    """Which run the scores are of."""
    facts = tables.run_facts(metrics)
    if facts:
        with st.expander("The run"):
            text_block("\n".join(f"{name}: {value}" for name, value in facts.items()))


def main() -> None:
    """The page."""
    st.set_page_config(page_title="H3Fusion", layout="wide")
    # The page has no toolbar that the default space at its top would be for.
    st.html("<style>[data-testid=stMainBlockContainer] {padding-top: 3rem}</style>")
    st.title("H3Fusion")
    st.caption(
        "Three aligned experts (helpful, harmless, honest) of one base model, and their fusion."
    )
    folder = reports_folder()
    metrics_path, answers_path = folder / "metrics.json", folder / "answers.jsonl"
    rows = try_load(load_answers, answers_path)
    metrics = try_load(load_metrics, metrics_path)
    # Both files count, so that a model has the same colour in both tabs.
    models = tables.named_models(
        [] if isinstance(rows, tables.ReportError) else rows,
        {} if isinstance(metrics, tables.ReportError) else metrics,
    )
    colours = tables.model_colours(models)
    compare, scores = st.tabs(["Compare", "Scores"])
    with compare:
        if isinstance(rows, tables.ReportError):
            show_problem(rows)
        else:
            compare_tab(rows, colours)
    with scores:
        if isinstance(metrics, tables.ReportError):
            show_problem(metrics)
        else:
            scores_tab(metrics, colours)


main()
