import numpy as np
import pytest

from mom_tokenizers.vocab import VocabLayout

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
