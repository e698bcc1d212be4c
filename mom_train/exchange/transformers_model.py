"""A trained model behind Transformers' interface: AutoModelForCausalLM.from_pretrained(dir, trust_remote_code=True).

tools/export_model.py writes such a folder. It needs this package installed, beside transformers.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from mom_tokenizers.media.shapes import Shapes
from mom_tokenizers.vocab import VocabLayout
from mom_train.config.migrations import SCHEMA, migrated_config
from mom_train.config.model import ModelConfig
from mom_train.model.language_model import LanguageModel
from mom_train.ops.layout import RowLayout

# What the exported folder's own module says: Transformers loads classes from a file beside the weights.
REMOTE_MODULE = "modeling_mixture_of_mamba"
REMOTE_CODE = """from mom_train.exchange.transformers_model import MixtureOfMambaConfig, MixtureOfMambaForCausalLM

__all__ = ["MixtureOfMambaConfig", "MixtureOfMambaForCausalLM"]
"""


class MixtureOfMambaConfig(PretrainedConfig):
    model_type = "mixture_of_mamba"

    def __init__(
        self,
        model: dict[str, Any] | None = None,
        vocabulary: list[list[Any]] | None = None,
        schema: int = 1,
        picture_shapes: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        """`model` as ModelConfig has it, in the form of `schema`. `vocabulary`: [[modality, number of ids], ...], text
        first; a list, because its order counts and Transformers sorts mappings. `picture_shapes` as in a run's config,
        None where all pictures are square."""
        saved = {"schema": schema, "model": model or {"dim": 32, "layers": 1, "decoupled": []}}
        self.model = migrated_config(saved, "config.json")["model"]
        self.schema = SCHEMA
        self.vocabulary = vocabulary or [["text", 256]]
        self.picture_shapes = picture_shapes
        layout = self.layout()
        kwargs.setdefault("vocab_size", layout.size)
        for name in ("bos", "eos", "pad"):
            kwargs.setdefault(f"{name}_token_id", layout.specials[name])
        kwargs.setdefault("tie_word_embeddings", False)
        kwargs.setdefault("use_cache", False)
        shape = ModelConfig(**self.model)
        self.hidden_size, self.num_hidden_layers = shape.dim, shape.blocks  # generate() asks for them
        super().__init__(**kwargs)

    def layout(self) -> VocabLayout:
        shapes = None if self.picture_shapes is None else Shapes.of(self.picture_shapes)
        return VocabLayout({name: int(size) for name, size in self.vocabulary}, shapes=shapes)


class MixtureOfMambaForCausalLM(PreTrainedModel, GenerationMixin):
    """Logits for token ids of the whole vocabulary; each token is routed by its id's modality.

    Padding on the left is a document of its own, so it changes nothing. `generate` runs the whole sequence for every
    token; tools/generate.py carries the state instead.
    """

    config_class = MixtureOfMambaConfig
    main_input_name = "input_ids"
    _no_split_modules = ["Block"]  # noqa: RUF012  # the base class wants a list

    def __init__(self, config: MixtureOfMambaConfig):
        super().__init__(config)
        self.model = LanguageModel(ModelConfig(**config.model), config.vocab_size, len(config.vocabulary))
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Does nothing, because the weights come from a checkpoint."""

    @cached_property
    def _modality_of_id(self) -> Tensor:
        return torch.from_numpy(self.config.layout().modality_of_id)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **options: Any,
    ) -> CausalLMOutput:
        """input_ids, attention_mask and labels (B, L) int64; logits (B, L, V).

        The loss is the cross-entropy of `labels[:, 1:]` where they are not -100: its mean over this batch, or its sum
        over `num_items_in_batch`, the number of targets of all batches whose gradients are accumulated. That is how
        Transformers' Trainer, which passes that number, has the same gradient however a batch is cut into pieces.
        Raises ValueError for inputs that this model has no use for, such as `inputs_embeds`.
        """
        for name, value in options.items():
            if value is not None and value is not False and name not in ("return_dict", "use_cache"):
                raise ValueError(f"{type(self).__name__} has no use for {name}={value!r}")
        modality = self._modality_of_id.to(input_ids.device)[input_ids]
        document = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        layout = RowLayout.sort(modality, document.to(torch.int32), len(self.config.vocabulary))
        rows, _ = self.model(input_ids.reshape(-1)[layout.rows], layout)
        logits = rows[layout.order.long()].view(*input_ids.shape, -1)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, num_items_in_batch=num_items_in_batch)
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        return {"input_ids": input_ids, "attention_mask": kwargs.get("attention_mask")}
