import io
import json

import numpy as np
import pytest
import soundfile
import torch
from safetensors.numpy import save_file
from transformers import HubertConfig, HubertModel

from mom_tokenizers.speech import SpeechTokenizer, count_units, decode_audio, log_mel


def sweep(seconds, rate=16_000, seed=0):
    t = np.arange(int(seconds * rate)) / rate
    noise = np.random.default_rng(seed).normal(0, 0.05, len(t))
    return (0.4 * np.sin(2 * np.pi * (200 + 900 * t * (1 + seed)) * t) + noise).astype(np.float32), rate


TOKENIZER = SpeechTokenizer.train([sweep(4, seed=i) for i in range(3)], 20)


@pytest.fixture(scope="module")
def hubert(tmp_path_factory):
    """A 25 Hz HuBERT as multilingual unit extractors use it, small and random."""
    path = tmp_path_factory.mktemp("hubert")
    torch.manual_seed(0)
    config = HubertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        conv_dim=(8,) * 8, conv_stride=(5, 2, 2, 2, 2, 2, 2, 2), conv_kernel=(10, 3, 3, 3, 3, 2, 2, 2),
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    HubertModel(config).save_pretrained(path)
    return path


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
    from sklearn.cluster import KMeans

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
    ours = log_mel(samples).reshape(100, 40)
    np.testing.assert_allclose(ours, theirs[:100], atol=2e-3)


def test_loudness_does_not_change_units():
    waveform, rate = sweep(2)
    same = TOKENIZER.encode((waveform, rate)) == TOKENIZER.encode((0.25 * waveform, rate))
    assert same.mean() > 0.95


@pytest.mark.parametrize("extractor", ["log_mel", "hubert"])
def test_batch_equals_one_by_one_for_different_lengths(hubert, extractor):
    values = [sweep(s, seed=i) for i, s in enumerate((0.5, 1.7, 0.9))]
    tokenizer = SpeechTokenizer.train(values, 12, extractor=extractor, model=hubert, layer=2)
    for one, batched in zip(values, tokenizer.encode_batch(values), strict=True):
        np.testing.assert_array_equal(tokenizer.encode(one), batched)


def test_hubert_features_are_the_models_hidden_states_of_the_padded_recording(hubert):
    waveform, rate = sweep(1)
    ours = SpeechTokenizer(np.zeros((2, 16)), "hubert", model=hubert, layer=1).features((waveform, rate))
    model = HubertModel.from_pretrained(hubert).eval()
    with torch.inference_mode():
        padded = torch.from_numpy(np.concatenate([waveform, np.zeros(80, np.float32)]))[None]
        theirs = model(padded, output_hidden_states=True).hidden_states[1][0].numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_normalizing_preprocessor_is_obeyed(hubert):
    plain = SpeechTokenizer(np.zeros((2, 16)), "hubert", model=hubert, layer=1)
    file = hubert / "preprocessor_config.json"
    file.write_text(json.dumps({"do_normalize": True}))
    try:
        normalizing = SpeechTokenizer(np.zeros((2, 16)), "hubert", model=hubert, layer=1)
    finally:
        file.unlink()
    waveform, rate = sweep(1)
    exact = (waveform - waveform.mean()) / np.sqrt(waveform.var() + 1e-7)
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


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3"])
def test_audio_bytes_become_mono_float32(kind):
    left, rate = sweep(1, 16_000)
    file = io.BytesIO()
    soundfile.write(file, np.stack([left, np.zeros_like(left)], axis=1), rate, format=kind)
    waveform, found = decode_audio(file.getvalue())
    assert (waveform.dtype, waveform.ndim, found) == (np.float32, 1, rate)
    # lossy codecs add silence at the ends: compare the power, half the amplitude of `left`
    assert np.sum(waveform**2) == pytest.approx(np.sum((left / 2) ** 2), rel=0.15)


def test_opus_in_ogg_is_read():
    file = io.BytesIO()
    soundfile.write(file, sweep(1, 48_000)[0], 48_000, format="OGG", subtype="OPUS")
    assert len(decode_audio(file.getvalue())[0]) == 48_000


def test_recordings_that_cannot_be_read_are_refused():
    file = io.BytesIO()
    soundfile.write(file, sweep(1)[0], 16_000, format="FLAC")
    empty = io.BytesIO()
    soundfile.write(empty, np.zeros(0), 16_000, format="WAV")
    for broken in (b"", b"no recording", file.getvalue()[: len(file.getvalue()) // 2], empty.getvalue()):
        with pytest.raises(ValueError, match="recording"):
            decode_audio(broken)


def test_mistakes_are_explained(hubert, tmp_path):
    with pytest.raises(ValueError, match="too short"):
        TOKENIZER.encode((np.zeros(300, np.float32), 16_000))
    with pytest.raises(ValueError, match="mono"):
        TOKENIZER.encode((np.zeros((300, 2), np.float32), 16_000))
    with pytest.raises(ValueError, match="no vocoder"):
        TOKENIZER.decode([1])
    with pytest.raises(ValueError, match="known: log_mel, hubert"):
        SpeechTokenizer(np.zeros((2, 16)), "mfcc")
    with pytest.raises(ValueError, match="too few for 500 units"):
        SpeechTokenizer.train([sweep(1)], 500)
    with pytest.raises(ValueError, match="layer 9"):
        SpeechTokenizer(np.zeros((2, 16)), "hubert", model=hubert, layer=9)
    with pytest.raises(ValueError, match="not a HuBERT folder"):
        SpeechTokenizer(np.zeros((2, 16)), "hubert", model=tmp_path, layer=1)
    TOKENIZER.save(tmp_path)
    save_file({"other": np.zeros((2, 160), np.float32)}, tmp_path / "centroids.safetensors")
    with pytest.raises(ValueError, match="no tensor 'centroids'"):
        SpeechTokenizer.load(tmp_path)
