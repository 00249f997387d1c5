"""Writes `trl_0_11.json`, `trl_0_20.json` and `trl_1_16.json`: what TRL's own code computes, for `tests/test_golden.py`.

Not run by the tests. One environment a release (Python 3.11), then this script in each of them:

    pip install torch==2.13.0 trl==0.11.4 transformers==4.45.2 numpy==2.4.6 rich     # PPO with a critic, direct methods
    pip install torch==2.13.0 trl==0.20.0 transformers==4.54.1 numpy==2.4.6          # PPO, its second implementation
    pip install torch==2.13.0 trl==1.16.0 transformers==5.24.0 numpy==2.4.6          # the current trainers
    python tests/golden/make_trl.py

Every number comes out of TRL: of a trainer's method, called on a stand-in that holds only the options which the
method reads, or, where a formula stands in the middle of a long method, of that method's lines, run as they are
(`run_lines`). Nothing is computed here but random inputs, prepared as TRL's callers do (masked, shifted, divided by
the temperature), and the gradients. Inputs are exact in float32; TRL computes in float64, where it does not cast to
float32 itself (ORPO), and the results are rounded to the nearest float32.
"""

import inspect
import json
import textwrap
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np

ROWS, LENGTH, VOCAB = 6, 8, 5
LENGTHS = np.array([8, 8, 5, 1, 7, 3])
MASK = np.arange(LENGTH) < LENGTHS[:, None]
EOS, PAD = 1, 0
STAND_IN = {
    "accelerator": SimpleNamespace(
        device="cpu",
        num_processes=1,
        sync_gradients=True,
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction: x,
    ),
    "model": SimpleNamespace(training=True, is_gradient_checkpointing=False),
    "aux_loss_enabled": False,
    "_total_train_tokens": 0,
    "_tp_size": 1,
}


def stand_in(**options):
    """What a method takes for its trainer: one process on the CPU, and the options that it reads."""
    return SimpleNamespace(**STAND_IN, _metrics={"train": defaultdict(list)}, **options)


def run_lines(function, first, last, **names):
    """Run a function's lines from the one that holds `first` up to the one that holds `last`; return all names."""
    lines = inspect.getsource(function).splitlines()
    start = next(i for i, line in enumerate(lines) if first in line)
    stop = next(i for i, line in enumerate(lines) if last in line and i > start)
    scope = {**function.__globals__, **names}
    exec(textwrap.dedent("\n".join(lines[start:stop])), scope)
    return scope


def tensors(**arrays):
    """As float64 tensors that want a gradient; bools and integers as they are."""
    import torch

    made = {name: torch.tensor(x) for name, x in arrays.items()}
    return {k: x.double().requires_grad_() if x.is_floating_point() else x for k, x in made.items()}


def gradients(loss, inputs, names):
    """Of a scalar with respect to the named inputs."""
    import torch

    found = torch.autograd.grad(loss, [inputs[name] for name in names], retain_graph=True)
    return dict(zip(names, found, strict=True))


def plain(x):
    """Lists of the shortest decimals that read back as the same float32."""
    x = np.asarray(x.detach() if hasattr(x, "detach") else x)
    if x.dtype.kind == "f":
        return np.vectorize(lambda y: float(str(np.float32(y))), otypes=[object])(x).tolist()
    return x.tolist()


class Cases(dict):
    """Cases by name, each of inputs, options, outputs and gradients."""

    def add(self, name, inputs, outputs, grads=None, **options):
        groups = {"inputs": inputs, "outputs": outputs, "gradients": grads or {}}
        assert name not in self, name
        self[name] = {"options": options} | {k: {n: plain(x) for n, x in g.items()} for k, g in groups.items()}


def normals(rng, *shape, scale=1.0, shift=0.0):
    return (shift + scale * rng.normal(size=shape)).astype(np.float32)


def per_token(rng):
    """Log-probabilities of three policies near each other, some ratios beyond a clip of 0.2."""
    ref = -np.abs(normals(rng, ROWS, LENGTH)) - np.float32(0.1)
    old = ref + normals(rng, ROWS, LENGTH, scale=0.3)
    return {"logprobs": old + normals(rng, ROWS, LENGTH, scale=0.3), "old_logprobs": old, "ref_logprobs": ref}


