"""Faults of the machine, one after the other in one training without Slurm: nothing is lost, and each is
named in its log.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.slurm_lab.ground import ROOT, THREADS, Ground, logged, weights_sha256

FAULTS, EPOCHS, BATCH = 20, 40, 16
DISK_MB = 96


@dataclass
class Patient:
    """The training that things happen to.

    Attributes:
        named: what its log has to say in the end, one for each fault.
    """

    ground: Ground
    run: Path
    data: Path
    nan: str
    named: list[str] = field(default_factory=list)

    @property
    def log(self) -> Path:
        return self.ground.folder / f"{self.run.name}.log"

    def start(self, step_s: float = 0.05) -> subprocess.Popen:
        command = [
            sys.executable,
            "-m",
            "tests.slurm_lab.disturbed",
            self.ground.recipe,
            "--data",
            self.data,
            "--run",
            self.run,
        ]
        environment = {**os.environ, **THREADS, "LAB_STEP_S": str(step_s), "LAB_NAN": self.nan}
        with open(self.log, "ab") as log:
            return subprocess.Popen(
                [*command, "--epochs", str(EPOCHS)], cwd=ROOT, env=environment, stdout=log, stderr=log
            )

    def checkpoints(self) -> list[Path]:
        return sorted((self.run / "checkpoints").glob("samples-*"))

    def progressed(self) -> subprocess.Popen:
        """The training, started again and caught when it has written two checkpoints more."""
        before = self.checkpoints()[-1:]
        process, deadline = self.start(), time.monotonic() + 120
        for _ in range(2):
            while self.checkpoints()[-1:] == before:
                assert process.poll() is None, self.log.read_text()[-3000:]
                assert time.monotonic() < deadline, self.log.read_text()[-3000:]
                time.sleep(0.02)
            before = self.checkpoints()[-1:]
        return process

    def ends(self, process: subprocess.Popen, code: int, names: str) -> None:
        """Wait for the end, and for the sentence that says why."""
        said = process.wait(120)
        assert said == code, f"exit code {said}, {code} expected\n{self.log.read_text()[-3000:]}"
        self.named.append(names)


def terminated(patient: Patient, chance: random.Random) -> None:
    process = patient.progressed()
    time.sleep(chance.uniform(0, 1))
    process.send_signal(signal.SIGTERM)
    patient.ends(process, 0, "stopped after")


def truncated_checkpoint(patient: Patient, chance: random.Random) -> None:
    process = patient.progressed()
    process.kill()
    process.wait()
    newest = patient.checkpoints()[-1]
    file = chance.choice(sorted(newest.iterdir()))
    os.truncate(file, chance.randrange(file.stat().st_size))
    patient.named.append(f"{newest.name} is damaged")


def corrupt_shard(patient: Patient, chance: random.Random) -> None:
    shard = chance.choice(sorted((patient.data / "train").glob("*.tar")))
    whole = shard.read_bytes()
    at = chance.randrange(len(whole))
    shard.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    patient.ends(patient.start(), 2, f"{shard.name}: altered since it was built")
    shard.write_bytes(whole)


def full_disk(patient: Patient, chance: random.Random) -> None:
    process = patient.progressed()
    time.sleep(chance.uniform(0, 1))
    filler = patient.run / "filler.partial"
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:  # until the disk says no
            file.write(bytes(1 << 16))
    patient.ends(process, 1, "No space left on device")
    filler.unlink()


KINDS: tuple[Callable, ...] = (terminated, truncated_checkpoint, corrupt_shard, full_disk)


def faults(ground: Ground) -> str:
    """8. Twenty faults in one run without Slurm: steps that are not finite, damaged files, a full disk,
    SIGTERM.
    """
    seed = random.randrange(10**6)
    chance = random.Random(seed)
    drawn = Counter(chance.choice(["nan", *(kind.__name__ for kind in KINDS)]) for _ in range(FAULTS))
    steps = chance.sample(range(EPOCHS * 10), drawn["nan"])
    nan = " ".join(str(BATCH * step) for step in sorted(steps))
    data = shutil.copytree(ground.shards, ground.folder / "faults-shards")
    calm = Patient(ground, ground.folder / "faults-undisturbed", data, nan)
    assert calm.start(step_s=0).wait(600) == 0, calm.log.read_text()[-3000:]
    with small_disk(ground.folder / "small") as disk:
        patient = Patient(ground, disk / "faults", data, nan)
        patient.progressed().kill()
        todo = [kind for kind in KINDS for _ in range(drawn[kind.__name__])]
        chance.shuffle(todo)
        for kind in todo:
            kind(patient, chance)
        assert patient.start(step_s=0).wait(600) == 0, patient.log.read_text()[-3000:]
        said = patient.log.read_text()
        assert not (lost := [name for name in patient.named if name not in said]), (
            f"seed {seed}: not named: {lost}\n{said[-3000:]}"
        )
        assert (patient.run / "nonfinite_steps.jsonl").read_text().count("\n") == drawn["nan"]
        assert weights_sha256(patient.run) == weights_sha256(calm.run), f"seed {seed}"
        assert logged(patient.run) == logged(calm.run), f"seed {seed}"
    return (
        f"{FAULTS} faults ({', '.join(f'{count} x {name}' for name, count in sorted(drawn.items()))}), all"
        f" named, seed {seed}"
    )


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A folder that holds DISK_MB and no more."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)
