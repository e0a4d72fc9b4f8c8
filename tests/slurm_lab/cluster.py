"""A real Slurm on one machine: munged, slurmctld, and nodes that can be switched off or cut off one by one.

A node is a process 1 with its own network, processes, mounts and hostname, on a bridge with the others:

    slurmctld 10.213.0.254 --- bridge lab0 --- eth0 of n1 10.213.0.1, of n2 10.213.0.2, ...

Everything that is written lies in STATE; every process that was started is known by pid and start time, so
that only those are ended. Linux, root, and the Debian packages munge, slurmctld, slurmd, slurm-client and
iproute2 are wanted."""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

from data_prep.errors import UserError

STATE = Path("/tmp/slurm-lab")
NODES, CPUS, GPUS = 3, 4, 2
NET, BRIDGE = "10.213.0", "lab0"
PACKAGES = "munge slurmctld slurmd slurm-client iproute2"
NODE_TIMEOUT_S, GRACE_S = 12, 25

# Bash as process 1: it reaps the orphans of slurmstepd. The node's own scratch disk is STATE/local.
NODE = """
hostname "$1"; mount --bind "$2/hosts" /etc/hosts; mount --bind "$2/resolv.conf" /etc/resolv.conf
mount -t tmpfs -o size=256m tmpfs "$2/local"
until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
ip link set lo up; ip addr add "$3/24" dev eth0; ip link set eth0 up; ip route add default via "$4"
slurmd -D -N "$1" -f "$2/slurm.conf" &
while :; do sleep 3600 & wait $!; done
"""


def missing() -> str:
    """Why no cluster can be brought up here; empty where one can."""
    if os.geteuid():
        return "only root can make network namespaces"
    programs = ("munged", "slurmctld", "slurmd", "sbatch", "ip", "unshare")
    if absent := [name for name in programs if not shutil.which(name)]:
        return f"no {', '.join(absent)} here: apt-get install --no-install-recommends {PACKAGES}"
    return ""


def environment() -> dict[str, str]:
    """What makes sbatch, squeue and the others talk to this cluster."""
    return {**os.environ, "SLURM_CONF": str(STATE / "slurm.conf")}


def call(*words, check: bool = True) -> str:
    """What a command of Slurm (or ip) prints."""
    result = subprocess.run(
        [str(word) for word in words], env=environment(), capture_output=True, text=True, check=False
    )
    assert result.returncode == 0 or not check, (words, result.stdout, result.stderr)
    return result.stdout.strip()


def up() -> None:
    """Bring the cluster up; done when every node is idle.

    Raises:
        UserError: it is up already, or this machine cannot.
    """
    if reason := missing():
        raise UserError(f"the lab wants a cluster of its own: {reason}")
    if _alive("slurmctld"):
        raise UserError(
            f"a cluster is up already in {STATE}; take it down with: python -m tests.slurm_lab down"
        )
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
    _until(lambda: (munge / "socket").exists(), "munged has no socket")
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
    """End what up() started, and nothing else, and remove its traces."""
    for record in sorted((STATE / "pid").glob("n*")):
        _end(record.name, signal.SIGKILL)  # process 1 of a node: all others in it go with it
    for name in ("slurmctld", "munged"):
        _end(name, signal.SIGTERM)
    for number in range(1, NODES + 1):
        call("ip", "link", "del", f"{BRIDGE}-n{number}", check=False)
    call("ip", "link", "del", BRIDGE, check=False)
    for folder in Path("/sys/fs/cgroup").glob("*/slurm_n[0-9]*"):
        for path in sorted([folder, *folder.rglob("*/")], reverse=True):
            with contextlib.suppress(
                OSError
            ):  # a controller that is slow to let go; up() can live with the folder
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
    call(
        "ip",
        "link",
        "add",
        f"{BRIDGE}-n{number}",
        "type",
        "veth",
        "peer",
        "name",
        "eth0",
        "netns",
        _pid(name),
    )
    call("ip", "link", "set", f"{BRIDGE}-n{number}", "master", BRIDGE, "up")


def power_off(number: int) -> None:
    """Switch node n`number` off: its network first, for a dead machine says goodbye to nobody."""
    cut(number)
    _end(f"n{number}", signal.SIGKILL)
    call("ip", "link", "del", f"{BRIDGE}-n{number}", check=False)


def cut(number: int) -> None:
    """Unplug the network of node n`number`; its processes, and the shared disk, go on."""
    call("ip", "link", "set", f"{BRIDGE}-n{number}", "down")


def heal(number: int) -> None:
    call("ip", "link", "set", f"{BRIDGE}-n{number}", "up")


def pids_of(job: str, node: str = "n*") -> dict[int, str]:
    """The processes of a job, pid on this machine -> command line, by the job's control groups."""
    found = {}
    for file in Path("/sys/fs/cgroup/freezer").glob(f"slurm_{node}/uid_*/job_{job}/**/cgroup.procs"):
        for pid in file.read_text().split():
            with contextlib.suppress(OSError):
                found[int(pid)] = (
                    Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                )
    return found


def _write_configuration() -> None:
    host = socket.gethostname().split(".")[0]
    for number in range(GPUS):  # Slurm wants character devices
        os.mknod(STATE / "dev" / f"nvidia{number}", 0o20666, os.makedev(1, 3))
    nodes = "".join(f"{NET}.{number} n{number}\n" for number in range(1, NODES + 1))
    (STATE / "hosts").write_text(f"127.0.0.1 localhost\n{NET}.254 {host}\n{nodes}")
    (STATE / "resolv.conf").write_text(
        "nameserver 127.0.0.1\n"
    )  # refused at once, where a time-out would take seconds
    tracks = os.access("/sys/fs/cgroup/freezer/cgroup.procs", os.W_OK)
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
ProctrackType=proctrack/{"cgroup" if tracks else "linuxproc"}
TaskPlugin=task/{"cgroup" if tracks else "none"}
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
    """When a process was started, in clock ticks: with the pid, its name for ever. Empty where it has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state == "Z" else fields[18]


def _pid(name: str) -> int:
    """The pid of a process of ours, 0 where it has ended, or its pid is somebody else's by now."""
    record = STATE / "pid" / name
    if not record.is_file():
        return 0
    pid, started = record.read_text().split(" ")
    return int(pid) if started and _started(int(pid)) == started else 0


def _alive(name: str) -> bool:
    return bool(_pid(name))


def _end(name: str, how: signal.Signals) -> None:
    if pid := _pid(name):
        os.kill(pid, how)
        deadline = time.monotonic() + 5
        while _alive(name) and time.monotonic() < deadline:
            time.sleep(0.05)
        if _alive(name):
            os.kill(pid, signal.SIGKILL)
    (STATE / "pid" / name).unlink(missing_ok=True)


def _until(condition, complaint: str, timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise UserError(f"the lab: {complaint}")
        time.sleep(0.1)
