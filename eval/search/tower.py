"""A tower as a small .onnx file for a browser: weights at int8 where that finds the same, else at fp16.

    fp32 .onnx -> matrices at int8 or fp16, computed with in fp32 -> top 10 of the same queries, compared

Only weights are rounded: with activations at int8 as well (train.export.to_onnx.quantize) fewer of the top 10
are the same, at no smaller size (benchmarks/search.md).
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from data_prep.progress import progress
from eval.search.index import Index
from eval.search.nearest import Nearest
from eval.search.query import pixels_query, text_query
from train.export.reference import FIXED_CAPTIONS, evenly
from train.export.to_onnx import TEXT, VISION, write_tower
from train.model.clip import Clip

LEAST_OVERLAP, K, MOST_QUERIES, QUERIES_AT_ONCE = 0.99, 10, 500, 32
LEAST_VALUES = 1 << 12  # of a matrix that is rounded; smaller ones stay fp32
RUNGS = ("int8", "fp16")


class Tower(NamedTuple):
    """What was written.

    Attributes:
        weights: Of RUNGS; the token embeddings are at int8 on both, patch embeddings fp32.
        overlap: Mean share of the K nearest images that the fp32 model finds and the tower finds, too.
    """

    weights: str
    overlap: float
    n_queries: int


def write_text_tower(clip: Clip, index: Index, path: Path) -> Tower:
    """Write the text tower at the first of RUNGS that reaches LEAST_OVERLAP, or else at the last.

    Args:
        index: Whose captions are the queries, MOST_QUERIES at most; fixed ones if it has none.
    """
    whole = path.with_suffix(".fp32.onnx")
    write_tower(clip.towers.model, TEXT, whole, clip.tokenizer(FIXED_CAPTIONS))
    texts = some_captions(index) or FIXED_CAPTIONS
    tokens = [clip.tokenize(texts[rows]).numpy() for rows in _parts(len(texts))]
    inputs = [{"input_ids": ids, "attention_mask": np.ones_like(ids)} for ids in tokens]
    return _smallest(whole, path, Nearest(index), text_query(clip, texts), inputs)


def write_image_tower(clip: Clip, index: Index, path: Path) -> Tower:
    """As write_text_tower, with some thumbnails as queries."""
    whole = path.with_suffix(".fp32.onnx")
    write_tower(clip.towers.model, VISION, whole, torch.zeros(2, 3, *clip.image_size))
    numbers = evenly(len(index), MOST_QUERIES)
    images = [Image.open(io.BytesIO(index.thumbnail(number))).convert("RGB") for number in numbers]
    features = [pixels_query(clip, clip.eval_transform(image)) for image in images]
    pixels = [torch.stack([*map(clip.preprocess, images[rows])]).numpy() for rows in _parts(len(images))]
    inputs = [{"pixel_values": batch} for batch in pixels]
    return _smallest(whole, path, Nearest(index), torch.cat(features), inputs)


def _parts(n: int) -> list[slice]:
    return [slice(start, start + QUERIES_AT_ONCE) for start in range(0, n, QUERIES_AT_ONCE)]


def _smallest(
    whole: Path, path: Path, nearest: Nearest, queries: torch.Tensor, inputs: list[dict[str, np.ndarray]]
) -> Tower:
    """Write the tower of `whole` at the first of RUNGS that finds the same; `whole` is deleted.

    Args:
        queries: fp32 [q, d], by the model.
        inputs: Of the tower, for the same queries, in batches.
    """
    expected = nearest.top(queries, K)
    for weights in RUNGS:
        shrink(whole, path, weights)
        found = nearest.top(features_of(path, inputs), K)
        tower = Tower(weights, overlap(expected, found), len(queries))
        if tower.overlap >= LEAST_OVERLAP:
            break
    for part in path.parent.glob(f"{whole.name}*"):  # large weights are in a file of their own
        part.unlink()
    return tower


def some_captions(index: Index) -> list[str]:
    captions = (row["captions"] for row in index.rows(range(len(index))))
    texts = list(dict.fromkeys(text for of_image in captions for text in of_image))
    return [texts[number] for number in evenly(len(texts), MOST_QUERIES)]


def overlap(expected: Sequence[Sequence], found: Sequence[Sequence]) -> float:
    """Mean share of the expected hits of a query that were found."""
    pairs = zip(expected, found, strict=True)
    shares = [len({hit.number for hit in a} & {hit.number for hit in b}) / max(1, len(a)) for a, b in pairs]
    return float(np.mean(shares))


def features_of(path: Path, inputs: list[dict[str, np.ndarray]]) -> torch.Tensor:
    """fp32 [q, d] of an .onnx file, by onnxruntime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    features = []
    for batch in progress(inputs, desc="comparing the tower", unit="batch", delay=1):
        features += session.run(None, batch)
    return torch.from_numpy(np.concatenate(features))


