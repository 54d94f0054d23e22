"""The report that a person reads: a headline, a table, charts and answers side by side."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # a server has no display

import matplotlib.pyplot as plt

from h3fusion_core.config import DOMAINS
from h3fusion_core.io import atomic_path, read_json, report_errors, write_text

TABLE_METRICS = {
    "hhh": "hhh ↑",
    "win_rate": "win rate ↑",
    "harmless": "harmless ↑",
    "unsafe_rate": "unsafe ↓",
    "over_refusal_rate": "over-refusal ↓",
    "mc1": "MC1 ↑",
    "mc2": "MC2 ↑",
    "reference_nll": "reference nll ↓",
}
CHART_METRICS = {
    "hhh": "hhh",
    "win_rate": "win rate",
    "harmless": "harmless",
    "mc2": "MC2",
    "unsafe_rate": "unsafe (lower is better)",
    "over_refusal_rate": "over-refusal (lower is better)",
}
# Okabe and Ito's palette, which the colour-blind can tell apart
COLOURS = ("#999999", "#E69F00", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442")
README_MARKERS = ("<!-- scores -->\n", "<!-- /scores -->\n")
EXAMPLES_PER_DOMAIN = 5
ALPHA = 0.05  # of the corrected p-values


def table(scores: dict[str, Any]) -> str:
    """The scores as a markdown table, the best value of each column in bold."""
    columns = [m for m in TABLE_METRICS if any(m in score for score in scores.values())]
    best = {}
    for metric in columns:
        values = [score[metric]["value"] for score in scores.values() if metric in score]
        higher = next(s[metric]["higher_is_better"] for s in scores.values() if metric in s)
        best[metric] = max(values) if higher else min(values)
    lines = ["| model | " + " | ".join(TABLE_METRICS[m] for m in columns) + " |"]
    lines.append("|---|" + "---|" * len(columns))
    for model, score in scores.items():
        cells = []
        for metric in columns:
            if metric not in score:
                cells.append("-")
                continue
            value = score[metric]["value"]
            text = f"{value:.2f}" if metric == "reference_nll" else f"{value:.1f}"
            cells.append(f"**{text}**" if value == best[metric] else text)
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def headline(metrics: dict[str, Any]) -> str:
    """One sentence, made from the numbers: did fusing help, and is the difference shown?"""
    result = metrics["comparisons"].get("fused_vs_best_expert")
    if result is None:
        return "There is no fused model to compare."
    fused = metrics["models"]["fused"]["hhh"]["value"]
    low, high = result["ci95"]
    direction = "above" if result["difference"] > 0 else "below"
    if result["difference"] == 0:
        return f"The fused model's hhh is {fused:.1f}, the same as the best expert's."
    sentence = (
        f"The fused model's hhh is {fused:.1f}, {abs(result['difference']):.1f} points "
        f"({abs(result['relative_pct']):.1f} %) {direction} the best expert's "
        f"({result['other']}; 95 % interval of the paired difference {low:+.1f} to {high:+.1f}, "
        f"p = {result['p_value']:.2g} after Holm's correction, n = {result['n']})"
    )
    return sentence + (
        ": a difference is shown." if is_shown(result) else ": no difference is shown."
    )


def is_shown(result: dict[str, Any]) -> bool:
    """Whether a comparison shows a difference, all comparisons of the table considered."""
    return result["p_value"] < ALPHA


def draw_scores(scores: dict[str, Any], path: Path) -> None:
    """A bar chart of the main metrics by model, with 95 % intervals."""
    figure, axes = plt.subplots(2, 3, figsize=(11, 6.4), layout="constrained")
    models = list(scores)
    for axis, (metric, title) in zip(axes.flat, CHART_METRICS.items(), strict=True):
        present = [model for model in models if metric in scores[model]]
        values = [scores[model][metric]["value"] for model in present]
        intervals = [scores[model][metric]["ci95"] for model in present]
        errors = [
            [max(0.0, value - low) for value, (low, _) in zip(values, intervals, strict=True)],
            [max(0.0, high - value) for value, (_, high) in zip(values, intervals, strict=True)],
        ]
        colours = [COLOURS[models.index(model) % len(COLOURS)] for model in present]
        axis.bar(present, values, color=colours, yerr=errors, capsize=3, ecolor="#333333")
        n = scores[present[0]][metric]["n"] if present else 0
        axis.set_title(f"{title}, n = {n}", fontsize=11)
        axis.set_ylim(0, 100)
        axis.tick_params(axis="x", rotation=30)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Scores on the test split, 0-100, with 95 % bootstrap intervals")
    with atomic_path(path) as partial:
        figure.savefig(partial, dpi=130, format="png")
    plt.close(figure)


def draw_routing(by_layer: Sequence[dict[str, Any]], path: Path) -> None:
    """Each expert's share by layer, one panel for each group of prompts."""
    groups = list(dict.fromkeys(row["group"] for row in by_layer))
    experts = list(dict.fromkeys(row["expert"] for row in by_layer))
    figure, axes = plt.subplots(
        1, max(1, len(groups)), figsize=(13, 3.4), sharey=True, squeeze=False, layout="constrained"
    )
    axes = axes[0]
    order = ("base", *DOMAINS)
    for axis, group in zip(axes, groups, strict=bool(groups)):
        for expert in experts:
            rows = [r for r in by_layer if r["group"] == group and r["expert"] == expert]
            axis.plot(
                [row["layer"] for row in rows],
                [row["share"] for row in rows],
                color=COLOURS[order.index(expert)],
                label=expert,
                linewidth=2,
            )
        axis.set_title(f"{group} prompts", fontsize=11)
        axis.set_xlabel("layer")
        axis.set_ylim(0, 1)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("mean routing probability")
    if groups:
        axes[-1].legend(frameon=False, fontsize=9)
    with atomic_path(path) as partial:
        figure.savefig(partial, dpi=130, format="png")
    plt.close(figure)


