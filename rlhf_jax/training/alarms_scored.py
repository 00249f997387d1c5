"""Alarms over policies that were scored anew on held-out prompts: what training's own metrics cannot show.

Rows are those of `experiments/evaluate.py`, one a saved policy, the reference first and then in the order of training. A row
is a mean over many prompts, so one is enough to ring. Another axis on which a reward model is worse than chance (Bai et
al. 2022) is not seen here: `experiments/hh_tension.py` tabulates it.
"""

import math

from rlhf_jax.training.alarms import Alarm, Rows, alarm_line


def overoptimisation(
    rows: Rows,
    *,
    metric: str = "gold/score",
    error: str = "gold/score_se",
    scores: str = "objective/scores",
    z: float = 2.0,
) -> str | None:
    """The score rose on, the gold score fell: `z` standard errors below its best so far (Gao et al. 2022)."""
    known = [row for row in rows if {metric, error, scores} <= row.keys()]
    if not known:
        return None
    best, now = max(known, key=lambda row: row[metric]), known[-1]
    fall, noise = best[metric] - now[metric], math.hypot(best[error], now[error])
    if fall > z * noise and now[scores] > best[scores]:
        what = f"gold score {now[metric]:.3g}, {fall:.2g} below its best, while the score rose to {now[scores]:.3g}"
        cause = "over-optimisation: the reward model is wrong where the policy has gone"
        return alarm_line(what, cause, "stop earlier, an ensemble (worst_case, uncertainty_weighted), or more rankings")
    return None


def hollow_growth(
    rows: Rows,
    *,
    scores: str = "objective/scores",
    length: str = "response/len_mean",
    metric: str = "response/distinct_2",
    longer: float = 1.2,
    distinct: float = 0.8,
) -> str | None:
    """Scores and lengths up, different bigrams down, each against the first row."""
    known = [row for row in rows if {scores, length, metric} <= row.keys()]
    if not known:
        return None
    first, now = known[0], known[-1]
    grew = now[scores] > first[scores] and now[length] > longer * first[length]
    if grew and now[metric] < distinct * first[metric]:
        what = (
            f"score {first[scores]:.3g} to {now[scores]:.3g}, length {first[length]:.3g} to {now[length]:.3g} tokens, "
            f"distinct bigrams {first[metric]:.0%} to {now[metric]:.0%}"
        )
        fix = "take length out of the reward (fit_log_length, remove_length); a missing_eos_penalty"
        return alarm_line(what, "the reward pays for length or repetition", fix)
    return None


def memorised_rankings(
    rows: Rows, *, metric: str = "rm/accuracy", held_out: str = "rm/held_out_accuracy", gap: float = 0.2
) -> str | None:
    """The reward model orders its training pairs far better than others."""
    known = [row for row in rows if {metric, held_out} <= row.keys()]
    if known and known[-1][metric] - known[-1][held_out] > gap:
        what = f"reward model right on {known[-1][metric]:.0%} in training, {known[-1][held_out]:.0%} held out"
        cause = "several epochs, or pairs of one prompt on both sides of the split"
        return alarm_line(what, cause, "one epoch; split_by_prompt")
    return None


SCORED_ALARMS: tuple[Alarm, ...] = (overoptimisation, hollow_growth, memorised_rankings)
