"""Both towers for onnxruntime, for inference without torch and open_clip.

image.onnx   pixels fp32 [b, 3, H, W], normalised   -> features fp32 [b, d], L2-normed
text.onnx    tokens int64 [b, L]                    -> features fp32 [b, d], L2-normed
"""

import logging
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from train.export.reference import Outputs, max_difference

# onnxruntime fuses and reorders operations: 2e-7 was measured for ViT-L/14. A wrong graph differs by 1e-2 and
# more.
BOUND = 1e-4
# A protobuf, and so an .onnx file, holds at most 2 GiB; above that the weights are in .onnx.data beside it.
ONE_FILE_BYTES = 1_900_000_000


class _Tower(nn.Module):
    """One tower as a function of one input, with L2-normed output."""

    def __init__(self, model: nn.Module, encode: str):
        super().__init__()
        self.model, self.encode = model, encode

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return F.normalize(getattr(self.model, self.encode)(inputs), dim=-1)


def write(model: nn.Module, folder: Path, pixels: torch.Tensor, tokens: torch.Tensor) -> None:
    """Write image.onnx and text.onnx of an open_clip model, for any batch size.

    Args:
        pixels, tokens: at least two of each, for tracing.
    """
    for name, encode, input_name, inputs in (
        ("image", "encode_image", "pixels", pixels),
        ("text", "encode_text", "tokens", tokens),
    ):
        tower = _Tower(model, encode).eval()
        large = sum(tensor.nbytes for tensor in model.state_dict().values()) > ONE_FILE_BYTES
        logging.disable(logging.WARNING)
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")  # torch warns about its own internals
                torch.onnx.export(
                    tower,
                    (inputs[:2],),
                    folder / f"{name}.onnx",
                    input_names=[input_name],
                    output_names=["features"],
                    dynamic_shapes=({0: torch.export.Dim("batch")},),
                    dynamo=True,
                    external_data=large,
                    verbose=False,
                )
        finally:
            logging.disable(logging.NOTSET)


def compare(folder: Path, pixels: torch.Tensor, tokens: torch.Tensor, expected: Outputs) -> dict[str, float]:
    """The largest differences of onnxruntime's features, in one batch and for a single input."""
    import onnxruntime

    differences = {}
    for name, inputs, features in (
        ("image", pixels, expected.image_features),
        ("text", tokens, expected.text_features),
    ):
        session = onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
        input_name = session.get_inputs()[0].name
        batched, single = (
            torch.from_numpy(session.run(None, {input_name: batch.numpy()})[0])
            for batch in (inputs, inputs[:1])
        )
        differences[f"{name}_features"] = max(
            max_difference(batched, features), max_difference(single, features[:1])
        )
    return differences
