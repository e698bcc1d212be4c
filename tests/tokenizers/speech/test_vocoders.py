import numpy as np
import pytest
import torch
from transformers import (
    HubertConfig,
    HubertModel,
    SeamlessM4TConfig,
    SeamlessM4Tv2Config,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
)
from transformers.models.seamless_m4t.modeling_seamless_m4t import SeamlessM4TCodeHifiGan
from transformers.models.seamless_m4t_v2.modeling_seamless_m4t_v2 import SeamlessM4Tv2CodeHifiGan

from mom_tokenizers.speech import vocoder_training
from mom_tokenizers.speech.units import SpeechTokenizer
from mom_tokenizers.speech.vocoder_training import train_vocoder

RNG = np.random.default_rng(0)
LOG_MEL = RNG.normal(size=(20, 160)).astype(np.float32)
MEAN = RNG.normal(size=40).astype(np.float32)
UNITS = RNG.integers(0, 20, 30)


def hifigan(folder, **changed):
    torch.manual_seed(0)
    options = {
        "model_in_dim": 40, "sampling_rate": 16_000, "upsample_initial_channel": 32, "upsample_rates": [5, 4, 4, 2],
        "upsample_kernel_sizes": [11, 8, 8, 4], "resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 3]],
        "normalize_before": True,
    } | changed  # fmt: skip
    model = SpeechT5HifiGan(SpeechT5HifiGanConfig(**options)).eval()
    model.mean.normal_()
    for parameter in model.parameters():
        parameter.data.mul_(9)  # loud enough that a difference shows
    model.save_pretrained(folder)
    return model


def code_hifigan(folder, version=1, size=20, **changed):
    torch.manual_seed(0)
    config, cls = {1: (SeamlessM4TConfig, SeamlessM4TCodeHifiGan), 2: (SeamlessM4Tv2Config, SeamlessM4Tv2CodeHifiGan)}[
        version
    ]
    options = {
        "unit_hifi_gan_vocab_size": size, "unit_embed_dim": 16, "lang_embed_dim": 4, "spkr_embed_dim": 4,
        "vocoder_num_langs": 2, "vocoder_num_spkrs": 3, "upsample_initial_channel": 32,
        "upsample_rates": [5, 4, 4, 2, 2], "upsample_kernel_sizes": [11, 8, 8, 4, 4], "resblock_kernel_sizes": [3],
        "resblock_dilation_sizes": [[1, 3]], "variance_predictor_kernel_size": 3, "t2u_pad_token_id": 1,
    } | changed  # fmt: skip
    model = cls(config(**options)).eval()
    for parameter in model.hifi_gan.parameters():
        parameter.data.mul_(9)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def hubert(tmp_path_factory):
    """A HuBERT of 25 units a second whose hidden states are 16 wide."""
    folder = tmp_path_factory.mktemp("hubert")
    HubertModel(
        HubertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
                     num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, conv_dim=(8,) * 8,
                     conv_stride=(5, *(2,) * 7), conv_kernel=(10, 3, 3, 3, 3, 2, 2, 2))
    ).save_pretrained(folder)  # fmt: skip
    return folder


def test_log_mel_units_sound_as_hifigan_says_of_their_frames_and_the_fingerprint_does_not_change(tmp_path):
    model = hifigan(tmp_path / "vocoder")
    tokenizer = SpeechTokenizer(LOG_MEL, mean=MEAN, vocoder=tmp_path / "vocoder")
    with torch.inference_mode():
        expected = model(torch.from_numpy(LOG_MEL[UNITS].reshape(-1, 40) + MEAN)).numpy()
    waveform, rate = tokenizer.decode(UNITS)
    assert (rate, len(waveform)) == (16_000, 640 * len(UNITS))
    np.testing.assert_allclose(waveform, expected, atol=1e-6)
    assert np.ptp(waveform) > 0.01
    tokenizer.save(tmp_path / "saved")
    loaded = SpeechTokenizer.load(tmp_path / "saved")
    np.testing.assert_array_equal(loaded.decode(UNITS)[0], waveform)
    without = SpeechTokenizer(LOG_MEL, mean=MEAN)
    assert loaded.fingerprint() == tokenizer.fingerprint() == without.fingerprint()
    assert loaded.encode((waveform, rate)).tolist() == without.encode((waveform, rate)).tolist()
    loaded.save(tmp_path / "again")
    np.testing.assert_array_equal(SpeechTokenizer.load(tmp_path / "again").decode(UNITS)[0], waveform)


