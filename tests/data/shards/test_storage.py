"""Token shards on real servers: a threaded HTTP server that can be told to fail, and moto's S3 over a socket."""

import itertools
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from dataclasses import fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice

import pytest
import torch

from mom_data.batches.loader import Share, batches
from mom_data.order.plan import Plan, Source
from mom_data.shards.dataset import TokenDataset
from mom_tokenizers.errors import UserError
from tests.helpers.corpus import VOCAB, rewrite_manifest, write_dataset

pytest.importorskip("aiohttp", reason="pip install 'mixture-of-mamba[remote]': remote shards are NOT tested")
pytest.importorskip("tenacity", reason="pip install 'mixture-of-mamba[remote]': remote shards are NOT tested")

SHARDS = 4


class Server(ThreadingHTTPServer):
    """An HTTP server of a folder. `faults[name]` lists what the next GETs of a file meet, one after another."""

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.faults, self.gets = folder, {}, Counter()
        self.stalling, self.release = threading.Event(), threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/d"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self):
        self.release.set()
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(None)

    def do_GET(self):
        name = self.path.rsplit("/", 1)[-1]
        self.server.gets[name] += 1
        self.answer(next(self.server.faults.get(name, iter(())), None))

    def answer(self, fault):
        path = self.server.folder / self.path.rsplit("/", 1)[-1]
        status = fault if isinstance(fault, int) else 200 if path.is_file() else 404
        body = path.read_bytes() if status == 200 else b"no"
        if fault == "wrong bytes":
            body = body[:100] + bytes([body[100] ^ 1]) + body[101:]
        self.send_response(status)
        if fault != "ends early, length unknown":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault in ("stalls", "ends early", "ends early, length unknown"):
            self.wfile.write(body[: len(body) // 2])
            if fault == "stalls":
                self.server.stalling.set()
                self.server.release.wait(60)
        else:
            self.wfile.write(body)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("storage") / "d"
    write_dataset(folder, documents=80, shards=SHARDS, latent_width=8)
    return folder


@pytest.fixture
def server(folder):
    server = Server(folder)
    yield server
    server.stop()


@pytest.fixture
def at(server, tmp_path):
    """A function that opens the server's dataset through a cache of the test's own."""

    def opened(**settings):
        return TokenDataset(server.url, cache=tmp_path / "cache", **{"attempts": 3, "timeout": 30.0} | settings)

    return opened


@pytest.fixture
def bucket(folder, monkeypatch):
    """(s3:// URL of a copy of the dataset, moto's server, a client of boto3)."""
    moto_server = pytest.importorskip("moto.server", reason="pip install 'moto[server]': S3 is NOT tested")
    boto3 = pytest.importorskip("boto3", reason="pip install 'moto[server]': S3 is NOT tested")
    pytest.importorskip("s3fs", reason="pip install s3fs: S3 is NOT tested")
    s3 = moto_server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    s3.start()
    host, port = s3.get_host_and_port()
    urllib.request.urlopen(f"http://{host}:{port}/moto-api/reset", data=b"").close()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    client = boto3.client("s3")
    client.create_bucket(Bucket="corpus")
    for file in folder.iterdir():
        client.upload_file(str(file), "corpus", f"tokens/train/{file.name}")
    yield "s3://corpus/tokens/train", s3, client
    s3.stop()


def documents(dataset, shards=range(SHARDS)):
    """The bytes of every document, or None for one that is masked."""
    read = (dataset.read(k, d) for k in shards for d in range(dataset.shards[k]["documents"]))
    return [segments and [(s.modality, s.latent, s.values.tobytes()) for s in segments] for segments in read]


def cached(cache, suffix=""):
    return [path for path in cache.iterdir() if path.suffix == suffix]


def tar(k):
    return f"part-{k:05d}.tar"


def test_documents_are_the_same_from_a_folder_over_http_and_from_s3(folder, at, bucket, tmp_path):
    local, http = TokenDataset(folder), at()
    s3 = TokenDataset(bucket[0], cache=tmp_path / "another")
    wanted = documents(local)
    assert None not in wanted
    assert documents(http) == wanted
    assert documents(s3) == wanted
    assert local.fingerprint == http.fingerprint == s3.fingerprint
    assert s3.where(1) == f"s3://corpus/tokens/train/{tar(1)}"


@pytest.mark.parametrize(
    "faults",
    [[503, 503], ["stalls"], ["ends early"], ["ends early, length unknown"], ["wrong bytes", 500]],
    ids=lambda faults: "+".join(map(str, faults)),
)
def test_a_fetch_that_fails_is_tried_again(folder, server, at, faults):
    server.faults[tar(1)] = iter(faults)
    assert documents(at(timeout=2.0 if "stalls" in faults else 30.0)) == documents(TokenDataset(folder))
    assert server.gets[tar(1)] == len(faults) + 1
    assert server.gets[tar(0)] == 1


@pytest.mark.parametrize(
    ("fault", "named"), [(503, "503"), (404, "no such file"), ("wrong bytes", "checksum"), ("ends early", "bytes")]
)
def test_a_shard_that_cannot_be_had_is_masked_named_once_and_tried_again_after_a_pause(
    folder, server, at, tmp_path, caplog, fault, named
):
    wanted = documents(TokenDataset(folder))
    server.faults[tar(1)] = itertools.repeat(fault)
    dataset = at(attempts=2, pause=3600)
    got = documents(dataset)
    per_shard = len(wanted) // SHARDS
    assert got == wanted[:per_shard] + [None] * per_shard + wanted[2 * per_shard :]
    asked = 1 if fault == 404 else 2
    assert server.gets[tar(1)] == asked
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert f"{server.url}/{tar(1)} cannot be had" in warning
    assert named in warning

    del server.faults[tar(1)]
    assert documents(dataset, [1]) == [None] * per_shard
    assert server.gets[tar(1)] == asked, "it was asked for again before the pause was over"
    (failed,) = cached(tmp_path / "cache/shards", ".failed")
    os.utime(failed, (time.time() - 7200,) * 2)  # two hours pass
    assert documents(dataset, [1]) == wanted[per_shard : 2 * per_shard]
    assert not cached(tmp_path / "cache/shards", ".failed")


def test_a_new_run_does_not_wait_for_the_pause_of_the_one_before(folder, server, at):
    server.faults[tar(1)] = itertools.repeat(503)
    assert documents(at(attempts=1, pause=3600), [1])[0] is None
    del server.faults[tar(1)]
    time.sleep(0.05)  # beyond the clock's grain
    assert documents(at(pause=3600), [1]) == documents(TokenDataset(folder), [1])


def test_s3_that_goes_away_or_holds_other_bytes_masks_until_it_is_right_again(folder, bucket, tmp_path):
    url, s3, client = bucket
    dataset = TokenDataset(url, cache=tmp_path / "cache", attempts=2, timeout=30.0, pause=0.0)
    wanted = documents(TokenDataset(folder))
    per_shard = len(wanted) // SHARDS
    assert documents(dataset, [0]) == wanted[:per_shard]
    assert dataset.index(1) is not None
    host, port = s3.get_host_and_port()
    s3.stop()
    assert dataset.read(1, 0) is None
    assert documents(dataset, [0]) == wanted[:per_shard]
    again = type(s3)(host, port, verbose=False)
    again.start()
    try:
        assert documents(dataset, [1]) == wanted[per_shard : 2 * per_shard]
        key = {"Bucket": "corpus", "Key": f"tokens/train/{tar(2)}"}
        client.put_object(**key, Body=bytes(dataset.shards[2]["bytes"]))
        assert dataset.read(2, 0) is None
        client.put_object(**key, Body=(folder / tar(2)).read_bytes())
        assert documents(dataset, [2]) == wanted[2 * per_shard : 3 * per_shard]
    finally:
        again.stop()


READER = """
import hashlib, sys
from mom_data.shards.dataset import TokenDataset
dataset = TokenDataset(sys.argv[1], cache=__import__("pathlib").Path(sys.argv[2]), cache_bytes=int(sys.argv[3]))
digest = hashlib.sha256()
for k, shard in enumerate(dataset.shards):
    for d in range(shard["documents"]):
        for segment in dataset.read(k, d):
            digest.update(segment.values.tobytes())
print(digest.hexdigest())
"""


def reader(server, cache, limit=1 << 30):
    command = [sys.executable, "-c", READER, server.url, str(cache), str(limit)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_processes_of_a_node_fetch_a_shard_once(folder, server, tmp_path):
    server.faults[tar(0)] = iter(["stalls"])  # long enough for the second to wait for the first
    readers = [reader(server, tmp_path / "cache") for _ in range(2)]
    assert server.stalling.wait(300)
    while server.gets["manifest.json"] < 2:
        assert all(r.poll() is None for r in readers)
        time.sleep(0.05)
    time.sleep(0.3)
    assert server.gets[tar(0)] == 1
    server.release.set()  # what was sent ends early: the one who fetches tries again, the other still waits
    first, second = (r.communicate(timeout=300)[0] for r in readers)
    assert first == second != ""
    assert {name: n for name, n in server.gets.items() if not name.startswith("manifest.")} == {
        name: 1 + (name == tar(0)) for k in range(SHARDS) for name in (tar(k), f"part-{k:05d}.idx")
    }


def test_what_a_killed_process_was_fetching_is_never_taken_for_whole(folder, server, at, tmp_path):
    dataset, cache = at(), tmp_path / "cache/shards"
    server.faults[tar(1)] = iter(["stalls"])
    process = reader(server, tmp_path / "cache")
    assert server.stalling.wait(300)
    (partial,) = cached(cache, ".partial")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    whole = {path.name for path in cached(cache)}
    assert dataset.shards[0]["sha256"] in whole
    assert dataset.shards[1]["sha256"] not in whole
    assert dataset.read(2, 0) is not None
    assert not partial.exists(), "the next one to need room removes what the dead left"
    assert documents(dataset) == documents(TokenDataset(folder))


def test_the_cache_keeps_its_limit_and_what_was_used_last(folder, server, at, tmp_path):
    sizes = [shard["bytes"] for shard in TokenDataset(folder).shards]
    limit, cache, seen = int(0.6 * sum(sizes)), tmp_path / "cache/shards", []
    dataset, other = at(cache_bytes=limit), at(cache_bytes=limit)
    wanted = documents(TokenDataset(folder))
    per_shard = len(wanted) // SHARDS

    assert other.read(0, 0) is not None
    before = server.gets[tar(0)]
    for k in itertools.chain(range(SHARDS), reversed(range(SHARDS)), (0, 2, 1, 3)):
        assert documents(dataset, [k]) == wanted[k * per_shard : (k + 1) * per_shard]
        seen.append(sum(path.stat().st_size for path in cached(cache) + cached(cache, ".partial")))
        assert (cache / dataset.shards[k]["sha256"]).is_file(), "what is in use was evicted"
    assert max(sizes) < max(seen) <= limit
    assert server.gets[tar(0)] > before, "the shards must not all fit, or nothing is shown"
    asked = server.gets[tar(0)]
    assert documents(other, [0]) == wanted[:per_shard], "a file evicted while it is open can still be read"
    assert server.gets[tar(0)] == asked
    files = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    gone = [file for file in files if file.startswith(str(cache)) and file.endswith("(deleted)")]
    assert len(gone) == 1, "only `other` may hold an evicted file: it takes room on the disk"


def test_the_least_recently_used_goes_first(at, tmp_path, folder):
    everything = sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".tar", ".idx"))
    dataset, cache = at(cache_bytes=everything - 1), tmp_path / "cache/shards"
    shas = [shard["sha256"] for shard in dataset.shards]
    for k in (0, 1, 2):
        dataset.read(k, 0)
    for path in cached(cache):
        age = {shas[0]: 300, shas[1]: 400}.get(path.name, 200)
        os.utime(path, (time.time() - age,) * 2)
    dataset.read(3, 0)
    there = {path.name for path in cached(cache)}
    assert shas[1] not in there
    assert {shas[0], shas[2], shas[3]} <= there


def test_eviction_removes_nothing_that_the_cache_did_not_write(folder, server, at, tmp_path):
    """Foreign files, links and folders, beside the cache's own folder and in it, with any name."""
    cache, outside, sha = tmp_path / "cache", tmp_path / "outside", "0123456789abcdef" * 4
    outside.mkdir()
    for place in (cache, cache / "shards"):
        for sub in ("folder", f"{sha[::-1]}", "folder.partial"):
            (place / sub).mkdir(parents=True)
            (place / sub / "kept").write_text("foreign")
        for name in (
            "thesis",
            "model.tar",
            ".partial",
            "download.partial",
            "a.b.partial",
            f"{sha}.x.partial",
            "x.lock",
        ):
            (place / name).write_text("foreign")
        for name in (sha, "link", f"{sha}.7.partial"):
            (outside / f"{place.name}-{name}").write_bytes(bytes(10_000))
            (place / name).symlink_to(outside / f"{place.name}-{name}")
        (place / "linked folder").symlink_to(outside)
        (place / "dangling").symlink_to(tmp_path / "nowhere")
    # also by the very name of a shard
    (outside / "shard").write_text("foreign")
    first = TokenDataset(folder).shards[0]
    (cache / "shards" / first["sha256"]).symlink_to(outside / "shard")
    (cache / first["sha256"]).write_text("foreign")
    before = [path for path in [*cache.rglob("*"), *outside.rglob("*")] if path.name != first["sha256"]]

    sizes = [shard["bytes"] for shard in TokenDataset(folder).shards]
    limit = int(0.6 * sum(sizes))
    other = reader(server, cache, limit)
    dataset = at(cache_bytes=limit)
    assert documents(dataset) == documents(TokenDataset(folder))
    assert other.communicate(timeout=300)[0].strip()
    assert other.returncode == 0
    assert [path for path in before if not (path.is_symlink() or path.exists())] == []
    assert (outside / "shard").read_text() == (cache / first["sha256"]).read_text() == "foreign"
    names = {shard[key] for shard in dataset.shards for key in ("sha256", "index_sha256")}
    own = [p for p in (cache / "shards").iterdir() if p.name in names and not p.is_symlink()]
    assert 0 < sum(path.stat().st_size for path in own) <= limit
    assert len(own) < 2 * SHARDS, "nothing was evicted, so nothing is shown"


def test_a_link_in_place_of_the_caches_own_folder_is_refused(at, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/shards").symlink_to(tmp_path)
    with pytest.raises(UserError, match=r"cache/shards is a link"):
        at()
    (tmp_path / "cache/shards").unlink()
    (tmp_path / "cache/shards").write_text("a file")
    with pytest.raises(UserError, match=r"cannot be made: .*cache/shards.*data.cache"):
        at()


def test_a_damaged_copy_in_the_cache_is_fetched_again(folder, server, at, tmp_path):
    documents(at())
    for path in cached(tmp_path / "cache/shards"):
        index = path.read_bytes()[8:9] == b"{"  # safetensors
        path.write_bytes(path.read_bytes()[:-1] + b"\x07" if index else path.read_bytes()[:-1])
    assert documents(at()) == documents(TokenDataset(folder))
    assert set(server.gets.values()) == {2}


def test_prefetching_neither_waits_nor_fails(folder, server, at, tmp_path):
    dataset = at(attempts=1)
    server.faults[tar(1)] = iter([503])
    for k in (1, 1, 2):
        dataset.prefetch(k)
    deadline = time.monotonic() + 300
    while not (tmp_path / "cache/shards" / dataset.shards[2]["sha256"]).exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert documents(dataset, [2]) == documents(TokenDataset(folder), [2])
    assert server.gets[tar(2)] == server.gets[tar(1)] == 1
    local = TokenDataset(folder)
    local.prefetch(0)
    assert len(documents(local, [0])) == 20


def test_batches_over_http_from_two_forked_workers_are_those_of_a_local_folder(folder, server, at):
    def stream(dataset, workers):
        plan = Plan((Source(dataset, 1.0),), 128, 2, 32, 0)
        return list(islice(batches(plan, VOCAB, Share(0, 1, 4, 2), workers=workers), 8))

    remote = at()
    remote.prefetch(0)  # the parent has an event loop, a thread and open files when it forks
    assert remote.read(1, 0) is not None
    for wanted, got in zip(stream(TokenDataset(folder), 0), stream(remote, 2), strict=True):
        for field in fields(wanted):
            a, b = getattr(wanted, field.name), getattr(got, field.name)
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name
    assert max(server.gets.values()) == 1


def test_a_dataset_in_use_can_be_pickled(folder, at):
    dataset = at()
    dataset.read(0, 0)
    dataset.prefetch(1)
    assert documents(pickle.loads(pickle.dumps(dataset))) == documents(TokenDataset(folder))


def copy_of(folder, to):
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def test_everything_missing_or_short_is_listed_at_once_over_http_and_s3(folder, bucket, tmp_path):
    url, _, client = bucket
    copy = copy_of(folder, tmp_path / "copy")
    (copy / "part-00000.idx").unlink()
    (copy / tar(1)).unlink()
    (copy / tar(2)).write_bytes(b"short")
    for key in ("part-00000.idx", tar(1)):
        client.delete_object(Bucket="corpus", Key=f"tokens/train/{key}")
    client.put_object(Bucket="corpus", Key=f"tokens/train/{tar(2)}", Body=b"short")
    server = Server(copy)
    try:
        for location in (server.url, url):
            with pytest.raises(ValueError, match=r"00000.idx is missing; .*00001.tar is missing; .*2.tar has 5 bytes"):
                TokenDataset(location, cache=tmp_path / "cache")
    finally:
        server.stop()


def test_what_cannot_be_opened_says_why(folder, server, at, bucket, tmp_path):
    cache = tmp_path / "cache"
    for location in (f"{server.url}/nowhere", f"{bucket[0]}/nowhere", "s3://no-such-bucket/x"):
        if location.startswith("http"):
            server.folder = tmp_path
        with pytest.raises(ValueError, match=rf"{location}: no manifest.json"):
            TokenDataset(location, cache=cache)
    server.folder = folder
    with pytest.raises(ValueError, match=r"manifest.json cannot be read: .*Connect"):
        TokenDataset("http://127.0.0.1:9/d", cache=cache, attempts=2)
    with pytest.raises(ValueError, match="gopher"):
        TokenDataset("gopher://x/y", cache=cache)
    with pytest.raises(ValueError, match=r"more than the cache may hold \(1000\): raise data.cache_gib"):
        at(cache_bytes=1000)
    server.faults["part-00000.idx"] = itertools.repeat(503)
    with pytest.raises(ValueError, match=r"/d/part-00000.idx: .*503"):
        at(attempts=2).index(0)


@pytest.mark.parametrize(
    ("key", "value"), [("name", "../part-00000.tar"), ("name", "/etc/x.tar"), ("name", ".."), ("sha256", "../../x")]
)
def test_a_manifest_cannot_name_files_outside_of_its_folder_or_the_cache(folder, tmp_path, key, value):
    copy = copy_of(folder, tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["shards"][0][key] = value
    rewrite_manifest(copy, manifest)
    with pytest.raises(UserError, match=r"plain NAME.tar|proper sha256"):
        TokenDataset(copy)


def test_a_run_keeps_few_files_open(folder, tmp_path):
    write_dataset(tmp_path / "many", documents=100, shards=100)
    dataset = TokenDataset(tmp_path / "many")
    before = len(os.listdir("/proc/self/fd"))
    assert None not in documents(dataset, range(100))
    assert len(os.listdir("/proc/self/fd")) - before <= 64
