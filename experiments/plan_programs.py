"""The programs of a stage, for `plan.py`: the library's own step functions, with arguments that are only described."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import rlhf_jax as rl
from rlhf_jax.models.heads import head_specs
from rlhf_jax.models.parameters import is_spec
from rlhf_jax.runtime.sharding import BATCH_AXES, batch_sharding, replicated
from rlhf_jax.runtime.topology import abstract
from rlhf_jax.types import Objective


class Program(NamedTuple):
    """One call of `jax.jit`."""

    name: str
    fn: Callable
    args: tuple
    donated: tuple[int, ...] = ()
    outputs: Any = None
    """Shardings of the results; None leaves them to XLA."""
    beside: Any = ()
    """Arrays that stay on the devices meanwhile, and that it does not get."""


class Stage(NamedTuple):
    """What is on the devices all the time, by name, and the programs that run there in turn."""

    held: dict[str, Any]
    programs: tuple[Program, ...]
    cache: Any = ()
    """The KV cache, which is among the temporaries of a rollout, as it is when rows and heads are split."""
    rows: int = 0
    """Of a micro-batch, on a device."""


class Setting(NamedTuple):
    """What a stage is built from."""

    network: rl.TransformerConfig
    mesh: Mesh
    batch: int
    prompt_length: int
    completion_length: int
    num_minibatches: int
    num_micro_batches: int
    frozen_dtype: str
    shared_critic: bool
    offload: bool

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.prompt_length + self.completion_length

    def arrays(self, specs: Any, dtype: Any = jnp.float32) -> Any:
        """Declared arrays, in their shardings."""
        shapes = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, dtype), specs, is_leaf=is_spec)
        return abstract(shapes, rl.named_shardings(specs, self.mesh))

    def frozen(self, specs: Any) -> Any:
        """What a PPO iteration only reads, where it waits."""
        arrays = self.arrays(specs, self.frozen_dtype)
        return abstract(arrays, rl.on_host(shardings_of(arrays))) if self.offload else arrays

    def state(self, init: Callable, specs: Any) -> Any:
        """`init(params)`, where `init_sharded` would put it."""
        shapes = jax.eval_shape(init, self.arrays(specs))
        return abstract(shapes, rl.state_shardings(shapes, specs, self.mesh))

    def rows(self, *shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        """An array of a batch, rows split."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(self.mesh))

    def whole(self, tree: Any) -> Any:
        """Small arrays, the same on every device."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(self.mesh)), tree)

    def key(self) -> jax.ShapeDtypeStruct:
        """A PRNG key."""
        return self.whole(jax.eval_shape(lambda: jax.random.key(0)))


def shardings_of(arrays: Any) -> Any:
    """Where abstract arrays are."""
    return jax.tree.map(lambda x: x.sharding, arrays)


def _training(setting: Setting, name: str, objective: Objective, specs: Any, batch: Any) -> Stage:
    """One program: a step on a batch, its state donated."""
    optimizer = rl.adam_optimizer(1e-5)
    state = setting.state(lambda params: rl.init_train_state(params, optimizer), specs)
    step = rl.make_train_step(objective, optimizer, num_micro_batches=setting.num_micro_batches)
    program = Program(name, step, (state, batch), (0,), (shardings_of(state), None))
    return Stage({"parameters": state.params, "moments": state.opt_state}, (program,))


def sft(setting: Setting) -> Stage:
    """Act 1."""
    shape, specs = (setting.batch, setting.length), rl.transformer.param_specs(setting.network)
    batch = rl.SequenceBatch(setting.rows(*shape), setting.rows(*shape), setting.rows(*shape, dtype=bool))
    return _training(setting, "step", rl.sft(rl.causal_model(setting.network)), specs, batch)


def reward_model(setting: Setting) -> Stage:
    """Act 2, on pairs."""
    shape, specs = (setting.batch, 2, setting.length), _scorer_specs(setting)
    tokens, mask = setting.rows(*shape), setting.rows(*shape, dtype=bool)
    pairs = setting.rows(setting.batch, 2), setting.rows(setting.batch, 2, dtype=bool)
    objective = rl.reward_model(rl.causal_model(setting.network))
    return _training(setting, "step", objective, specs, rl.RankingBatch(tokens, tokens, mask, *pairs))


def dpo(setting: Setting) -> Stage:
    """DPO: the reference's log-probs, computed once with a copy that is gone when training starts, and the step."""
    model, specs = rl.causal_model(setting.network), rl.transformer.param_specs(setting.network)
    shape = (setting.batch, 2, setting.length)
    tokens, mask = setting.rows(*shape), setting.rows(*shape, dtype=bool)
    batch = rl.PreferenceBatch(tokens, tokens, mask, setting.rows(setting.batch, dtype=bool))
    reference = setting.arrays(specs, setting.frozen_dtype)
    before = Program("reference", partial(rl.pair_token_logprobs, model), (reference, batch))
    batch = batch.replace(ref_logprobs=setting.rows(*shape, dtype=jnp.float32))
    stage = _training(setting, "step", rl.preference(model, rl.dpo_loss, beta=0.1), specs, batch)
    return stage._replace(programs=(*stage.programs, before))


