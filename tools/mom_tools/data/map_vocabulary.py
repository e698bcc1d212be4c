"""Make a vocabulary layout from a tokenizer that holds image codes among its words, as Chameleon's does.

    mom map-vocabulary tokenizer.json --output layout.json
    mom map-vocabulary tokenizer.json --output layout.json --further speech=500 --special 'null=<unk>'

A run's config then says `vocabulary: layout.json`. Image codes are the tokens IMGIMG...Z; the specials are Chameleon's
tokens, and reserved tokens where Chameleon has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mom_tokenizers.errors import UserError, exit_clearly
from mom_tokenizers.vocab import chameleon_layout, read_vocabulary
from mom_tools.options import add_json, command_parser
from mom_tools.output import write_json


def pairs(arguments: Sequence[str], option: str) -> dict[str, str]:
    """Name -> value, from arguments NAME=VALUE. Raises UserError for an argument of another form, or a name that is
    given twice."""
    for argument in arguments:
        if not all(argument.partition("=")):
            raise UserError(f"{option} {argument}: expected NAME=VALUE")
    names = [argument.split("=", 1)[0] for argument in arguments]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{option}: {twice[0]} is given twice")
    return dict(argument.split("=", 1) for argument in arguments)


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("tokenizer", type=Path, help="the tokenizer, a tokenizer.json or vocab.json")
    parser.add_argument("--output", type=Path, required=True, help="file of the layout")
    parser.add_argument(
        "--special", nargs="+", default=(), metavar="NAME=TOKEN", help="specials, as null=<reserved08705>"
    )
    parser.add_argument(
        "--further",
        nargs="+",
        default=(),
        metavar="MODALITY=SIZE",
        help="modalities whose ids are appended, such as speech=500",
    )
    add_json(parser)
    arguments = parser.parse_args()
    with exit_clearly():
        further = pairs(arguments.further, "--further")
        if wrong := [size for size in further.values() if not size.isdecimal()]:
            raise UserError(f"--further: {wrong[0]!r} is no number of ids")
        tokens = read_vocabulary(arguments.tokenizer)
        sizes = {name: int(size) for name, size in further.items()}
        layout = chameleon_layout(tokens, pairs(arguments.special, "--special"), sizes)
        layout.save(arguments.output)
        names = {id_: token for token, id_ in tokens.items()}
        figures = {
            "sizes": dict(layout.sizes),
            "size": layout.size,
            "specials": {special: [id_, names.get(id_)] for special, id_ in layout.specials.items()},
        }
        if write_json(arguments.json, figures, indent=None):
            print(f"{arguments.output}: {layout.size:,} ids, {dict(layout.sizes)}")
            for special, (id_, token) in figures["specials"].items():  # type: ignore[attr-defined]
                print(f"  {special:5} {id_:6} {token or '(appended)'}")


if __name__ == "__main__":
    main()
