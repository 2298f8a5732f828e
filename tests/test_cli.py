"The command line: what it leaves, what it says, and one clear line for everything that goes wrong."
from __future__ import annotations

import json
import random
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_lm import make_model, make_tokenizer, promised

import jumprelu_nb.train.trainer as trainer
from jumprelu_nb.sae.model import SAE
from jumprelu_nb.share.cli import main
from jumprelu_nb.train.trainer import train

small = "--tokens 6000 --d-sae 64 --l0 8 --set batch_size=256 --eval-tokens 1000 --show 0 --features 2000"      # 24 steps
keys = """l0 fvu explained_variance ce_clean ce_sae ce_zero ce_mean loss_recovered_zero loss_recovered_mean kl dead_fraction dense_fraction shrinkage
          tokens seconds tokens_per_second d_in d_sae recipe seed peak_memory_mb control_fvu""".split()
written = ["cfg.json", "features.html", "log.jsonl", "metrics.json", "sae_weights.safetensors"]


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    "Folders of tiny random models, and a text that they can read."
    root = tmp_path_factory.mktemp("models")
    for name in ("llama", "gpt2"):
        make_model(*promised[name][:2]).save_pretrained(root/name)
        make_tokenizer().save_pretrained(root/name)
    words, r = "the quick brown fox jumps over the lazy dog".split(), random.Random(0)
    (root/"text.txt").write_text("\n".join(" ".join(r.choices(words, k=12)) for _ in range(1500)))
    (root/"empty.txt").write_text("")
    (root/"short.txt").write_text("the lazy dog\n")
    return root


@pytest.fixture
def cli(models, tmp_path, monkeypatch, capsys):
    "Run a command line in an empty folder; returns exit code, stdout and stderr."
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("JUMPRELU_DEBUG", raising=False)

    def run(line:str):
        capsys.readouterr()
        code = main(shlex.split(line.format(models=models, small=f"--model {models}/llama --text {models}/text.txt {small}")))
        return code, *capsys.readouterr()
    return run


def refuses(cli, line:str, *said:str, code:int=1):
    "One line on stderr that says so (after notes, if any), and nothing new on disk."
    before = sorted(Path().rglob("*"))
    got, _, err = cli(line)
    assert got == code and "Traceback" not in err
    err = [l for l in err.splitlines() if not l.startswith("note: ")]
    assert len(err) == 1 and err[0].startswith("error: "), err
    err = err[0]
    for s in said: assert s in err, err
    assert sorted(Path().rglob("*")) == before


def weights(out) -> bytes: return (Path(out)/"sae_weights.safetensors").read_bytes()


# ------------------------------------------------------------------------------------------------ what it does
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_main_job_on_a_local_folder(cli, models, family):
    code, out, err = cli(f"train --model {models}/{family} --text {models}/text.txt {small.replace('--show 0', '--show 2')}")
    assert code == 0, err
    run = Path(f"runs/{family}-resid_post.1-64-l0_8-s0")
    assert sorted(p.name for p in run.iterdir()) == written
    m = json.loads((run/"metrics.json").read_text())
    assert set(keys) <= m.keys() and m["d_in"] == 32 and m["d_sae"] == 64 and m["tokens"] == 6144 and m["recipe"] == "practical"
    for said in ("FVU", "loss recovered", "latent ", "«", f"jumprelu evaluate {run}"): assert said in out
    assert all(l.startswith("note: ") for l in err.splitlines())

    code, out, _ = cli(f"info {run}")
    assert code == 0 and "32 → 64 latents" in out and "recipe practical" in out and "metrics" in out
    code, out, _ = cli(f"evaluate {run} --tokens 1000 --json")
    assert code == 0
    again = json.loads(out)
    assert {k: round(again[k], 6) for k in ("l0", "fvu", "ce_sae", "kl")} == {k: round(m[k], 6) for k in ("l0", "fvu", "ce_sae", "kl")}
    assert cli(f"evaluate {run} --tokens 1000")[1].startswith("SAE 32 → 64")


