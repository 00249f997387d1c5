"""The pass criteria of the HH job: each says whether it holds, with its figures, and what is missing.

They are evaluated on the figures of one run (one seed) and asked to hold on three or more seeds.
"""

import itertools

MAX_P = 0.01
KL_TOLERANCE = 0.2
MAX_NLL_RISE = 0.3
STIFF_KL = 0.05
OWN_JUDGE = {"w0": "harmless", "w1": "helpful"}


def criteria(report: dict) -> dict[str, dict]:
    """Criteria (i) to (vi): `{"text", "passed", "figures", "missing"}`; `missing` is empty where it passed."""
    return {
        "i": markers_move(report),
        "ii": markers_monotone(report),
        "iii": kl_on_target(report),
        "iv": beats_shuffled_labels(report),
        "v": ptx_protects_likelihood(report),
        "vi": stiff_leash_holds(report),
    }


def markers_move(report: dict) -> dict:
    """(i)."""
    runs = report["runs"]
    high, base, low = (runs[name]["marker"] for name in ("w0", "sft", "w1"))
    to_w0, to_w1 = runs["w0"]["marker_gap"], runs["w1"]["marker_gap"]
    up, p_up, down, p_down = to_w0["mean"], to_w0["p"], -to_w1["mean"], to_w1["p"]
    missing = _failures(
        {
            f"w=0 above SFT by {up:+.3f}, p = {p_up:.2g}": up <= 0 or p_up >= MAX_P,
            f"SFT above w=1 by {down:+.3f}, p = {p_down:.2g}": down <= 0 or p_down >= MAX_P,
        }
    )
    shown = f"{high['mean']:.3f} > {base['mean']:.3f} > {low['mean']:.3f}; p = {p_up:.1g} and {p_down:.1g}"
    return _criterion("marker rate: w=0 > SFT > w=1, both gaps p < .01", shown, missing)


def markers_monotone(report: dict) -> dict:
    """(ii)."""
    rates = {name: run["marker"]["mean"] for name, run in report["runs"].items() if name.startswith("w")}
    names = sorted(rates, key=lambda name: float(name[1:]))
    steps = itertools.pairwise(names)
    rising = {f"{b} is {rates[b] - rates[a]:+.3f} above {a}": rates[b] >= rates[a] for a, b in steps}
    shown = " > ".join(f"{rates[name]:.3f}" for name in names)
    return _criterion("marker rate falls monotonically over w = 0, .5, 1", shown, _failures(rising))


def kl_on_target(report: dict) -> dict:
    """(iii)."""
    target = report["kl_target"]
    nats = {name: run["kl"]["mean"] for name, run in report["runs"].items() if name.startswith("w")}
    off = {f"{name}: {kl / target - 1:+.0%}": abs(kl / target - 1) > KL_TOLERANCE for name, kl in nats.items()}
    shown = ", ".join(f"{name} {kl:.2f}" for name, kl in nats.items())
    text = f"KL within ±20 % of {target:g} nats on held-out prompts (training stops at it on its own)"
    return _criterion(text, shown, _failures(off))


def beats_shuffled_labels(report: dict) -> dict:
    """(iv)."""
    shown, failed = [], {}
    for name, judge in OWN_JUDGE.items():
        mean = report["runs"][name]["win"][judge]["mean"]
        bar = report["controls"]["shuffled_labels"][judge]["win"]["percentile_95"]
        shown.append(f"{name} {mean:.3f} (bar {bar:.3f}, {judge} judge)")
        failed[f"{name}: {mean - bar:+.3f}"] = not mean > bar
    null = [run["kl"]["mean"] for name, run in report["runs"].items() if name.startswith("shuffled")]
    if null:
        shown.append(f"KL of the shuffled-label runs {min(null):.1f} to {max(null):.1f}")
    text = "judge win rate on pairs of equal length above the 95th percentile of the shuffled-label runs"
    return _criterion(text, ", ".join(shown), _failures(failed))


def ptx_protects_likelihood(report: dict) -> dict:
    """(v)."""
    runs = report["runs"]
    rise, rise_off = (runs[name]["nll"] - runs["sft"]["nll"] for name in ("ptx", "w0"))
    failed = {
        f"rise {rise - MAX_NLL_RISE:.3f} above {MAX_NLL_RISE}": rise > MAX_NLL_RISE,
        f"rise {rise - rise_off / 2:.3f} above half of the rise without": rise > rise_off / 2,
    }
    shown = (
        f"{rise:+.3f} with, {rise_off:+.3f} without; KL {runs['ptx']['kl']['mean']:.2f}, {runs['w0']['kl']['mean']:.2f}"
    )
    return _criterion("PPO-ptx: held-out NLL rises <= .3 and at most half as much as without", shown, _failures(failed))


def stiff_leash_holds(report: dict) -> dict:
    """(vi)."""
    stiff, base = report["runs"]["kl_coef_1e3"], report["runs"]["sft"]["marker"]
    kl, rate = stiff["kl"]["mean"], stiff["marker"]["mean"]
    outside = max(base["low"] - rate, rate - base["high"])
    failed = {
        f"KL {abs(kl) - STIFF_KL:.3f} too far": abs(kl) >= STIFF_KL,
        f"marker rate {outside:.3f} outside": outside > 0,
    }
    shown = f"KL {kl:.4f}, marker rate {rate:.3f} in [{base['low']:.3f}, {base['high']:.3f}]"
    return _criterion("kl_coef = 1e3: KL < .05 and marker rate inside the SFT interval", shown, _failures(failed))


def reproducible(same: bool) -> dict:
    """(vii)."""
    shown = "report.json equals what samples.jsonl gives" if same else "it differs"
    text = "every figure recomputed from the saved samples"
    return _criterion(text, shown, "" if same else "report.json and samples.jsonl disagree")


def _criterion(text: str, shown: str, missing: str) -> dict:
    return {"text": text, "passed": not missing, "figures": shown, "missing": missing}


def _failures(failed: dict[str, bool]) -> str:
    return "; ".join(text for text, wrong in failed.items() if wrong)
