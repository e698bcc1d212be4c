"""What `mom bench` compares with: float64 definitions, which tell what is right, and other people's programs.

Everything here is in time order (B, L, ...), as others have it. Nothing of the published repository is copied: its
module is loaded from a clone that the caller names.
"""

from __future__ import annotations

import mom_tokenizers  # noqa: F401  # isort: skip  # before torch: how its threads wait

import contextlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mom_tokenizers.errors import UserError
from mom_train.ops import mamba_ssm
from mom_train.ops.conv.naive import causal_conv
from mom_train.ops.scan.naive import selective_scan


def define_scan(*, modality: Tensor, document: Tensor, **rows: Tensor) -> Tensor:
    """The outputs of the scan's definition; `rows` are x, dt, A, B, C, D, z and bias (M, D), in time order."""
    x, dt, A, B, C, D, z, bias = (rows[name] for name in ("x", "dt", "A", "B", "C", "D", "z", "bias"))
    return selective_scan(x, dt, A, B, C, D, z, bias, modality, document)[0]


def define_block(x: Tensor, p: dict[str, Tensor], modality: Tensor, document: Tensor) -> Tensor:
    """The block of the paper's Algorithm 2: p holds weights [M, out, in] and the shared conv, A_log and D."""

    def routed(rows: Tensor, name: str) -> Tensor:
        return torch.einsum("bloi,bli->blo", p[name][modality], rows)

    xs, z = routed(x, "in_proj").chunk(2, -1)
    xs = causal_conv(xs, p["conv_weight"], p["conv_bias"], document)
    N = p["A_log"].shape[1]
    dt, B, C = routed(xs, "x_proj").split([p["dt_proj"].shape[2], N, N], -1)
    y, _ = selective_scan(
        xs, routed(dt, "dt_proj"), -p["A_log"].exp(), B, C, p["D"], z, p["dt_bias"], modality, document
    )  # fmt: skip
    return routed(y, "out_proj")


def masked_linear(x_TK: Tensor, weight_MOK: Tensor, masks_MT: Tensor) -> Tensor:
    """Routing by boolean masks: select each modality's rows, multiply, put them back."""
    y = x_TK.new_empty(x_TK.shape[0], weight_MOK.shape[1])
    for mask, weight in zip(masks_MT, weight_MOK, strict=True):
        y[mask] = F.linear(x_TK[mask], weight).to(y.dtype)
    return y


def load_pscan() -> Callable[[Tensor, Tensor], Tensor]:
    """mambapy's parallel scan: (decay, input) each (B, L, D, N) -> states. Raises ImportError where not installed."""
    try:
        from mambapy.pscan import pscan
    except ImportError as error:
        raise ImportError("mambapy is NOT INSTALLED (pip install mambapy==1.2.0)") from error
    return pscan


def pscan_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor,
    modality: Tensor, document: Tensor,
) -> Tensor:  # fmt: skip
    """define_scan by mambapy's pscan, a document's first decay made zero."""
    delta = F.softplus(dt.float() + bias[modality])
    first = F.pad(document[:, 1:] != document[:, :-1], (1, 0))
    decay = torch.exp(delta[..., None] * A).masked_fill(first[..., None, None], 0)
    h = load_pscan()(decay, (delta * x)[..., None] * B[:, :, None].float())
    return ((h @ C[..., None].float()).squeeze(-1) + D * x) * F.silu(z.float())


STOCK = ("selective_scan_fn (no documents)", "causal_conv1d_fn (crosses documents)")
"""The CUDA kernels of mamba_ssm and causal_conv1d as their authors call them, without what our adapter does around
them."""


def stock_scan(absent: dict[str, str]) -> Callable[..., Tensor] | None:
    """selective_scan_fn of mamba_ssm, channels first, or None, and the reason in `absent`, where it cannot run."""
    return _stock(0, absent)


