"""Evaluations by likelihood on held-out documents: retrieval, conditional gains, and minimal pairs.

Retrieval: which of the n pictures of a pool belongs to this text, and which text to this picture? The candidate with
the largest log p(candidate | query) is chosen, or with PMI that with the largest log p(candidate | query) - log
p(candidate), which does not favour candidates that are likely anyway (VisualGPTScore, arXiv 2306.01879, with alpha 1).

Conditional gain: by how much does the loss of a recording fall where its transcript stands before it?

Minimal pairs: is the right utterance likelier than the altered one (ZeroSpeech 2021, arXiv 2011.11588)?
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mom_data.order.plan import permutation
from mom_data.shards.dataset import TokenDataset
from mom_data.shards.format import TokenSegment
from mom_tokenizers.errors import UserError
from mom_train.config.evaluation import EvaluationConfig
from mom_train.passes import Passes
from mom_train.validation.likelihood import Likelihood, Question
from mom_train.validation.pairs import find_minimal_pairs, find_pairs, find_utterances

RANKS = (1, 5)
"""Recall at these."""


@dataclass(frozen=True)
class Figure:
    """A mean over queries, pairs or clips: sum(values) / sum(counts)."""

    values: np.ndarray
    """(n,) float64."""
    counts: np.ndarray
    """(n,) float64: 1, or the number of units of each clip."""
    chance: float | None = None
    """What a model that knows nothing would have."""

    @property
    def value(self) -> float:
        return float(self.values.sum() / self.counts.sum())


Figures = dict[str, Figure]


def recall(scores_QN: np.ndarray, right_Q: np.ndarray, k: int) -> np.ndarray:
    """(Q,) float64: whether the right candidate is among the `k` with the largest scores. Equal scores are put in a
    random order, of which this is the expectation; so a tie of m for the first place counts 1/m."""
    own_Q1 = scores_QN[np.arange(len(scores_QN)), right_Q][:, None]
    above_Q, equal_Q = (scores_QN > own_Q1).sum(1), (scores_QN == own_Q1).sum(1)
    return np.clip((k - above_Q) / equal_Q, 0.0, 1.0)


def preferred(right: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """(n,) float64: 1 where the right one is likelier, 1/2 where they are equally likely, and 0 otherwise."""
    return (right > wrong) + 0.5 * (right == wrong)


class Evaluations:
    """The documents of all sets that are evaluated, and the model that they are shown to."""

    def __init__(
        self,
        config: EvaluationConfig,
        passes: Passes,
        sets: Mapping[str, Sequence[TokenDataset]],
        minimal_pairs: Mapping[str, Sequence[TokenDataset]],
        *,
        control: bool = False,
    ):
        """Finds the documents. With `control`, retrieval and gains are computed for shuffled pairs too.

        `notes` then say what is left out and why. Raises UserError where nothing is found at all, or where
        `minimal_pairs` hold documents of another form. Contains no collective operation.
        """
        self.config, self.vocab, self.control = config, passes.vocab, control
        self.likelihood = Likelihood(passes, config.draws)
        self.notes: list[str] = []
        longest = passes.config.data.sequence_length
        self._pairs: dict[str, dict[str, list[tuple[TokenSegment, TokenSegment]]]] = {}
        self._units_per_second: dict[str, float] = {}
        self._minimal: dict[str, dict[str, list[tuple[TokenSegment, TokenSegment]]]] = {}
        for name, datasets in sets.items():
            self._pairs[name], self._minimal[name] = {}, {}
            for number, modality in enumerate(self.vocab.modalities[1:], start=1):
                pairs = find_pairs(datasets, modality, config.pairs, lambda text, n: text + n + 4 <= longest)
                if len(pairs) < config.pool:
                    self.notes.append(
                        f"{name}: {len(pairs)} documents consist of one text and one {modality} segment and have at "
                        f"most {longest} positions, fewer than a pool of {config.pool}: {modality} is left out"
                    )
                else:
                    self._pairs[name][modality] = [(TokenSegment(0, pair.text), pair.segment(number)) for pair in pairs]
                rates = {dataset.tokenizers.get(modality, {}).get("units_per_second") for dataset in datasets}
                if len(rates) == 1 and (rate := rates.pop()) is not None:
                    self._units_per_second[modality] = float(rate)
            if "speech" in self.vocab.modalities:
                number = self.vocab.modalities.index("speech")
                if found := find_utterances(datasets, "speech", config.pairs, longest - 4):
                    both = [(TokenSegment(number, a), TokenSegment(number, b)) for a, b in found]
                    self._minimal[name]["altered_speech"] = both
        if sets and not any(self._pairs.values()) and not any(self._minimal.values()):
            raise UserError(
                "nothing to evaluate: "
                + "; ".join(self.notes or ["text alone has neither pictures nor recordings"])
                + ". Give shards with such documents, or a smaller pool"
            )
        for name, datasets in minimal_pairs.items():
            by_modality: dict[str, list[tuple[TokenSegment, TokenSegment]]] = {}
            for dataset in datasets:
                for right, wrong in find_minimal_pairs(dataset, self.vocab, longest - 4):
                    by_modality.setdefault(self.vocab.modalities[right.modality], []).append((right, wrong))
            self._minimal[name] = {**self._minimal.get(name, {}), **by_modality}

    def figures(self, interrupted: Callable[[], bool] = bool) -> dict[str, Figures] | None:
        """The figures of each set by name. Collective. None once `interrupted`, which must be true on all ranks
        alike."""
        found: dict[str, Figures] = {}
        for name in dict.fromkeys((*self._pairs, *self._minimal)):
            found[name] = {}
            for modality, pairs in self._pairs.get(name, {}).items():
                figures = self._of_pairs(modality, pairs, interrupted)
                if figures is None:
                    return None
                found[name] |= figures
            for what, minimal in self._minimal.get(name, {}).items():
                figures = self._of_minimal_pairs(what, minimal, interrupted)
                if figures is None:
                    return None
                found[name] |= figures
        return found

    def logged(self, interrupted: Callable[[], bool]) -> dict[str, float] | None:
        """The figures as they are logged, eval/SET/..., with those of chance beside them."""
        found = self.figures(interrupted)
        if found is None:
            return None
        values: dict[str, float] = {}
        for name, figures in found.items():
            for figure, one in figures.items():
                values[f"eval/{name}/{figure}"] = one.value
                if one.chance is not None:
                    values[f"eval/{name}/chance/{figure.partition('/')[0].removesuffix('_pmi')}"] = one.chance
        return values

    # ---- pairs of a text and another segment ----------------------------------------------------------------

    def _of_pairs(
        self, modality: str, pairs: Sequence[tuple[TokenSegment, TokenSegment]], interrupted: Callable[[], bool]
    ) -> Figures | None:
        n = self.config.pool
        both = {"text": [text for text, _ in pairs], modality: [other for _, other in pairs]}
        figures: Figures = {}
        for query, answer in (("text", modality), (modality, "text")):
            asked, answers = both[query], both[answer]
            pools = [range(i, i + n) for i in range(0, len(pairs) - n + 1, n)]
            left = range(len(pools) * n, len(pairs))
            questions = [Question((), (target,)) for target in answers]
            questions += [Question((asked[q],), tuple(answers[i] for i in pool)) for pool in pools for q in pool]
            questions += [Question((asked[q],), (answers[q],)) for q in left]
            if self.control:
                following = [*pools[1:], pools[0]]
                questions += [
                    Question((asked[q],), tuple(answers[i] for i in other))
                    for pool, other in zip(pools, following, strict=True)
                    for q in pool
                ]
                questions += [Question((asked[q - 1],), (answers[q],)) for q in range(len(pairs))]
            scores = self.likelihood.score(questions, interrupted)
            if scores is None:
                return None
            cuts = np.cumsum([len(pairs), len(pools) * n, len(left), len(pools) * n * self.control])
            alone, pooled, single, shuffled, wrong = (
                scores[a:b] for a, b in zip([0, *cuts], [*cuts, None], strict=True)
            )
            alone_P = np.concatenate(alone)
            scores_QN, priors_QN = np.stack(pooled), np.stack([alone_P[list(pool)] for pool in pools for _ in pool])
            right_Q = np.tile(np.arange(n), len(pools))
            label = f"{query}_to_{answer}"
            figures |= _recalls(scores_QN, priors_QN, right_Q, label, "")
            after_P = np.concatenate([scores_QN[np.arange(len(right_Q)), right_Q], *single])
            figures |= self._gains(modality, answer, answers, alone_P, after_P, "")
            if self.control:
                priors_QN = np.stack([alone_P[list(other)] for other in following for _ in range(n)])
                if len(pools) == 1:  # the right ones are among the candidates: others are called right, at random
                    right_Q = permutation(n, "shuffled")
                figures |= _recalls(np.stack(shuffled), priors_QN, right_Q, label, "_shuffled")
                figures |= self._gains(modality, answer, answers, alone_P, np.concatenate(wrong), "_shuffled")
        return figures

    def _gains(
        self,
        modality: str,
        answer: str,
        answers: Sequence[TokenSegment],
        alone_P: np.ndarray,
        after_P: np.ndarray,
        suffix: str,
    ) -> Figures:
        """By how much the loss of each answer falls where its query stands before it: in nats per unit, or for latents
        in squared error per channel."""
        latent = answers[0].latent
        units_P = np.array([1.0 if latent else len(target.values) for target in answers])
        after = f"{answer}_after_text" if answer != "text" else f"text_after_{modality}"
        figures = {f"gain{suffix}/{after}": Figure(after_P - alone_P, units_P)}
        if suffix:
            return figures
        before = answer if answer != "text" else f"text_of_{modality}"
        figures |= {f"loss/{before}": Figure(-alone_P, units_P), f"loss/{after}": Figure(-after_P, units_P)}
        if (rate := self._units_per_second.get(answer)) is not None:
            figures[f"gain_per_second/{after}"] = Figure(after_P - alone_P, units_P / rate)
        return figures

    # ---- minimal pairs --------------------------------------------------------------------------------------

    def _of_minimal_pairs(
        self, what: str, pairs: Sequence[tuple[TokenSegment, TokenSegment]], interrupted: Callable[[], bool]
    ) -> Figures | None:
        scores = self.likelihood.score([Question((), pair) for pair in pairs], interrupted)
        if scores is None:
            return None
        sums_P2 = np.stack(scores)
        units_P2 = np.array([[len(right.values), len(wrong.values)] for right, wrong in pairs])
        ones_P = np.ones(len(pairs))
        return {
            f"minimal_pairs/{what}": Figure(preferred(*sums_P2.T), ones_P, 0.5),
            f"minimal_pairs_mean/{what}": Figure(preferred(*(sums_P2 / units_P2).T), ones_P, 0.5),
        }


def _recalls(scores_QN: np.ndarray, priors_QN: np.ndarray, right_Q: np.ndarray, label: str, suffix: str) -> Figures:
    Q, N = scores_QN.shape
    return {
        f"recall{k}{kind}{suffix}/{label}": Figure(recall(by, right_Q, k), np.ones(Q), k / N)
        for kind, by in (("", scores_QN), ("_pmi", scores_QN - priors_QN))
        for k in RANKS
        if k < N
    }
