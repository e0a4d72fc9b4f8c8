"""A tower as a small .onnx file for a browser: weights at int8 where that finds the same images, else at fp16.

    fp32 .onnx -> matrices at int8 or fp16, computed with in fp32 -> top 10 of the same queries, compared

Only weights are rounded: with activations at int8 as well (train.export.to_onnx.quantize) fewer of the top 10
are the same, at no smaller size (benchmarks/search.md).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data_prep.progress import progress
from eval.search.index import Index
from eval.search.nearest import Nearest
from eval.search.query import text_query
from train.export.reference import FIXED_CAPTIONS, evenly
from train.export.to_onnx import TEXT, write_tower
from train.model.clip import Clip

LEAST_OVERLAP, K, MOST_QUERIES, QUERIES_AT_ONCE = 0.99, 10, 500, 32
LEAST_VALUES = 1 << 12  # of a matrix that is rounded; smaller ones stay fp32
RUNGS = ("int8", "fp16")


class Tower(NamedTuple):
    """What was written.

    Attributes:
        weights: Of RUNGS; the token embeddings are at int8 on both.
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
    nearest = Nearest(index)
    expected = nearest.top(text_query(clip, texts), K)
    for weights in RUNGS:
        shrink(whole, path, weights)
        found = nearest.top(text_features(path, clip, texts), K)
        tower = Tower(weights, overlap(expected, found), len(texts))
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


def text_features(path: Path, clip: Clip, texts: list[str]) -> torch.Tensor:
    """fp32 [texts, d] of an .onnx file, by onnxruntime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    features = []
    starts = range(0, len(texts), QUERIES_AT_ONCE)
    for start in progress(starts, desc="comparing texts", unit="batch", delay=1):
        ids = clip.tokenize(texts[start : start + QUERIES_AT_ONCE]).numpy()
        features += session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
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

    def store(name: str, array: np.ndarray) -> str:
        stored[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    for node in graph.node:
        place = {"Gather": 0, "MatMul": 1, "Gemm": 1, "Conv": 1}.get(node.op_type)
        name = "" if place is None else node.input[place]
        tensor = tensors.get(name)
        if tensor is None or tensor.data_type != TensorProto.FLOAT or np.prod(tensor.dims) < LEAST_VALUES:
            nodes.append(node)
            continue
        values, ids = numpy_helper.to_array(tensor), node.input[1]
        is_table = node.op_type == "Gather" and not any(attribute.i for attribute in node.attribute)
        if is_table and values.ndim == 2:
            codes, scales = rounded(values, axis=1)
            made = [f"{node.output[0]}_{part}" for part in ("codes", "values", "scales")]
            nodes += [
                helper.make_node("Gather", [store(f"{name}_codes", codes), ids], [made[0]]),
                helper.make_node("Cast", [made[0]], [made[1]], to=TensorProto.FLOAT),
                helper.make_node("Gather", [store(f"{name}_scales", scales), ids], [made[2]]),
                helper.make_node("Mul", [made[1], made[2]], [node.output[0]]),
            ]
            continue
        wide = f"{name}_wide"
        if weights == "int8" and values.ndim == 2 and node.op_type in ("MatMul", "Gemm"):
            is_transposed = any(a.name == "transB" and a.i for a in node.attribute)
            codes, scales = rounded(values, axis=1 if is_transposed else 0)
            names = [store(f"{name}_codes", codes), store(f"{name}_scales", scales.ravel())]
            cast = helper.make_node("DequantizeLinear", names, [wide], axis=0 if is_transposed else 1)
        else:
            half = store(f"{name}_half", values.astype(np.float16))
            cast = helper.make_node("Cast", [half], [wide], to=TensorProto.FLOAT)
        if not any(wide in other.output for other in nodes):
            nodes.append(cast)
        node.input[place] = wide
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend([*kept, *stored.values()])
    onnx.save(model, path)


def rounded(values: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """int8 codes of a matrix, and their scales along an axis, fp32, of the same number of dimensions."""
    scales = (np.maximum(np.abs(values).max(axis, keepdims=True), 1e-9) / 127).astype(np.float32)
    return np.clip(np.round(values / scales), -127, 127).astype(np.int8), scales
