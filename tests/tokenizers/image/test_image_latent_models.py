"""Every class of autoencoders on a small random instance of itself: what a model reads is what diffusers' own pipeline
of that class would give it."""

import json
import shutil
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mom_tokenizers.bundle import Tokenizers
from mom_tokenizers.errors import UserError
from mom_tokenizers.image.autoencoder import preprocess
from mom_tokenizers.image.kl import KLImageTokenizer, patch_of_tokens, unpatchify, within_float16
from mom_tokenizers.image.latent_models import CLASSES, of_model

if not hasattr(diffusers, "AutoencoderRAE"):
    pytest.skip(f"diffusers {diffusers.__version__} lacks classes that are tested here", allow_module_level=True)
from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline

DOWN, UP = ("DownEncoderBlock2D",) * 3, ("UpDecoderBlock2D",) * 3
LEVELS = {"block_out_channels": (8, 16, 16), "down_block_types": DOWN, "up_block_types": UP, "norm_num_groups": 4}
BLOCKS = ("ResBlock", "ResBlock", "EfficientViTBlock")
RAE = {
    "encoder_hidden_size": 64, "encoder_num_hidden_layers": 1, "decoder_hidden_size": 32, "patch_size": 16,
    "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 64,
}  # fmt: skip
STATISTICS = {"latents_mean": [0.2, -0.1, 0.05, 0.0], "latents_std": [0.5, 2.0, 0.1, 1.0]}
FRAMES = 3  # of Cosmos, whose means and deviations are those of all frames of a channel

MODELS: dict[str, tuple[str, int, dict[str, Any]]] = {  # name: class, resolution, settings
    "SD3": ("AutoencoderKL", 32, LEVELS | {
        "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.0609,
        "scaling_factor": 1.5305,
    }),
    "FLUX.2": ("AutoencoderKLFlux2", 32, LEVELS | {"latent_channels": 4}),
    "DC-AE": ("AutoencoderDC", 32, {
        "latent_channels": 4, "attention_head_dim": 8, "encoder_block_types": BLOCKS, "decoder_block_types": BLOCKS,
        "encoder_block_out_channels": (8, 16, 16), "decoder_block_out_channels": (8, 16, 16),
        "encoder_layers_per_block": (1, 1, 1), "decoder_layers_per_block": (1, 1, 1),
        "encoder_qkv_multiscales": ((), (), (5,)), "decoder_qkv_multiscales": ((), (), (5,)),
        "scaling_factor": 0.41407,
    }),
    "RAE-DINOv2": ("AutoencoderRAE", 32, RAE | {
        "encoder_type": "dinov2", "encoder_patch_size": 14, "encoder_input_size": 28,
        "latents_mean": np.linspace(-1, 1, 64 * 4).reshape(64, 2, 2).tolist(),
        "latents_std": np.linspace(0.5, 2, 64 * 4).reshape(64, 2, 2).tolist(),
    }),
    "RAE-MAE": ("AutoencoderRAE", 32, RAE | {
        "encoder_type": "mae", "encoder_patch_size": 16, "encoder_input_size": 32, "noise_tau": 0.8,
        "scaling_factor": 0.5,
    }),
    "Qwen-Image": ("AutoencoderKLQwenImage", 32, STATISTICS | {
        "base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 2], "num_res_blocks": 1, "temperal_downsample": [False, True],
    }),
    "HunyuanImage": ("AutoencoderKLHunyuanImage", 32, {
        "in_channels": 3, "out_channels": 3, "latent_channels": 8, "block_out_channels": (32, 32, 64),
        "layers_per_block": 1, "spatial_compression_ratio": 4, "sample_size": 32, "scaling_factor": 0.75289,
    }),
    "Cosmos": ("AutoencoderKLCosmos", 32, {
        "latent_channels": 4, "encoder_block_out_channels": (8, 16, 16, 16), "attention_resolutions": (8,),
        "decode_block_out_channels": (8, 16, 16, 16), "resolution": 32, "num_layers": 1,
        "latents_mean": np.repeat(STATISTICS["latents_mean"], FRAMES).tolist(),
        "latents_std": (np.repeat(STATISTICS["latents_std"], FRAMES) * np.tile([1.0, 3.0, 5.0], 4)).tolist(),
    }),
}  # fmt: skip
VIDEO = ("AutoencoderKLQwenImage", "AutoencoderKLCosmos")


