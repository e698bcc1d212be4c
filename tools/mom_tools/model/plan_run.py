"""Predict what a run on a cluster would need: memory, network traffic, step time, tokens per second, days and cost.

    mom plan configs/chameleon/1.5b-mom.yaml --nodes 16 --gpus-per-node 8
    mom plan configs/chameleon/880m-mom.yaml --nodes 4 --gpus-per-node 8 --interconnect ethernet-100g \
        parallel.shard_ranks=8 --mfu 0.3 --price 2.5 --json
    mom plan configs/chameleon/[!_]*-mom.yaml --gpus-per-node 8         # one row for each

Everything is PREDICTED. Counted from the model's own tensors are parameters, FLOPs and the bytes of each collective (a
test counts them again on real ranks). Assumed are --mfu, --efficiency, --latency and the bandwidths of --interconnect;
give your own where you have measured them.

How communication hides: FSDP2 gathers a unit's weights while the unit before computes, and sums its gradients while the
next one back computes. A unit's communication is exposed as far as it takes longer than that: max(0, it - computing).
The first gather, the last sum, the clipping norm and the agreement before each step are exposed in full. A ring
collective takes (S - 1) / S x bytes / bandwidth, an all-reduce twice that; --latency once per doubling of its ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mom_tokenizers.errors import UserError, exit_clearly
from mom_tools.options import add_configs, add_json, command_parser, configs_and_overrides
from mom_tools.output import markdown_table, write_json
from mom_train.config.files import load_config
from mom_train.cost.step_time import GPUS, INTERCONNECTS, Assumptions, plan


def describe(name: str, plans: Sequence[dict[str, Any]]) -> str:
    """The figures of one config on one cluster, with a column for each interconnect."""
    first = plans[0]
    sent, calls = first["communication_bytes"]["sent"], first["communication_bytes"]["calls"]
    fits = "fits" if first["memory_fits"] else "DOES NOT FIT"
    rows = {
        "seconds per step": [f"{p['seconds_per_step']['total']:.3f}" for p in plans],
        "  computing": [f"{p['seconds_per_step']['computing']:.3f}" for p in plans],
        "  communicating": [f"{p['seconds_per_step']['communicating']:.3f}" for p in plans],
        "  of it exposed": [f"{p['seconds_per_step']['exposed']:.3f}" for p in plans],
        "MFU": [f"{100 * p['mfu']:.1f} %" for p in plans],
        "tokens/s": [f"{p['tokens_per_s']:,.0f}" for p in plans],
        "tokens per GPU-hour": [f"{p['tokens_per_gpu_hour'] / 1e6:,.1f} M" for p in plans],
        "days to the end": [f"{p['hours'] / 24:.2f}" for p in plans],
        "GPU-hours": [f"{p['gpu_hours']:,.0f}" for p in plans],
    }
    if first["fp8_gain"] != 1:
        rows["computing in bf16, over in fp8 (calculated, not measured)"] = [f"{p['fp8_gain']:.2f}" for p in plans]
    if first["cost"] is not None:
        rows["cost"] = [f"{p['cost']:,.0f}" for p in plans]
    return "\n".join(
        [
            f"{name}, PREDICTED: {first['nodes']} nodes x {first['gpus_per_node']} {first['gpu']}, "
            f"{first['accumulation']} micro-batches a step, {first['tokens'] / 1e9:,.1f} G tokens in all",
            f"memory per rank {first['memory_bytes_per_rank'] / 1e9:.1f} GB ({fits})",
            "sent per rank and step: "
            + ", ".join(f"{k} {v / 1e6:,.1f} MB in {calls[k]} calls" for k, v in sent.items() if calls[k]),
            f"assumed: {', '.join(f'{k} {v}' for k, v in first['assumed'].items() if k != 'network_bytes_per_s')}",
            "",
            markdown_table(["", *(p["interconnect"] for p in plans)], [[name, *cells] for name, cells in rows.items()]),
        ]
    )


def overview(plans: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """A Markdown table with a row for each config."""
    rows = [
        [
            name,
            f"{p['nodes']} x {p['gpus_per_node']}",
            p["interconnect"],
            f"{p['memory_bytes_per_rank'] / 1e9:.1f}" + ("" if p["memory_fits"] else " (!)"),
            f"{p['seconds_per_step']['total']:.3f}",
            f"{100 * p['mfu']:.0f} %",
            f"{p['tokens_per_gpu_hour'] / 1e6:,.1f}",
            f"{p['tokens'] / 1e9:,.0f}",
            f"{p['hours'] / 24:.2f}",
            f"{p['gpu_hours']:,.0f}",
        ]
        for name, p in plans
    ]
    header = ["predicted", "nodes x GPUs", "network", "GB per rank", "s per step", "MFU", "M tokens per GPU-hour"]
    return markdown_table([*header, "G tokens", "days", "GPU-hours"], rows)


def main() -> None:
    parser = command_parser(__doc__)
    add_configs(parser)
    parser.add_argument("--nodes", type=int, metavar="N", help="nodes (default: as many as need no accumulation)")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="G", help="GPUs of a node (%(default)s)")
    parser.add_argument("--gpu", choices=GPUS, default="h100", help="kind of GPU: %(choices)s (%(default)s)")
    parser.add_argument(
        "--interconnect",
        nargs="+",
        choices=INTERCONNECTS,
        metavar="NAME",
        default=["infiniband-ndr"],
        help=f"network between nodes, one or several of {', '.join(INTERCONNECTS)} (%(default)s)",
    )
    parser.add_argument(
        "--mfu",
        type=float,
        default=0.35,
        help="ASSUMED share of the peak FLOP/s while computing (%(default)s, not measured)",
    )
    parser.add_argument("--efficiency", type=float, default=0.75, help="ASSUMED share of the bandwidths (%(default)s)")
    parser.add_argument(
        "--latency", type=float, default=2e-5, metavar="S", help="ASSUMED seconds per message (%(default)s)"
    )
    parser.add_argument(
        "--patch-share",
        type=float,
        default=0.5,
        help="ASSUMED share of patches among the tokens, with diffusion (%(default)s)",
    )
    parser.add_argument("--price", type=float, help="price of one GPU for an hour, in any currency")
    add_json(parser)
    given = parser.parse_intermixed_args()
    with exit_clearly():
        names, overrides = configs_and_overrides(given.config)
        for flag, value in {"--mfu": given.mfu, "--efficiency": given.efficiency}.items():
            if not 0 < value <= 1:
                raise UserError(f"{flag} {value}: a share between 0 and 1")
        if not 0 <= given.patch_share <= 1:
            raise UserError(f"--patch-share {given.patch_share}: a share from 0 to 1")
        for flag, value in {"--latency": given.latency, "--price": given.price}.items():
            if value is not None and not 0 <= value < math.inf:
                raise UserError(f"{flag} {value}: not below 0, and finite")
        if given.gpus_per_node < 1 or (given.nodes is not None and given.nodes < 1):
            raise UserError("--nodes and --gpus-per-node: at least one")
        assumed = Assumptions(given.mfu, given.efficiency, given.latency, given.patch_share, given.price)
        found = []
        for name in names:
            config = load_config(name, overrides)
            per_node = config.training.micro_batch * given.gpus_per_node
            nodes = given.nodes or max(1, config.training.batch // per_node)
            for network in given.interconnect:
                found.append((name, plan(config, nodes, given.gpus_per_node, given.gpu, network, assumed)))
        if given.json:
            objects = [{"config": name} | p for name, p in found]
            write_json(given.json, objects[0] if len(objects) == 1 else objects, indent=2)
        elif len(names) == 1:
            print(describe(names[0], [p for _, p in found]))
        else:
            print(overview([(f"{Path(name).parent.name}/{Path(name).stem}", p) for name, p in found]))


if __name__ == "__main__":
    main()
