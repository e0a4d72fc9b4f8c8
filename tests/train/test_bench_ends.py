"""The processes of a benchmark end with the one that started them, however that ends."""

import signal
import subprocess
import sys

import pytest

from data_prep.rooms import environment

# With workers of a loader, which the process that measures starts by a forkserver of its own.
MEASURING = """
from train.bench.rows import in_fresh_process
in_fresh_process(exec, '''
from torch.utils.data import DataLoader
from train.data.loader import _quiet_worker
batches = iter(DataLoader(range(10**9), num_workers=1, worker_init_fn=_quiet_worker))
next(batches)
print("measuring", flush=True)
for _ in batches:
    pass
''')
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_process_of_a_benchmark_is_left(number):
    process = subprocess.Popen(
        [sys.executable, "-c", MEASURING], stdout=subprocess.PIPE, env=environment(), text=True
    )
    assert process.stdout.readline() == "measuring\n"
    process.send_signal(number)
    process.communicate(timeout=30)  # until no process has its output open
    assert process.returncode == -number
