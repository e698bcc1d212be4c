import json
import shutil
from itertools import groupby
from typing import Any

import joblib
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from sklearn.cluster import KMeans
from transformers import (
    Data2VecAudioConfig,
    Data2VecAudioModel,
    HubertConfig,
    HubertModel,
    MimiConfig,
    MimiModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMModel,
)

from mom_tokenizers.speech.features import HiddenStates, log_mel, mean_bands, windows
from mom_tokenizers.speech.units import SpeechTokenizer, count_units, read_centroids


def sweep(seconds, rate=16_000, seed=0):
    t = np.arange(int(seconds * rate)) / rate
    noise = np.random.default_rng(seed).normal(0, 0.05, len(t))
    return (0.4 * np.sin(2 * np.pi * (200 + 900 * t * (1 + seed)) * t) + noise).astype(np.float32), rate


TOKENIZER = SpeechTokenizer.train([sweep(4, seed=i) for i in range(3)], 20)


SMALL: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32,
         "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}  # fmt: skip
# as the multilingual 25 Hz HuBERT has them, and as the 50 Hz classes have them
AT_25: dict[str, Any] = {"conv_dim": (8,) * 8, "conv_stride": (5, *(2,) * 7), "conv_kernel": (10, 3, 3, 3, 3, 2, 2, 2)}
AT_50: dict[str, Any] = {"conv_dim": (8,) * 7, "conv_stride": (5, *(2,) * 6), "conv_kernel": (10, 3, 3, 3, 3, 2, 2)}


def published(name):
    """(name of the extractor, a published model class with few random weights)."""
    torch.manual_seed(0)
    if name == "hubert":
        return name, HubertModel(HubertConfig(**SMALL, **AT_25))
    if name == "hubert, layer norm":
        return "hubert", HubertModel(HubertConfig(**SMALL, **AT_25, feat_extract_norm="layer"))
    if name == "wav2vec2":
        return name, Wav2Vec2Model(Wav2Vec2Config(**SMALL, **AT_50))
    if name == "wav2vec2, stable":
        return "wav2vec2", Wav2Vec2Model(
            Wav2Vec2Config(**SMALL, **AT_50, feat_extract_norm="layer", do_stable_layer_norm=True)
        )
    if name == "wavlm":
        return name, WavLMModel(WavLMConfig(**SMALL, **AT_50))
    if name == "data2vec-audio":
        return name, Data2VecAudioModel(Data2VecAudioConfig(**SMALL | {"num_conv_pos_embeddings": 3}, **AT_50))
    return "mimi", MimiModel(
        MimiConfig(
            hidden_size=32, num_filters=4, codebook_size=64, codebook_dim=16, vector_quantization_hidden_dimension=16,
            num_quantizers=4, upsample_groups=32, num_hidden_layers=2, intermediate_size=64, num_attention_heads=2,
            num_key_value_heads=2, head_dim=16,
        )
    )  # fmt: skip


