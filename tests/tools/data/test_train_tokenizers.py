import io
import json

import numpy as np
import pytest
import soundfile
import webdataset
import yaml
from PIL import Image
from sklearn.metrics import mean_squared_error

from mom_data.documents.document import Document, read_documents
from mom_tokenizers.bundle import Tokenizers
from mom_tools.data import train_tokenizers
from tests.helpers import CHECKOUT
from tests.helpers.ranks import program

TOOL = CHECKOUT / "tools" / "train_tokenizers.py"
CONFIG = {
    "text": {"size": 300},
    "image": {"size": 64, "resolution": 8, "patch": 2, "channels": 16, "batch_size": 8, "max_images": 40, "steps": 120},
    "speech": {"size": 8, "max_seconds": 6},
}  # fmt: skip


VQ = {
    "size": 64, "resolution": 8, "block_out_channels": [8, 16], "latent_channels": 4, "batch_size": 8,
    "max_images": 40, "autoencoder_steps": 120, "quantized_steps": 120, "learning_rate": 0.005,
}  # fmt: skip
"""The image tokenizer of kind vq, by a recipe of the time when no kind had to be named."""


def picture(rng):
    """A gradient between two greys, which a small autoencoder can learn."""
    start, end = rng.integers(0, 256, (2, 1)).repeat(3, axis=1)
    ramp = np.linspace(0, 1, 8)[None, :, None]
    pixels = np.broadcast_to(start * (1 - ramp) + end * ramp, (8, 8, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def recording(rng):
    file = io.BytesIO()
    tone = np.sin(np.arange(16_000) * rng.uniform(0.05, 1)) * 0.3 + rng.normal(0, 0.02, 16_000)
    soundfile.write(file, tone, 16_000, format="FLAC")
    return file.getvalue()


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    path = tmp_path_factory.mktemp("raw")
    rng = np.random.default_rng(0)
    for shard in range(2):
        with webdataset.TarWriter(str(path / f"train-{shard}.tar")) as tar:
            tar.write({"__key__": "broken", "png": b"no picture %d" % shard, "txt": "broken"})
            for i in range(30):
                tar.write({"__key__": f"p{i}", "png": picture(rng), "txt": f"a picture of number {i}"})
            for i in range(5):
                tar.write({"__key__": f"s{i}", "flac": recording(rng), "txt": f"recording {i}"})
    return path


def documents(file):
    return [d for d in read_documents(file) if isinstance(d, Document)]


def train(raw, output, config=CONFIG, seed=0):
    module = train_tokenizers
    module.train_tokenizers(module.Config.model_validate(config), sorted(raw.glob("*.tar")), output, seed)
    return Tokenizers.load(output / "tokenizers.yaml").describe()


def command_line(raw, output, config, inputs):
    file = output.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config))
    return program(TOOL, "--config", file, "--input", raw / inputs, "--output", output)