def test_hidden_state_units_sound_as_hifigan_says_of_their_centroids_at_half_the_rate_too(hubert, tmp_path):
    centroids = RNG.normal(size=(20, 16)).astype(np.float32)
    for rates, kernels, repeats in (([5, 4, 4, 4, 2], [11, 8, 8, 8, 4], 1), ([5, 4, 4, 4], [11, 8, 8, 8], 2)):
        folder = tmp_path / str(repeats)
        model = hifigan(folder, model_in_dim=16, upsample_rates=rates, upsample_kernel_sizes=kernels)
        tokenizer = SpeechTokenizer(centroids, "hubert", model=hubert, layer=1, vocoder=folder)
        with torch.inference_mode():
            expected = model(torch.from_numpy(centroids[UNITS].repeat(repeats, axis=0))).numpy()
        waveform, rate = tokenizer.decode(UNITS)
        assert (rate, len(waveform)) == (16_000, 640 * len(UNITS))
        np.testing.assert_allclose(waveform, expected, atol=1e-6)


@pytest.mark.parametrize("version", [1, 2])
def test_units_sound_as_seamless_unit_vocoder_says_of_their_numbers(hubert, tmp_path, version):
    model = code_hifigan(tmp_path / "v", version)
    centroids = RNG.normal(size=(20, 16)).astype(np.float32)
    speaker = "spkr_id" if version == 1 else "speaker_id"
    zero = torch.zeros(1, 1, dtype=torch.long)

    def theirs(units):
        with torch.inference_mode():
            return model(torch.from_numpy(units)[None], **{speaker: zero}, lang_id=zero)[0].flatten().numpy()

    # deduplicated units last as long as the vocoder guesses
    predictor = model.dur_predictor
    predictor.proj.weight.data.normal_()
    predictor.proj.bias.data.zero_()
    with torch.inference_mode():  # whatever the library's first weights are, one to six frames
        logs = predictor(model.unit_embedding(torch.from_numpy(UNITS)[None]))
    predictor.proj.weight.data.div_(float(logs.abs().max()))
    predictor.proj.bias.data.fill_(1)
    model.save_pretrained(tmp_path / "v")
    short = SpeechTokenizer(centroids, "hubert", model=hubert, layer=1, deduplicate=True, vocoder=tmp_path / "v")
    expected = theirs(UNITS)
    assert len(expected) != 320 * len(UNITS)
    np.testing.assert_allclose(short.decode(UNITS)[0], expected, atol=1e-6)
    # all others last 40 ms, which are two of its frames
    model.dur_predictor.proj.weight.data.zero_()
    model.dur_predictor.proj.bias.data.fill_(float(np.log(3)))
    plain = SpeechTokenizer(centroids, "hubert", model=hubert, layer=1, vocoder=tmp_path / "v")
    waveform, rate = plain.decode(UNITS)
    assert (rate, len(waveform)) == (16_000, 640 * len(UNITS))
    np.testing.assert_allclose(waveform, theirs(UNITS), atol=1e-6)
    assert np.ptp(waveform) > 0.001


def test_long_rows_of_units_sound_in_windows_as_in_one(hubert, tmp_path):
    hifigan(tmp_path / "a", model_in_dim=16, upsample_rates=[5, 4, 4, 4, 2], upsample_kernel_sizes=[11, 8, 8, 8, 4])
    code_hifigan(tmp_path / "b")
    centroids = RNG.normal(size=(20, 16)).astype(np.float32)
    units = RNG.integers(0, 20, 25 * 21)
    for folder in ("a", "b"):
        whole, cut = (
            SpeechTokenizer(
                centroids, "hubert", model=hubert, layer=1, vocoder=tmp_path / folder, window_seconds=seconds
            ).decode(units)[0]
            for seconds in (100, 8)
        )
        np.testing.assert_allclose(cut, whole, atol=1e-5)
        assert np.ptp(whole) > 0.001


def test_a_vocoder_for_other_units_is_refused_with_both_named(hubert, tmp_path):
    centroids = RNG.normal(size=(20, 16)).astype(np.float32)

    def use(folder):
        SpeechTokenizer(centroids, "hubert", model=hubert, layer=1, vocoder=folder)

    hifigan(tmp_path / "wide")
    with pytest.raises(ValueError, match=r"of 40 features every 160 samples at 16000 Hz; the tokenizer's 20 units of 'hubert' are 25 a second, with 16 features each"):  # fmt: skip  # noqa: E501
        use(tmp_path / "wide")
    hifigan(tmp_path / "other_hop", model_in_dim=16, upsample_rates=[8, 8, 4], upsample_kernel_sizes=[16, 16, 8])
    with pytest.raises(ValueError, match=r"every 256 samples at 16000 Hz; the tokenizer's 20 units .* 25 a second"):
        use(tmp_path / "other_hop")
    code_hifigan(tmp_path / "more", size=50)
    with pytest.raises(ValueError, match=r"a vocoder of 50 units, of which 50 take a second; the tokenizer's 20 units"):
        use(tmp_path / "more")
    hifigan(tmp_path / "odd", model_in_dim=16, upsample_kernel_sizes=[10, 8, 8, 4])
    with pytest.raises(ValueError, match="kernel 10 at rate 5"):
        use(tmp_path / "odd")
    with pytest.raises(ValueError, match=r"its config\.json says model_type 'hubert'; vocoders are: speecht5_h"):
        use(hubert)
    with pytest.raises(ValueError, match=r"no config\.json there, so not a folder of a vocoder"):
        use(tmp_path / "nothing")
    with pytest.raises(ValueError, match="no vocoder is configured for units of 'hubert'; put one into the folder"):
        SpeechTokenizer(centroids, "hubert", model=hubert, layer=1).decode([1])


