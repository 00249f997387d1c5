"""Floor 1 against the numbers that TRL's own code gives for the same arrays (`golden/make_trl.py` made them).

Every case of the JSON files is checked, its outputs and its gradients, to 1e-5 of the largest. Where the two libraries
define a thing differently, a named argument or function of ours says so below; `docs/coming_from_trl.md` lists them.
"""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.functional import (
    adaptive_kl_coef,
    batch_relative,
    bradley_terry_loss,
    cispo_loss,
    clipped_policy_loss,
    clipped_sequence_loss,
    clipped_value_loss,
    constant_length_mean,
    cpo_loss,
    dpo_loss,
    entropy,
    gae,
    group_relative,
    gspo_loss,
    ipo_loss,
    k1,
    k2,
    k3,
    kto_baseline,
    kto_loss,
    leave_one_out,
    masked_mean,
    masked_var,
    masked_whiten,
    mean_logprobs,
    orpo_loss,
    robust_dpo_loss,
    sequence_logprobs,
    sequence_mean,
    shape_rewards,
    simpo_loss,
    standardize,
    subtract_missing_eos,
    token_logprobs,
    token_mean,
)

TOLERANCE = 1e-5
RELEASES = ("0_11", "0_20", "1_16")
FOLDER = Path(__file__).with_name("golden")
FILES = {release: json.loads((FOLDER / f"trl_{release}.json").read_text("utf-8")) for release in RELEASES}
CASES = {f"{release}/{name}": case for release, file in FILES.items() for name, case in file["cases"].items()}


trl_whiten = partial(masked_whiten, unbiased=True)


def halves(x):
    """TRL stacks the chosen rows on the rejected ones."""
    return jnp.split(x, 2)


def whiten(x, *, shift_mean):
    whitened = trl_whiten(x["x"], x["mask"], shift_mean=shift_mean)
    return {"whitened": whitened, "var": masked_var(x["x"], x["mask"]), "total": (whitened * x["weights"]).sum()}


def logits(x, *, temperature):
    aligned = [
        f(x["logits"], *tokens, temperature=temperature)
        for f, tokens in ((token_logprobs, [x["tokens"]]), (entropy, []))
    ]
    # TRL's arrays begin at the first token that is predicted; here position 0 is the token that nothing predicts.
    return dict(zip(("logprobs", "entropy"), (y[:, 1:] for y in aligned), strict=True))


def controller(x, *, kl_coef, **options):
    return {"kl_coef": adaptive_kl_coef(kl_coef, x["kl"], **options)}


def leash_and_score(scores, estimates, logprobs, ref_logprobs, mask, *, kl_coef, estimator):
    """`shape_rewards` knows k1 alone, the one estimator that belongs there; TRL also offers the others."""
    if estimator is k1:
        return shape_rewards(scores, logprobs, ref_logprobs, mask, kl_coef=kl_coef)
    bare = shape_rewards(scores, logprobs, ref_logprobs, mask, kl_coef=0.0)
    return bare - kl_coef * jnp.where(mask, estimates, 0.0)


def ppo_rollout(estimator):
    """TRL 0.11: the score on the last token, as here. (Its whitened rewards are not 0 after the end: not compared.)"""

    def check(x, *, kl_coef, **options):
        arrays, mask = (x["logprobs"], x["ref_logprobs"]), x["mask"]
        kl = estimator(*arrays)
        rewards = leash_and_score(x["scores"], kl, *arrays, mask, kl_coef=kl_coef, estimator=estimator)
        advantages, returns = gae(rewards, x["values"], mask, **options)
        whitened = trl_whiten(advantages, mask, shift_mean=True)
        return {"kl": kl, "rewards": rewards, "advantages": whitened, "returns": returns}

    return check


def ppo_loss(x, *, clip, vf_coef):
    arrays, targets = (x["logprobs"], x["old_logprobs"], x["advantages"]), (x["old_values"], x["returns"])
    policies = clipped_policy_loss(*arrays, clip_low=clip, clip_high=clip)
    values = clipped_value_loss(x["values"], *targets, clip=clip)
    unclipped_policies = clipped_policy_loss(*arrays, clip_low=1.0, clip_high=jnp.inf)
    unclipped_values = clipped_value_loss(x["values"], *targets, clip=jnp.inf)
    policy, value = masked_mean(policies, x["mask"]), vf_coef * masked_mean(values, x["mask"])
    return {
        "policy": policy,
        "value": value,
        "approxkl": masked_mean(k2(x["logprobs"], x["old_logprobs"]), x["mask"]),
        "clipfrac": masked_mean(policies > unclipped_policies, x["mask"]),
        "value_clipfrac": masked_mean(values > unclipped_values, x["mask"]),
        "total": policy + value,
    }