@pytest.fixture(scope="module", params=MODELS)
def made(request, tmp_path_factory):
    """(name, model, tokenizer, folder of the saved tokenizer) of one class."""
    name, resolution, settings = MODELS[request.param]
    torch.manual_seed(0)
    model = getattr(diffusers, name)(**settings).eval()
    if name == "AutoencoderKLFlux2":
        model.bn.running_mean.normal_()
        model.bn.running_var.uniform_(0.2, 3)
    patch = 1 if name == "AutoencoderRAE" else 2
    tokenizer = KLImageTokenizer(model, resolution, patch)
    folder = tmp_path_factory.mktemp("tokenizer") / "image"
    tokenizer.save(folder)
    return name, model, tokenizer, folder


def picture(seed=0, width=40, height=30):
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


@torch.inference_mode()
def read_by_the_model(name, model, pixels):
    """The latents (B, C, H, W) that a diffusion model is given, as diffusers' own pipelines compute them."""
    config = model.config
    if name == "AutoencoderRAE":
        return model.encode((pixels + 1) / 2).latent
    if name == "AutoencoderDC":  # pipelines/sana
        return model.encode(pixels).latent * config.scaling_factor
    if name == "AutoencoderKLFlux2":  # pipelines/flux2, _encode_vae_image
        latents = Flux2Pipeline._patchify_latents(model.encode(pixels).latent_dist.mode())
        mean = model.bn.running_mean.view(1, -1, 1, 1)
        latents = (latents - mean) / torch.sqrt(model.bn.running_var.view(1, -1, 1, 1) + config.batch_norm_eps)
        return Flux2Pipeline._unpatchify_latents(latents)
    if name in VIDEO:  # pipelines/qwenimage and cosmos, with the deviation of the data 1
        latents = model.encode(pixels[:, :, None]).latent_dist.mode()
        channels = latents.shape[1]
        mean = torch.tensor(config.latents_mean).view(1, channels, -1, 1, 1)[:, :, : latents.size(2)]
        std = torch.tensor(config.latents_std).view(1, channels, -1, 1, 1)[:, :, : latents.size(2)]
        return ((latents - mean) / std)[:, :, 0]
    latents = model.encode(pixels).latent_dist.mode()
    return (latents - (config.get("shift_factor") or 0.0)) * config.scaling_factor  # pipelines/stable_diffusion_3


def test_a_model_reads_the_latents_of_the_classes_own_pipeline(made):
    name, model, tokenizer, _ = made
    pictures = [picture(seed) for seed in range(3)]
    patches = np.stack(tokenizer.encode_batch(pictures)).astype(np.float32)
    assert patches.shape == (3, tokenizer.patches_per_image, tokenizer.patch_width)
    latents = unpatchify(patches, tokenizer.patch, *tokenizer.grid)
    pixels = torch.from_numpy(np.stack([preprocess(p, tokenizer.resolution) for p in pictures]))
    expected = read_by_the_model(name, model, pixels).numpy()
    found = (latents - tokenizer.latent_shift) * tokenizer.latent_scale
    assert expected.std() > 1e-3
    # float16 rounds what is stored, before the shift is subtracted
    tolerance = 2.0**-10 * np.abs(latents).max() * tokenizer.latent_scale + 1e-5
    np.testing.assert_allclose(found, expected, rtol=2**-10, atol=tolerance)
    alone = np.stack([tokenizer.encode(p) for p in pictures]).astype(np.float32)
    np.testing.assert_allclose(patches, alone, rtol=2**-9, atol=1e-4)


