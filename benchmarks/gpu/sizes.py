"""The models and batches of the benchmark on a GPU, and the tiny ones of a rehearsal on a CPU."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """Attributes:
    small, large: models, with random weights.
    smoke_batch: pairs of a step of the small model in the runs that are killed and resumed.
    batch, larger, huge: pairs of a step of the large model; `batch` is the chunk of `huge`.
    small_batch: of the small model where it is timed.
    steps: that are timed, at batch `batch`.
    """

    small: str = "ViT-B-32:none"
    large: str = "ViT-L-14:none"
    smoke_batch: int = 512
    batch: int = 64
    larger: int = 256
    huge: int = 8192
    small_batch: int = 512
    steps: int = 20
    tokens: int = 24
    workers: int = 12
    precision: str = "bf16"


TINY = "demo-vit:none"
DRY = Sizes(TINY, TINY, 64, 8, 16, 20, 16, 2, 8, 1, "fp32")