def critic_methods(cases, rng):
    """0.11: `trl.core` and the first PPOTrainer, whose methods take arrays."""
    from trl import PPOTrainer, core
    from trl.trainer.utils import AdaptiveKLController

    x = tensors(x=normals(rng, ROWS, LENGTH, scale=2.0, shift=0.7), mask=MASK)
    for shift in (True, False):
        whitened = core.masked_whiten(x["x"], x["mask"], shift_mean=shift)
        weights = tensors(weights=normals(rng, ROWS, LENGTH))["weights"].detach()
        grads = gradients((whitened * weights * x["mask"]).sum(), x, ["x"])
        outputs = {"whitened": whitened, "var": core.masked_var(x["x"], x["mask"], unbiased=False)}
        cases.add(f"masked_whiten/shift_mean={shift}", x | {"weights": weights}, outputs, grads, shift_mean=shift)

    x = tensors(logits=normals(rng, 2, LENGTH, VOCAB), tokens=rng.integers(0, VOCAB, (2, LENGTH)))
    outputs = {
        "logprobs": core.logprobs_from_logits(x["logits"][:, :-1] / 0.7, x["tokens"][:, 1:]),
        "entropy": core.entropy_from_logits(x["logits"][:, :-1] / 0.7),
    }
    cases.add("logits", x, outputs, temperature=0.7)

    for kl in (3.0, 6.5, 60.0):
        controller = AdaptiveKLController(0.15, 6.0, 10_000)
        controller.update(kl, 512)
        options = {"kl_coef": 0.15, "target": 6.0, "horizon": 10_000, "num_samples": 512}
        cases.add(
            f"adaptive_kl_coef/kl={kl}", {"kl": np.float32(kl)}, {"kl_coef": np.float32(controller.value)}, **options
        )

    logprobs = per_token(rng)
    x = tensors(**logprobs, scores=normals(rng, ROWS), values=normals(rng, ROWS, LENGTH), mask=MASK)
    for name, kl_penalty in (("k1", "kl"), ("k2", "mse")):
        config = {"kl_penalty": kl_penalty, "gamma": 0.97, "lam": 0.9, "whiten_rewards": False}
        self = stand_in(config=SimpleNamespace(**config), kl_ctl=SimpleNamespace(value=0.2))
        self._kl_penalty = lambda *arrays, self=self: PPOTrainer._kl_penalty(self, *arrays)
        rewards, _, kl = PPOTrainer.compute_rewards(self, x["scores"], x["logprobs"], x["ref_logprobs"], x["mask"])
        _, advantages, returns = PPOTrainer.compute_advantages(self, x["values"], rewards, x["mask"])
        outputs = {"kl": kl, "rewards": rewards, "advantages": advantages, "returns": returns}
        options = {"kl_coef": 0.2, "discount": 0.97, "gae_lambda": 0.9}
        cases.add(f"ppo_rollout/{name}", x, outputs, **options)

    old_values = normals(rng, ROWS, LENGTH)
    values, returns = (old_values + normals(rng, ROWS, LENGTH, scale=s) for s in (0.3, 1.0))
    x = tensors(**logprobs, values=values, old_values=old_values, returns=returns, mask=MASK)
    x |= tensors(advantages=normals(rng, ROWS, LENGTH))
    config = SimpleNamespace(cliprange_value=0.2, cliprange=0.2, vf_coef=0.1, ratio_threshold=10.0)
    logits = tensors(logits=normals(rng, ROWS, LENGTH, VOCAB))["logits"]
    arrays = (x["old_logprobs"], x["old_values"], logits, x["values"], x["logprobs"], x["mask"])
    policy, value, stats = PPOTrainer.loss(stand_in(config=config), *arrays, x["advantages"], x["returns"])
    outputs = {"policy": policy, "value": value, "approxkl": stats["policy/approxkl"]}
    outputs |= {"clipfrac": stats["policy/clipfrac"], "value_clipfrac": stats["val/clipfrac"]}
    cases.add("ppo_loss", x, outputs, gradients(policy + value, x, ["logprobs", "values"]), clip=0.2, vf_coef=0.1)


def pairs(rng, shift=-20.0, scale=4.0):
    """Log-probabilities of whole completions."""
    chosen, rejected = normals(rng, ROWS, scale=scale, shift=shift), normals(rng, ROWS, scale=scale, shift=shift)
    refs = {f"ref_{k}": v + normals(rng, ROWS, scale=3.0) for k, v in (("chosen", chosen), ("rejected", rejected))}
    return {"chosen": chosen, "rejected": rejected, **refs}


