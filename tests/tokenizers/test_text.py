import json
import os
import shutil
import subprocess
import sys
import unittest.mock
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mom_tokenizers.text as text_module
from mom_tokenizers.text import TextTokenizer
from tests.helpers import CHECKOUT

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
    """A folder with vocab.json and merges.txt, as GPT-2's has them, and no tokenizer.json."""
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
    """A folder with a tokenizer.json of the kind of Llama's: a space is U+2581, one is put in front, and unknown
    characters become bytes."""
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


NAMES = ["<s>", "</s>", "<pad>", "<racm3:break>", "<eoss>", "<reserved00007>", "IMGIMGDZ", "IMGIMGBCZ"]


def chameleon_like(style):
    """A tokenizer whose first ids are those of NAMES, as differently as files declare them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*NAMES, *alphabet]
    vocabulary = {word: id_ for id_, word in enumerate(words)}
    if style == "merges":  # a vocabulary that was trained on texts with such names in them
        steps = [("<", "s"), ("<s", ">"), ("<", "/"), ("</", "s"), ("</s", ">")]
        for step in steps:
            vocabulary.setdefault("".join(step), len(vocabulary))
        tokenizer = Tokenizer(models.BPE(vocabulary, steps))
    elif style == "unigram":
        tokenizer = Tokenizer(models.Unigram([("<unk>", -9.0), *((word, -1.0) for word in words)], unk_id=0))
    elif style == "word level":
        tokenizer = Tokenizer(models.WordLevel({**vocabulary, "?": len(vocabulary)}, unk_token="?"))
    else:
        tokenizer = Tokenizer(models.BPE(vocabulary, [], ignore_merges=style == "ignore_merges"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if style == "word level":
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.ByteLevel()
    if style in ("special", "not special"):
        tokens = [AddedToken(name, special=style == "special", normalized=False) for name in NAMES]
        (tokenizer.add_special_tokens if style == "special" else tokenizer.add_tokens)(tokens)
    tokenizer.add_tokens([AddedToken("covid", special=False)])  # a word that somebody added is a word
    return TextTokenizer(tokenizer)


@pytest.mark.parametrize(
    "style", ["special", "not special", "vocabulary", "ignore_merges", "merges", "unigram", "word level"]
)
def test_no_text_becomes_the_id_of_a_control_token_however_the_file_declares_it(style):
    tokenizer = chameleon_like(style)
    control = {id_ for name, id_ in tokenizer._tokenizer.get_vocab().items() if name in NAMES}
    assert len(control) == len(NAMES)
    for name in NAMES:
        for text in (name, f"a {name} b", f"\n{name}", f"{name}{name}", f"({name})", f"{name} covid"):
            ids = tokenizer.encode(text)
            assert control.isdisjoint(ids.tolist()), text
            if style != "word level":
                assert tokenizer.decode(ids) == text
    added = tokenizer._tokenizer.token_to_id("covid")
    assert tokenizer.encode("a covid b").tolist().count(added) == 1


def split_by(pattern):
    """The small tokenizer, which cuts texts by the pattern of another model. A pair of spaces is a token, as in
    GPT-NeoX's."""
    from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers

    tokenizer = Tokenizer.from_str(TOKENIZER._tokenizer.to_str())
    if pattern is not None:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        )
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens([AddedToken("  ", normalized=False)])
    return TextTokenizer(tokenizer)


@pytest.mark.parametrize("pattern", [None, *text_module._PATTERNS])
@settings(max_examples=150, deadline=None)
@given(
    text=st.text(
        st.one_of(st.sampled_from("ab é\n\u0301'sS.,。1 \t\r\u1df5"), st.characters(exclude_categories=["Cs"]))
    )
)
def test_a_long_text_in_chunks_has_the_ids_that_it_has_whole(pattern, text):
    tokenizer = _split_by(pattern)
    assert tokenizer._divisible
    for size in (1, 5):
        with unittest.mock.patch.object(text_module, "CHUNK", size):
            assert tokenizer.encode(text).tolist() == tokenizer._encode(text).tolist()
            assert "".join(text_module._chunks(text)) == text
    with unittest.mock.patch.object(text_module, "CHUNK", 1):
        assert len(list(text_module._chunks("one two, three"))) == 3


@pytest.mark.parametrize("change", ["prefix", "strips", "spans", "pattern", "dropout"])
def test_a_tokenizer_whose_chunks_could_differ_encodes_a_long_text_whole(change):
    from tokenizers import AddedToken, Regex, Tokenizer, pre_tokenizers

    tokenizer = Tokenizer.from_str(TOKENIZER._tokenizer.to_str())
    if change == "prefix":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif change == "pattern":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(".{10}"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        )
    elif change == "dropout":
        tokenizer.model.dropout = 0.5
    else:
        tokenizer.add_tokens([AddedToken("New York" if change == "spans" else "x", rstrip=change == "strips")])
    assert not TextTokenizer(tokenizer)._divisible


def test_a_long_text_takes_less_than_20_bytes_of_memory_for_each_character(tmp_path):
    TOKENIZER.save(tmp_path)
    code = (
        "import resource, sys; from mom_tokenizers.text import TextTokenizer\n"
        "tokenizer = TextTokenizer.load(sys.argv[1])\n"
        "text = 'So 12 quick, brown foxes! ' * 80_000\n"
        "tokenizer.encode(text[:200_000])\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "tokenizer.encode(text)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / len(text))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 19  # and 1 for the text itself


@lru_cache
def _split_by(pattern):
    return split_by(pattern)


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
    checkout = CHECKOUT
    code = "import os, tokenizers, transformers; print(os.path.dirname(tokenizers.__file__)); tokenizers.Tokenizer"
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stdout.startswith(str(checkout / "tokenizers"))
