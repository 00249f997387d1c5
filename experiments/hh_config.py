"""Numbers of the HH job.

They were chosen on seeds 0 and 1, the criteria were not. What it took: replies of one fixed length, since where they can
end, act 3 learns to end early; scores averaged over the reply, by heads on the SFT policy's features, since 800
comparisons teach a whole network little; samples at temperature 0.7; sixteen shuffled-label runs, since eight say little
about a 95th percentile.
"""

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import task
from sft import SFTConfig

from rlhf_jax.runtime.resume import Kept, resumable


@dataclasses.dataclass(frozen=True)
class HHRewardConfig:
    """Numbers of act 2."""

    l2: float = 0.2
    """Weight of the penalty on the head."""


@dataclasses.dataclass(frozen=True)
class HHPPOConfig:
    """Numbers of one run of act 3."""

    num_iterations: int = 50
    """At most so many: a run ends where its KL reaches the target."""
    batch_size: int = 256
    num_epochs: int = 1
    num_minibatches: int = 2
    learning_rate: float = 3e-4
    temperature: float = 0.7
    """Of every sample. At 1 a network of this size strays from words after a few tokens, where no reward model has been."""
    num_warmup: int = 4
    """Iterations of smaller steps: without them the first alone moves a policy on a stiff leash by 0.05 nats."""
    kl_coef: float = 0.02
    kl_target: float | None = 5.0
    kl_horizon: float = 1000.0
    save_every: int = 10
    gae_lambda: float = 0.95
    vf_coef: float = 0.1
    ptx_coef: float = 0.0


@dataclasses.dataclass(frozen=True)
class HHConfig:
    """Numbers of the HH job."""

    vocab_size: int = 1280
    prompt_length: int = 16
    """Tokens of the last human turn, one border token included; longer turns lose their beginning."""
    reply_length: int = 16
    """First tokens of the reply: what act 1 imitates and act 3 samples, without an end of sequence."""
    long_length: int = 48
    """For the accuracy table: what the reward models `long_*` read of a reply."""
    fixed_length: int = 12
    """For the accuracy table: pairs whose replies are both longer, cut to exactly that."""
    held_out_fraction: float = 0.125
    weights: tuple[float, ...] = (0.0, 0.5, 1.0)
    """w of `w z(helpful) + (1 - w) z(harmless)`, one RL run each."""
    num_shuffled: int = 16
    """RL runs on reward models that learned shuffled labels: the null distribution of the judges' win rates."""
    ptx_coef: float = 4.0
    samples_per_prompt: int = 2
    """Replies to each held-out prompt, of every policy."""
    sft: SFTConfig = SFTConfig(num_epochs=5.0, num_layers=2, model_dim=96, num_heads=4, mlp_dim=288)
    reward: HHRewardConfig = HHRewardConfig()
    ppo: HHPPOConfig = HHPPOConfig()

    @property
    def lengths(self) -> task.TaskConfig:
        """For the functions of the other scripts."""
        return task.TaskConfig(prompt_length=self.prompt_length, response_length=self.reply_length)


@dataclasses.dataclass(frozen=True)
class Job:
    """What a run's folder is opened with."""

    run: Path
    resume: bool
    seed: int
    data_dir: Path | None
    model: Path | None
    hh: HHConfig
    force: bool = False
    replay: Path | None = None

    @property
    def keep(self) -> Callable[..., AbstractContextManager[Kept]]:
        """As `task.keeper` has it."""
        return partial(resumable, self.run, force=self.force, replay=self.replay)
