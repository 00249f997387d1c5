"""What every function of this floor promises, whatever it computes. A new function adds a row to `CALLS`."""

import ast
import inspect
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functional.ragged import MASK, B, T, normals
from jaxtyping import TypeCheckError

import rlhf_jax.functional as floor
from rlhf_jax.functional.checks import check_between, check_positive

FOLDER = Path(floor.__file__).parent
K, V = 4, 5
BT = [normals(seed, B, T) for seed in range(3)]
ROW = [normals(seed, B) for seed in range(3, 5)]
TOKENS = np.random.default_rng(0).integers(0, V, (B, T))
RANKS = np.argsort(normals(6, B, K), axis=1)
KEPT = np.random.default_rng(1).random((B, K)) < 0.7
PAIR = [-2 - abs(normals(seed, B)) for seed in range(10, 14)]
BEST = np.argmax(KEPT, axis=1)
LENGTHS = np.array([1, 7, 3, 40, 12, 5])
PROBABILITIES = [1 / (1 + np.exp(-3 * ROW[0])), (ROW[1] > 0).astype(np.float32)]
PAIRS_T, PAIR_MASK = [-1 - abs(normals(seed, B // 2, 2, T)) for seed in (20, 21)], MASK.reshape(B // 2, 2, T)
LOG_SOFTMAX = [np.log(np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)) for x in (normals(18, B, K), normals(19, B, K))]
SEGMENTS = np.cumsum(MASK, axis=1) // 3 * MASK

# name: (arguments, keyword arguments, mask of the first arguments or None). Float arguments come first.
CALLS = {
    "adaptive_kl_coef": ([np.float32(0.1), np.float32(7)], {"num_samples": 64}, None),
    "against_reference": ([*PAIRS_T, PAIR_MASK], {}, PAIR_MASK),
    "best_of_k_loss": ([normals(8, B, K), BEST, KEPT], {}, KEPT),
    "best_of_n_kl": ([1 + abs(ROW[0])], {}, None),
    "best_of_n_logprobs": ([LOG_SOFTMAX[0], normals(8, B, K)], {"num_samples": 3}, None),
    "best_of_n_mean": ([normals(8, B, K), normals(17, B, K)], {"num_samples": 3}, None),
    "best_of_n_weights": ([normals(8, B, K)], {"num_samples": 3}, None),
    "batch_relative": (ROW[:1], {"group_size": 3}, None),
    "bradley_terry_loss": (ROW, {"margin": 0.5, "label_smoothing": 0.1, "centering_coef": 0.1}, None),
    "chunked_token_laws": (
        [normals(9, B, T, V), TOKENS],
        {"unembed": lambda states: 2.0 * states.astype(jnp.float32), "chunk_size": 3 * B, "temperature": 0.7},
        None,
    ),
    "cispo_loss": (BT, {}, None),
    "clipped_policy_loss": (BT, {"clip_high": 0.3, "dual_clip": 3.0}, None),
    "clipped_sequence_loss": ([*BT, MASK], {"clip_high": 0.3}, MASK),
    "clipped_value_loss": (BT, {}, None),
    "constant_length_mean": ([BT[0], MASK], {"length": 5}, MASK),
    "cpo_loss": (PAIR[:3], {"beta": 0.5}, None),
    "dpo_loss": (PAIR, {"label_smoothing": 0.1}, None),
    "dual_ascent": ([np.float32(-0.3), np.float32(2)], {"limit": 0.5}, None),
    "entropy": ([normals(7, B, T, V)], {"temperature": 0.7}, None),
    "gae": ([*BT[:2], MASK], {"discount": 0.9}, MASK),
    "group_relative": (ROW[:1], {"group_size": 3}, None),
    "gspo_loss": ([*BT, MASK], {"clip_high": 0.3}, MASK),
    "ipo_loss": (PAIR, {}, None),
    "k1": (BT[:2], {}, None),
    "k2": (BT[:2], {}, None),
    "k3": (BT[:2], {}, None),
    "k3_straight_through": (BT[:2], {}, None),
    "kto_baseline": ([-x for x in PAIR[:2]], {}, None),
    "kto_loss": ([*PAIR[:2], ROW[0] > 0], {"kl": 0.1, "undesirable_weight": 1.5}, None),
    "lagrangian_reward": ([*ROW, ROW[0] > -0.5], {"multiplier": 0.7}, ROW[0] > -0.5),
    "last_true_index": ([MASK], {}, None),
    "leave_one_out": (ROW[:1], {"group_size": 2}, None),
    "map_columns": (BT[:2], {"fn": lambda x, y: jnp.sin(x.astype(jnp.float32)) * y, "num_columns": 3}, None),
    "masked_mean": ([BT[0], MASK], {}, MASK),
    "masked_sum": ([BT[0], MASK], {}, MASK),
    "masked_var": ([BT[0], MASK], {}, MASK),
    "masked_whiten": ([BT[0], MASK], {"unbiased": True}, MASK),
    "mean_against_reference": ([*PAIRS_T, PAIR_MASK], {}, PAIR_MASK),
    "mean_per_token": ([*PAIRS_T, PAIR_MASK], {}, PAIR_MASK),
    "mean_logprobs": ([BT[0], MASK], {}, MASK),
    "normalize_rewards": ([normals(8, 2, B), KEPT[:, :2].T], {}, KEPT[:, :2].T),
    "normalize_scores": (ROW[:1], {"mean": 0.1, "std": 2.0}, None),
    "pairwise_ranking_loss": ([normals(8, B, K), RANKS, KEPT], {"margin": 0.3}, KEPT),
    "ordered_pairs": ([RANKS, KEPT], {}, None),
    "orpo_loss": (PAIR[:2], {"nll_coef": 0.5}, None),
    "plackett_luce_loss": ([normals(8, B, K), RANKS // 2, KEPT], {}, KEPT),
    "positions_from_segments": ([SEGMENTS], {}, None),
    "reinforce_loss": (BT, {}, None),
    "reinforce_plus_plus": ([BT[0], MASK], {"discount": 0.9}, MASK),
    "reinforce_plus_plus_baseline": ([BT[0], MASK], {"group_size": 3}, MASK),
    "replace_missing_eos": ([ROW[0], ROW[1] > 0], {}, None),
    "rewards_to_go": ([BT[0], MASK], {"discount": 0.9}, MASK),
    "robust_dpo_loss": (PAIR, {}, None),
    "sequence_mean": ([BT[0], MASK], {}, MASK),
    "sequence_logprobs": ([BT[0], MASK], {}, MASK),
    "shape_rewards": ([ROW[0], *BT[:2], MASK], {"kl_coef": 0.1}, MASK),
    "shift_right": (BT[:1], {}, None),
    "simpo_loss": (PAIR[:2], {}, None),
    "standardize": (ROW[:1], {}, None),
    "subtract_missing_eos": ([ROW[0], ROW[1] > 0], {}, None),
    "subtract_overlong": ([ROW[0], np.arange(B)], {"max_length": 5, "buffer": 3}, None),
    "token_laws": ([normals(9, B, T, V), TOKENS], {"temperature": 0.7}, None),
    "token_mean": ([BT[0], MASK], {}, MASK),
    "sums_and_nll": ([*PAIRS_T, PAIR_MASK], {}, PAIR_MASK),
    "token_logprobs": ([normals(9, B, T, V), TOKENS], {"temperature": 0.7}, None),
    "zero_spread": (ROW[:1], {"group_size": 2}, None),
    "ensemble_mean": ([normals(14, 5, B)], {}, None),
    "exact_kl": (LOG_SOFTMAX, {}, None),
    "expected_calibration_error": ([*PROBABILITIES], {"num_bins": 4}, None),
    "first_choice_loss": ([normals(8, B, K), RANKS // 2, KEPT], {}, KEPT),
    "fill_missing": ([ROW[0], ROW[1] > -0.5], {"group_size": 2}, ROW[1] > -0.5),
    "fit_log_length": ([ROW[0], LENGTHS], {}, None),
    "fit_temperature": ([ROW[0], PROBABILITIES[1]], {}, None),
    "normalize_members": ([normals(14, 5, B), normals(15, 5), 1 + abs(normals(16, 5))], {}, None),
    "regression_loss": ([*BT[:2], MASK], {}, MASK),
    "remove_length": ([ROW[0], LENGTHS], {"slope": 0.5, "intercept": -0.1}, None),
    "signed_cost_loss": ([*ROW, ROW[0] > 0, ROW[1] > 1], {"sign_coef": 0.5}, None),
    "step_reward_loss": ([BT[0], abs(np.sin(BT[1])), MASK], {}, MASK),
    "uncertainty_weighted": ([normals(14, 5, B)], {"coef": 0.3, "unbiased": True}, None),
    "weighted_sum": ([normals(8, B, K).T, normals(9, K), KEPT.T], {}, KEPT.T),
    "worst_case": ([normals(14, 5, B)], {}, None),
    "worst_of": ([normals(8, B, K).T, KEPT.T], {}, KEPT.T),
}
every_function = pytest.mark.parametrize("name", sorted(CALLS))
BOOLEAN = {"ordered_pairs", "zero_spread"}
"""Results that are true or false, without gradient or precision."""
WITH_GRADIENT = sorted(
    name for name, (arguments, _, _) in CALLS.items() if arguments[0].dtype == np.float32 and name not in BOOLEAN
)
DATA_ONLY = {"best_of_n_weights", "fit_temperature", "kto_baseline"}
"""Results through which no gradient flows."""
MASKED = sorted(name for name, (_, _, mask) in CALLS.items() if mask is not None)


def arrays(name):
    return [jnp.asarray(x) for x in CALLS[name][0]]


def call(name, *arguments):
    return getattr(floor, name)(*arguments, **CALLS[name][1])


def total_and_gradient(name, arguments):
    """A scalar that weighs every entry differently, and its gradient in all float arguments."""
    floats = [i for i, x in enumerate(arguments) if jnp.issubdtype(x.dtype, jnp.floating)]

    def total(*inputs):
        complete = list(arguments)
        for i, x in zip(floats, inputs, strict=True):
            complete[i] = x
        leaves = jax.tree.leaves(call(name, *complete))
        return sum(jnp.vdot(x, jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)) for x in leaves)

    inputs = [arguments[i] for i in floats]
    return jax.jit(jax.value_and_grad(total, argnums=tuple(range(len(floats)))))(*inputs)


def test_every_public_function_has_a_row():
    assert sorted(CALLS) == sorted(floor.__all__)


@every_function
def test_compiled_equals_eager(name):
    compiled = jax.jit(lambda *arguments: call(name, *arguments))(*arrays(name))
    for one, other in zip(jax.tree.leaves(compiled), jax.tree.leaves(call(name, *arrays(name))), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", WITH_GRADIENT)
def test_gradients_are_finite_and_not_all_zero(name):
    _, gradients = total_and_gradient(name, arrays(name))
    for gradient in gradients:
        assert np.all(np.isfinite(gradient))
    assert any(np.any(gradient) for gradient in gradients) != (name in DATA_ONLY)


@pytest.mark.parametrize("name", sorted(set(WITH_GRADIENT) - {"shift_right"}))
def test_low_precision_inputs_are_computed_in_float32(name):
    low = [x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x for x in arrays(name)]
    high = [x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in low]
    for one, other in zip(jax.tree.leaves(call(name, *low)), jax.tree.leaves(call(name, *high)), strict=True):
        assert one.dtype == jnp.float32
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("name", MASKED)
def test_nothing_outside_the_mask_matters(name, poison):
    """NaN and infinities there change neither a value nor a gradient, and receive gradient 0."""
    mask = jnp.asarray(CALLS[name][2])
    clean = arrays(name)
    shared = [x.shape == mask.shape and x.dtype == jnp.float32 for x in clean]
    assert any(shared)
    dirty = [jnp.where(mask, x, poison) if hit else x for x, hit in zip(clean, shared, strict=True)]
    value, gradients = total_and_gradient(name, clean)
    poisoned_value, poisoned_gradients = total_and_gradient(name, dirty)
    np.testing.assert_array_equal(poisoned_value, value)
    for one, other in zip(poisoned_gradients, gradients, strict=True):
        np.testing.assert_array_equal(one, other)
        if one.shape == mask.shape:
            np.testing.assert_array_equal(one[~mask], 0)


@pytest.mark.parametrize(
    "name",
    sorted(name for name in CALLS if len(CALLS[name][0]) > 1 and name not in ("adaptive_kl_coef", "dual_ascent")),
)
@pytest.mark.parametrize("checked", [True, False])
def test_arguments_of_unequal_shape_are_refused(name, checked):
    """By the type annotations in these tests, and without them too."""
    function = getattr(floor, name) if checked else inspect.unwrap(getattr(floor, name))
    *first, last = arrays(name)
    with pytest.raises((TypeCheckError, AssertionError)):
        function(*first, last[:, :1] if last.ndim > 1 else last[:1], **CALLS[name][1])


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("adaptive_kl_coef", "target", 0),
        ("adaptive_kl_coef", "horizon", -1.0),
        ("adaptive_kl_coef", "num_samples", 0),
        ("best_of_n_logprobs", "num_samples", 0.5),
        ("best_of_n_weights", "num_samples", 5),
        ("batch_relative", "eps", 0.0),
        ("batch_relative", "group_size", 1),
        ("bradley_terry_loss", "label_smoothing", 0.6),
        ("bradley_terry_loss", "centering_coef", -0.1),
        ("chunked_token_laws", "chunk_size", 0),
        ("chunked_token_laws", "temperature", 0.0),
        ("cispo_loss", "max_ratio", 0.9),
        ("clipped_policy_loss", "clip_low", 1.1),
        ("clipped_policy_loss", "dual_clip", 0.9),
        ("clipped_policy_loss", "clip_high", -0.1),
        ("clipped_sequence_loss", "clip_low", 1.1),
        ("clipped_sequence_loss", "clip_high", -0.1),
        ("clipped_value_loss", "clip", -0.1),
        ("constant_length_mean", "length", 0),
        ("cpo_loss", "beta", 0.0),
        ("cpo_loss", "nll_coef", -1.0),
        ("dpo_loss", "beta", -0.1),
        ("dpo_loss", "label_smoothing", 0.6),
        ("dual_ascent", "learning_rate", 0.0),
        ("dual_ascent", "max_multiplier", -1.0),
        ("entropy", "temperature", 0.0),
        ("fill_missing", "group_size", 0),
        ("fill_missing", "group_size", 4),
        ("gae", "discount", 1.01),
        ("gae", "gae_lambda", float("nan")),
        ("group_relative", "eps", 0.0),
        ("group_relative", "group_size", 1),
        ("gspo_loss", "clip_low", 1.1),
        ("gspo_loss", "clip_high", -0.1),
        ("ipo_loss", "beta", 0.0),
        ("kto_loss", "beta", 0.0),
        ("kto_loss", "desirable_weight", -1.0),
        ("kto_loss", "undesirable_weight", -1.0),
        ("lagrangian_reward", "multiplier", -0.1),
        ("leave_one_out", "group_size", 1),
        ("leave_one_out", "group_size", 4),
        ("normalize_rewards", "eps", 0.0),
        ("normalize_rewards", "group_size", 0),
        ("normalize_rewards", "group_size", 4),
        ("normalize_scores", "std", 0.0),
        ("map_columns", "num_columns", 0),
        ("orpo_loss", "beta", -0.1),
        ("orpo_loss", "nll_coef", -1.0),
        ("pairwise_ranking_loss", "label_smoothing", -0.1),
        ("pairwise_ranking_loss", "centering_coef", -0.1),
        ("reinforce_plus_plus", "discount", 1.1),
        ("reinforce_plus_plus_baseline", "group_size", 1),
        ("rewards_to_go", "discount", -0.1),
        ("robust_dpo_loss", "beta", 0.0),
        ("robust_dpo_loss", "flip_rate", 0.5),
        ("shape_rewards", "kl_coef", -0.1),
        ("simpo_loss", "beta", 0.0),
        ("simpo_loss", "margin", -0.1),
        ("standardize", "eps", 0.0),
        ("subtract_missing_eos", "penalty", -1.0),
        ("subtract_overlong", "max_length", 0),
        ("subtract_overlong", "buffer", -1),
        ("subtract_overlong", "penalty", -0.5),
        ("token_laws", "temperature", -1.0),
        ("token_logprobs", "temperature", -1.0),
        ("expected_calibration_error", "num_bins", 0),
        ("fit_temperature", "low", 0.0),
        ("fit_temperature", "high", -1.0),
        ("signed_cost_loss", "sign_coef", -1.0),
        ("uncertainty_weighted", "coef", -0.1),
        ("zero_spread", "group_size", 1),
    ],
)
def test_hyper_parameters_out_of_range_are_refused_by_name(name, option, value):
    with pytest.raises(ValueError, match=f"^{option} must be"):
        getattr(floor, name)(*arrays(name), **{**CALLS[name][1], option: value})


def test_checks_read_numpy_numbers_and_leave_traced_ones():
    with pytest.raises(ValueError, match="size must be at least 0"):
        check_between(0.0, float("inf"), size=np.float32(-1))
    with pytest.raises(ValueError, match="size must be positive"):
        check_positive(size=float("inf"))
    jax.jit(lambda x: check_between(0.0, 1.0, size=x))(5.0)


@every_function
def test_options_are_keyword_only_and_documented(name):
    function = getattr(floor, name)
    documented = function.__doc__
    parameters = inspect.signature(function).parameters.values()
    for parameter in parameters:
        assert f"{parameter.name}:" in documented, parameter.name
        if parameter.default is not parameter.empty and parameter.name != "axis":
            assert parameter.kind is parameter.KEYWORD_ONLY, parameter.name
    assert "Returns:" in documented
    assert ("Raises:" in documented) == ("check_" in inspect.getsource(function))


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_imports_and_shifts_stay_on_this_floor(path):
    tree = ast.parse(path.read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    for module in imported:
        allowed = {"jax", "jax.numpy", "jax.extend.core", "jaxtyping", "chex"}
        allowed |= {"collections.abc", "functools", "math", "numbers", "typing"}
        assert module in allowed or module.startswith("rlhf_jax.functional"), module
    assert ":-1]" not in path.read_text()
