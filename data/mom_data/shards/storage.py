"""Reads the files of a token dataset, wherever it lies: a local folder, http(s)://, s3://, or another URL that fsspec
supports.

Local files are read where they are. Remote ones are fetched whole into a folder of this node, because documents are
read in random order, and fetching a shard at once is several times faster than many random reads of it. The ranks and
loader processes of a node share that cache:

    CACHE/shards/SHA256                a whole file, checked; named by its content, so that datasets can share it
    CACHE/shards/SHA256.BYTES.partial  a file that the process holding SHA256.lock fetches, or that a dead process left
    CACHE/shards/SHA256.lock           held by the process that fetches, while the others wait for it
    CACHE/shards/SHA256.failed         why the last fetch failed; the file is tried again after a pause

Nothing else is ever counted or removed. CACHE may be a folder that holds other things, and files in CACHE/shards that
have other names or are not plain files are left alone. A file may be evicted while another process reads it, because
POSIX keeps an unlinked file until its last descriptor is closed.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import queue
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

import filelock

from mom_data.shards.format import sha256_of
from mom_tokenizers.errors import UserError

log = logging.getLogger(__name__)
T = TypeVar("T")

CACHE_BYTES = 32 << 30
_ASKING = 32  # how many sizes are requested at the same time
_CACHED = re.compile(r"([0-9a-f]{64})(?:\.([0-9]+)\.partial)?")  # the cache's names: sha256, size
_TOO_SOON = 60.0  # seconds: a file evicted this soon after its last use will likely be wanted again


class Stored(NamedTuple):
    """A file as the manifest describes it. `bytes` is None where the size is unknown."""

    name: str
    sha256: str
    bytes: int | None


class LocalFolder:
    """A folder of this machine."""

    def __init__(self, location: str | Path):
        self.location = str(location).removeprefix("file://")

    def read(self, name: str) -> bytes:
        return Path(self.location, name).read_bytes()

    def checked(self, file: Stored) -> bytes:
        """The file's bytes. Raises UserError where their checksum is not the manifest's, and OSError where the file
        cannot be read."""
        data = self.read(file.name)
        if hashlib.sha256(data).hexdigest() != file.sha256:
            raise UserError("its checksum is not the manifest's: it is damaged. Copy it again.")
        return data

    def sizes(self, names: Iterable[str]) -> dict[str, int | None]:
        """The size in bytes of each file that exists. Raises PermissionError where one may not be read, because
        otherwise training would fail much later."""
        paths = {name: Path(self.location, name) for name in names}
        for path in paths.values():
            if path.is_file() and not os.access(path, os.R_OK):
                raise PermissionError(errno.EACCES, "no permission to read it", str(path))
        return {name: path.stat().st_size for name, path in paths.items() if path.is_file()}

    def open(self, file: Stored) -> int:
        """A file descriptor to read from. The system is asked to read the whole file ahead."""
        descriptor = os.open(Path(self.location, file.name), os.O_RDONLY)
        _read_ahead(descriptor)
        return descriptor

    def prefetch(self, file: Stored) -> None:
        try:
            descriptor = self.open(file)
        except OSError:
            return  # the error is raised again when the file is read
        os.close(descriptor)

    def used(self, descriptor: int) -> None:
        """Does nothing, because local files are in no cache."""


class RemoteFolder:
    """A remote folder that fsspec can reach, read through a cache on this node.

    A fetch that fails, stalls for `timeout` seconds, ends early, or brings other bytes than the manifest says is tried
    `attempts` times with growing random waits. After that no process of the node tries it again for `pause` seconds.
    Endpoints and credentials come from the environment (AWS_ENDPOINT_URL and the like, https_proxy) and from fsspec's
    configuration. Raises UserError where the protocol is unknown or its package is missing.
    """

    def __init__(self, location: str, cache: Cache, attempts: int = 5, timeout: float = 60.0, pause: float = 60.0):
        self.location, self.cache = location.rstrip("/"), cache
        self.attempts, self.timeout, self.pause = attempts, timeout, pause
        self._start = time.time()
        # Both begin with the id of the process to which they belong.
        self._reached: tuple[int, Any] | None = None
        self._wanted: tuple[int, queue.SimpleQueue[Stored], set[str]] | None = None
        _ = self._filesystem  # imports its packages now, in the main thread and before any fork

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_reached": None, "_wanted": None}

    @property
    def _filesystem(self) -> Any:
        """fsspec's filesystem. Each process has its own, because its event loop does not survive a fork."""
        if self._reached is None or self._reached[0] != os.getpid():
            self._reached = os.getpid(), _filesystem(self.location, self.timeout)
        return self._reached[1]

    def _url(self, name: str) -> str:
        return f"{self.location}/{quote(name) if self.location.startswith('http') else name}"

    def _retried(self, what: Callable[[Any], T]) -> T:
        """The result of what(filesystem), which is tried again while it fails. Raises OSError after the last attempt,
        and at once where the file does not exist or may not be read."""
        import tenacity

        def once() -> T:
            try:
                return what(self._filesystem)
            except OSError as error:
                if not isinstance(error, FileNotFoundError):
                    raise
                if _absent(error):
                    raise FileNotFoundError("there is no such file") from error
                raise OSError(f"{type(error.__cause__).__name__}: {error.__cause__}") from error
            except Exception as error:  # each protocol has its own exceptions: those of aiohttp, of botocore, ...
                raise OSError(f"{type(error).__name__}: {error}") from error

        return tenacity.Retrying(
            stop=tenacity.stop_after_attempt(self.attempts),
            wait=tenacity.wait_random_exponential(multiplier=0.2, max=30),
            retry=tenacity.retry_if_not_exception_type((FileNotFoundError, PermissionError)),
            reraise=True,
        )(once)

    def read(self, name: str) -> bytes:
        """The bytes of a file whose checksum is unknown. It is fetched each time, since a copy could be out of date."""
        return self._retried(lambda filesystem: filesystem.cat_file(self._url(name)))

    def checked(self, file: Stored) -> bytes:
        """Does the same as `LocalFolder.checked`. A damaged copy in the cache is fetched again."""
        for _ in range(2):
            with os.fdopen(self.open(file), "rb") as opened:
                data = opened.read()
            if hashlib.sha256(data).hexdigest() == file.sha256:
                return data
            self.cache.drop(file)
        raise UserError(f"{self.cache.folder} changes what is written to it: use another cache folder")

    def sizes(self, names: Iterable[str]) -> dict[str, int | None]:
        """The size in bytes of each file that exists, or None where the server does not say it. Sizes come from a
        listing; over http, which has no listings, they are requested one by one."""
        names = list(names)
        if not self.location.startswith("http"):
            listed = self._retried(lambda filesystem: filesystem.ls(self.location, detail=True))
            there = {entry["name"].rsplit("/", 1)[-1]: entry["size"] for entry in listed}
            return {name: there[name] for name in names if name in there}

        def ask(name: str) -> tuple[str, int | None] | None:
            try:
                return name, self._retried(lambda filesystem: filesystem.info(self._url(name))["size"])
            except FileNotFoundError:
                return None

        with ThreadPoolExecutor(_ASKING) as pool:
            return dict(answer for answer in pool.map(ask, names) if answer is not None)

    def open(self, file: Stored) -> int:
        """A file descriptor to read from, after the file was brought into the cache. Raises OSError after the last
        attempt, and at once where any process of the node has failed to fetch it within the last `pause` seconds."""
        descriptor = self.cache.open(file, self._fetch, max(self._start, time.time() - self.pause))
        _read_ahead(descriptor)
        return descriptor

    def _fetch(self, file: Stored, partial: Path) -> None:
        def once(filesystem: Any) -> None:
            filesystem.get_file(self._url(file.name), str(partial))
            got = partial.stat().st_size
            if file.bytes not in (None, got):
                raise OSError(f"{got} bytes came, the manifest says {file.bytes}")
            # The checksum is computed afterwards, because s3fs fetches the parts of a file in parallel. The file is
            # then still in the page cache.
            if sha256_of(partial) != file.sha256:
                raise OSError("what came has another checksum than the manifest says")

        self._retried(once)

    def prefetch(self, file: Stored) -> None:
        """Start fetching in the background, one file after another. Errors are raised only when the file is opened."""
        if self._wanted is None or self._wanted[0] != os.getpid():
            self._wanted = os.getpid(), queue.SimpleQueue(), set()
            threading.Thread(target=self._fetch_wanted, args=self._wanted[1:], daemon=True).start()
        _, wanted, names = self._wanted
        if file.name not in names:
            names.add(file.name)
            wanted.put(file)

    def _fetch_wanted(self, wanted: queue.SimpleQueue[Stored], names: set[str]) -> None:
        while True:
            file = wanted.get()
            try:
                os.close(self.open(file))
            except OSError as error:
                log.debug("prefetch of %s: %s", self._url(file.name), error)
            names.discard(file.name)

    def used(self, descriptor: int) -> None:
        """Note that an open file is in use, so that others are evicted first."""
        os.utime(descriptor)


