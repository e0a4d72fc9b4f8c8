"""benchmarks.gpu: all of it runs on a CPU, each figure is on the disk at once, a failure is written down."""

import json
import sys

import pytest
from conftest import ROOT, call

from benchmarks.gpu.__main__ import PARTS, main
from benchmarks.gpu.estimate import estimate, kind_of, towers_of
from benchmarks.gpu.record import OUT_OF_TIME, Record
from benchmarks.gpu.table import table, wanted
from data_prep.errors import UserError


def test_the_estimate_counts_the_known_flop():
    """175.3 GFLOP of a forward pass of ViT-L/14 per pair; a step of 64 pairs is about 50 ms of products."""
    towers = towers_of("ViT-L-14", 77)[:2]
    flop = sum(tower.product_flop + tower.attention_flop for tower in towers)
    assert flop / 1e9 == pytest.approx(175.3, rel=0.01)
    assert towers_of("ViT-L-14", 77)[2] == pytest.approx(427.6e6, rel=0.01)
    found = estimate("ViT-L-14", 64, 24)
    assert sum(value for name, value in found.items() if name != "step") == pytest.approx(found["step"])
    assert 45 < found["products"] < 55
    half = {"matmul_tflop_per_s": 395.0, "copy_tb_per_s": 2.0}
    assert estimate("ViT-L-14", 64, 24, half)["step"] == pytest.approx(2 * found["step"])


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "products"),
        ("nvjet_tst_192x192_64x3_2x1_v_bz_coopA_NTT", "products"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_f16", "attention"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("triton_red_fused__to_copy_add_native_layer_norm_5", "norms, activations, sums"),
        ("void at::native::elementwise_kernel<direct_copy_kernel_cuda>", "copies"),
    ],
)
def test_kernels_are_counted_with_what_they_do(kernel, kind):
    assert kind_of(kernel) == kind


def test_a_failure_and_an_overrun_are_results(tmp_path):
    record = Record(tmp_path, float("inf"))
    failed = record.end(record.start("fails", ["-c", "raise SystemExit('no such thing')"]))
    assert (failed["error"], failed["said"]) == ("exit code 1", "no such thing\n")
    hung = record.end(record.start("hangs", ["-c", "import time; time.sleep(99)"]), 0.2)
    assert hung["error"] == OUT_OF_TIME
    record.begin("step", "a")
    record.note("step", "b", ms=1.23456)
    assert record.unfinished() == {"part": "step", "name": "a"}
    record.note("step", "a", **failed)
    assert record.unfinished() is None
    assert [note["name"] for note in record.notes()] == ["b", "a"]
    assert record.notes()[0]["ms"] == 1.235
    text = table(record.notes())
    assert "Failed: step: a." in text
    assert "Left out: nothing." in text


def test_each_trainer_is_compared_with_the_turn_of_ours_beside_it():
    def note(part: str, name: str, speed: float | None, **more) -> dict:
        return {"part": part, "name": name, "pairs_per_s": speed, **more}

    notes = [
        note("a", "ours", 100.0, data_share=0.02),
        note("a", "open_clip_train", 50.0),
        note("a", "open_clip_train --grad-checkpointing", None),  # out of memory
        note("b", "ours", 90.0, data_share=0.01),
        note("b", "open_clip_train --torchcompile", 60.0),
    ]
    found = {what: measured for what, _, measured in wanted({(n["part"], n["name"]): n for n in notes})}
    assert found["speed to open_clip_train's best"] == "1.5"
    assert found["speed to its --grad-checkpointing"] == ""
    assert found["data wait of the whole path, %"] == "2"
    assert found["resumed equals uninterrupted"] == ""


def test_what_does_not_fit_into_the_limit_is_named(icon_shards, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # main() sets a default
    main(tmp_path / "out", 1, str(icon_shards))
    names = [part.name for part in PARTS]
    assert f"Left out: {', '.join(names)}." in (tmp_path / "out" / "table.md").read_text()
    with pytest.raises(UserError, match="no shards there; pass --data SHARDS"):
        main(tmp_path / "none", 1, str(tmp_path))


@pytest.mark.slow
def test_all_of_it_runs_on_a_cpu(tmp_path):
    call("benchmarks.gpu", "--out", tmp_path / "out", "--dry", "--limit", 1800)
    notes = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [note for note in notes if "error" in note] == []
    assert [note["name"] for note in notes if note["part"] == "finished"] == [part.name for part in PARTS]
    assert {note["name"]: note["equal"] for note in notes if not note.get("equal", True)} == {}
    assert sum("pairs/s" in note for note in notes) == 9  # rows of the step
    assert {"ours", "open_clip_train", "open_clip_train --grad-checkpointing"} < {
        note["name"] for note in notes if note["part"] == "whole path"
    }
    text = (tmp_path / "out" / "table.md").read_text()
    assert "Left out: nothing." in text
    assert "Failed: nothing." in text
    assert sys.version.split()[0] in text
    assert str(ROOT) not in text
