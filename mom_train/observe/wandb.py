"""Writes the figures and samples of a run to Weights & Biases. Used by rank 0."""

from __future__ import annotations

import html
import importlib.util
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from mom_tokenizers.errors import UserError
from mom_train.config.run import RunConfig
from mom_train.generate.samples import Span


class Wandb:
    """Sends figures and samples to Weights & Biases. A run that resumes continues the same run there."""

    def __init__(self, config: RunConfig):
        import wandb

        assert config.wandb is not None
        chosen, run_dir = config.wandb, config.run_dir
        self.place = run_dir / "wandb"
        path = run_dir / "wandb_id"
        if not path.exists():
            path.write_text(secrets.token_hex(4) + "\n")
        self._wandb = wandb
        try:
            self._run = wandb.init(
                project=chosen.project,
                entity=chosen.entity,
                name=chosen.name or run_dir.name,
                group=chosen.group,
                tags=chosen.tags or None,
                mode=chosen.mode,
                dir=str(run_dir),
                id=path.read_text().strip(),
                resume="allow",
                config=config.model_dump(mode="json"),
            )
        except wandb.Error as error:
            raise UserError(f"wandb: {error} Or set wandb.mode=offline.") from None
        # The step counter of wandb itself may only grow, but ours goes back on a resume.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Logs the values of a step."""
        self._run.log({"step": step, **values})

    def samples(self, step: int, documents: Sequence[Sequence[Span]]) -> None:
        """Logs the documents that the model wrote at `step`, with their pictures and recordings."""
        shown: dict[str, Any] = {}
        for n, spans in enumerate(documents):
            text = "\n\n".join(span.markdown for span in spans)
            shown[f"samples/{n}"] = self._wandb.Html(f"<pre>{html.escape(text)}</pre>")
            for span in spans:
                if span.modality == "image" and span.decoded is not None:
                    shown[f"samples/{span.name}"] = self._wandb.Image(span.decoded.convert("RGB"))
                elif span.modality != "text" and span.decoded is not None:
                    waveform, rate = span.decoded
                    shown[f"samples/{span.name}"] = self._wandb.Audio(waveform, sample_rate=rate)
        self._run.log({"step": step, **shown})

    def close(self) -> None:
        self._run.finish()


def check_wandb(config: RunConfig) -> None:
    """Raises UserError if the config asks for Weights & Biases and it is not installed."""
    if config.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise UserError("wandb is in the config but not installed: pip install wandb, or leave the section out")
