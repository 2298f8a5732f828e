"""Kill `jumprelu train` with SIGKILL again and again, resume it each time, and compare its weights with those of a run that was left alone.

Moments are random, the first ones while the language model is still being loaded, the last ones while the result is being written. Prints for every kill
how far the run had come, whether the final weights are equal to the bit, and what checkpoints cost: the wall time of a run that writes them every
`--checkpoint-seconds` against one that writes none.

    python bench/resume.py --kills 8 --tokens 400000"""
from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _common import argument_parser, report, root

command = [sys.executable, "-c", "import sys; from jumprelu_nb.share.cli import main; sys.exit(main())", "train"]


def start(folder:Path, out:str, words:list[str]) -> subprocess.Popen:
    "Start the command."
    env = {**os.environ, "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen([*command, *words, "--quiet", "--show", "0", "--out", out], cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process:subprocess.Popen) -> None:
    "Wait for the end, which must be a good one."
    err = process.communicate()[1]
    if process.returncode: raise SystemExit(f"the command failed with {process.returncode}:\n{err}")


def progress(out:Path) -> dict:
    "How far a run has come."
    log = (out/"log.jsonl").read_text().splitlines() if (out/"log.jsonl").exists() else []
    return {"tokens_logged": json.loads(log[-1])["tokens"] if log else 0, "files": sorted(p.name for p in out.iterdir()) if out.exists() else []}


def main() -> None:
    "Kill, resume, compare, report."
    parser = argument_parser(__doc__)
    parser.add_argument("--kills", type=int, default=8, help="how often the run is killed (default: 8)")
    parser.add_argument("--tokens", type=int, default=400_000, help="length of the training (default: 400,000)")
    parser.add_argument("--checkpoint-seconds", type=float, default=.5, help="between checkpoints (default: 0.5)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    args = parser.parse_args()
    r, kills = random.Random(args.seed), []
    with tempfile.TemporaryDirectory() as tmp:
        folder, words = Path(tmp), ["--tokens", str(args.tokens), "--eval-tokens", "10000"]
        seconds = {}
        for out, every in (("whole", 1e9), ("checkpointed", args.checkpoint_seconds)):
            began = time.perf_counter()
            finish(start(folder, out, [*words, "--checkpoint-seconds", str(every)]))
            seconds[out] = round(time.perf_counter() - began, 2)
        resume = [*words, "--checkpoint-seconds", str(args.checkpoint_seconds), "--resume"]
        while len(kills) < args.kills:
            wait = r.uniform(.2, 1.) * seconds["whole"]
            process = start(folder, "killed", resume)
            try:
                process.wait(wait)
                break                                     # it got through
            except subprocess.TimeoutExpired: pass
            process.kill(); process.communicate()
            kills.append({"after_seconds": round(wait, 2), **progress(folder/"killed")})
            print(kills[-1], file=sys.stderr)
        finish(start(folder, "killed", resume))
        weights = {name: (folder/name/"sae_weights.safetensors").read_bytes() for name in ("whole", "checkpointed", "killed")}
    equal = {name: w == weights["whole"] for name, w in weights.items()}
    report("resume", {"kills": kills, "equal_to_the_bit": equal, "seconds": seconds}, args)
    if not all(equal.values()): raise SystemExit("a resumed run ended with other weights")


if __name__ == "__main__": main()
