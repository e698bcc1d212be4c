"""Compile every kernel for NVIDIA GPUs on any machine, and show what the compiler made of it.

    python tools/dev/compile_kernels.py                              # bf16 rows, sm_90
    python tools/dev/compile_kernels.py --arch 80 90 100 120 --all --json kernels.json
    python tools/dev/compile_kernels.py --only cuda                  # the scan in CUDA C++, without those in Triton

Registers, spilled bytes and shared memory are the assembler's own, for three modalities where they matter. For Triton
kernels, instructions are counted in the innermost loops of the machine code, per step of the recurrence and warp: the
issue slots that a roofline needs. For CUDA kernels, `CTAs per SM` is how many CTAs the registers and the shared memory
of an SM hold at a time. Nothing runs. Needs `triton` (the CPU has no other use for it), for CUDA kernels also
`cuda-bindings` and `nvidia-cuda-nvrtc`, and no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from tabulate import tabulate

from mom_tokenizers.errors import UserError, exit_clearly, write_text
from mom_train.ops import nvrtc

_ROWS = {"W", "GW", "GBIAS", "X", "DT", "Z", "B", "C", "Y", "GY", "GX", "GDT", "GZ", "INITIAL", "GINITIAL"}
_INTEGERS = {"L", "D", "T", "SPAN", "CHUNKS"}
_ROW_TYPES = {"bf16": "*bf16", "fp32": "*fp32"}


def variants(everything: bool) -> list[dict[str, Any]]:
    """Kernels with their compile-time settings: the ones a training run uses, or `everything` that can be asked for.

    `steps`: steps of the recurrence in one pass of each innermost loop, in the order of the machine code.
    """
    from mom_train.ops.conv import triton as triton_conv
    from mom_train.ops.scan import triton as triton_scan

    found: list[dict[str, Any]] = []
    ahead, kept = triton_scan._STEPS, triton_scan._KEPT
    for dtype in ("bf16", "fp32") if everything else ("bf16",):
        for even in (True, False) if everything else (True,):
            start = not even
            shape = {"N": 16, "BD": triton_scan.channel_block(16), "S": ahead, "M": 4, "WIDE": start, "EVEN": even}
            chunked = {**shape, "CH": triton_scan.CHUNK}
            local = {"HAS_START": False, "OUTPUT": False, "KEEP": False}
            block = triton_conv.channel_block(4096)
            conv = {"K": 4, "BD": block, "SPAN": triton_conv.SPAN, "S": triton_conv._STEPS, "HAS_INITIAL": start}
            kernels: list[tuple[str, Any, tuple[int, ...], dict[str, Any]]] = [
                ("scan forward", triton_scan._forward, (ahead,),
                 {**chunked, "HAS_START": start, "OUTPUT": True, "KEEP": True}),
                ("scan forward, a span's own state", triton_scan._forward, (ahead,), {**chunked, **local}),
                ("scan backward, a span's own carry", triton_scan._carry, (ahead,), shape),
                ("scan backward", triton_scan._backward, (ahead, kept), {**chunked, "KEPT": kept}),
                ("conv forward", triton_conv._forward, (triton_conv._STEPS,), {**conv, "WIDE": start, "EVEN": even}),
                ("conv backward", triton_conv._backward, (triton_conv._STEPS,), {**conv, "WIDE": start}),
            ]  # fmt: skip
            variant = dtype if even else f"{dtype}, ragged, carried in, 64-bit offsets"
            for kernel, function, steps, settings in kernels:
                found.append({"kernel": kernel, "variant": variant, "dtype": dtype, "function": function,
                              "steps": steps, "settings": settings})  # fmt: skip
        found += _passes(dtype)
    return found + _routing(everything)


def _routing(everything: bool) -> list[dict[str, Any]]:
    """The grouped products of `modality_linear`. Their loops count as one step; instructions are those of a tile's
    sum over REDUCED."""
    import torch

    from mom_train.ops.routing import triton as triton_routing

    found: list[dict[str, Any]] = []
    for dtype, element in (("bf16", torch.bfloat16), ("fp32", torch.float32))[: 2 if everything else 1]:
        for columns in (4096, 160) if dtype == "bf16" and everything else (4096,):
            sizes = triton_routing.blocks(element, columns)
            options = {name: sizes.pop(name) for name in ("num_warps", "num_stages")}
            common = {"GROUP": triton_routing._GROUP, "HAS_BIAS": False, "PRECISION": "ieee", **sizes}
            strided = {"si": 1}  # as the launcher specializes a stride of one
            for kernel, function, settings in (
                ("routing rows", triton_routing._rows, {**common, **strided, "M": 3, "EVEN": columns % 64 == 0}),
                ("routing sums", triton_routing._sums, common),
            ):
                variant = f"{dtype}, tiles of {sizes['ROWS']} x {sizes['COLUMNS']}"
                found.append({"kernel": kernel, "variant": variant, "dtype": dtype, "function": function,
                              "steps": None, "settings": settings, "options": options})  # fmt: skip
    return found


def _passes(dtype: str) -> list[dict[str, Any]]:
    """The kernels between the products, whose arguments and options are their own; a step is one pass of a loop."""
    from mom_train.ops.cross_entropy import triton as triton_cross_entropy
    from mom_train.ops.norm import triton as triton_norm
    from mom_train.ops.routing import fp8_triton

    rows, width = _ROW_TYPES[dtype], 2048
    logits = {"LOGITS": rows, "TARGET": "*i64", "LOSS": "*fp32", "LOGSUM": "*fp32", "V": "i32", "z_loss": "fp32"}
    norms = {"X": "*fp32", "BRANCH": rows, "RESIDUAL": "*fp32", "NORMED": rows, "GNORMED": rows, "GRESIDUAL": "*fp32",
             "GX": "*fp32", "GBRANCH": rows, "ROWS": "*i64", "eps": "fp32"}  # fmt: skip
    norm = {"BLOCK": width, "MODALITIES": 3}
    backward = {**norm, "SPAN": triton_norm.SPAN, "PASSES": True, "BRANCHES": dtype != "fp32"}
    own = {"variant": dtype, "dtype": dtype, "signature": norms, "options": triton_norm.options(width)}
    return [
        {"kernel": "rounding to FP8", "function": fp8_triton._quantize, "steps": (), "variant": dtype, "dtype": dtype,
         "settings": {"BLOCK": width}, "options": fp8_triton.options(width), "least": 89,
         "signature": {"X": rows, "Q": "*fp8e4nv", "C": "i32"}},
        {"kernel": "norm of a sum, forward", "function": triton_norm._forward, "steps": (),
         "settings": {**norm, "ADDS": True}, **own},
        {"kernel": "norm of a sum, backward", "function": triton_norm._backward, "steps": (1,), "settings": backward,
         **own},
        {"kernel": "cross-entropy", "variant": dtype, "dtype": dtype, "function": triton_cross_entropy._forward,
         "steps": (1, 1), "settings": {"BLOCK": triton_cross_entropy.block(65536), "GRADIENT": True},
         "signature": logits, "options": triton_cross_entropy.OPTIONS},
    ]  # fmt: skip


def compile_variant(variant: dict[str, Any], arch: int) -> dict[str, Any]:
    """Registers, spills (bytes per thread), shared memory (bytes) and loop instructions of one kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mom_train.ops.scan import triton as triton_scan

    fn, settings = variant["function"], variant["settings"]
    own = variant.get("signature", {})
    signature = {name: own.get(name) or _type(name, variant["dtype"], settings) for name in fn.arg_names}
    # as the launcher specializes: aligned pointers, and widths and strides in multiples of 16
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, type_) in enumerate(signature.items())
        if type_ not in ("constexpr", "fp32") and name not in triton_scan.LENGTHS
    }
    options = variant.get("options", triton_scan.OPTIONS)
    source = ASTSource(fn=fn, signature=signature, constexprs=settings, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage = _tool("cuobjdump", "-res-usage", compiled.asm["cubin"])
    code = _tool("nvdisasm", "-c", compiled.asm["cubin"])
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    if found is None:
        raise UserError(f"cuobjdump said nothing of registers for {variant['kernel']}:\n{usage}")
    registers, stack, shared, local = map(int, found.groups())
    loops = _innermost_loops(code)
    steps = variant["steps"] or [1] * len(loops)  # waits of a product's pipeline are loops, too
    if len(loops) != len(steps):
        raise UserError(f"{variant['kernel']}: {len(loops)} innermost loops in the code, expected {variant['steps']}")
    pairs = list(zip(loops, steps, strict=True))
    count = Counter[str]()
    for loop, times in pairs:
        for name in loop:
            count[name] += 1 / times
    return {
        "kernel": variant["kernel"],
        "variant": variant["variant"],
        "arch": f"sm_{arch}",
        "registers": registers,
        "spilled_bytes": stack + local,
        "spill_instructions": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "shared_bytes": shared,
        "instructions_per_step": round(sum(count.values()), 1),
        "exponentials_per_step": round(count["MUFU"], 1),
        "by_opcode": {name: round(n, 2) for name, n in count.most_common(12)},
    }


_SHARED_OF_SM = {80: 164, 86: 100, 87: 164, 89: 100, 90: 228, 100: 228, 103: 228, 120: 100, 121: 100}
"""KiB of shared memory of an SM by architecture (CUDA C++ Programming Guide, table of technical specifications). The
system keeps 1 KiB of it for each CTA."""
_MODALITIES = 3


def compile_cuda(arch: int, everything: bool) -> list[dict[str, Any]]:
    """Registers, spills (bytes per thread) and shared memory (bytes) of the kernels in CUDA C++."""
    from mom_train.ops.scan import cuda as cuda_scan

    found = []
    for dtype in ("bf16", "fp32") if everything else ("bf16",):
        usage = _tool("cuobjdump", "-res-usage", cuda_scan.machine_code(arch, dtype == "bf16"))
        for name in cuda_scan.NAMES:
            resources = re.search(rf"Function {name}:\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
            if resources is None:
                raise UserError(f"cuobjdump said nothing of {name}:\n{usage}")
            registers, stack, local = map(int, resources.groups())
            shared = cuda_scan.shared_bytes(name, dtype == "bf16", _MODALITIES)
            per_cta = -(-registers // 8) * 8 * cuda_scan.THREADS
            ctas = min(65536 // per_cta, _SHARED_OF_SM.get(arch, 100) * 1024 // (shared + 1024), 16)
            found.append({
                "kernel": f"{name.replace('_', ' ')}, CUDA C++",
                "variant": dtype,
                "arch": f"sm_{arch}",
                "registers": registers,
                "spilled_bytes": stack + local,
                "shared_bytes": shared,
                "ctas_per_sm": ctas,
            })  # fmt: skip
    return found


def _type(name: str, dtype: str, settings: dict[str, Any]) -> str:
    if name in settings:
        return "constexpr"
    if name in _ROWS:
        return _ROW_TYPES[dtype]
    if name in _INTEGERS or name.islower():
        return "i32"
    return {"ORDER": "*i32", "OFFSETS": "*i32", "MODALITY": "*u8", "POSITION": "*u8"}.get(name, "*fp32")


def _tool(name: str, option: str, cubin: bytes) -> str:
    """What one of the disassemblers that come with triton says of a cubin."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(cubin)
        done = subprocess.run([str(tool), option, str(binary)], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _innermost_loops(code: str) -> list[list[str]]:
    """The opcodes of every loop that holds no other, in order."""
    labels: dict[str, int] = {}
    opcodes: list[str] = []
    spans: list[tuple[int, int]] = []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label.group(1)] = len(opcodes)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)", line):
            opcodes.append(instruction.group(1))
            target = re.search(r"BRA\S*.*`\((\.L_\w+)\)", line)
            start = labels.get(target.group(1)) if target else None
            if start is not None and start < len(opcodes) - 1:  # the last one is the trap that ends every kernel
                spans.append((start, len(opcodes)))
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    return [opcodes[start:end] for start, end in sorted(inner)]


def table(results: list[dict[str, Any]]) -> str:
    columns = ("kernel", "variant", "arch", "registers", "spilled_bytes", "shared_bytes", "instructions_per_step",
               "exponentials_per_step", "ctas_per_sm")  # fmt: skip
    heads = [c.replace("_", " ").replace("ctas per sm", "CTAs per SM") for c in columns]
    return tabulate([[r.get(c) for c in columns] for r in results], heads, "pipe")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", type=int, default=[90], help="compute capabilities times ten (default 90)")
    parser.add_argument("--only", choices=("triton", "cuda"), help="only the kernels in Triton, or in CUDA C++")
    parser.add_argument("--all", action="store_true", help="also fp32 rows, ragged lengths, carried states")
    parser.add_argument("--json", nargs="?", const="-", metavar="OUT", help="JSON, to OUT or standard output")
    options = parser.parse_args(arguments)
    if importlib.util.find_spec("triton") is None:
        raise UserError("no triton here: pip install -c requirements.lock triton")
    os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels have no machine code
    absent = nvrtc.missing() if options.only != "triton" else None
    if absent and options.only == "cuda":
        raise UserError(absent)
    if absent:
        print(f"CUDA C++ kernels are left out: {absent}", file=sys.stderr)
    results = []
    for arch in options.arch:
        if options.only != "triton" and not absent:
            results += compile_cuda(arch, options.all)
            print(f"sm_{arch}: the kernels in CUDA C++", file=sys.stderr, flush=True)
        for variant in variants(options.all) if options.only != "cuda" else ():
            if arch < variant.get("least", 0):
                continue
            results.append(compile_variant(variant, arch))
            print(f"sm_{arch}: {variant['kernel']}, {variant['variant']}", file=sys.stderr, flush=True)
    if options.json != "-":
        print(table(results))
    if options.json:
        text = json.dumps(results, indent=1)
        if options.json == "-":
            print(text)
        else:
            write_text(options.json, text + "\n")


if __name__ == "__main__":
    with exit_clearly():
        main()