def rollout(setting: Setting) -> Stage:
    """Sampling alone, with frozen parameters."""
    policy = setting.arrays(rl.transformer.param_specs(setting.network), setting.frozen_dtype)
    return Stage({"parameters": policy}, (_sampling(setting, policy),), _cache(setting))


def ppo(setting: Setting) -> Stage:
    """Act 3: an iteration in its three parts (rollout; scores and experience; update), everything else staying there."""
    model, specs = rl.causal_model(setting.network), rl.transformer.param_specs(setting.network)
    critic = rl.shared_critic if setting.shared_critic else rl.separate_critic(model)
    scorer = _scorer_specs(setting)
    both = {"policy": specs, "critic": {"head": scorer["head"]} if setting.shared_critic else scorer}
    optimizer = rl.ppo_optimizer(1e-6)
    state = setting.state(lambda params: rl.init_ppo_state(params["policy"], params["critic"], optimizer), both)
    number = setting.whole(jax.ShapeDtypeStruct((), jnp.float32))
    reference, rewards = (setting.frozen(tree) for tree in (specs, scorer))
    frozen = rl.Frozen(reference, rewards, number, number)
    score, experience_fn = rl.make_score_fn(model), rl.make_experience_fn(model, critic)

    def evaluate(params, frozen, generation, kl_coef):
        if setting.offload:
            parts = {name: rl.stream(getattr(frozen, name)) for name in ("ref_params", "reward_params")}
            frozen = frozen.replace(**parts)
        scores = score(frozen, generation)
        return experience_fn(params, frozen.ref_params, generation, scores, kl_coef)

    step = rl.make_train_step(rl.actor_critic(model, critic), optimizer, num_micro_batches=setting.num_micro_batches)
    update = rl.make_ppo_update(step, num_epochs=1, num_minibatches=setting.num_minibatches)
    sampling = _sampling(setting, state.params["policy"])
    generation = _as_rows(setting, jax.eval_shape(sampling.fn, *sampling.args))
    arguments = state.params, frozen, generation, number
    experience = _as_rows(setting, jax.eval_shape(evaluate, *arguments)[0])

    def learn(state, experience, kl, key):
        return update(state, experience, None, kl, key)

    learning = (state, experience, number, setting.key())
    programs = (
        Program("update", learn, learning, (0,), (shardings_of(state), None), beside=frozen),
        Program("experience", evaluate, arguments, beside=state.opt_state),
        sampling._replace(beside=(state.params["critic"], state.opt_state, frozen)),
    )
    held = {
        "policy": state.params["policy"],
        "critic": state.params["critic"],
        "moments": state.opt_state,
        "reference": reference,
        "reward model": rewards,
    }
    return Stage(held, programs, _cache(setting))


def _scorer_specs(setting: Setting) -> Any:
    config = setting.network
    return {"trunk": rl.transformer.param_specs(config), "head": head_specs(config.model_dim)}


def _sampling(setting: Setting, policy: Any) -> Program:
    prompts = rl.PromptBatch(
        setting.rows(setting.batch, setting.prompt_length),
        setting.rows(setting.batch, setting.prompt_length, dtype=bool),
    )
    model, options = rl.causal_model(setting.network), {"eos_id": 1, "pad_id": 0}
    sample = partial(rl.generate, model, max_new_tokens=setting.completion_length, **options)
    return Program("rollout", sample, (policy, prompts, setting.key()))


def _as_rows(setting: Setting, tree: Any) -> Any:
    return jax.tree.map(lambda x: setting.rows(*x.shape, dtype=x.dtype), tree)


def _cache(setting: Setting) -> Any:
    config, mesh = setting.network, setting.mesh
    cache = jax.eval_shape(lambda: rl.transformer.init_cache(config, setting.batch, setting.length))
    heads = None if config.num_kv_heads % mesh.shape["tensor"] else "tensor"
    layers = [None] * (jax.tree.leaves(cache.keys)[0].ndim - 4)
    split = NamedSharding(mesh, PartitionSpec(*layers, BATCH_AXES, heads))
    return abstract((cache.keys, cache.values), jax.tree.map(lambda _: split, (cache.keys, cache.values)))


STAGES = {"sft": sft, "reward_model": reward_model, "rollout": rollout, "ppo": ppo, "dpo": dpo}
