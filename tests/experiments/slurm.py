"""A Slurm of one node, for tests: slurmctld and slurmd as processes of this one, in a directory of their own."""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

CONFIG = """
ClusterName=test
SlurmctldHost={host}
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
CryptoType=crypto/munge
SlurmUser=root
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SchedulerParameters=batch_sched_delay=1,sched_interval=2
MinJobAge=300
OverTimeLimit=0
KillWait=20
NodeName={host} CPUs={cores} RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why there can be no Slurm here; empty if there can."""
    if os.geteuid():
        return "Slurm's daemons need root"
    lacks = [name for name in ("slurmctld", "slurmd", "munged", "sbatch") if not shutil.which(name)]
    return f"{', '.join(lacks)} not installed (Debian: slurm-wlm, munge)" if lacks else ""


@contextlib.contextmanager
def running(root: Path) -> Iterator[dict[str, str]]:
    """Starts Slurm and ends it afterwards; yields the environment that its commands need."""
    host, ports = socket.gethostname().split(".")[0], []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("", 0))
            ports.append(free.getsockname()[1])
    for name in ("state", "spool"):
        (root / name).mkdir(parents=True)
    (root / "slurm.conf").write_text(CONFIG.format(root=root, host=host, ports=ports, cores=os.cpu_count()))
    (root / "munge.key").write_bytes(os.urandom(1024))
    (root / "munge.key").chmod(0o600)
    environment = os.environ | {"SLURM_CONF": str(root / "slurm.conf")}
    munge = ["munged", "--foreground", "--force", f"--key-file={root}/munge.key", f"--socket={root}/munge.socket"]
    munge += [f"--{kind}-file={root}/munge.{kind}" for kind in ("log", "pid", "seed")]
    commands = [munge, ["slurmctld", "-D", "-i"], ["slurmd", "-D", "-N", host]]
    daemons = []
    with (root / "daemons.log").open("w") as log:
        try:
            for command in commands:
                daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
                time.sleep(1)
            _wait_for_node(environment, root)
            yield environment
        finally:
            subprocess.run(["scancel", "--user=root"], env=environment, check=False, capture_output=True)
            for daemon in reversed(daemons):
                daemon.terminate()
                daemon.wait()


def _wait_for_node(environment: dict[str, str], root: Path) -> None:
    for _ in range(60):
        done = subprocess.run(["sinfo", "-h", "-o", "%T"], env=environment, capture_output=True, text=True, check=False)
        if "idle" in done.stdout:
            return
        time.sleep(0.5)
    raise RuntimeError(f"Slurm's node does not come up: {done.stdout}{done.stderr}; logs in {root}")
