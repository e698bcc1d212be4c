import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mom_tokenizers.vocab import VocabLayout, chameleon_layout, read_vocabulary

SIZES = {"text": 100, "image": 32, "speech": 10}


def test_every_id_belongs_to_one_span_in_the_documented_order():
    layout = VocabLayout(SIZES)
    # by hand: 100 text, 8 specials, 32 codes, 10 units = 150 ids, 192 rows
    owners = ["text"] * 100 + ["special"] * 8 + ["image"] * 32 + ["speech"] * 10 + ["padding"] * 42
    assert layout.offsets == {m: owners.index(m) for m in SIZES}
    assert sorted(layout.specials.values()) == [i for i, o in enumerate(owners) if o == "special"]
    assert (layout.used, layout.size) == (150, len(owners))
    expected = [{"image": 1, "speech": 2}.get(o, 0) for o in owners]
    np.testing.assert_array_equal(layout.modality_of_id, expected)


def test_chameleon_preset_fills_65536_with_image_and_speech_inside():
    layout = VocabLayout({"text": 65_536 - 8 - 8192 - 500, "image": 8192, "speech": 500})
    assert layout.used == layout.size == 65_536


def test_size_is_a_multiple_of_64_and_not_padded_without_need():
    for text in range(1, 140):
        layout = VocabLayout({"text": text})
        assert layout.size % 64 == 0
        assert 0 <= layout.size - layout.used < 64


def test_a_further_modality_gets_brackets_of_its_own():
    layout = VocabLayout({**SIZES, "video": 7})
    assert len({*layout.brackets("image"), *layout.brackets("speech"), *layout.brackets("video")}) == 6
    assert len(set(layout.specials.values())) == len(layout.specials)
    assert layout.modality_of_id[layout.offsets["video"] + 6] == 3


def test_save_and_load_give_the_same_layout(tmp_path):
    layout = VocabLayout(SIZES)
    layout.save(tmp_path / "vocab.json")
    assert VocabLayout.load(tmp_path / "vocab.json") == layout


@pytest.mark.parametrize("sizes", [{}, {"image": 4, "text": 5}, {"text": 5, "image": 0}])
def test_sizes_that_cannot_be_laid_out_are_refused(sizes):
    with pytest.raises(ValueError, match="vocabulary"):
        VocabLayout(sizes)


@st.composite
def layouts(draw):
    """Layouts of a text some of whose ids are drawn at random for codes and specials, with a further modality behind
    it."""
    text = draw(st.integers(20, 200))
    free = draw(st.permutations(range(text)))
    image, placed = draw(st.integers(1, 10)), draw(st.integers(0, 8))
    names = draw(st.permutations(["bos", "eos", "pad", "boi", "eoi", "bosp", "eosp", "null"]))[:placed]
    sizes = {"text": text, "image": image, "speech": draw(st.integers(1, 30))}
    return VocabLayout(sizes, {"image": free[:image]}, dict(zip(names, free[image:], strict=False)))


@settings(max_examples=100, deadline=None)
@given(layouts())
def test_in_a_mapped_layout_every_id_has_one_owner_and_codes_come_back(layout):
    owners: dict[int, object] = {}
    for modality, size in layout.sizes[1:]:
        for code, id_ in enumerate(layout.ids(modality, np.arange(size, dtype=np.uint16))):
            assert owners.setdefault(int(id_), (modality, code)) == (modality, code)
            assert layout.modality_of_id[id_] == layout.modalities.index(modality)
        ids = layout.ids(modality, np.arange(size)[::-1])
        assert ids.dtype == np.int64
        np.testing.assert_array_equal(layout.codes(modality, ids), np.arange(size)[::-1])
    for special, id_ in layout.specials.items():
        assert owners.setdefault(id_, special) == special
        assert layout.modality_of_id[id_] == 0
    text = dict(layout.sizes)["text"]
    assert set(owners) | set(range(text)) == set(range(layout.used))
    assert (layout.modality_of_id != 0).sum() == sum(size for _, size in layout.sizes[1:])
    assert layout.offsets.keys() == {"text", "speech"}


@settings(max_examples=30, deadline=None)
@given(layouts())
def test_a_mapped_layout_survives_its_file(tmp_path_factory, layout):
    path = tmp_path_factory.mktemp("layout") / "layout.json"
    layout.save(path)
    assert VocabLayout.of(path) == VocabLayout.load(path) == layout
    assert VocabLayout.of(str(path)).specials == layout.specials


def test_a_layout_without_tables_adds_offsets_and_reads_files_of_before(tmp_path):
    layout = VocabLayout.of(SIZES)
    codes = np.array([0, 31, 4], np.uint16)
    np.testing.assert_array_equal(layout.ids("image", codes), codes.astype(np.int64) + layout.offsets["image"])
    np.testing.assert_array_equal(layout.codes("image", layout.ids("image", codes)), codes)
    (tmp_path / "old.json").write_text(json.dumps({"sizes": SIZES, "specials": layout.specials, "size": layout.size}))
    assert VocabLayout.load(tmp_path / "old.json") == layout


