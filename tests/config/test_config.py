import json
import re
import subprocess
import sys
from typing import get_args, get_origin

import pytest

from mom_tokenizers.errors import UserError
from mom_train.config.files import differences, load_config
from mom_train.config.run import RunConfig
from mom_train.config.section import Section
from tests.helpers import CHECKOUT

MINIMAL = """
run_dir: runs/x
vocabulary: {text: 100}
model: {dim: 32, layers: 1, decoupled: []}
data: {train: [{path: tokens}], sequence_length: 64}
optimizer: {learning_rate: 1.0e-3}
training: {steps: 10, batch: 2, micro_batch: 1}
"""


@pytest.fixture
def minimal(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(MINIMAL)
    return path


@pytest.mark.parametrize(
    "path", sorted(p for p in (CHECKOUT / "configs").rglob("[!_]*.yaml") if "tokenizers" not in p.name)
)
def test_every_config_of_the_repository_is_valid(path):
    if "run_dir" in path.read_text() or "base:" in path.read_text():
        load_config(path)


def test_overrides_reach_any_depth_and_keep_their_types(minimal):
    config = load_config(
        minimal,
        [
            "optimizer.learning_rate=3e-4",
            "model.decoupled=[in_proj]",
            "data.train=[{path: a, weight: 2}, {path: b}]",
            "training.stop_at=null",
            "checkpoint.every=5",
        ],
    )
    assert config.optimizer.learning_rate == 3e-4
    assert config.model.decoupled == ("in_proj",)
    assert [s.weight for s in config.data.train] == [2.0, 1.0]
    assert config.checkpoint.every == 5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.layer=2", r"model.layer: unknown key; did you mean 'layers'\?"),
        ("data.validation={v: [{pth: x}]}", r"data.validation.v.0.pth: unknown key; did you mean 'path'\?"),
        ("colour=red", r"colour: unknown key; known here: run_dir, seed"),
        ("model.dim=wide", r"model.dim: .*valid integer.*'wide'"),
        ("model.dim=-1", r"model.dim: .*greater than 0"),
        ("model.decoupled=[conv]", r"model.decoupled.0: .*'in_proj'.*'conv'"),
        ("optimizer.warmup=10", r"optimizer.warmup \(10\) must be below training.steps \(10\)"),
        ("vocabulary={image: 5}", r"first modality must be 'text'"),
        ("data.train.0.weight=3", r"data.train.*is a list; replace it whole|train is a list"),
        ("steps", r"expected key.subkey=value"),
        ("data.train=[{path: a, path: b}]", r"found the key 'path' twice"),
    ],
)
def test_a_wrong_key_or_value_is_named_with_what_would_be_right(minimal, override, message):
    with pytest.raises(ValueError, match=message):
        load_config(minimal, [override])


DIFFUSION = {"vocabulary": {"text": 100, "image": 1}, "objective.diffusion": {"patch_width": 4}}
TRANSFORMER = {"model": {"architecture": "transformer", "dim": 32, "layers": 1, "heads": 2, "decoupled": []}}


def numbers(section=RunConfig, path=""):
    """The dotted keys of all numbers in all sections that are in no list."""
    for name, field in section.model_fields.items():
        kinds = {field.annotation, *get_args(field.annotation)}
        if get_origin(field.annotation) is tuple and name != "betas":
            continue  # a list is replaced whole; its sections' bounds are in the table below
        inner = [k for k in kinds if isinstance(k, type) and issubclass(k, Section)]
        if inner:
            yield from numbers(inner[0], f"{path}{name}.")
        elif kinds & {int, float} or name == "betas":
            yield f"{path}{name}"


