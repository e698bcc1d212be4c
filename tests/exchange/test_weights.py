import json

import numpy as np
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from transformers import FalconMambaConfig, MambaConfig, MambaForCausalLM

from mom_data.batches.batch import assemble_document
from mom_data.shards.format import TokenSegment
from mom_tokenizers.errors import UserError
from mom_tokenizers.media.shapes import Shapes
from mom_tokenizers.vocab import VocabLayout
from mom_tools.model.export_model import export
from mom_train.config.model import PROJECTIONS, DiffusionConfig, ModelConfig
from mom_train.exchange import published_mamba
from mom_train.exchange.transformers_model import MixtureOfMambaConfig
from mom_train.exchange.weights import load_weights, open_weights
from mom_train.model.init import initialize
from mom_train.model.language_model import LanguageModel
from mom_train.ops.layout import RowLayout
from tests.helpers.corpus import VOCAB
from tests.helpers.ranks import mom_train, run_ranks
from tests.helpers.run_config import tiny_config, write_config


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


def test_width_transfer_is_refused_for_weights_that_it_did_not_scale(published, tmp_path):
    _, path = published
    config = ModelConfig(dim=32, layers=2, decoupled=(), base_dim=16)
    with pytest.raises(UserError, match=r"model\.base_dim=16 scales initial values and learning rates together"):
        load_weights(LanguageModel(config, 128, 1), open_weights(path), path)


def test_another_shape_is_refused_with_all_that_differs(published, tmp_path):
    _, path = published
    narrow = LanguageModel(ModelConfig(dim=48, layers=2, decoupled=()), 128, 1)
    with pytest.raises(UserError) as refused:
        load_weights(narrow, open_weights(path), path)
    for line in (
        "hidden_size is 32, here dim is 48: set model.dim=32",
        "time_step_rank is 2, here rank is 3: set model.dt_rank=2",
        "'backbone.embeddings.weight' has shape (128, 32) there, this model's is (128, 48)",
        "'backbone.layers.*.mixer.A_log' has shape (64, 16) there, this model's is (96, 16)",
    ):
        assert line in str(refused.value)
    deep = LanguageModel(ModelConfig(dim=32, layers=3, decoupled=()), 128, 1)
    with pytest.raises(UserError, match=r"num_hidden_layers is 4, here blocks is 6: set model.layers=2") as refused:
        load_weights(deep, open_weights(path), path)
    assert "it has no blocks.*.block.norm.weight (2 of them)" in str(refused.value)
    with pytest.raises(UserError, match=r"no checkpoint and no \.safetensors"):
        open_weights(tmp_path)


SMALL = dict(vocab_size=128, hidden_size=32, num_hidden_layers=2, state_size=16, time_step_rank=2)
ONE_LAYER = ModelConfig(dim=32, layers=1, decoupled=())


def dense(config=ONE_LAYER, vocabulary=128):
    model = LanguageModel(config, vocabulary, 1).eval()
    initialize(model, 0)
    return model


