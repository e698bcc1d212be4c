import json
import os
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mom_tokenizers.text import TextTokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog. " * 3,
    "Ein Brötchen kostet 40 Cent.",
    "def f(x):\n    return x",
] * 20
TOKENIZER = TextTokenizer.train(CORPUS, 400)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back_exactly(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_ids_are_uint32_and_below_size():
    ids = TOKENIZER.encode(CORPUS[0])
    assert ids.dtype == np.uint32
    assert 0 < ids.max() < TOKENIZER.size <= 400
    assert len(ids) < len(CORPUS[0]) / 2


def test_batch_equals_one_by_one():
    for one, batched in zip(CORPUS[:3], TOKENIZER.encode_batch(CORPUS[:3]), strict=True):
        np.testing.assert_array_equal(TOKENIZER.encode(one), batched)
    assert TOKENIZER.encode_batch([]) == []


def test_training_is_deterministic():
    assert TextTokenizer.train(CORPUS, 400).fingerprint() == TOKENIZER.fingerprint()
    assert TextTokenizer.train(CORPUS, 300).fingerprint() != TOKENIZER.fingerprint()


def test_save_and_load_keep_ids_and_fingerprint(tmp_path):
    TOKENIZER.save(tmp_path / "a")
    for path in (tmp_path / "a", tmp_path / "a" / "tokenizer.json"):
        loaded = TextTokenizer.load(path)
        np.testing.assert_array_equal(loaded.encode(CORPUS[0]), TOKENIZER.encode(CORPUS[0]))
        assert loaded.fingerprint() == TOKENIZER.fingerprint()
    loaded.save(tmp_path / "b")
    assert TextTokenizer.load(tmp_path / "b").fingerprint() == TOKENIZER.fingerprint()


def test_foreign_tokenizer_adds_no_specials_and_does_not_truncate(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    foreign = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    foreign.pre_tokenizer = pre_tokenizers.Whitespace()
    foreign.add_special_tokens(["[CLS]"])
    foreign.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    foreign.enable_truncation(3)
    foreign.save(str(tmp_path / "tokenizer.json"))
    loaded = TextTokenizer.load(tmp_path)
    assert loaded.size == 3
    assert loaded.encode("a a b a a").tolist() == [0, 0, 1, 0, 0]


def gpt2_folder(path):
    """vocab.json and merges.txt, as GPT-2's model folders have them, and no tokenizer.json."""
    path.mkdir()
    TOKENIZER.save(path)
    model = json.loads((path / "tokenizer.json").read_text())["model"]
    (path / "tokenizer.json").unlink()
    end = {"<|endoftext|>": len(model["vocab"])}
    (path / "vocab.json").write_text(json.dumps(model["vocab"] | end))
    (path / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in model["merges"]))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", **dict.fromkeys(["bos_token", "eos_token", "unk_token"], *end)})
    )
    return path


