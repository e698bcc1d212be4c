"""mom COMMAND [ARGUMENT ...]: every command of the project under one name. `mom COMMAND --help` says more."""

from __future__ import annotations

import difflib
import sys
from importlib import import_module

from mom_tokenizers.errors import EXIT_USER_ERROR

COMMANDS: dict[str, dict[str, tuple[str, str]]] = {
    "runs": {
        "train": ("mom_train.__main__", "train one run in this process, or carry on with it"),
        "local": ("torchrun_launch.__main__", "train on this machine, with several ranks"),
        "submit": ("torchrun_launch.__main__", "train on a Slurm cluster"),
        "branch": ("mom_tools.model.branch", "decay the learning rate from any checkpoint of a run"),
        "status": ("torchrun_launch.__main__", "say how a run stands"),
        "logs": ("torchrun_launch.__main__", "print what a run prints"),
        "cancel": ("torchrun_launch.__main__", "end a run after a checkpoint"),
    },
    "data": {
        "tokenize": ("mom_tools.data.tokenize_shards", "turn raw documents into token shards"),
        "train-tokenizers": ("mom_tools.data.train_tokenizers", "train small tokenizers from raw documents"),
        "verify": ("mom_tools.data.verify_shards", "read every byte of a dataset and list what is wrong"),
        "inspect": ("mom_tools.data.inspect_shards", "show a dataset and its packed rows as an HTML page"),
        "pack-stats": ("mom_tools.data.pack_stats", "predict padding, cut documents and epochs"),
        "map-vocabulary": ("mom_tools.data.map_vocabulary", "make a vocabulary from Chameleon's tokenizer"),
        "convert-vqgan": ("mom_tools.data.convert_vqgan", "read a published VQGAN as an image tokenizer"),
    },
    "models": {
        "describe": ("mom_tools.model.describe_model", "compute parameters, FLOPs and memory from a config"),
        "plan": ("mom_tools.model.plan_run", "predict step time, days and cost on a cluster"),
        "checkpoint": ("mom_tools.model.checkpoint", "list, verify, prune or export checkpoints"),
        "export": ("mom_tools.model.export_model", "write a model as safetensors, or for Transformers"),
        "eval": ("mom_tools.model.eval", "compute the losses of a checkpoint on any token shards"),
        "evaluate": ("mom_tools.evaluate.multimodal", "retrieval, conditional gains and minimal pairs by likelihood"),
        "lm-eval": ("mom_tools.evaluate.harness", "score a model on tasks of lm-evaluation-harness"),
        "generate": ("mom_tools.model.generate", "sample text, pictures and speech from a run"),
        "score": ("mom_tools.model.score_samples", "score samples beside real pictures and recordings"),
    },
    "comparisons": {
        "report": ("mom_tools.compare.report", "write one HTML page about one or more runs"),
        "plot": ("mom_tools.compare.plot_run", "draw the loss curves of one or more runs"),
        "match-loss": ("mom_tools.compare.match_loss", "compare two models by the FLOPs they need for a loss"),
        "transfer": ("mom_tools.compare.transfer", "show whether the best learning rate is the same at other widths"),
        "paper-mini": ("mom_tools.paper.miniature", "repeat the paper's tables in miniature on your corpus"),
        "laws": ("mom_tools.laws.laws", "fit scaling laws by modality to a grid of runs, or to the paper's losses"),
    },
    "this machine": {
        "demo": ("mom_tools.demo.demo", "run the whole job, from documents to a trained model"),
        "demo-corpus": ("mom_tools.demo.corpus", "make the corpus of the demo"),
        "gpu-check": ("mom_tools.bench.gpu_check", "check a GPU in six minutes: is it right, how fast, what limits it"),
        "bench": ("mom_tools.bench.kernels", "time the kernels and the training step"),
        "bench-data": ("mom_tools.bench.loading", "time reading and packing"),
        "bench-tokenizers": ("mom_tools.bench.tokenizing", "time every stage of tokenizing"),
    },
}
"""Group -> command -> the module whose `main` runs it, and what it does."""

MODULES = {name: module for group in COMMANDS.values() for name, (module, _) in group.items()}


def usage() -> str:
    lines = ["usage: mom COMMAND [ARGUMENT ...]     (mom COMMAND --help says more)"]
    for group, commands in COMMANDS.items():
        lines += ["", f"{group}:", *(f"  {name:<18}{purpose}" for name, (_, purpose) in commands.items())]
    return "\n".join(lines)


def main() -> None:
    """Run the command that sys.argv names. Exits with 2 where there is no such command."""
    name, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("--help", [])
    if name in ("-h", "--help"):
        print(usage())
        return
    if name not in MODULES:
        near = difflib.get_close_matches(name, MODULES, 1)
        advice = f"did you mean '{near[0]}'?" if near else "mom --help lists the commands."
        print(f"mom: there is no command '{name}'; {advice}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    module = MODULES[name]
    if module == "torchrun_launch.__main__":
        sys.argv = ["mom", name, *arguments]
    else:
        sys.argv = [f"mom {name}", *arguments]
    import_module(module).main()


if __name__ == "__main__":
    main()
