"""What the drills train on, and how they look at it: drawn icons, a CLIP of a few thousand weights, and a run
that nobody disturbed.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from slurm.queue import ENDED, look_up
from slurm.script import Shape
from slurm.submit import submit
from tests.slurm_lab import cluster

ROOT = Path(__file__).parents[2]
BUILD = (
    "--image-column",
    "file_path",
    "--caption-column",
    "caption",
    "--group-column",
    "group",
    "--images-per-shard",
    "40",
)
THREADS = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 10, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
RECIPE = {
    "epochs": 10,
    "global_batch_size": 16,
    "micro_batch_size": 16,
    "precision": "fp32",
    "activation_checkpointing": "none",
    "workers": 0,
    "log_every_steps": 1,
    "save_every_minutes": 0.05,
    "optim": {"lr": 1e-3, "warmup": 0.1},
}


@dataclass
class Ground:
    """A folder with everything that the drills share.

    Attributes:
        references: folders of undisturbed runs, by number of ranks and epochs.
    """

    folder: Path
    references: dict[tuple[int, int], Path] = field(default_factory=dict)

    @property
    def icons(self) -> Path:
        return self.folder / "icons" / "icons.csv"

    @property
    def shards(self) -> Path:
        return self.folder / "shards"

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.yaml"

    def prepare(self) -> None:
        """Draw the icons, make the shards and the model."""
        import open_clip
        import torch
        from safetensors.torch import save_file

        python("data_prep", "icons", "--out", self.icons.parent, "--limit", "240")
        python("data_prep", "build", self.icons, "--out", self.shards, *BUILD, "--processes", "1")
        tiny = self.folder / "tiny"
        tiny.mkdir()
        torch.manual_seed(1)
        save_file(open_clip.model.CLIP(**TINY).state_dict(), tiny / "open_clip_model.safetensors")
        preprocess = {
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        }
        (tiny / "open_clip_config.json").write_text(
            json.dumps({"model_cfg": TINY, "preprocess_cfg": preprocess})
        )
        self.recipe.write_text(yaml.safe_dump({"model": f"local-dir:{tiny}", **RECIPE}))

    def reference(self, ranks: int, epochs: int) -> Path:
        """The run of this many ranks on this machine, without Slurm, that nothing happened to."""
        if (ranks, epochs) not in self.references:
            run = self.folder / f"undisturbed-{ranks}-{epochs}"
            launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", ranks, "-m", "--"]
            python(*launcher, "train", self.recipe, "--data", self.shards, "--run", run, "--epochs", epochs)
            self.references[ranks, epochs] = run
        return self.references[ranks, epochs]

    def site(
        self,
        name: str,
        warn_s: int = 60,
        sbatch: tuple[str, ...] = (),
        partition: str = "main",
        **environment: object,
    ) -> Path:
        """A site file of the lab's cluster; `environment` goes to the jobs."""
        more = {key: str(value) for key, value in environment.items()}
        values = {
            "partition": partition,
            "cpus_per_gpu": 1,
            "warn_s": warn_s,
            "silent_s": 100,
            "sbatch": list(sbatch),
            "environment": {**THREADS, **more},
        }
        path = self.folder / f"{name}-site.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    def train(
        self,
        name: str,
        nodes: int = 1,
        time_limit: str = "30:00",
        epochs: int = RECIPE["epochs"],
        timeout_s: int = 600,
        chain: int = 1,
        stage: str = "",
        **site,
    ) -> "Training":
        """Submit a training of the lab, one process on each node, its steps lengthened so that there is time
        to disturb it.
        """
        run, flags = self.folder / name, ("--epochs", str(epochs), "--timeout_minutes", str(timeout_s / 60))
        place = self.site(name, **{"LAB_STEP_S": 0.2, **site})
        shape, module = Shape(nodes, 1, time_limit), "tests.slurm_lab.disturbed"
        numbers = submit(
            str(self.recipe),
            run,
            self.shards,
            shape,
            chain=chain,
            stage=stage,
            site=place,
            flags=flags,
            module=module,
        )
        return Training(self, run, numbers[-1], nodes, epochs)


