"""`jumprelu train` as a user runs it: one command in a fresh process, its time, memory and result.

For every L0 and seed the command of the README (embedded model, standard library, practical recipe, 2 M tokens) runs with `--l0` and `--seed`
in an empty folder. Wall and processor time are those of the whole process, start and imports included; peak memory is the largest resident set
of the process. The metrics are those of the metrics.json that it leaves, measured on files it was not trained on. The first run's log is
kept, thinned, for the picture of the front page (`bench/picture.py`). Targets: 3 minutes and 2 GB on two cores; for L0 32 loss recovered
≥ 0.985 against zero- and ≥ 0.975 against mean-ablation, FVU ≤ 0.09, dead ≤ 5 %, dense ≤ 10 %; for L0 16 ≥ 0.97, ≥ 0.95, FVU ≤ 0.145.

    python bench/train_default.py --l0 32 16 --seeds 0 1 2 --out bench/results/train_default.json"""
from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev

from _common import argument_parser, report, root

command = [sys.executable, "-c", "import sys; from jumprelu_nb.share.cli import main; sys.exit(main())", "train"]
shown = ["l0", "fvu", "explained_variance", "cosine", "shrinkage", "dead_fraction", "dense_fraction", "ce_clean", "ce_sae", "ce_zero", "ce_mean", "ce_control", "delta_ce", "kl",
         "loss_recovered_zero", "loss_recovered_mean", "control_fvu", "control_loss_recovered_zero", "control_loss_recovered_mean", "seconds", "tokens_per_second", "tokens", "eval_tokens", "d_in", "d_sae"]
targets = {32: dict(loss_recovered_zero=.985, loss_recovered_mean=.975, fvu=.09, dead_fraction=.05, dense_fraction=.10),
           16: dict(loss_recovered_zero=.97, loss_recovered_mean=.95, fvu=.145)}


def once(l0:float, seed:int, more:list[str]) -> tuple[dict, list[dict]]:
    "Run the command in an empty folder; its cost and metrics, and its log."
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
        start = time.perf_counter()
        process = subprocess.Popen([*command, "--l0", f"{l0:g}", "--seed", str(seed), "--out", "run", *more], cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        with process.stdout, process.stderr: out, err = process.stdout.read(), process.stderr.read()
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        if os.waitstatus_to_exitcode(status): raise SystemExit(f"the command failed:\n{out}{err}")
        m = json.loads((Path(folder)/"run"/"metrics.json").read_text(encoding="utf-8"))
        log = [json.loads(l) for l in (Path(folder)/"run"/"log.jsonl").read_text().splitlines()]
    peak = used.ru_maxrss/(2**20 if sys.platform == "darwin" else 1024)
    return {"seed": seed, "wall_seconds": round(wall, 1), "cpu_seconds": round(used.ru_utime + used.ru_stime, 1), "peak_memory_mb": round(peak), **{k: m.get(k) for k in shown}}, log


def pooled(runs:list[dict]) -> dict[str, dict[str, float]]:
    "Mean and standard deviation over the seeds."
    keys = [k for k in runs[0] if k != "seed" and all(isinstance(r[k], (int, float)) for r in runs)]
    return {k: {"mean": round(mean(r[k] for r in runs), 5), "sd": round(stdev(r[k] for r in runs), 5) if len(runs) > 1 else 0., "worst": (min if "recovered" in k or k in ("explained_variance", "cosine", "tokens_per_second") else max)(r[k] for r in runs)} for k in keys}


def main() -> None:
    "Measure and report."
    parser = argument_parser(__doc__)
    parser.add_argument("--l0", type=float, nargs="+", default=[32., 16.], help="wanted L0s (default: 32 16)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds (default: 0 1 2)")
    parser.add_argument("--more", default="", help="further words of the command, e.g. '--tokens 100000'")
    args = parser.parse_args()
    results, curve = {}, None
    for l0 in args.l0:
        runs = []
        for seed in args.seeds:
            r, log = once(l0, seed, shlex.split(args.more))
            print(f"L0 {l0:g}, seed {seed}: {r['wall_seconds']} s, {r['peak_memory_mb']} MB, FVU {r['fvu']:.4f}, loss recovered {r['loss_recovered_zero']:.4f} / {r['loss_recovered_mean']:.4f}", file=sys.stderr)
            runs.append(r)
            curve = curve or [{k: float(f"{row[k]:.4g}") for k in ("tokens", "l0", "fvu")} for row in log]
        summary = pooled(runs)
        missed = {k: summary[k]["worst"] for k, v in targets.get(int(l0), {}).items() if (summary[k]["worst"] < v if "recovered" in k else summary[k]["worst"] > v)}
        results[f"{l0:g}"] = {"summary": summary, "runs": runs, "targets": targets.get(int(l0), {}), "missed": missed}
    report("train_default", {"by_l0": results, "curve": curve}, args)


if __name__ == "__main__": main()
