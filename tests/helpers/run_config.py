"""Makes a tiny run for tests: its model, its data and its config file."""

from mom_train.config.run import RunConfig
from tests.helpers.corpus import VOCAB, write_dataset


def tiny_config(folder, **changes):
    """A config over datasets in `folder`, which are made where they are missing."""
    if not (folder / "train").exists():
        write_dataset(folder / "train", documents=120, shards=2, seed=1)
        write_dataset(folder / "val", documents=30, shards=1, seed=2)
    values = {
        "run_dir": str(folder / "run"),
        "vocabulary": dict(VOCAB.sizes),
        "model": {"dim": 32, "layers": 1, "decoupled": ["in_proj", "x_proj", "dt_proj", "out_proj"]},
        "data": {
            "train": [{"path": str(folder / "train")}],
            "validation": {"held": [{"path": str(folder / "val")}]},
            "sequence_length": 128,
            "lanes": 2,
            "workers": 0,
        },
        "optimizer": {"learning_rate": 0.01, "warmup": 2},
        "training": {"steps": 8, "batch": 4, "micro_batch": 1},
        "validation": {"sequences": 5},
    }
    for key, value in changes.items():
        section, _, leaf = key.partition("__")
        if leaf:
            values[section][leaf] = value
        else:
            values[section] = value
    return RunConfig.model_validate(values)


def write_config(folder, **changes):
    path = folder / "config.yaml"
    path.write_text(tiny_config(folder, **changes).to_yaml())
    return path
