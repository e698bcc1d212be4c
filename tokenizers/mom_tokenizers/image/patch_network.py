"""The model of kind "patches": a codebook of small pictures, and a network that mends what the codebook lost.

A picture is cut into squares of `patch` x `patch` pixels. The code of a square is the entry of the codebook with the
smallest squared distance; the entries are such squares themselves, in whole numbers from 0 to 255. So all distances are
whole numbers, and codes are the same to the last bit on every machine and in every batch.

Decoding lays the entries side by side, and a small convolutional network adds what the neighbours of a square tell
about it. What the network adds is shortened where it would carry a square nearer to another entry. So a decoded
picture always has the codes that it was decoded from, whatever the network has learnt.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import fold, silu, unfold

from mom_tokenizers.base import read_json
from mom_tokenizers.errors import UserError

WEIGHTS = "model.safetensors"
ROWS_AT_ONCE = 4096  # squares compared with the codebook at once, which bounds the memory
KEPT = 0.98  # the part of the way to the border of its cell that a square may be moved
GROUPS = 8  # of the group norms


class Block(nn.Module):
    """x + f(x) with two convolutions of 3 x 3. It is the identity at first, because the last convolution is zero."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(GROUPS, channels), nn.GroupNorm(GROUPS, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        inner = self.conv1(silu(self.norm1(x_BCHW)))
        return x_BCHW + self.conv2(silu(self.norm2(inner)))


