"""The scores that need no network, against their definitions and the libraries whose models they run."""

import io
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from mom_tools.model import score_samples, scores, signals

RNG = np.random.default_rng(20)  # not a seed of the noise, which would make the same pictures


def pictures(shape=(16, 20, 3)):
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def test_psnr_of_a_constant_difference_has_a_closed_form():
    one = RNG.integers(0, 200, (5, 7, 3), dtype=np.uint8)
    assert signals.psnr(one, one + 8) == pytest.approx(20 * np.log10(255 / 8))
    assert signals.psnr(one + 8, one) == signals.psnr(one, one + 8)
    assert signals.psnr(one, one) == np.inf


def test_ssim_is_its_definition_window_by_window():
    one = pictures()
    other = np.clip(0.7 * one.astype(float) + RNG.normal(20, 15, one.shape), 0, 255).round().astype(np.uint8)
    bell = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    weights = np.outer(bell, bell) / bell.sum() ** 2
    found = []
    for top in range(16 - 10):
        for left in range(20 - 10):
            for colour in range(3):
                x, y = (p[top : top + 11, left : left + 11, colour].astype(float) for p in (one, other))
                mx, my = np.average(x, weights=weights), np.average(y, weights=weights)
                vx, vy = np.average((x - mx) ** 2, weights=weights), np.average((y - my) ** 2, weights=weights)
                both = np.average((x - mx) * (y - my), weights=weights)
                c1, c2 = 6.5025, 58.5225
                found.append(
                    (2 * mx * my + c1) * (2 * both + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
                )  # fmt: skip
    assert signals.ssim(one, other) == pytest.approx(np.mean(found), rel=1e-9)
    assert 0.3 < np.mean(found) < 0.99
    assert signals.ssim(one, one) == pytest.approx(1)
    with pytest.raises(ValueError, match="a picture of 20 x 10 pixels; at least 11 x 11"):
        signals.ssim(one[:10], other[:10])


def test_the_perceptual_distance_is_that_of_a_models_layers_at_every_position(tmp_path):
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    torch.manual_seed(0)
    model = CLIPVisionModel(
        CLIPVisionConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                         image_size=32, patch_size=8)
    ).eval()  # fmt: skip
    model.save_pretrained(tmp_path)
    vision = scores.Vision(tmp_path, "cpu")
    one, other = (Image.fromarray(pictures((32, 32, 3))) for _ in range(2))
    found = scores.perceptual_distance(vision.layers(one), vision.layers(other))
    look = CLIPImageProcessor.from_pretrained(tmp_path)
    with torch.inference_mode():
        states = model(**look(images=[one, other], return_tensors="pt"), output_hidden_states=True).hidden_states
    # |a - b|^2 of vectors of length 1 is 2 - 2 cos
    cosines = torch.stack([torch.cosine_similarity(s[0].double(), s[1].double(), dim=-1).mean() for s in states])
    assert len(states) == 3
    assert found == pytest.approx(float((2 - 2 * cosines).mean()), rel=1e-5)
    assert found > 1e-3
    assert scores.perceptual_distance(vision.layers(one), vision.layers(one)) == 0


def test_pictures_are_scored_beside_their_mean_colour_and_noise(monkeypatch):
    real = [Image.fromarray(pictures()) for _ in range(3)]
    near = [Image.fromarray(np.clip(np.asarray(p).astype(int) + 5, 0, 255).astype(np.uint8)) for p in real]
    found, notes = score_samples.nearness(range(3), near.__getitem__, real.__getitem__, real.__getitem__, None)
    value = {(one.figure, one.of): one.value for one in found}
    assert value["PSNR, dB", "decoded, originals"] == 100  # which are the originals here
    assert value["SSIM", "decoded, originals"] == pytest.approx(1)
    assert value["PSNR, dB", "samples, originals"] > 30
    deviations = [np.asarray(p).astype(float) for p in real]
    flat = np.mean([20 * np.log10(255 / np.sqrt(((d - d.mean(axis=(0, 1))) ** 2).mean())) for d in deviations])
    assert value["PSNR, dB", "mean colour, originals"] == pytest.approx(flat, abs=0.01)
    assert value["PSNR, dB", "noise, originals"] < value["PSNR, dB", "mean colour, originals"]
    assert value["PSNR, dB", "samples of other texts: floor, originals"] < 15
    assert {one.n for one in found} == {3}
    small = [p.resize((8, 8)) for p in real]
    found, notes = score_samples.nearness(range(3), small.__getitem__, small.__getitem__, small.__getitem__, None)
    assert {one.figure for one in found} == {"PSNR, dB"}
    assert "3 of 3 pictures are left out, because they are smaller" in notes[-1]
    mixed = [small[0], *real[1:]]  # the first is too small, and the others count
    found, notes = score_samples.nearness(range(3), mixed.__getitem__, mixed.__getitem__, mixed.__getitem__, None)
    assert {one.figure: one.n for one in found} == {"PSNR, dB": 3, "SSIM": 2}
    assert "1 of 3 pictures are left out" in notes[-1]


def test_pictures_of_several_shapes_are_compared_with_samples_of_other_texts_too():
    wide, tall = Image.fromarray(pictures((16, 32, 3))), Image.fromarray(pictures((32, 16, 3)))
    both = [wide, tall].__getitem__
    found, _ = score_samples.nearness(range(2), both, both, both, None)
    value = {(one.figure, one.of): one.value for one in found}
    assert value["PSNR, dB", "samples, originals"] == 100
    assert 0 < value["PSNR, dB", "samples of other texts: floor, originals"] < 20


