import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import FalconMambaConfig, FalconMambaForCausalLM, MambaConfig, MambaForCausalLM

from mom_tokenizers.errors import UserError
from mom_train.config.model import ModelConfig
from mom_train.exchange import published_mamba
from mom_train.exchange.weights import load_weights, open_weights
from tests.exchange.test_weights import ONE_LAYER, SMALL, dense, logits_differ


def random_falcon(**settings):
    """A small FalconMambaForCausalLM, with weights that are not those that every Mamba starts with."""
    torch.manual_seed(0)
    theirs = FalconMambaForCausalLM(FalconMambaConfig(**{**SMALL, "tie_word_embeddings": False, **settings})).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return theirs


FALCON = ONE_LAYER.model_copy(update={"normalise": True})


@pytest.mark.parametrize(
    ("settings", "config"),
    [
        ({}, {}),
        ({"tie_word_embeddings": True}, {}),
        ({"mixer_rms_eps": 1e-2, "state_size": 8}, {"normalise_eps": 1e-2, "state": 8}),
        ({"eos_token_id": [10, 11]}, {}),
    ],
    ids=lambda settings: ", ".join(settings),
)
def test_a_falcon_mamba_gives_its_logits_here(settings, config, tmp_path):
    theirs = random_falcon(**settings)
    theirs.save_pretrained(tmp_path)
    ours = dense(FALCON.model_copy(update=config))
    load_weights(ours, open_weights(tmp_path), tmp_path)
    assert logits_differ(theirs, ours) < 1e-4
    plain = dense(ModelConfig(**{**ONE_LAYER.model_dump(), "state": ours.config.state}))
    plain.load_state_dict(ours.state_dict())  # the names are the same, so only the config tells the two apart
    assert logits_differ(theirs, plain) > 1e-2


def test_a_falcon_mambas_inner_width_is_what_intermediate_size_says(tmp_path):
    """The published 7B says expand 16 and an intermediate_size of twice its width."""
    theirs = random_falcon(expand=16, intermediate_size=64)
    assert theirs.backbone.layers[0].mixer.A_log.shape == (64, 16)
    theirs.save_pretrained(tmp_path)
    ours = dense(FALCON)
    load_weights(ours, open_weights(tmp_path), tmp_path)
    assert logits_differ(theirs, ours) < 1e-4
    with pytest.raises(UserError, match=r"intermediate_size is 64, here inner is 128: set model.expand=2"):
        load_weights(dense(FALCON.model_copy(update={"expand": 4})), open_weights(tmp_path), tmp_path)
    with pytest.raises(UserError, match=r"mixer_rms_eps is 1e-06, here normalise_eps is 0.01: set model.normalise_eps"):
        load_weights(dense(FALCON.model_copy(update={"normalise_eps": 1e-2})), open_weights(tmp_path), tmp_path)
    MambaForCausalLM(MambaConfig(**SMALL)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"it does not normalise dt, B and C: set model.normalise=false"):
        load_weights(ours, open_weights(tmp_path), tmp_path)


def test_a_normalised_mamba_goes_to_transformers_as_a_falcon_mamba_and_comes_back_the_same(tmp_path):
    config = ModelConfig(dim=32, layers=1, decoupled=(), normalise=True, normalise_eps=1e-5, expand=3, dt_rank=5)
    ours = dense(config)
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    tensors = {
        published_mamba.mamba_name(name): published_mamba.to_mamba(name, p.detach()).contiguous()
        for name, p in ours.named_parameters()
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(published_mamba.transformers_config(config, 128, 1, 2, 3))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(theirs, FalconMambaForCausalLM)
    assert logits_differ(theirs, ours) < 1e-4
    theirs.save_pretrained(tmp_path / "again")
    back = dense(config)
    load_weights(back, open_weights(tmp_path / "again"), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), ours.parameters(), strict=True))
