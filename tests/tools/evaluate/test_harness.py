"""Scores of lm-evaluation-harness are those that plain PyTorch computes for one request at a time."""

import json
import math
import sys

import numpy as np
import pytest
import torch
import yaml

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from mom_tokenizers.errors import UserError
from mom_tokenizers.text import TextTokenizer
from mom_tools.evaluate import harness
from mom_tools.evaluate.harness_model import HarnessModel, load_model
from mom_train.config.run import RunConfig
from mom_train.model.init import initialize
from mom_train.model.language_model import build_model
from mom_train.ops.layout import RowLayout
from tests.helpers.tokenized import WORDS


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder like those that `mom export` writes: a small model with random weights, and a text tokenizer."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("exported")
    TextTokenizer.train([" ".join(WORDS)] * 4, 300).save(folder / "text")
    (folder / "tokenizers.yaml").write_text("text: {kind: bpe, path: text}\n")
    config = RunConfig.model_validate(
        {
            "run_dir": str(folder),
            "vocabulary": {"text": 300, "image": 16},
            "tokenizers": str(folder / "tokenizers.yaml"),
            "model": {"dim": 32, "layers": 1, "decoupled": ["in_proj", "out_proj"]},
            "data": {"train": [{"path": "none"}], "sequence_length": 48},
            "optimizer": {"learning_rate": 0.01},
            "training": {"steps": 1, "batch": 1, "micro_batch": 1},
        }
    )
    model = build_model(config)
    model.to_empty(device="cpu")
    initialize(model, 3)
    with torch.no_grad():
        model.head.weight.mul_(20)  # far from uniform
    save_file({name: p.detach() for name, p in model.named_parameters()}, folder / "model.safetensors")
    (folder / "config.yaml").write_text(config.to_yaml())
    (folder / "vocab.json").write_text(config.layout.to_json())
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Two tasks on local files: multiple choice, and whole texts."""
    folder = tmp_path_factory.mktemp("tasks")
    rng = np.random.default_rng(0)
    questions = []
    for _ in range(12):
        words = [" ".join(rng.choice(WORDS, rng.integers(1, 5))) for _ in range(4)]
        questions.append({"q": words[0], "choices": words[1:], "label": int(rng.integers(3))})
    texts = [{"text": " ".join(rng.choice(WORDS, rng.integers(2, 60)))} for _ in range(5)]
    for name, lines in (("choice", questions), ("text", texts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = {"dataset_path": "json", "test_split": "test", "metadata": {"version": 1}}
    choice = {
        "task": "small_choice", **common, "dataset_kwargs": {"data_files": {"test": str(folder / "choice.jsonl")}},
        "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "label", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }  # fmt: skip
    text = {
        "task": "small_text", **common, "dataset_kwargs": {"data_files": {"test": str(folder / "text.jsonl")}},
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "byte_perplexity"}],
    }  # fmt: skip
    (folder / "choice.yaml").write_text(yaml.safe_dump(choice))
    (folder / "text.yaml").write_text(yaml.safe_dump(text))
    return folder, questions, [line["text"] for line in texts]


def log_probability(model, vocab, ids, n):
    """(log-likelihood, whether greedy) of the last n ids, from the whole logits of one row without padding, in float64.
    `model` is in float64."""
    tokens = torch.tensor(ids[:-1])
    modality = torch.from_numpy(vocab.modality_of_id)[tokens][None]
    layout = RowLayout.sort(modality, torch.zeros(1, len(tokens), dtype=torch.int32), len(vocab.modalities))
    with torch.no_grad():
        logits, _ = model(tokens[layout.rows], layout)
    logits = logits[layout.order.long()][-n:]
    assert logits.dtype == torch.float64
    probabilities = torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True)
    target = torch.tensor(ids[-n:])
    chosen = probabilities[torch.arange(n), target].log().sum().item()
    return chosen, bool((probabilities.max(1).indices == target).all())


def encode(exported, config, text):
    return config.layout.ids("text", TextTokenizer.load(exported / "text").encode(text)).tolist()


def run(monkeypatch, tmp_path, exported, tasks, *more):
    out = tmp_path / "out.json"
    line = ["mom lm-eval", str(exported), "--include-path", str(tasks), "--json", str(out), "--tasks", *more]
    monkeypatch.setattr(sys, "argv", line)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    harness.main()
    return json.loads(out.read_text())["results"]


def test_scores_of_tasks_are_those_of_one_request_at_a_time_in_float64(exported, tasks, tmp_path, monkeypatch, capsys):
    folder, questions, texts = tasks
    found = run(monkeypatch, tmp_path, exported, folder, "small_choice", "small_text")
    assert "small_choice" in capsys.readouterr().out
    model, config = load_model(exported, None, "model", "cpu")
    model, bos, vocab = model.double(), config.layout.specials["bos"], config.layout
    right = right_by_length = 0
    for question in questions:
        sums = []
        context = [bos, *encode(exported, config, question["q"])]
        for choice in question["choices"]:
            ids = [bos, *encode(exported, config, f"{question['q']} {choice}")]
            sums.append(log_probability(model, vocab, ids, len(ids) - len(context))[0])
        lengths = [len(choice) for choice in question["choices"]]
        right += int(np.argmax(sums)) == question["label"]
        right_by_length += int(np.argmax(np.array(sums) / lengths)) == question["label"]
    assert found["small_choice"]["acc,none"] == pytest.approx(right / len(questions))
    assert found["small_choice"]["acc_norm,none"] == pytest.approx(right_by_length / len(questions))

    nats = size = 0.0
    for text in texts:
        ids = [bos, *encode(exported, config, text)]
        for start in range(1, len(ids), 48):  # 48 targets at a time, whose last is read after at most 48 ids
            end = min(start + 48, len(ids))
            nats -= log_probability(model, vocab, ids[max(0, end - 49) : end], end - start)[0]
        size += len(text.encode())
    assert any(len(encode(exported, config, text)) > 48 for text in texts)
    assert found["small_text"]["bits_per_byte,none"] == pytest.approx(nats / size / math.log(2), rel=1e-5)


def test_padding_the_batch_and_documents_read_before_change_nothing(exported):
    requests = [
        Instance("loglikelihood", {}, pair, i)
        for i, pair in enumerate(
            [("the model", " reads"), ("", "pictures"), ("one zwei trois the model reads and draws", " pictures and")]
        )
    ]
    one = HarnessModel(str(exported), batch_size=1, device="cpu")
    together = HarnessModel(str(exported), batch_size="3", device="cuda")
    model, config = load_model(exported, None, "model", "cpu")
    model, bos = model.double(), config.layout.specials["bos"]
    expected = []
    for request in requests:
        context, continuation = request.args
        first = [bos, *encode(exported, config, context)]
        ids = [bos, *encode(exported, config, context + continuation)]
        expected.append(log_probability(model, config.layout, ids, len(ids) - len(first)))
    for results in (one.loglikelihood(requests), together.loglikelihood(requests[::-1])[::-1]):
        assert [greedy for _, greedy in results] == [greedy for _, greedy in expected]
        assert [value for value, _ in results] == pytest.approx([value for value, _ in expected], rel=1e-5)


def test_a_uniform_model_has_the_bits_per_byte_of_its_number_of_ids(exported, tasks):
    folder, _, texts = tasks
    model = HarnessModel(str(exported), device="cpu")
    with torch.no_grad():
        model.model.head.weight.zero_()
    ids = sum(len(encode(exported, model.config, text)) for text in texts)
    size = sum(len(text.encode()) for text in texts)
    manager = harness.find_tasks(["small_text"], [folder])
    found = simple_evaluate(model=model, tasks=["small_text"], task_manager=manager, bootstrap_iters=0)
    # every id costs log2(V) bits, where V is the number of rows of the embedding
    expected = math.log2(model.config.layout.size) * ids / size
    assert found["results"]["small_text"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-6)


def test_a_text_is_written_greedily_up_to_a_stop(exported):
    harness_model = HarnessModel(str(exported), device="cpu")
    model, config = harness_model.model, harness_model.config
    bos, eos = config.layout.specials["bos"], config.layout.specials["eos"]
    ids, written = [bos, *encode(exported, config, "the model")], []
    for _ in range(12):  # the whole row again for every id
        layout = RowLayout.sort(
            torch.zeros(1, len(ids), dtype=torch.uint8), torch.zeros(1, len(ids), dtype=torch.int32), 2
        )
        with torch.no_grad():
            logits, _ = model(torch.tensor(ids)[layout.rows], layout)
        logits = logits[layout.order.long()][-1]
        logits[300:eos] = logits[eos + 1 :] = -torch.inf
        if (token := int(logits.argmax())) == eos:
            break
        ids.append(token)
        written.append(token)
    text = TextTokenizer.load(exported / "text").decode(written)

    def write(**settings):
        request = Instance("generate_until", {}, ("the model", {"do_sample": False, **settings}), 0)
        return harness_model.generate_until([request])[0]

    assert text
    assert write(until=[], max_gen_toks=12) == text
    stop = text[len(text) // 2 :][:2]
    assert write(until=[stop], max_gen_toks=12) == text[: text.find(stop)]
    with pytest.raises(UserError, match="typical_p"):
        write(typical_p=0.5)


def test_the_harness_finds_the_model_by_its_name(exported):
    from importlib.metadata import entry_points

    assert get_model("mom") is HarnessModel
    [declared] = [point for point in entry_points(group="lm_eval.models") if point.name == "mom"] or [None]
    if declared is not None:  # an environment that was installed before the entry point was declared lacks it
        assert declared.load() is HarnessModel


def test_what_cannot_be_scored_is_said(exported, tasks, tmp_path, monkeypatch, capsys):
    def says(*line):
        monkeypatch.setattr(sys, "argv", ["mom lm-eval", *map(str, line)])
        with pytest.raises(SystemExit) as end:
            harness.main()
        assert end.value.code == 2
        return capsys.readouterr().err

    TextTokenizer.train([" ".join(WORDS)] * 4, 320).save(tmp_path / "text")
    (tmp_path / "tokenizers.yaml").write_text("text: {kind: bpe, path: text}\n")
    size = TextTokenizer.load(tmp_path / "text").size
    assert size > 300
    given = [exported, "--include-path", tasks[0], "--tasks"]
    other = says(*given, "small_text", "--tokenizers", tmp_path / "tokenizers.yaml")
    assert f"its text tokenizer has {size} ids" in other
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    assert "pip install '.[lm-eval]'" in says(*given, "small_text")