def write_report(metrics: dict[str, Any], judged: Sequence[dict[str, Any]]) -> str:
    """The report in markdown; its numbers are those of `metrics.json`."""
    scores = metrics["models"]
    counts = {m: s["n"] for s in scores.values() for m, s in s.items()}
    lines = [
        "# H3Fusion: did fusing help?",
        "",
        headline(metrics),
        "",
        table(scores),
        "",
        "Greedy answers to the whole test split. All columns but the reference nll (nats a token) "
        "are 0-100; arrows point to the better direction; bold is the best of a column. "
        f"n: win rate {counts.get('win_rate')}, unsafe {counts.get('unsafe_rate')}, over-refusal "
        f"{counts.get('over_refusal_rate')}, MC1 and MC2 {counts.get('mc2')} prompts. hhh is the "
        "mean of win rate (against the base's answer, ties count half), harmless (the balanced "
        "mean of 1 - unsafe and 1 - over-refusal) and MC2.",
        "",
        "![scores](scores.png)",
        "",
        "## Comparisons",
        "",
        "Paired on the prompts; p by sign-flip tests with Holm's correction over the table.",
        "",
        "| comparison | metric | difference | 95 % interval | relative | p | n |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, result in metrics["comparisons"].items():
        low, high = result["ci95"]
        label = name.replace("_", " ")
        if name == "fused_vs_best_expert":
            label += f" ({result['other']})"
        lines.append(
            f"| {label} | {result['metric']} | {result['difference']:+.1f} "
            f"| {low:+.1f} to {high:+.1f} | {result['relative_pct']:+.1f} % "
            f"| {result['p_value']:.2g}{'' if is_shown(result) else ', no difference shown'} "
            f"| {result['n']} |"
        )
    lines += _routing_section(metrics) + _cost_section(metrics)
    agreement = metrics["judges"]["refusal_agreement"]
    lines += [
        "",
        "## Judges",
        "",
        "The unsafe and over-refusal rates above are judged by phrases; a classifier trained on "
        f"the train answers agrees with Cohen's kappa {agreement['kappa']:.2f} "
        f"(n = {agreement['n']} answers). An answer to a harmful prompt that does not refuse "
        "counts as unsafe, whether or not a small model's text would do harm.",
    ]
    lines += _examples_section(judged, list(scores))
    run = metrics["run"]
    lines += [
        "",
        "## Run",
        "",
        *(f"- {key}: `{value}`" for key, value in run.items()),
        "",
    ]
    return "\n".join(lines)


def _routing_section(metrics: dict[str, Any]) -> list[str]:
    routing = metrics.get("routing")
    if not routing:
        return []
    experts = list(next(iter(routing["confusion"].values())))
    lines = [
        "",
        "## Who is asked",
        "",
        "Share of the test prompts of each kind whose tokens, averaged over the layers, are "
        f"routed most to each expert (accuracy {routing['accuracy']:.2f}, mean over the kinds; "
        f"n = {routing['n']}; calibration error {routing['calibration_error']:.2f}).",
        "",
        "| prompts | " + " | ".join(experts) + " |",
        "|---|" + "---|" * len(experts),
    ]
    for group, shares in routing["confusion"].items():
        cells = " | ".join(f"{shares[expert]:.2f}" for expert in experts)
        lines.append(f"| {group} | {cells} |")
    return [*lines, "", "![routing by layer](routing.png)"]


def _cost_section(metrics: dict[str, Any]) -> list[str]:
    lines = [
        "",
        "## Cost",
        "",
        "| model | parameters, M | active, M | trained, M | peak memory, MB | tokens/s "
        "| training, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for model, cost in metrics["cost"].items():
        train_s = f"{cost['train_s']:.0f}" if "train_s" in cost else "-"
        lines.append(
            f"| {model} | {cost['parameters_total'] / 1e6:.2f} "
            f"| {cost['parameters_active'] / 1e6:.2f} "
            f"| {cost['parameters_trainable'] / 1e6:.2f} | {cost['peak_memory_mb']:.0f} "
            f"| {cost['tokens_per_s']:.0f} | {train_s} |"
        )
    return lines


def _examples_section(judged: Sequence[dict[str, Any]], models: list[str]) -> list[str]:
    """Side-by-side answers: the first prompts of each property, harmful and benign by turns."""
    lines = ["", "## Answers side by side"]
    for domain in DOMAINS:
        rows = [row for row in judged if row["domain"] == domain]
        by_prompt: dict[str, dict[str, dict[str, Any]]] = {}
        for row in rows:
            by_prompt.setdefault(row["id"], {})[row["model"]] = row
        ids = list(by_prompt)
        # evenly over the split, so that harmful and benign prompts both have their turn
        chosen = [ids[i * len(ids) // EXAMPLES_PER_DOMAIN] for i in range(EXAMPLES_PER_DOMAIN)]
        lines += ["", f"### {domain}"]
        for prompt_id in chosen:
            answers = by_prompt[prompt_id]
            first = answers[models[0]]
            lines += ["", f"**{_cell(first['prompt'])}**", "", "| | answer |", "|---|---|"]
            lines.append(f"| *reference* | {_cell(first['reference'])} |")
            lines += [f"| {model} | {_cell(answers[model]['answer'])} |" for model in models]
    return lines


def _cell(text: str) -> str:
    # model text in a table cell: no pipe, line break or markup of its own
    text = " ".join(text.split())
    for character in "\\|*_`<>#[]":
        text = text.replace(character, "\\" + character)
    return text


def update_readme(metrics: dict[str, Any], path: Path) -> None:
    """Put the table and the headline between the markers of a README."""
    text = path.read_text(encoding="utf-8")
    before, rest = text.split(README_MARKERS[0])
    _, after = rest.split(README_MARKERS[1])
    middle = f"\n{table(metrics['models'])}\n\n{headline(metrics)}\n"
    write_text(path, before + README_MARKERS[0] + middle + README_MARKERS[1] + after)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Print the table of the last run.")
    parser.add_argument("--readme", type=Path, help="also put it between a README's markers")
    readme = parser.parse_args().readme
    with report_errors():
        current = read_json(Path("reports/metrics.json"))
        print(f"\n{table(current['models'])}\n\n{headline(current)}\n")
        print("reports/report.md has the rest: comparisons, routing, cost, answers side by side.")
        if readme:
            update_readme(current, readme)
