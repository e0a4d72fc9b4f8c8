"""A real Slurm on one machine: munged, slurmctld, and nodes that can be switched off or disconnected.

A node is an init process in its own network, process, mount and hostname namespaces, on a bridge with the
others:

    slurmctld 10.213.0.254 --- bridge lab0 --- eth0 of n1 10.213.0.1, of n2 10.213.0.2, ...

All files are in STATE. Started processes are recorded by pid and start time, so that only those are ended.
Needs Linux, root, and the Debian packages munge, slurmctld, slurmd, slurm-client and iproute2.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from data_prep.errors import UserError

STATE = Path("/tmp/slurm-lab")
NODES, CPUS, GPUS = 3, 4, 2
NET, BRIDGE = "10.213.0", "lab0"
PACKAGES = "munge slurmctld slurmd slurm-client iproute2"
NODE_TIMEOUT_S, GRACE_S = 12, 25

# Bash is the init process of a node: it reaps the orphans of slurmstepd. STATE/local is the node's own disk.
NODE = """
hostname "$1"; mount --bind "$2/hosts" /etc/hosts; mount --bind "$2/resolv.conf" /etc/resolv.conf
mount -t tmpfs -o size=256m tmpfs "$2/local"
until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
ip link set lo up; ip addr add "$3/24" dev eth0; ip link set eth0 up; ip route add default via "$4"
slurmd -D -N "$1" -f "$2/slurm.conf" &
while :; do sleep 3600 & wait $!; done
"""


def missing() -> str:
    """Why no cluster can be started here; empty where one can."""
    if os.geteuid():
        return "only root can make network namespaces"
    programs = ("munged", "slurmctld", "slurmd", "sbatch", "ip", "unshare")
    if absent := [name for name in programs if not shutil.which(name)]:
        return f"no {', '.join(absent)} here: apt-get install --no-install-recommends {PACKAGES}"
    return ""


def environment() -> dict[str, str]:
    """Environment variables with which sbatch, squeue and the others talk to this cluster."""
    return {**os.environ, "SLURM_CONF": str(STATE / "slurm.conf")}


def call(*words, check: bool = True) -> str:
    """The output of a command of Slurm, or of ip.

    Raises:
        AssertionError: the command failed, and `check` is set.
    """
    result = subprocess.run(
        [str(word) for word in words], env=environment(), capture_output=True, text=True, check=False
    )
    assert result.returncode == 0 or not check, (words, result.stdout, result.stderr)
    return result.stdout.strip()


def up() -> None:
    """Start the cluster; returns when every node is idle.

    Raises:
        UserError: a cluster is running already, or this machine cannot run one.
    """
    if reason := missing():
        raise UserError(f"no virtual cluster: {reason}")
    if _alive("slurmctld"):
        raise UserError(f"{STATE}: a cluster is running already; to stop it: python -m tests.slurm_lab down")
    down()
    for name in ("pid", "state", "spool", "log", "dev", "local", "munge"):
        (STATE / name).mkdir(parents=True)
    STATE.chmod(0o755)
    _write_configuration()
    munge = STATE / "munge"
    key = munge / "key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))
    options = {
        "key-file": key,
        "socket": munge / "socket",
        "pid-file": munge / "pid",
        "seed-file": munge / "seed",
    }
    munge_options = [f"--{name}={path}" for name, path in options.items()]
    _start(
        "munged", ["munged", "--foreground", "--force", *munge_options, f"--log-file={STATE}/log/munged.log"]
    )
    _until(lambda: (munge / "socket").exists(), "munged did not create its socket")
    call("ip", "link", "add", BRIDGE, "type", "bridge")
    call("ip", "addr", "add", f"{NET}.254/24", "dev", BRIDGE)
    call("ip", "link", "set", BRIDGE, "up")
    _start("slurmctld", ["slurmctld", "-D", "-f", STATE / "slurm.conf"])
    for number in range(1, NODES + 1):
        power_on(number)
    _until(all_idle, f"not all nodes are idle; see {STATE}/log")


def all_idle() -> bool:
    return (
        call("sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%t", check=False).split()
        == ["idle"] * NODES
    )


def down() -> None:
    """End what up() started, and nothing else, and remove its files and network devices."""
    for record in sorted((STATE / "pid").glob("n*")):
        _end(record.name, signal.SIGKILL)  # the init process of a node; the kernel ends all others in it
    for name in ("slurmctld", "munged"):
        _end(name, signal.SIGTERM)
    for number in range(1, NODES + 1):
        call("ip", "link", "del", f"{BRIDGE}-n{number}", check=False)
    call("ip", "link", "del", BRIDGE, check=False)
    for folder in Path("/sys/fs/cgroup").glob("*/slurm_n[0-9]*"):
        for path in sorted([folder, *folder.rglob("*/")], reverse=True):
            # A controller can release a group late; up() works with a folder that is left.
            with contextlib.suppress(OSError):
                path.rmdir()
    shutil.rmtree(STATE, ignore_errors=True)


def power_on(number: int) -> None:
    """Start node n`number`."""
    name, address = f"n{number}", f"{NET}.{number}"
    separate = ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child"]
    _start(f"n{number}.unshare", [*separate, "bash", "-c", NODE, "node", name, STATE, address, f"{NET}.254"])
    unshare = int((STATE / "pid" / f"n{number}.unshare").read_text().split()[0])
    children = Path(f"/proc/{unshare}/task/{unshare}/children")
    _until(lambda: children.read_text().strip(), f"{name} did not start")
    _record(name, int(children.read_text()))
    port = f"{BRIDGE}-n{number}"
    call(*f"ip link add {port} type veth peer name eth0 netns {_pid(name)}".split())
    call("ip", "link", "set", port, "master", BRIDGE, "up")


def power_off(number: int) -> None:
    """Switch node n`number` off: its network first, because a dead machine closes no connections."""
    disconnect(number)
    _end(f"n{number}", signal.SIGKILL)
    call("ip", "link", "del", f"{BRIDGE}-n{number}", check=False)


def disconnect(number: int) -> None:
    """Unplug the network of node n`number`; its processes keep running and see the shared disk."""
    call("ip", "link", "set", f"{BRIDGE}-n{number}", "down")


def reconnect(number: int) -> None:
    """Plug the network of node n`number` in again."""
    call("ip", "link", "set", f"{BRIDGE}-n{number}", "up")


def processes_of(job: str, node: str = "n*") -> dict[int, str]:
    """The processes of a job by the job's control groups: pid on this machine -> command line."""
    processes = {}
    for file in Path("/sys/fs/cgroup/freezer").glob(f"slurm_{node}/uid_*/job_{job}/**/cgroup.procs"):
        for pid in file.read_text().split():
            with contextlib.suppress(OSError):
                line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
                processes[int(pid)] = line.decode(errors="replace")
    return processes


