"""Python rewards: what goes wrong in them is named or masked, hangs are interrupted, and a loop learns from them."""

import contextlib
import functools
import itertools
import re
import signal
import textwrap
import threading
import time
from decimal import Decimal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import rlhf_jax as rl
from rlhf_jax.training.reward_functions import RewardError, learn_from, score_completions
from rlhf_jax.training.reward_process import own_process
from rlhf_jax.training.verifiable import final_number, make_exact_number, make_full_match, make_length_cost
from rlhf_jax.types import Experience

PROMPTS = [f"question {i}" for i in range(4)]
TEXTS = ["one", "two two", "bad", "four"]
LIMIT = 0.2


def length(prompts, completions, **columns):
    return [len(text) for text in completions]


def broken(how):
    """A function that is fine but for completions that say "bad"; `how` is done there."""

    def reward(prompts, completions, **columns):
        return [how(text) if text == "bad" else float(len(text)) for text in completions]

    return reward


def fail(text):
    raise KeyError(text)


def wait(text):
    time.sleep(30)


def spin(text):
    while True:
        pass


def backtrack(text):
    return float(re.fullmatch(r"(a+)+", "a" * 40 + "b") is not None)


def swallow(text):
    """Catches what the alarm raises, twice."""
    for _ in range(2):
        with contextlib.suppress(TimeoutError):
            time.sleep(30)
    return 1.0


def shorter(prompts, completions, **columns):
    return [1.0 for text in completions if text != "bad"]


FAILURES = {
    "raises": (broken(fail), r"raised KeyError: 'bad' \(.*test_reward_functions.py:\d+ in fail\)"),
    "sleeps": (broken(wait), r"still ran after 0.2 s \(.*in wait\)"),
    "spins": (broken(spin), r"still ran after 0.2 s \(.*in spin\)"),
    "backtracks": (broken(backtrack), "still ran after 0.2 s"),
    "swallows the alarm": (broken(swallow), "still ran after 0.2 s"),
    "too few": (shorter, "returned 0 values for 1 completions"),
    "None": (broken(lambda text: None), "returned None"),
    "nan": (broken(lambda text: np.float32("nan")), "returned np.float32.nan."),
    "infinite": (broken(lambda text: float("-inf")), "returned -inf"),
    "beyond float32": (broken(lambda text: 1e300), r"returned 1e\+300"),
    "text": (broken(lambda text: "good"), "returned 'good'"),
    "a list": (broken(lambda text: [1.0, 2.0]), r"returned \[1.0, 2.0\]"),
}
every_failure = pytest.mark.parametrize("name", FAILURES)


@every_failure
def test_a_failure_stops_and_names_function_prompt_and_completion(name):
    function, what = FAILURES[name]
    options = {"ids": ["p/10", "p/11", "p/12", "p/13"], "time_limit": LIMIT, "where": "grpo step 7"}
    start = time.monotonic()
    with pytest.raises(RewardError) as caught:
        score_completions({"length": length, "fine": function}, PROMPTS, TEXTS, **options)
    assert time.monotonic() - start < 8
    function_name = "shorter" if function is shorter else "broken.<locals>.reward"
    where = rf"grpo step 7: reward 'fine' \({re.escape(function_name)}\) {what}"
    assert re.match(where, str(caught.value)), caught.value
    end = "for row 2 of 4, prompt p/12: 'question 2', completion 'bad'. Nothing was updated. Fix: return one finite number"
    assert end in str(caught.value)


@every_failure
def test_a_failure_is_masked_and_counted_where_that_is_chosen(name):
    function, _ = FAILURES[name]
    rewards = {"length": length, "fine": function}
    scored = score_completions(rewards, PROMPTS, TEXTS, time_limit=LIMIT, mask_failures=True)
    assert scored.mask.tolist() == [[True] * 4, [True, True, False, True]]
    assert scored.rows.tolist() == [True, True, False, True]
    assert scored.scores[1].tolist() == ([1, 1, 0, 1] if function is shorter else [3, 7, 0, 4])
    assert (scored.metrics["reward/length_failed"], scored.metrics["reward/fine_failed"]) == (0, 1)
    assert scored.metrics["reward/length"] == np.mean([3, 7, 3, 4])
    assert scored.metrics["reward/length_std"] == np.std([3, 7, 3, 4])
    assert scored.metrics["reward/fine"] == pytest.approx(np.mean(scored.scores[1][scored.rows]))