HIDDEN_STATES = ("hubert", "hubert, layer norm", "wav2vec2", "wav2vec2, stable", "wavlm", "data2vec-audio")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Name -> (extractor, folder with its model), each written once."""
    made = {}

    def get(name):
        if name not in made:
            path = tmp_path_factory.mktemp("model")
            extractor, model = published(name)
            model.save_pretrained(path)
            made[name] = extractor, path
        return made[name]

    return get


@pytest.fixture(scope="module")
def hubert(folder):
    return folder("hubert")[1]


def tokenizer_of(folder, name, values, size=12, **options):
    """A tokenizer, trained on `values` where its class needs units."""
    extractor, path = folder(name)
    if extractor == "mimi":
        return SpeechTokenizer(None, extractor, model=path, **options)
    units = SpeechTokenizer.train(values, size, extractor=extractor, model=path, layer=2)
    return SpeechTokenizer(units._tensors["centroids"], extractor, model=path, layer=2, **options)


@pytest.mark.parametrize(
    ("samples", "rate", "units"),
    [
        (16_000, 16_000, 25),
        (640, 16_000, 1),
        (320, 16_000, 1),
        (319, 16_000, 0),
        (44_100 * 3, 44_100, 75),
        (8_479, 8_000, 26),
    ],
)
def test_units_are_seconds_times_25_rounded_half_up(samples, rate, units):
    assert count_units(samples, rate) == units


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("seconds", [0.03, 0.5, 1.013, 2.0])
def test_both_extractors_give_exactly_that_many_units(hubert, seconds, rate):
    value = sweep(seconds, rate)
    expected = count_units(len(value[0]), rate)
    assert TOKENIZER.encode(value).shape == (expected,)
    features = SpeechTokenizer(np.zeros((2, 16)), "hubert", model=hubert, layer=1).features(value)
    assert features.shape == (expected, 16)


def test_units_are_those_of_sklearns_predict():
    value = sweep(6, seed=5)
    features = TOKENIZER.features(value)
    kmeans = KMeans(10, n_init=1, random_state=0).fit(features)
    ours = SpeechTokenizer(kmeans.cluster_centers_).encode(value)
    np.testing.assert_array_equal(ours, kmeans.predict(features))
    assert ours.dtype == np.uint32


def test_log_mel_frames_agree_with_transformers_spectrogram():
    from transformers.audio_utils import mel_filter_bank, spectrogram

    samples = sweep(1)[0]
    filters = mel_filter_bank(257, 40, 20.0, 8000.0, 16_000, norm="slaney", mel_scale="slaney")
    # uncentred there, so padded here: (window - hop) / 2 on both sides
    theirs = spectrogram(
        np.pad(samples, 120),
        np.hanning(400),
        400,
        160,
        512,
        power=2.0,
        center=False,
        mel_filters=filters,
        mel_floor=1e-10,
    ).T
    theirs = np.log10(np.maximum(theirs, theirs.max() * 1e-8))
    theirs -= theirs.mean(axis=0)
    ours = log_mel(samples)
    ours -= mean_bands(ours)
    np.testing.assert_allclose(ours, theirs[:100], atol=2e-3)


def test_loudness_does_not_change_units():
    waveform, rate = sweep(2)
    same = TOKENIZER.encode((waveform, rate)) == TOKENIZER.encode((0.25 * waveform, rate))
    assert same.mean() > 0.95


@pytest.mark.parametrize("name", [*HIDDEN_STATES, "mimi"])
def test_batch_equals_one_by_one_for_equal_different_and_long_clips(folder, name):
    values = [sweep(s, seed=i) for i, s in enumerate((0.5, 1.7, 0.9, 1.7, 9))]
    tokenizer = tokenizer_of(folder, name, values[:3], window_seconds=8)
    for one, batched in zip(values, tokenizer.encode_batch(values), strict=True):
        assert batched.dtype == np.uint32
        np.testing.assert_array_equal(tokenizer.encode(one), batched)
        assert len(batched) == count_units(len(one[0]), one[1], tokenizer.units_per_second)


def test_clips_of_equal_length_share_a_forward_pass(folder):
    _, path = folder("wav2vec2")
    model = HiddenStates(path, "wav2vec2", 1, 30, "cpu")
    seen = []
    model.model.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    list(model([sweep(s)[0] for s in (1, 2, 1, 1)]))
    assert seen == [(3, 16_080), (1, 32_080)]


@pytest.mark.parametrize("name", HIDDEN_STATES)
def test_features_are_the_models_hidden_states_by_25_a_second(folder, name):
    extractor, path = folder(name)
    waveform, rate = sweep(1.6)
    ours = SpeechTokenizer(np.zeros((2, 16)), extractor, model=path, layer=1).features((waveform, rate))
    model = published(name)[1].eval()
    with torch.inference_mode():
        # the last frame is complete with receptive field - hop = 80 zeros at either rate
        padded = torch.from_numpy(np.concatenate([waveform, np.zeros(80, np.float32)]))[None]
        theirs = model(padded, output_hidden_states=True).hidden_states[1][0].numpy()
    if len(theirs) == 80:
        theirs = (theirs[0::2] + theirs[1::2]) / 2
    assert len(theirs) == len(ours) == 40
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("rate", [16_000, 24_000])
def test_mimi_gives_its_semantic_codes_12_5_a_second_and_says_so(folder, tmp_path, rate):
    value = sweep(2, rate)
    tokenizer = tokenizer_of(folder, "mimi", [])
    codes = tokenizer.encode(value)
    assert (tokenizer.size, tokenizer.units_per_second, len(codes)) == (64, 12.5, 25)
    if rate == 24_000:
        model = published("mimi")[1].eval()
        with torch.inference_mode():
            theirs = model.encode(torch.from_numpy(value[0])[None, None]).audio_codes  # all four codebooks
        np.testing.assert_array_equal(codes, theirs[0, 0].numpy())
    tokenizer.save(tmp_path)
    assert SpeechTokenizer.stored_rate(tmp_path) == {"units_per_second": 12.5}
    assert SpeechTokenizer.stored_size(tmp_path) == 64
    loaded = SpeechTokenizer.load(tmp_path)
    np.testing.assert_array_equal(loaded.encode(value), codes)
    assert loaded.fingerprint() == tokenizer.fingerprint()
    config = json.loads((tmp_path / "speech_tokenizer.json").read_text())
    (tmp_path / "speech_tokenizer.json").write_text(json.dumps(config | {"size": 2048}))
    with pytest.raises(ValueError, match="size 2048, but the model's is 64"):
        SpeechTokenizer.load(tmp_path)


# ------------------------------------------------------------------------------------------- long recordings


@pytest.mark.parametrize("units", [1, 200, 201, 275, 1_000, 1_001])
def test_windows_are_equally_long_and_keep_every_unit_once_with_context(units):
    cut = windows(0, units, 200, 50)
    np.testing.assert_array_equal(np.concatenate([np.arange(w.first, w.last) for w in cut]), np.arange(units))
    for w in cut:
        assert w.stop - w.start == min(units, 200)
        assert w.start >= 0
        assert w.stop <= units
        assert w.first == 0 or w.first - w.start >= 50
        assert w.last == units or w.stop - w.last >= 50


def test_log_mel_units_of_a_long_recording_do_not_depend_on_blocks():
    samples = sweep(30)[0]
    for block in (4, 333, 2_999):
        np.testing.assert_allclose(log_mel(samples, block), log_mel(samples, 1 << 30), atol=1e-5)
    # more than one default block of a minute, against all frames at once
    long = np.concatenate([sweep(35, seed=i)[0] for i in range(4)])
    at_once = log_mel(long, 1 << 30)
    features = (at_once - at_once.mean(axis=0)).reshape(-1, 160)
    centroids = TOKENIZER._tensors["centroids"]
    expected = ((features[:, None] - centroids) ** 2).sum(-1).argmin(1)
    np.testing.assert_array_equal(TOKENIZER.encode((long, 16_000)), expected)


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        # Only what the attention hears further away than the window differs.
        ("hubert, layer norm", 0.99),
        ("wavlm", 0.7),
        # Group normalisation takes its mean and deviation over the window, so every feature moves a little.
        ("hubert", 0.7),
    ],
)
def test_most_units_of_a_long_recording_are_those_of_the_model_on_the_whole(folder, name, bound):
    long = (np.concatenate([sweep(4, seed=i % 5)[0] for i in range(8)]), 16_000)
    whole = tokenizer_of(folder, name, [long], size=40, window_seconds=1_000)
    chunked = SpeechTokenizer(
        whole._tensors["centroids"], folder(name)[0], model=folder(name)[1], layer=2, window_seconds=12
    )
    same = (whole.encode(long) == chunked.encode(long)).mean()
    assert same > bound, same


def test_normalizing_preprocessor_is_obeyed(hubert):
    plain = SpeechTokenizer(np.zeros((2, 16)), "hubert", model=hubert, layer=1)
    file = hubert / "preprocessor_config.json"
    file.write_text(json.dumps({"do_normalize": True}))
    try:
        normalizing = SpeechTokenizer(np.zeros((2, 16)), "hubert", model=hubert, layer=1)
    finally:
        file.unlink()
    waveform, rate = sweep(1)
    theirs = Wav2Vec2FeatureExtractor(do_normalize=True)
    exact = np.asarray(theirs(waveform, sampling_rate=rate)["input_values"][0], np.float32)
    np.testing.assert_allclose(normalizing.features((waveform, rate)), plain.features((exact, rate)), atol=1e-4)


@pytest.mark.parametrize("extractor", ["log_mel", "hubert"])
def test_save_and_load_keep_units_and_fingerprint(hubert, tmp_path, extractor):
    tokenizer = SpeechTokenizer.train(
        [sweep(2)], 10, extractor=extractor, model=hubert if extractor == "hubert" else None, layer=1
    )
    tokenizer.save(tmp_path / "a")
    loaded = SpeechTokenizer.load(tmp_path / "a")
    loaded.save(tmp_path / "b")
    again = SpeechTokenizer.load(tmp_path / "b")
    np.testing.assert_array_equal(again.encode(sweep(2)), tokenizer.encode(sweep(2)))
    assert tokenizer.fingerprint() == loaded.fingerprint() == again.fingerprint()
    assert SpeechTokenizer.stored_size(tmp_path / "b") == again.size == 10


def test_training_is_deterministic_for_a_seed():
    assert (
        SpeechTokenizer.train([sweep(2)], 10, seed=3).fingerprint()
        == SpeechTokenizer.train([sweep(2)], 10, seed=3).fingerprint()
    )
    assert (
        SpeechTokenizer.train([sweep(2)], 10, seed=3).fingerprint()
        != SpeechTokenizer.train([sweep(2)], 10, seed=4).fingerprint()
    )


def test_mistakes_are_explained(hubert, tmp_path):
    with pytest.raises(ValueError, match="too short"):
        TOKENIZER.encode((np.zeros(300, np.float32), 16_000))
    with pytest.raises(ValueError, match="mono"):
        TOKENIZER.encode((np.zeros((300, 2), np.float32), 16_000))
    with pytest.raises(ValueError, match="no vocoder is configured for units of 'hubert'"):
        SpeechTokenizer(np.zeros((2, 16)), "hubert", model=hubert, layer=1).decode([1])
    with pytest.raises(ValueError, match="outside the 20"):
        TOKENIZER.decode([1, 20])
    with pytest.raises(ValueError, match="n > 0"):
        TOKENIZER.decode([])
    with pytest.raises(
        ValueError, match="known: log_mel, hubert, wav2vec2, wavlm, data2vec-audio, mimi, neucodec, xcodec2, dac"
    ):
        SpeechTokenizer(np.zeros((2, 16)), "mfcc")
    with pytest.raises(ValueError, match="too few for 500 units"):
        SpeechTokenizer.train([sweep(1)], 500)
    with pytest.raises(ValueError, match="layer 9"):
        SpeechTokenizer(np.zeros((2, 16)), "hubert", model=hubert, layer=9)
    with pytest.raises(ValueError, match="not a folder of a hubert model"):
        SpeechTokenizer(np.zeros((2, 16)), "hubert", model=tmp_path, layer=1)
    with pytest.raises(ValueError, match=r"extractor 'wavlm', but its config\.json says model_type 'hubert'"):
        SpeechTokenizer(np.zeros((2, 16)), "wavlm", model=hubert, layer=1)
    with pytest.raises(ValueError, match="window_seconds 5: at least 8"):
        SpeechTokenizer(np.zeros((2, 16)), "hubert", model=hubert, layer=1, window_seconds=5)
    with pytest.raises(ValueError, match="needs a model folder and a layer"):
        SpeechTokenizer(np.zeros((2, 16)), "hubert", model=hubert)
    with pytest.raises(ValueError, match="features, but the model's are 16 wide"):
        SpeechTokenizer(np.zeros((2, 17)), "hubert", model=hubert, layer=1)
    with pytest.raises(ValueError, match="nothing to train"):
        SpeechTokenizer.train([sweep(1)], 5, extractor="mimi", model=hubert)
    TOKENIZER.save(tmp_path)
    save_file({"other": np.zeros((2, 160), np.float32)}, tmp_path / "centroids.safetensors")
    with pytest.raises(ValueError, match="no tensor 'centroids'"):
        SpeechTokenizer.load(tmp_path)


# ------------------------------------------------------------------------------- checkpoints of other people


class Trap:
    """An object that makes a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (open, (str(self.file), "w"))


