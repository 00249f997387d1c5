"""What tells DPO and its relatives apart: a loss, and what it is told of a pair."""

import dataclasses
from functools import partial
from typing import Literal

import rlhf_jax as rl

METHODS = {
    "dpo": (rl.dpo_loss, {}),
    "cdpo": (partial(rl.dpo_loss, label_smoothing=0.1), {}),
    "robust_dpo": (rl.robust_dpo_loss, {}),
    "ipo": (rl.ipo_loss, {}),
    "ipo_means": (rl.ipo_loss, {"inputs_fn": rl.mean_against_reference}),
    "orpo": (rl.orpo_loss, {"inputs_fn": rl.mean_per_token}),
    "simpo": (rl.simpo_loss, {"inputs_fn": rl.mean_per_token}),
    "cpo": (rl.cpo_loss, {"inputs_fn": rl.sums_and_nll}),
    "kto": (rl.kto_loss, {}),
}
"""Name to loss, and to what it is told."""


@dataclasses.dataclass(frozen=True)
class DPOConfig:
    """Numbers of the run."""

    method: Literal["dpo", "cdpo", "robust_dpo", "ipo", "ipo_means", "orpo", "simpo", "cpo", "kto"] = "dpo"
    beta: float = 0.5
    """0.1 in Rafailov et al. 2023; with all pairs of 4,096 rankings that lets this small policy run from its text. It means
    another strength in every method; SimPO's is 2 to 2.5."""
    nll_coef: float = 0.0
    """Weight of the chosen completion's likelihood."""
    num_epochs: float = 1.0
    batch_size: int = 64
    """Pairs; for KTO, completions."""
    num_micro_batches: int = 1
    share_prompts: bool = False
    """Run the prompt of a pair once; every batch has the columns of the longest prompt and completion."""
    learning_rate: float = 1e-4
    num_responses: int = 4
    """K, in the embedded world; all ordered pairs of a question's K responses are used."""
    num_rounds: int = 1
    """Of sampling, ranking and training; each with `num_epochs`, from the policy of the one before."""
    reference: Literal["first", "previous"] = "first"
    """Of a later round: the SFT policy, so that the leash holds over all rounds, or the policy that the round starts from."""
    save_every: int = 100
    """Steps from one checkpoint of the unfinished act to the next."""


def build_objective(config: DPOConfig, network: rl.TransformerConfig, shared: rl.SharedPrompts | None = None):
    """The method's objective."""
    model, (loss_fn, options) = rl.causal_model(network), METHODS[config.method]
    if config.method == "kto":
        return rl.labelled_preference(model, loss_fn, beta=config.beta, shared=shared)
    return rl.preference(model, loss_fn, beta=config.beta, nll_coef=config.nll_coef, shared=shared, **options)