def test_what_fails_only_together_or_returns_no_list_is_told_too():
    def together(prompts, completions, **columns):
        return length(prompts, completions) if len(completions) == 1 else None

    with pytest.raises(
        RewardError, match="returned None in place of a list for all 4 completions together and for none"
    ):
        score_completions({"odd": together}, PROMPTS, TEXTS)
    scored = score_completions({"odd": together}, PROMPTS, TEXTS, mask_failures=True)
    assert scored.scores.tolist() == [[3, 7, 3, 4]]
    with pytest.raises(RewardError, match="returned a float in place of a list"):
        score_completions({"odd": lambda prompts, completions: 1.0}, PROMPTS, TEXTS)
    with pytest.raises(RewardError, match=r"\(the first of 4\).*Nothing was updated"):
        score_completions({"odd": lambda prompts, completions: [None] * len(completions)}, PROMPTS, TEXTS)


def test_where_no_completion_is_left_the_run_stops_all_the_same():
    options = {"time_limit": LIMIT, "mask_failures": True}
    with pytest.raises(RewardError, match=r"reward 'odd' .*raised KeyError.*\(the first of 4\)"):
        score_completions({"odd": lambda prompts, completions: fail("x")}, PROMPTS, TEXTS, **options)
    halves = {
        str(i): lambda prompts, completions, i=i: [None if len(text) % 2 == i else 1.0 for text in completions]
        for i in (0, 1)
    }
    with pytest.raises(RewardError, match=r"no completion has all of \['0', '1'\]"):
        score_completions(halves, PROMPTS, TEXTS, **options)


def test_trying_one_by_one_ends_with_the_first_that_fails_where_failures_stop():
    sizes = []

    def counted(prompts, completions):
        sizes.append(len(completions))
        return broken(fail)(prompts, completions)

    with pytest.raises(RewardError, match="row 1 of 4, prompt 1: "):
        score_completions({"x": counted}, PROMPTS, ["a", "bad", "bad", "a"])
    assert sizes == [4, 1, 1]


def test_trying_one_by_one_ends_when_everything_hangs():
    start = time.monotonic()
    options = {"time_limit": LIMIT, "mask_failures": True}
    texts = [*TEXTS[:2], *["bad"] * 30]
    scored = score_completions({"slow": broken(spin)}, ["q"] * 32, texts, **options)
    assert scored.rows.tolist() == [True] * 2 + [False] * 30
    assert time.monotonic() - start < 6 * LIMIT + 2


def test_the_alarm_leaves_nothing_behind_and_lets_an_interrupt_through():
    before = signal.getsignal(signal.SIGALRM)
    score_completions({"slow": broken(wait)}, PROMPTS, TEXTS, time_limit=LIMIT, mask_failures=True)
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)

    def interrupted(prompts, completions):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_completions({"x": interrupted}, PROMPTS, TEXTS, mask_failures=True)


def test_a_limit_elsewhere_than_in_the_main_thread_is_refused():
    caught = []

    def run(limit):
        try:
            caught.append(score_completions({"length": length}, PROMPTS, TEXTS, time_limit=limit).scores.tolist())
        except ValueError as error:
            caught.append(str(error))

    for limit in (1.0, None):
        thread = threading.Thread(target=run, args=(limit,))
        thread.start()
        thread.join()
    assert "Fix: score there, or time_limit=None" in caught[0]
    assert caught[1] == [[3, 7, 3, 4]]


