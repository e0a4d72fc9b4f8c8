"""What one pair keeps for the backward pass in each mode of activation checkpointing, beside open_clip's own
model; and how many products are computed.

    python -m benchmarks.memory                                       ViT-L-14: a table, then one line of JSON
    python -m benchmarks.memory --model ViT-B-32 --precision fp32     another model

Bytes are of the tensors that autograd saves (torch's saved_tensors_hooks), per pair of noise, without
weights. "selective" is compiled, as in training. Products are those that run in one forward and backward pass
of one block of the image tower, counted by torch's profiler.
"""

import json
from collections.abc import Callable
from typing import Literal

import torch
import tyro
from torch import nn
from torch.profiler import profile
from torch.utils.checkpoint import checkpoint

from data_prep.errors import exit_on_user_error
from train.model.activation_memory import MODES, apply_checkpointing, blocks, dummy_batch
from train.model.clip import load
from train.model.text import MULTIPLE

PAIRS = 3  # of one pair, tokens times width has the shape of the positional embedding
PRODUCTS = (
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::baddbmm",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
)


class Part(nn.Module):
    """One function of a model, with the model's weights, as a module."""

    def __init__(self, model: nn.Module, function: Callable):
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.function(*inputs)


def count_products(step: Callable[[], None]) -> int:
    """Matrix products and attentions that run in step()."""
    with profile() as profiled:
        step()
    return sum(event.name in PRODUCTS for event in profiled.events())


def saved_bytes(towers: nn.Module, batch: tuple) -> int:
    """Bytes that a forward pass keeps for the backward pass, and that grow with the batch: no weights, nor
    casts of them.
    """
    kept: dict[int, tuple[int, torch.Tensor]] = {}
    weights = {tuple(parameter.shape) for parameter in towers.parameters()}
    weights |= {shape[::-1] for shape in weights}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tuple(tensor.shape) not in weights:
            storage = tensor.untyped_storage()
            # The tensor keeps its address from being reused.
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = towers(*batch)
    del outputs
    return sum(size for size, _ in kept.values())


def measure(name: str, length: int, precision: str) -> list[dict]:
    """A row for open_clip's model and one for each of our modes: MB per pair of both towers, and products."""
    torch.manual_seed(0)
    towers = load(f"{name}:none").towers.train()
    towers.bf16, model = precision == "bf16", towers.model
    images, tokens = dummy_batch(towers, PAIRS, torch.device("cpu"))
    cut = tokens[:, :length].clone()
    tokens[:, length - 1] = cut[:, -1] = model.vocab_size - 1  # the end of the caption
    pixels = images.float() / 255

    def row(who: str, image: Callable, text: Callable, whole: torch.Tensor, **kind) -> dict:
        parts = [(Part(model, image), (whole,)), (Part(model, text), (tokens,)), (Part(model, text), (cut,))]
        megabytes = []
        for part, inputs in parts if who == "ours" else parts[:2]:
            part(*inputs)  # compiles
            megabytes.append(saved_bytes(part, inputs) / PAIRS / 1e6)
        block, inputs = (
            blocks(model.visual)[0],
            torch.randn(1, len(model.visual.positional_embedding), model.visual.conv1.out_channels),
        )
        through = (
            checkpoint
            if model.visual.transformer.grad_checkpointing
            else lambda block, inputs, **_: block(inputs)
        )

        def step() -> None:
            through(autocast(block), inputs.requires_grad_(), use_reentrant=False).sum().backward()

        step()  # compiles
        count = count_products(step)
        return {
            "who": who,
            **kind,
            "image_mb": megabytes[0],
            "text_mb": megabytes[1],
            "cut_text_mb": megabytes[-1],
            "products": count,
        }

    def autocast(function: Callable) -> Callable:
        return torch.autocast("cpu", torch.bfloat16, enabled=towers.bf16)(function)

    rows = [row("open_clip", autocast(model.encode_image), autocast(model.encode_text), pixels, mode="eager")]
    for mode in MODES:
        apply_checkpointing(model, mode, compiled=mode == "selective")
        rows.append(row("ours", towers.image_features, towers.text_features, images, mode=mode))
    return rows


def main(
    model: str = "ViT-L-14", length: int = 3 * MULTIPLE, precision: Literal["bf16", "fp32"] = "bf16"
) -> None:
    """Args:
    model: An architecture of open_clip.
    length: Tokens of the longest caption in the batch.
    precision: bf16 is very slow on CPUs that have no instructions for it.
    """
    rows = measure(model, length, precision)
    eager = rows[0]["image_mb"] + rows[0]["text_mb"]
    print(
        f"| {model}, {precision} | image tower | text, 77 tokens | text, cut to {length} | both, cut, of"
        " eager's | products of a block |"
    )
    print("|---|---|---|---|---|---|")
    for row in rows:
        row["of_eager"] = (row["image_mb"] + row["cut_text_mb"]) / eager
        print(
            f"| {row['who']}, {row['mode']} | {row['image_mb']:.1f} MB | {row['text_mb']:.1f} MB |"
            f" {row['cut_text_mb']:.1f} MB | {row['of_eager']:.3f} | {row['products']} |"
        )
    print(json.dumps(rows))


if __name__ == "__main__":
    exit_on_user_error(lambda: tyro.cli(main, description=__doc__))
