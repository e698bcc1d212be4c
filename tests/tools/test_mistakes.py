"""A mistake on a command line gives one message, before torch is imported. One process makes all the mistakes."""

import json
import subprocess
import sys

MISTAKES = [
    ("mom_train.__main__", "none.yaml", "no config file none.yaml"),
    ("mom_train.__main__", "c.yaml model.layer=2", "did you mean 'layers'?"),
    ("mom_train.__main__", "c.yaml", "nowhere: no manifest.json"),
    ("mom_train.__main__", "c.yaml tokenizers=t.yaml", "t.yaml: no such file"),
    ("mom_train.__main__", "c.yaml init_from=weights", "weights: nothing there (init_from)"),
    ("mom_train.__main__", "c.yaml run_dir=file/run", "run_dir: file/run cannot be a folder, because"),
    ("mom_train.__main__", "c.yaml data.train=[{raw:[docs]}] tokenizers=t.yaml", "docs: no raw documents there"),
    ("torchrun_launch.__main__", "local c.yaml", "nowhere: no manifest.json"),
    ("torchrun_launch.__main__", "local --nproc-per-node 3 c.yaml", "training.batch (4) must be a multiple"),
    ("eval", "none --shards nowhere", "none: no such folder"),
    ("eval", "file --shards nowhere", "file is a file"),
    ("eval", "empty --shards nowhere", "empty: no checkpoints there"),
    ("eval", "run --shards nowhere elsewhere", "elsewhere: no manifest.json"),
    ("eval", "run --shards empty empty", "is named twice"),
    ("eval", "run --shards empty --step last", "--step last: a number, or 'best'"),
    ("eval", "run --shards empty --sequences 0", "--sequences, --batch: at least 1"),
    ("generate", "none", "none: no such folder"),
    ("generate", "empty", "empty: no checkpoints there"),
    ("generate", "run --tokenizers t.yaml", "--tokenizers t.yaml: nothing there"),
    ("generate", "run --top-p 0", "top_p: Input should be greater than 0"),
    ("generate", "run --temperature nan", "temperature: Input should be a finite number"),
    ("generate", "run --max-tokens 0", "max_tokens: Input should be greater than 0"),
    ("generate", "run --samples 0", "--samples 0: it must be above 0"),
    ("generate", "run --denoised-limit nan", "--denoised-limit nan: it must be above 0"),
    ("generate", "run --grid", "--grid: give prompts, with --prompt or --prompts FILE"),
    ("generate", "run --grid --prompts file", "--prompts file: no prompt there; write one a line"),
    ("generate", "run --prompts none.txt", "none.txt: no such file"),
    ("generate", "run --seed=-1", "--seed, --step: not below 0"),
    ("evaluate", "run", "give --shards or --minimal-pairs"),
    ("evaluate", "none --shards x", "none: no such folder"),
    ("evaluate", "run --shards x --minimal-pairs y", "x: no manifest.json"),
    ("evaluate", "run --shards x --minimal-pairs x", "is named twice"),
    ("evaluate", "run --shards x --pairs 8 --pool 9", "evaluation.pool (9) must not be above evaluation.pairs (8)"),
    ("evaluate", "run --shards x --draws 0", "draws: Input should be greater than 0"),
    ("lm-eval", "none --tasks x", "none: no such folder"),
    ("lm-eval", "empty --tasks x", "empty: no checkpoints there"),
    ("lm-eval", "run --tasks x --include-path none", "--include-path none: nothing there"),
    ("lm-eval", "run --tasks x --limit 0", "--limit 0: at least 1"),
    ("lm-eval", "run --tasks x --batch none", "--batch none: a number above 0, or 'auto'"),
    ("export", "none --out x", "none: no such folder"),
    ("export", "run --out file/x", "--out: file/x cannot be a folder"),
    ("checkpoint", "none list", "none: no such folder"),
    ("checkpoint", "empty verify", "empty: no checkpoints there"),
    ("checkpoint", "run prune --keep 0", "--keep: at least 1"),
    ("report", "none", "none: no metrics.jsonl, so not a run directory"),
    ("report", "run --price nan", "--price nan: not below 0"),
    ("match-loss", "--baseline empty --candidate run", "empty: no metrics.jsonl, so not a run directory"),
    ("match-loss", "--baseline run --candidate run --window 1", "the window is a share"),
    ("match-loss", "--baseline run --candidate run --paper 9:1B", "9"),
    ("plot", "none --out x.png", "none: no metrics.jsonl"),
    ("describe", "none.yaml", "no config file none.yaml"),
    ("describe", "c.yaml --ranks 0", "--ranks 0: at least 1"),
    ("plan", "none.yaml", "no config file none.yaml"),
    ("plan", "c.yaml --nodes 0", "--nodes and --gpus-per-node: at least one"),
    ("plan", "c.yaml --mfu nan", "--mfu nan: a share"),
    ("plan", "c.yaml --latency nan", "--latency nan: not below 0"),
    ("plan", "c.yaml --patch-share 2", "--patch-share 2.0: a share from 0 to 1"),
    ("pack-stats", "--data empty", "empty: no manifest.json"),
    ("pack-stats", "c.yaml --data empty", "give either a CONFIG, or --data"),
    ("inspect", "empty --output x.html", "empty: no manifest.json"),
    ("inspect", "empty --output x.html --text-key a", "name these with --raw"),
    ("inspect", "--output x.html", "give a DATASET folder, or --config"),
    ("inspect", "empty --output x.html --rows 0", "--rows must be at least 1"),
    ("verify", "empty", "empty"),
    ("transfer", "c.yaml --rates 1 2", "--rates: name at least 3 learning rates above 0"),
    ("transfer", "c.yaml --rates 1 2 4 --widths 64", "--widths: name at least 2 different ones"),
    (
        "transfer",
        "c.yaml --rates 1 2 4 --models mixture",
        "model.decoupled is empty, so there is no mixture: --models dense",
    ),
    ("transfer", "c.yaml --rates 1 2 4 --models dense", "data.validation: name a set"),
    ("mom_train.__main__", "c.yaml model.base_dim=16 init_from=published", "config.json: a published model, and"),
    ("paper-mini", "", "make paper-mini CORPUS=path/to/raw/tars"),
    ("paper-mini", "--corpus none", "--corpus none: nothing there"),
    ("paper-mini", "--corpus empty --seeds 0", "--seeds, --max-steps and --jobs must be at least 1"),
    ("paper-mini", "--corpus empty --minutes nan", "--minutes above 0"),
    ("paper-mini", "--corpus empty --rates 0", "--rates: learning rates are above 0"),
]

