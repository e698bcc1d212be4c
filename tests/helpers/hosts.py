"""Hosts for tests: network namespaces on one bridge, each with its own address, host name and /etc/hosts.

They need Linux and root.
"""

import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

NSENTER = 'mount --bind "$1" /etc/hosts; hostname "$2"; shift 2; exec "$@"'


class Hosts:
    """`count` hosts called n0, n1, and so on. It is a context manager, at whose end every process inside is killed."""

    def __init__(self, folder: Path, count: int):
        self.names = [f"n{i}" for i in range(count)]
        self.hosts_file = folder / "hosts"
        # names and addresses of this process's own: several runs of the tests may share a machine
        self._prefix = f"mom{os.getpid() % 10**6}"
        self.network = f"10.{64 + os.getpid() % 128}.{os.getpid() // 128 % 256}"

    def address(self, host: int) -> str:
        return f"{self.network}.{11 + host}"

    @property
    def here(self) -> str:
        """The address of this machine on the network of the hosts."""
        return f"{self.network}.1"

    def _space(self, host: int) -> str:
        return f"{self._prefix}n{host}"

    def __enter__(self) -> "Hosts":
        try:
            self._up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _up(self) -> None:
        lines = ["127.0.0.1 localhost", f"{self.here} {os.uname().nodename}"]
        lines += [f"{self.address(i)} {name}" for i, name in enumerate(self.names)]
        self.hosts_file.write_text("\n".join(lines) + "\n")
        bridge = f"{self._prefix}b"
        ip("link", "add", bridge, "type", "bridge")
        ip("addr", "add", f"{self.here}/24", "dev", bridge)
        ip("link", "set", bridge, "up")
        for i in range(len(self.names)):
            space, cable = self._space(i), f"{self._prefix}v{i}"
            ip("netns", "add", space)
            ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
            ip("link", "set", cable, "master", bridge)
            ip("link", "set", cable, "up")
            ip("-n", space, "addr", "add", f"{self.address(i)}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "eth0", "up")
            ip("-n", space, "link", "set", "lo", "up")

    def __exit__(self, *_: object) -> None:
        for i in range(len(self.names)):
            self.kill(i)
            ip("netns", "del", self._space(i), check=False)
        ip("link", "del", f"{self._prefix}b", check=False)

    def popen(self, host: int, command: list[str], **options) -> subprocess.Popen:
        """Start a command on a host. The process id is that of the command itself."""
        # not `ip netns exec`: that mounts /sys anew, and slurmd finds no cgroups there
        enter = ["nsenter", f"--net=/run/netns/{self._space(host)}", "unshare", "--uts", "--mount"]
        there = ["sh", "-c", NSENTER, "sh", str(self.hosts_file), self.names[host]]
        return subprocess.Popen([*enter, *there, *map(str, command)], start_new_session=True, **options)

    def pids(self, host: int) -> list[int]:
        return [int(pid) for pid in ip("netns", "pids", self._space(host), check=False).split()]

    def kill(self, host: int) -> None:
        """Cut the power of a host: all its processes end at once."""
        for pid in self.pids(host):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def link(self, host: int, state: str) -> None:
        """Pull (`down`) or plug in (`up`) the cable of a host."""
        ip("link", "set", f"{self._prefix}v{host}", state)


def ip(*arguments: str, check: bool = True) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=30)
    if check and done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def why_not() -> str | None:
    """The reason why this machine cannot make such hosts, or None where it can."""
    if os.name != "posix" or os.geteuid() != 0:
        return "network namespaces need root"
    try:
        space = f"mom{os.getpid()}probe"
        ip("netns", "add", space)
        ip("netns", "del", space)
    except FileNotFoundError:
        return "the `ip` command is missing: apt-get install iproute2"
    except OSError as error:
        return f"the kernel allows no network namespaces: {error}"
    return None
