"Killed with SIGKILL at a random moment and resumed, a training ends with the same weights to the bit."
from __future__ import annotations

import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_lm import make_model, make_tokenizer, promised

from jumprelu_nb.share.cli import main

start = [sys.executable, "-c", "import sys; from jumprelu_nb.share.cli import main; sys.exit(main())"]


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")
def test_sigkill(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_model(*promised["llama"][:2]).save_pretrained("model")
    make_tokenizer().save_pretrained("model")
    words, r = "the quick brown fox jumps over the lazy dog".split(), random.Random(0)
    Path("text.txt").write_text("\n".join(" ".join(r.choices(words, k=12)) for _ in range(2000)))
    line = shlex.split("train --model model --text text.txt --tokens 100000 --d-sae 128 --l0 8 --set batch_size=128 --eval-tokens 500 --show 0 --quiet --checkpoint-seconds 0.05")

    began = time.perf_counter()
    assert main([*line, "--out", "whole"]) == 0
    seconds = time.perf_counter() - began

    wait = random.SystemRandom().uniform(0, .6 * seconds)                          # a random moment after the first line of the log
    process = subprocess.Popen([*start, *line, "--out", "killed"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")})
    try:
        while process.poll() is None and not Path("killed/log.jsonl").exists(): time.sleep(.01)
        try: process.wait(wait)
        except subprocess.TimeoutExpired: pass
    finally:
        if process.poll() is None: process.send_signal(signal.SIGKILL)
        process.wait()
    moment = f"killed {wait:.2f} s after the first line of the log; left {sorted(p.name for p in Path('killed').iterdir())}"

    assert main([*line, "--out", "killed", "--resume"]) == 0, moment + capsys.readouterr().err
    assert Path("killed/sae_weights.safetensors").read_bytes() == Path("whole/sae_weights.safetensors").read_bytes(), moment
    assert sorted(p.name for p in Path("killed").iterdir()) == sorted(p.name for p in Path("whole").iterdir()), moment
