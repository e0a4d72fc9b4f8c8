"""The large model's step taken apart, on a batch of noise that is already on the device.

python -m benchmarks.gpu.step OUT DEADLINE SHARDS dry|full       rows that OUT does not hold yet
"""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.gpu.apart import Apart, Row
from benchmarks.gpu.kernels import attention, patch_embedding
from benchmarks.gpu.record import WHOLE, Record
from benchmarks.gpu.sizes import DRY, Sizes
from benchmarks.gpu.smoke import isolated

PART = "step"


def rows(sizes: Sizes, whole: int) -> list[Row]:
    """In order of value.

    Args:
        whole: tokens of a caption that fills the context.
    """
    batch, tokens, steps = sizes.batch, min(sizes.tokens, whole), sizes.steps
    few = -(-steps // 3)
    return [
        Row("none", batch, batch, tokens, steps),
        Row("selective", batch, batch, tokens, few),
        Row("none", sizes.huge, batch, tokens, 1),
        Row("none", sizes.larger, sizes.larger, tokens, few),
        Row("none", batch, batch, whole, few),
        Row("full", batch, batch, tokens, few),
        Row("none", batch, batch, tokens, few, compiled=False),
        Row("selective", sizes.larger, sizes.larger, tokens, few),
        Row("full", sizes.larger, sizes.larger, tokens, few),
    ]


def checks(apart: Apart) -> Iterator[tuple[str, Callable[[], dict]]]:
    """All, in order of value; each is computed when it is called."""
    first, *others = rows(apart.sizes, apart.state.clip.towers.context_length)
    yield "ceilings", apart.measure_ceilings
    yield first.name, lambda: apart.measure(first)
    yield "host syncs", lambda: apart.count_syncs(first)
    yield "kernels", lambda: apart.profile(first)
    yield others[0].name, lambda: apart.measure(others[0])
    yield others[1].name, lambda: apart.measure(others[1])
    yield from attention(apart)
    yield from patch_embedding(apart)
    for row in others[2:]:
        yield row.name, lambda row=row: apart.measure(row)


def main(out: str, deadline: str, data: str, size: str) -> None:
    record = Record(Path(out), float(deadline))
    done = {line["name"] for line in record.notes() if line["part"] == PART}
    apart = Apart(record, DRY if size == "dry" else Sizes(), data)
    longest_s, left_out = 0.0, []
    for name, check in checks(apart):
        if name in done:
            continue
        if record.left_s < longest_s:
            left_out.append(name)
            continue
        started = time.time()
        record.begin(PART, name)
        found = isolated(check)
        record.note(PART, name, **found)
        longest_s = max(longest_s, time.time() - started)
        apart.state.optimizer.zero_grad()
        if apart.cuda:
            torch.cuda.empty_cache()
    record.note(PART, WHOLE, **({"left out": left_out} if left_out else {}))


if __name__ == "__main__":
    main(*sys.argv[1:])
