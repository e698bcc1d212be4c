"""Writes docs/reference/api/*.md from the docstrings of what other programs would import.

python tools/dev/api_reference.py            # writes the pages
python tools/dev/api_reference.py --check    # ends with exit code 2 where a page is not up to date
"""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import griffe

from mom_tokenizers.errors import UserError, exit_clearly

ROOT = Path(__file__).parents[2]
OUT = ROOT / "docs/reference/api"
PATHS = [str(ROOT / folder) for folder in (".", "data", "tokenizers")]
PAGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "tokenizers": (
        "Tokenizers: values into ids and back, and the vocabulary that joins the modalities.",
        (
            "mom_tokenizers.bundle.Tokenizers",
            "mom_tokenizers.base.Tokenizer",
            "mom_tokenizers.vocab.VocabLayout",
            "mom_tokenizers.errors.UserError",
        ),
    ),
    "data": (
        "Data: token datasets, the order in which a run reads them, and batches.",
        (
            "mom_data.shards.dataset.TokenDataset",
            "mom_data.shards.format.ShardWriter",
            "mom_data.shards.format.write_manifest",
            "mom_data.order.plan.Source",
            "mom_data.order.plan.Plan",
            "mom_data.batches.batch.PackedBatch",
            "mom_data.batches.batch.build_batch",
            "mom_data.batches.batch.sort_by_modality",
            "mom_data.batches.loader.Share",
            "mom_data.batches.loader.batches",
        ),
    ),
    "model": (
        "Model: the language model, its configs, and the models of runs.",
        (
            "mom_train.config.model.ModelConfig",
            "mom_train.model.language_model.LanguageModel",
            "mom_train.model.language_model.Losses",
            "mom_train.model.language_model.build_model",
            "mom_train.model.init.initialize",
            "mom_train.model.mamba.MambaMixer",
            "mom_train.model.sharding.shard",
            "mom_train.checkpoint.load.load_run",
            "mom_train.generate.sampler.Sampling",
            "mom_train.generate.sampler.sample_document",
        ),
    ),
    "ops": (
        "Operators: the parts of a block that have several backends.",
        (
            "mom_train.ops.layout.RowLayout",
            "mom_train.ops.routing.modality_linear.modality_linear",
            "mom_train.ops.conv.causal_conv.causal_conv",
            "mom_train.ops.scan.selective_scan.selective_scan",
            "mom_train.ops.scan.naive.selective_scan",
            "mom_train.ops.conv.naive.causal_conv",
            "mom_train.ops.backends.choose",
        ),
    ),
}
"""Page -> what it is about, and the objects that it describes."""


def signature(function: griffe.Function, name: str) -> str:
    """The head of the function as it is written in the code, without decorators and `self`."""
    given = [p for p in function.parameters if p.name not in ("self", "cls")]
    parts, keyword_only = [], False
    for parameter in given:
        if parameter.kind is griffe.ParameterKind.keyword_only and not keyword_only:
            keyword_only = True
            parts.append("*")
        star = {griffe.ParameterKind.var_positional: "*", griffe.ParameterKind.var_keyword: "**"}.get(
            parameter.kind or griffe.ParameterKind.positional_or_keyword, ""
        )
        kind = f": {parameter.annotation}" if parameter.annotation is not None else ""
        default = f" = {parameter.default}" if parameter.default is not None and not star else ""
        parts.append(f"{star}{parameter.name}{kind}{default}")
    result = f" -> {function.returns}" if function.returns is not None and function.name != "__init__" else ""
    line = f"{name}({', '.join(parts)}){result}"
    return line if len(line) <= 110 else f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){result}"


def text_of(thing: griffe.Object) -> str:
    """The docstring. A paragraph whose lines are aligned by spaces, such as a table of fields, stays as it is."""
    paragraphs = inspect.cleandoc(thing.docstring.value).split("\n\n") if thing.docstring else []
    aligned = re.compile(r"^\s|\S {2,}\S", re.MULTILINE)
    return "\n\n".join(f"```text\n{p}\n```" if aligned.search(p) else p for p in paragraphs)


def described(thing: griffe.Object) -> Iterator[str]:
    """The lines about one function or class, a class with its public attributes and methods."""
    yield f"## {thing.name}\n"
    yield f"`from {thing.parent.path if thing.parent else ''} import {thing.name}`\n"
    if isinstance(thing, griffe.Function):
        yield f"```python\n{signature(thing, thing.name)}\n```\n"
    yield f"{text_of(thing)}\n"
    if not isinstance(thing, griffe.Class):
        return
    if isinstance(init := thing.members.get("__init__"), griffe.Function):
        yield f"```python\n{signature(init, thing.name)}\n```\n"
        if init.docstring:
            yield f"{text_of(init)}\n"
    for member in thing.members.values():
        if member.name.startswith("_") or member.is_alias:
            continue
        if isinstance(member, griffe.Attribute) and member.docstring:
            kind = f": {member.annotation}" if member.annotation is not None else ""
            yield f"* `{member.name}{kind}`. {' '.join(text_of(member).split())}"
    yield ""
    for member in thing.members.values():
        if isinstance(member, griffe.Function) and not member.name.startswith("_") and member.docstring:
            yield f"### {thing.name}.{member.name}\n\n```python\n{signature(member, member.name)}\n```\n"
            yield f"{text_of(member)}\n"


def pages() -> dict[str, str]:
    """The name and the content of each page."""
    loader = griffe.GriffeLoader(search_paths=PATHS)
    found = {}
    for page, (about, names) in PAGES.items():
        lines = [f"# {about.split(':')[0]}\n", f"{about.split(': ', 1)[1].capitalize()}", ""]
        lines.append("Made from the docstrings by `python tools/dev/api_reference.py`; change them there.\n")
        for name in names:
            top = loader.load(name.split(".")[0])
            thing = top[name.split(".", 1)[1]]
            assert isinstance(thing, griffe.Object), name
            lines += described(thing)
        found[page] = "\n".join(lines).rstrip() + "\n"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, and say whether the pages are up to date")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the pages (default: docs/reference/api)")
    arguments = parser.parse_args()
    with exit_clearly():
        for page, content in pages().items():
            path = arguments.out / f"{page}.md"
            if arguments.check and (not path.exists() or path.read_text() != content):
                raise UserError(f"{path} is not up to date: run python tools/dev/api_reference.py")
            if not arguments.check:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(content)


if __name__ == "__main__":
    main()