@pytest.mark.parametrize("key", list(numbers()))
def test_no_number_of_a_config_may_be_nan_or_infinite_negative_or_a_truth_value(minimal, key):
    optional = {"objective.diffusion": {"patch_width": 4}, "wandb": {"project": "p"}, "picture_shapes": {"tokens": 64}}
    base = [f"{section}={json.dumps(v)}" for section, v in optional.items() if key.startswith(section + ".")]
    for value in (".nan", ".inf", "-.inf", "true", "-1", "1e400"):
        if key in ("objective.diffusion.latent_shift", "objective.diffusion.logit_mean") and value == "-1":
            continue  # the numbers that may be below zero
        given = f"[{value}, 0.9]" if key.endswith("betas") else value
        with pytest.raises(UserError, match=re.escape(key)):
            load_config(minimal, [*base, "vocabulary={text: 100, image: 1}", f"{key}={given}"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # numbers that nothing could come of
        *[({key: 0}, rf"{key}: .*greater than") for key in (
            "model.dim", "model.layers", "model.experts", "model.state", "model.conv", "model.expand", "model.dt_rank",
            "model.norm_eps", "model.rope_base", "training.steps", "training.batch", "training.micro_batch",
            "training.stop_at", "training.time_limit", "training.ema_decay", "optimizer.learning_rate",
            "optimizer.clip", "optimizer.eps", "data.lanes", "data.pack_window", "data.shuffle_units", "data.cache_gib",
            "validation.every", "validation.sequences", "checkpoint.every", "checkpoint.seconds", "checkpoint.keep",
            "checkpoint.keep_every", "checkpoint.max_failures", "anomaly.loss_spike", "anomaly.skips",
            "parallel.shard_ranks", "parallel.context_ranks", "parallel.timeout", "parallel.first_step_timeout",
            "sampling.every", "sampling.max_tokens", "sampling.top_p", "sampling.denoising_steps", "sampling.seconds",
            "log_every",
        )],
        *[({key: 1.5}, rf"{key}: ") for key in (
            "optimizer.final_fraction", "data.corrupt_share", "data.max_bad_fraction", "training.ema_decay",
            "sampling.top_p", "model.norm_eps", "model.layers",
        )],
        ({"optimizer.betas": [0.9, 1.0]}, r"optimizer.betas.1: .*less than 1"),
        ({"optimizer.betas": [0.9]}, r"optimizer.betas"),
        ({"optimizer.eps": -1e-8}, r"optimizer.eps: .*greater than 0"),
        ({"optimizer.warmup": 10}, r"must be below training.steps"),
        ({"optimizer.warmup": 4, "optimizer.schedule": "wsd", "optimizer.decay": 7},
         r"optimizer.warmup \(4\) and optimizer.decay \(7\) together are longer than training.steps \(10\)"),
        ({"optimizer.scale_with_batch": True}, r"scale_with_batch: .*name a training.batch_ramp"),
        ({"training.batch": 4, "training.micro_batch": 2, "training.batch_ramp": [{"until": 2, "batch": 1}]},
         r"training.batch_ramp.0.batch \(1\) must be a multiple of training.micro_batch \(2\)"),
        ({"training.batch": 3, "training.micro_batch": 2}, r"must be a multiple of training.micro_batch \(2\)"),
        ({"training.ema_decay": 1}, r"training.ema_decay: .*less than 1"),
        ({"validation.ema": True}, r"needs training.ema_decay"),
        ({"parallel.timeout": 1e12}, r"parallel.timeout: .*less than or equal"),
        ({"data.sequence_length": 1}, r"data.sequence_length: .*greater than or equal to 2"),
        ({"seed": 2**63}, r"seed: .*less than"),
        # the model
        ({"model.decoupled": ["in_proj", "in_proj"]}, r"model: decoupled names 'in_proj' twice"),
        ({"model.router": "learned"}, r"model: router=learned.*nothing to choose between"),
        ({"model.experts": 2, "model.decoupled": ["norm"]}, r"model: router=rule, experts=2.*nothing to choose"),
        ({"model.heads": 2}, r"model: heads: only a transformer has it"),
        ({"model.rope_base": 500000}, r"model: rope_base: only a transformer has it"),
        ({"model.qk_norm": True}, r"model: qk_norm: only a transformer .* a mamba; model.normalise is for a mamba"),
        ({"model.normalise_eps": 1e-5}, r"normalise_eps: there are no such norms; set model.normalise=true"),
        ({**TRANSFORMER, "model.state": 32}, r"model: state: only a mamba has it"),
        ({**TRANSFORMER, "model.normalise": True}, r"normalise: only a mamba .*; model.qk_norm is for a transformer"),
        ({**TRANSFORMER, "model.heads": 32}, r"dim / heads is even"),
        ({**TRANSFORMER, "parallel.context_ranks": 2}, r"only the state of a mamba"),
        ({"parallel.context_ranks": 3}, r"must divide data.sequence_length"),
        # the data
        ({"data.train": []}, r"data.train: name at least one source"),
        ({"data.train": [{}]}, r"data.train.0: say where it is"),
        ({"data.train": [{"path": ""}]}, r"data.train.0.path: .*at least 1 character"),
        ({"data.train": [{"path": "a", "weight": 0}]}, r"data.train.0.weight: .*greater than 0"),
        ({"data.train": [{"path": "a", "weight": "nan"}]}, r"data.train.0.weight: .*finite"),
        ({"data.train": [{"path": "a", "holdout": "inf"}]}, r"data.train.0.holdout: .*finite"),
        ({"data.train": [{"path": "a", "weight": -1}]}, r"data.train.0.weight: .*greater than 0"),
        ({"data.train": [{"path": "a", "split": "val"}]}, r"data.train.0: split: only of `raw`"),
        ({"data.train": [{"raw": ["a"], "split": "val", "holdout": 0}]}, r"data.train.0: holdout=0.0 leaves one side"),
        ({"data.train": [{"raw": ["a"]}]}, r"tokenizers: raw sources"),
        ({"data.validation": {"v": []}}, r"data.validation.v: name at least one source"),
        ({"data.validation": {"a/b": [{"path": "a"}]}}, r"'a/b' is not a name for a set"),
        ({"data.validation": {}, "validation.every": 5}, r"validation.every: there is nothing to validate on"),
        ({"data.corrupt_share": 0.5, "vocabulary": {"text": 9}}, r"data.corrupt_share: .*one modality"),
        ({"vocabulary": {"text": True}}, r"vocabulary: true and false are not value"),
        ({"vocabulary": {"text": 0}}, r"vocabulary.*greater than 0"),
        ({"run_dir": ""}, r"run_dir: the path is empty"),
        ({"tokenizers": ""}, r"tokenizers: the path is empty"),
        # diffusion, sampling, checkpoints
        ({**DIFFUSION, "vocabulary": {"text": 9, "speech": 9}}, r"objective.diffusion .*has no modality 'image'"),
        ({**DIFFUSION, "objective.diffusion.steps": 3}, r"objective.diffusion: steps=3: at least 4"),
        ({**DIFFUSION, "objective.diffusion.noise_limit": 1001}, r"noise_limit=1001 is above steps=1000"),
        ({**DIFFUSION, "objective.diffusion.weight": -1}, r"objective.diffusion.weight: .*greater than or equal to 0"),
        ({"objective.load_balance": -1}, r"objective.load_balance: .*greater than or equal to 0"),
        ({**DIFFUSION, "sampling.guidance": 3}, r"sampling.guidance=3.0 needs .*condition_dropout"),
        ({"vocabulary": {"text": 9}, "sampling.guidance": 3}, r"sampling.guidance=3.0: only pictures are guided"),
        ({"sampling.every": 5}, r"sampling.every: samples need tokenizers"),
        ({"sampling.every": 5, "tokenizers": "t", "sampling.prompts": []}, r"sampling.prompts: name at least one"),
        ({"sampling.prompts": [{"start": "text"}]}, r"sampling.prompts: start=text"),
        ({"sampling.prompts": [{"start": "image", "shape": 121}]}, r"121 is a number: write the shape in quotes"),
        ({**DIFFUSION, "sampling.every": 5, "tokenizers": "t", "sampling.denoising_steps": 1001},
         r"sampling.denoising_steps=1001 is above"),
        ({"checkpoint.best": "val/v/los/total"}, r"checkpoint.best=val/v/los/total .*did you mean val/v/loss/total\?"),
        ({"checkpoint.best": "val/v/loss/speech"}, r"checkpoint.best=val/v/loss/speech is not a figure"),
        ({"checkpoint.best": "val/v/mse/t0"}, r"checkpoint.best=val/v/mse/t0 is not a figure"),
        ({"checkpoint.best": "val/v/bits_per_byte/text"}, r"is not a figure"),
        ({"checkpoint.best": "loss/total", "data.validation": {}}, r"they are: none here"),
        ({"checkpoint.path": ""}, r"checkpoint.path: .*at least 1 character"),
        ({"anomaly.window": 15}, r"anomaly.window: .*greater than or equal to 16"),
        ({"wandb": {"project": ""}}, r"wandb.project: .*at least 1 character"),
    ],
)  # fmt: skip
def test_a_setting_that_nothing_could_come_of_is_refused_by_its_name(minimal, changes, message):
    common = {"vocabulary": {"text": 100, "image": 8}, "data.validation": {"v": [{"path": "tokens"}]}}
    with pytest.raises(UserError, match=message):
        load_config(minimal, [f"{key}={json.dumps(value)}" for key, value in {**common, **changes}.items()])