def test_columns_and_numbers_of_every_kind():
    def picky(prompts, completions, *, answer, **columns):
        return (np.float64(a) if i else jnp.asarray(a) for i, a in enumerate(answer))

    scored = score_completions({"a": functools.partial(picky)}, PROMPTS, TEXTS, columns={"answer": [True, 2, 3.5, 4]})
    assert scored.scores.tolist() == [[1, 2, 3.5, 4]]
    assert scored.scores.dtype == np.float32
    with pytest.raises(ValueError, match=r"4 completions, 1 rewards: answer has 3. Fix"):
        score_completions({"a": picky}, PROMPTS, TEXTS, columns={"answer": [1, 2, 3]})
    with pytest.raises(ValueError, match="there is nothing to score"):
        score_completions({}, PROMPTS, TEXTS)


def test_long_texts_are_shortened():
    with pytest.raises(RewardError) as caught:
        score_completions({"x": broken(fail)}, ["a" * 5000 + "b"], ["bad"])
    assert len(str(caught.value)) < 800
    assert "aab'" in str(caught.value)


def test_rows_that_are_left_out_get_no_gradient():
    ones = jnp.ones((3, 2))
    experience = Experience(ones, ones, ones > 0, ones, ones)
    assert learn_from(experience, np.array([True, False, True])).mask.tolist() == [[True] * 2, [False] * 2, [True] * 2]


HELPERS = """
    import itertools, os

    def fine(prompts, completions, **columns):
        return [float(len(text)) for text in completions]

    def stuck(prompts, completions, **columns):
        if "bad" in completions:
            max(itertools.repeat(0))  # one call into C that looks at no signal
        return fine(prompts, completions)

    def dying(prompts, completions, **columns):
        if "bad" in completions:
            os._exit(3)
        return fine(prompts, completions) if "odd" not in completions else {}["odd"]
"""


@pytest.fixture
def helpers(tmp_path, monkeypatch):
    (tmp_path / "reward_helpers.py").write_text(textwrap.dedent(HELPERS))
    monkeypatch.syspath_prepend(tmp_path)
    return __import__("reward_helpers")


def test_a_process_of_its_own_is_killed_where_no_alarm_reaches(helpers):
    with own_process(helpers.stuck) as reward:
        assert score_completions({"x": reward}, PROMPTS, ["a", "b", "c", "dd"]).scores.tolist() == [[1, 1, 1, 2]]
        with pytest.raises(RewardError, match=r"reward 'x' \(stuck\) still ran after 1 s .* completion 'bad'"):
            score_completions({"x": reward}, ["q"], ["bad"], time_limit=1.0)


@pytest.mark.slow
def test_a_process_that_dies_is_a_failure_like_another_and_the_next_call_gets_a_new_one(helpers):
    with own_process(helpers.dying) as reward:
        with pytest.raises(RewardError, match="RuntimeError: its process ended with code 3"):
            score_completions({"x": reward}, ["q"], ["bad"])
        with pytest.raises(RewardError, match=r"in its process:(.|\n)*KeyError: 'odd'"):
            score_completions({"x": reward}, ["q"], ["odd"])


@pytest.mark.parametrize(
    ("text", "number", "marked"),
    [
        ("so 3 + 4 = 7.\n#### 42", 42, True),
        ("#### 1,234,567", 1234567, True),
        ("#### -3", -3, True),
        ("#### −3 apples, not 5", -3, True),
        ("#### $-1,234.50.", Decimal("-1234.5"), True),
        ("-$7.25", Decimal("-7.25"), False),
        ("#### 9\n#### 10", 10, True),
        ("first 3, then 5.", 5, False),
        ("7-3", 3, False),
        ("10 - 4", 4, False),
        ("of .5", Decimal("0.5"), False),
        ("12,34", 34, False),
        ("no number", None, False),
        ("5 #### none", None, True),
        ("", None, False),
    ],
)
def test_final_number(text, number, marked):
    assert final_number(text) == number
    assert final_number(text, fallback=False) == (number if marked else None)


