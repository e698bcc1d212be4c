"""CUDA C++ is compiled once per machine into a cache, which nothing that happens to it can spoil."""

import multiprocessing
import time

import pytest

from mom_train.ops import nvrtc

compiled = pytest.mark.skipif(nvrtc.missing() is not None, reason=f"NO NVRTC: {nvrtc.missing()}")


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A folder with two files, and a list that gets a line for each compilation, which is only pretended."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(nvrtc, "compiler_version", lambda: (13, 0))
    calls = tmp_path / "calls"
    calls.touch()

    def compile_source(files, name, arch, flags):
        with calls.open("a") as file:
            file.write("compiled\n")
        time.sleep(0.05)  # others come meanwhile
        return b"code of " + files[name] + b"".join(files.values()) + str(arch).encode()

    monkeypatch.setattr(nvrtc, "compile_source", compile_source)
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "k.cu").write_text("kernel")
    (folder / "k.cuh").write_text("header")
    return folder, lambda: len(calls.read_text().splitlines())


def entries(tmp_path):
    return sorted((tmp_path / "cache/mom_train").glob("*.cubin"))


def test_code_is_compiled_once_and_again_if_a_file_a_flag_the_architecture_or_the_compiler_changes(
    sources, tmp_path, monkeypatch
):
    folder, compilations = sources
    first = nvrtc.machine_code(folder, "k.cu", 90, ("-a",))
    assert nvrtc.machine_code(folder, "k.cu", 90, ("-a",)) == first
    assert compilations() == 1
    nvrtc.machine_code(folder, "k.cu", 90, ("-b",))
    nvrtc.machine_code(folder, "k.cu", 100, ("-a",))
    (folder / "k.cuh").write_text("another header")
    assert nvrtc.machine_code(folder, "k.cu", 90, ("-a",)) != first
    monkeypatch.setattr(nvrtc, "compiler_version", lambda: (13, 1))
    nvrtc.machine_code(folder, "k.cu", 90, ("-a",))
    assert compilations() == 5
    assert len(entries(tmp_path)) == 5


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:40], lambda b: b[:-1] + b"?", lambda b: b"?" + b[1:]])
def test_a_damaged_entry_of_the_cache_is_made_anew(sources, tmp_path, damage, caplog):
    folder, compilations = sources
    code = nvrtc.machine_code(folder, "k.cu", 90, ())
    (entry,) = entries(tmp_path)
    whole = entry.read_bytes()
    entry.write_bytes(damage(whole))
    assert nvrtc.machine_code(folder, "k.cu", 90, ()) == code
    assert entry.read_bytes() == whole
    assert compilations() == 2
    assert "damaged" in caplog.text


def test_of_many_processes_at_once_one_compiles_and_all_get_the_code(sources):
    folder, compilations = sources
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    ranks = [context.Process(target=lambda: results.put(nvrtc.machine_code(folder, "k.cu", 90, ()))) for _ in range(6)]
    for rank in ranks:
        rank.start()
    codes = {results.get() for _ in ranks}
    for rank in ranks:
        rank.join()
    assert len(codes) == 1
    assert compilations() == 1


def test_without_a_cache_that_can_be_written_kernels_are_compiled_and_a_warning_says_so(
    sources, tmp_path, monkeypatch, caplog
):
    folder, _ = sources
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert nvrtc.machine_code(folder, "k.cu", 90, ()).startswith(b"code of kernel")
    assert "the cache cannot be used" in caplog.text


@compiled
def test_what_the_compiler_says_of_a_mistake_reaches_the_user(tmp_path):
    files = {"k.cu": b'#include "k.cuh"\n__global__ void f(int* a) { *a = ANSWER; }', "k.cuh": b"#define ANSWER 42\n"}
    assert nvrtc.compile_source(files, "k.cu", 80, ())[:4] == b"\x7fELF"
    files["k.cuh"] = b""
    with pytest.raises(nvrtc.Unavailable, match=r'(?s)cannot compile k.cu for sm_80.*"ANSWER" is undefined'):
        nvrtc.compile_source(files, "k.cu", 80, ())
    with pytest.raises(nvrtc.Unavailable, match="sm_999"):
        nvrtc.compile_source(files, "k.cu", 999, ())
