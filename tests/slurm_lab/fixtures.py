"""What the drills train on and compare with: drawn icons, a CLIP of a few thousand weights, and undisturbed
runs.
"""

import contextlib
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

from slurm.queue import ENDED, job_info
from slurm.script import Resources
from slurm.submit import submit
from tests.slurm_lab import cluster

ROOT = Path(__file__).parents[2]
TRAIN_MODULE = "tests.slurm_lab.fault_injection"  # what the drills submit in place of `train`
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
# One thread, as on the cluster, so that numbers compare bit for bit.
THREADS = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
TINY_MODEL = {
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
    "workers": 1,  # processes that a signal to a group, a node or a job reaches too
    "log_every_steps": 1,
    "save_every_minutes": 0.05,
    "optim": {"lr": 1e-3, "warmup_fraction": 0.1},
}


@dataclass
class Fixtures:
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
        """Draw the icons, build the shards and the model."""
        import open_clip
        import torch
        from safetensors.torch import save_file

        python("data_prep", "icons", "--out", self.icons.parent, "--limit", "240")
        python("data_prep", "build", self.icons, "--out", self.shards, *BUILD, "--processes", "1")
        tiny = self.folder / "tiny"
        tiny.mkdir()
        torch.manual_seed(1)
        save_file(open_clip.model.CLIP(**TINY_MODEL).state_dict(), tiny / "open_clip_model.safetensors")
        preprocess = {
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        }
        config = {"model_cfg": TINY_MODEL, "preprocess_cfg": preprocess}
        (tiny / "open_clip_config.json").write_text(json.dumps(config))
        self.recipe.write_text(yaml.safe_dump({"model": f"local-dir:{tiny}", **RECIPE}))

    def reference(self, ranks: int, epochs: int) -> Path:
        """The undisturbed run with so many ranks, on this machine without Slurm; the first call trains it."""
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
        """A site file of the virtual cluster; `environment` are environment variables of the jobs."""
        variables = {key: str(value) for key, value in environment.items()}
        values = {
            "partition": partition,
            "cpus_per_gpu": 1,
            "warn_s": warn_s,
            "silent_s": 100,
            "sbatch": list(sbatch),
            "environment": {**THREADS, **variables},
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
        data: str = "",
        flags: tuple[str, ...] = (),
        **site,
    ) -> "Training":
        """Submit a training with one process per node, its steps slowed so that there is time to disturb it.

        Args:
            timeout_s: the recipe's timeout_minutes, in seconds.
            data: a URL of shards; those of the fixtures by default.
            flags: more of the training's.
            site: parameters of `site`.
        """
        run = self.folder / name
        flags = ("--epochs", str(epochs), "--timeout_minutes", str(timeout_s / 60), *flags)
        numbers = submit(
            self.recipe,
            run,
            data or str(self.shards),
            Resources(nodes, 1, time_limit),
            chain=chain,
            stage=stage,
            site=self.site(name, **{"LAB_STEP_S": 0.2, **site}),
            flags=flags,
            module=TRAIN_MODULE,
        )
        return Training(self, run, numbers[-1], nodes, epochs)