def direct_methods(cases, rng):
    """0.11: losses per pair of the direct methods."""
    from trl import CPOTrainer, DPOTrainer, KTOTrainer, ORPOTrainer

    x = tensors(**pairs(rng))
    names = ["chosen", "rejected"]
    for loss_type, smoothing, beta in (
        ("sigmoid", 0.0, 0.3),
        ("sigmoid", 0.1, 0.3),
        ("robust", 0.1, 0.3),
        ("ipo", 0.0, 0.05),
    ):
        self = stand_in(f_divergence_type="reverse_kl", reference_free=False, loss_type=loss_type)
        self.beta, self.label_smoothing = beta, smoothing
        losses = DPOTrainer.dpo_loss(self, *x.values())[0]
        options = {"beta": beta, "label_smoothing": smoothing}
        cases.add(f"dpo/{loss_type}/{smoothing}", x, {"losses": losses}, gradients(losses.sum(), x, names), **options)

    x |= tensors(kl_chosen=normals(rng, ROWS, shift=2.0), ref_kl_chosen=normals(rng, ROWS))
    self = stand_in(calculate_KL=True, loss_type="kto", beta=0.3, desirable_weight=1.2, undesirable_weight=0.8)
    arrays = (x[k] for k in ("chosen", "rejected", "kl_chosen", "ref_chosen", "ref_rejected", "ref_kl_chosen"))
    losses, _, _, kl = KTOTrainer.kto_loss(self, *arrays)
    options = {"beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.8}
    cases.add("kto", x, {"losses": losses, "kl": kl}, gradients(losses.sum(), x, names), **options)

    x = {name: tensors(**pairs(rng, shift, scale)) for name, shift, scale in (("sum", -20.0, 4.0), ("mean", -3.0, 0.5))}
    x = {norm: {name: arrays[name] for name in names} for norm, arrays in x.items()}
    orpo = ORPOTrainer.odds_ratio_loss(stand_in(beta=0.3), *x["mean"].values())[0]  # to be subtracted, there
    cases.add("orpo", x["mean"], {"losses": orpo}, gradients(orpo.sum(), x["mean"], names), beta=0.3)
    for loss_type, norm, margin in (("sigmoid", "sum", 0.0), ("simpo", "mean", 1.25)):
        self = stand_in(loss_type=loss_type, beta=2.5, simpo_gamma=margin, label_smoothing=0.0)
        losses = CPOTrainer.cpo_loss(self, *x[norm].values())[0]
        grads = gradients(losses.sum(), x[norm], names)
        cases.add(f"cpo/{loss_type}", x[norm], {"losses": losses}, grads, beta=2.5, margin=margin)


def ppo_in_line(cases, rng):
    """0.20: the lines of PPOTrainer.train between the rollout's arrays and the backward pass."""
    import torch
    from trl import PPOTrainer

    responses = rng.integers(2, VOCAB, (ROWS, LENGTH))
    ended = np.array([True, False, True, False, True, True])  # row 0 ends in the last column, row 1 is cut there
    responses[ended, LENGTHS[ended] - 1] = EOS
    responses[~MASK] = PAD
    logprobs = per_token(rng)
    arrays = {"scores": normals(rng, ROWS), "values": normals(rng, ROWS, LENGTH), "mask": MASK, "ended": ended}
    for estimator, whiten in (("k1", False), ("k1", True), ("k3", False)):
        x = {k: v.detach() for k, v in tensors(**logprobs, **arrays).items()}
        args = {"missing_eos_penalty": 1.0, "kl_estimator": estimator, "kl_coef": 0.2, "whiten_rewards": whiten}
        args = SimpleNamespace(**args, gamma=0.97, lam=0.9, cliprange=0.2, cliprange_value=0.2, vf_coef=0.1)
        tokens = torch.tensor(responses)
        scope = run_lines(
            PPOTrainer.train,
            "contain_eos_token = ",
            "empty_cache()",
            self=SimpleNamespace(processing_class=SimpleNamespace(eos_token_id=EOS), args=args),
            args=args,
            responses=tokens,
            postprocessed_responses=tokens,
            sequence_lengths=torch.tensor(LENGTHS) - 1,
            logprobs=x["old_logprobs"].clone(),
            ref_logprobs=x["ref_logprobs"].clone(),
            values=x["values"].clone(),
            scores=x["scores"].clone(),
        )
        outputs = {name: scope[name] for name in ("scores", "kl", "rewards", "advantages", "returns")}
        outputs["value_mask"] = ~scope["padding_mask_p1"]
        new = tensors(
            logprobs=logprobs["logprobs"], new_values=arrays["values"] + normals(rng, ROWS, LENGTH, scale=0.3)
        )
        rows = torch.arange(ROWS)
        step = run_lines(
            PPOTrainer.train,
            "new_logprobs = torch.masked_fill(",
            "accelerator.backward(loss)",
            args=args,
            micro_batch_inds=rows,
            context_length=1,
            new_logprobs=new["logprobs"],
            vpred_temp=torch.nn.functional.pad(new["new_values"], (0, 1))[:, :, None],
            padding_mask=scope["padding_mask"],
            padding_mask_p1=scope["padding_mask_p1"],
            mb_values=scope["values"],
            mb_return=scope["returns"],
            mb_advantage=scope["advantages"],
            mb_logprobs=scope["logprobs"],
        )
        stats = run_lines(PPOTrainer.train, "approxkl = 0.5", "approxkl_stats[", **step)
        outputs |= {"policy": step["pg_loss"], "value": step["vf_loss"], "approxkl": stats["approxkl"]}
        grads = gradients(step["loss"], new, ["logprobs", "new_values"])
        options = {"kl_coef": 0.2, "penalty": 1.0, "discount": 0.97, "gae_lambda": 0.9, "clip": 0.2, "vf_coef": 0.1}
        cases.add(f"ppo/{estimator}/whiten={whiten}", x | new, outputs, grads, **options)


def group_losses(cases, rng):
    """1.16: GRPO's family, by the trainer's method; the forward pass is replaced by the given log-probabilities."""
    import torch
    from trl import GRPOTrainer

    x = tensors(**per_token(rng), advantages=normals(rng, ROWS), mask=MASK)
    tokens = torch.zeros(ROWS, 0, dtype=torch.long)
    variants = [
        ("grpo", {"beta": 0.04}),
        ("bnpo", {}),
        ("dr_grpo", {}),
        ("dapo", {"clip_high": 0.28}),
        ("dapo", {"clip_high": 0.28, "delta": 1.4}),
        ("dapo", {"num_items": 100, "accumulation": 2}),
        ("cispo", {"clip_high": 1.3}),
        ("grpo", {"level": "sequence", "clip_low": 0.05, "clip_high": 0.08}),
        ("luspo", {"level": "sequence", "clip_low": 0.05, "clip_high": 0.08}),
    ]
    for loss_type, given in variants:
        defaults = {"beta": 0.0, "clip_low": 0.2, "clip_high": 0.2, "level": "token", "delta": None}
        options = defaults | {"num_items": int(MASK.sum()), "accumulation": 1, "max_length": 10} | given
        args = {"delta": options["delta"], "use_bias_correction_kl": False}
        self = stand_in(
            loss_type=loss_type,
            beta=options["beta"],
            epsilon_low=options["clip_low"],
            epsilon_high=options["clip_high"],
            importance_sampling_level=options["level"],
            max_completion_length=options["max_length"],
            current_gradient_accumulation_steps=options["accumulation"],
            args=SimpleNamespace(**args, steps_per_generation=options["accumulation"]),
            top_entropy_quantile=1.0,
            off_policy_mask_threshold=None,
            use_vllm=False,
            _entropy_bonus_enabled=False,
            _get_per_token_logps_and_entropies=lambda *_, **__: (x["logprobs"], torch.zeros(ROWS, LENGTH), None),
        )
        inputs = {"prompt_ids": tokens, "prompt_mask": tokens, "completion_ids": x["mask"].long()}
        inputs |= {"completion_mask": x["mask"].long(), "old_per_token_logps": x["old_logprobs"].detach()}
        inputs |= {"ref_per_token_logps": x["ref_logprobs"], "advantages": x["advantages"]}
        inputs["num_items_in_batch"] = torch.tensor(options["num_items"])
        loss = GRPOTrainer._compute_loss(self, None, inputs)
        name = f"grpo_loss/{loss_type}/" + "/".join(f"{k}={v}" for k, v in given.items())
        cases.add(name, x, {"loss": loss}, gradients(loss, x, ["logprobs"]), loss_type=loss_type, **options)


def group_advantages(cases, rng):
    """1.16: the lines of GRPO's and RLOO's scoring that turn scores into advantages; RLOO's loss."""
    import torch
    from trl import GRPOTrainer, RLOOTrainer

    scores = normals(rng, ROWS, shift=1.0)
    scores[3:] = [0.5, 0.5, 0.5]  # a group without any spread
    x = tensors(scores=scores)
    found = {"rewards_per_func": x["scores"].detach()[:, None], "num_generations": 3, "device": "cpu"}
    for scale in ("group", "batch", "none"):
        self = SimpleNamespace(
            multi_objective_aggregation="sum_then_normalize", scale_rewards=scale, reward_weights=torch.ones(1)
        )
        scope = run_lines(
            GRPOTrainer._generate_and_score_completions, "unscorable_mask = ", "# Slice to keep", self=self, **found
        )
        cases.add(f"grpo_advantages/{scale}", x, {"advantages": scope["advantages"]}, group_size=3, scale=scale)

    logprobs = tensors(**{k: v for k, v in per_token(rng).items()}, mask=MASK)
    for normalize in (False, True):
        self = SimpleNamespace(
            reward_clip_range=None, beta=0.1, normalize_advantages=normalize, reward_weights=torch.ones(1)
        )
        scope = run_lines(
            RLOOTrainer._generate_and_score_completions,
            "unscorable_mask = ",
            "is_std_zero = ",
            self=self,
            gather=lambda x: x,
            old_per_token_logps=logprobs["old_logprobs"].detach(),
            ref_per_token_logps=logprobs["ref_logprobs"].detach(),
            completion_mask=logprobs["mask"],
            **found,
        )
        options = {"group_size": 3, "kl_coef": 0.1, "normalize": normalize}
        inputs = x | {k: logprobs[k] for k in ("old_logprobs", "ref_logprobs", "mask")}
        cases.add(f"rloo_advantages/normalize={normalize}", inputs, {"advantages": scope["advantages"]}, **options)

    x = logprobs | {"advantages": scope["advantages"]}
    tokens = torch.zeros(ROWS, 0, dtype=torch.long)
    inputs = {"prompt_ids": tokens, "prompt_mask": tokens, "completion_ids": x["mask"].long()}
    inputs |= {"completion_mask": x["mask"].long(), "advantages": x["advantages"]}
    inputs["old_logps"] = (x["old_logprobs"].detach() * x["mask"]).sum(1)
    self = stand_in(epsilon_low=0.2, epsilon_high=0.2)
    self._get_per_token_logps_and_entropies = lambda *_, **__: (x["logprobs"], torch.zeros(ROWS, LENGTH), None)
    loss = RLOOTrainer._compute_loss(self, None, inputs)
    cases.add("rloo_loss", x, {"loss": loss}, gradients(loss, x, ["logprobs"]), clip=0.2)


def pair_trainers(cases, rng):
    """1.16: DPO's family and KTO from log-probabilities per token, by the trainers' whole loss method."""
    import torch
    from trl import DPOTrainer, KTOTrainer

    def model(log_probs):
        """Gives TRL's fused head's answer: 0 where the labels are masked."""
        zeros = torch.zeros(ROWS, LENGTH)
        outputs = SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
        return lambda **_: outputs

    x = tensors(**per_token(rng), mask=MASK)
    shifted = torch.nn.functional.pad(x["mask"].long(), (1, 0))  # TRL's masks include the token that nothing predicts
    batch = {"input_ids": shifted, "attention_mask": shifted, "completion_mask": shifted}
    policy, reference = (model(x[k] * x["mask"]) for k in ("logprobs", "ref_logprobs"))
    common = {"ld_alpha": None, "precompute_ref_logps": False, "is_encoder_decoder": False}
    for loss_type, smoothing in (("sigmoid", 0.0), ("sigmoid_norm", 0.0), ("ipo", 0.0), ("robust", 0.2), ("sft", 0.0)):
        self = stand_in(**common, ref_model=reference, f_divergence_type="reverse_kl", use_weighting=False)
        self.loss_types, self.loss_weights, self.beta, self.label_smoothing = [loss_type], [1.0], 0.5, smoothing
        self.args = SimpleNamespace(gradient_checkpointing_kwargs=None)
        loss = DPOTrainer._compute_loss(self, policy, batch, False)
        grads = gradients(loss, x, ["logprobs"])
        cases.add(f"dpo/{loss_type}", x, {"loss": loss}, grads, beta=0.5, label_smoothing=smoothing)

    label = np.array([True, False, True, True, False, True])
    x |= tensors(label=label, kl=np.float32(0.7))
    kls = {id(policy): x["kl"].detach().expand(ROWS), id(reference): torch.zeros(ROWS)}
    self = stand_in(**common, ref_model=reference, calculate_KL=True, loss_type="kto", beta=0.5)
    self.desirable_weight, self.undesirable_weight = 1.3, 0.9
    self.args = SimpleNamespace(gradient_checkpointing_kwargs=None)
    self._compute_kl_logps = lambda model, _: kls[id(model)]
    loss = KTOTrainer._compute_loss(self, policy, batch | {"label": x["label"]}, False)
    options = {"beta": 0.5, "desirable_weight": 1.3, "undesirable_weight": 0.9}
    cases.add("kto", x, {"loss": loss}, gradients(loss, x, ["logprobs"]), **options)


def pairs_without_reference(cases, rng):
    """1.16: CPO, SimPO and ORPO with their imitation terms, from logits, by the trainers' own forward method."""
    import torch
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    x = tensors(logits=normals(rng, ROWS, 2 + LENGTH, VOCAB), tokens=rng.integers(0, VOCAB, (ROWS, 2 + LENGTH)))
    x |= tensors(mask=np.pad(MASK, ((0, 0), (2, 0))))  # after a prompt of two tokens
    labels = torch.where(x["mask"], x["tokens"], -100)
    attention = (x["mask"] | (torch.arange(2 + LENGTH) < 2)).long()
    batch = {
        "concatenated_input_ids": x["tokens"],
        "concatenated_attention_mask": attention,
        "concatenated_labels": labels,
    }
    variants = [
        (CPOTrainer, "sigmoid", {"beta": 0.3, "cpo_alpha": 0.7}),
        (CPOTrainer, "simpo", {"beta": 2.5, "cpo_alpha": 0.0}),
        (ORPOTrainer, "orpo", {"beta": 0.3}),
    ]
    for trainer, loss_type, options in variants:
        self = stand_in(**options, is_encoder_decoder=False, pad_token_id=PAD, padding_value=PAD, loss_type=loss_type)
        self.alpha, self.simpo_gamma, self.label_smoothing = 0.0, 1.25, 0.0
        self.concatenated_inputs = lambda *_, **__: batch
        self.get_batch_logps = trainer.get_batch_logps
        for method in ("concatenated_forward", "cpo_loss", "odds_ratio_loss"):
            if hasattr(trainer, method):
                setattr(self, method, getattr(trainer, method).__get__(self))
        forward = lambda *_, **__: SimpleNamespace(logits=x["logits"])  # noqa: E731
        loss, metrics = trainer.get_batch_loss_metrics(self, forward, {"chosen_labels": labels[: ROWS // 2]})
        outputs = {"loss": loss, "nll": np.float32(metrics["nll_loss"])}
        cases.add(f"from_logits/{loss_type}", x, outputs, gradients(loss, x, ["logits"]), **options, margin=1.25)


def rewards(cases, rng):
    """1.16: the reward trainer's loss."""
    import torch
    from trl import RewardTrainer

    scores = {"chosen": normals(rng, ROWS, scale=2.0), "rejected": normals(rng, ROWS, scale=2.0)}
    for with_margin, centering in ((False, None), (True, None), (False, 0.01), (True, 0.3)):
        x = tensors(**scores, margin=np.abs(normals(rng, ROWS)))
        outputs = SimpleNamespace(logits=torch.cat([x["chosen"], x["rejected"]])[:, None])
        inputs = {"attention_mask": torch.ones(1)} | ({"margin": x["margin"].detach()} if with_margin else {})
        self = stand_in(args=SimpleNamespace(center_rewards_coefficient=centering))
        loss = RewardTrainer.compute_loss(self, lambda outputs=outputs, **_: outputs, inputs)
        options = {"with_margin": with_margin, "centering_coef": centering or 0.0}
        grads = gradients(loss, x, ["chosen", "rejected"])
        cases.add(f"reward/margin={with_margin}/centering={centering}", x, {"loss": loss}, grads, **options)


MAKERS = {
    "0.11": (critic_methods, direct_methods),
    "0.20": (ppo_in_line,),
    "1.16": (group_losses, group_advantages, pair_trainers, pairs_without_reference, rewards),
}


def main():
    import torch
    import transformers
    import trl

    release = trl.__version__.rpartition(".")[0]
    cases = Cases()
    for seed, maker in enumerate(MAKERS[release]):
        maker(cases, np.random.default_rng(seed))
    versions = {"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(case)}" for name, case in cases.items())
    path = Path(__file__).with_name(f"trl_{release.replace('.', '_')}.json")
    path.write_text(f'{{"made_with": {json.dumps(versions)},\n"cases": {{\n{lines}\n}}}}\n', "utf-8")
    print(f"{path.name}: {len(cases)} cases, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