# ------------------------------------------------------------------------------------- the vocoder that is trained


def syllables(seed):
    """Half-second tones of two pitches in turn, (waveform, rate)."""
    t = np.arange(8_000) / 16_000
    low, high = (sum(np.sin(2 * np.pi * f * k * t) / k for k in range(1, 6)) for f in (140, 310))
    rng = np.random.default_rng(seed)
    order = rng.permutation(4)
    noise = rng.normal(0, 0.01, 32_000)
    return (0.2 * np.concatenate([(low, high)[i % 2] for i in order]) + noise).astype(np.float32), 16_000


def magnitudes(samples):
    return np.abs(np.fft.rfft(samples[: len(samples) // 512 * 512].reshape(-1, 512) * np.hanning(512)))


def test_a_vocoder_learns_to_sound_like_the_recordings_and_is_refused_for_other_units(hubert, tmp_path, monkeypatch):
    monkeypatch.setattr(vocoder_training, "BATCH", 2)
    monkeypatch.setattr(vocoder_training, "RATE", 5e-3)
    values = [syllables(seed) for seed in range(6)]
    units = SpeechTokenizer.train(values, 6)
    small = {"channels": 48, "blocks": 1}
    untrained = train_vocoder(units, values, 1, tmp_path / "untrained", **small)
    trained = train_vocoder(units, values, 80, tmp_path / "a", **small)
    assert trained["log_mel_distance"] < 0.6 * untrained["log_mel_distance"]
    train_vocoder(units, values, 1, tmp_path / "again", **small)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("untrained", "again")]
    assert weights[0] == weights[1], "the same seed must give the same vocoder"

    own, mean = units._tensors["centroids"], units._tensors["mean"]
    speaking = SpeechTokenizer(own, mean=mean, vocoder=tmp_path / "a")
    value = syllables(99)
    ids = speaking.encode(value)
    waveform, rate = speaking.decode(ids)
    assert (rate, waveform.dtype, len(waveform)) == (16_000, np.float32, 640 * len(ids))
    # of what was recorded, not of any sound: the spectrum averaged over time is nearer than that of the other syllable
    mine, real = (magnitudes(x / np.abs(x).max()).mean(axis=0) for x in (waveform, value[0]))
    assert np.corrcoef(mine, real)[0, 1] > 0.8

    many = np.tile(ids, 11)
    cut = SpeechTokenizer(own, mean=mean, vocoder=tmp_path / "a")
    whole = cut.decode(many)[0]
    cut._vocoder._units = cut.units.__class__(**{**cut.units.__dict__, "window_seconds": 8.0})
    np.testing.assert_allclose(cut.decode(many)[0], whole, atol=1e-4)

    with pytest.raises(ValueError, match=r"of 'log_mel' with 40 features that last 10 ms; the tokenizer's 20 units of"):
        SpeechTokenizer(np.zeros((20, 16)), "hubert", model=hubert, layer=1, vocoder=tmp_path / "a")
    (tmp_path / "a/model.safetensors").write_bytes(weights[0][:100])
    with pytest.raises(ValueError, match=r"not a vocoder that train_tokenizers\.py wrote"):
        SpeechTokenizer(own, vocoder=tmp_path / "a")


def test_units_of_hidden_states_get_a_vocoder_too_and_deduplicated_ones_do_not(hubert, tmp_path):
    values = [syllables(seed) for seed in range(3)]
    units = SpeechTokenizer.train(values, 4, extractor="hubert", model=hubert, layer=1)
    figures = train_vocoder(units, values, 2, tmp_path / "v", channels=16, blocks=1)
    assert "log_mel_distance_griffin_lim" not in figures
    centroids = units._tensors["centroids"]
    speaking = SpeechTokenizer(centroids, "hubert", model=hubert, layer=1, vocoder=tmp_path / "v")
    assert len(speaking.decode([1, 2, 3])[0]) == 3 * 640
    short = SpeechTokenizer(centroids, "hubert", model=hubert, layer=1, deduplicate=True)
    with pytest.raises(ValueError, match="deduplicated units, whose durations are lost"):
        train_vocoder(short, values, 2, tmp_path / "w")
    with pytest.raises(ValueError, match="1 recordings of at least a second"):
        train_vocoder(units, values[:1], 2, tmp_path / "w")