ALL = """
import contextlib, importlib, io, json, sys
from mom_tools.__main__ import MODULES
found = []
for tool, line in json.loads(sys.argv[1]):
    sys.argv = [tool, *line.split()]
    said, code = io.StringIO(), "no exit"
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            importlib.import_module(MODULES.get(tool, tool)).main()
        except SystemExit as end:
            code = end.code
        except BaseException as error:
            code = repr(error)
    found.append([code, said.getvalue(), "torch" in sys.modules])
print(json.dumps(found))
"""


def test_a_mistake_is_one_message_with_exit_code_2_before_torch_is_imported(tmp_path):
    for folder in ("empty", "run/checkpoints"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "file").touch()
    (tmp_path / "published").mkdir()
    (tmp_path / "published/config.json").write_text('{"model_type": "mamba"}')
    metrics = [{"step": s, "loss/text": 3.0, "tokens/text": 9 * s, "flops/total": 9 * s} for s in (1, 2)]
    (tmp_path / "run/metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in metrics))
    (tmp_path / "c.yaml").write_text(
        "run_dir: new\nvocabulary: {text: 100}\nmodel: {dim: 32, layers: 1, decoupled: []}\n"
        "data: {train: [{path: nowhere}], sequence_length: 64}\noptimizer: {learning_rate: 1.0e-3}\n"
        "training: {steps: 10, batch: 4, micro_batch: 2}\n"
    )
    line = [sys.executable, "-c", ALL, json.dumps([m[:2] for m in MISTAKES])]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wrong = []
    for (tool, given, message), (code, said, torch) in zip(MISTAKES, json.loads(done.stdout), strict=True):
        if code != 2 or message not in said or "Traceback" in said:
            wrong.append(f"{tool} {given}: ended with {code}, said {said!r} instead of {message!r}")
        elif torch:
            wrong.append(f"{tool} {given}: torch was imported before, or by an earlier tool")
    assert not wrong, "\n".join(wrong)
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "x").exists()