def ppo(estimator, whiten_rewards):
    """TRL 0.20 puts the score one place after the end of sequence, and learns a value there."""

    def check(x, *, kl_coef, penalty, clip, vf_coef, **options):
        mask, scores = x["mask"], subtract_missing_eos(x["scores"], x["ended"], penalty=penalty)
        # The mask of rewards and values is one place longer, up to the width; TRL sets both policies' log-probabilities
        # equal after the end, so that the extra place holds the score and no KL.
        value_mask = mask | jnp.pad(mask, ((0, 0), (1, 0)))[:, :-1]
        old, ref, new = (jnp.where(mask, x[k], 0.0) for k in ("old_logprobs", "ref_logprobs", "logprobs"))
        kl = estimator(old, ref)
        rewards = leash_and_score(scores, kl, old, ref, value_mask, kl_coef=kl_coef, estimator=estimator)
        rewards = trl_whiten(rewards, value_mask, shift_mean=False) if whiten_rewards else rewards
        raw_advantages, returns = gae(rewards, x["values"], value_mask, **options)
        advantages = trl_whiten(raw_advantages, mask, shift_mean=True)
        policies = clipped_policy_loss(new, old, advantages, clip_low=clip, clip_high=clip)
        values = clipped_value_loss(x["new_values"], x["values"], returns, clip=clip)
        policy, value = masked_mean(policies, mask), masked_mean(values, value_mask)
        # TRL's approximate KL is a mean over all places, diluted by the zeros of the padding.
        approxkl = masked_mean(k2(new, old), jnp.ones_like(mask))
        outputs = {"scores": scores, "value_mask": value_mask, "kl": kl, "rewards": rewards, "returns": returns}
        outputs |= {"advantages": advantages, "policy": policy, "value": value, "approxkl": approxkl}
        return outputs | {"total": policy + vf_coef * value}

    return check


def of_pairs(loss_fn, x, **options):
    return {"losses": loss_fn(x["chosen"], x["rejected"], x["ref_chosen"], x["ref_rejected"], **options)}


def dpo(x, **options):
    return of_pairs(dpo_loss, x, **options)


def robust(x, *, beta, label_smoothing):
    return of_pairs(robust_dpo_loss, x, beta=beta, flip_rate=label_smoothing)


def ipo(x, *, beta, label_smoothing):
    return of_pairs(ipo_loss, x, beta=beta)


def kto(x, **options):
    kl = kto_baseline(x["kl_chosen"], x["ref_kl_chosen"])
    logprobs, ref_logprobs = jnp.append(x["chosen"], x["rejected"]), jnp.append(x["ref_chosen"], x["ref_rejected"])
    desirable = jnp.arange(logprobs.size) < x["chosen"].size
    return {"losses": kto_loss(logprobs, ref_logprobs, desirable, kl=kl, **options), "kl": kl}


def orpo(x, *, beta):
    # TRL's method returns the term of the odds alone, and with the sign that it is subtracted from the imitation.
    return {"losses": -orpo_loss(x["chosen"], x["rejected"], beta=beta, nll_coef=0.0)}


def cpo(x, *, beta, margin):
    return {"losses": cpo_loss(x["chosen"], x["rejected"], jnp.zeros_like(x["chosen"]), beta=beta)}


def simpo(x, *, beta, margin):
    return {"losses": simpo_loss(x["chosen"], x["rejected"], beta=beta, margin=margin)}


