"""A trained model as lm-evaluation-harness sees it, under the name `mom`.

    lm_eval --model mom --model_args run=runs/a --tasks ...     # releases after 0.4.13, which find models of packages

`mom lm-eval` does the same with 0.4.13, which finds none. Text is scored as training reads it: a document begins with
<bos>, and every request is a document of its own, whose state begins from zero. All figures are computed in the
precision of the stored weights, fp32.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor
from tqdm import tqdm

from mom_tokenizers.base import resolved_device
from mom_tokenizers.bundle import Tokenizers
from mom_tokenizers.errors import UserError
from mom_tokenizers.text import TextTokenizer
from mom_train.checkpoint.load import load_run
from mom_train.config.files import read_saved, validated
from mom_train.config.preflight import is_local
from mom_train.config.run import RunConfig
from mom_train.exchange.weights import load_weights, open_weights
from mom_train.generate.sampler import Sampler, Sampling
from mom_train.model.language_model import LanguageModel, build_model
from mom_train.ops.layout import RowLayout

log = logging.getLogger(__name__)

_POSITIONS = 1 << 14
_LOGITS = 1 << 28
"""The most positions, and the most logits, of a batch whose size is "auto"."""


def is_export(place: str | Path) -> bool:
    """Whether `place` is a folder that `mom export` wrote."""
    folder = Path(place)
    return is_local(place) and (folder / "config.yaml").is_file() and any(folder.glob("*.safetensors"))


def load_model(
    place: str | Path, step: int | Literal["best"] | None, weights: Literal["model", "ema"], device: str
) -> tuple[LanguageModel, RunConfig]:
    """The model of a run, of a checkpoint, or of a folder that `mom export` wrote, in evaluation mode, and the config
    of its run. Raises UserError if it is not there or is damaged."""
    if not is_export(place):
        return load_run(place, step, device, weights)
    if step is not None or weights != "model":
        raise UserError(f"{place}: an exported model has one set of weights; leave --step and --weights out")
    folder = Path(place)
    values = read_saved(folder)
    if (folder / "vocab.json").is_file() and isinstance(values.get("vocabulary"), str):
        values["vocabulary"] = str(folder / "vocab.json")  # the run's own file may be on another machine
    config = validated(values, folder / "config.yaml")
    model = build_model(config)
    model.to_empty(device=device)
    load_weights(model, open_weights(folder), folder, config.layout)
    return model.eval(), config


@register_model("mom")
class HarnessModel(TemplateLM):
    """Log-likelihoods and texts of a trained model for lm-evaluation-harness."""

    def __init__(
        self,
        run: str,
        step: int | Literal["best"] | None = None,
        weights: Literal["model", "ema"] = "model",
        tokenizers: str | None = None,
        batch_size: int | str | None = "auto",
        device: str | None = None,
        max_length: int | None = None,
        max_batch_size: int | None = None,
    ):
        """`run` is the folder or URL of a run or of a checkpoint, or a folder of `mom export`. `tokenizers` is the
        tokenizers.yaml of its text, by default that of the run. `max_length` is the most positions that are read at
        once, by default the sequence length of the run. Raises UserError where the model or its tokenizer cannot be
        had, or where the tokenizer has more ids than the model."""
        super().__init__()
        if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            log.warning("there is no GPU here: the model computes on the CPU")  # the harness asks for one by default
            device = None
        self._device = torch.device(resolved_device(device or "auto"))
        self.model, self.config = load_model(run, step, weights, str(self._device))
        path = tokenizers or self.config.tokenizers
        if path is None:
            raise UserError(f"{run} names no tokenizers; give them: --tokenizers TOKENIZERS.yaml")
        self.text = cast(TextTokenizer, Tokenizers.load(path).tokenizer("text"))
        self.vocab = self.config.layout
        if self.text.size > (ids := dict(self.vocab.sizes)["text"]):
            raise UserError(
                f"{path}: its text tokenizer has {self.text.size} ids, but the model of {run} has {ids} ids of text: "
                "these are not the tokenizers that it was trained with"
            )
        self.max_length = int(max_length or self.config.data.sequence_length)
        rows = str(batch_size or "auto").partition(":")[0]
        if rows != "auto" and not (rows.isdigit() and int(rows) > 0):
            raise UserError(f"batch_size {batch_size}: a number above 0, or 'auto'")
        self._rows = None if rows == "auto" else int(rows)
        if max_batch_size is not None:
            self._rows = min(self._rows or int(max_batch_size), int(max_batch_size))
        self.model_name = str(run)

    # ---- text and ids ---------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self.vocab.specials["eos"]

    @property
    def prefix_token_id(self) -> int:
        """The id that opens a document, which comes before a text without context."""
        return self.vocab.specials["bos"]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The ids of a text in the model's vocabulary, after <bos> unless `add_special_tokens` is False."""
        ids = cast(list[int], self.vocab.ids("text", self.text.encode(string)).tolist())
        return ids if add_special_tokens is False else [self.prefix_token_id, *ids]

    # ---- likelihoods ----------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """For each request (texts, ids of the context, ids of the continuation): the log-likelihood of the continuation
        in nats, and whether each of its ids is the likeliest one. A context that is too long loses its beginning."""
        windows = []
        for texts, context, continuation in requests:
            if not continuation:
                raise UserError(
                    f"{texts!r}: the tokenizer joins the whole continuation to the end of the context, so that nothing "
                    "is left to score; begin the continuation with a space (target_delimiter), or end the context "
                    "with a line break"
                )
            if len(continuation) > self.max_length:
                raise UserError(
                    f"a continuation of {len(continuation)} ids is longer than the {self.max_length} positions that "
                    "the model reads: raise --max-length"
                )
            ids = [*context, *continuation][-(self.max_length + 1) :]
            windows.append((ids, len(continuation)))
        found: list[tuple[float, bool]] = [(0.0, True)] * len(windows)
        bar = tqdm(total=len(windows), desc="log-likelihoods", disable=disable_tqdm or None)
        # the longest first: then too little memory shows at once, and rows of a batch have about the same length
        order = sorted(range(len(windows)), key=lambda i: (-len(windows[i][0]), i))
        at = 0
        while at < len(order):
            some = order[at : at + self._rows_of(len(windows[order[at]][0]) - 1)]
            at += len(some)
            for i, result in zip(some, self._score([windows[i] for i in some]), strict=True):
                found[i] = result
                if (texts := requests[i][0]) is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, result)
            bar.update(len(some))
        bar.close()
        return found

    def _rows_of(self, length: int) -> int:
        """The number of rows of a batch whose longest row has `length` positions."""
        if self._rows is not None:
            return self._rows
        length = max(1, length)
        return max(1, min(_POSITIONS // length, _LOGITS // (length * self.vocab.size)))

    @torch.no_grad()
    def _score(self, windows: Sequence[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        """(log-likelihood, greedy) of the last ids of each window (ids, their number), each window in a row of its own.

        Rows are padded on the right, by a document of its own; the model is causal, so it changes nothing before it.
        """
        B, L = len(windows), max(len(ids) for ids, _ in windows) - 1
        tokens_BL = torch.full((B, L), self.vocab.specials["pad"])
        document_BL = torch.ones(B, L, dtype=torch.int32)
        for b, (ids, _) in enumerate(windows):
            tokens_BL[b, : len(ids) - 1] = torch.tensor(ids[:-1])
            document_BL[b, : len(ids) - 1] = 0
        logits_TV, layout = self._logits(tokens_BL, document_BL)
        results = []
        for b, (ids, n) in enumerate(windows):
            places = layout.order[b * L + len(ids) - 1 - n : b * L + len(ids) - 1].long()
            target_n = torch.tensor(ids[-n:], device=self._device)
            some_nV = logits_TV[places]
            some_nV = some_nV.to(torch.promote_types(some_nV.dtype, torch.float32))
            chosen_n = some_nV.log_softmax(1).gather(1, target_n[:, None]).double()
            results.append((float(chosen_n.sum()), bool((some_nV.argmax(1) == target_n).all())))
        return results

    def _logits(self, tokens_BL: Tensor, document_BL: Tensor) -> tuple[Tensor, RowLayout]:
        """The logits (T, V) of every position, in the row order of the layout that is returned with them."""
        modality_BL = torch.from_numpy(self.vocab.modality_of_id)[tokens_BL]
        layout = RowLayout.sort(modality_BL.to(self._device), document_BL.to(self._device), len(self.vocab.modalities))
        logits_TV, _ = self.model(tokens_BL.to(self._device).reshape(-1)[layout.rows], layout)
        return logits_TV, layout

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text in nats, every id once. A text longer than `max_length` is scored in
        parts of that length, and the last part is read after as much of the part before as there is room for."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        counts = []
        for request in requests:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            parts = utils.get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            pairs = [utils.make_disjoint_window(part) for part in parts]
            windows += [(None, context, continuation) for context, continuation in pairs]
            counts.append(len(pairs))
        scored = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        results, at = [], 0
        for request, n in zip(requests, counts, strict=True):
            results.append(math.fsum(value for value, _ in scored[at : at + n]))
            at += n
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, results[-1])
        return results

    # ---- texts ----------------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text that the model writes after each context, up to one of the texts in `until`, to the end of the
        document, or to `max_gen_toks` ids. One request after another, with the state carried along."""
        results = []
        for request in tqdm(requests, desc="texts", disable=disable_tqdm or None):
            context, given = request.args
            results.append(self._continue(context, normalize_gen_kwargs(given)))
            self.cache_hook.add_partial("generate_until", request.args, results[-1])
        return results

    def _continue(self, context: str, settings: dict[str, Any]) -> str:
        known = {"until", "max_gen_toks", "do_sample", "temperature", "top_p"}
        if unknown := sorted(settings.keys() - known):
            raise UserError(f"generation_kwargs: {', '.join(unknown)}: this model knows {', '.join(sorted(known))}")
        temperature = float(settings["temperature"]) if settings["do_sample"] else 0.0
        sampling = Sampling(temperature=temperature, top_p=float(settings.get("top_p", 1.0)), max_tokens=1 << 30)
        ids = self.tok_encode(context)[-self.max_length :]
        sampler = Sampler(self.model, self.vocab, sampling, seed=self.config.seed)
        sampler.read(ids)
        allowed_V = torch.zeros(self.vocab.size, dtype=torch.bool)
        allowed_V[torch.from_numpy(self.vocab.ids("text", np.arange(self.text.size)))] = True
        allowed_V[torch.from_numpy(self.vocab.modality_of_id != 0)] = False  # codes may lie among the text's ids
        allowed_V[list(self.vocab.specials.values())] = False
        allowed_V[self.eot_token_id] = True
        written: list[int] = []
        text = ""
        for _ in range(settings["max_gen_toks"]):
            if (token := sampler.choose(allowed_V)) == self.eot_token_id:
                break
            written.append(token)
            text = self.text.decode(self.vocab.codes("text", np.array(written)))
            if ends := [place for stop in settings["until"] if stop and (place := text.find(stop)) >= 0]:
                return text[: min(ends)]
            sampler.read([token])
        return text
