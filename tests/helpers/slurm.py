"""A real SLURM of two nodes on this machine, as root or as anybody: Debian's slurmctld, slurmd, slurm-client and munge."""

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from forks import ROOT
from running import PATIENCE, free_port

OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
SBIN = os.pathsep.join([os.environ["PATH"], "/usr/sbin"])  # where the daemons are, for users other than root
CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPort={ports[0]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
KillWait=5
JobRequeue=0
MailProg=/bin/true
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=16000
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=16000
PartitionName=debug Nodes=node[1-2] Default=YES State=UP
"""


def installed() -> bool:
    """Whether this machine has SLURM's daemons."""
    return shutil.which("slurmctld", path=SBIN) is not None


class Cluster:
    """Commands of a running cluster, from the repository's root; the state is in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.daemons = folder, []
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        path = f"{Path(sys.executable).parent}:{SBIN}"
        self.env = kept | {"PATH": path, "SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}

    def run(self, *words: object) -> str:
        """What a SLURM client prints; raises CalledProcessError, with its own words, if it fails."""
        done = subprocess.run(
            [*map(str, words)], cwd=ROOT, env=self.env, capture_output=True, text=True, timeout=PATIENCE
        )
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, [*words, done.stderr.strip()])
        return done.stdout

    def sbatch(self, *words: object) -> str:
        """Submit; returns the job's id."""
        return self.run("sbatch", "--parsable", *words).strip()

    def states(self, *jobs: str) -> dict[str, str]:
        """State by id, JOB or JOB_TASK; tasks that have never started stand together as JOB_[TASKS]."""
        lines = self.run("squeue", "--noheader", "--states=all", "--format=%i %T", "--jobs=" + ",".join(jobs))
        return dict(line.split() for line in lines.splitlines())

    def wait(self, *jobs: str, timeout: float = PATIENCE) -> dict[str, str]:
        """Their states, once all are over; raises TimeoutError (seconds)."""
        self.until(lambda: set(self.states(*jobs).values()) <= OVER, timeout)
        return self.states(*jobs)

    def until(self, done: Callable[[], bool], timeout: float = PATIENCE) -> None:
        """Return as soon as done() is true; raises TimeoutError, with the queue and the end of the daemons' log."""
        end = time.monotonic() + timeout
        while not done():
            if time.monotonic() > end:
                queue = subprocess.run(["squeue", "--states=all"], env=self.env, capture_output=True, text=True)
                raise TimeoutError((self.folder / "daemons.log").read_text()[-2000:] + queue.stdout + queue.stderr)
            time.sleep(0.1)


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """A cluster that is ready for jobs; at the end, or when this process is killed, it is gone with all its jobs."""
    folder = Path(tempfile.mkdtemp(prefix="slurm"))
    keeper = subprocess.Popen([sys.executable, __file__, folder], stdin=subprocess.PIPE, start_new_session=True)
    it = Cluster(folder)
    try:
        _start(it)
        it.until(lambda: _ready(it))
        yield it
    finally:
        keeper.stdin.close()
        for process in (keeper, *it.daemons):
            process.wait()


def _start(it: Cluster) -> None:
    folder, host, ports = it.folder, socket.gethostname().partition(".")[0], [free_port() for _ in range(3)]
    user = pwd.getpwuid(os.geteuid()).pw_name
    folder.chmod(0o711)  # munge wants its socket to be in reach of everybody
    for name in ("state", "spool.node1", "spool.node2"):
        (folder / name).mkdir()
    (folder / "slurm.conf").write_text(CONF.format(host=host, user=user, folder=folder, ports=ports))
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "seed", "log")]
    munged = ("munged", "--foreground", f"--socket={folder}/munge.socket", *files)
    slurmds = [("slurmd", "-D", "-N", node) for node in ("node1", "node2")]
    with (folder / "daemons.log").open("a") as log:
        for words in (munged, ("slurmctld", "-D"), *slurmds):
            it.daemons.append(subprocess.Popen(words, env=it.env, stdout=log, stderr=log))


def _ready(it: Cluster) -> bool:
    """Whether both nodes wait for jobs; not while the controller does not answer."""
    with contextlib.suppress(subprocess.CalledProcessError):
        return it.run("sinfo", "--noheader", "--Node", "--format=%T").split() == ["idle", "idle"]
    return False


def _kill(folder: Path) -> bool:
    """kill -9 every process that has the cluster's slurm.conf in its environment; whether there was one."""
    mark, found = f"SLURM_CONF={folder}/slurm.conf".encode(), False
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (process / "environ").read_bytes().split(b"\0"):
                os.kill(int(process.name), signal.SIGKILL)
                found = True
    return found


if __name__ == "__main__":  # the keeper of a cluster: its stdin ends with the process that started it
    sys.stdin.read()
    while _kill(Path(sys.argv[1])):
        time.sleep(0.02)
    shutil.rmtree(sys.argv[1])
