"""How much sooner `jumprelu train` is done than it would be with other ways to take its steps: the same command, the same training, three engines.

    python bench/train_speed.py --out bench/results/train_speed.json                    # two rounds of three runs, six minutes on two cores
    python bench/train_speed.py --more '--d-sae 4096' --rounds 1

definition: every step on tables, differentiated by autograd, torch's fused Adam: what the pages define, and the library of the first sessions.
torch:      the sparse step in plain torch, as it runs where numba is not installed.
library:    what runs where it is.
The runs take turns. Training seconds are those of the log, harvesting included; the command includes start, imports, evaluation and statistics."""
from __future__ import annotations

import shlex
import sys
from statistics import median

import train_default
from _common import argument_parser, report

start = train_default.command[2]
ENGINES = {"definition": "import functools, torch, jumprelu_nb.sae.loops as l, jumprelu_nb.train.trainer as t; l.compiled(False); whole = t.codes_of; "
                         "t.codes_of = lambda sae, u, form, *rest: whole(sae, u, 'table', *rest); ",
           "torch": "import jumprelu_nb.sae.loops as l; l.compiled(False); ",
           "library": ""}


def main(words:list[str]|None=None) -> dict:
    "Measure and report."
    parser = argument_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=2, help="runs of each engine (default: 2)")
    parser.add_argument("--l0", type=float, default=32., help="wanted L0 (default: 32)")
    parser.add_argument("--more", default="", help="further words of the command, e.g. '--tokens 100000'")
    args = parser.parse_args(words)
    runs = {name: [] for name in ENGINES}
    for r in range(args.rounds):
        for name in (list(ENGINES), list(ENGINES)[::-1])[r % 2]:
            train_default.command[2] = ENGINES[name] + start
            try: got, log = train_default.once(args.l0, 0, shlex.split(args.more))
            finally: train_default.command[2] = start
            runs[name].append({"training_seconds": log[-1]["seconds"], **{k: got[k] for k in ("wall_seconds", "cpu_seconds", "peak_memory_mb", "l0", "fvu")}})
            print(name, runs[name][-1], file=sys.stderr)
    middle = {name: {k: round(median(r[k] for r in rows), 4) for k in rows[0]} for name, rows in runs.items()}
    return report("train_speed", {"runs": runs, "median": middle, "times_as_long": {n: {k: round(m[k] / middle["library"][k], 2) for k in ("training_seconds", "wall_seconds", "cpu_seconds")} for n, m in middle.items()}}, args)


if __name__ == "__main__": main()
