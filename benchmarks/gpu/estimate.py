"""Where the time of a step should go, from FLOP and bytes alone. Estimates, not measurements: they are
printed beside what is measured, so that the first run says where they are wrong.

Assumptions, beside the two ceilings (a square product, a copy):
- products reach PRODUCTS of the fastest square one, attention ATTENTION of it; backward is twice forward,
  for attention 2.5 times (it computes its scores again);
- all else is bound by memory. A "width" is one bf16 value per token and channel. NORMS widths per block are
  read and written by norms, activations, residual sums and bias gradients, each once, fused by inductor;
  COPIES by copies of q, k and v (28 with nn.MultiheadAttention);
- per parameter: clipping 12 B, AdamW 28 B, bf16 casts 12 B, each once per step.
"""

from dataclasses import dataclass

import open_clip

PRODUCTS, ATTENTION = 0.8, 0.35
NORMS, COPIES = 46, 6
PARAMETER_BYTES = 12 + 28 + 12
CEILINGS = {"matmul_tflop_per_s": 790.0, "copy_tb_per_s": 4.0}  # of an H200: measured; assumed


@dataclass(frozen=True)
class Tower:
    """A transformer: `tokens` of one image or caption."""

    layers: int
    width: int
    tokens: int

    @property
    def product_flop(self) -> int:
        """Of one forward pass of its blocks, with an MLP of four widths; attention apart."""
        return self.layers * 24 * self.tokens * self.width**2

    @property
    def attention_flop(self) -> int:
        return self.layers * 4 * self.tokens**2 * self.width

    @property
    def width_bytes(self) -> int:
        """Of one width in each of its blocks, read or written once."""
        return self.layers * 2 * self.tokens * self.width


def towers_of(model: str, tokens: int) -> tuple[Tower, Tower, int]:
    """Both towers of an open_clip architecture, and its parameters, about.

    Args:
        tokens: of a caption.
    """
    config = open_clip.get_model_config(model)
    vision, text = config["vision_cfg"], config["text_cfg"]
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    image = Tower(vision["layers"], vision["width"], patches + 1)
    caption = Tower(text["layers"], text["width"], min(tokens, text["context_length"]))
    parameters = sum(12 * tower.layers * tower.width**2 for tower in (image, caption))
    parameters += text["vocab_size"] * text["width"] + 3 * vision["patch_size"] ** 2 * vision["width"]
    return image, caption, parameters


def estimate(model: str, pairs: int, tokens: int, ceilings: dict[str, float] = CEILINGS) -> dict[str, float]:
    """Milliseconds of one step without checkpointing, in bf16, by what they are spent on."""
    image, caption, parameters = towers_of(model, tokens)
    flop_per_ms, bytes_per_ms = ceilings["matmul_tflop_per_s"] * 1e9, ceilings["copy_tb_per_s"] * 1e9
    products = sum(tower.product_flop for tower in (image, caption))
    attention = sum(tower.attention_flop for tower in (image, caption))
    width = pairs * sum(tower.width_bytes for tower in (image, caption))
    times = {
        "products": 3 * pairs * products / (PRODUCTS * flop_per_ms),
        "attention": 3.5 * pairs * attention / (ATTENTION * flop_per_ms),
        "norms, activations, sums": NORMS * width / bytes_per_ms,
        "copies": COPIES * width / bytes_per_ms,
        "optimizer": parameters * PARAMETER_BYTES / bytes_per_ms,
    }
    return times | {"step": sum(times.values())}


# Which of these a kernel belongs to, by a part of its name; the first that fits.
KINDS = {
    "attention": ("attention", "flash", "fmha", "mha_"),
    "optimizer": ("adam", "multi_tensor", "foreach", "lpnorm"),
    "products": ("gemm", "nvjet", "cutlass", "cublas", "xmma", "mm", "conv", "wgrad", "dgrad", "fprop"),
    "copies": ("copy", "memcpy", "catarray", "aten::clone", "aten::to"),
}


def kind_of(kernel: str) -> str:
    name = kernel.lower()
    if name.startswith("triton"):
        return "norms, activations, sums"
    found = (kind for kind, parts in KINDS.items() if any(part in name for part in parts))
    return next(found, "norms, activations, sums")
