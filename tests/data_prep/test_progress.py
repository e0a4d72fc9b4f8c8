"""Progress bars are shown in terminals of any size, and do not flood a log."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest
from conftest import ROOT, environment

CODE = (
    "import time; from data_prep.progress import progress; [time.sleep(0.03) for _ in progress(range(40),"
    " desc='working', unit='pair')]"
)


@pytest.mark.parametrize("size", [(0, 0), (24, 80)])
def test_a_terminal_of_any_size_shows_a_bar_with_its_eta(size):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    more = {name: "" for name in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        [sys.executable, "-c", CODE], cwd=ROOT, env=environment(**more), stdout=theirs, stderr=theirs
    )
    process.wait(60)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    os.close(theirs)
    assert "working: 100%" in shown
    assert "pair/s" in shown
    assert shown.count("\r") > 4


def test_a_log_gets_a_line_now_and_then():
    result = subprocess.run(
        [sys.executable, "-c", CODE], cwd=ROOT, env=environment(), capture_output=True, text=True, check=True
    )
    assert "working: 100%" in result.stderr
    assert result.stderr.count("\r") <= 3
