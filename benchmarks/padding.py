"""What real lengths cost: reward-model steps over pairs padded to one length, cut to buckets, cut in batches of like lengths.

    python benchmarks/padding.py --data shared/data/preferences/hh_helpful_base.jsonl.gz

Prints one JSON line a way: tokens computed per pair, the part of them that is text, programs compiled, and seconds of an epoch
at 1.2 million parameters once they are compiled.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path

import jax

import rlhf_jax as rl
from rlhf_jax.data import batching, chat, padding
from rlhf_jax.data.lengths import drop_overlong, fit_rankings
from rlhf_jax.data.preferences import preference_ranking, read_preferences
from rlhf_jax.data.tokenizers import train_bpe

BATCH, LENGTH, VOCAB, BUCKETS = 8, 512, 1024, (64, 128, 192, 256, 384, 512)


def pairs(path, most):
    """Token ids of pairs that fit, by a BPE trained on all."""
    records, _ = read_preferences(path)
    texts = [text for r in records for text in (*(m.content for m in r.prompt), r.chosen, r.rejected)]
    tokenizer = train_bpe(texts, vocab_size=VOCAB)
    ids = [chat.encode_ranking(tokenizer, preference_ranking(record)) for record in records]
    return tokenizer, fit_rankings(ids, length=LENGTH, overlong=drop_overlong)[0][:most]


def main(path, most):
    """The three ways over one data set."""
    tokenizer, examples = pairs(path, most)
    collate = partial(batching.ranking_batch, length=LENGTH, num_responses=2, pad_id=0, vocab_size=tokenizer.vocab_size)
    data, count = collate(examples), len(examples)
    lengths = (data.segment_ids > 0).sum(axis=-1).max(axis=-1)
    trim = partial(padding.trim, buckets=BUCKETS)
    random = partial(batching.batch_indices, 0, num_examples=count, batch_size=BATCH)
    alike = partial(padding.alike_batch_indices, 0, lengths=lengths, batch_size=BATCH)
    ways = {"one length": (random, lambda batch: batch), "cut to buckets": (random, trim), "alike, cut": (alike, trim)}
    config = rl.TransformerConfig(
        vocab_size=tokenizer.vocab_size,
        num_layers=4,
        model_dim=128,
        num_heads=4,
        num_kv_heads=4,
        head_dim=32,
        mlp_dim=512,
    )
    optimizer = rl.adam_optimizer(1e-4)
    step_fn = jax.jit(rl.make_train_step(rl.reward_model(rl.causal_model(config)), optimizer))
    key = jax.random.key(0)
    params = {"trunk": rl.transformer.init(key, config), "head": rl.init_reward_head(key, config.model_dim)}
    state, steps, plain = rl.init_train_state(params, optimizer), range(count // BATCH), None
    for name, (order, cut) in ways.items():

        def batch_of(step, order=order, cut=cut):
            rows = order(step)
            return cut(jax.tree.map(lambda x: x[rows], data))

        batches = [batch_of(step) for step in steps]
        widths = {batch.tokens.shape[-1]: batch for batch in batches}
        for batch in widths.values():
            jax.block_until_ready(step_fn(state, batch))
        seconds = timed(step_fn, state, map(batch_of, steps))
        plain, tokens = plain or seconds, sum(batch.tokens.size for batch in batches)
        line = {
            "way": name,
            "pairs": BATCH * len(batches),
            "tokens_per_pair": round(tokens / (BATCH * len(batches)), 1),
            "text": round(sum(int((batch.segment_ids > 0).sum()) for batch in batches) / tokens, 3),
            "programs": len(widths),
            "seconds": round(seconds, 1),
            "times_faster": round(plain / seconds, 2),
        }
        print(json.dumps(line), flush=True)


def timed(step_fn, state, batches):
    """Seconds of steps over the batches, the host's work included."""
    begin = time.perf_counter()
    for batch in batches:
        state, _ = step_fn(state, batch)
    jax.block_until_ready(state)
    return time.perf_counter() - begin


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=160)
    args = parser.parse_args()
    main(args.data, args.pairs)
