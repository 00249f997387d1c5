"""Alarms: what a run that goes wrong looks like in its metrics, as pure functions of the rows so far.

Every alarm takes the rows of one stage (as `MetricLog` writes them, oldest first), looks at the newest ones and returns one
line, or None. A row without the alarm's metric is left out, so an alarm over a metric that nobody logs is never heard. It
asks for several rows in a row, because one bad batch is no trend.

    for line in alarms(history):
        print(line)
"""

from collections.abc import Callable, Mapping, Sequence

Rows = Sequence[Mapping[str, float]]
Alarm = Callable[[Rows], str | None]


def kl_explosion(rows: Rows, *, metric: str = "objective/kl", limit: float = 30.0, patience: int = 2) -> str | None:
    """The policy has left the reference: `limit` nats per completion in each of the last `patience` rows.

    The default is five times the target of 6 nats of lm-human-preferences' controller; longer completions carry more KL, so
    scale the limit with them.
    """
    values = _newest(rows, metric, patience)
    if values and min(values) > limit:
        return (
            f"KL {values[-1]:.3g} > {limit:g} nats for {patience} steps: fix: raise kl_coef or lower the learning rate"
        )
    return None


def entropy_collapse(
    rows: Rows, *, metric: str = "policy/entropy_avg", fraction: float = 0.1, floor: float = 0.02, patience: int = 3
) -> str | None:
    """The policy says one thing: its entropy per token is below `fraction` of the first row's, or below `floor` nats."""
    values = _newest(rows, metric, patience)
    if not values:
        return None
    first = next(row[metric] for row in rows if metric in row)
    limit = max(fraction * first, floor)
    if max(values) < limit:
        return (
            f"entropy {values[-1]:.3g} < {limit:.3g} nats per token for {patience} steps (first {first:.3g}): fix: raise "
            "kl_coef, lower the learning rate or add an entropy bonus"
        )
    return None


def equal_rewards(
    rows: Rows, *, metric: str = "objective/scores_std", limit: float = 1e-6, patience: int = 3
) -> str | None:
    """All completions score the same, so that nothing tells good from bad: standard deviation within a batch."""
    values = _newest(rows, metric, patience)
    if values and max(values) <= limit:
        return f"all rewards equal for {patience} steps (standard deviation {values[-1]:.3g}): fix: look at the reward function"
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
    lengths, ends = _newest(rows, metric, patience), _newest(rows, ended, patience)
    if not lengths or not ends:
        return None
    first = next(row[metric] for row in rows if metric in row)
    if min(lengths) > factor * first and max(ends) < ended_below:
        return (
            f"length {lengths[-1]:.3g} tokens, {factor:g} times the first {first:.3g}, and {ends[-1]:.0%} end: fix: penalise "
            "completions without an end, or subtract length from the reward"
        )
    return None


ALARMS: tuple[Alarm, ...] = (kl_explosion, entropy_collapse, equal_rewards, runaway_length)


def alarms(rows: Rows, checks: Sequence[Alarm] = ALARMS) -> list[str]:
    """The lines of all alarms that ring over these rows; other thresholds by `functools.partial` in `checks`."""
    return [line for check in checks if (line := check(rows)) is not None]


def _newest(rows: Rows, metric: str, count: int) -> list[float]:
    """The last `count` values, or none when there are fewer."""
    values = [row[metric] for row in rows if metric in row]
    return values[-count:] if len(values) >= count else []