class PatchAutoencoder(nn.Module):
    """A codebook uint8 (size, 3 * patch^2), whose entries must differ from each other, and the network of the decoder.

    The values of an entry are in the order (channel, row, column). Until it is trained, the network adds nothing.
    """

    codebook: torch.Tensor

    def __init__(self, patch: int, size: int, channels: int, blocks: int):
        super().__init__()
        self.patch, self.size, self.channels, self.blocks = patch, size, channels, blocks
        width = 3 * patch**2
        self.register_buffer("codebook", torch.zeros(size, width, dtype=torch.uint8))
        self.first = nn.Conv2d(width, channels, 3, padding=1)
        self.middle = nn.Sequential(*(Block(channels) for _ in range(blocks)))
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.last = nn.Conv2d(channels, width, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    @property
    def settings(self) -> dict[str, int]:
        """The contents of config.json."""
        names = ("patch", "size", "channels", "blocks")
        return {name: getattr(self, name) for name in names}

    @property
    def device(self) -> torch.device:
        return self.codebook.device

    @property
    def dtype(self) -> torch.dtype:
        return self.first.weight.dtype

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json and model.safetensors."""
        from safetensors.torch import save_file

        config = {"model": type(self).__name__, **self.settings}
        (Path(directory) / "config.json").write_text(json.dumps(config) + "\n")
        state = {name: tensor.cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(state, Path(directory) / WEIGHTS, metadata={"format": "pt"})

    @classmethod
    def from_folder(cls, folder: Path) -> PatchAutoencoder:
        """Read what `save_pretrained` wrote. Raises UserError where the folder holds anything else."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        config: dict[str, Any] = read_json(folder / "config.json")
        names = ("patch", "size", "channels", "blocks")
        if config.pop("model", None) != cls.__name__ or set(config) != set(names):
            raise UserError(f"{folder / 'config.json'}: not the config of a tokenizer of kind patches")
        if any(not isinstance(config[name], int) or config[name] < (name != "blocks") for name in names):
            raise UserError(f"{folder / 'config.json'}: {', '.join(names)} must be whole numbers")
        if config["channels"] % GROUPS:
            raise UserError(f"{folder / 'config.json'}: channels must be a multiple of {GROUPS}")
        model = cls(**config)
        try:
            state = load_file(folder / WEIGHTS)
            if state.get("codebook", model.codebook).dtype != torch.uint8:
                raise UserError(f"{folder / WEIGHTS}: the codebook must hold numbers from 0 to 255 (uint8)")
            model.load_state_dict(state)
        except (OSError, SafetensorError, RuntimeError) as error:
            raise UserError(f"{folder}: the weights are not those of the config: {error}") from error
        if len(torch.unique(model.codebook, dim=0)) < model.size:
            raise UserError(f"{folder / WEIGHTS}: two entries of the codebook are the same")
        return model

    def squares(self, pixels: torch.Tensor) -> torch.Tensor:
        """The squares of pixels (B, 3, H, W) in raster order, (B, H * W / patch^2, 3 * patch^2)."""
        return unfold(pixels, self.patch, stride=self.patch).transpose(1, 2)

    def nearest(self, squares_ND: torch.Tensor) -> torch.Tensor:
        """The codes int64 (N,) of squares whose values are whole numbers from 0 to 255."""
        # |x - c|^2 = |x|^2 - (2 x.c - |c|^2). In float64 all these whole numbers are exact, in any order of summation.
        codebook_VD = self.codebook.double() - 128  # centred
        half = codebook_VD.square().sum(1)
        # Of two entries at the same distance the first is taken.
        order = torch.arange(self.size, dtype=torch.float64, device=self.device)
        codes = []
        for some in squares_ND.double().split(ROWS_AT_ONCE):
            score_NV = 2 * ((some - 128) @ codebook_VD.T) - half
            codes.append((score_NV * self.size - order).argmax(1))
        return torch.cat(codes)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """The codes int64 (B, H / patch, W / patch) of pixels (B, 3, H, W) in [-1, 1]."""
        whole = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round()
        rows, columns = pixels.shape[2] // self.patch, pixels.shape[3] // self.patch
        return self.nearest(self.squares(whole).flatten(0, 1)).view(len(pixels), rows, columns)

    def correction(self, codes_BHW: torch.Tensor) -> torch.Tensor:
        """What the network adds to the squares of codes (B, rows, columns), (B, rows, columns, 3 * patch^2), in units
        of the values from 0 to 255."""
        given = self.codebook[codes_BHW].to(self.dtype) / 128 - 1
        hidden = self.middle(self.first(given.permute(0, 3, 1, 2)))
        return self.last(silu(self.norm(hidden))).permute(0, 2, 3, 1) * 128

    def decode(self, codes_BHW: torch.Tensor) -> torch.Tensor:
        """The pixels (B, 3, rows * patch, columns * patch) in [-1, 1] of codes int64 (B, rows, columns). They are such
        that `encode` gives the same codes, also after rounding to whole numbers from 0 to 255."""
        batch, rows, columns = codes_BHW.shape
        codes = codes_BHW.flatten()
        change = self.correction(codes_BHW).float().flatten(0, 2)
        parts = zip(codes.split(ROWS_AT_ONCE), change.split(ROWS_AT_ONCE), strict=True)
        squares = torch.cat([self._kept_in_cell(some, by) for some, by in parts])
        flat = squares.view(batch, rows * columns, -1).transpose(1, 2)
        return fold(flat, (rows * self.patch, columns * self.patch), self.patch, stride=self.patch) / 127.5 - 1

    def _kept_in_cell(self, codes: torch.Tensor, change_ND: torch.Tensor) -> torch.Tensor:
        """The squares (N, D) of codes after `change`, in whole numbers, each still nearest to its entry.

        On the way from entry c to c + d the point c + t d is as near to entry e as to c where
        t = |e - c|^2 / (2 d.(e - c)). The smallest positive t over all e is where the way leaves the cell of c.
        """
        entries_VD = self.codebook.float() - 128
        own_ND = entries_VD[codes]
        change_ND = (own_ND + change_ND).clamp(-128, 127) - own_ND
        squared_V = entries_VD.square().sum(1)
        distance_NV = squared_V[codes, None] + squared_V - 2 * own_ND @ entries_VD.T
        along_NV = change_ND @ entries_VD.T - (change_ND * own_ND).sum(1, keepdim=True)
        leaves = torch.where(along_NV > 1e-6, distance_NV / (2 * along_NV.clamp_min(1e-6)), torch.inf)
        leaves.scatter_(1, codes[:, None], torch.inf)
        share = (KEPT * leaves.amin(1)).clamp(0, 1)
        moved = (own_ND + share[:, None] * change_ND).round().clamp(-128, 127) + 128
        # Rounding may carry a square over the border. The entry itself, which always has its own code, is taken there.
        own = self.nearest(moved) == codes
        return torch.where(own[:, None], moved, own_ND + 128)