def group_losses(x, *, loss_type, beta, clip_low, clip_high, level, delta, num_items, max_length, accumulation):
    mask = x["mask"]
    arrays = (x["logprobs"], x["old_logprobs"], jnp.broadcast_to(x["advantages"][:, None], mask.shape))
    clips = {"clip_low": clip_low, "clip_high": clip_high}
    if loss_type == "cispo":
        losses = cispo_loss(*arrays, max_ratio=clip_high)  # for TRL's CISPO, epsilon_high is the ratio itself
    elif level == "sequence":
        losses = gspo_loss(*arrays, mask=mask, **clips)
    else:
        losses = clipped_policy_loss(*arrays, **clips, dual_clip=delta)
    losses += beta * k3(x["logprobs"], x["ref_logprobs"])
    aggregate = {
        "grpo": sequence_mean,
        "dr_grpo": partial(constant_length_mean, length=max_length),
        "luspo": partial(constant_length_mean, length=1),
    }.get(loss_type, token_mean)
    total, weight = aggregate(losses, mask)
    # The weight is the whole batch's, whatever the micro-batches; this case is one of two halves.
    return {"loss": total / (num_items if accumulation > 1 else weight)}


def group_advantages(x, *, group_size, scale):
    unscaled = partial(group_relative, scale=False)
    advantages_fn = {"group": group_relative, "batch": batch_relative, "none": unscaled}[scale]
    return {"advantages": advantages_fn(x["scores"], group_size=group_size)}


def rloo_advantages(x, *, group_size, kl_coef, normalize):
    kl = sequence_logprobs(k1(x["old_logprobs"], x["ref_logprobs"]), x["mask"])
    advantages = leave_one_out(x["scores"] - kl_coef * kl, group_size=group_size)
    return {"advantages": standardize(advantages) if normalize else advantages}


def rloo_loss(x, *, clip):
    """The ratio of whole completions."""
    advantages = jnp.broadcast_to(x["advantages"][:, None], x["mask"].shape)
    arrays = (x["logprobs"], x["old_logprobs"], advantages, x["mask"])
    total, weight = constant_length_mean(
        clipped_sequence_loss(*arrays, clip_low=clip, clip_high=clip), x["mask"], length=1
    )
    return {"loss": total / weight}


def from_tokens(loss_fn, of_sequence):
    """A loss of pairs on the sums, or on the means per token, of log-probabilities."""

    def check(x, *, beta, label_smoothing):
        policy, reference = (halves(of_sequence(x[k], x["mask"])) for k in ("logprobs", "ref_logprobs"))
        options = {"flip_rate": label_smoothing} if loss_fn is robust_dpo_loss else {}
        return {"loss": loss_fn(*policy, *reference, beta=beta, **options).mean()}

    return check


def imitation(x, **_):
    chosen, mask = halves(x["logprobs"])[0], halves(x["mask"])[0]
    return {"loss": masked_mean(-chosen, mask)}


def kto_from_tokens(x, **options):
    logprobs, ref_logprobs = (sequence_logprobs(x[k], x["mask"]) for k in ("logprobs", "ref_logprobs"))
    return {"loss": kto_loss(logprobs, ref_logprobs, x["label"], kl=x["kl"], **options).mean()}


def cpo_from_logits(x, *, beta, cpo_alpha, margin):
    logprobs = token_logprobs(x["logits"], x["tokens"])
    chosen, rejected = halves(sequence_logprobs(logprobs, x["mask"]))
    nll = masked_mean(*(halves(y)[0] for y in (-logprobs, x["mask"])))
    # TRL's imitation is the mean over all chosen tokens of the batch, not one number per completion.
    each = jnp.broadcast_to(nll, chosen.shape)
    return {"loss": cpo_loss(chosen, rejected, each, beta=beta, nll_coef=cpo_alpha).mean(), "nll": nll}


def simpo_from_logits(x, *, beta, cpo_alpha, margin):
    chosen, rejected = halves(mean_logprobs(token_logprobs(x["logits"], x["tokens"]), x["mask"]))
    return {"loss": simpo_loss(chosen, rejected, beta=beta, margin=margin).mean(), "nll": jnp.zeros(())}


def orpo_from_logits(x, *, beta, margin):
    logprobs = token_logprobs(x["logits"], x["tokens"])
    chosen, rejected = halves(mean_logprobs(logprobs, x["mask"]))
    # TRL's imitation is the mean over all tokens of the chosen rows, the prompt's too; the paper's, and ours, is over
    # the completion. Position 0 has no prediction.
    predicted = jnp.broadcast_to(jnp.arange(x["mask"].shape[1]) == 1, x["mask"].shape) | x["mask"]
    nll = masked_mean(*(halves(y)[0] for y in (-logprobs, predicted)))
    odds = orpo_loss(chosen, rejected, beta=beta, nll_coef=0.0)
    return {"loss": odds.mean() + nll, "nll": nll}