def _write_configuration() -> None:
    host = socket.gethostname().split(".")[0]
    for number in range(GPUS):  # Slurm accepts only character devices as GPUs
        os.mknod(STATE / "dev" / f"nvidia{number}", 0o20666, os.makedev(1, 3))
    nodes = "".join(f"{NET}.{number} n{number}\n" for number in range(1, NODES + 1))
    (STATE / "hosts").write_text(f"127.0.0.1 localhost\n{NET}.254 {host}\n{nodes}")
    # A local address refuses queries at once; any other would take seconds to time out.
    (STATE / "resolv.conf").write_text("nameserver 127.0.0.1\n")
    has_cgroups = os.access("/sys/fs/cgroup/freezer/cgroup.procs", os.W_OK)
    (STATE / "cgroup.conf").write_text(
        "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\nCgroupMountpoint=/sys/fs/cgroup\n"
    )
    (STATE / "gres.conf").write_text(
        f"NodeName=n[1-{NODES}] Name=gpu File={STATE}/dev/nvidia[0-{GPUS - 1}]\n"
    )
    (STATE / "slurm.conf").write_text(f"""\
ClusterName=lab
SlurmctldHost={host}({NET}.254)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={STATE}/munge/socket,cred_expire=5
StateSaveLocation={STATE}/state
SlurmdSpoolDir={STATE}/spool/%n
SlurmctldPidFile={STATE}/munge/slurmctld.pid
SlurmdPidFile={STATE}/munge/%n.pid
SlurmctldLogFile={STATE}/log/slurmctld.log
SlurmdLogFile={STATE}/log/%n.log
ProctrackType=proctrack/{"cgroup" if has_cgroups else "linuxproc"}
TaskPlugin=task/{"cgroup" if has_cgroups else "none"}
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdTimeout={NODE_TIMEOUT_S}
KillWait=30
MinJobAge=3600
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
GresTypes=gpu
NodeName=n[1-{NODES}] NodeAddr={NET}.[1-{NODES}] CPUs={CPUS} RealMemory=16000 Gres=gpu:{GPUS}
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 PreemptMode=OFF
PartitionName=low Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE
PartitionName=grace Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime={GRACE_S}
PartitionName=high Nodes=ALL PriorityTier=100 PreemptMode=OFF
""")


def _start(name: str, words: list) -> None:
    with open(STATE / "log" / f"{name}.out", "ab") as log:
        process = subprocess.Popen(
            [str(word) for word in words],
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    _record(name, process.pid)


def _record(name: str, pid: int) -> None:
    (STATE / "pid" / name).write_text(f"{pid} {_started(pid)}")


def _started(pid: int) -> str:
    """Start time of a process in clock ticks, which with the pid identifies it; empty if it has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state == "Z" else fields[18]


def _pid(name: str) -> int:
    """The pid of a recorded process; 0 if it has ended, even where its pid is in use again."""
    record = STATE / "pid" / name
    if not record.is_file():
        return 0
    pid, started = record.read_text().split(" ")
    return int(pid) if started and _started(int(pid)) == started else 0


def _alive(name: str) -> bool:
    return bool(_pid(name))


def _end(name: str, signal_number: signal.Signals) -> None:
    if pid := _pid(name):
        os.kill(pid, signal_number)
        deadline = time.monotonic() + 5
        while _alive(name) and time.monotonic() < deadline:
            time.sleep(0.05)
        if _alive(name):
            os.kill(pid, signal.SIGKILL)
    (STATE / "pid" / name).unlink(missing_ok=True)


def _until(condition: Callable[[], object], error: str, timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise UserError(f"the virtual cluster did not start: {error}")
        time.sleep(0.1)