def test_decode_is_the_classes_own_decode_of_its_own_encode(made):
    name, model, tokenizer, _ = made
    decoded = np.asarray(tokenizer.decode(tokenizer.encode(picture())), np.float32)
    pixels = torch.from_numpy(preprocess(picture(), tokenizer.resolution))[None]
    with torch.inference_mode():
        if name == "AutoencoderRAE":
            own = model.decode(model.encode((pixels + 1) / 2).latent).sample * 2 - 1
        elif name == "AutoencoderDC":
            own = model.decode(model.encode(pixels).latent).sample
        elif name in VIDEO:
            own = model.decode(model.encode(pixels[:, :, None]).latent_dist.mode()).sample[:, :, 0]
        else:
            own = model.decode(model.encode(pixels).latent_dist.mode()).sample
    expected = ((own[0].clamp(-1, 1) + 1) * 127.5).numpy().transpose(1, 2, 0)
    assert decoded.shape == (tokenizer.resolution, tokenizer.resolution, 3)
    assert expected.std() > 0.3, "the random decoder must give something to compare"
    assert np.abs(decoded - expected).max() <= 2


def test_save_load_fingerprint_and_manifest(made, tmp_path):
    name, _, tokenizer, folder = made
    loaded = KLImageTokenizer.load(folder)
    loaded.save(tmp_path / "again")
    assert tokenizer.fingerprint() == loaded.fingerprint() == KLImageTokenizer.load(tmp_path / "again").fingerprint()
    assert np.array_equal(loaded.encode(picture()), tokenizer.encode(picture()))
    (tmp_path / "tokenizers.yaml").write_text(f"text: {{kind: bpe, path: .}}\nimage: {{kind: kl, path: {folder}}}\n")
    bundle = Tokenizers.load(tmp_path / "tokenizers.yaml")
    [entry] = Tokenizers((bundle.entries[1],)).describe().values()
    assert json.loads(json.dumps(entry)) == entry
    assert entry["patch_width"] == tokenizer.patch_width == of_model(tokenizer._model).channels * tokenizer.patch**2
    assert (entry["latent_scale"], entry["latent_shift"]) == (tokenizer.latent_scale, tokenizer.latent_shift)
    assert entry.get("model_class", "AutoencoderKL") == name
    config = tokenizer._model.config
    if name == "AutoencoderKLFlux2":
        np.testing.assert_array_equal(entry["latents_mean"], tokenizer._model.bn.running_mean.numpy())
        variance = np.square(entry["latents_std"]) - config.batch_norm_eps
        np.testing.assert_allclose(variance, tokenizer._model.bn.running_var.numpy(), rtol=1e-5)
    elif name in VIDEO:
        np.testing.assert_allclose(entry["latents_mean"], STATISTICS["latents_mean"], rtol=1e-6)
        np.testing.assert_allclose(entry["latents_std"], STATISTICS["latents_std"], rtol=1e-6)
    else:
        assert "latents_mean" not in entry


def test_weights_that_lack_a_tensor_are_refused(made, tmp_path):
    name, _, _, folder = made
    shutil.copytree(folder, tmp_path / "lacking")
    [file] = (tmp_path / "lacking").glob("*.safetensors")
    tensors = load_file(file)
    lacking = "bn.running_mean" if name == "AutoencoderKLFlux2" else sorted(k for k in tensors if "decoder" in k)[-1]
    del tensors[lacking]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=lacking.replace(".", r"\.")):
        KLImageTokenizer.load(tmp_path / "lacking")


def test_every_class_is_tested():
    assert {name for name, _, _ in MODELS.values()} == {*CLASSES}


def test_log_variances_of_flux_2_are_those_of_what_is_stored(made):
    name, model, tokenizer, _ = made
    if not CLASSES[name].variance:
        with pytest.raises(UserError, match=f"{name} gives no variance"):
            KLImageTokenizer(model, tokenizer.resolution, tokenizer.patch, log_variance=True)
        return
    both = KLImageTokenizer(model, tokenizer.resolution, tokenizer.patch, log_variance=True)
    deviation = np.exp(both.encode(picture())[:, both.patch_width :].astype(np.float32) / 2)[None]
    pixels = torch.from_numpy(preprocess(picture(), 32))[None]
    with torch.inference_mode():
        own = model.encode(pixels[:, :, None] if name in VIDEO else pixels).latent_dist.std
    own = own[:, :, 0] if name in VIDEO else own
    if name == "AutoencoderKLFlux2":
        std = torch.sqrt(model.bn.running_var + model.config.batch_norm_eps).view(1, -1, 1, 1)
        own = Flux2Pipeline._unpatchify_latents(Flux2Pipeline._patchify_latents(own) / std)
    elif name in VIDEO:
        own = own / torch.tensor(model.config.latents_std).view(1, -1, 1, 1)
    np.testing.assert_allclose(unpatchify(deviation, 2, *both.grid), own.numpy(), rtol=3e-3)