def reward(x, *, with_margin, centering_coef):
    margin = x["margin"] if with_margin else 0.0
    losses = bradley_terry_loss(x["chosen"], x["rejected"], margin=margin, centering_coef=centering_coef)
    return {"loss": losses.mean()}


CHECKS = {
    "0_11/masked_whiten/": whiten,
    "0_11/logits": logits,
    "0_11/adaptive_kl_coef/": controller,
    "0_11/ppo_rollout/k1": ppo_rollout(k1),
    "0_11/ppo_rollout/k2": ppo_rollout(k2),
    "0_11/ppo_loss": ppo_loss,
    "0_11/dpo/sigmoid/": dpo,
    "0_11/dpo/robust/": robust,
    "0_11/dpo/ipo/": ipo,
    "0_11/kto": kto,
    "0_11/orpo": orpo,
    "0_11/cpo/sigmoid": cpo,
    "0_11/cpo/simpo": simpo,
    "0_20/ppo/k1/whiten=False": ppo(k1, False),
    "0_20/ppo/k1/whiten=True": ppo(k1, True),
    "0_20/ppo/k3/whiten=False": ppo(k3, False),
    "1_16/grpo_loss/": group_losses,
    "1_16/grpo_advantages/": group_advantages,
    "1_16/rloo_advantages/": rloo_advantages,
    "1_16/rloo_loss": rloo_loss,
    "1_16/dpo/sigmoid": from_tokens(dpo_loss, sequence_logprobs),
    "1_16/dpo/sigmoid_norm": from_tokens(dpo_loss, mean_logprobs),
    "1_16/dpo/ipo": from_tokens(ipo_loss, mean_logprobs),
    "1_16/dpo/robust": from_tokens(robust_dpo_loss, sequence_logprobs),
    "1_16/dpo/sft": imitation,
    "1_16/kto": kto_from_tokens,
    "1_16/from_logits/sigmoid": cpo_from_logits,
    "1_16/from_logits/simpo": simpo_from_logits,
    "1_16/from_logits/orpo": orpo_from_logits,
    "1_16/reward/": reward,
}


def check_of(name):
    """By the full name, or by the beginning up to a slash."""
    return CHECKS.get(name) or next(
        check for start, check in CHECKS.items() if start[-1] == "/" and name.startswith(start)
    )


def arrays_of(group):
    kinds = {"f": np.float32, "i": np.int32, "b": np.bool_}
    found = {name: np.asarray(x) for name, x in group.items()}
    return {name: jnp.asarray(x.astype(kinds[x.dtype.kind])) for name, x in found.items()}


def meant(name, golden, case, mask):
    """Where TRL's number has a meaning: it fills the places after the end with this and that."""
    if golden.ndim != 2 or mask is None or golden.shape != mask.shape or name == "value_mask":
        return np.ones(golden.shape, bool)
    return case["outputs"].get("value_mask", mask) if name in ("rewards", "returns") else mask


def assert_close(ours, golden, where, what):
    ours, golden = np.float64(ours)[where], np.float64(golden)[where]
    assert ours.shape == golden.shape, what
    scale = max(np.abs(golden).max(), 1e-30)
    error = np.abs(ours - golden).max()
    assert error <= TOLERANCE * scale, f"{what}: off by {error:.3g}, of at most {scale:.3g}"


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_trl(name):
    case = {"options": CASES[name]["options"]} | {
        k: arrays_of(CASES[name][k]) for k in ("inputs", "outputs", "gradients")
    }
    check, inputs = check_of(name), case["inputs"]

    @jax.jit
    def run(wanted):
        outputs = check(inputs | wanted, **case["options"])
        main = outputs.get("losses", outputs.get("loss", 0.0))
        return jnp.sum(outputs.pop("total", main)), outputs

    wanted = {key: inputs[key] for key in case["gradients"]}
    if wanted:
        gradients, outputs = jax.grad(run, has_aux=True)(wanted)
    else:
        gradients, outputs = {}, run({})[1]
    assert outputs.keys() == case["outputs"].keys()
    for key, golden in case["outputs"].items():
        assert_close(outputs[key], golden, meant(key, golden, case, inputs.get("mask")), f"{name}: {key}")
    for key, golden in case["gradients"].items():
        assert_close(gradients[key], golden, ..., f"{name}: gradient of {key}")
