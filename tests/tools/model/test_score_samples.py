"""tools/score_samples.py: its figures against closed forms and the libraries they are named after, on a trained run."""

import io
import itertools
import json
import shutil
import sys
import tarfile

import jiwer
import numpy as np
import pytest
import safetensors.torch
import scipy.linalg
import soundfile
import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)

from mom_data.shards.format import ShardWriter, TokenSegment, write_manifest
from mom_tokenizers.bundle import Tokenizers
from mom_tokenizers.speech.units import SpeechTokenizer
from mom_tools.model import score_samples, scores
from tests.helpers.ranks import mom_train, program
from tests.helpers.tokenized import WORDS, tokenized_config, write_tokenizers
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

RATE = 16_000
DOCUMENTS = 12  # of each kind
LETTERS = "etaonihsrdlu"


def test_the_frechet_distance_of_commuting_covariances_has_a_closed_form():
    rng = np.random.default_rng(0)
    D, N = 6, 40
    axes, _ = np.linalg.qr(rng.normal(size=(D, D)))

    def features(mean_D, deviations_D):
        """(N, D) whose mean and covariance are exactly these."""
        white, _ = np.linalg.qr(rng.normal(size=(N, D + 1)) * np.array([0.0, *[1.0] * D]) + np.eye(1, D + 1))
        columns = white[:, 1:] - white[:, 1:].mean(axis=0)
        columns, _ = np.linalg.qr(columns)
        return columns * (N - 1) ** 0.5 * deviations_D @ axes.T + mean_D

    mean_x, mean_y, x, y = rng.normal(size=D), rng.normal(size=D), rng.uniform(0, 2, D), rng.uniform(0, 2, D)
    expected = ((mean_x - mean_y) ** 2).sum() + ((x - y) ** 2).sum()
    assert scores.frechet_distance(features(mean_x, x), features(mean_y, y)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("sizes", [(200, 300), (5, 200), (4, 3)], ids=["full rank", "one singular", "both singular"])
def test_the_frechet_distance_is_that_of_scipys_matrix_root(sizes):
    rng = np.random.default_rng(1)
    D = 8
    x, y = (rng.normal(size=(n, D)) @ rng.normal(size=(D, D)) + k for k, n in enumerate(sizes))
    root = scipy.linalg.sqrtm(np.cov(x.T) @ np.cov(y.T))
    means = ((x.mean(axis=0) - y.mean(axis=0)) ** 2).sum()
    expected = means + np.trace(np.cov(x.T)) + np.trace(np.cov(y.T)) - 2 * np.trace(root).real
    # the root of rounding errors is the root's own error where a covariance is singular
    assert scores.frechet_distance(x, y) == pytest.approx(expected, rel=1e-5 if min(sizes) < D else 1e-9)
    assert scores.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


def test_a_bootstrap_interval_is_that_of_the_normal_distribution_for_many_samples():
    rng = np.random.default_rng(0)
    values, counts = rng.normal(5, 2, 4000), rng.uniform(1, 3, 4000)
    low, high = scores.interval(values * counts, counts)
    ratio = (values * counts).sum() / counts.sum()
    deviation = np.sqrt(((counts * (values - ratio)) ** 2).sum()) / counts.sum()  # of a ratio, to first order
    assert (low, high) == pytest.approx((ratio - 1.96 * deviation, ratio + 1.96 * deviation), abs=0.3 * deviation)
    assert scores.interval(values[:1]) is None


def test_word_errors_add_up_to_jiwers_rate_and_normalisation_is_what_it_says():
    references = ["The model, reads!", "and draws pictures", "größer"]
    hypotheses = ["the Model reads", "and  two pictures more", ""]
    assert scores.word_errors(references, hypotheses).tolist() == [[0, 3], [2, 3], [1, 1]]
    errors, words = scores.word_errors(references, hypotheses).sum(axis=0)
    assert errors / words == jiwer.wer(["the model reads", *references[1:]], ["the model reads", *hypotheses[1:]])
    with pytest.raises(ValueError, match="no words"):
        scores.word_errors(["?!"], ["a"])


def write_clip(folder):
    """A random CLIP, with a tokenizer of WORDS."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
    )
    bpe.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=40
    ).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    size = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 1, "num_attention_heads": 4}
    specials = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    torch.manual_seed(3)
    CLIPModel(
        CLIPConfig(
            text_config={**size, **specials, "vocab_size": 300, "max_position_embeddings": 40},
            vision_config={**size, "image_size": 32, "patch_size": 8},
            projection_dim=24,
        )
    ).save_pretrained(folder)


def write_recogniser(folder):
    """A random Wav2Vec2 with a CTC head, which hears letters and spaces."""
    folder.mkdir()
    vocabulary = {"<pad>": 0, "<unk>": 1, "|": 2, **{letter: i + 3 for i, letter in enumerate(LETTERS)}}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    Wav2Vec2CTCTokenizer(str(folder / "vocab.json"), bos_token=None, eos_token=None).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(
        feature_size=1, sampling_rate=RATE, padding_value=0.0, do_normalize=True, return_attention_mask=False
    ).save_pretrained(folder)
    torch.manual_seed(0)
    model = Wav2Vec2ForCTC(
        Wav2Vec2Config(
            vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0,
            intermediate_size=16, conv_dim=(8, 8, 8), conv_stride=(5, 8, 8), conv_kernel=(10, 8, 8),
            num_feat_extract_layers=3, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
        )
    )  # fmt: skip
    with torch.no_grad():
        model.lm_head.bias[vocabulary["|"]] += 0.08  # spaces, so that the number of words depends on the sound
    model.save_pretrained(folder)


def write_whisper(folder):
    """A random Whisper of two languages. Returns the ids it begins with: start, English, transcribe, no times."""
    folder.mkdir()
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    names = ["endoftext", "startoftranscript", "en", "de", "translate", "transcribe", "notimestamps"]
    tokenizer = WhisperTokenizer(vocab=letters, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{name}|>" for name in names]})
    tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)
    end, start, english, german, translate, transcribe, plain = tokenizer.convert_tokens_to_ids(
        [f"<|{name}|>" for name in names]
    )
    ends = {"pad_token_id": end, "bos_token_id": end, "eos_token_id": end, "decoder_start_token_id": start}
    torch.manual_seed(2)
    WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=len(tokenizer), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_target_positions=40, init_std=0.5,
            suppress_tokens=None, begin_suppress_tokens=None, **ends,
        )
    ).save_pretrained(folder)  # fmt: skip
    generation = {
        **ends, "is_multilingual": True, "lang_to_id": {"<|en|>": english, "<|de|>": german}, "max_length": 30,
        "task_to_id": {"transcribe": transcribe, "translate": translate}, "no_timestamps_token_id": plain,
    }  # fmt: skip
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return [start, english, transcribe, plain]


def recording(rng):
    """(waveform, rate): half a second to a second of a tone that moves."""
    seconds = np.arange(int(rng.uniform(0.5, 1) * RATE)) / RATE
    tone = 0.4 * np.sin(2 * np.pi * (rng.uniform(200, 900) * seconds + rng.uniform(0, 400) * seconds**2))
    return (tone + 0.01 * rng.normal(size=len(seconds))).astype(np.float32), RATE


def as_bytes(value):
    out = io.BytesIO()
    if isinstance(value, tuple):
        soundfile.write(out, value[0], value[1], format="WAV", subtype="FLOAT")
    else:
        value.save(out, "PNG")
    return out.getvalue()


def write_documents(folder, raw, tokenizers, seed):
    """Write token shards of captioned pictures and read texts, and RAW with the documents they were made from, except
    the first of each kind. Returns {kind: [(text, picture or recording)]}."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    made = {"image": [], "speech": []}
    with ShardWriter(folder / "part-00000.tar", tokenizers.modalities) as writer, tarfile.open(raw, "w") as tar:
        for d in range(DOCUMENTS):
            for kind, ending in (("image", "png"), ("speech", "wav")):
                text = " ".join(rng.choice(WORDS[:10], rng.integers(2, 6)))
                pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                value = Image.fromarray(pixels) if kind == "image" else recording(rng)
                segments = [
                    TokenSegment(0, tokenizers.encode("text", text).astype(np.uint16)),
                    TokenSegment(tokenizers.modalities.index(kind), tokenizers.encode(kind, as_bytes(value))),
                ]
                writer.add(f"{kind}-{d}", segments[:: 1 - 2 * (d % 2)])
                made[kind].append((text, value))
                for suffix, content in (("txt", text.encode()), (ending, as_bytes(value))) if d else ():
                    member = tarfile.TarInfo(f"{kind}-{d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        writer.add("page", [TokenSegment(0, np.arange(5, dtype=np.uint16))])
    write_manifest(folder, [writer.record()], tokenizers.describe(), np.uint16, {})
    return made


def test_a_whisper_is_heard_out_greedily_in_the_language_that_is_said(tmp_path):
    ids = write_whisper(tmp_path / "whisper")
    waveform, rate = recording(np.random.default_rng(3))
    heard = scores.Recogniser(tmp_path / "whisper", "cpu", "english")(waveform, rate)
    model = WhisperForConditionalGeneration.from_pretrained(tmp_path / "whisper").eval()
    hear = WhisperFeatureExtractor.from_pretrained(tmp_path / "whisper")
    sound = hear(waveform, sampling_rate=rate, return_tensors="pt").input_features
    while len(ids) < 24:
        with torch.inference_mode():
            ids.append(int(model(sound, decoder_input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    expected = WhisperTokenizer.from_pretrained(tmp_path / "whisper").decode(ids, skip_special_tokens=True)
    assert len(set(expected)) > 2
    assert heard.startswith(expected)
    with pytest.raises(ValueError, match="Unsupported language: klingon"):
        scores.Recogniser(tmp_path / "whisper", "cpu", "klingon")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """(folder, tokenizers, documents) of a run that reads text, pictures and speech, with models beside it that judge
    samples."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "tokenizers").mkdir()
    path = write_tokenizers(folder / "tokenizers")
    rng = np.random.default_rng(1)
    SpeechTokenizer.train([recording(rng) for _ in range(12)], 20).save(folder / "tokenizers" / "speech")
    path.write_text(path.read_text() + "speech: {kind: units, path: speech}\n")
    tokenizers = Tokenizers.load(path)
    write_documents(folder / "train", folder / "train.tar", tokenizers, 7)
    made = write_documents(folder / "val", folder / "raw.tar", tokenizers, 8)
    described = tokenizers.describe()
    vocabulary = {name: described[name]["size"] for name in tokenizers.modalities}
    config = tokenized_config(folder, vocabulary=vocabulary, training={"steps": 3, "batch": 4, "micro_batch": 2})
    (folder / "config.yaml").write_text(config.to_yaml())
    code, said = mom_train(folder / "config.yaml")
    assert code == 0, said
    write_clip(folder / "clip")
    write_recogniser(folder / "asr")
    return folder, tokenizers, made


def call(*line, code=0):
    done = program("tools/score_samples.py", *line)
    assert done.returncode == code, done.stderr[-3000:]
    return done.stdout + done.stderr


def clip_score(folder, pictures, texts):
    """The CLIP score by the logits of CLIPModel itself."""
    tokenizer, look = PreTrainedTokenizerFast.from_pretrained(folder), CLIPImageProcessor.from_pretrained(folder)
    read = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
    inputs = {name: read[name] for name in ("input_ids", "attention_mask")} | look(
        images=list(pictures), return_tensors="pt"
    )
    model = CLIPModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        logits_NN = model(**inputs).logits_per_image / model.logit_scale.exp()
    return 100 * logits_NN.diag().clamp(min=0).mean().item()


def frechet(folder, pictures, others):
    model, look = CLIPModel.from_pretrained(folder).eval(), CLIPImageProcessor.from_pretrained(folder)
    with torch.inference_mode():
        states = [
            model.vision_model(**look(images=list(p), return_tensors="pt")).pooler_output for p in (pictures, others)
        ]
        return scores.frechet_distance(*(model.visual_projection(state).numpy() for state in states))


def word_error_rate(folder, recordings, texts):
    """The word error rate by the likeliest letter of every frame, where repeats and blanks are left out."""
    model, hear = Wav2Vec2ForCTC.from_pretrained(folder).eval(), Wav2Vec2FeatureExtractor.from_pretrained(folder)
    letter = {i: token for token, i in json.loads((folder / "vocab.json").read_text()).items()}
    heard = []
    for waveform, rate in recordings:
        assert rate == RATE
        with torch.inference_mode():
            ids = model(**hear(waveform, sampling_rate=rate, return_tensors="pt")).logits[0].argmax(-1).tolist()
        heard.append("".join(letter[i] for i, _ in itertools.groupby(ids) if i).replace("|", " "))
    steps = [jiwer.ToLowerCase(), jiwer.RemovePunctuation(), jiwer.RemoveMultipleSpaces(), jiwer.Strip()]
    words = jiwer.Compose([*steps, jiwer.ReduceToListOfListOfWords()])
    return 100 * jiwer.wer(list(texts), heard, reference_transform=words, hypothesis_transform=words)


def test_a_run_is_scored_and_its_samples_are_made_once(place):
    folder, tokenizers, made = place
    out = folder / "out"
    line = [folder / "run", "--shards", folder / "val", "--clip", folder / "clip", "--vision", folder / "clip",
            "--asr", folder / "asr", "--denoising-steps", 2, "--seconds", 2, "--out", out]  # fmt: skip
    assert "is done" in call(*line, "--part", "1/2")
    first = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in sorted(out.rglob("part-*"))}
    assert [len(list(out.glob(pattern))) for pattern in ("image/*.png", "speech/*.wav")] == [6, 6]
    removed = next(file for file in first if file.suffix == ".png")
    removed.unlink()
    said = call(*line, "--raw", folder / "raw.tar", "--json", folder / "out.json")
    for file, (time, content) in first.items():
        assert file.read_bytes() == content  # one that has to be made again has the same draws
        assert (file.stat().st_mtime_ns == time) == (file.stem != removed.stem)

    figures = json.loads((folder / "out.json").read_text())
    found = {(one["figure"], one["of"]): one for one in figures["scores"]}
    assert all(f"{one['value']:.4g}" in said for one in found.values())
    assert "singular covariance" in said
    assert "FID only where features are Inception's" in said
    assert figures["models"]["clip"]["sha256"].keys() >= {"config.json", "model.safetensors"}

    def expect(figure, of, value, n):
        assert found[figure, of]["value"] == pytest.approx(value, rel=1e-4)
        assert found[figure, of]["n"] == n
        if bounds := found[figure, of]["interval"]:
            assert bounds[0] <= value <= bounds[1]

    def values_of(kind):
        """Texts, samples, what the tokenizer makes of the real ones, and these."""
        texts, real = zip(*made[kind], strict=True)
        places = [2 * d + (kind == "speech") for d in range(DOCUMENTS)]
        read = Image.open if kind == "image" else lambda file: soundfile.read(file, dtype="float32")
        samples = [read(out / kind / f"part-00000-{i}.{'png' if kind == 'image' else 'wav'}") for i in places]
        tokenizer = tokenizers.tokenizer(kind)
        return texts, samples, [tokenizer.decode(tokenizer.encode(value)) for value in real], real

    texts, samples, decoded, real = values_of("image")
    judge = folder / "clip"
    expect("CLIP score", "samples", clip_score(judge, samples, texts), 12)
    expect("CLIP score", "decoded", clip_score(judge, decoded, texts), 12)
    expect("CLIP score", "originals", clip_score(judge, real[1:], texts[1:]), 11)
    assert found["CLIP score", "decoded, texts shuffled: floor"]["n"] == 12
    distance = "Fréchet distance, features of clip"
    expect(distance, "samples, decoded", frechet(judge, samples, decoded), 12)
    expect(distance, "samples, originals", frechet(judge, samples[1:], real[1:]), 11)
    expect(distance, "decoded, originals: tokenizer's ceiling", frechet(judge, decoded[1:], real[1:]), 11)
    texts, samples, decoded, real = values_of("speech")
    judge, rate = folder / "asr", "word error rate, %"
    expect(rate, "samples", word_error_rate(judge, samples, texts), 12)
    expect(rate, "decoded", word_error_rate(judge, decoded, texts), 12)
    expect(rate, "originals", word_error_rate(judge, real[1:], texts[1:]), 11)
    assert len({one["value"] for one in found.values()}) == len(found)

    assert "another seed: give another --out" in call(*line, "--seed", 1, code=2)


def test_what_cannot_be_scored_is_said(place, tmp_path, monkeypatch, capsys):
    folder, _, _ = place

    def says(*more):
        line = [folder / "run", "--shards", folder / "val", "--out", tmp_path / "out", *more]
        monkeypatch.setattr(sys, "argv", ["score_samples", *map(str, line)])
        with pytest.raises(SystemExit) as end:
            score_samples.main()
        assert end.value.code == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    assert "give a model" in says()
    assert "--round-trip compares with the originals: give --raw" in says("--round-trip")
    assert "not DNSMOS's sig_bak_ovr.onnx" in says("--dnsmos", folder / "raw.tar")
    assert "no config.json there" in says("--vision", tmp_path)
    seeing = tmp_path / "seeing"
    CLIPVisionModel.from_pretrained(folder / "clip").save_pretrained(seeing)
    assert "no AutoImageProcessor to be had" in says("--vision", seeing)
    shutil.copy(folder / "clip" / "preprocessor_config.json", seeing)
    assert "reads no texts" in says("--clip", seeing)
    assert "--part 2/2" in says("--clip", folder / "clip", "--part", "2/2")
    pickled = tmp_path / "pickled"
    shutil.copytree(folder / "clip", pickled)
    weights = safetensors.torch.load_file(pickled / "model.safetensors")
    (pickled / "model.safetensors").unlink()
    torch.save(weights, pickled / "pytorch_model.bin")
    assert "safetensors" in says("--clip", pickled)
    del weights["visual_projection.weight"]
    safetensors.torch.save_file(weights, pickled / "model.safetensors", {"format": "pt"})
    assert "lack 1 tensors" in says("--clip", pickled)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "jiwer", None)
        assert "pip install '.[scores]'" in says("--clip", folder / "clip")
    assert "none of the 12 documents" in says("--asr", folder / "asr", "--raw", folder / "train.tar")