def test_the_embedded_model_and_options(cli, models):
    text = Path("code.txt"); text.write_text("".join(Path(m.__file__).read_text() for m in (json, shlex, subprocess, random)))
    code, out, err = cli("train --text code.txt --site mlp_out --layer 1 --recipe topk --tokens 4096 --d-sae 32 --l0 4 --context-size 64 --eval-tokens 1000 --seed 3 --quiet --cache kept")
    assert code == 0, err
    assert out == "runs/embedded-mlp_out.1-32-l0_4-s3\n"
    cfg = json.loads((Path(out.strip())/"cfg.json").read_text())
    assert cfg["architecture"] == "topk" and cfg["metadata"]["context_size"] == 64 and cfg["metadata"]["recipe"]["gate"] == "topk"
    assert any(Path("kept").iterdir())


def test_same_command_again_takes_the_next_name(cli):
    for name in ("", "-2", "-3"):
        code, out, _ = cli("train {small} --quiet")
        assert (code, out) == (0, f"runs/llama-resid_post.1-64-l0_8-s0{name}\n")
    assert weights("runs/llama-resid_post.1-64-l0_8-s0") == weights("runs/llama-resid_post.1-64-l0_8-s0-3")
    code, out, _ = cli("train {small} --resume")
    assert code == 0 and "s0-3 is finished already" in out and not Path("runs/llama-resid_post.1-64-l0_8-s0-4").exists()
    refuses(cli, "train {small} --out runs/llama-resid_post.1-64-l0_8-s0", "holds a finished run")


def test_notes(cli):
    code, _, err = cli("train {small} --recipe paper")
    assert code == 0 and any(l.startswith("note: ") and "will not become sparse" in l for l in err.splitlines())


def test_help_is_light_and_complete():
    code = "import sys; from jumprelu_nb.share.cli import main; c = main(['train', '--help']); sys.exit(c or 9*('torch' in sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for word in ("practical", "topk", "batch_topk", "gated", "relu_l1", "gemma_scope", "--d-sae", "--l0", "--resume", "--set"): assert word in run.stdout
    assert "checkpoint-seconds" not in run.stdout


def test_usage(cli):
    assert cli("--version")[0] == 0 and cli("--version")[1].startswith("jumprelu_nb 0.")
    assert cli("")[0] == 2 and "train" in cli("")[1]
    refuses(cli, "trian", "trian", code=2)
    refuses(cli, "train --tokens many", "--tokens", code=2)
    refuses(cli, "train --nonsense 1", "--nonsense", code=2)
    refuses(cli, "evaluate", code=2)


def test_debug_shows_the_traceback(cli, monkeypatch):
    monkeypatch.setenv("JUMPRELU_DEBUG", "1")
    code, _, err = cli("info nowhere")
    assert code == 1 and "Traceback" in err and err.splitlines()[-1].startswith("error: ")


# ------------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize("line, said", {
    "unknown model": ("train --model nobody/nothing", "nobody/nothing"),
    "a folder without a model": ("train --model {models}", "holds no language model"),
    "unknown site": ("train {small} --site residual", "resid_post"),
    "unknown layer": ("train {small} --layer 3", "0 to 2"),
    "negative layer": ("train {small} --layer -1", "0 to 2"),
    "two layers": ("train {small} --site resid_post.1 --layer 2", "names its layer already"),
    "unknown recipe": ("train {small} --recipe practicle", "practical, l0_target"),
    "unknown field": ("train {small} --set bandwith=1", "no field 'bandwith'"),
    "a value of the wrong type": ("train {small} --set lr=fast", "'fast' is not"),
    "a value that makes no sense": ("train {small} --set batch_size=0", "batch_size"),
    "no file, no dataset": ("train {small} --text nobody/nothing", "nobody/nothing"),
    "empty text": ("train {small} --text {models}/empty.txt", "0 tokens"),
    "short text": ("train {small} --text {models}/short.txt", "give more text"),
    "binary text": ("train {small} --text {models}/llama/model.safetensors", "not UTF-8"),
    "L0 above the width": ("train {small} --l0 65", "more than the 64 latents"),
    "L0 of zero": ("train {small} --l0 0", "l0 must be positive"),
    "no latents": ("train {small} --d-sae 0", "--d-sae must be at least 1"),
    "no tokens": ("train {small} --tokens 0", "--tokens must be at least 1"),
    "no evaluation": ("train {small} --eval-tokens 1", "--eval-tokens must be at least 2"),
    "long contexts": ("train {small} --context-size 41", "context_size 41"),
    "a batch larger than the text": ("train {small} --set batch_size=1_000_000", "too few for one batch"),
    "unknown device": ("train {small} --device abacus", "no device 'abacus'"),
    "unknown tracker": ("train {small} --track abacus", "abacus"),
    "out below a file": ("train {small} --out {models}/text.txt/run", "cannot be written"),
    "out is a file": ("train {small} --out {models}/text.txt", "cannot be written"),
    "nothing to evaluate": ("evaluate nowhere", "expected a folder or file, found nothing"),
    "nothing to describe": ("info {models}", "expected the files of an SAE"),
}.values())
def test_bad_input(cli, line, said): refuses(cli, line, said)


