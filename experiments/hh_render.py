"""The HH job's figures as text."""

from collections.abc import Sequence

DOMAINS = ("helpful", "harmless")
NUM_EXAMPLES = 8


def honesty(judges: dict[str, dict]) -> str:
    """Who the judge is and what that means."""
    known = ", ".join(f"{100 * judges[domain]['mean']:.0f} % {domain}" for domain in DOMAINS)
    return (
        f"judge = a reward model trained on other human comparisons (accuracy about {known}), not people; "
        "this shows style moving under human preference data, not helpfulness"
    )


def describe(counts: dict) -> str:
    """What was read and what was cut, in one line."""
    parts = ", ".join(f"{name} {counts[name]}" for name in counts if "_" in name and name.split("_")[0] in DOMAINS)
    return (
        f"{counts['pairs']} comparisons ({parts}); cut by the study's design: {counts['prompts_cut']} prompts on the "
        f"left, {counts['replies_cut']} of {counts['replies']} replies on the right; of {counts['identical_after_cut']} "
        "comparisons both replies then read alike: they train nothing"
    )


def render(report: dict, rows: Sequence[dict]) -> str:
    """`report.md`."""
    lines = [
        f"# Helpful against harmless: human comparisons (hh), seed {report['seed']}",
        "",
        f"**{report['win_rate']['judge']}.**",
        "",
        describe(report["data"]) + ".",
        "",
        *_criteria(report["criteria"]),
        "",
        *_policies(report),
        "",
        *_reward_models(report),
        "",
        *_openings(report),
        "",
        *_examples(rows),
        "",
        "Time: " + ", ".join(f"{name} {value:.0f} s" for name, value in report["seconds"].items()) + ".",
        "",
        "![curves](curves.png)",
        "",
    ]
    return "\n".join(lines)


def pooled(reports: Sequence[dict]) -> str:
    """The criteria of several runs, one column each."""
    seeds = [f"seed {report['seed']}" for report in reports]
    lines = ["| criterion | " + " | ".join(seeds) + " | all |", "|---|" + "---|" * (len(seeds) + 1)]
    for name in reports[0]["criteria"]:
        mine = [report["criteria"][name] for report in reports]
        cells = [f"{_verdict(x)}: {x['figures']}" + (f" ({x['missing']})" if x["missing"] else "") for x in mine]
        whole = "pass" if all(x["passed"] for x in mine) else "**FAIL**"
        lines.append(f"| ({name}) {mine[0]['text']} | " + " | ".join(cells) + f" | {whole} |")
    if len({report["seed"] for report in reports}) < 3:
        lines.append("\nFewer than three different seeds: the criteria ask for three.")
    return "\n".join(lines)


def _criteria(criteria: dict[str, dict]) -> list[str]:
    passed = sum(x["passed"] for x in criteria.values())
    return [
        f"Criteria, this seed: {passed} of {len(criteria)} pass.",
        "",
        "| | criterion | | figures | missing |",
        "|---|---|---|---|---|",
        *(f"| ({n}) | {x['text']} | {_verdict(x)} | {x['figures']} | {x['missing']} |" for n, x in criteria.items()),
    ]


def _policies(report: dict) -> list[str]:
    runs, null = report["runs"], report["controls"]["shuffled_labels"]
    lines = [
        "Policies on held-out prompts, 95 % intervals; `wX` is PPO towards X helpful + (1 - X) harmless, `ptx` and "
        "`kl_coef_1e3` have w = 0. NLL: held-out chosen replies, nats per token. Win rates against SFT, by each domain's "
        "judge, on replies of equal length. A run of act 3 ends with its last policy below the KL target. SFT and "
        "`kl_coef_1e3` are sampled with the same noise.",
        "",
        "| policy | marker rate, % | tokens | KL, nats | NLL | harmless win, % | helpful win, % |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, run in runs.items():
        wins = [_percent(run["win"][domain]) for domain in ("harmless", "helpful")]
        figures = [_percent(run["marker"]), _mean(run["tokens"], 1), _mean(run["kl"], 2), f"{run['nll']:.3f}"]
        lines.append(f"| {name} | " + " | ".join([*figures, *(["", ""] if name == "sft" else wins)]) + " |")
    bars = [f"{100 * null[domain]['win']['percentile_95']:.1f}" for domain in ("harmless", "helpful")]
    count = null["harmless"]["runs"]
    return [*lines, f"| 95th percentile of {count} shuffled-label runs | | | | | " + " | ".join(bars) + " |"]


def _reward_models(report: dict) -> list[str]:
    sizes = report["data"]
    lines = [
        "Reward models on held-out pairs of their own domain and on all pairs of the other one: accuracy, %. How much of "
        "it is length, the rows of the rule that reads nothing tell.",
        "",
        "| | helpful pairs | harmless pairs |",
        "|---|---|---|",
    ]
    labels = {
        "long": f"reads length: first {sizes['long_length']} tokens and the end",
        "prefer_longer": "no model: prefer the longer",
        "prefer_shorter": "no model: prefer the shorter",
        "long_fixed_length": f"first row's model, replies cut to {sizes['fixed_length']} tokens",
        "matched": "blind to length: the reward of act 3",
    }
    for name in DOMAINS:
        for kind, label in labels.items():
            cells = [_counted(report["reward_models"][name][d][kind]) for d in DOMAINS]
            lines.append(f"| {name}: {label} | " + " | ".join(cells) + " |")
    judges = ", ".join(f"{domain} {_percent(report['judges'][domain])}" for domain in DOMAINS)
    rates = "; ".join(
        f"{domain} {100 * rate['chosen']:.1f} chosen, {100 * rate['rejected']:.1f} rejected"
        for domain, rate in report["data_markers"].items()
    )
    return [
        *lines,
        "",
        f"Judges on held-out pairs of their domain: {judges}. Marker rate of people's uncut pairs, %: {rates}.",
    ]


def _openings(report: dict) -> list[str]:
    lines = ["Most frequent openings, % of replies:", ""]
    for name, run in report["runs"].items():
        if not name.startswith("shuffled"):
            lines.append(f"- {name}: " + ", ".join(f"“{words}” {100 * share:.1f}" for words, share in run["openings"]))
    return lines


def _examples(rows: Sequence[dict]) -> list[str]:
    """The same few held-out prompts, unedited and unselected: evenly spaced in the file's order."""
    first = {(row["run"], row["prompt_id"]): row for row in rows if row["kind"] == "reply" and row["sample"] == 0}
    prompts = list(dict.fromkeys(row["prompt_id"] for row in rows if row["kind"] == "reply"))
    shown = prompts[:: max(1, len(prompts) // NUM_EXAMPLES)][:NUM_EXAMPLES]
    lines = ["| held-out prompt | SFT | w = 0, harmless | w = 1, helpful |", "|---|---|---|---|"]
    for prompt in shown:
        cells = [first["sft", prompt]["prompt"], *(first[run, prompt]["text"] for run in ("sft", "w0", "w1"))]
        lines.append("| " + " | ".join(_cell(text) for text in cells) + " |")
    return lines


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split()) or "(empty)"


def _verdict(criterion: dict) -> str:
    return "pass" if criterion["passed"] else "FAIL"


def _percent(value: dict) -> str:
    return f"{100 * value['mean']:.1f} [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"


def _mean(value: dict, digits: int) -> str:
    return f"{value['mean']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"


def _counted(value: dict) -> str:
    return f"{_percent(value)}, n = {value['n']}"