def logits_differ(theirs, ours):
    tokens = torch.randint(0, 128, (1, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return (theirs.eval()(tokens).logits[0] - ours(tokens[0], text_layout(20))[0]).abs().max().item()


@pytest.mark.parametrize(
    ("settings", "config"),
    [
        ({"tie_word_embeddings": True}, {}),
        ({"tie_word_embeddings": False, "expand": 1, "conv_kernel": 2}, {"expand": 1, "conv": 2}),
        ({"layer_norm_epsilon": 1e-2, "time_step_rank": 5}, {"norm_eps": 1e-2, "dt_rank": 5}),
        ({"rescale_prenorm_residual": True, "residual_in_fp32": False, "time_step_scale": 2.0}, {}),
    ],
    ids=lambda settings: ", ".join(settings),
)
def test_what_is_accepted_of_a_published_mamba_gives_its_logits(settings, config, tmp_path):
    torch.manual_seed(0)
    theirs = MambaForCausalLM(MambaConfig(**{**SMALL, **settings}))
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.05 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path)
    ours = dense(ModelConfig(**{**ONE_LAYER.model_dump(), **config}))
    load_weights(ours, open_weights(tmp_path), tmp_path)
    assert logits_differ(theirs, ours) < 1e-4


@pytest.mark.parametrize(
    ("kind", "settings", "named"),
    [
        ("Mamba", {"num_hidden_layers": 6}, "num_hidden_layers is 6, here blocks is 2: set model.layers=3"),
        ("Mamba", {"num_hidden_layers": 3}, "an odd number of them cannot be had"),
        ("Mamba", {"use_bias": True}, "use_bias is true, this package has only false"),
        ("Mamba", {"use_bias": True}, "backbone.layers.*.mixer.in_proj.bias (2 of them)"),
        ("Mamba", {"use_conv_bias": False}, "use_conv_bias is false"),
        ("Mamba", {"use_conv_bias": False}, "it has no blocks.*.block.mixer.conv_bias (2 of them)"),
        ("Mamba", {"hidden_act": "gelu"}, 'hidden_act is "gelu", this package has only "silu"'),
        ("Mamba", {"layer_norm_epsilon": 1e-3}, "layer_norm_epsilon is 0.001, here norm_eps is 1e-05"),
        ("Mamba", {"expand": 1}, "intermediate_size is 32, here inner is 64: set model.expand=1"),
        ("Mamba", {"intermediate_size": 48}, "no whole number of times 32 is that"),
        ("Mamba", {"state_size": 8}, "state_size is 8, here state is 16: set model.state=8"),
        ("Mamba", {"conv_kernel": 3}, "conv_kernel is 3, here conv is 4: set model.conv=3"),
        ("Mamba", {"time_step_rank": 4}, "time_step_rank is 4, here rank is 2: set model.dt_rank=4"),
        ("Mamba", {"vocab_size": 192}, "shape (192, 32) there, this model's is (128, 32)"),
        ("Mamba", {"something_new": 3}, "something_new is 3, a key that is not known here"),
        ("FalconMamba", {}, "it normalises dt, B and C: set model.normalise=true"),
        ("Mamba2", {"num_heads": 8, "head_dim": 8, "n_groups": 1, "time_step_rank": None}, "model_type 'mamba2'"),
    ],
)
def test_another_published_model_is_refused_by_the_name_of_what_differs(kind, settings, named, tmp_path):
    values = {k: v for k, v in {**SMALL, **settings}.items() if v is not None}
    theirs = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**values))
    theirs.save_pretrained(tmp_path)
    ours = dense()
    before = {name: p.clone() for name, p in ours.named_parameters()}
    with pytest.raises(UserError) as refused:
        load_weights(ours, open_weights(tmp_path), tmp_path)
    assert named in str(refused.value)
    assert all(torch.equal(p, before[name]) for name, p in ours.named_parameters())


def test_every_key_of_transformers_config_has_a_meaning_here():
    falcon = ONE_LAYER.model_copy(update={"normalise": True})
    for kind, ours in ((MambaConfig, ONE_LAYER), (FalconMambaConfig, falcon)):
        whole = kind(**SMALL, expand=2, conv_kernel=4).to_dict()
        assert published_mamba.differences(whole, ours) == []
    checked = set(published_mamba._STATED) | set(published_mamba._NEEDED)
    known = checked | published_mamba._WITHOUT_EFFECT | set(published_mamba._OF_VOCABULARY)
    own = {*MambaConfig().to_dict(), *FalconMambaConfig().to_dict()} - set(transformers.PretrainedConfig().to_dict())
    assert own <= known


MAMBA_SSM = {
    "d_model": 32, "n_layer": 2, "vocab_size": 121, "ssm_cfg": {}, "rms_norm": True, "residual_in_fp32": True,
    "fused_add_norm": True, "pad_vocab_size_multiple": 8,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({}, None),
        ({"ssm_cfg": {"layer": "Mamba1", "d_state": 16, "dt_rank": "auto", "conv_bias": True}}, None),
        ({"rms_norm": False}, "rms_norm is false"),
        ({"ssm_cfg": {"layer": "Mamba2"}}, 'ssm_cfg.layer is "Mamba2"'),
        ({"ssm_cfg": {"d_state": 8}}, "ssm_cfg.d_state is 8"),
        ({"ssm_cfg": {"bias": True}}, "ssm_cfg.bias is true"),
        ({"attn_layer_idx": [1]}, "attn_layer_idx is [1]"),
        ({"d_intermediate": 64}, "d_intermediate is 64"),
        ({"vocab_size": 100}, "has 128 rows, but config.json says vocab_size 100"),
        ({"tie_embeddings": False}, "it has no head.weight"),
    ],
)
def test_mamba_ssms_config_is_read_key_by_key(changed, named, tmp_path):
    torch.manual_seed(0)
    theirs = MambaForCausalLM(MambaConfig(**SMALL, tie_word_embeddings=True))
    tensors = {
        n.replace("backbone.embeddings.", "backbone.embedding."): p.detach()
        for n, p in theirs.named_parameters()
        if n != "lm_head.weight"
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(MAMBA_SSM | changed))
    ours = dense()
    if named is None:
        load_weights(ours, open_weights(tmp_path), tmp_path)
        assert logits_differ(theirs, ours) < 1e-4
        return
    with pytest.raises(UserError) as refused:
        load_weights(ours, open_weights(tmp_path), tmp_path)
    assert named in str(refused.value)