@pytest.fixture
def run(cli):
    "A finished run in `runs/a`."
    assert cli("train {small} --out runs/a")[0] == 0
    return Path("runs/a")


def test_an_sae_of_another_place(cli, run):
    refuses(cli, f"evaluate {run} --model embedded --text {{models}}/text.txt", "another site or model")
    refuses(cli, f"evaluate {run} --site resid_post.7", "resid_post.7")
    refuses(cli, f"evaluate {run} --text {{models}}/empty.txt", "0 tokens")
    with pytest.raises(ValueError, match="width 32, got 16"): SAE.load(run).encode(torch.zeros(3, 16))
    sae = SAE(8, 16); sae.init_(); sae.save("plain")
    refuses(cli, "evaluate plain", "on which model", "--model")
    assert cli("info plain")[0] == 0


def test_damaged_saes(cli, run):
    whole = weights(run)
    (run/"sae_weights.safetensors").write_bytes(whole[:len(whole)//2])
    refuses(cli, f"evaluate {run}", "cut off")
    refuses(cli, f"info {run}", "cut off")
    (run/"sae_weights.safetensors").write_bytes(whole)
    cfg = (run/"cfg.json").read_text()
    for wrong, said in ((cfg[:50], "expected JSON"), (cfg.replace('"d_sae": 64', '"d_sae": 63'), "different SAEs"),
                        (cfg.replace('"architecture": "jumprelu"', '"architecture": "abacus"'), "found abacus")):
        (run/"cfg.json").write_text(wrong)
        refuses(cli, f"info {run}", said)


def test_nan_in_the_activations(cli, models, tmp_path):
    x = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0))
    x[3000, 5] = float("nan")
    with pytest.warns(UserWarning, match="steps"), pytest.raises(ValueError, match="NaN or infinity"): train(x, d_sae=32, l0=4, tokens=8000, batch_size=256, out=tmp_path/"bad", progress=False)
    assert not (tmp_path/"bad"/"sae_weights.safetensors").exists()
    broken = make_model(*promised["llama"][:2])
    broken.model.layers[0].mlp.down_proj.weight.data.fill_(float("inf"))
    broken.save_pretrained("broken"); make_tokenizer().save_pretrained("broken")
    refuses(cli, "train {small} --model broken", "NaN or infinity")


def test_divergence_keeps_the_last_good_checkpoint(cli, monkeypatch):
    step = trainer.Trainer.step

    def diverge(self, x):
        z = step(self, x)
        if self.step_no == 15: self.sae.W_dec.data[0, 0] = float("nan")
        return z
    monkeypatch.setattr(trainer.Trainer, "step", diverge)
    code, _, err = cli("train {small} --out runs/a --checkpoint-seconds 0")
    assert code == 1 and "diverged" in err.splitlines()[-1] and "kept" in err
    assert sorted(p.name for p in Path("runs/a").iterdir()) == ["checkpoint.pt", "log.jsonl"]
    assert torch.load("runs/a/checkpoint.pt", weights_only=True)["step_no"] <= 15
    monkeypatch.setattr(trainer.Trainer, "step", step)
    assert cli("train {small} --out runs/a --resume")[0] == 0


