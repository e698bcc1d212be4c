import json
import subprocess
import sys
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
