"""Both towers for onnxruntime and transformers.js, for inference without torch and open_clip.

onnx/vision_model.onnx   pixel_values fp32 [b, 3, H, W], normalised  -> image_embeds fp32 [b, d], L2-normed
onnx/text_model.onnx     input_ids, attention_mask int64 [b, L]      -> text_embeds fp32 [b, d], L2-normed
onnx/*_quantized.onnx    the same with int8 weights, a quarter of the size

The names of files, inputs and outputs are those that transformers.js and Optimum give CLIP. L is as short as
the longest caption where the tower is causal, else the context length. attention_mask changes nothing: a
causal tower does not see padding, and others find it in input_ids.
"""

import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from train.export.reference import Outputs, max_difference
from train.model.text import causal_tower, encode_causal

FOLDER = "onnx"
VISION, TEXT, QUANTIZED = "vision_model", "text_model", "_quantized"
# onnxruntime fuses and reorders operations: 2e-7 was measured for ViT-L/14. A wrong graph differs by 1e-2 and
# more.
BOUND = 1e-4
# A protobuf, and so an .onnx file, holds at most 2 GiB; above that the weights are in .onnx_data beside it,
# as transformers.js names it.
ONE_FILE_BYTES = 1_900_000_000


class _Vision(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.model.encode_image(pixel_values), dim=-1)


class _Text(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        tower = causal_tower(self.model)
        features = self.model.encode_text(input_ids) if tower is None else encode_causal(tower, input_ids)
        return F.normalize(features, dim=-1)


def write(model: nn.Module, folder: Path, pixels: torch.Tensor, tokens: torch.Tensor) -> None:
    """Write both towers of an open_clip model, for any batch size, and both again in int8.

    Args:
        pixels, tokens: at least two of each, for tracing.
    """
    (folder / FOLDER).mkdir()
    for name, example in ((VISION, pixels), (TEXT, tokens)):
        path = folder / FOLDER / f"{name}.onnx"
        quantize(path, write_tower(model, name, path, example))


def write_tower(model: nn.Module, name: str, path: Path, example: torch.Tensor) -> bool:
    """Write VISION or TEXT of an open_clip model, for any batch size, in fp32.

    Args:
        example: pixels or tokens, at least two, for tracing.

    Returns:
        Whether the weights are in a file beside `path`, because they are too large for one.
    """
    shape = {0: torch.export.Dim("batch")}
    if name == VISION:
        tower, inputs, output = _Vision(model), {"pixel_values": example[:2]}, "image_embeds"
    else:
        tower, ids, output = _Text(model), example[:2], "text_embeds"
        inputs = {"input_ids": ids, "attention_mask": ids * 0 + 1}
        if causal_tower(model) is not None:
            shape[1] = torch.export.Dim("sequence", max=ids.shape[1])
    large = sum(tensor.nbytes for tensor in model.state_dict().values()) > ONE_FILE_BYTES
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            tower.eval(),
            kwargs=inputs,
            input_names=list(inputs),
            output_names=[output],
            dynamic_shapes=dict.fromkeys(inputs, shape),
            dynamo=True,
            verbose=False,
        )
        program.save(path, external_data=large)
    return large


def quantize(path: Path, large: bool = False) -> None:
    """Write an .onnx file again with int8 weights; activations are quantized as they come (dynamically).

    The convolution that embeds patches stays in fp32: it is small, and int8 costs most there.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        path,
        path.with_stem(f"{path.stem}{QUANTIZED}"),
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["MatMul", "Gemm", "Gather"],
        use_external_data_format=large,
        extra_options={"MatMulConstBOnly": True},
    )


def features(
    folder: Path, pixels: Iterable[torch.Tensor], tokens: Iterable[torch.Tensor], suffix: str = ""
) -> tuple[torch.Tensor, torch.Tensor]:
    """image_embeds and text_embeds of batches, by onnxruntime on the CPU.

    Args:
        suffix: QUANTIZED for the int8 files.
    """
    import onnxruntime

    sessions = [
        onnxruntime.InferenceSession(
            folder / FOLDER / f"{name}{suffix}.onnx", providers=["CPUExecutionProvider"]
        )
        for name in (VISION, TEXT)
    ]
    images = [sessions[0].run(None, {"pixel_values": batch.numpy()})[0] for batch in pixels]
    texts = []
    for batch in tokens:
        ids = batch.numpy()
        texts += sessions[1].run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
    return torch.from_numpy(np.concatenate(images)), torch.from_numpy(np.concatenate(texts))


def compare(
    folder: Path, pixels: torch.Tensor, tokens: torch.Tensor, short: list[torch.Tensor], expected: Outputs
) -> dict[str, float]:
    """The largest differences of onnxruntime's features: in one batch, one by one, and without padding.

    Args:
        short: the tokens of each caption, int64 [1, L], without padding where that is exact.
    """
    batched = Outputs(*features(folder, [pixels], [tokens]), expected.logits)
    single = features(folder, [pixels[:1]], short)
    differences = batched.differences(expected)
    del differences["logits"]
    differences["image_features"] = max(
        differences["image_features"], max_difference(single[0], expected.image_features[:1])
    )
    differences["text_features"] = max(
        differences["text_features"], max_difference(single[1], expected.text_features)
    )
    return differences


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch and onnxruntime report about their own internals."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