def default_cache() -> Path:
    """The user's own cache folder among the temporary files of this machine."""
    return Path(tempfile.gettempdir(), f"mom-cache-{os.getuid()}")


class Cache:
    """A cache of whole files in the subfolder `shards` of `folder`, shared by the processes of a node.

    It holds at most `limit` bytes, and evicts the least recently used files first. The default folder is
    $TMPDIR/mom-cache-UID. Raises UserError where the folder belongs to another user or cannot be written.
    """

    def __init__(self, folder: Path | None = None, limit: int = CACHE_BYTES):
        above = folder or default_cache()
        self.folder = above / "shards"
        self.limit = limit
        try:
            above.mkdir(mode=0o700, parents=True, exist_ok=True)
            if folder is None and above.lstat().st_uid != os.getuid():
                raise UserError(f"{above} belongs to another user: set data.cache to a folder of your own")
            self.folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise UserError(f"the cache folder cannot be made: {error}. Set data.cache to another one.") from None
        if self.folder.is_symlink():
            raise UserError(f"{self.folder} is a link: the cache removes files there, so let data.cache itself be one")
        self._warned = False

    def open(self, file: Stored, fetch: Callable[[Stored, Path], None], since: float) -> int:
        """A descriptor of the whole file. Where the cache lacks it, `fetch(file, path)` writes it to a path. Raises
        OSError where the fetch fails, or has failed after the time `since`."""
        held = self._held(file)
        if held is not None:
            return held
        self._raise_failure(file, since)
        with self._lock(file.sha256):
            held = self._held(file)
            if held is not None:
                return held
            self._raise_failure(file, since)
            return self._fetched(file, fetch)

    def drop(self, file: Stored) -> None:
        """Remove a file from the cache."""
        (self.folder / file.sha256).unlink(missing_ok=True)

    def _lock(self, name: str, timeout: float = -1) -> filelock.BaseFileLock:
        return filelock.FileLock(self.folder / f"{name}.lock", timeout=timeout)

    def _held(self, file: Stored) -> int | None:
        path = self.folder / file.sha256
        if path.is_symlink():  # the cache never makes links; the fetched file will replace this one
            return None
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        if file.bytes not in (None, os.fstat(descriptor).st_size):
            os.close(descriptor)
            return None
        os.utime(descriptor)
        return descriptor

    def _failed(self, file: Stored) -> Path:
        return self.folder / f"{file.sha256}.failed"

    def _raise_failure(self, file: Stored, since: float) -> None:
        try:
            if self._failed(file).stat().st_mtime > since:
                raise OSError(self._failed(file).read_text())
        except FileNotFoundError:
            pass

    def _fetched(self, file: Stored, fetch: Callable[[Stored, Path], None]) -> int:
        partial = self._reserve(file)
        try:
            fetch(file, partial)
            descriptor = os.open(partial, os.O_RDONLY)
            os.fsync(descriptor)
            partial.rename(self.folder / file.sha256)
        except OSError as error:
            self._failed(file).write_text(str(error) or type(error).__name__)
            raise
        finally:
            partial.unlink(missing_ok=True)
        self._failed(file).unlink(missing_ok=True)
        return descriptor

    def _reserve(self, file: Stored) -> Path:
        """Make an empty temporary file, whose name says how many bytes it will have so that they are counted already.
        The caller holds the file's lock."""
        size = file.bytes or 0
        assert size <= self.limit, "TokenDataset refuses shards that the cache cannot hold"
        partial = self.folder / f"{file.sha256}.{size}.partial"
        while True:
            with self._lock("room"):
                if self._make_room(size, own=file.sha256):
                    partial.touch()
                    return partial
            time.sleep(0.2)  # other processes reserve the rest for their fetches, which end at some time

    def _make_room(self, size: int, own: str) -> bool:
        whole: list[tuple[float, int, Path]] = []
        total = size
        for entry in os.scandir(self.folder):
            named = _CACHED.fullmatch(entry.name)
            try:
                if named is None or not entry.is_file(follow_symlinks=False):
                    continue
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            path, (key, reserved) = Path(entry.path), named.groups()
            if reserved is None:
                whole.append((status.st_mtime, status.st_size, path))
                total += status.st_size
            elif key == own or self._abandoned(key):
                path.unlink(missing_ok=True)
            else:
                total += max(status.st_size, int(reserved))
        for last_used, its_size, path in sorted(whole):
            if total <= self.limit:
                break
            path.unlink(missing_ok=True)
            total -= its_size
            if time.time() - last_used < _TOO_SOON and not self._warned:
                self._warned = True
                log.warning(
                    "%s is too small: a shard had to go %.0f s after its last use and may be fetched again; "
                    "raise data.cache_gib",
                    self.folder,
                    time.time() - last_used,
                )
        return total <= self.limit

    def _abandoned(self, key: str) -> bool:
        """Whether no process holds the lock. A lock is released when its process ends, however that happens."""
        try:
            with self._lock(key, timeout=0):
                return True
        except filelock.Timeout:
            return False