def test_every_figure_that_a_validation_can_find_may_be_the_best(minimal):
    """The names that validation logs, as tests/train/test_validation.py and docs/explanation/observing.md have them."""
    sets = 'data.validation={"v": [{"path": "tokens"}]}'
    more = ["vocabulary={text: 100, image: 1}", "objective.diffusion={patch_width: 4}", "tokenizers=t.yaml"]
    for figure in ("loss/total", "loss/text", "loss/image", "mse/t0", "mse/t3", "bits_per_byte/text"):
        assert load_config(minimal, [sets, *more, f"checkpoint.best=val/v/{figure}"]).checkpoint.best


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 1\nsteps: 2\n", "found the key 'steps' twice"),
        ("a: {b: 1, b: 2}\n", "found the key 'b' twice"),
        ("base: 5\n", "base: 5 is not the path of a file"),
        ("- a\n", "expected a mapping"),
        ("a: [\n", "not valid YAML"),
        ("schema: 99\n", "has schema 99; this version .* reads schemas up to"),
        ("schema: new\n", "schema 'new' is not the number"),
        (b"\xff\xfe\x00", "not text in UTF-8"),
    ],
)
def test_a_file_that_is_no_config_is_one_message_that_names_it(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=f"(?s)c.yaml.*{message}"):
        load_config(path)
    with pytest.raises(UserError, match=str(tmp_path)):
        load_config(tmp_path)