@pytest.mark.skipif(sys.platform == "win32", reason="no such limit there")
@pytest.mark.parametrize("kb, how", [(0, "at once"), (12, "in the log or the weights"), (40, "in a checkpoint")])
def test_full_disk(cli, kb, how):
    "A limit on the size of files stands in for a disk without space: every write beyond it fails."
    import resource
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kb*1024, old[1]))
    try: code, _, err = cli("train {small} --out runs/a --checkpoint-seconds 0")
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert code == 1, how
    errors = [l for l in err.splitlines() if not l.startswith("note: ")]
    assert len(errors) == 1 and errors[0].startswith("error: ") and "runs/a" in errors[0] and "could not be written" in errors[0], err
    left = {p.name for p in Path("runs/a").iterdir()} if Path("runs/a").exists() else set()
    assert left <= {"checkpoint.pt", "log.jsonl", "cfg.json"}, left                # nothing half-written under another name
    assert cli("train {small} --out runs/a --resume")[0] == 0
    assert sorted(p.name for p in Path("runs/a").iterdir()) == written


# ------------------------------------------------------------------------------------------------ interrupted and resumed
@pytest.fixture
def stop_at(monkeypatch):
    "Send a signal to ourselves in the middle of a step."
    def at(step_no, signum=signal.SIGINT):
        step = trainer.Trainer.step

        def interrupted(self, x):
            if self.step_no == step_no and at.armed: at.armed = False; signal.raise_signal(signum)
            return step(self, x)
        at.armed = True
        monkeypatch.setattr(trainer.Trainer, "step", interrupted)
    return at


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_and_go_on(cli, stop_at, signum):
    assert cli("train {small} --out runs/whole")[0] == 0
    stop_at(9, signum)
    code, _, err = cli("train {small}")
    out = Path("runs/llama-resid_post.1-64-l0_8-s0")
    last = err.splitlines()[-1]
    assert code == 130 and last.startswith("stopped: ") and last.endswith(f"--resume --out {out}"), err
    assert sorted(p.name for p in out.iterdir()) == ["checkpoint.pt"] or (out/"log.jsonl").exists()
    assert "interrupted" in cli(f"info {out}")[1]
    refuses(cli, "train {small}", "holds an interrupted run", "--resume")
    assert main(shlex.split(last.split("go on with: ")[1])[1:]) == 0               # the command that it told
    assert weights(out) == weights("runs/whole")
    assert sorted(p.name for p in out.iterdir()) == written


