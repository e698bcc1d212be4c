import json

import numpy as np
import pytest
import torch
import transformers

from mom_tokenizers.errors import UserError
from mom_tokenizers.speech.units import SpeechTokenizer

if not hasattr(transformers, "Xcodec2Model"):
    pytest.skip(f"transformers {transformers.__version__} has no Xcodec2Model", allow_module_level=True)
from transformers import (
    DacConfig,
    DacFeatureExtractor,
    DacModel,
    MimiConfig,
    MimiModel,
    NeuCodecConfig,
    NeuCodecModel,
    SeamlessM4TFeatureExtractor,
    Wav2Vec2BertConfig,
    Xcodec2Config,
    Xcodec2Model,
)

SEMANTIC = Wav2Vec2BertConfig(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, feature_projection_input_dim=160,
    conv_depthwise_kernel_size=3, output_hidden_size=16, add_adapter=False,
)  # fmt: skip
FSQ = {
    "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 64, "encoder_hidden_size": 4, "quantization_dim": 144,
    "quantization_levels": [4] * 8,
}  # fmt: skip


def small(name):
    """A model of the library's class with few random weights."""
    torch.manual_seed(0)
    if name in ("neucodec", "xcodec2"):
        config, cls = (NeuCodecConfig, NeuCodecModel) if name == "neucodec" else (Xcodec2Config, Xcodec2Model)
        model = cls(config(**FSQ, semantic_model_config=SEMANTIC)).eval()
        for parameter in model.acoustic_decoder.parameters():
            if not parameter.abs().max():  # a new model's last layer is zero, and so is its sound
                torch.nn.init.normal_(parameter, std=0.1)
        torch.nn.init.normal_(model.fc_encoder.weight)  # so that codes differ
        torch.nn.init.normal_(model.quantizer.project_in.weight)
        return model
    if name == "dac":
        return DacModel(
            DacConfig(encoder_hidden_size=4, downsampling_ratios=[2, 4, 5, 8], decoder_hidden_size=32, n_codebooks=3,
                      codebook_size=32, codebook_dim=4, sampling_rate=16_000)
        ).eval()  # fmt: skip
    model = MimiModel(
        MimiConfig(hidden_size=32, num_filters=4, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
                   head_dim=16, intermediate_size=32, codebook_size=32, codebook_dim=8, num_quantizers=4,
                   vector_quantization_hidden_dimension=8, upsample_groups=32, sliding_window=5)
    ).eval()  # fmt: skip
    for module in model.quantizer.modules():
        if hasattr(module, "embed_sum"):  # a new model's codebooks are all zeros
            module.embed_sum.normal_()
            module.cluster_usage.fill_(1)
    return model


def sound(seconds, rate, seed=0):
    t = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(seed).normal(0, 0.05, len(t))
    return (0.3 * np.sin(2 * np.pi * (150 + 400 * t) * t) + noise).astype(np.float32), rate


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            small(name).save_pretrained(made[name])
        return made[name]

    return get


