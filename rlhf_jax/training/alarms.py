"""Alarms: what a run that goes wrong looks like in its metrics, as pure functions of the rows so far.

Every alarm takes the rows of one stage (as `MetricLog` writes them, oldest first), looks at the newest ones and returns one
line that names the likely cause and what to do, or None. A row without the alarm's metric is left out, so an alarm over a
metric that nobody logs is never heard. It asks for several rows in a row, because one bad batch is no trend.

    for line in alarms(history):                      # while a run goes on
        print(line)
    for row, line in first_alarms(history): ...       # of a finished run: where each rang first

This file holds the alarms of training; `alarms_scored.py` those over policies that were scored anew (gold, diversity).
Thresholds are arguments, by `functools.partial`; where the docstring names no source they are ours, tried on the runs of
`experiments/` (batches of 192 completions of about 10 tokens).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

Rows = Sequence[Mapping[str, float]]
Alarm = Callable[[Rows], str | None]


def kl_explosion(rows: Rows, *, metric: str = "objective/kl", limit: float = 30.0, patience: int = 2) -> str | None:
    """The policy has left the reference: `limit` nats per completion in each of the last `patience` rows.

    The default is five times the target of 6 nats of lm-human-preferences' controller; longer completions carry more KL, so
    scale the limit with them.
    """
    values = newest(rows, metric, patience)
    if values and min(values) > limit:
        what = f"KL {values[-1]:.3g} > {limit:g} nats for {patience} steps"
        return alarm_line(what, "the leash is too weak for these rewards", "raise kl_coef or lower the learning rate")
    return None


def entropy_collapse(
    rows: Rows, *, metric: str = "policy/entropy_avg", fraction: float = 0.1, floor: float = 0.02, patience: int = 3
) -> str | None:
    """The policy says one thing: its entropy per token is below `fraction` of the first row's, or below `floor` nats."""
    values = newest(rows, metric, patience)
    if not values:
        return None
    first = _first(rows, metric)
    limit = max(fraction * first, floor)
    if max(values) < limit:
        what = f"entropy {values[-1]:.3g} < {limit:.3g} nats per token for {patience} steps (first {first:.3g})"
        cause = "learning rate too high, no leash, or rewards of huge spread"
        return alarm_line(what, cause, "raise kl_coef, lower the learning rate, add an entropy bonus or PPO-ptx")
    return None


def equal_rewards(
    rows: Rows, *, metric: str = "objective/scores_std", limit: float = 1e-6, patience: int = 3
) -> str | None:
    """All completions score the same, so that nothing tells good from bad: standard deviation within a batch."""
    values = newest(rows, metric, patience)
    if values and max(values) <= limit:
        what = f"all rewards equal for {patience} steps (standard deviation {values[-1]:.3g})"
        return alarm_line(what, "the reward is a constant", "look at the reward function")
    return None


def runaway_length(
    rows: Rows,
    *,
    metric: str = "response/len_mean",
    ended: str = "response/eos_frac",
    factor: float = 1.5,
    ended_below: float = 0.5,
    patience: int = 3,
) -> str | None:
    """Completions grow until they are cut off: `factor` times the first row's length, and fewer than `ended_below` of them end.

    Both, because a longer answer may be the better one, and because a job that cuts every answer at a fixed length has
    `ended` at 0 from the start.
    """
    lengths, ends = newest(rows, metric, patience), newest(rows, ended, patience)
    if not lengths or not ends:
        return None
    first = _first(rows, metric)
    if min(lengths) > factor * first and max(ends) < ended_below:
        what = f"length {lengths[-1]:.3g} tokens, {factor:g} times the first {first:.3g}, and {ends[-1]:.0%} end"
        fix = "penalise completions without an end, or subtract length from the reward"
        return alarm_line(what, "the reward pays for length", fix)
    return None


def sampling_differs(
    rows: Rows, *, metric: str = "policy/first_approxkl", limit: float = 1e-5, patience: int = 2
) -> str | None:
    """Before its first update a policy must be the one that sampled; the limit is for float32."""
    values = newest(rows, metric, patience)
    if values and min(values) > limit:
        what = f"the policy differs from its sampler before any update ({metric} {values[-1]:.3g} > {limit:g})"
        cause = "another temperature, dropout, positions, or numerics in sampling than in training"
        return alarm_line(what, cause, "one forward, one temperature, one dtype; in bfloat16 a higher limit")
    return None