@dataclass
class Training:
    """A training that was submitted."""

    ground: Ground
    run: Path
    job: str
    ranks: int = 1
    epochs: int = RECIPE["epochs"]

    @property
    def state(self) -> dict[str, str]:
        return look_up(self.job)

    @property
    def restarts(self) -> int:
        return int(self.state.get("Restarts", 0))

    @property
    def log(self) -> str:
        return "".join(
            path.read_text(errors="replace") for path in sorted((self.run / "slurm").glob("*.log"))
        )

    @property
    def status(self) -> dict:
        path = self.run / "status.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    @property
    def nodes(self) -> list[int]:
        """Numbers of the nodes that it runs on, in the order of its ranks."""
        names = cluster.call("scontrol", "show", "hostnames", self.state["NodeList"])
        return [int(name.removeprefix("n")) for name in names.split()]

    def samples(self) -> int:
        """Pairs seen, by the last line of the log of its steps."""
        path = self.run / "metrics.jsonl"
        lines = (
            [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            if path.is_file()
            else []
        )
        return json.loads(lines[-1])["samples"] if lines else 0

    def checkpoint(self) -> int:
        return max(
            (int(path.name.split("-")[1]) for path in (self.run / "checkpoints").glob("samples-*")), default=0
        )

    def until(self, condition: Callable[[], bool], what: str, timeout_s: float = 240) -> None:
        """Wait for something; on the way, the job must not end."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            state = self.state.get("JobState")
            assert state not in ENDED or condition(), (
                f"job {self.job} is {state} before: {what}\n{self.log[-3000:]}"
            )
            assert time.monotonic() < deadline, (
                f"job {self.job} is {state}, and not in {timeout_s:.0f} s: {what}\n{self.log[-3000:]}"
            )
            time.sleep(0.2)

    def until_samples(self, samples: int) -> None:
        self.until(lambda: self.samples() >= samples, f"{samples} samples")

    def until_restart(self, number: int) -> None:
        self.until(
            lambda: self.restarts >= number and self.state.get("JobState") == "RUNNING", f"restart {number}"
        )

    def end(self, timeout_s: float = 400) -> dict[str, str]:
        """Wait until it is over, and not only about to be requeued; the last that Slurm knows of it."""
        deadline, quiet = time.monotonic() + timeout_s, 0
        while quiet < 4:
            state = self.state
            quiet = quiet + 1 if state.get("JobState") in ENDED else 0
            assert time.monotonic() < deadline, (
                f"job {self.job} is {state} after {timeout_s:.0f} s\n{self.log[-3000:]}"
            )
            time.sleep(0.5)
        return state

    def finished_equal(self, restarts: int, timeout_s: float = 400) -> None:
        """Wait for the end, and demand it as if nothing had happened, after exactly so many restarts."""
        state = self.end(timeout_s)
        assert (state["JobState"], state["ExitCode"]) == ("COMPLETED", "0:0"), f"{state}\n{self.log[-3000:]}"
        assert self.status["state"] == "finished", self.status
        assert self.restarts == restarts, f"{self.restarts} restarts, {restarts} expected\n{self.log[-3000:]}"
        self.assert_equal()

    def assert_equal(self) -> None:
        """The weights, bit for bit, and every logged number but the times are those of the undisturbed run."""
        reference = self.ground.reference(self.ranks, self.epochs)
        assert weights_sha256(self.run) == weights_sha256(reference)
        assert logged(self.run) == logged(reference)

    def ranks_on(self, node: int) -> list[int]:
        """Pids of the training processes on a node, without torchrun's own."""
        pids = cluster.pids_of(self.job, f"n{node}")
        return [
            pid
            for pid, line in pids.items()
            if "tests.slurm_lab.disturbed" in line and "torch.distributed.run" not in line
        ]


def weights_sha256(run: Path) -> str:
    newest = max((run / "checkpoints").glob("samples-*"))
    return hashlib.sha256((newest / "open_clip_model.safetensors").read_bytes()).hexdigest() + newest.name


def logged(run: Path) -> list[str]:
    """The log, without what depends on the clock; as text, for a number that is none equals no other."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        json.dumps({name: value for name, value in line.items() if not name.startswith("time/")})
        for line in lines
    ]


def digests(folder: Path, pattern: str) -> dict[str, str]:
    """sha256 of the files of a folder that fit a pattern."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob(pattern))
    }


def python(*words: object, expect: int = 0) -> str:
    """What a command of the project prints; one thread, as on the cluster, so that numbers compare bit for
    bit.
    """
    environment = {**os.environ, **THREADS}
    command = [sys.executable, "-m", *map(str, words)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == expect, f"{command}: {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result.stdout + result.stderr
