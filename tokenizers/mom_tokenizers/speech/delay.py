"""The delay pattern (Copet et al. 2023), which writes the codes of a codec's several codebooks as one row of ids.

Codebook k of K is delayed by k steps, so that step s has the codes (frame s - k, codebook k) of all frames there are:

    step       0      1          2              3          4            for T = 3 frames and K = 3 codebooks
    codes    (0,0)  (1,0)(0,1)  (2,0)(1,1)(0,2)  (2,1)(1,2)  (2,2)

The model reads and writes one code at a time, in this order. Code c of codebook k has the id k * size + c, so that an
id says which codebook it belongs to, and T * K ids hold T frames; none stands for padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mom_tokenizers.errors import UserError


def delayed_order(frames: int, codebooks: int) -> tuple[np.ndarray, np.ndarray]:
    """(frame, codebook) of each id, int64 (frames * codebooks,) each: by frame + codebook, then by codebook."""
    frame, codebook = np.divmod(np.arange(frames * codebooks), codebooks)
    order = np.lexsort((codebook, frame + codebook))
    return frame[order], codebook[order]


def delayed(codes_TK: np.ndarray, size: int) -> np.ndarray:
    """The ids (T * K,) of codes (T, K), each below `size`."""
    frame, codebook = delayed_order(*codes_TK.shape)
    return codes_TK[frame, codebook] + codebook * size


def undelayed(ids: np.ndarray, codebooks: int, size: int) -> np.ndarray:
    """The codes (T, K) of ids, the inverse of `delayed`. Raises UserError for ids in another order, which are not a
    whole recording."""
    frame, codebook = delayed_order(len(ids) // codebooks, codebooks)
    if len(ids) % codebooks or not np.array_equal(ids // size, codebook):
        raise UserError(
            f"speech: these {len(ids)} ids are not whole frames of {codebooks} codebooks of {size} codes with a delay"
        )
    codes_TK = np.empty((len(ids) // codebooks, codebooks), ids.dtype)
    codes_TK[frame, codebook] = ids - codebook * size
    return codes_TK


class DelayedCodebooks:
    """Which codebooks the next code of a row may belong to, so that what is sampled is always a whole recording.

    Only a step's first code leaves a choice. Where it is of codebook 0, the recording goes on. Where it is of codebook
    1 instead, the recording has as many frames as codebook 0 has codes, and all that follows is fixed.
    """

    def __init__(self, codebooks: int):
        self.codebooks = codebooks
        self.frames = 0
        """How many codes of codebook 0 there are."""
        self._begun = -1  # the first codebook of this step
        self._last = -1  # the codebook of the last code
        self._after = 0  # how many codes of this step are still to come

    def allowed(self) -> Sequence[int]:
        """The codebooks of which the next code may be; none where the recording is complete. Where codebook 0 and
        another are allowed, the other one ends the recording."""
        if self._after:
            return [self._last + 1]
        if self._begun == -1:
            return [0]
        following = [self._begun + 1] if self._begun + 1 < self.codebooks else []
        return [0, *following] if self._begun == 0 else following

    def ended(self) -> bool:
        """Whether the ids so far are a whole recording."""
        return bool(self.frames) and not self._after and self._begun == self.codebooks - 1

    def take(self, codebook: int) -> None:
        """Go on by a code of an allowed codebook."""
        if self._after:
            self._after -= 1
        else:
            self._begun = codebook
            self.frames += codebook == 0
            # Step s has the codebooks from `codebook` to min(s, K - 1), and s is the last frame's number plus codebook.
            step = self.frames - 1 + codebook
            self._after = min(step, self.codebooks - 1) - codebook
        self._last = codebook
