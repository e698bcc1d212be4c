import json
import subprocess
import sys

import numpy as np
import pytest

from mom_tokenizers.text import TextTokenizer
from mom_tokenizers.vocab import VocabLayout
from tests.helpers import CHECKOUT

TOOL = CHECKOUT / "tools" / "map_vocabulary.py"
TEXTS = ["a dog and a cat and a dog with IMGIMG in its name"] * 9


def run(*arguments):
    return subprocess.run([sys.executable, TOOL, *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory):
    """A trained BPE whose vocabulary also has image codes and specials, out of order, as Chameleon's has."""
    from tokenizers import AddedToken, Tokenizer

    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    TextTokenizer.train(TEXTS, 300).save(path.parent)
    tokenizer = Tokenizer.from_file(str(path))
    codes = ["IMGIMG" + "".join("ABCDEFGHIJ"[int(d)] for d in str(code)) + "Z" for code in range(120)]
    specials = ["<s>", "</s>", "<pad>", "<racm3:break>", "<eoss>", "<reserved00001>"]
    order = np.random.default_rng(0).permutation(126)
    tokenizer.add_special_tokens([AddedToken([*codes, *specials][i], special=True) for i in order])
    tokenizer.save(str(path))
    return path


def test_the_layout_joins_text_and_codes_in_one_vocabulary(tokenizer_json, tmp_path):
    output = tmp_path / "layout.json"
    done = run(
        tokenizer_json, "--output", output, "--further", "speech=20", "--special", "null=<reserved00001>", "--json"
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    layout, text = VocabLayout.of(output), TextTokenizer.load(tokenizer_json)
    assert figures["sizes"] == dict(layout.sizes) == {"text": text.size, "image": 120, "speech": 20}
    assert figures["specials"]["null"] == [layout.specials["null"], "<reserved00001>"]
    names = {id_: token for token, id_ in json.loads(done.stdout)["specials"].values()}
    assert names["<eoss>"] == layout.brackets("image")[1]
    # the tokenizer itself says which id the name of a code has, and no text makes one
    assert text.decode(layout.ids("image", np.array([0, 17, 119]))) == "IMGIMGAZIMGIMGBHZIMGIMGBBJZ"
    assert not layout.modality_of_id[text.encode("a dog </s> IMGIMGBHZ")].any()


def test_mistakes_are_explained(tokenizer_json, tmp_path):
    for arguments, message in [
        (("--special", "null"), "--special null: expected NAME=VALUE"),
        (("--special", "null=<absent>"), "'<absent>', which the vocabulary lacks"),
        (("--special", "begin=<s>"), "no special is named 'begin'"),
        (("--further", "speech=many"), "'many' is no number"),
        (("--further", "speech=2", "speech=3"), "--further: speech is given twice"),
        (("--further", "text=5"), "text has its ids from the vocabulary already"),
    ]:
        done = run(tokenizer_json, "--output", tmp_path / "layout.json", *arguments)
        assert (done.returncode, message in done.stderr) == (2, True), done.stderr
        assert not (tmp_path / "layout.json").exists()