Folder = LocalFolder | RemoteFolder


def folder_at(
    location: str | Path,
    cache: Path | None = None,
    cache_bytes: int = CACHE_BYTES,
    *,
    attempts: int = 5,
    timeout: float = 60.0,
    pause: float = 60.0,
) -> Folder:
    """The folder at a path or URL. All other arguments concern remote folders only (see `RemoteFolder`)."""
    if "://" not in str(location) or str(location).startswith("file://"):
        return LocalFolder(location)
    return RemoteFolder(str(location), Cache(cache, cache_bytes), attempts, timeout, pause)


def _filesystem(location: str, timeout: float) -> Any:
    """fsspec's filesystem for a URL, without retries of its own, which would multiply with those made here."""
    import fsspec

    protocol = location.partition("://")[0]
    options: dict[str, Any] = {}
    try:
        if protocol in ("http", "https"):
            import aiohttp

            limits = aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)
            options = {"client_kwargs": {"timeout": limits, "trust_env": True}}
        elif protocol == "s3":
            options = {
                "config_kwargs": {
                    "connect_timeout": timeout,
                    "read_timeout": timeout,
                    "retries": {"total_max_attempts": 1},
                },
                "default_block_size": 8 << 20,  # bytes of each part that is fetched in parallel, held in memory
                "max_concurrency": 4,
                "use_listings_cache": False,
            }
        filesystem = fsspec.filesystem(protocol, skip_instance_cache=True, **options)
    except ImportError as error:
        raise UserError(f"{location}: {error}. pip install 'mixture-of-mamba[remote]'") from None
    except ValueError as error:
        raise UserError(f"{location}: {error}. Known are folders, http(s):// and s3:// among others") from None
    if protocol == "s3":
        filesystem.retries = 1
    return filesystem


def _absent(error: FileNotFoundError) -> bool:
    """Whether the server said that there is no such file. fsspec's HTTP filesystem raises FileNotFoundError for every
    failure of a HEAD request."""
    cause = error.__cause__
    said = getattr(cause, "status", None) in (404, 410) or type(cause).__module__.startswith("botocore")
    return cause is None or said


def _read_ahead(descriptor: int) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