def write_sidecar(folder, **settings):
    (folder / "image_tokenizer.json").write_text(json.dumps(settings))


def test_the_patch_follows_from_the_number_of_tokens(made, tmp_path):
    name, _, tokenizer, folder = made
    shutil.copytree(folder, tmp_path / "f")
    write_sidecar(tmp_path / "f", resolution=tokenizer.resolution, tokens=4)
    budgeted = KLImageTokenizer.load(tmp_path / "f")
    assert budgeted.patches_per_image == 4
    assert KLImageTokenizer.stored_latents(tmp_path / "f")["patch_width"] == budgeted.patch_width
    # one token fewer than the next finer grid has
    side = tokenizer.resolution // tokenizer.downsample
    assert patch_of_tokens(side**2, tokenizer.latents, tokenizer.resolution) == (2 if name.endswith("Flux2") else 1)
    assert patch_of_tokens(side**2 // 4, tokenizer.latents, tokenizer.resolution) == 2
    assert patch_of_tokens(3, tokenizer.latents, tokenizer.resolution) == side


def test_what_an_autoencoder_cannot_do_is_refused(tmp_path):
    settings = {name: settings for name, _, settings in MODELS.values()}
    flux = diffusers.AutoencoderKLFlux2(**settings["AutoencoderKLFlux2"])
    with pytest.raises(UserError, match=r"do not divide into patches of 1 \(a multiple of 2\)"):
        KLImageTokenizer(flux, 32, 1)
    rae = diffusers.AutoencoderRAE(**settings["AutoencoderRAE"])
    with pytest.raises(UserError, match="resolution 64, but this AutoencoderRAE makes pictures of 32 x 32"):
        KLImageTokenizer(rae, 64, 1)
    tokenizer = KLImageTokenizer(rae, 32, 1)
    tokenizer.save(tmp_path)
    write_sidecar(tmp_path, resolution=32, tokens=4, patch=1)
    with pytest.raises(UserError, match="either 'patch' or 'tokens'"):
        KLImageTokenizer.load(tmp_path)
    write_sidecar(tmp_path, resolution=32, patch=1)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"_class_name": "AutoencoderOobleck"}))
    with pytest.raises(UserError, match=r"its class is AutoencoderOobleck; .* AutoencoderRAE"):
        KLImageTokenizer.load(tmp_path)


def test_an_rae_whose_encoder_cannot_be_built_says_which_can(tmp_path):
    """The combination of diffusers and Transformers decides whether it can be built; where it can, it is loaded."""
    settings = RAE | {"encoder_type": "siglip2", "encoder_patch_size": 16, "encoder_input_size": 32}
    config = {"_class_name": "AutoencoderRAE", **settings}
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_sidecar(tmp_path, resolution=32, patch=1)
    try:
        diffusers.AutoencoderRAE(**settings).save_pretrained(tmp_path)
    except AttributeError:
        save_file({"x": torch.zeros(1)}, tmp_path / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=r"siglip2 cannot be built here: .* dinov2 or mae"):
            KLImageTokenizer.load(tmp_path)
    else:
        KLImageTokenizer.load(tmp_path)


def test_a_few_values_beyond_float16_are_clipped_and_more_are_refused():
    latents = np.zeros((1, 4, 20, 20), np.float32)
    latents[0, 2, 3, 3] = -7e4
    clipped = within_float16(latents)
    assert clipped[0, 2, 3, 3] == np.finfo(np.float16).min
    assert np.count_nonzero(clipped) == 1
    latents[0, 2, :, :1] = 1e5
    with pytest.raises(UserError, match=r"magnitude 100000.0, .* in 21 of 1,600 values \(channels 2\)"):
        within_float16(latents)
    latents[:] = 0
    latents[0, 1, 0, 0] = np.nan
    with pytest.raises(UserError, match="does not hold"):
        within_float16(latents)
