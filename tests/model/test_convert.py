import subprocess
import sys
from pathlib import Path

import pytest
import torch
from corpus import VOCAB
from ranks import mom_train, run_ranks
from run_config import tiny_config, write_config
from transformers import MambaConfig, MambaForCausalLM

from mom_train.config import PROJECTIONS, ModelConfig
from mom_train.convert import load_weights, open_weights
from mom_train.layout import RowLayout
from mom_train.model import LanguageModel, initialize

CHECKOUT = Path(__file__).parents[2]


def text_layout(length, modalities=1):
    zeros = torch.zeros(1, length)
    return RowLayout.sort(zeros.to(torch.uint8), zeros.to(torch.int32), modalities)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A small MambaForCausalLM with random weights, saved by Transformers."""
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=128, hidden_size=32, num_hidden_layers=4, state_size=16, tie_word_embeddings=False,
        time_step_rank=2, use_mambapy=False,
    )  # fmt: skip
    model = MambaForCausalLM(config).eval()
    with torch.no_grad():  # away from the values that every Mamba starts with
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    path = tmp_path_factory.mktemp("published")
    model.save_pretrained(path)
    return model, path


def test_a_published_mamba_gives_its_logits_here_and_goes_back(published, tmp_path):
    theirs, path = published
    ours = LanguageModel(ModelConfig(dim=32, layers=2, decoupled=()), 128, 1).eval()
    load_weights(ours, open_weights(path), path)
    tokens = torch.randint(0, 128, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(tokens).logits[0]
        got, _ = ours(tokens[0], text_layout(40))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_mamba_ssms_own_names_and_tied_heads_are_read_too(published, tmp_path):
    from safetensors.torch import load_file, save_file

    theirs, path = published
    stored = load_file(path / "model.safetensors")
    renamed = {
        n.replace("backbone.embeddings.", "backbone.embedding."): v for n, v in stored.items() if "lm_head" not in n
    }
    save_file(renamed, tmp_path / "weights.safetensors")
    ours = LanguageModel(ModelConfig(dim=32, layers=2, decoupled=()), 128, 1)
    load_weights(ours, open_weights(tmp_path / "weights.safetensors"), tmp_path)
    assert torch.equal(ours.head.weight, theirs.backbone.embeddings.weight)
    assert torch.equal(ours.blocks[3].block.mixer.conv_weight, theirs.backbone.layers[3].mixer.conv1d.weight[:, 0])


def test_another_architecture_or_shape_is_refused_by_name(published, tmp_path):
    _, path = published
    narrow = LanguageModel(ModelConfig(dim=48, layers=2, decoupled=()), 128, 1)
    with pytest.raises(ValueError, match=r"'embedding.weight' has shape \(128, 32\), this model's is \(128, 48\)"):
        load_weights(narrow, open_weights(path), path)
    deep = LanguageModel(ModelConfig(dim=32, layers=3, decoupled=()), 128, 1)
    with pytest.raises(ValueError, match=r"has no 'blocks.4.block.norm.weight'"):
        load_weights(deep, open_weights(path), path)
    with pytest.raises(ValueError, match=r"no checkpoint and no \.safetensors"):
        open_weights(tmp_path)


def test_a_grown_vocabulary_keeps_its_own_new_rows(published):
    theirs, path = published
    grown = LanguageModel(ModelConfig(dim=32, layers=2, decoupled=PROJECTIONS), 192, 3)
    initialize(grown, 0)
    fresh = grown.embedding.weight.detach().clone()
    load_weights(grown, open_weights(path), path)
    assert torch.equal(grown.embedding.weight[:128], theirs.backbone.embeddings.weight)
    assert torch.equal(grown.embedding.weight[128:], fresh[128:])
    stacked = grown.blocks[1].block.mixer.in_proj.weight.view(3, -1, 32)
    assert all(torch.equal(m, theirs.backbone.layers[1].mixer.in_proj.weight) for m in stacked)


def first_losses(config):
    from itertools import islice

    import torch.distributed as dist

    from mom_data.loader import Share, batches
    from mom_train.parallel import process_group
    from mom_train.status import Stop
    from mom_train.trainer import Trainer

    with process_group() as ranks:
        trainer = Trainer(config, ranks)
        share = Share(ranks.rank, ranks.world_size, config.training.batch, config.training.micro_batch)
        step = list(islice(batches(trainer.plan, VOCAB, share), trainer.accumulation))
        counts = trainer.agree(step, Stop()).counts
        sums = trainer.passes.forward_backward(step, counts)
        dist.all_reduce(sums)
        return trainer.passes.means("", sums, counts)


def test_an_upcycled_mixture_starts_with_the_dense_models_loss(tmp_path):
    """And exports in our own names read back the same."""
    dense = {"dim": 32, "layers": 1, "decoupled": []}
    config = write_config(tmp_path, model=dense, training__steps=6)
    assert mom_train(config)[0] == 0
    [expected] = run_ranks(1, first_losses, tiny_config(tmp_path, model=dense, training__steps=6))

    export = [sys.executable, "tools/export_model.py", str(tmp_path / "run"), "--out"]
    subprocess.run([*export, str(tmp_path / "out")], cwd=CHECKOUT, check=True, capture_output=True)
    mixture = {"run_dir": str(tmp_path / "up"), "model": {**dense, "decoupled": list(PROJECTIONS)}}
    for source in ("run", "out"):
        for ranks in (1, 2):
            config = tiny_config(tmp_path, init_from=str(tmp_path / source), **mixture)
            got = run_ranks(ranks, first_losses, config)[0]
            assert got == pytest.approx(expected, rel=1e-5)

    subprocess.run([*export, str(tmp_path / "hf"), "--format", "transformers"], cwd=CHECKOUT, check=True)
    theirs = MambaForCausalLM.from_pretrained(tmp_path / "hf").eval()
    ours = LanguageModel(ModelConfig(**dense), VOCAB.size, 1).eval()
    load_weights(ours, open_weights(tmp_path / "run"), tmp_path)
    tokens = torch.arange(30)[None] % VOCAB.size
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens[0], text_layout(30))[0], theirs(tokens).logits[0], atol=1e-4, rtol=1e-4)


def test_the_mixture_loads_through_transformers_with_its_logits(tmp_path):
    from transformers import AutoModelForCausalLM

    config = write_config(tmp_path, training__steps=3)
    assert mom_train(config)[0] == 0
    export = [sys.executable, "tools/export_model.py", str(tmp_path / "run"), "--out", str(tmp_path / "hf")]
    subprocess.run([*export, "--format", "transformers"], cwd=CHECKOUT, check=True, capture_output=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True).eval()
    ours = LanguageModel(tiny_config(tmp_path).model, VOCAB.size, 3).eval()
    load_weights(ours, open_weights(tmp_path / "run"), tmp_path)
    ids = torch.randint(0, VOCAB.used, (2, 30), generator=torch.Generator().manual_seed(0))
    modality = torch.from_numpy(VOCAB.modality_of_id)[ids]
    layout = RowLayout.sort(modality, torch.zeros(2, 30, dtype=torch.int32), 3)
    with torch.no_grad():
        expected = ours(ids.reshape(-1)[layout.rows], layout)[0][layout.order.long()].view(2, 30, -1)
        got = theirs(ids, labels=ids)
        torch.testing.assert_close(got.logits, expected, atol=1e-5, rtol=1e-5)
        shifted = torch.nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        assert got.loss.item() == pytest.approx(shifted.item(), rel=1e-5)
        padded = torch.cat([torch.full((2, 4), VOCAB.specials["pad"]), ids], 1)
        mask = torch.cat([torch.zeros(2, 4, dtype=torch.int64), torch.ones_like(ids)], 1)
        torch.testing.assert_close(theirs(padded, mask).logits[:, 4:], expected, atol=1e-5, rtol=1e-5)
        written = theirs.generate(ids[:1], max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert written.shape == (1, 33)
    assert int(written[0, 30]) == int(expected[0, -1].argmax())