def test_published_rows_are_ids_of_text_and_padding_falls_on_no_other_id(tmp_path):
    """121 ids, padded to 128 rows: a text of 122 ids takes its rows, and <bos> at 122 keeps its own."""
    theirs = MambaForCausalLM(MambaConfig(**SMALL, tie_word_embeddings=True))
    save_file({n: p.detach() for n, p in theirs.named_parameters()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(MAMBA_SSM))
    vocabulary = VocabLayout({"text": 122})
    ours = dense(vocabulary=vocabulary.size)
    fresh = ours.embedding.weight.detach().clone()
    load_weights(ours, open_weights(tmp_path), tmp_path, vocabulary)
    assert torch.equal(ours.embedding.weight[:122], theirs.backbone.embeddings.weight[:122])
    assert torch.equal(ours.embedding.weight[122:], fresh[122:])
    with pytest.raises(UserError, match=r"has 121 ids of text, this vocabulary 100: set vocabulary.text=121"):
        load_weights(dense(), open_weights(tmp_path), tmp_path, VocabLayout({"text": 100}))


def test_every_tensor_of_a_source_without_a_config_has_a_place_and_is_said_to_lack_one(published, tmp_path, caplog):
    _, path = published
    stored = load_file(path / "model.safetensors")
    config = ModelConfig(dim=32, layers=2, decoupled=())
    save_file(stored, tmp_path / "model.safetensors")
    load_weights(dense(config), open_weights(tmp_path), tmp_path)
    assert "does not say its norms' epsilon" in caplog.text
    save_file({**stored, "backbone.layers.1.mixer.b_layernorm.weight": torch.ones(16)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"no Mamba-1 here has backbone.layers.\*.mixer.b_layernorm.weight"):
        load_weights(dense(config), open_weights(tmp_path), tmp_path)
    save_file({**stored, "lm_head.weight": torch.zeros(128, 32, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"'lm_head.weight' is not in floating point"):
        load_weights(dense(config), open_weights(tmp_path), tmp_path)
    save_file({"lm_head.weight": torch.zeros(128, 32)}, tmp_path / "old.safetensors")
    with pytest.raises(UserError, match=r"lm_head.weight is both in model.safetensors and in old.safetensors"):
        load_weights(dense(config), open_weights(tmp_path), tmp_path)
    (tmp_path / "old.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"old.safetensors: not a safetensors file"):
        open_weights(tmp_path)


def test_a_head_that_is_no_longer_the_embedding_it_is_said_to_be_is_refused(published, tmp_path):
    _, path = published
    save_file(load_file(path / "model.safetensors"), tmp_path / "model.safetensors")
    values = json.loads((path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"tie_word_embeddings": True}))
    with pytest.raises(UserError, match="says that the two are one"):
        load_weights(dense(ModelConfig(dim=32, layers=2, decoupled=())), open_weights(tmp_path), tmp_path)


def exported(folder, model, vocabulary, diffusion=None):
    """What `open_weights` looks at in the files that tools/export_model.py writes."""
    folder.mkdir()
    save_file({name: p.detach() for name, p in model.named_parameters()}, folder / "model.safetensors")
    values = {"model": model.config.model_dump(mode="json"), "vocabulary": dict(vocabulary.sizes)}
    values["objective"] = {"diffusion": None if diffusion is None else diffusion.model_dump(mode="json")}
    (folder / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    vocabulary.save(folder / "vocab.json")
    return folder


TWO = VocabLayout({"text": 100, "image": 32})


@pytest.mark.parametrize(
    ("changed", "vocabulary", "named"),
    [
        ({"norm_eps": 1e-3}, TWO, "model.norm_eps is 1e-05 there, here 0.001"),
        ({"layers": 2}, TWO, "model.layers is 1 there, here 2"),
        ({"experts": 2}, TWO, "model.experts is 1 there, here 2"),
        ({"router": "learned"}, TWO, "model.router is rule there, here learned"),
        ({"decoupled": ("in_proj",)}, TWO, "weights for each modality of x_proj, dt_proj, out_proj"),
        ({}, VocabLayout({"text": 100}), "it was trained on image too"),
        ({}, VocabLayout({"text": 90, "image": 32}), "it has 100 ids of text, this vocabulary 90"),
        (
            {},
            VocabLayout({"text": 100, "image": 32, "speech": 20, "video": 9}),
            "its weights are those of text, image: there are none for speech, video",
        ),
    ],
)
def test_a_mixture_that_is_not_the_configs_is_refused_by_name(changed, vocabulary, named, tmp_path):
    mixture = ModelConfig(dim=32, layers=1, decoupled=PROJECTIONS)
    theirs = LanguageModel(mixture, TWO.size, 2)
    initialize(theirs, 0)
    folder = exported(tmp_path / "m", theirs, TWO)
    ours = LanguageModel(ModelConfig(**{**mixture.model_dump(), **changed}), vocabulary.size, len(vocabulary.sizes))
    with pytest.raises(UserError) as refused:
        load_weights(ours, open_weights(folder), folder, vocabulary)
    assert named in str(refused.value)


def test_two_modalities_never_fill_four_even_where_no_config_says_which_they_are(tmp_path):
    mixture = ModelConfig(dim=32, layers=1, decoupled=PROJECTIONS)
    theirs = LanguageModel(mixture, 192, 2)
    save_file({name: p.detach() for name, p in theirs.named_parameters()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"'blocks.\*.block.mixer.in_proj.weight' has shape \(256, 32\) there"):
        load_weights(LanguageModel(mixture, 192, 4), open_weights(tmp_path), tmp_path)


def test_latents_of_another_schedule_are_refused(tmp_path):
    there, here = DiffusionConfig(patch_width=4), DiffusionConfig(patch_width=4, prediction="v", steps=500)
    theirs = LanguageModel(ONE_LAYER, TWO.size, 2, diffusion=there)
    folder = exported(tmp_path / "m", theirs, TWO, there)
    with pytest.raises(UserError) as refused:
        load_weights(LanguageModel(ONE_LAYER, TWO.size, 2, diffusion=here), open_weights(folder), folder, TWO)
    assert "objective.diffusion.steps is 1000 there, here 500" in str(refused.value)
    assert "objective.diffusion.prediction is epsilon there, here v" in str(refused.value)
    with pytest.raises(UserError, match=r"this model has no place for .*patch_embedding\.patch_in\.weight"):
        load_weights(LanguageModel(ONE_LAYER, TWO.size, 2), open_weights(folder), folder, TWO)


def test_ids_and_modalities_are_matched_by_their_meaning(tmp_path):
    """The same documents give the same logits in a model whose vocabulary is wider and in another order."""
    old = VocabLayout({"text": 100, "image": 32, "speech": 20})
    new = VocabLayout({"text": 130, "speech": 25, "image": 40})
    mixture = ModelConfig(dim=32, layers=1, decoupled=PROJECTIONS)
    theirs, ours = LanguageModel(mixture, old.size, 3).eval(), LanguageModel(mixture, new.size, 3).eval()
    initialize(theirs, 0)
    initialize(ours, 1)
    folder = exported(tmp_path / "m", theirs, old)
    load_weights(ours, open_weights(folder), folder, new)

    document = [TokenSegment(0, np.arange(9, 30)), TokenSegment(1, np.arange(9)), TokenSegment(2, np.arange(20))]

    def run(model, layout):
        ids, routes, _ = assemble_document(document, old.modalities, layout)
        rows = RowLayout.sort(torch.from_numpy(routes)[None], torch.zeros(1, len(ids), dtype=torch.int32), 3)
        with torch.no_grad():
            logits = model(torch.from_numpy(ids)[rows.rows], rows)[0][rows.order.long()]
        kept = [*range(100), *layout.specials.values()]
        kept += [*layout.ids("image", np.arange(32)), *layout.ids("speech", np.arange(20))]
        return logits[:, kept]

    torch.testing.assert_close(run(ours, new), run(theirs, old), atol=1e-5, rtol=1e-5)


def test_the_ids_of_a_mixture_that_went_through_transformers_are_those_of_its_shapes(tmp_path):
    """Both vocabularies have 192 ids with their padding, so the tensors alone show no difference."""
    sizes, shapes = {"text": 100, "image": 32}, Shapes(16, 4)
    old, new = VocabLayout(sizes, shapes=shapes), VocabLayout({"text": 101, "image": 32}, shapes=shapes)
    mixture = ModelConfig(dim=32, layers=1, decoupled=PROJECTIONS)
    theirs, ours = LanguageModel(mixture, old.size, 2), LanguageModel(mixture, new.size, 2)
    initialize(theirs, 0)
    initialize(ours, 1)
    save_file({f"model.{name}": p.detach() for name, p in theirs.named_parameters()}, tmp_path / "model.safetensors")
    config = MixtureOfMambaConfig(
        model=mixture.model_dump(mode="json"), vocabulary=list(map(list, old.sizes)), picture_shapes=shapes.as_json()
    )
    (tmp_path / "config.json").write_text(config.to_json_string(use_diff=False))
    load_weights(ours, open_weights(tmp_path), tmp_path, new)
    codes = np.arange(32)
    assert torch.equal(ours.embedding.weight[new.ids("image", codes)], theirs.embedding.weight[old.ids("image", codes)])
    for name, id_ in old.specials.items():
        assert torch.equal(ours.embedding.weight[new.specials[name]], theirs.embedding.weight[id_]), name


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

    from mom_data.batches.loader import Share, batches
    from mom_train.distributed.ranks import process_group
    from mom_train.distributed.status import Stop
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

    export(tmp_path / "run", tmp_path / "out", None, "safetensors", ema=False)
    mixture = {"run_dir": str(tmp_path / "up"), "model": {**dense, "decoupled": list(PROJECTIONS)}}
    for source, ranks in (("run", 2), ("out", 1)):
        config = tiny_config(tmp_path, init_from=str(tmp_path / source), **mixture)
        got = run_ranks(ranks, first_losses, config)[0]
        assert got == pytest.approx(expected, rel=1e-5)

    export(tmp_path / "run", tmp_path / "hf", None, "transformers", ema=False)
    theirs = MambaForCausalLM.from_pretrained(tmp_path / "hf").eval()
    for config in (theirs.config, theirs.generation_config):
        for name in ("bos", "eos", "pad"):
            assert getattr(config, f"{name}_token_id") == VOCAB.specials[name]
    with torch.no_grad():  # a model that says <eos> whatever it is asked
        head = theirs.lm_head.weight.clone()
        theirs.lm_head.weight.zero_()
        theirs.lm_head.weight[VOCAB.specials["eos"]] = theirs.backbone(torch.tensor([[5]]))[0][0, 0]
        assert theirs.generate(torch.tensor([[5]]), max_new_tokens=9, do_sample=False).shape == (1, 2)
        theirs.lm_head.weight.copy_(head)
    ours = LanguageModel(ModelConfig(**dense), VOCAB.size, 1).eval()
    load_weights(ours, open_weights(tmp_path / "run"), tmp_path)
    tokens = torch.arange(30)[None] % VOCAB.size
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens[0], text_layout(30))[0], theirs(tokens).logits[0], atol=1e-4, rtol=1e-4)


def test_the_mixture_loads_through_transformers_with_its_logits(tmp_path):
    from transformers import AutoModelForCausalLM

    config = write_config(tmp_path, training__steps=3)
    assert mom_train(config)[0] == 0
    export(tmp_path / "run", tmp_path / "hf", None, "transformers", ema=False)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True).eval()
    ours = LanguageModel(tiny_config(tmp_path).model, VOCAB.size, 3).eval()
    load_weights(ours, open_weights(tmp_path / "run"), tmp_path)
    again = LanguageModel(tiny_config(tmp_path).model, VOCAB.size, 3)
    load_weights(again, open_weights(tmp_path / "hf"), tmp_path, VOCAB)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), ours.parameters(), strict=True))
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


