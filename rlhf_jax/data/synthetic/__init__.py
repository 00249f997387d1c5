"""The embedded world: conversations that the library generates, judges and ranks itself.

Little facts and sums, how-to questions, and requests that should be declined; responses that are right or
made up, direct or padded, warm or curt, declining or complying. A grammar writes them, so every model output
can be read back (`parse`) and scored by the true utility: a gold judge, in words that a person can check by
eye. Everything is a pure function of its seed; prompts and responses are plain strings.
"""

from rlhf_jax.data.synthetic.annotators import (
    PANEL,
    TRUE_WEIGHTS,
    Agreement,
    Annotator,
    Weights,
    agreement_ceiling,
    annotate,
    gold_prefers,
    gold_utility,
    order_probabilities,
    rank,
    sample_comparisons,
    utility,
)
from rlhf_jax.data.synthetic.prompts import (
    HELDOUT_PERCENT,
    KIND_SHARES,
    MAX_PROMPT_WORDS,
    Kind,
    Question,
    all_prompts,
    all_questions,
    is_heldout,
    question_of,
    sample_prompts,
)
from rlhf_jax.data.synthetic.responses import (
    MAX_RESPONSE_WORDS,
    MIXED_MANNER,
    Manner,
    Traits,
    best_response,
    demonstrations,
    parse,
    respond,
    vocabulary,
)

__all__ = [
    "HELDOUT_PERCENT",
    "KIND_SHARES",
    "MAX_PROMPT_WORDS",
    "MAX_RESPONSE_WORDS",
    "MIXED_MANNER",
    "PANEL",
    "TRUE_WEIGHTS",
    "Agreement",
    "Annotator",
    "Kind",
    "Manner",
    "Question",
    "Traits",
    "Weights",
    "agreement_ceiling",
    "all_prompts",
    "all_questions",
    "annotate",
    "best_response",
    "demonstrations",
    "gold_prefers",
    "gold_utility",
    "is_heldout",
    "order_probabilities",
    "parse",
    "question_of",
    "rank",
    "respond",
    "sample_comparisons",
    "sample_prompts",
    "utility",
    "vocabulary",
]
