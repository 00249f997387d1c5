"""A policy small enough to enumerate, as a `CausalModel`: one row of logits for every prefix, `length` tokens after a start.

Everything that is elsewhere estimated from samples is here a finite sum over `vocab ** length` completions, and the
library's own sampler, objective and PPO iteration run on it unchanged.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rlhf_jax as rl
from rlhf_jax.types import Generation, Params, PromptBatch


@dataclasses.dataclass(frozen=True)
class Tabular:
    """What a completion is: `length` tokens of `vocab`; no end of sequence."""

    vocab: int
    length: int

    @property
    def num_prefixes(self) -> int:
        """Rows of a table of logits."""
        return sum(self.vocab**t for t in range(self.length))

    def rows(self, tokens: jax.Array) -> jax.Array:
        """Row of the table that is read at each position of `[B, T]`; the start token stands first."""
        code, rows, offset = jnp.zeros_like(tokens[:, 0]), [jnp.zeros_like(tokens[:, 0])], 1
        for t in range(1, tokens.shape[1]):
            code = code * self.vocab + tokens[:, t]
            rows.append(offset + code)
            offset += self.vocab**t
        return jnp.minimum(jnp.stack(rows, axis=1), self.num_prefixes - 1)  # the last token predicts nothing

    def outcome(self, tokens: jax.Array) -> jax.Array:
        """Which of all completions each row of `[B, length + 1]` is, `[B]`."""
        return tokens[:, 1:] @ self.vocab ** jnp.arange(self.length - 1, -1, -1)

    def outcomes(self) -> jax.Array:
        """All completions in order, `[vocab ** length, length + 1]`."""
        grid = np.stack(np.meshgrid(*[np.arange(self.vocab)] * self.length, indexing="ij"), axis=-1)
        return jnp.asarray(np.pad(grid.reshape(-1, self.length), ((0, 0), (1, 0))), jnp.int32)

    def model(self) -> rl.CausalModel:
        """The table as a model: hidden states are logits."""
        return rl.uncached_model(lambda table, tokens, *_: table[self.rows(tokens)], lambda _, hidden: hidden)

    def logprobs(self, table: Params) -> jax.Array:
        """Of all completions, `[vocab ** length]`."""
        tokens = self.outcomes()
        return rl.sequence_token_logprobs(self.model(), table, tokens, jnp.ones_like(tokens)).sum(axis=1)

    def sampler(self, **options):
        """`sample(table, prompts, key) -> Generation`."""
        return partial(rl.generate, self.model(), max_new_tokens=self.length, eos_id=None, pad_id=0, **options)

    def prompts(self, count: int) -> PromptBatch:
        """The start token, `count` times."""
        return PromptBatch(jnp.zeros((count, 1), jnp.int32), jnp.ones((count, 1), bool))


def init_problem(tabular: Tabular, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Reference logits and a score for every completion, all standard normal."""
    ref_key, score_key = jax.random.split(key)
    scores = jax.random.normal(score_key, (tabular.vocab**tabular.length,))
    return jax.random.normal(ref_key, (tabular.num_prefixes, tabular.vocab)), scores


def run_ppo(
    tabular: Tabular,
    reference: jax.Array,
    scores: jax.Array,
    kl_coefs: jax.Array,
    *,
    num_iterations: int = 400,
    batch_size: int = 2048,
    learning_rate: float = 0.05,
    seed: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """PPO under each fixed leash, side by side: exact KL and expected score after every iteration, `[leashes, iterations]`."""
    model, num_epochs, num_minibatches = tabular.model(), 2, 2

    def critic(values: Params, hidden: jax.Array, tokens: jax.Array, segment_ids: jax.Array) -> jax.Array:
        return rl.shift_right(values[tabular.rows(tokens)])

    def score_fn(frozen: rl.Frozen, generation: Generation) -> jax.Array:
        return frozen.reward_params[tabular.outcome(generation.tokens)]

    optimizer = optax.adam(
        optax.cosine_decay_schedule(learning_rate, num_iterations * num_epochs * num_minibatches), eps=1e-5
    )
    step = rl.make_train_step(rl.actor_critic(model, critic, vf_coef=1.0), optimizer)
    update = rl.make_ppo_update(step, num_epochs=num_epochs, num_minibatches=num_minibatches, kl_target=None)
    iteration = rl.make_ppo_iteration(tabular.sampler(), score_fn, rl.make_experience_fn(model, critic), update)
    frozen, batch = rl.Frozen(reference, scores), rl.PPOBatch(tabular.prompts(batch_size))
    ref_logprobs = tabular.logprobs(reference)

    def train(kl_coef: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        def play(state: rl.PPOState, key: jax.Array):
            state, _ = iteration(frozen, state, batch, key)
            logprobs = tabular.logprobs(state.params["policy"])
            return state, (rl.exact_kl(logprobs, ref_logprobs), jnp.exp(logprobs) @ scores)

        state = rl.init_ppo_state(reference, jnp.zeros(tabular.num_prefixes), optimizer)
        keys = jax.random.split(key, num_iterations)
        return jax.lax.scan(play, state.replace(kl_coef=kl_coef), keys)[1]

    keys = jax.random.split(jax.random.key(seed), len(kl_coefs))
    return tuple(np.float64(x) for x in jax.jit(jax.vmap(train))(jnp.asarray(kl_coefs, jnp.float32), keys))
