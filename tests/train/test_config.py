import subprocess
import sys
from pathlib import Path

import pytest

from mom_train.config import RunConfig
from mom_train.config_file import load_config

CHECKOUT = Path(__file__).parents[2]
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
    ],
)
def test_a_wrong_key_or_value_is_named_with_what_would_be_right(minimal, override, message):
    with pytest.raises(ValueError, match=message):
        load_config(minimal, [override])


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
        "from mom_train.config_file import load_config\n"
        f"load_config({str(minimal)!r})\n"
        "import torchrun_launch.local, torchrun_launch.__main__\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