def test_every_answer_of_gsm8k_is_read_as_python_reads_it(data_dir):
    from rlhf_jax.data.json_lines import read_json_lines

    path = data_dir / "verifiable" / "gsm8k_test.jsonl.gz"
    records = [record for _, record in read_json_lines(path)]
    wanted = [Decimal(record["answer"].replace(",", "")) for record in records]
    assert [final_number(record["solution"]) for record in records] == wanted
    assert [final_number(record["answer"]) for record in records] == wanted
    solutions, answers = ([record[name] for record in records] for name in ("solution", "answer"))
    score = functools.partial(make_exact_number(fallback=False), [""] * len(records))
    assert np.mean(score(solutions, answer=answers)) == 1.0
    assert np.mean(score(solutions, answer=[*answers[1:], answers[0]])) < 0.1


def test_exact_number():
    texts, answers = ["#### 42.0", "it is 1,000", "#### 7", "nothing"], ["42", "1000", "-7", "0"]
    assert make_exact_number()([], texts, answer=answers) == [1, 1, 0, 0]
    assert make_exact_number(fallback=False)([], texts, answer=answers) == [1, 0, 0, 0]
    assert make_exact_number(tolerance=0.1)([], ["3.14", "3.3"], answer=["3.2", "3.1"]) == [1, 0]
    with pytest.raises(ValueError, match="the answer 'many' of the data holds no number"):
        make_exact_number()([], ["1"], answer=["many"])


def test_form_and_length():
    form = make_full_match(r"<a>\d+</a>")
    assert form([], ["<a>12</a>", "<a>12</a> ", "so <a>1</a>"], answer=[]) == [1, 0, 0]
    assert make_length_cost(per=10, free=3)([], ["abc", "a" * 13]) == [0, 1]
    assert make_length_cost(per=2, column="num_tokens")([], ["a", "b"], num_tokens=[4, 1]) == [2, 0.5]
    with pytest.raises(ValueError, match="per must be positive"):
        make_length_cost(per=0)


def test_a_loop_learns_from_a_python_reward_and_bad_rows_do_not_spoil_it():
    """Say token 7: from one in seventeen to most of the tokens, though the function fails for a tenth of the rows."""
    group_size, new = 8, 6
    optimizer = optax.adam(2e-2)
    sample = jax.jit(
        functools.partial(
            rl.generate, tiny.MODEL, max_new_tokens=new, eos_id=None, pad_id=tiny.PAD, samples_per_prompt=group_size
        )
    )
    advantages = rl.per_completion(rl.group_relative, group_size=group_size)
    experience_fn = rl.make_policy_experience_fn(tiny.MODEL, advantages, kl_in_reward=False, group_size=group_size)
    objective = rl.policy_gradient(tiny.MODEL, rl.clipped_policy_loss)
    update = rl.make_ppo_update(rl.make_train_step(objective, optimizer), num_epochs=1, kl_target=None)
    calls = itertools.count()

    def sevens(prompts, completions, **columns):
        return [None if next(calls) % 10 == 3 else float(text.split().count("7")) for text in completions]

    @jax.jit
    def learn(state, reference, generation, scores, mask, key):
        total = rl.fill_missing(scores[0], mask[0], group_size=group_size)
        experience, metrics = experience_fn(state.params, reference, generation, total, state.kl_coef)
        experience = learn_from(experience, mask.all(axis=0))
        return *update(state, experience, None, metrics["objective/kl"], key), experience

    policy, prompts = tiny.init_params(), tiny.prompts((3, 5, 1, 4))
    state, history = rl.init_ppo_state(policy, None, optimizer), []
    for step in range(25):
        generation = sample(state.params["policy"], prompts, jax.random.key(step))
        texts = [" ".join(map(str, row[-new:])) for row in np.asarray(generation.tokens)]
        scored = score_completions({"sevens": sevens}, [""] * 32, texts, mask_failures=True, time_limit=5.0)
        state, _, experience = learn(
            state, policy, generation, jnp.asarray(scored.scores), jnp.asarray(scored.mask), jax.random.key(step)
        )
        history.append(scored.metrics["reward/sevens"])
        assert scored.metrics["reward/sevens_failed"] in (3, 4)
        assert np.asarray(experience.mask).any(axis=1).tolist() == scored.rows.tolist()
    assert history[0] < 1.5
    assert np.mean(history[-3:]) > 4.5