def stock_conv(absent: dict[str, str]) -> Callable[..., Tensor] | None:
    """causal_conv1d_fn, channels first, or None, and the reason in `absent`, where it cannot run."""
    return _stock(1, absent)


def _stock(which: int, absent: dict[str, str]) -> Callable[..., Tensor] | None:
    try:
        return mamba_ssm.stock()[which]
    except UserError as error:
        absent[f"stock {STOCK[which]}"] = str(error)
        return None


def _published_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, **options: object
) -> Tensor:
    """The interface that the published module calls, channels first, in its place on a CPU."""
    ut, dt, Bt, Ct, zt = (t.transpose(1, 2) for t in (u, delta, B, C, z))
    nothing = torch.zeros(u.shape[0], u.shape[2], dtype=torch.int32, device=u.device)
    bias = A.new_zeros(1, A.shape[0])
    return pscan_scan(ut, dt, A, Bt, Ct, D, zt, bias, nothing.long(), nothing).transpose(1, 2).to(u.dtype)


@contextlib.contextmanager
def _in_place_of(modules: dict[str, types.ModuleType]) -> Iterator[None]:
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def load_published(folder: Path, cuda: bool) -> type[nn.Module]:
    """The published MixtureOfMamba of a clone. On a CPU its scan is pscan in place of the CUDA import.

    Raises ValueError where the clone or what it needs is missing.
    """
    file = folder / "MixtureOfMamba.py"
    if not file.is_file():
        raise UserError(f"{file} is not there: --published takes a clone of github.com/Weixin-Liang/Mixture-of-Mamba")
    for package in ("einops", "mamba_ssm" if cuda else "mambapy"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"the published module needs {package} here: pip install {package}")
    stand_ins = {name: types.ModuleType(name) for name in ("src", "src.args")}
    stand_ins["src.args"].ModelArgs = types.SimpleNamespace  # type: ignore[attr-defined]
    if not cuda:
        names = ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.selective_scan_interface")
        stand_ins |= {name: types.ModuleType(name) for name in names}
        interface = stand_ins[names[-1]]
        interface.selective_scan_fn, interface.mamba_inner_fn = _published_scan, None  # type: ignore[attr-defined]
    with _in_place_of(stand_ins):
        spec = importlib.util.spec_from_file_location("published_mixture_of_mamba", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module.MixtureOfMamba


def build_published(kind: type[nn.Module], p: dict[str, Tensor]) -> nn.Module:
    """A published block with the weights of `p`, which is as in define_block."""
    M, dim = p["in_proj"].shape[0], p["in_proj"].shape[2]
    block = kind(types.SimpleNamespace(n_modalities=M), d_model=dim, d_state=p["A_log"].shape[1])
    weights = {"conv1d.weight": p["conv_weight"][:, None], "conv1d.bias": p["conv_bias"]}
    weights |= {"A_log": p["A_log"], "D": p["D"]}
    for m in range(M):
        for part in ("in_proj", "x_proj", "dt_proj", "out_proj"):
            weights[f"local_experts_{part}.{m}.weight"] = p[part][m]
        weights[f"local_experts_dt_proj.{m}.bias"] = p["dt_bias"][m]
    block.load_state_dict({name: tensor.detach() for name, tensor in weights.items()})
    return block


def build_transformers(p: dict[str, Tensor]) -> nn.Module:
    """Transformers' dense block with the first modality's weights: on a CPU its path in plain PyTorch."""
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    config = MambaConfig(hidden_size=p["in_proj"].shape[2], state_size=p["A_log"].shape[1])
    block = MambaMixer(config, 0)
    weights = {f"{part}.weight": p[part][0] for part in ("in_proj", "x_proj", "dt_proj", "out_proj")}
    weights |= {"conv1d.weight": p["conv_weight"][:, None], "conv1d.bias": p["conv_bias"]}
    weights |= {"dt_proj.bias": p["dt_bias"][0], "A_log": p["A_log"], "D": p["D"]}
    block.load_state_dict({name: tensor.detach() for name, tensor in weights.items()})
    return block
