"""The host's work for the next step, done while the devices are busy with this one."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Batch = TypeVar("Batch")


def prefetched(make_batch: Callable[[int], Batch], steps: Iterable[int]) -> Iterator[tuple[int, Batch]]:
    """`(step, make_batch(step))` of every step in order; the next one is made, in a thread, before the caller asks for it.

    For work that costs time on the host: reading, tokenising, collating, placing on devices. `make_batch` is a function of
    the step alone, of which one call runs at a time. What it raises is raised when its step's turn has come, not before.
    One more batch is alive than without.
    """
    with ThreadPoolExecutor(1, "prefetch") as pool:
        pending = []
        for step in steps:
            pending.append((step, pool.submit(make_batch, step)))
            if len(pending) == 2:
                before, batch = pending.pop(0)
                yield before, batch.result()
        for step, batch in pending:
            yield step, batch.result()