@pytest.mark.parametrize(
    ("mapped", "placed", "message"),
    [
        ({"image": [3, 4, 3]}, {}, "code 2 of 'image' has id 3, which is also that of code 0 of 'image'"),
        ({"image": [3, 4, 5]}, {"bos": 4}, "special 'bos' has id 4, which is also that of code 1"),
        ({"image": [3, 4, 5]}, {"bos": 6, "eos": 6}, "special 'eos' has id 6"),
        ({"image": [3, 4, 100]}, {}, "code 2 of 'image' has id 100, outside the text's 100 ids"),
        ({"image": [3, 4, -1]}, {}, "id -1, outside"),
        ({"image": [3, 4, "5"]}, {}, "id '5', outside"),
        ({"image": [3, 4]}, {}, "'image' has size 3, but its table has 2 ids"),
        ({"video": [3]}, {}, "'video' is mapped, but"),
        ({"text": list(range(100))}, {}, "'text' is mapped, but"),
        ({}, {"begin": 4}, "no special is named 'begin'"),
    ],
)
def test_tables_that_clash_are_refused_by_name(mapped, placed, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        VocabLayout({"text": 100, "image": 3}, mapped, placed)
    path = tmp_path / "layout.json"
    path.write_text(json.dumps({"sizes": {"text": 100, "image": 3}, "mapped": mapped, "placed": placed}))
    with pytest.raises(ValueError, match=rf"layout\.json: .*{message}"):
        VocabLayout.load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("{", "not JSON"),
        ("[1]", "JSON object"),
        ("{}", "'sizes'"),
        ('{"sizes": [1]}', "mapping"),
        ('{"sizes": {"text": "many"}}', "must be a number"),
    ],
)
def test_files_that_are_no_layout_are_refused_by_name(content, message, tmp_path):
    path = tmp_path / "layout.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=rf"layout\.json: .*{message}"):
        VocabLayout.load(path)


def chameleon_vocabulary(codes=300, words=40):
    """Token -> id, shuffled, in the published naming: digits as letters, Z behind."""
    letters = "ABCDEFGHIJ"
    tokens = ["IMGIMG" + "".join(letters[int(digit)] for digit in str(code)) + "Z" for code in range(codes)]
    tokens += ["<s>", "</s>", "<pad>", "<racm3:break>", "<eoss>", *(f"<reserved{n:05}>" for n in range(8700, 8710))]
    tokens += [f"word{n}" for n in range(words)] + ["IMGIMG", "IMGIMGKZ", "<reserved>"]
    order = np.random.default_rng(0).permutation(len(tokens))
    return {tokens[i]: id_ for id_, i in enumerate(order)}


def test_chameleons_names_become_a_table():
    vocabulary = chameleon_vocabulary()
    layout = chameleon_layout(vocabulary)
    # by hand
    for code, token in [(0, "IMGIMGAZ"), (7, "IMGIMGHZ"), (10, "IMGIMGBAZ"), (299, "IMGIMGCJJZ")]:
        assert layout.ids("image", np.array([code]))[0] == vocabulary[token]
        assert layout.codes("image", np.array([vocabulary[token]]))[0] == code
    specials = {"bos": "<s>", "eos": "</s>", "pad": "<pad>", "boi": "<racm3:break>", "eoi": "<eoss>"}
    # the highest reserved ones that mean nothing: 08706 ends turns, 08707 stands for pictures
    specials |= {"null": "<reserved08705>", "eosp": "<reserved08708>", "bosp": "<reserved08709>"}
    assert layout.specials == {name: vocabulary[token] for name, token in specials.items()}
    assert layout.brackets("image") == (vocabulary["<racm3:break>"], vocabulary["<eoss>"])
    assert layout.used == len(vocabulary)
    assert layout.modality_of_id[vocabulary["IMGIMGKZ"]] == layout.modality_of_id[vocabulary["word3"]] == 0


def test_further_modalities_and_specials_without_a_token_stand_behind_chameleons():
    vocabulary = {t: i for i, t in enumerate(t for t in chameleon_vocabulary() if not t.startswith("<reserved"))}
    layout = chameleon_layout(vocabulary, {"null": "word4"}, {"speech": 20})
    n = len(vocabulary)
    assert layout.specials["null"] == vocabulary["word4"]
    assert {layout.specials["bosp"], layout.specials["eosp"]} == {n, n + 1}
    assert layout.offsets["speech"] == n + 2
    assert layout.used == n + 22


def test_vocabularies_that_are_not_chameleons_are_refused():
    whole = chameleon_vocabulary()
    for change, message in [
        ({t: i for t, i in whole.items() if "IMGIMG" not in t}, "no image codes"),
        ({t: i for t, i in whole.items() if t != "IMGIMGBAZ"}, "code 10 has no token"),
        ({t: i for t, i in whole.items() if t != "<eoss>"}, "special 'eoi' is to be the token '<eoss>'"),
    ]:
        with pytest.raises(ValueError, match=message):
            chameleon_layout(change)


def test_a_vocabulary_is_read_from_the_files_that_people_have(tmp_path):
    from tokenizers import AddedToken, Tokenizer, models

    vocabulary = chameleon_vocabulary()
    words = {token: id_ for token, id_ in vocabulary.items() if token != max(vocabulary, key=vocabulary.get)}
    tokenizer = Tokenizer(models.BPE(words, []))
    tokenizer.add_special_tokens([AddedToken(max(vocabulary, key=vocabulary.get))])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    assert read_vocabulary(tmp_path / "tokenizer.json") == read_vocabulary(tmp_path / "vocab.json") == vocabulary
    for content in ("{}", '{"model": {}}', '{"a": "b"}'):
        (tmp_path / "wrong.json").write_text(content)
        with pytest.raises(ValueError, match=r"wrong\.json: no vocabulary"):
            read_vocabulary(tmp_path / "wrong.json")