def test_speech_is_scored_beside_originals_and_noise(tmp_path):
    """Every figure comes from the sound that its row names: a recogniser and a rater that hear loudness say so."""
    loud = {"samples": 0.1, "decoded": 0.2, "originals": 0.4}
    pairs = [SimpleNamespace(name=f"p{i}", values=[i]) for i in range(3)]
    for pair in pairs:
        soundfile.write(tmp_path / f"{pair.name}.wav", np.full(1600, loud["samples"], np.float32), 16_000, "FLOAT")
    raw = io.BytesIO()
    soundfile.write(raw, np.full(1600, loud["originals"], np.float32), 16_000, "FLOAT", format="WAV")
    decode = SimpleNamespace(decode=lambda ids: (np.full(1600, loud["decoded"], np.float32), 16_000))
    tokenizers = SimpleNamespace(tokenizer=lambda modality: decode)

    def rate(waveform, rate):
        loudness = float(np.sqrt(np.mean(waveform**2)))
        return {"signal": loudness, "background": 2 * loudness, "overall": float(waveform.std())}

    def hear(waveform, rate):
        return "one two" if abs(waveform.mean() - loud["originals"]) < 0.01 else "one"

    found, notes = score_samples.listen(
        tmp_path, pairs, ["one two"] * 3, [None, raw.getvalue(), raw.getvalue()], tokenizers, None, hear, rate
    )
    value = {(one.figure, one.of): (one.value, one.n) for one in found}
    by_sphinx = "word error rate by pocketsphinx, %"
    assert value[by_sphinx, "originals"] == (0, 2)
    assert value[by_sphinx, "samples"] == value[by_sphinx, "decoded"] == value[by_sphinx, "noise"] == (50, 3)
    for name, loudness in loud.items():
        assert value["DNSMOS signal", name] == (pytest.approx(loudness, abs=1e-4), 2 if name == "originals" else 3)
    assert value["DNSMOS background", "noise"][0] == pytest.approx(0.4, rel=0.1)  # as loud as decoded
    assert value["DNSMOS overall", "noise"][0] == pytest.approx(0.2, rel=0.1)
    assert ("word error rate, %", "samples") not in value
    assert any("espeak" in note for note in notes)


def tone(seconds, rate=16_000):
    t = np.arange(int(seconds * rate)) / rate
    return (0.3 * np.sin(2 * np.pi * (200 + 50 * t) * t)).astype(np.float32)


@pytest.mark.skipif(not (find_spec("speechmos") and find_spec("onnxruntime")), reason="speechmos is not installed")
def test_dnsmos_is_its_model_with_its_polynomials_on_parts_of_nine_seconds(tmp_path, monkeypatch):
    import onnxruntime

    dnsmos = signals.Dnsmos()
    assert "speechmos" not in sys.modules
    session = onnxruntime.InferenceSession(str(dnsmos.file))

    def by_hand(samples):
        raw = session.run(None, {session.get_inputs()[0].name: samples[None]})[0][0]
        curves = (np.poly1d([-0.06766283, 1.11546468, 0.04602535]), np.poly1d([-0.08397278, 1.22083953, 0.0052439]))
        return float(curves[0](raw[2])), float(curves[1](raw[0]))

    short, long = tone(2.0), tone(12.0)
    repeated = np.concatenate([short] * 5)[:144_160]
    found = dnsmos(short, 16_000)
    assert (found["overall"], found["signal"]) == pytest.approx(by_hand(repeated), abs=1e-4)
    both = np.mean([by_hand(long[:144_160]), by_hand(long[-144_160:])], axis=0)
    found = dnsmos(long, 16_000)
    assert (found["overall"], found["signal"]) == pytest.approx(tuple(both), abs=1e-4)
    (tmp_path / "no.onnx").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"not DNSMOS's sig_bak_ovr\.onnx"):
        signals.Dnsmos(tmp_path / "no.onnx")
    with pytest.raises(ValueError, match="no such file"):
        signals.Dnsmos(tmp_path / "none.onnx")
    monkeypatch.setattr(signals, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install '\.\[scores\]', or give --dnsmos FILE"):
        signals.Dnsmos()


@pytest.mark.skipif(not find_spec("pocketsphinx"), reason="pocketsphinx is not installed")
def test_pocketsphinx_hears_16_bit_sound_at_16_khz_whatever_the_rate_was():
    import pocketsphinx
    import soxr

    hear = signals.Pocketsphinx()
    sound = np.random.default_rng(1).normal(0, 0.2, 24_000).astype(np.float32) * np.abs(np.sin(np.arange(24_000) / 900))
    decoder = pocketsphinx.Decoder(samprate=16_000, loglevel="FATAL")
    decoder.start_utt()
    resampled = np.clip(soxr.resample(sound.astype(np.float32), 24_000, 16_000), -1, 1)
    decoder.process_raw((resampled * 32767).astype("<i2").tobytes(), full_utt=True)
    decoder.end_utt()
    assert hear(sound, 24_000) == (decoder.hyp().hypstr if decoder.hyp() else "")
    with pytest.raises(ValueError, match=r"a waveform \(n,\), n > 0"):
        hear(np.zeros(0), 16_000)
