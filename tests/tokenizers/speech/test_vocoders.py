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

from mom_tokenizers.speech.units import SpeechTokenizer

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
    model.dur_predictor.proj.weight.data.normal_(std=2)
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