def test_resume_is_the_same_training(cli, stop_at):
    stop_at(9)
    assert cli("train {small} --out runs/a")[0] == 130
    refuses(cli, "train {small} --out runs/a --resume --d-sae 32", "another training", "64", "32")
    refuses(cli, "train {small} --out runs/a --resume --recipe topk", "another training")
    refuses(cli, "train {small} --out runs/a --resume --seed 1", "another training", "seed")
    whole = Path("runs/a/checkpoint.pt").read_bytes()
    Path("runs/a/checkpoint.pt").write_bytes(whole[:len(whole)//2])
    refuses(cli, "train {small} --out runs/a --resume", "truncated or damaged")
    Path("runs/a/checkpoint.pt").write_bytes(whole)
    Path("runs/a/.checkpoint.pt.4711").write_bytes(whole[:999])                      # what SIGKILL leaves of a checkpoint that was being written
    assert cli("train {small} --out runs/a --resume")[0] == 0
    assert sorted(p.name for p in Path("runs/a").iterdir()) == written


def test_killed_before_the_metrics(cli, run):
    m = json.loads((run/"metrics.json").read_text())
    (run/"metrics.json").unlink()
    before = weights(run)
    refuses(cli, "train {small} --out runs/a", "without its evaluation", "--resume")
    refuses(cli, "train {small} --out runs/a --resume --seed 1", "another training", "seed")
    code, out, _ = cli("train {small} --out runs/a --resume")
    assert code == 0 and "FVU" in out and weights(run) == before
    again = json.loads((run/"metrics.json").read_text())
    assert {k: v for k, v in again.items() if k != "peak_memory_mb"} == {k: v for k, v in m.items() if k != "peak_memory_mb"}


def test_interrupted_in_the_evaluation(cli, monkeypatch):
    import jumprelu_nb.evaluate.fidelity as fidelity

    def stop(*a, **k): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(fidelity, "evaluate", stop)
        code, _, err = cli("train {small} --out runs/a")
    assert code == 130 and "--resume" in err.splitlines()[-1]
    assert cli("train {small} --out runs/a --resume")[0] == 0


# ------------------------------------------------------------------------------------------------ what the front page says about it
def test_the_front_page_measures_the_default_command():
    "The numbers in README are those of the command with its defaults, and they reach what they are to reach"
    from _book import root
    bench = json.loads((root/"bench"/"results"/"train_default.json").read_text(encoding="utf-8"))
    assert bench["arguments"]["more"] == "" and {"32", "16"} <= bench["results"]["by_l0"].keys(), "python bench/train_default.py --out bench/results/train_default.json && python bench/picture.py"
    for r in bench["results"]["by_l0"].values(): assert not r["missed"], r["missed"]


# ------------------------------------------------------------------------------------------------ other libraries' files
def test_convert_and_info(cli, run):
    code, out, _ = cli(f"convert {run} out --to gemma_scope")
    assert code == 0 and "0 latents active on one side only" in out and "only the path can say it" in out and Path("out/params.npz").exists()
    code, out, _ = cli("info out")
    assert code == 0 and "gemma_scope" in out and "jumprelu" in out
    refuses(cli, f"convert {run} out", "is there already")
    refuses(cli, f"convert {run} new --to sparsify", "sparsify's files hold TopK")
    refuses(cli, f"convert {run} new --to nonsense", "Unknown format 'nonsense'")
    refuses(cli, f"convert {run} new --given k", "expected name=value")
    refuses(cli, f"convert {run} new --given k=3", "not for k")
    refuses(cli, "convert nowhere new", "found nothing")
    code, out, _ = cli("info .")
    assert code == 0 and "2 SAEs" in out and "runs/a" in out


def test_info_of_other_formats(cli):
    from _formats import variants
    for i, name in enumerate(("saelens gated", "gemma_scope_2 affine", "dictionary_learning BatchTopKSAE", "sparsify", "llamascopium jumprelu, token-wise", "openai TopK")):
        path = variants[name][1](Path(str(i))).path
        code, out, err = cli(f"info {path}")
        assert code == 0 and variants[name][0] in out, (out, err)


# ------------------------------------------------------------------------------------------------ browse
def test_browse(cli, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url) or True)
    assert cli("train {small} --out runs/a --features 0")[0] == 0
    assert sorted(p.name for p in Path("runs/a").iterdir()) == [n for n in written if n != "features.html"]
    code, out, err = cli("browse runs/a --tokens 2000")
    assert code == 0, err
    made = Path("runs/a/features.html")
    assert out.strip() == str(made) and opened == [made.resolve().as_uri()] and "Content-Security-Policy" in made.read_text()
    before = made.stat().st_mtime_ns
    assert cli("browse runs/a --no-open")[0] == 0 and made.stat().st_mtime_ns == before and len(opened) == 1     # it is there
    assert cli("browse runs/a --again --keep --tokens 2000 --out b/c.html --no-open")[0] == 0 and Path("b/c.html").is_file() and Path("runs/a/latents.safetensors").is_file()
    monkeypatch.setattr("webbrowser.open", lambda url: False)
    code, out, err = cli("browse runs/a")
    assert code == 0 and "no web browser" in err


def test_browse_refuses(cli):
    refuses(cli, "browse nowhere --no-open", "nowhere")
    refuses(cli, "browse nowhere --tokens 0", "--tokens must be at least 1")
    sae = train(torch.randn(400, 8), d_sae=16, l0=4, tokens=2000, batch_size=100, progress=False).sae
    sae.save("plain")
    refuses(cli, "browse plain --no-open", "plain", "--model")
    refuses(cli, "browse plain --no-open --model embedded", "which site")
