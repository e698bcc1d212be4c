"""mom generate --grid: one page and one sheet of many samples, which go on where they were ended."""

import base64
import io
import json
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import soundfile
from PIL import Image

from mom_tools.model import generate
from mom_tools.model.prompt_grid import Job, draw_grid

EVIL = '<script>alert("x")</script>'
SETTINGS = {"checkpoint": "step-4", "temperature": 0.9}
RATE = 16_000


class Page(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.media, self.tags, self.headings, self.text = {"img": [], "audio": []}, [], [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag in self.media:
            self.media[tag].append(base64.b64decode(dict(attrs)["src"].partition("base64,")[2]))

    def handle_data(self, data):
        self.text += data
        if self.tags[-1:] == ["h2"] and data.strip():
            self.headings.append(data)


class Artist:
    """Writes samples as `mom generate` does: a picture whose grey is the number of the call, a recording and a text. It
    is ended in the call of number `ends`."""

    def __init__(self, folder, ends=None):
        self.folder, self.ends, self.drawn = folder, ends, []

    def __call__(self, job, name):
        if len(self.drawn) == self.ends:
            raise KeyboardInterrupt
        self.drawn.append(job)
        grey = 10 * len(self.drawn)
        Image.new("RGB", (16, 8), (grey, grey, grey)).save(self.folder / f"{name}-0.png")
        soundfile.write(self.folder / f"{name}-1.wav", np.zeros(RATE * len(self.drawn) // 10), RATE)
        lines = [f"> {job.prompt}", "", f"![picture]({name}-0.png)", "", f"[speech]({name}-1.wav)", "", f"said {EVIL}"]
        (self.folder / f"{name}.md").write_text("\n".join(lines))


JOBS = [Job(prompt, None, seed) for prompt in ("a seven", "a nine", EVIL) for seed in (0, 1)]


def test_the_page_holds_every_sample_under_its_prompt_and_the_sheet_every_picture(tmp_path):
    draw_grid(tmp_path, JOBS, SETTINGS, "Samples", Artist(tmp_path))
    page = Page((tmp_path / "grid.html").read_text())
    assert "script" not in page.tags
    assert page.headings == ["a seven", "a nine", EVIL]
    assert page.text.count(f"said {EVIL}") == 6
    assert page.text.count("> a seven") == 0  # the heading says it
    lengths = [len(soundfile.read(io.BytesIO(sound))[0]) for sound in page.media["audio"]]
    assert lengths == [RATE * n // 10 for n in range(1, 7)]
    pictures = [Image.open(io.BytesIO(picture)) for picture in page.media["img"]]
    greys = [picture.getpixel((0, 0))[0] for picture in pictures if picture.size == (16, 8)]
    assert greys == [10, 20, 30, 40, 50, 60]
    sheet = np.asarray(Image.open(tmp_path / "grid.png"))
    assert sheet.shape[1] == 2 * 170 + 10  # the samples of a prompt make a row
    for n in range(1, 7):
        y, x = np.nonzero((sheet == 10 * n).all(2))
        area = (np.ptp(y) + 1, np.ptp(x) + 1)
        assert area == (80, 160) or n in (2, 3)  # greys that letters also have


def test_an_ended_command_has_a_page_and_goes_on_where_it_was(tmp_path, capsys):
    first, second = Artist(tmp_path, ends=3), Artist(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        draw_grid(tmp_path, JOBS, SETTINGS, "Samples", first)
    assert "3 of 6 samples of 3 prompts" in " ".join(Page((tmp_path / "grid.html").read_text()).text.split())
    with open(tmp_path / "grid.jsonl", "a") as file:
        file.write('{"prompt": "a ni')  # as a killed process leaves it
    kept = (tmp_path / "sample-0.md").stat().st_mtime_ns
    draw_grid(tmp_path, [Job("new", None, 0), *JOBS], SETTINGS, "Samples", second)
    assert second.drawn == [Job("new", None, 0), *JOBS[3:]]
    assert "3 of 7 samples are there already" in capsys.readouterr().out
    assert (tmp_path / "sample-0.md").stat().st_mtime_ns == kept
    page = Page((tmp_path / "grid.html").read_text())
    assert page.headings == ["new", "a seven", "a nine", EVIL]
    assert len(page.media["audio"]) == 7
    assert len((tmp_path / "grid.jsonl").read_text().splitlines()) == 8


def test_samples_of_other_settings_are_not_taken_for_these(tmp_path, capsys):
    draw_grid(tmp_path, JOBS[:2], SETTINGS, "Samples", Artist(tmp_path))
    again = Artist(tmp_path)
    draw_grid(tmp_path, JOBS[:2], SETTINGS | {"checkpoint": "step-8"}, "Samples", again)
    assert again.drawn == JOBS[:2]
    assert "earlier samples had other settings (checkpoint), so all are drawn again" in capsys.readouterr().out
    assert json.loads((tmp_path / "grid.jsonl").read_text().splitlines()[0])["checkpoint"] == "step-8"


def test_prompts_come_from_both_options_and_empty_lines_are_none(tmp_path, monkeypatch):
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeffeine Sieben\n\n  größer \r\n五\n", encoding="utf-8")
    seen = []
    monkeypatch.setattr(generate, "generate", lambda arguments: seen.append(generate.prompts_of(arguments)))
    for given in (["--prompt", "a", "--prompt", "b", "--prompts", str(file)], []):
        monkeypatch.setattr(sys, "argv", ["generate", "run", *given])
        generate.main()
    assert seen == [["a", "b", "eine Sieben", "größer", "五"], [""]]