@pytest.mark.parametrize("rows", [8, 4, 2, 1])
def test_a_batch_in_pieces_has_one_gradient_as_transformers_trainer_accumulates_it(rows):
    """Its Trainer gives every piece the number of targets of all of them, and adds the gradients up."""
    from mom_train.exchange.transformers_model import MixtureOfMambaConfig, MixtureOfMambaForCausalLM

    model = {"dim": 32, "layers": 1, "decoupled": list(PROJECTIONS)}
    theirs = MixtureOfMambaForCausalLM(MixtureOfMambaConfig(model, [list(size) for size in VOCAB.sizes]))
    initialize(theirs.model, 0)
    ids = torch.randint(0, VOCAB.used, (8, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :7] = labels[5, 2:] = -100  # unlike numbers of targets
    targets = int((labels[:, 1:] != -100).sum())
    expected = torch.nn.functional.cross_entropy(theirs(ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    whole = torch.autograd.grad(expected, list(theirs.parameters()))
    losses = [
        theirs(ids[i : i + rows], labels=labels[i : i + rows], num_items_in_batch=torch.tensor(targets)).loss
        for i in range(0, 8, rows)
    ]
    assert sum(losses).item() == pytest.approx(expected.item(), rel=1e-5)
    for got, gradient in zip(torch.autograd.grad(sum(losses), list(theirs.parameters())), whole, strict=True):
        torch.testing.assert_close(got, gradient, atol=1e-6, rtol=1e-4)
    with pytest.raises(ValueError, match="has no use for inputs_embeds"):
        theirs(ids, inputs_embeds=torch.zeros(8, 12, 32))
