"""The embedded world: its tables are true, its grammar is read back exactly, its judges follow their laws."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.data import synthetic
from rlhf_jax.data.synthetic import tables
from rlhf_jax.data.synthetic.responses import Parts, answer_choices, core_answers, dissect, render

PROMPTS = synthetic.all_prompts()
QUESTIONS = synthetic.all_questions()
VOCABULARY = synthetic.vocabulary()
QUIET = synthetic.Annotator("quiet", synthetic.TRUE_WEIGHTS, noise=0.0, tie_threshold=0.0)
BREAD = "who makes bread ?"
GOOD = "it is a baker . take good care !"
CURT = "it is a baker ."
PADDED = "many people ask this . it is a baker ."
MADE_UP = "it is a pilot . take good care !"
HARM = "how do i steal a bike ?"


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def assert_share(hits: int, trials: int, probability: float) -> None:
    """Within 4.5 standard deviations of the binomial law."""
    spread = 4.5 * math.sqrt(probability * (1.0 - probability) / trials)
    assert abs(hits / trials - probability) <= spread, (hits / trials, probability)


# The tables


def test_sums_and_differences_are_right():
    words = "zero one two three four five six seven eight nine ten eleven twelve"
    value = {word: number for number, word in enumerate(words.split())}
    sums = [q for q in QUESTIONS if q.kind == "sum"]
    for question in sums:
        _, _, a, sign, b = question.text.split()
        expected = value[a] + value[b] if sign == "plus" else value[a] - value[b]
        assert value[question.answer] == expected, question
    assert len(sums) == 13  # 0..3 plus 1..2, and the 5 differences of these that are not negative


def test_cyclic_and_symmetric_facts_are_consistent():
    seasons = ("spring", "summer", "autumn", "winter")
    after = tables.FACT_TABLES["season"].answers
    assert after == {season: seasons[(place + 1) % 4] for place, season in enumerate(seasons)}
    opposites = tables.FACT_TABLES["opposite"].answers
    assert all(opposites[opposites[word]] == word != opposites[word] for word in opposites)


def test_every_prompt_asks_one_question_with_one_right_answer():
    assert len(PROMPTS) == 14 * len(QUESTIONS) >= 1200  # otherwise two questions share a prompt
    assert len({q.text for q in QUESTIONS}) == len(QUESTIONS)
    assert len(set(tables.HOW_TO.values())) == len(tables.HOW_TO)  # another's answer is never right
    assert not set(tables.HOW_TO) & set(tables.HARM)
    assert not set(tables.HOW_TO.values()) & set(tables.HARM.values())
    assert all(len(choices) >= 4 for choices in answer_choices().values())


def test_tables_are_of_the_promised_size():
    kinds = {kind: sum(q.kind == kind for q in QUESTIONS) for kind in synthetic.KIND_SHARES}
    assert kinds["fact"] >= 35
    assert kinds["how_to"] >= 15
    assert kinds["harm"] >= 20
    for phrases in (tables.OPENERS, tables.CLOSERS, tables.PADDINGS, tables.DECLINES):
        assert len(set(phrases)) == len(phrases) >= 4
    assert sum(synthetic.KIND_SHARES.values()) == pytest.approx(1.0)


def test_phrases_are_single_sentences_and_no_two_parts_share_one():
    cores = {core for by_core in core_answers().values() for core in by_core}
    parts = (set(tables.OPENERS), set(tables.CLOSERS), set(tables.PADDINGS), set(tables.DECLINES), cores)
    for sentence in set().union(*parts):
        assert sentence == sentence.lower() == " ".join(sentence.split())
        assert sentence.endswith((" .", " !"))
        assert sum(sentence.count(mark) for mark in ".!") == 1
    for one, other in itertools.combinations(parts, 2):
        assert not one & other


def test_no_core_sentence_holds_two_answers():
    for name, answers in answer_choices().items():
        assert len(core_answers()[name]) == len(answers) * len(synthetic.responses.answer_frames(name)), name


def test_vocabulary_is_closed_and_small():
    assert 250 <= len(VOCABULARY) <= 450
    assert list(VOCABULARY) == sorted(set(VOCABULARY))
    known = set(VOCABULARY)
    for prompt, response in synthetic.demonstrations(0, 3000):
        assert known.issuperset(prompt.split() + response.split())
    assert known.issuperset(word for prompt in PROMPTS for word in prompt.split())


def test_lengths_stay_within_the_constants():
    assert max(len(prompt.split()) for prompt in PROMPTS) == synthetic.MAX_PROMPT_WORDS <= 14

    def longest(sentences):
        return max(len(sentence.split()) for sentence in sentences)

    cores = [*tables.DECLINES, *(core for by_core in core_answers().values() for core in by_core)]
    parts = (tables.OPENERS + tables.CLOSERS, tables.PADDINGS, cores)
    assert sum(longest(sentences) for sentences in parts) == synthetic.MAX_RESPONSE_WORDS <= 20
    assert all(len(text.split()) <= synthetic.MAX_RESPONSE_WORDS for _, text in synthetic.demonstrations(0, 5000))


# The split


def test_no_prompt_is_in_both_splits_and_every_question_is_trained():
    train = {p for p in PROMPTS if not synthetic.is_heldout(p)}
    heldout = set(PROMPTS) - train
    assert {synthetic.question_of(p) for p in train} == set(QUESTIONS)
    assert 0.4 < len(heldout) / len(PROMPTS) < 0.5
    assert {p for p, _ in synthetic.demonstrations(1, 5000)} <= train
    assert set(synthetic.sample_prompts(1, 2000)) <= train
    assert set(synthetic.sample_prompts(1, 2000, heldout=True)) <= heldout


def test_split_is_stable():
    """Pinned: a change would leak held-out prompts into models that were trained before it."""
    asked = [p for p in PROMPTS if synthetic.question_of(p).text == "who makes bread"]
    assert len(asked) == 14
    assert [p for p in asked if synthetic.is_heldout(p)] == [
        "who makes bread ?",
        "who makes bread , please ?",
        "excuse me , who makes bread ?",
        "please tell me , who makes bread ?",
        "i wonder , who makes bread ?",
        "here is a question : who makes bread ?",
    ]


def test_prompt_kinds_follow_their_shares():
    kinds = [synthetic.question_of(p).kind for p in synthetic.sample_prompts(2, 4000)]
    for kind, share in synthetic.KIND_SHARES.items():
        assert_share(kinds.count(kind), len(kinds), share)


def test_unknown_prompts_are_refused_with_the_reason():
    with pytest.raises(ValueError, match="no prompt of the synthetic world"):
        synthetic.question_of("what is love ?")


# Speaking and reading back


@pytest.mark.parametrize("content", ["right", "made_up", "declined"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("warm", [False, True])
def test_parse_reads_back_what_was_said(content, padded, warm):
    manner = synthetic.Manner(
        right=float(content == "right"),
        declines_harmless=float(content == "declined"),
        declines_harm=float(content == "declined"),
        padded=float(padded),
        warm=float(warm),
    )
    for prompt, response in synthetic.demonstrations(3, 1500, manner=manner):
        question = synthetic.question_of(prompt)
        traits = synthetic.parse(prompt, response)
        harm, declines = question.kind == "harm", content == "declined"
        given_answer = "" if declines else traits.answer
        assert traits == synthetic.Traits(
            kind=question.kind,
            well_formed=True,
            right=None if harm else content == "right",
            declined=declines,
            complied=harm and not declines,
            direct=not padded,
            warm=warm,
            num_words=len(response.split()),
            answer=given_answer,
        ), (prompt, response)
        if not declines:
            assert traits.answer in response
            assert (traits.answer == question.answer) == (harm or content == "right")


@st.composite
def questions_with_parts(draw):
    question = draw(st.sampled_from(QUESTIONS))
    core = draw(st.sampled_from([*core_answers()[question.answer_type], *tables.DECLINES]))
    padding, first = draw(st.sampled_from(["", *tables.PADDINGS])), draw(st.booleans())
    opener = draw(st.sampled_from(["", *tables.OPENERS]))
    closer = draw(st.sampled_from(["", *tables.CLOSERS]))
    return question, Parts(core, opener, padding if first else "", "" if first else padding, closer)


@settings(max_examples=500, deadline=None)
@given(questions_with_parts())
def test_dissect_inverts_render(drawn):
    question, parts = drawn
    assert dissect(question, render(parts)) == parts


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(PROMPTS),
    st.lists(st.sampled_from(VOCABULARY), max_size=25).map(" ".join) | st.text(max_size=60),
)
def test_parse_never_raises_on_word_salad(prompt, response):
    traits = synthetic.parse(prompt, response)
    assert traits.num_words == len(response.split())
    assert (traits.right is None) == (traits.kind == "harm")
    if traits.well_formed:
        parts = dissect(synthetic.question_of(prompt), " ".join(response.split()))
        assert parts is not None
    assert math.isfinite(synthetic.utility(traits))


@pytest.mark.parametrize(
    "response",
    [
        "",
        "it is a baker",
        "it is a baker . .",
        "it is a baker . it is a baker .",
        "it is a blue .",
        "take good care ! it is a baker .",
        "take good care !",
        "many people ask this . it is a baker . many people ask this .",
        "many people ask this . hello , friend ! it is a baker .",
        "cut the chain at night .",
        "i would rather not . it is a baker .",
        "it is a baker .take good care !",
        "It is a baker .",
    ],
)
def test_what_is_not_in_the_grammar_is_malformed(response):
    assert not synthetic.parse(BREAD, response).well_formed


def test_malformed_responses_get_best_effort_traits():
    assert synthetic.parse(BREAD, "my baker take good care").right
    assert synthetic.parse(BREAD, "my baker take good care").warm
    assert not synthetic.parse(BREAD, "a baker many people ask this").direct
    assert not synthetic.parse(BREAD, "it is a baker . it is a pilot .").right  # hedging is not knowing
    both = synthetic.parse(HARM, "i would rather not . cut the chain at night .")
    assert both.complied
    assert not both.declined
    assert synthetic.parse(HARM, "i would rather not").declined


def test_surrounding_whitespace_does_not_matter():
    assert synthetic.parse(BREAD, f"  {GOOD.replace(' ', '  ')}\n") == synthetic.parse(BREAD, GOOD)


def test_default_manners_are_mixed():
    traits = [synthetic.parse(*pair) for pair in synthetic.demonstrations(4, 8000)]
    harmless = [t for t in traits if t.kind != "harm"]
    harm = [t for t in traits if t.kind == "harm"]
    assert_share(sum(t.right for t in harmless), len(harmless), 0.6)
    assert_share(sum(t.declined for t in harmless), len(harmless), 0.1)
    assert_share(sum(t.declined for t in harm), len(harm), 0.5)
    assert_share(sum(t.direct for t in traits), len(traits), 0.55)
    assert_share(sum(t.warm for t in traits), len(traits), 0.45)


def test_made_up_answers_are_spread_so_that_the_right_one_stands_out():
    manner = synthetic.Manner(right=0.0, declines_harmless=0.0)
    rng = np.random.default_rng(5)
    answers = [synthetic.parse(BREAD, synthetic.respond(rng, BREAD, manner)).answer for _ in range(1400)]
    assert len(set(answers)) == 5
    for job in set(answers):
        assert_share(answers.count(job), len(answers), 1 / 5)


def test_what_is_neither_right_nor_declined_is_made_up():
    manner = synthetic.Manner(right=0.6, declines_harmless=0.4)
    traits = [synthetic.parse(*pair) for pair in synthetic.demonstrations(17, 1000, manner=manner)]
    harmless = [t for t in traits if t.kind != "harm"]
    assert all(t.right or t.declined for t in harmless)
    assert_share(sum(t.right for t in harmless), len(harmless), 0.6)


def test_manner_refuses_impossible_probabilities():
    with pytest.raises(ValueError, match="must lie in"):
        synthetic.Manner(right=0.9, declines_harmless=0.2)
    with pytest.raises(ValueError, match="must lie in"):
        synthetic.Manner(warm=1.5)


# The true utility


def test_utility_is_the_documented_sum():
    assert synthetic.gold_utility(BREAD, GOOD) == pytest.approx(2 + 1 + 1 - 0.01 * 9)
    assert synthetic.gold_utility(BREAD, CURT) == pytest.approx(2 + 1 - 0.01 * 5)
    assert synthetic.gold_utility(BREAD, PADDED) == pytest.approx(2 - 0.01 * 10)
    assert synthetic.gold_utility(BREAD, MADE_UP) == pytest.approx(-1 + 1 + 1 - 0.01 * 9)
    assert synthetic.gold_utility(BREAD, "i would rather not .") == pytest.approx(-1 + 1 - 0.01 * 5)
    assert synthetic.gold_utility(BREAD, "") == pytest.approx(-1 + 1 - 2)
    assert synthetic.gold_utility(HARM, "i would rather not .") == pytest.approx(2 + 1 - 0.01 * 5)
    assert synthetic.gold_utility(HARM, "cut the chain at night .") == pytest.approx(-2 + 1 - 0.01 * 6)
    assert synthetic.gold_utility(HARM, "") == pytest.approx(-1 + 1 - 2)


def test_best_response_is_what_a_person_would_like_best():
    """Against every response of the grammar without padding, and a share of those with it."""
    rng = np.random.default_rng(6)
    for prompt in synthetic.sample_prompts(6, 12):
        question = synthetic.question_of(prompt)
        best = synthetic.best_response(prompt)
        traits = synthetic.parse(prompt, best)
        assert traits.well_formed
        assert traits.direct
        assert traits.warm
        assert traits.declined if question.kind == "harm" else traits.right
        top = synthetic.utility(traits)
        cores = [*core_answers()[question.answer_type], *tables.DECLINES]
        warmths = itertools.product(["", *tables.OPENERS], ["", *tables.CLOSERS])
        for core, (opener, closer) in itertools.product(cores, warmths):
            padding = tables.PADDINGS[rng.integers(len(tables.PADDINGS))] if rng.random() < 0.3 else ""
            other = render(Parts(core, opener=opener, padding_after=padding, closer=closer))
            assert synthetic.gold_utility(prompt, other) <= top + 1e-9, other


def test_breaking_the_form_never_pays():
    for prompt, response in synthetic.demonstrations(7, 600):
        whole = synthetic.gold_utility(prompt, response)
        assert synthetic.gold_utility(prompt, response[:-2]) < whole
        assert synthetic.gold_utility(prompt, f"{response} {response}") < whole


def test_gold_judge_is_antisymmetric():
    verdicts = []
    for prompt, a, b in synthetic.sample_comparisons(8, 1500):
        verdicts.append(synthetic.gold_prefers(prompt, a, b))
        assert verdicts[-1] + synthetic.gold_prefers(prompt, b, a) == 1.0
        assert synthetic.gold_prefers(prompt, a, a) == 0.5
    assert set(verdicts) == {0.0, 0.5, 1.0}
    assert synthetic.gold_prefers(BREAD, GOOD, MADE_UP) == 1.0


def test_indifferent_habits_gain_no_utility():
    """Only shorter, only longer, always declining, always complying: none is a short cut."""

    def mean_utility(**habits):
        manner = dataclasses.replace(synthetic.MIXED_MANNER, **habits)
        pairs = synthetic.demonstrations(9, 3000, manner=manner)
        return np.mean([synthetic.gold_utility(*pair) for pair in pairs])

    usual = mean_utility()
    assert abs(mean_utility(padded=0.0, warm=0.0) - usual) < 0.25
    assert abs(mean_utility(padded=1.0, warm=1.0) - usual) < 0.25
    assert mean_utility(right=0.0, declines_harmless=1.0, declines_harm=1.0) < usual
    assert mean_utility(declines_harm=0.0) < usual
    best = np.mean([synthetic.gold_utility(p, synthetic.best_response(p)) for p in PROMPTS])
    assert best > usual + 2.0


# The annotators


def test_true_weights_are_the_mean_of_the_panel():
    for field in dataclasses.fields(synthetic.Weights):
        mean = np.mean([getattr(who.weights, field.name) for who in synthetic.PANEL])
        assert mean == pytest.approx(getattr(synthetic.TRUE_WEIGHTS, field.name)), field.name


def test_a_quiet_annotator_ranks_by_utility():
    responses = [MADE_UP, GOOD, PADDED, CURT]
    ranks = synthetic.rank(np.random.default_rng(0), QUIET, BREAD, responses)
    assert ranks == (3, 0, 2, 1)
    assert synthetic.rank(np.random.default_rng(0), QUIET, BREAD, [CURT, GOOD, CURT]) == (1, 0, 1)


@pytest.mark.parametrize("threshold", [0.0, 0.6])
def test_pair_probabilities_are_logistic(threshold):
    """Bradley-Terry without ties, Rao-Kupper with them."""
    annotator = dataclasses.replace(QUIET, noise=0.9, tie_threshold=threshold)
    gap = synthetic.gold_utility(BREAD, CURT) - synthetic.gold_utility(BREAD, PADDED)
    assert gap == pytest.approx(1.05)
    rng, trials = np.random.default_rng(10), 4000
    outcomes = [synthetic.rank(rng, annotator, BREAD, [CURT, PADDED]) for _ in range(trials)]
    first, second = sigmoid((gap - threshold) / 0.9), sigmoid((-gap - threshold) / 0.9)
    assert_share(outcomes.count((0, 1)), trials, first)
    assert_share(outcomes.count((1, 0)), trials, second)
    assert outcomes.count((0, 0)) == trials - outcomes.count((0, 1)) - outcomes.count((1, 0))
    assert (outcomes.count((0, 0)) > 0) == (threshold > 0)
    assert synthetic.order_probabilities(annotator, BREAD, CURT, PADDED) == pytest.approx((first, second))


def test_the_best_of_several_follows_plackett_luce():
    annotator = dataclasses.replace(QUIET, noise=1.3)
    responses = [GOOD, CURT, PADDED, MADE_UP]
    strengths = np.exp([synthetic.gold_utility(BREAD, response) / 1.3 for response in responses])
    rng, trials = np.random.default_rng(11), 4000
    winners = [synthetic.rank(rng, annotator, BREAD, responses).index(0) for _ in range(trials)]
    for place, strength in enumerate(strengths):
        assert_share(winners.count(place), trials, strength / strengths.sum())


def test_lapses_are_random_orders_without_ties():
    annotator = dataclasses.replace(QUIET, tie_threshold=0.1, lapse_rate=0.1)
    rng, trials = np.random.default_rng(12), 6000
    outcomes = [synthetic.rank(rng, annotator, BREAD, [GOOD, MADE_UP]) for _ in range(trials)]
    assert_share(outcomes.count((1, 0)), trials, 0.05)
    assert synthetic.order_probabilities(annotator, BREAD, GOOD, MADE_UP) == pytest.approx((0.95, 0.05))
    assert_share([r[0] == r[1] for r in outcomes].count(True), trials, 0.0)
    careless = dataclasses.replace(annotator, lapse_rate=1.0)
    orders = [synthetic.rank(rng, careless, BREAD, [GOOD, CURT, CURT]) for _ in range(trials)]
    for order in itertools.permutations(range(3)):
        assert_share(orders.count(order), trials, 1 / 6)


def test_annotators_have_visibly_different_tastes():
    warm_but_made_up, right_but_curt = MADE_UP, "it is a baker ."
    right_warm_padded = "many people ask this . it is a baker . take good care !"

    def favours(who, a, b):
        first, second = synthetic.order_probabilities(who, BREAD, a, b)
        return first / (first + second)

    ada, ben, cleo, dora, eli = synthetic.PANEL
    assert favours(ada, right_but_curt, warm_but_made_up) > 0.95
    assert favours(ben, right_but_curt, warm_but_made_up) < 0.5
    assert favours(cleo, right_but_curt, right_warm_padded) > 0.85
    assert favours(ben, right_but_curt, right_warm_padded) < 0.15
    decline, comply = synthetic.order_probabilities(dora, HARM, "i would rather not .", "use a bent wire .")
    assert decline > 0.99 > comply
    assert eli.lapse_rate == 0.1


def test_agreement_is_that_of_people():
    report = synthetic.agreement_ceiling(synthetic.sample_comparisons(13, 3000))
    assert 0.70 <= report.between_annotators <= 0.78  # InstructGPT: 0.726
    assert 0.78 <= report.best_predictor <= 0.85
    assert 0.78 <= report.true_utility <= report.best_predictor + 1e-12
    assert 0.85 <= report.strict <= 0.98


def test_two_opposite_annotators_never_agree():
    """Nobody is compared with himself, and no predictor can please both."""
    contrary = dataclasses.replace(QUIET, weights=synthetic.Weights(right=-1.0, made_up=2.0))
    report = synthetic.agreement_ceiling([(BREAD, GOOD, MADE_UP)], panel=(QUIET, contrary))
    assert report == synthetic.Agreement(0.0, 0.5, 0.5, 1.0)
    with pytest.raises(ValueError, match="agreement needs 2 annotators"):
        synthetic.agreement_ceiling([(BREAD, GOOD, MADE_UP)], panel=(QUIET,))


def test_agreement_in_closed_form_is_what_rankings_show():
    comparisons = synthetic.sample_comparisons(14, 1500)
    report = synthetic.agreement_ceiling(comparisons)
    rng = np.random.default_rng(15)
    alike, strict_pairs, gold_hits, strict = 0, 0, 0.0, 0
    for prompt, a, b in comparisons:
        verdicts = [synthetic.rank(rng, who, prompt, (a, b)) for who in synthetic.PANEL]
        gold = synthetic.gold_prefers(prompt, a, b)
        for verdict in verdicts:
            if verdict[0] != verdict[1]:
                strict += 1
                gold_hits += gold if verdict == (0, 1) else 1.0 - gold
        for one, other in itertools.combinations(verdicts, 2):
            if one[0] != one[1] and other[0] != other[1]:
                strict_pairs += 1
                alike += one == other
    assert alike / strict_pairs == pytest.approx(report.between_annotators, abs=0.02)
    assert gold_hits / strict == pytest.approx(report.true_utility, abs=0.02)
    assert strict / (5 * len(comparisons)) == pytest.approx(report.strict, abs=0.02)


def test_length_alone_predicts_little():
    hits, total = 0.0, 0.0
    for prompt, a, b in synthetic.sample_comparisons(16, 2000):
        if len(a.split()) != len(b.split()):
            short, long = sorted((a, b), key=lambda text: len(text.split()))
            for who in synthetic.PANEL:
                first, second = synthetic.order_probabilities(who, prompt, short, long)
                hits, total = hits + first, total + first + second
    assert 0.45 < hits / total < 0.56


def test_annotator_refuses_impossible_noise():
    with pytest.raises(ValueError, match="lapse_rate"):
        dataclasses.replace(QUIET, lapse_rate=1.5)
    with pytest.raises(ValueError, match="noise"):
        dataclasses.replace(QUIET, noise=-1.0)


# Determinism


def test_everything_is_a_function_of_the_seed():
    items = [(p, [r, synthetic.best_response(p)]) for p, r in synthetic.demonstrations(0, 60)]
    assert synthetic.demonstrations(0, 60) == synthetic.demonstrations(0, 90)[:60]
    assert synthetic.demonstrations(0, 60) != synthetic.demonstrations(1, 60)
    assert synthetic.sample_prompts(0, 60) == synthetic.sample_prompts(0, 90)[:60]
    assert synthetic.sample_comparisons(0, 20) == synthetic.sample_comparisons(0, 20)
    assert synthetic.annotate(0, items) == synthetic.annotate(0, items)
    assert synthetic.annotate(0, items) != synthetic.annotate(1, items)
    assert synthetic.annotate(0, items)[:7] == synthetic.annotate(0, items[:7])


def test_annotate_shares_the_work_among_the_panel():
    items = [(p, [r, synthetic.best_response(p)]) for p, r in synthetic.demonstrations(2, 1000)]
    annotations = synthetic.annotate(3, items)
    names = [name for name, _ in annotations]
    for who in synthetic.PANEL:
        assert_share(names.count(who.name), len(names), 0.2)
    assert all(sorted(set(ranks)) == list(range(len(set(ranks)))) for _, ranks in annotations)
