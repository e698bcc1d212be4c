"""A real Slurm on this machine, with accounting: slurmctld, slurmdbd on MariaDB, and one slurmd per host.

Each slurmd lives in a network namespace of its own where the kernel allows that, else all on loopback. By hand:

    python tests/helpers/slurm.py FOLDER --nodes 3      # prints SLURM_CONF, runs until Ctrl-C

Debian: apt-get install -y --no-install-recommends slurm-wlm slurmdbd mariadb-server munge iproute2
"""

import argparse
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

from tests.helpers.hosts import Hosts
from tests.helpers.hosts import why_not as why_no_hosts

PROGRAMS = ("slurmctld", "slurmd", "slurmdbd", "munged", "mariadbd", "mariadb-install-db", "sbatch", "srun")
CONF = """\
ClusterName=mom
SlurmctldHost={host}({controller})
SlurmctldPort={ctld_port}
SlurmUser={user}
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/run/munge.sock
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd-%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
# no cgroups of our own in a container
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd_port}
# the clients take the socket of munge from here, not from AuthInfo
AccountingStoragePass={root}/run/munge.sock
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=6
InactiveLimit=0
MinJobAge=300
KillWait=5
OverTimeLimit=0
MessageTimeout=10
TCPTimeout=2
JobRequeue=1
PropagateResourceLimits=NONE
{nodes}
PartitionName=debug Nodes={all} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=high Nodes={all} MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
DBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={root}/run/munge.sock
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={dbd_port}
SlurmUser={user}
PidFile={root}/run/slurmdbd.pid
LogFile={root}/log/slurmdbd.log
StorageType=accounting_storage/mysql
# over TCP: slurmdbd ignores the path of the database's socket
StorageHost=127.0.0.1
StoragePort={db_port}
StorageUser=root
StorageLoc=slurm_acct
"""


