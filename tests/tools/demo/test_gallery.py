"""mom_tools.demo.gallery: which documents are shown before and after the tokenizers."""

import io

import numpy as np
import soundfile
import webdataset
from PIL import Image

from mom_tools.demo.gallery import chosen


def picture():
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    return file.getvalue()


def recording():
    file = io.BytesIO()
    soundfile.write(file, np.zeros(1600, np.float32), 16_000, format="FLAC")
    return file.getvalue()


def test_a_rare_modality_is_shown_beside_a_frequent_one(tmp_path):
    path = tmp_path / "a.tar"
    with webdataset.TarWriter(str(path)) as tar:
        for i in range(20):
            tar.write({"__key__": f"p{i}", "png": picture(), "txt": f"picture {i}"})
        for i in range(2):
            tar.write({"__key__": f"s{i}", "flac": recording(), "txt": f"recording {i}"})
    found = [{s.modality for s in document.segments} - {"text"} for document in chosen([path], ["image", "speech"])]
    assert found == [{"image"}] * 4 + [{"speech"}] * 2
    assert [{"speech"}] * 2 == [
        {s.modality for s in document.segments} - {"text"} for document in chosen([path], ["speech"])
    ]
