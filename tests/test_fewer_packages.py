"""Training, evaluation, indexing and export run without the packages that only pages, the demo, tests and
optional extras need: a machine with a GPU and no network may have no more than torch and open_clip.
"""

import subprocess
import sys

import pytest
from conftest import ROOT, environment

PAGES = ("starlette", "uvicorn", "matplotlib")
DEMO = ("qtawesome",)
OTHERS = ("faiss", "bm25s", "sklearn", "threadpoolctl")  # of search, and of linear probes and clusters
EXTRAS = ("onnx", "onnxscript", "onnxruntime", "sentence_transformers", "trackio", "wandb", "tensorboard")
EXTRAS += ("resvg_py", "pillow_heif")
TESTS = ("pytest", "playwright", "ruff", "xdist", "pytrec_eval")

# One process for all commands, because a start costs seconds. Blocked at the finders of sys.path, so that a
# package is missing for importlib.util.find_spec and importlib.metadata too, by which libraries ask for one.
CODE = """
import importlib, sys
from importlib.machinery import PathFinder

blocked, find, distributions = {blocked!r}, PathFinder.find_spec, PathFinder.find_distributions
PathFinder.find_spec = classmethod(
    lambda kind, name, *more: None if name.partition(".")[0] in blocked else find(name, *more)
)
PathFinder.find_distributions = staticmethod(
    lambda context: () if str(context.name).replace("-", "_") in blocked else distributions(context)
)
for name in blocked:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        continue
    raise AssertionError(name)
for module, arguments in {commands!r}:
    sys.argv = [module, *arguments]
    importlib.import_module(module).main()
"""


@pytest.mark.slow
def test_the_commands_of_a_gpu_machine(tiny_model, icon_shards, tmp_path):
    run, data = str(tmp_path / "run"), ["--data", str(icon_shards)]
    train = ["--model", tiny_model, *data, "--run", run, "--epochs", "1", "--global-batch-size", "96"]
    train += ["--workers", "0", "--precision", "fp32", "--log"]  # without TensorBoard
    few = ["--workers", "0"]
    commands = [
        ("train.__main__", train),
        ("eval.__main__", ["retrieval", run, *data, "--json", str(tmp_path / "result.json"), *few]),
        ("eval.__main__", ["embed", run, *data, "--out", str(tmp_path / "index"), *few]),
        ("train.export.__main__", [run, "--out", str(tmp_path / "exported"), *data]),
    ]
    blocked = (*PAGES, *DEMO, *OTHERS, *EXTRAS, *TESTS)
    code = CODE.format(blocked=blocked, commands=commands)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for written in ("result.json", "index", "exported/model.safetensors"):
        assert (tmp_path / written).exists(), written