def test_tensors_in_a_bin_are_read_and_code_in_it_is_not_run(hubert, tmp_path):
    model = HubertModel.from_pretrained(hubert)
    shutil.copy(hubert / "config.json", tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    from_bin = SpeechTokenizer(np.eye(3, 16), "hubert", model=tmp_path, layer=2)
    from_safetensors = SpeechTokenizer(np.eye(3, 16), "hubert", model=hubert, layer=2)
    np.testing.assert_array_equal(from_bin.features(sweep(1)), from_safetensors.features(sweep(1)))
    from_bin.save(tmp_path / "saved")
    assert (tmp_path / "saved/hubert/model.safetensors").is_file()
    np.testing.assert_array_equal(SpeechTokenizer.load(tmp_path / "saved").encode(sweep(1)), from_bin.encode(sweep(1)))
    assert SpeechTokenizer.load(tmp_path / "saved").fingerprint() == from_bin.fingerprint()

    torch.save(model.state_dict() | {"trap": Trap(tmp_path / "sprung")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="not a transformers HubertModel folder"):
        SpeechTokenizer(np.eye(3, 16), "hubert", model=tmp_path, layer=2)
    assert not (tmp_path / "sprung").exists()
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)  # the trap does spring where one lets it
    assert (tmp_path / "sprung").exists()


def test_code_named_by_a_checkpoints_config_is_not_run(hubert, tmp_path):
    shutil.copytree(hubert, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling_trap.HubertModel", "AutoConfig": "modeling_trap.HubertConfig"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "modeling_trap.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\n")
    SpeechTokenizer(np.eye(3, 16), "hubert", model=tmp_path, layer=2).encode(sweep(1))
    assert not (tmp_path / "sprung").exists()


def test_weights_that_lack_a_tensor_are_refused_not_left_random(hubert, tmp_path):
    shutil.copytree(hubert, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    gone = next(name for name in tensors if "layers.1" in name)
    del tensors[gone]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack 1 tensors .*layers\.1"):
        SpeechTokenizer(np.zeros((2, 16)), "hubert", model=tmp_path, layer=1)


def test_centroids_of_other_people_are_read_unless_they_are_pickles(tmp_path):
    centroids = np.random.default_rng(0).normal(size=(5, 16))
    np.save(tmp_path / "a.npy", centroids)
    save_file({"whatever": centroids.astype(np.float32)}, tmp_path / "a.safetensors")
    for file in ("a.npy", "a.safetensors"):
        np.testing.assert_array_equal(read_centroids(tmp_path / file), centroids.astype(np.float32))
    kmeans = KMeans(2, n_init=1).fit(centroids)
    joblib.dump(kmeans, tmp_path / "k.joblib")
    with pytest.raises(ValueError, match=r"convert .* numpy\.save\('centroids\.npy', joblib\.load\('k\.joblib'\)"):
        read_centroids(tmp_path / "k.joblib")
    np.save(tmp_path / "object.npy", np.array([Trap(tmp_path / "sprung")]), allow_pickle=True)
    with pytest.raises(ValueError, match="not an array of numbers"):
        read_centroids(tmp_path / "object.npy")
    assert not (tmp_path / "sprung").exists()
    np.save(tmp_path / "flat.npy", centroids[0])
    save_file({"a": centroids, "b": centroids}, tmp_path / "two.safetensors")
    for file, message in (("flat.npy", "finite floats"), ("two.safetensors", "no tensor 'centroids' among")):
        with pytest.raises(ValueError, match=message):
            read_centroids(tmp_path / file)


# ------------------------------------------------------------------------------------------ units and sound


def test_deduplicated_units_have_no_repeats_and_the_folder_says_so(tmp_path):
    centroids = TOKENIZER._tensors["centroids"]
    value = sweep(4, seed=1)
    plain, short = TOKENIZER.encode(value), SpeechTokenizer(centroids, deduplicate=True)
    found = short.encode(value)
    assert found.tolist() == [unit for unit, _ in groupby(plain.tolist())]
    assert len(found) < len(plain)
    short.save(tmp_path)
    np.testing.assert_array_equal(SpeechTokenizer.load(tmp_path).encode(value), found)
    assert SpeechTokenizer.stored_rate(tmp_path) == {"units_per_second": 25, "deduplicate": True}


def test_sound_made_from_units_is_heard_as_those_units(tmp_path):
    value = sweep(4, seed=1)
    units = TOKENIZER.encode(value)
    waveform, rate = sound = TOKENIZER.decode(units)
    assert (rate, waveform.dtype, len(waveform)) == (16_000, np.float32, 640 * len(units))
    assert np.abs(waveform).max() == pytest.approx(0.5)
    share = np.bincount(units, minlength=20) / len(units)
    chance = max((share**2).sum(), share.max())
    same = (TOKENIZER.encode(sound) == units).mean()
    assert same > 0.7 > 2 * chance, (same, chance)
    # the average clip's spectrum travels with the tokenizer, so that its sound does too
    TOKENIZER.save(tmp_path)
    np.testing.assert_array_equal(SpeechTokenizer.load(tmp_path).decode(units[:5])[0], TOKENIZER.decode(units[:5])[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["hubert", "data2vec-audio"])
def test_units_from_a_gpu_are_those_from_the_cpu(folder, name):
    values = [sweep(s, seed=i) for i, s in enumerate((3, 3, 5))]
    cpu = tokenizer_of(folder, name, values)
    gpu = tokenizer_of(folder, name, values, device="cuda")
    same = np.concatenate(cpu.encode_batch(values)) == np.concatenate(gpu.encode_batch(values))
    assert same.mean() > 0.98