@dataclass
class Training:
    """A training that was submitted."""

    fixtures: Fixtures
    run: Path
    job: str
    ranks: int = 1
    epochs: int = RECIPE["epochs"]

    @property
    def info(self) -> dict[str, str]:
        return job_info(self.job)

    @property
    def state(self) -> str:
        """Slurm's state of the job, such as RUNNING."""
        return self.info.get("JobState", "")

    @property
    def restarts(self) -> int:
        return int(self.info.get("Restarts", 0))

    @property
    def log(self) -> str:
        paths = sorted((self.run / "slurm").glob("*.log"))
        return "".join(path.read_text(errors="replace") for path in paths)

    @property
    def status(self) -> dict:
        path = self.run / "status.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    @property
    def nodes(self) -> list[int]:
        """Numbers of the nodes that it runs on, in the order of its ranks."""
        names = cluster.call("scontrol", "show", "hostnames", self.info["NodeList"])
        return [int(name.removeprefix("n")) for name in names.split()]

    def samples(self) -> int:
        """Samples seen, by the last complete line of metrics.jsonl."""
        path = self.run / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        complete = [line for line in lines if line.endswith("\n")]
        return json.loads(complete[-1])["samples"] if complete else 0

    def checkpoint(self) -> int:
        """Samples seen at the newest checkpoint, 0 without one."""
        names = [path.name for path in (self.run / "checkpoints").glob("samples-*")]
        return max((int(name.split("-")[1]) for name in names), default=0)

    def until(self, condition: Callable[[], bool], description: str, timeout_s: float = 600) -> None:
        """Wait for a condition. The job must not end before.

        Raises:
            AssertionError: the job ended, or the time is over.
        """
        deadline = time.monotonic() + timeout_s
        while not condition():
            state = self.state
            assert state not in ENDED or condition(), (
                f"job {self.job} is {state} before: {description}\n{self.log[-3000:]}"
            )
            assert time.monotonic() < deadline, (
                f"job {self.job} is {state}; not within {timeout_s:.0f} s: {description}\n{self.log[-3000:]}"
            )
            time.sleep(0.2)

    def until_samples(self, samples: int) -> None:
        self.until(lambda: self.samples() >= samples, f"{samples} samples")

    def until_restart(self, number: int) -> None:
        self.until(lambda: self.restarts >= number and self.state == "RUNNING", f"restart {number}")

    def until_ended(self, timeout_s: float = 900) -> dict[str, str]:
        """Wait for the end of the job; returns Slurm's fields of it.

        A job that requeues itself is in a final state for a moment, so the state must last for two seconds.
        """
        deadline, n_ended = time.monotonic() + timeout_s, 0
        while n_ended < 4:
            info = self.info
            n_ended = n_ended + 1 if info.get("JobState") in ENDED else 0
            assert time.monotonic() < deadline, (
                f"job {self.job} is {info} after {timeout_s:.0f} s\n{self.log[-3000:]}"
            )
            time.sleep(0.5)
        return info

    def assert_finishes(self, restarts: int, timeout_s: float = 900) -> None:
        """Wait for the end: finished after exactly so many restarts, and equal to the undisturbed run."""
        info = self.until_ended(timeout_s)
        assert (info["JobState"], info["ExitCode"]) == ("COMPLETED", "0:0"), f"{info}\n{self.log[-3000:]}"
        assert self.status["state"] == "finished", self.status
        assert self.restarts == restarts, f"{self.restarts} restarts, {restarts} expected\n{self.log[-3000:]}"
        self.assert_equal()

    def assert_equal(self) -> None:
        """Weights (bit for bit) and logged values (except times) must be those of the undisturbed run."""
        reference = self.fixtures.reference(self.ranks, self.epochs)
        assert weights_sha256(self.run) == weights_sha256(reference)
        assert logged(self.run) == logged(reference)

    def ranks_on(self, node: int, workers: bool = False) -> list[int]:
        """Process ids of the ranks on a node; with `workers`, of the workers that read their images."""
        processes = cluster.processes_of(self.job, f"n{node}")
        return [
            pid
            for pid, line in processes.items()
            if kind_of(pid, line) == ("a worker" if workers else "a rank")
        ]


def kind_of(pid: int, line: str) -> str:
    """What a process of a training is, by its command line: "torchrun", "a rank", "a worker", or ""."""
    if TRAIN_MODULE not in line or not os.path.basename(line.split()[0]).startswith("python"):
        return ""
    if "torch.distributed.run" in line:
        return "torchrun"
    # A worker is forked from its rank, and has the same command line.
    with contextlib.suppress(OSError, IndexError):
        parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
        of_parent = Path(f"/proc/{parent}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        return "a worker" if of_parent == line else "a rank"
    return ""


def weights_sha256(run: Path) -> str:
    """Name and sha256 of the newest checkpoint's weights."""
    newest = max((run / "checkpoints").glob("samples-*"))
    sha256 = hashlib.sha256((newest / "open_clip_model.safetensors").read_bytes()).hexdigest()
    return f"{newest.name} {sha256}"


def logged(run: Path) -> list[str]:
    """The lines of metrics.jsonl without times; as text, because NaN is not equal to itself."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        json.dumps({name: value for name, value in line.items() if not name.startswith("time/")})
        for line in lines
    ]


def nonfinite_samples(run: Path) -> list[int]:
    """Samples seen before each step of nonfinite_steps.jsonl."""
    return [json.loads(line)["samples"] for line in (run / "nonfinite_steps.jsonl").read_text().splitlines()]


def digests(folder: Path, pattern: str) -> dict[str, str]:
    """sha256 of the files of a folder that match a pattern."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob(pattern))
    }


def python(*words: object, expect: int = 0) -> str:
    """The output of a command of the project.

    Args:
        words: the command without `python -m`.
        expect: its exit code.
    """
    environment = {**os.environ, **THREADS}
    command = [sys.executable, "-m", *map(str, words)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == expect, f"{command}: {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result.stdout + result.stderr
