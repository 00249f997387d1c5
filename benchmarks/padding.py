"""What real lengths cost: reward-model steps over pairs padded to one length, cut to buckets, cut in batches of like lengths.

    python benchmarks/padding.py --data shared/data/preferences/hh_helpful_base.jsonl.gz

Prints one JSON line a way: tokens computed per pair, the part of them that is text, programs compiled, and CPU seconds of an
epoch at 1.2 million parameters after a first epoch that compiles; the ways take turns.
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
    step_fn = rl.make_train_step(rl.reward_model(rl.causal_model(config)), optimizer)
    key = jax.random.key(0)
    params = {"trunk": rl.transformer.init(key, config), "head": rl.init_reward_head(key, config.model_dim)}
    steps, found = count // BATCH, {}
    for epoch in range(2):
        for name, (order, cut) in ways.items():
            state, step_jit = rl.init_train_state(params, optimizer), found.get(name, {}).get("step", jax.jit(step_fn))
            begin, tokens, text = time.process_time(), 0, 0
            for step in range(epoch * steps, (epoch + 1) * steps):
                rows = order(step)
                batch = cut(jax.tree.map(lambda x, rows=rows: x[rows], data))
                state, _ = step_jit(state, batch)
                tokens, text = tokens + batch.tokens.size, text + int((batch.segment_ids > 0).sum())
            jax.block_until_ready(state)
            seconds = time.process_time() - begin
            found[name] = {"step": step_jit, "tokens": tokens, "text": text, "seconds": seconds}
    for name, row in found.items():
        line = {
            "way": name,
            "pairs": steps * BATCH,
            "tokens_per_pair": round(row["tokens"] / (steps * BATCH), 1),
            "text": round(row["text"] / row["tokens"], 3),
            "programs": row["step"]._cache_size(),
            "cpu_seconds": round(row["seconds"], 1),
            "times_faster": round(found["one length"]["seconds"] / row["seconds"], 2),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=160)
    args = parser.parse_args()
    main(args.data, args.pairs)
