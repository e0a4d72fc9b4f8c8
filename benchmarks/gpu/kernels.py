"""Parts of the step alone: attention by each kernel, and the patch embedding as a product."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.apart import Apart

KERNELS = (None, SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


def attention(apart: Apart) -> Iterator[tuple[str, Callable[[], dict]]]:
    """Forward and backward of all blocks of the image tower, by each kernel."""
    visual = apart.state.clip.towers.model.visual
    width, tokens = visual.conv1.out_channels, len(visual.positional_embedding)
    blocks = visual.transformer.resblocks
    heads = blocks[0].attn.num_heads
    dtype = torch.bfloat16 if apart.cuda else torch.float32
    shape = (apart.sizes.batch, heads, tokens, width // heads)
    q, k, v, gradient = torch.randn(4, *shape, device=apart.device, dtype=dtype)
    inputs = [tensor.requires_grad_() for tensor in (q, k, v)]

    def measure(kernel: SDPBackend | None) -> dict:
        def work() -> None:
            torch.autograd.grad(F.scaled_dot_product_attention(q, k, v), inputs, gradient)

        with sdpa_kernel(kernel) if kernel else nullcontext():
            taken = F.scaled_dot_product_attention(q, k, v).grad_fn.name()
            work()
            return {"ms": 1e3 * len(blocks) * apart.timed(work, 20)[0], "taken": taken}

    for kernel in KERNELS if apart.cuda else (None,):
        name = f"attention: {kernel.name.lower() if kernel else 'as torch chooses'}"
        yield name, lambda kernel=kernel: measure(kernel)


def patch_embedding(apart: Apart) -> Iterator[tuple[str, Callable[[], dict]]]:
    """Forward and backward of the patch embedding, as a convolution and as a product."""
    convolution = apart.state.clip.towers.model.visual.conv1
    side, stride = apart.state.clip.image_size[0], convolution.kernel_size[0]
    pixels = torch.randn(apart.sizes.batch, 3, side, side, device=apart.device)

    def by_product() -> torch.Tensor:
        return F.linear(F.unfold(pixels, stride, stride=stride).mT, convolution.weight.flatten(1))

    def by_view() -> torch.Tensor:
        n = side // stride
        cut = pixels[..., : n * stride, : n * stride].reshape(-1, 3, n, stride, n, stride)
        return F.linear(
            cut.permute(0, 2, 4, 1, 3, 5).reshape(-1, n * n, 3 * stride * stride),
            convolution.weight.flatten(1),
        )

    for name, forward in (
        ("convolution", lambda: convolution(pixels)),
        ("unfold and product", by_product),
        ("view and product", by_view),
    ):

        def work(forward: Callable = forward) -> None:
            with torch.autocast(apart.device.type, torch.bfloat16, enabled=apart.cuda):
                output = forward()
            output.sum().backward()

        def measure(work: Callable = work) -> dict:
            work()
            milliseconds = 1e3 * apart.timed(work, 20)[0]
            convolution.weight.grad = None
            return {"ms": milliseconds}

        yield f"patch embedding: {name}", measure