def shrink(source: Path, path: Path, weights: str) -> None:
    """Write an .onnx file again, its matrices stored at int8 or fp16 and cast to fp32 where they are used.

    int8: a scale for each output of a product (symmetric, no zero point). Of token embeddings, which are at
    int8 always, a scale for each token; only the rows of a text are cast.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(source)
    graph, nodes, stored = model.graph, [], {}
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        place = {"Gather": 0, "MatMul": 1, "Gemm": 1}.get(node.op_type)
        name = "" if place is None else node.input[place]
        tensor = tensors.get(name)
        is_matrix = tensor is not None and len(tensor.dims) == 2 and tensor.data_type == TensorProto.FLOAT
        along_columns = any(attribute.name == "axis" and attribute.i for attribute in node.attribute)
        if not is_matrix or np.prod(tensor.dims) < LEAST_VALUES or along_columns:
            nodes.append(node)
            continue
        values, parts = numpy_helper.to_array(tensor), [f"{name}_codes", f"{name}_scales"]
        # Of Gather: along the first axis. Of Gemm: the matrix is transposed.
        by_row = node.op_type == "Gather" or any(each.name == "transB" and each.i for each in node.attribute)
        if node.op_type == "Gather":
            stored |= zip(parts, rounded(values, 1), strict=True)
            nodes += _scaled_rows(node, *parts)
            continue
        wide = node.input[place] = f"{name}_wide"
        if weights == "int8":
            codes, scales = rounded(values, int(by_row))
            stored |= zip(parts, (codes, scales.ravel()), strict=True)
            cast = helper.make_node("DequantizeLinear", parts, [wide], axis=1 - int(by_row))
        else:
            stored[f"{name}_half"] = values.astype(np.float16)
            cast = helper.make_node("Cast", [f"{name}_half"], [wide], to=TensorProto.FLOAT)
        nodes += [node] if any(wide in other.output for other in nodes) else [cast, node]
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    made = [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in stored.items()]
    graph.initializer.extend([*kept, *made])
    onnx.save(model, path)


def _scaled_rows(gather, codes: str, scales: str) -> list:
    """Nodes in place of a Gather of a matrix: rows of codes, as fp32, times their scales."""
    from onnx import TensorProto, helper

    ids, output = gather.input[1], gather.output[0]
    return [
        helper.make_node("Gather", [codes, ids], [f"{output}_codes"]),
        helper.make_node("Cast", [f"{output}_codes"], [f"{output}_wide"], to=TensorProto.FLOAT),
        helper.make_node("Gather", [scales, ids], [f"{output}_scales"]),
        helper.make_node("Mul", [f"{output}_wide", f"{output}_scales"], [output]),
    ]


def rounded(values: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """int8 codes of a matrix, and their scales along an axis, fp32, of the same number of dimensions."""
    scales = (np.maximum(np.abs(values).max(axis, keepdims=True), 1e-9) / 127).astype(np.float32)
    return np.clip(np.round(values / scales), -127, 127).astype(np.int8), scales
