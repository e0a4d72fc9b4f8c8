"""What a device can do is asked of torch; here of the CPU, and of torch's tables for the others."""

import pytest
import torch
from runs import recipe

import train.device
from data_prep.errors import UserError
from train.device import backend_of, can_compile, counts_memory, has_bf16, has_streams, on_stream, use_bf16
from train.model.activation_memory import should_compile
from train.setup import setup
from train.world import World, joined_world

CPU, MPS = torch.device("cpu"), torch.device("mps")
KINDS = {kind: torch.device(kind) for kind in ("cuda", "xpu", "mps", "cpu")}


def test_the_accelerator_that_torch_finds_is_used(monkeypatch):
    """A machine with two XPUs, as torch describes it."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if not torch.accelerator.is_available():
        with joined_world() as world:
            assert world == World(device=CPU)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda: torch.device("xpu"))
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 2)
    with joined_world() as world:
        assert world.device == torch.device("xpu")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert train.device.own_device() == torch.device("xpu", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="no xpu device, there are 2; pass torchrun --nproc_per_node 2"):
        train.device.own_device()


def test_collectives_are_those_that_torch_has_for_the_device():
    assert [backend_of(KINDS[kind]) for kind in ("cuda", "xpu", "cpu")] == ["nccl", "xccl", "gloo"]
    with pytest.raises(UserError, match="no collectives for mps; start one process"):
        backend_of(MPS)


def test_pinned_memory_and_streams_are_for_devices_that_have_them():
    assert {kind: has_streams(device) for kind, device in KINDS.items()} == {
        "cuda": True,
        "xpu": True,
        "mps": False,
        "cpu": False,
    }
    with on_stream(None):
        pass


def test_memory_is_counted_where_torch_does_and_else_it_is_the_machines():
    counts = {kind: counts_memory(device) for kind, device in KINDS.items()}
    assert counts == {"cuda": True, "xpu": True, "mps": False, "cpu": False}


def test_bf16_is_tried(monkeypatch, capsys):
    assert has_bf16(CPU)
    assert use_bf16("bf16", CPU)
    assert not use_bf16("fp32", CPU)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("train.device.has_bf16", lambda device: False)
    assert not use_bf16("bf16", CPU)
    assert "warning: cpu has no bf16 under autocast; products are in fp32" in capsys.readouterr().err


def test_a_run_on_a_device_without_bf16_computes_in_fp32(tiny_model, icon_shards, monkeypatch):
    monkeypatch.setattr("train.device.has_bf16", lambda device: False)
    state = setup(recipe(tiny_model, icon_shards, "", precision="bf16", workers=0), None, World())
    assert not state.clip.towers.bf16


def test_compiling_is_tried(monkeypatch):
    can_compile.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not can_compile(CPU)
    plan = recipe("m:none", "d", "r")
    for possible in (True, False):
        monkeypatch.setattr("train.model.activation_memory.can_compile", lambda device, is_so=possible: is_so)
        assert should_compile(plan, MPS) == possible
        assert not should_compile(plan, CPU)
    can_compile.cache_clear()


def test_a_device_that_cannot_compile_is_found_out(monkeypatch):
    """As one that is too old for Triton, or a machine without a C compiler."""

    def compile_(function):
        def call(*_):
            raise torch._dynamo.exc.TorchDynamoException("no compiler")

        return call

    can_compile.cache_clear()
    monkeypatch.setattr("torch.compile", compile_)
    assert not can_compile(CPU)
    can_compile.cache_clear()