def llama_folder(path):
    """A tokenizer.json of Llama's make: spaces as U+2581, one put in front, unknown characters as bytes."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"abcdehlortw", "ll", "he"]
    merges = [("l", "l"), ("h", "e")]
    tokenizer = Tokenizer(
        models.BPE({w: i for i, w in enumerate(words)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(Regex(" "), "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(w, special=True) for w in words[:3]])
    path.mkdir()
    tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    root = tmp_path_factory.mktemp("foreign")
    return {"gpt2": gpt2_folder(root / "gpt2"), "llama": llama_folder(root / "llama")}


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_text_comes_back_exactly_from_foreign_tokenizers_special_names_too(foreign, name, data):
    tokenizer = _loaded(str(foreign[name]))
    pieces = st.one_of(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")),
        st.sampled_from(["<s>", "</s>", "<unk>", "<|endoftext|>", " ", "\ufeff", "\u200b", "\x00", "e\u0301", "\r\n"]),
    )
    text = "".join(data.draw(st.lists(pieces, max_size=6)))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    # a document cannot write a control token
    control = {0, 1, 2} if name == "llama" else {tokenizer.size - 1}
    assert control.isdisjoint(ids.tolist())
    # and its bytes add up, besides the space that Llama's puts before a text
    front = 1 if name == "llama" and text else 0
    sizes = _sizes(str(foreign[name]))
    assert sizes[ids].sum() == len(text.encode()) + front
    assert not sizes[list(control)].any()


@lru_cache
def _loaded(folder):
    return TextTokenizer.load(folder)


@lru_cache
def _sizes(folder):
    return _loaded(folder).bytes_of_id()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_foreign_tokenizers_save_load_and_batch(foreign, name, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = TextTokenizer.load(foreign[name])
    tokenizer.save(tmp_path / "copy")
    again = TextTokenizer.load(tmp_path / "copy")
    texts = ["hello world, held to the letter", "", "  two spaces", "Brötchen \U0001f35e"]
    for one, batched in zip(texts, again.encode_batch(texts), strict=True):
        np.testing.assert_array_equal(tokenizer.encode(one), batched)
    assert tokenizer.fingerprint() == again.fingerprint()
    assert TextTokenizer.stored_size(foreign[name]) == tokenizer.size
    if name == "gpt2":  # what Transformers itself makes of the folder
        reference = AutoTokenizer.from_pretrained(str(foreign[name]))
        assert tokenizer.encode(texts[0]).tolist() == reference(texts[0], add_special_tokens=False)["input_ids"]
        merges = tmp_path / "copy" / "merges.txt"
        merges.write_text("\n".join(merges.read_text().splitlines()[:-5]) + "\n")
        assert TextTokenizer.load(tmp_path / "copy").fingerprint() != tokenizer.fingerprint()


def test_a_hub_name_is_taken_from_the_hubs_cache(foreign, tmp_path):
    """As the hub's client leaves it after a download; without the network the same call then finds it."""
    repository = tmp_path / "models--owner--tiny"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copy(foreign["llama"] / "tokenizer.json", snapshot)
    (tmp_path / "t.yaml").write_text("text: {kind: bpe, path: 'hf://owner/tiny'}")
    code = (
        "from mom_tokenizers.bundle import Tokenizers\n"
        f"b = Tokenizers.load({str(tmp_path / 't.yaml')!r})\n"
        "print(b.describe()['text']['fingerprint'], b.tokenizer('text').fingerprint())\n"
        f"open({str(tmp_path / 'u.yaml')!r}, 'w').write(\"text: {{kind: bpe, path: 'hf://owner/absent'}}\")\n"
        f"try: Tokenizers.load({str(tmp_path / 'u.yaml')!r})\n"
        "except ValueError as error: print(error)\n"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    expected = TextTokenizer.load(foreign["llama"]).fingerprint()
    found, absent = done.stdout.split("\n", 1)
    assert found == f"{expected} {expected}"
    assert "hf://owner/absent: not to be had from the Hugging Face hub, nor from its cache" in absent


def test_code_in_a_tokenizer_folder_is_never_run(tmp_path):
    (tmp_path / "custom.py").write_text("import pathlib; pathlib.Path(__file__).with_name('ran').touch()")
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Custom", "auto_map": {"AutoTokenizer": ["custom.Custom", "custom.Custom"]}})
    )
    with pytest.raises(ValueError, match="Transformers finds no tokenizer"):
        TextTokenizer.load(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_mistakes_are_explained(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        TextTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"no": "tokenizer"}))
    with pytest.raises(ValueError, match="not a Hugging Face"):
        TextTokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="every byte"):
        TextTokenizer.train(CORPUS, 100)
    with pytest.raises(ValueError, match="Unicode"):
        TOKENIZER.encode("a\ud800")


def test_hugging_face_tokenizers_is_not_shadowed_by_the_checkout():
    checkout = Path(__file__).parents[2]
    code = "import os, tokenizers, transformers; print(os.path.dirname(tokenizers.__file__)); tokenizers.Tokenizer"
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stdout.startswith(str(checkout / "tokenizers"))