@pytest.fixture(scope="module")
def trained(raw, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained") / "tokenizers"
    done = command_line(raw, output, CONFIG, "train-*.tar")
    assert done.returncode == 0, done.stderr
    return output


def test_the_result_encodes_every_modality(trained, raw):
    tokenizers = Tokenizers.load(trained / "tokenizers.yaml")
    assert list(tokenizers.describe()) == ["text", "image", "speech"]
    assert tokenizers.describe()["image"]["size"] == 64
    rng = np.random.default_rng(9)
    assert tokenizers.encode("image", picture(rng)).shape == (16,)
    assert tokenizers.encode("speech", recording(rng)).shape == (25,)
    assert tokenizers.tokenizer("text").decode(tokenizers.encode("text", "ünseen")) == "ünseen"


def test_pictures_come_back_better_than_their_mean_colour(trained):
    figures = json.loads((trained / "training.json").read_text())["image"]
    assert figures["psnr"] > figures["psnr_of_mean_colour"]
    assert figures["psnr_without_network"] < figures["psnr"] < figures["psnr_without_quantization"]
    assert figures["losses"][-1]["mse"] < figures["losses"][0]["mse"]
    assert 0 < figures["usage"] <= 1
    assert figures["usage_in_training"] > 0.9
    assert figures["stable"] == 1
    # PSNR measured again from the outside, on a picture never seen
    image = Tokenizers.load(trained / "tokenizers.yaml").tokenizer("image")
    rng = np.random.default_rng(5)
    errors, spread = [], []
    for _ in range(20):
        original = Image.open(io.BytesIO(picture(rng)))
        pixels = np.asarray(original, np.float64)
        errors.append(np.mean((np.asarray(image.decode(image.encode(original)), np.float64) - pixels) ** 2))
        spread.append(pixels.var())
    assert np.mean(errors) < np.mean(spread)


@pytest.fixture(scope="module")
def trained_kl(raw, tmp_path_factory):
    """A VAE in place of the codes, and a text tokenizer."""
    output = tmp_path_factory.mktemp("trained_kl") / "tokenizers"
    image = {k: v for k, v in VQ.items() if k not in ("size", "autoencoder_steps", "quantized_steps")}
    train(raw, output, {"text": CONFIG["text"], "image": {**image, "kind": "kl", "steps": 240}})
    return output


def test_a_small_vae_gives_latents_that_its_own_scale_normalises(trained_kl, raw):
    figures = json.loads((trained_kl / "training.json").read_text())["image"]
    assert figures["psnr"] > figures["psnr_of_mean_colour"]
    assert (figures["patches_per_image"], figures["patch_width"]) == (4, 16)
    tokenizers = Tokenizers.load(trained_kl / "tokenizers.yaml")
    described = tokenizers.describe()["image"]
    assert (described["kind"], described["size"], described["patch_width"]) == ("kl", 1, 16)
    # over pictures of the corpus, encoded anew: zero mean, unit variance
    pictures = [
        s.data for f in sorted(raw.glob("*.tar")) for d in documents(f) for s in d.segments if s.modality == "image"
    ]
    latents = [p.astype(np.float64) for p in tokenizers.encode_many("image", pictures) if not isinstance(p, ValueError)]
    scaled = (np.concatenate(latents) - described["latent_shift"]) * described["latent_scale"]
    assert abs(scaled.mean()) < 0.15
    assert abs(scaled.std() - 1) < 0.15
    assert (trained_kl / "reconstructions.png").is_file()


def test_a_pretrained_autoencoder_is_taken_as_it_is_and_its_round_trip_measured(trained_kl, raw, tmp_path):
    module, folder = train_tokenizers, trained_kl / "image"
    image = {"kind": "kl", "folder": str(folder), "resolution": 8, "tokens": 4}
    config = {"text": CONFIG["text"], "image": image}
    described = train(raw, tmp_path / "t", config)["image"]
    theirs = Tokenizers.load(trained_kl / "tokenizers.yaml").describe()["image"]
    assert {k: v for k, v in described.items() if k != "fingerprint"} == {
        k: v for k, v in theirs.items() if k != "fingerprint"
    }
    figures = json.loads((tmp_path / "t/training.json").read_text())["image"]
    assert (figures["patches_per_image"], figures["held_out"], figures["images"]) == (4, 60, 0)
    assert figures["deviation"] == pytest.approx(1, abs=0.15)
    assert (tmp_path / "t/reconstructions.png").is_file()
    # the PSNR from the outside, by scikit-learn's mean squared error
    tokenizer = Tokenizers.load(tmp_path / "t/tokenizers.yaml").tokenizer("image")
    files = [s.data for f in sorted(raw.glob("*.tar")) for d in documents(f) for s in d.segments]
    originals = [Image.open(io.BytesIO(data)) for data in files if data[1:4] == b"PNG"]
    scores = []
    for original in originals:
        back = np.asarray(tokenizer.decode(tokenizer.encode(original)), np.float64)
        scores.append(10 * np.log10(255**2 / mean_squared_error(np.asarray(original).ravel(), back.ravel())))
    assert figures["psnr"] == pytest.approx(np.mean(scores), abs=0.02)
    assert figures["psnr"] > figures["psnr_of_mean_colour"]
    assert module.warnings_of(module.Config.model_validate(config), {"image": figures}) == []
    worse = {**figures, "psnr": 3.0, "deviation": 5.0}
    said = module.warnings_of(module.Config.model_validate(config), {"image": worse})
    assert ["3.0 dB" in said[0], "deviation of 5.0" in said[1], len(said)] == [True, True, 2]
    for wrong, message in (
        ({"tokens": None}, "either patch or tokens"),
        ({"folder": str(raw)}, "no config.json there"),
    ):
        with pytest.raises(ValueError, match=message):
            train(raw, tmp_path / "wrong", {**config, "image": {**image, **wrong}})


def test_a_recipe_of_kind_vq_with_and_without_its_name_trains_the_same_vqmodel(raw, tmp_path):
    short = {**VQ, "autoencoder_steps": 20, "quantized_steps": 40}
    unnamed = train(raw, tmp_path / "a", {"text": CONFIG["text"], "image": short})["image"]
    assert unnamed["kind"] == "vq"
    assert train(raw, tmp_path / "b", {"text": CONFIG["text"], "image": {**short, "kind": "vq"}})["image"] == unnamed
    figures = json.loads((tmp_path / "a/training.json").read_text())["image"]
    assert 0 <= figures["stable"] <= 1


def test_more_codes_than_different_squares_are_refused_with_both_numbers(tmp_path):
    from mom_tokenizers.errors import UserError
    from mom_tokenizers.image.patch_training import PatchConfig
    from mom_tokenizers.image.training import train_image

    pictures = [np.full((3, 8, 8), grey, np.uint8) for grey in range(25)]
    with pytest.raises(UserError, match="9 different squares are too few for 64 codes"):
        train_image(PatchConfig(size=64, resolution=8), pictures, tmp_path, 0)


def test_caps_hold_and_unreadable_items_are_counted(trained):
    figures = json.loads((trained / "training.json").read_text())
    assert figures["image"]["images"] + figures["image"]["held_out"] == 40
    assert figures["speech"]["seconds_of_speech"] == 6
    assert figures["text"]["unreadable"] == 2


def test_reconstructions_show_two_rows_large_enough_to_see(trained):
    sheet = Image.open(trained / "reconstructions.png")
    assert sheet.height >= 2 * 96
    assert sheet.width >= 8 * 96


def test_a_second_call_repeats_only_what_changed(trained, raw):
    before = {p: p.stat().st_mtime_ns for p in trained.glob("*/*")}
    prints = Tokenizers.load(trained / "tokenizers.yaml").describe()
    changed = {**CONFIG, "speech": {"size": 6, "max_seconds": 6}}
    train(raw, trained, changed)
    after = {p: p.stat().st_mtime_ns for p in trained.glob("*/*")}
    assert {p.parent.name for p in after if after[p] != before[p]} == {"speech"}
    assert train(raw, trained) == prints, "the same seed must give the same units"


def test_training_is_deterministic_for_a_seed(raw, tmp_path):
    short = {**CONFIG, "image": {**CONFIG["image"], "steps": 20}}
    first = train(raw, tmp_path / "a", short)
    assert train(raw, tmp_path / "b", short) == first
    assert train(raw, tmp_path / "c", short, seed=1)["image"] != first["image"]


def test_a_vocoder_is_added_to_units_that_stay_the_same_and_is_not_trained_again(raw, tmp_path):
    config = train_tokenizers.Config.model_validate({"text": {"size": 300}, "speech": CONFIG["speech"]})
    files = sorted(raw.glob("*.tar"))

    def run(**options):
        found = train_tokenizers.train_tokenizers(config, files, tmp_path / "out", 0, **options)
        loaded = Tokenizers.load(tmp_path / "out/tokenizers.yaml")
        return found["speech"], loaded.describe()["speech"], loaded.tokenizer("speech").decode([1, 2, 3])

    figures, described, (griffin_lim, _) = run()
    assert "vocoder_steps" not in figures
    figures, same, (spoken, rate) = run(vocoder=2)
    assert figures["vocoder_steps"] == 2
    assert same == described
    assert (rate, len(spoken)) == (16_000, 3 * 640)
    assert np.abs(spoken - griffin_lim).max() > 1e-3
    weights = tmp_path / "out/speech/vocoder/model.safetensors"
    before = weights.stat().st_mtime_ns
    again, _, (heard, _) = run(vocoder=2)
    assert again == figures
    assert weights.stat().st_mtime_ns == before
    np.testing.assert_array_equal(heard, spoken)
    run(vocoder=3)
    assert weights.stat().st_mtime_ns > before


@pytest.mark.parametrize(
    ("changed", "steps", "message"),
    [
        ({}, 0, "at least 1"),
        ({"speech": None}, 5, "no speech"),
        ({"speech": {"size": 32, "extractor": "mimi", "model": "m"}}, 5, "'mimi' decodes its own codes"),
        ({"speech": {"size": 32, "vocoder": "v"}}, 5, "names a vocoder already, v"),
    ],
)
def test_a_vocoder_that_cannot_be_trained_is_refused_before_anything_is_read(tmp_path, changed, steps, message):
    config = train_tokenizers.Config.model_validate({**CONFIG, **changed})
    with pytest.raises(ValueError, match=message):
        train_tokenizers.train_tokenizers(config, [tmp_path / "none.tar"], tmp_path / "out", 0, vocoder=steps)


@pytest.mark.parametrize(
    ("config", "inputs", "message"),
    [
        ({**CONFIG, "video": {}}, "train-*.tar", "video: Extra inputs"),
        (
            {**CONFIG, "image": {**CONFIG["image"], "kind": "gan"}},
            "train-*.tar",
            "of kind patches or vq (codes), or of kind kl (latents)",
        ),
        ({"text": {"size": 300, "sise": 1}}, "train-*.tar", "text.sise"),
        (CONFIG, "nothing-*.tar", "no input matches"),
        (CONFIG, "text.jsonl", "the inputs hold no image"),
    ],
)
def test_mistakes_end_with_one_message_and_code_2(raw, tmp_path, config, inputs, message):
    (raw / "text.jsonl").write_text('{"text": "only words"}\n')
    done = command_line(raw, tmp_path / "out", config, inputs)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_tokenizer_that_came_out_worse_than_asked_is_said_loudly_with_what_to_change():
    module = train_tokenizers
    config = module.Config.model_validate(CONFIG)
    text = {"size": 300, "texts": 9, "characters": 500}
    image = {"psnr": 17.0, "psnr_of_mean_colour": 16.85, "images": 40}
    speech = {"size": 8, "usage": 0.9}
    assert module.warnings_of(config, {"text": text, "image": image, "speech": speech}) == []
    assert module.warnings_of(config, {"text": text}) == []
    [said] = module.warnings_of(config, {"text": text, "image": {**image, "psnr": 15.97}})
    assert "15.97 dB" in said
    assert "mean colour (16.85 dB)" in said
    assert "steps is 120" in said
    good = {**image, "psnr": 20.0, "psnr_without_network": 19.5, "usage_in_training": 0.9}
    assert module.warnings_of(config, {"text": text, "image": good}) == []
    [said] = module.warnings_of(config, {"text": text, "image": {**good, "psnr": 19.2}})
    assert "network (19.2 dB) than by the codebook alone (19.5 dB)" in said
    unused = {**good, "usage_in_training": 0.25, "perplexity_in_training": 9.0, "size": 64}
    [said] = module.warnings_of(config, {"text": text, "image": unused})
    assert "only 25% of the 64 codes" in said
    [said] = module.warnings_of(config, {"text": {**text, "size": 271}})
    assert "271 ids, fewer than the 300 asked for" in said
    assert "text.max_documents is 20000" in said
    [said] = module.warnings_of(config, {"text": text, "speech": {**speech, "usage": 0.25}})
    assert "only 25% of the 8 units" in said


def test_what_a_user_added_to_tokenizers_yaml_stays_when_tokenizers_are_trained_again(tmp_path):
    """The file was made with text alone; shapes of pictures and ready-made ids of music were added by hand."""
    config = train_tokenizers.Config.model_validate({"text": {"size": 300}, "image": {"size": 9, "resolution": 8}})
    file = tmp_path / "tokenizers.yaml"
    made = {"text": {"kind": "bpe", "path": "text"}, "image": {"kind": "patches", "path": "image"}}
    assert train_tokenizers.declarations(config, file) == made
    shaped = {**made["image"], "shapes": {"tokens": 4}}
    music = {"kind": "ids", "size": 9, "made_by": "a codec"}
    file.write_text(yaml.safe_dump({**made, "image": shaped, "speech": {"kind": "units", "path": "s"}, "music": music}))
    assert train_tokenizers.declarations(config, file) == {**made, "image": shaped, "music": music}
    file.write_text(yaml.safe_dump({**made, "image": {**shaped, "kind": "vq"}}))
    assert train_tokenizers.declarations(config, file) == made
