"""Collectives of programs whose traffic is known: written by hand with `shard_map`, and as text of other backends."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from rlhf_jax.runtime.collectives import Traffic, count_collectives
from rlhf_jax.runtime.sharding import make_mesh

ROWS = PartitionSpec("data")
SWAP = [(0, 1), (1, 0)]


def compiled(function, *arguments, out=ROWS):
    on_mesh = jax.shard_map(function, mesh=make_mesh(), in_specs=ROWS, out_specs=out, check_vma=False)
    return jax.jit(on_mesh).lower(*arguments).compile()


def test_every_kind_with_the_bytes_of_its_shapes():
    """`x` is `[8, 3]` on each of the two devices."""

    def all_kinds(x):
        return (
            jax.lax.psum(x, "data"),
            jax.lax.all_gather(x.astype(jnp.int16), "data"),
            jax.lax.psum_scatter(2 * x, "data", tiled=True),
            jax.lax.all_to_all(x, "data", 0, 0, tiled=True),
            jax.lax.ppermute(x[:1], "data", SWAP),
        )

    counted = count_collectives(compiled(all_kinds, jnp.ones((16, 3))))
    assert counted == {
        "all-reduce": Traffic(1, 8 * 3 * 4),
        "all-gather": Traffic(1, 2 * 8 * 3 * 2),
        "reduce-scatter": Traffic(1, 8 * 3 * 4),
        "all-to-all": Traffic(1, 8 * 3 * 4),
        "collective-permute": Traffic(1, 3 * 4),
    }


def test_a_loop_counts_once_and_can_be_looked_at_alone():
    def loop(x):
        def body(total, row):
            return jax.lax.cond(row[0] > 0, lambda: total + jax.lax.psum(row, "data"), lambda: total), None

        return jax.lax.scan(body, jnp.zeros(3), x)[0] + jax.lax.psum(x.sum(), "data")

    program = compiled(loop, jnp.ones((16, 3)), out=PartitionSpec())
    assert count_collectives(program) == {"all-reduce": Traffic(2, 3 * 4 + 4)}
    assert count_collectives(program, in_loops=True) == {"all-reduce": Traffic(1, 3 * 4)}


def test_one_device_sends_nothing():
    assert count_collectives(jax.jit(lambda x: x.sum()).lower(jnp.ones(3)).compile()) == {}


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (
            "  %s = (f32[4]{0:T(128)}, f32[32]{0:T(128)}) all-gather-start(%x), channel_id=1, dimensions={0}\n"
            "  %d = f32[32]{0:T(128)} all-gather-done(%s)",
            {"all-gather": Traffic(1, 128)},
        ),
        (
            "  %s = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1}}\n"
            "  %d = f32[4]{0} collective-permute-done(%s)",
            {"collective-permute": Traffic(1, 16)},
        ),
        (
            "  %s = (f32[4]{0}, pred[3]{0}, /*index=2*/s4[5]{0}) all-reduce(%x, %y, /*index=2*/%z), to_apply=%add",
            {"all-reduce": Traffic(1, 16 + 3 + 3)},
        ),
        (
            "  %s = f32[4]{0} all-reduce-start(%x), to_apply=%add\n  ROOT %d = f32[4]{0} all-reduce-done(%s)",
            {"all-reduce": Traffic(1, 16)},
        ),
        ("  ROOT %d = f8e4m3fn[6]{0} ragged-all-to-all(%w, %x)", {"all-to-all": Traffic(1, 6 + 16)}),
        ('  ROOT %d = f32[4]{0} add(%x, %x), metadata={op_name="all-reduce(%x)"}', {}),
    ],
)
def test_forms_of_other_backends(lines, expected):
    """Asynchronous pairs, tuples, tiled layouts, odd dtypes."""
    text = f"""HloModule m

ENTRY %main (x: f32[4]) -> f32[4] {{
  %x = f32[4]{{0:T(128)}} parameter(0)
  %y = pred[3]{{0}} parameter(1)
  %z = s4[5]{{0}} parameter(2)
  %w = f8e4m3fn[6]{{0}} parameter(3)
{lines}
}}
"""
    assert count_collectives(text) == expected


def test_fusions_of_a_tpu():
    """One gather in three parts, named in each, and a reduce-scatter that is an all-reduce inside a fusion of that name."""
    gather = "%g = f32[32]{{0:T(128)}} all-gather(%p), channel_id=7, dimensions={{0}}\n"
    target = 'custom_call_target="AsyncCollective{}"'
    fusions = {
        "fused_computation.1": f"  {gather}  ROOT %r = f32[32]{{0}} custom-call(%g), {target.format('Start')}",
        "async_collective_fusion.2": f"  {gather}  ROOT %r = f32[32]{{0}} add(%g, %g)",
        "fused_computation.3": f"  {gather}  ROOT %r = f32[32]{{0}} custom-call(%g), {target.format('Done')}",
        "all-reduce-scatter.4": "  %s = f32[4]{0} all-reduce(%p), to_apply=%add\n  ROOT %r = f32[1]{0} dynamic-slice(%s, %i)",
    }
    text = "\n".join(
        f"%{name} (p: f32[4]) -> f32[32] {{\n  %p = f32[4]{{0:T(128)}} parameter(0)\n{body}\n}}\n"
        for name, body in fusions.items()
    )
    assert count_collectives(text) == {"all-gather": Traffic(1, 128), "reduce-scatter": Traffic(1, 16)}