def by_the_library(name, samples, codebooks):
    """(codes (T, K), sound) by the class's own calls, as its documentation has them. NeuCodec's and X-codec 2's own
    feature extractors need torchaudio, so what they do with the waveform is written here a second time."""
    model = small(name)
    with torch.inference_mode():
        if name in ("mimi", "dac"):
            if name == "dac":
                own = DacFeatureExtractor(sampling_rate=16_000, hop_length=320)
                x = own(samples, sampling_rate=16_000, return_tensors="pt")["input_values"]
                codes = model.encode(x, n_quantizers=codebooks).audio_codes
                return codes[0].T.numpy(), model.decode(audio_codes=codes).audio_values.flatten().numpy()
            codes = model.encode(torch.from_numpy(samples)[None, None], num_quantizers=codebooks).audio_codes
        else:
            padded = np.append(samples, np.float32(0))
            padded = np.pad(padded, (0, -len(padded) % 320))
            around = 160 if name == "xcodec2" else 0
            features = SeamlessM4TFeatureExtractor()(
                np.pad(padded, around), sampling_rate=16_000, return_tensors="pt"
            )["input_features"]  # fmt: skip
            codes = model.encode(torch.from_numpy(padded)[None, None], features).audio_codes
            codes = codes[..., : len(samples) // 320]  # X-codec 2 has one more, of the zeros
        return codes[0].T.numpy(), model.decode(codes).audio_values.flatten().numpy()


@pytest.mark.parametrize(
    ("name", "codebooks", "rate", "per_second", "decoded"),
    [("mimi", 1, 24_000, 12.5, 24_000), ("mimi", 3, 24_000, 12.5, 24_000), ("dac", 1, 16_000, 50, 16_000),
     ("dac", 3, 16_000, 50, 16_000), ("neucodec", 1, 16_000, 50, 24_000), ("xcodec2", 1, 16_000, 50, 16_000)],
)  # fmt: skip
def test_codes_and_sound_are_those_of_the_library_alone_in_batches_and_after_saving(
    folder, tmp_path, name, codebooks, rate, per_second, decoded
):
    tokenizer = SpeechTokenizer(None, name, model=folder(name), codebooks=codebooks)
    values = [sound(s, rate, seed) for seed, s in enumerate((1.04, 0.48, 1.04))]
    found = tokenizer.encode_batch(values)
    size = tokenizer.size // codebooks
    for value, ids in zip(values, found, strict=True):
        codes_TK, wave = by_the_library(name, value[0], codebooks)
        T, K = codes_TK.shape
        assert per_second * len(value[0]) / rate == T
        in_steps = [codes_TK[s - k, k] + k * size for s in range(T + K - 1) for k in range(K) if 0 <= s - k < T]
        assert ids.tolist() == in_steps
        assert ids.tolist() == tokenizer.encode(value).tolist()
        waveform, decoded_rate = tokenizer.decode(ids)
        assert (decoded_rate, waveform.dtype, len(waveform)) == (decoded, np.float32, T * decoded / per_second)
        np.testing.assert_allclose(waveform[: len(wave)], wave, atol=1e-5)
        assert np.abs(waveform).max() > 0
    assert len(np.unique(found[0])) > 3 * codebooks
    tokenizer.save(tmp_path)
    loaded = SpeechTokenizer.load(tmp_path)
    assert loaded.encode(values[0]).tolist() == found[0].tolist()
    np.testing.assert_array_equal(loaded.decode(found[0])[0], tokenizer.decode(found[0])[0])
    assert loaded.fingerprint() == tokenizer.fingerprint()
    further = {"codebooks": codebooks} if codebooks > 1 else {}
    assert SpeechTokenizer.stored_rate(tmp_path) == {"units_per_second": codebooks * per_second, **further}
    assert SpeechTokenizer.stored_size(tmp_path) == tokenizer.size == loaded.size


@pytest.mark.parametrize("name", ["dac", "mimi"])
def test_long_recordings_decode_in_windows_as_in_one_where_the_receptive_field_is_shorter(folder, name):
    whole = SpeechTokenizer(None, name, model=folder(name), codebooks=2, window_seconds=1_000)
    cut = SpeechTokenizer(None, name, model=folder(name), codebooks=2, window_seconds=8)
    ids = whole.encode(sound(19.2, 16_000))
    np.testing.assert_array_equal(cut.encode(sound(19.2, 16_000)), ids)
    waveform = whole.decode(ids)[0]
    np.testing.assert_allclose(cut.decode(ids)[0], waveform, atol=1e-5)
    assert np.abs(waveform).max() > 100e-5  # so that the comparison can fail


def test_windows_of_a_codec_that_hears_everything_meet_without_a_click(folder):
    tokenizer = SpeechTokenizer(None, "neucodec", model=folder("neucodec"), window_seconds=8)
    ids = np.random.default_rng(0).integers(0, tokenizer.size, 50 * 20)
    waveform, rate = tokenizer.decode(ids)
    assert len(waveform) == 20 * rate
    steps = np.abs(np.diff(waveform))
    for seconds in (6, 10, 14):  # where windows meet
        near = slice(int((seconds - 0.05) * rate), int((seconds + 0.05) * rate))
        assert steps[near].max() <= steps.max()
        assert steps[near].max() < 3 * np.quantile(steps, 0.99)


def test_a_codec_that_does_not_fit_is_refused_with_both_named(folder, tmp_path):
    with pytest.raises(ValueError, match="4 codebooks of a dac model that has 3"):
        SpeechTokenizer(None, "dac", model=folder("dac"), codebooks=4)
    with pytest.raises(ValueError, match="3 codebooks cannot be deduplicated"):
        SpeechTokenizer(None, "dac", model=folder("dac"), codebooks=3, deduplicate=True)
    with pytest.raises(ValueError, match="2 codebooks, but the units of 'log_mel' are centroids"):
        SpeechTokenizer(np.zeros((3, 160)), codebooks=2)
    with pytest.raises(ValueError, match=r"extractor 'mimi', but its config\.json says model_type 'dac'"):
        SpeechTokenizer(None, "mimi", model=folder("dac"))
    with pytest.raises(ValueError, match="'dac' decodes its own codes"):
        SpeechTokenizer(None, "dac", model=folder("dac"), vocoder=tmp_path)
    # the codec in the folder was replaced by one of another rate
    SpeechTokenizer(None, "dac", model=folder("dac")).save(tmp_path)
    config = json.loads((tmp_path / "dac/config.json").read_text())
    (tmp_path / "dac/config.json").write_text(json.dumps(config | {"sampling_rate": 24_000}))
    with pytest.raises(ValueError, match=r"units_per_second 50\.0, but the model's is 75"):
        SpeechTokenizer.load(tmp_path)
    (tmp_path / "dac/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="not whole frames of 3 codebooks"):
        SpeechTokenizer(None, "dac", model=folder("dac"), codebooks=3).decode([1, 2, 3])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": None}, "size cannot be None"),
        ({"size": "2048"}, "size cannot be '2048'"),
        ({"size": 0}, "size cannot be 0"),
        ({"codebooks": True}, "codebooks cannot be True"),
        ({"units_per_second": float("nan")}, "units_per_second cannot be nan"),
        ({"deduplicate": "no"}, "deduplicate cannot be 'no'"),
        ({"codes": 3}, r"unknown \['codes'\]"),
        ("size", "'size' is missing"),
        ("units_per_second", "'units_per_second' is missing"),
    ],
)
def test_settings_that_a_codec_cannot_have_are_named_before_its_model_is_built(tmp_path, changes, message):
    values = {"extractor": "mimi", "units_per_second": 12.5, "size": 2048}
    (tmp_path / "speech_tokenizer.json").write_text(json.dumps(values))
    assert SpeechTokenizer.stored_rate(tmp_path) == {"units_per_second": 12.5}
    values = values | changes if isinstance(changes, dict) else {k: v for k, v in values.items() if k != changes}
    (tmp_path / "speech_tokenizer.json").write_text(json.dumps(values))
    for stored in (SpeechTokenizer.stored_rate, SpeechTokenizer.stored_size, SpeechTokenizer.load):
        with pytest.raises(UserError, match=message):
            stored(tmp_path)
