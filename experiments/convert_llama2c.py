"""A checkpoint of llama2.c (Karpathy 2023) as a Hugging Face folder, weights and tokenizer.

    python experiments/convert_llama2c.py --weights DIR/stories260K.bin --tokenizer DIR/tok512.bin --to runs/stories260K

Any tool that reads Hugging Face checkpoints then reads it, and so does `rlhf_jax.models.huggingface.load`. Deviation: its
rotary positions turn neighbouring pairs of dimensions, those of Hugging Face checkpoints pairs half a head apart, so the
rows of query and key are reordered within each head, which changes nothing else.
"""

import dataclasses
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from rlhf_jax.models import huggingface
from rlhf_jax.models.architecture import LayerKind, TransformerConfig
from rlhf_jax.models.rope import Rope
from rlhf_jax.types import Params

UNK, BOS, EOS = "<unk>", "<s>", "</s>"
NUM_FIRST = 3 + 256
"""Ids of the special tokens and of the bytes."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Which files."""

    weights: Path
    tokenizer: Path
    to: Path
    """Folder to write; one that exists is never overwritten."""


def read_weights(path: Path) -> tuple[TransformerConfig, Params]:
    """Header of seven int32, then float32 arrays one after the other; raises `ValueError` where the size is wrong."""
    dim, mlp_dim, num_layers, num_heads, num_kv_heads, vocab_size, length = np.fromfile(
        path, np.int32, count=7
    ).tolist()
    head_dim, tied = dim // num_heads, vocab_size > 0
    config = TransformerConfig(
        vocab_size=abs(vocab_size),
        num_layers=num_layers,
        model_dim=dim,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        mlp_dim=mlp_dim,
        kinds=(LayerKind(Rope(base=10_000.0)),),
        norm_eps=1e-5,
        tie_embeddings=tied,
    )
    flat, start = np.fromfile(path, np.float32, offset=28), 0

    def take(*shape: int) -> np.ndarray:
        nonlocal start
        size = int(np.prod(shape))
        if start + size > flat.size:
            raise ValueError(f"{path}: ends after {flat.size} numbers, more are needed. Fix: copy the file again")
        start += size
        return flat[start - size : start].reshape(shape)

    def heads(count: int, *, turned: bool) -> np.ndarray:
        """`[L, count * C, D]` as `[L, D, count, C]`."""
        matrix = take(num_layers, count, head_dim, dim)
        if turned:
            matrix = matrix.reshape(num_layers, count, head_dim // 2, 2, dim).swapaxes(2, 3)
        return np.moveaxis(matrix.reshape(num_layers, count, head_dim, dim), -1, 1)

    params = {"embedding": take(abs(vocab_size), dim)}
    layers = {"attention_norm": take(num_layers, dim)}
    layers["query"] = heads(num_heads, turned=True)
    layers["key"] = heads(num_kv_heads, turned=True)
    layers["value"] = heads(num_kv_heads, turned=False)
    layers["out"] = take(num_layers, dim, num_heads, head_dim).transpose(0, 2, 3, 1)
    layers["mlp_norm"] = take(num_layers, dim)
    layers["gate"] = take(num_layers, mlp_dim, dim).swapaxes(1, 2)
    layers["down"] = take(num_layers, dim, mlp_dim).swapaxes(1, 2)
    layers["up"] = take(num_layers, mlp_dim, dim).swapaxes(1, 2)
    params |= {"layers": layers, "final_norm": take(dim)}
    take(2, length, head_dim // 2)  # tables of cosines and sines
    if not tied:
        params["unembedding"] = take(abs(vocab_size), dim)
    if start != flat.size:
        raise ValueError(f"{path}: holds {flat.size} numbers, its header says {start}. Fix: copy the file again")
    return config, params


def read_pieces(path: Path) -> list[str]:
    """The vocabulary, best merges first; a space is written as SentencePiece does."""
    data, pieces, at = path.read_bytes(), [], 4
    while at < len(data):
        _, size = struct.unpack_from("<fi", data, at)
        pieces.append(data[at + 8 : at + 8 + size].decode("utf-8").replace(" ", "▁"))
        at += 8 + size
    return [UNK, BOS, EOS, *pieces[3:]]


def build_tokenizer(pieces: list[str]) -> PreTrainedTokenizerFast:
    """Byte-pair merges in the order of the pieces; unknown characters become bytes; one space before the text."""
    ids = {piece: i for i, piece in enumerate(pieces)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces[NUM_FIRST:]
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    backend = Tokenizer(models.BPE(ids, merges, unk_token=UNK, fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (UNK, BOS, EOS)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=UNK, bos_token=BOS, eos_token=EOS)


def main(config: Config) -> None:
    """Convert."""
    network, arrays = read_weights(config.weights)
    tokenizer = build_tokenizer(read_pieces(config.tokenizer))
    hf_config = {
        **huggingface.llama_config(network),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "max_position_embeddings": 512,
    }
    params = jax.tree.map(jnp.asarray, arrays)
    huggingface.save(config.to, params, hf_config, extra_files=lambda folder: tokenizer.save_pretrained(str(folder)))
    print(f"{config.to}: {network.num_layers} layers of width {network.model_dim}, {network.vocab_size} tokens")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