def test_what_differs_between_two_configs_is_a_line_a_key():
    was = {"model": {"dim": 32, "decoupled": ["in_proj"]}, "vocabulary": {"text": 9, "image": 8}}
    now = {"model": {"dim": 64, "decoupled": []}, "vocabulary": {"image": 8, "text": 9}, "seed": 1}
    assert differences(was, now) == [
        "model.dim: 32 -> 64",
        'model.decoupled: ["in_proj"] -> []',
        "vocabulary: the order of text, image -> image, text",
        "seed: not there -> 1",
    ]
    assert differences(was, was) == []


def test_files_inherit_and_mappings_merge(tmp_path, minimal):
    child = tmp_path / "sub" / "d.yaml"
    child.parent.mkdir()
    child.write_text("base: ../c.yaml\nmodel: {layers: 3}\nvocabulary: {image: 9}\n")
    config = load_config(child)
    assert (config.model.dim, config.model.layers) == (32, 3)
    assert config.vocabulary == {"text": 100, "image": 9}
    child.write_text("base: d.yaml\n")
    with pytest.raises(ValueError, match="comes back to itself"):
        load_config(child)
    with pytest.raises(ValueError, match="no config file"):
        load_config(tmp_path / "none.yaml")


def test_the_resolved_config_loads_to_the_same_config(tmp_path, minimal):
    config = load_config(minimal)
    (tmp_path / "resolved.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "resolved.yaml") == config


def test_every_field_says_what_it_means():
    def missing(section):
        for name, field in section.model_fields.items():
            inner = field.annotation
            if isinstance(inner, type) and hasattr(inner, "model_fields"):
                yield from missing(inner)
            elif not field.description:
                yield f"{section.__name__}.{name}"

    assert list(missing(RunConfig)) == []


def test_config_errors_and_help_do_not_wait_for_torch(minimal):
    code = (
        "import sys\n"
        "from mom_train.config.files import load_config\n"
        f"load_config({str(minimal)!r})\n"
        "import torchrun_launch.local, torchrun_launch.__main__\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_tilde_is_the_home_folder_wherever_a_place_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    data = {"train": [{"raw": ["~/a.tar", "b.tar"]}], "validation": {"v": [{"path": "~/val"}]}, "sequence_length": 64}
    values = {"vocabulary": {"text": 9}, "model": {"dim": 8, "layers": 1, "decoupled": []}, "data": data}
    values |= {"optimizer": {"learning_rate": 0.1}, "training": {"steps": 9, "batch": 1, "micro_batch": 1}}
    config = RunConfig.model_validate({**values, "run_dir": "~/run", "tokenizers": "~/t.yaml"})
    assert (config.run_dir, config.tokenizers) == (tmp_path / "run", tmp_path / "t.yaml")
    assert config.data.train[0].raw == (f"{tmp_path}/a.tar", "b.tar")
    assert config.data.validation["v"][0].path == f"{tmp_path}/val"


def test_a_list_as_a_key_is_one_message():
    with pytest.raises(UserError, match="found unhashable key"):
        load_config("configs/demo.yaml", ["model={[dim]: 8}"])