def why_not() -> str | None:
    """The reason why a Slurm cannot be started here, or None where it can."""
    if os.geteuid() != 0:
        return "starting a Slurm needs root"
    missing = [program for program in PROGRAMS if _find(program) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (tests/helpers/slurm.py says how)"
    return None


class Slurm:
    """A Slurm cluster with its files in `root`. It is a context manager. `hosts` is None where its nodes are on
    loopback."""

    def __init__(self, root: Path, nodes: int):
        self.root, self.nodes = root.resolve(), nodes
        self.hosts: Hosts | None = None
        self.conf = self.root / "slurm.conf"
        self._processes: list[subprocess.Popen] = []
        self._stack = ExitStack()

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "SLURM_CONF": str(self.conf)}

    def __enter__(self) -> "Slurm":
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start(self) -> None:
        for name in ("state", "run", "log", "db", *(f"spool/n{i}" for i in range(self.nodes))):
            (self.root / name).mkdir(parents=True)
        for folder in (self.root, self.root / "run"):  # munge refuses a socket that others cannot reach
            folder.chmod(0o755)
        if why_no_hosts() is None:
            self.hosts = self._stack.enter_context(Hosts(self.root, self.nodes))
        ports = _free_ports(3 + self.nodes)
        self._write_configuration(ports)
        self._start_munge()
        self._start_database(ports[2])
        self._daemon("slurmdbd", "-D")
        self._until("slurmdbd", lambda: self.client("sacctmgr", "-n", "show", "cluster", check=False).returncode == 0)
        self.client("sacctmgr", "-i", "add", "cluster", "mom")  # before slurmctld, which stops without
        self._daemon("slurmctld", "-D", "-f", str(self.conf))
        for node in range(self.nodes):
            self.start_node(node)
        self._until("the nodes", lambda: len(self.idle()) == self.nodes)

    def _write_configuration(self, ports: list[int]) -> None:
        cpus = os.cpu_count() or 1
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**21
        hosts, here = self.hosts, socket.gethostname()
        lines = []
        for i in range(self.nodes):
            where = (
                f"NodeHostname=n{i} NodeAddr={hosts.address(i)} Port=6818"
                if hosts
                else f"NodeHostname={here} NodeAddr=127.0.1.{i + 1} Port={ports[3 + i]}"
            )
            lines.append(f"NodeName=n{i} {where} CPUs={cpus} RealMemory={memory} State=UNKNOWN")
        values = {
            "root": self.root,
            "host": here,
            "user": getpass.getuser(),
            "controller": hosts.here if hosts else "127.0.0.1",
            "ctld_port": ports[0],
            "dbd_port": ports[1],
            "db_port": ports[2],
            "nodes": "\n".join(lines),
            "all": f"n[0-{self.nodes - 1}]",
        }
        self.conf.write_text(CONF.format(**values))
        dbd = self.root / "slurmdbd.conf"
        dbd.write_text(DBD_CONF.format(**values))
        dbd.chmod(0o600)

    def _start_munge(self) -> None:
        key = self.root / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        run, log = self.root / "run", self.root / "log"
        self._daemon(
            *("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={run}/munge.sock"),
            *(f"--pid-file={run}/munged.pid", f"--log-file={log}/munged.log", f"--seed-file={self.root}/munge.seed"),
        )
        self._until("munged", (run / "munge.sock").exists)

    def _start_database(self, port: int) -> None:
        user, data = f"--user={getpass.getuser()}", f"--datadir={self.root / 'db'}"
        install = ["mariadb-install-db", "--no-defaults", user, data, "--skip-test-db"]
        install.append("--auth-root-authentication-method=normal")
        with open(self.root / "log" / "install-db.log", "w") as log:
            subprocess.run(install, check=True, timeout=120, stdout=log, stderr=log)
        self._daemon(
            *("mariadbd", "--no-defaults", user, data, f"--socket={self.root}/run/mysql.sock", f"--port={port}"),
            *("--bind-address=127.0.0.1", "--innodb-buffer-pool-size=64M", "--innodb-log-file-size=16M"),
            *("--innodb-lock-wait-timeout=900", "--innodb-flush-log-at-trx-commit=0"),
        )
        self._until("mariadbd", lambda: not socket.socket().connect_ex(("127.0.0.1", port)))

    def start_node(self, node: int) -> None:
        command = ["slurmd", "-D", "-N", f"n{node}", "-f", str(self.conf)]
        if self.hosts is None:
            self._daemon(*command)
            return
        with open(self.root / "log" / f"n{node}.out", "a") as log:
            command[0] = str(_find("slurmd"))
            self._processes.append(
                self.hosts.popen(node, command, stdout=log, stderr=log, env=self.environment, cwd=self.root)
            )

    def _daemon(self, program: str, *arguments: str) -> None:
        with open(self.root / "log" / f"{program}.out", "a") as log:
            self._processes.append(
                subprocess.Popen(
                    [str(_find(program)), *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=self.environment,
                    cwd=self.root,
                    start_new_session=True,
                )
            )

    def _until(self, what: str, ready, timeout: float = 120) -> None:
        deadline = time.monotonic() + timeout
        while not ready():
            if time.monotonic() > deadline:
                raise OSError(f"{what} did not come up within {timeout:.0f} s: see {self.root / 'log'}")
            time.sleep(0.1)

    def client(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run one of Slurm's commands, with a time limit, because they hang long where the controller is away."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=30)
        if check and done.returncode:
            raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done

    def idle(self) -> list[str]:
        """The names of the nodes that answer and have no work."""
        return self.client(
            "sinfo", "-h", "-r", "-N", "-p", "debug", "-t", "idle", "-o", "%N", check=False
        ).stdout.split()

    def stop(self) -> None:
        if self.conf.exists() and self._processes:
            with suppress(subprocess.TimeoutExpired, OSError):
                self.client("scancel", "-u", getpass.getuser(), check=False)
        for process in reversed(self._processes):
            process.terminate()
        for process in self._processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._stack.close()


def _find(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _free_ports(count: int) -> list[int]:
    held = [socket.socket() for _ in range(count)]
    for s in held:
        s.bind(("", 0))
    ports = [s.getsockname()[1] for s in held]
    for s in held:
        s.close()
    return ports


def main() -> None:
    parser = argparse.ArgumentParser(description="Run a Slurm cluster on this machine until Ctrl-C.")
    parser.add_argument("folder", type=Path, help="a new folder for everything it writes")
    parser.add_argument("--nodes", type=int, default=3)
    arguments = parser.parse_args()
    if (reason := why_not()) is not None:
        sys.exit(f"slurm.py: {reason}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    with Slurm(arguments.folder, arguments.nodes) as slurm:
        kind = "hosts" if slurm.hosts else "loopback"
        print(f"export SLURM_CONF={slurm.conf}   # {arguments.nodes} nodes on {kind}", flush=True)
        with suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
