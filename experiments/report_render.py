"""The figures of the embedded world's run as text."""

from collections.abc import Sequence

from rlhf_jax.data import synthetic

TRAITS = {
    "right": "gives the right answer",
    "direct": "without boilerplate",
    "warm": "warm words",
    "declines": "declines when it should",
    "well_formed": "in the grammar",
}


def _no_gain(control: dict) -> str:
    low, high = control["win_rate"]["low"], control["win_rate"]["high"]
    return f"It must gain nothing: the interval {'includes' if low <= 0.5 <= high else 'EXCLUDES'} 50 %."


def _no_drift(control: dict) -> str:
    return f"It must not move: KL {'below' if control['kl'] < 0.05 else 'NOT below'} 0.05."


CONTROLS = {"shuffled_labels": _no_gain, "kl_coef_1e3": _no_drift}


def render(report: dict, rows: Sequence[dict]) -> str:
    """`report.md`."""
    win, model = report["win_rate"], report["reward_model"]
    lines = [
        f"# Three acts: {report['dataset']}, seed {report['seed']}",
        "",
        f"The judge prefers PPO to SFT on **{_percent(win)} %** of {win['n']} held-out prompts (ties count one half).",
        f"Judge: {report['win_rate']['judge']}.",
        "",
        "| | SFT | PPO |",
        "|---|---|---|",
        *(
            f"| {label}, % | {_percent(report['traits'][name]['before'])} | {_percent(report['traits'][name]['after'])} |"
            for name, label in TRAITS.items()
        ),
        f"| true utility | {report['gold_utility']['before']:.2f} | {report['gold_utility']['after']:.2f} |",
        f"| reward-model score (SFT mean 0, std 1) | {report['score']['before']:.2f} | {report['score']['after']:.2f} |",
        f"| length, tokens | {report['length']['before']:.1f} | {report['length']['after']:.1f} |",
        f"| KL from SFT, nats per completion (target {report['kl_target']}) | 0 | {report['kl']:.2f} |",
        f"| held-out loss, nats per token | {report['nll']['before']:.3f} | {report['nll']['after']:.3f} |",
        "",
        f"Reward model: accuracy {_percent({**model, 'mean': model['accuracy']})} % on the rankings of {model['n']} held-out "
        f"prompts. Annotator noise allows {100 * model['ceiling']:.1f} %; two annotators agree on "
        f"{100 * model['annotator_agreement']:.1f} %.",
        "",
    ]
    for name, control in report["controls"].items():
        lines.append(
            f"Control `{name}`, {len(control['runs'])} run(s): win rate {_percent(control['win_rate'])} %, "
            f"KL {control['kl']:.3f}. {CONTROLS[name](control)}"
        )
    lines += ["", "| held-out prompt | SFT | PPO |", "|---|---|---|"]
    for row in examples(rows):
        cells = (row["prompt"], row["before"]["text"], row["after"]["text"])
        lines.append("| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |")
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in report["seconds"].items())
    return "\n".join([*lines, "", f"Time: {seconds}.", "", "![curves](curves.png)", ""])


def examples(rows: Sequence[dict], count: int = 8) -> list[dict]:
    """The first held-out prompts of each kind, unedited and unselected."""
    by_kind: dict[str, list[dict]] = {}
    for row in rows:
        if row["kind"] == "comparison":
            by_kind.setdefault(synthetic.question_of(row["prompt"]).kind, []).append(row)
    each = -(-count // len(by_kind))
    return [row for kind in sorted(by_kind) for row in by_kind[kind][:each]][:count]


def _percent(value: dict) -> str:
    return f"{100 * value['mean']:.1f} [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"