def negative_kl(rows: Rows, *, metric: str = "objective/kl", limit: float = -0.2, patience: int = 3) -> str | None:
    """No KL is negative; a mean of k1 is, a little: 64 completions at a true KL of 0.1 have a standard error of 0.06."""
    values = newest(rows, metric, patience)
    if values and max(values) < limit:
        what = f"KL {values[-1]:.3g} < {limit:g} nats for {patience} steps"
        cause = "samples are not the policy's own: top-k or top-p, a wrong reference, temperature or mask of the end"
        return alarm_line(what, cause, "sample without filters; check that the reference is act 1's policy")
    return None


def kl_jump(rows: Rows, *, metric: str = "objective/kl", limit: float = 10.0, first: int = 10) -> str | None:
    """More than `limit` nats within the `first` rows."""
    values = [row[metric] for row in rows[: first + 1] if metric in row]
    if values and len(values) <= first and values[-1] - values[0] > limit:
        what = f"KL rose by {values[-1] - values[0]:.3g} nats in the first {len(values)} steps"
        cause = "learning rate or Adam's eps, no schedule, or rewards that were not normalised"
        return alarm_line(what, cause, "lower the learning rate; use ppo_optimizer; z-score the rewards")
    return None


def standstill(
    rows: Rows,
    *,
    metric: str = "objective/kl",
    scores: str = "objective/scores",
    spread: str = "objective/scores_std",
    limit: float = 0.05,
    rise: float = 0.2,
    patience: int = 20,
) -> str | None:
    """Neither KL nor score moves: `limit` nats, and `rise` of a batch's standard deviation from half to half."""
    kl, values, spreads = (newest(rows, name, patience) for name in (metric, scores, spread))
    if not (kl and values and spreads) or max(map(abs, kl)) > limit:
        return None
    change = _mean(values[patience // 2 :]) - _mean(values[: patience // 2])
    if abs(change) < rise * _mean(spreads):
        what = f"KL below {limit:g} nats and the score moved by {change:.3g} in {patience} steps"
        cause = "kl_coef is too large for the scale of the rewards, or all advantages are 0"
        return alarm_line(what, cause, "lower kl_coef; look at objective/scores_std and at grad/norm")
    return None


def leash_fails(
    rows: Rows,
    *,
    metric: str = "objective/kl",
    coef: str = "objective/kl_coef",
    limit: float = 10.0,
    growth: float = 1.25,
    patience: int = 10,
) -> str | None:
    """KL goes on growing, above `limit`, although the leash is on and not being loosened."""
    kl, coefs = newest(rows, metric, patience), newest(rows, coef, patience)
    if not kl or not coefs or min(coefs) <= 0 or coefs[-1] < coefs[0] or min(kl) < limit:
        return None
    before, after = _mean(kl[: patience // 2]), _mean(kl[patience // 2 :])
    if after > growth * before:
        what = f"KL grew from {before:.3g} to {after:.3g} nats in {patience} steps under kl_coef {coefs[-1]:.3g}"
        cause = (
            "an estimator in the wrong place (k1 in a loss, k3 in a reward), or a controller fed with nats per token"
        )
        return alarm_line(what, cause, "k1 in the reward or k2 in the loss; give the controller nats per completion")
    return None


def endless(
    rows: Rows, *, metric: str = "response/eos_frac", limit: float = 0.05, first_above: float = 0.2, patience: int = 3
) -> str | None:
    """Completions stop ending: below `limit` where the first row was above `first_above`."""
    values = newest(rows, metric, patience)
    if values and max(values) < limit and _first(rows, metric) > first_above:
        what = f"{values[-1]:.0%} of the completions end (first {_first(rows, metric):.0%})"
        cause = "nothing is lost without an end, or the score lands on another token than the end"
        return alarm_line(what, cause, "a missing_eos_penalty; shape_rewards puts the score on the last token")
    return None


def critic_fails(
    rows: Rows,
    *,
    clipped: str = "val/clipfrac_avg",
    metric: str = "val/explained_var",
    limit: float = 0.5,
    patience: int = 5,
) -> str | None:
    """The critic is worse than a constant, and most of its updates are clipped."""
    fractions, explained = newest(rows, clipped, patience), newest(rows, metric, patience)
    if fractions and explained and min(fractions) > limit and max(explained) < 0:
        what = (
            f"explained variance {explained[-1]:.3g} and {fractions[-1]:.0%} of the values clipped for {patience} steps"
        )
        cause = "the critic's learning rate, a start from the wrong model, or returns on another scale than its values"
        return alarm_line(
            what, cause, "a zero head (init_value_head), vf_coef, a wider value_clip; never whiten returns"
        )
    return None


def clipped_often(
    rows: Rows, *, metric: str = "policy/clipfrac_avg", limit: float = 0.3, patience: int = 3
) -> str | None:
    """Updates go as far as the clip allows; `clip_ratio/region_mean` is the same of methods without a critic."""
    values = newest(rows, metric, patience)
    if values and min(values) > limit:
        what = f"{values[-1]:.0%} of the tokens clipped for {patience} steps ({metric})"
        cause = "too many epochs on one rollout, the learning rate, or log-probs of an older policy"
        return alarm_line(what, cause, "fewer epochs, a lower learning rate, or kl_stop")
    return None


def both_fall(
    rows: Rows,
    *,
    metric: str = "logps/chosen",
    rejected: str = "logps/rejected",
    margin: str = "rewards/margins",
    limit: float = 10.0,
    patience: int = 5,
) -> str | None:
    """Direct methods: the chosen completions lose `limit` nats while the margin grows. Some of it is normal."""
    chosen, worse, margins = (newest(rows, name, patience) for name in (metric, rejected, margin))
    if not (chosen and worse and margins):
        return None
    early = [_mean([row[name] for row in rows if name in row][:patience]) for name in (metric, rejected, margin)]
    falls = [before - _mean(now) for before, now in zip(early[:2], (chosen, worse), strict=True)]
    if min(falls) > limit and _mean(margins) > early[2]:
        what = f"chosen completions lost {falls[0]:.3g} nats, rejected ones {falls[1]:.3g}, while the margin grew"
        cause = "the loss sees differences only, so probability leaves both for completions that nobody ranked"
        return alarm_line(
            what, cause, "nll_coef above 0, a larger beta, fewer steps; check length and end of both sides"
        )
    return None


ALARMS: tuple[Alarm, ...] = (
    sampling_differs,
    negative_kl,
    kl_jump,
    kl_explosion,
    leash_fails,
    standstill,
    equal_rewards,
    entropy_collapse,
    runaway_length,
    endless,
    critic_fails,
    clipped_often,
    partial(clipped_often, metric="clip_ratio/region_mean"),
    both_fall,
)


def alarms(rows: Rows, checks: Sequence[Alarm] = ALARMS) -> list[str]:
    """The lines of all alarms that ring over these rows; other thresholds by `functools.partial` in `checks`."""
    return [line for check in checks if (line := check(rows)) is not None]


def first_alarms(rows: Rows, checks: Sequence[Alarm] = ALARMS) -> list[tuple[int, str]]:
    """Of a finished run: where each alarm rang first, as (index of the row, line), in the order of the rows."""
    rung = []
    for check in checks:
        lines = ((i, check(rows[: i + 1])) for i in range(len(rows)))
        rung += [next(((i, line) for i, line in lines if line is not None), None)]
    return sorted(found for found in rung if found is not None)


def alarm_line(what: str, cause: str, fix: str) -> str:
    """How every alarm says it."""
    return f"{what}: likely {cause}: fix: {fix}"


def newest(rows: Rows, metric: str, count: int) -> list[float]:
    """The last `count` values of a metric, or none when there are fewer."""
    values = []
    for row in reversed(rows):
        if metric in row:
            values.append(row[metric])
        if len(values) == count:
            return values[::-1]
    return []


def _first(rows: Rows, metric: str) -> float:
    return next(row[metric] for row in rows if metric in row)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
