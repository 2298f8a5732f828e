"""The statistics behind a feature browser: ours against SAEDashboard, on the same model, the same SAE, the same tokens.

    python bench/dashboard.py --make                                 # an environment for sae-dashboard, once; a few minutes
    python bench/dashboard.py --latents 2048 --tokens 200000 --out bench/results/dashboard.json

Model: the embedded one; SAEDashboard gets its weights converted to a HookedTransformer (nothing is downloaded), and the greatest difference of the
activations at the site is reported. SAE: a random dictionary with one threshold that gives the wanted L0, in SAELens's form. SAEDashboard runs as
`SaeVisRunner.run` with its defaults (256 latents per pass, 64 prompts per forward); writing HTML is not counted. Ours: one pass over the tokens, then partners,
neighbours and effects on logits of all latents, and the file. Each in a process of its own, one thread, wall and CPU seconds; loading is not counted.
As a check both give the largest activation of every latent. What they collect differs: SAEDashboard keeps 20 strongest and 10 × 5 interval sequences per
latent with the loss effect of none, looks for correlated latents inside one pass's 256, and for neurons; ours see `interpret/tally`."""
from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

root = Path(__file__).resolve().parent.parent
default = Path.home()/".cache"/"jumprelu_nb"/"peers-dashboard"
torch_version, wanted = "torch==2.13.0", ["sae-dashboard==0.8.0", "pyarrow<20"]
names = ("torch", "numpy", "sae-dashboard", "sae-lens", "transformer-lens", "transformers")


def make(folder:Path, index:str|None) -> None:
    "Make the environment."
    python = python_of(folder)
    if not python.exists(): venv.EnvBuilder(with_pip=True).create(folder)
    def pip(*words): subprocess.run([python, "-m", "pip", *words], check=True)
    pip("install", torch_version, *(["--index-url", index] if index else []))
    pip("install", torch_version, *wanted)
    pip("uninstall", "-y", "torchvision", "torchaudio")                   # resolved for another torch; their import fails, and nothing here needs them
    print(f"Made {folder}.")


def python_of(folder:Path) -> Path: return folder/("Scripts" if os.name == "nt" else "bin")/("python.exe" if os.name == "nt" else "python")


def theirs(folder:Path, features:int, threads:int) -> dict:
    "SAEDashboard, in its own environment; knows nothing of this library."
    from importlib.metadata import version
    import torch
    from sae_dashboard.sae_vis_data import SaeVisConfig
    from sae_dashboard.sae_vis_runner import SaeVisRunner
    from sae_lens import SAE, HookedSAETransformer
    from transformer_lens import HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_neox_weights
    from transformers import AutoModelForCausalLM, AutoTokenizer
    torch.set_num_threads(threads); torch.set_grad_enabled(False)
    given = json.loads((folder/"given.json").read_text())
    hf, tokenizer = AutoModelForCausalLM.from_pretrained(given["model"], dtype=torch.float32), AutoTokenizer.from_pretrained(given["model"])
    c = hf.config
    cfg = HookedTransformerConfig(n_layers=c.num_hidden_layers, d_model=c.hidden_size, n_heads=c.num_attention_heads, d_head=c.hidden_size // c.num_attention_heads, d_mlp=c.intermediate_size,
                                  d_vocab=c.vocab_size, n_ctx=c.max_position_embeddings, eps=c.layer_norm_eps, act_fn="gelu", positional_embedding_type="rotary", rotary_adjacent_pairs=False,
                                  rotary_dim=c.hidden_size // c.num_attention_heads // 4, parallel_attn_mlp=True, normalization_type="LN", original_architecture="GPTNeoXForCausalLM", device="cpu")
    model = HookedSAETransformer(cfg, tokenizer=tokenizer)
    model.load_and_process_state_dict(convert_neox_weights(hf, cfg), fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False)
    sae = SAE.load_from_disk(str(folder/"sae"), device="cpu")
    tokens = torch.load(folder/"tokens.pt")
    x = torch.load(folder/"x.pt")
    apart = (model.run_with_cache(tokens[:2], names_filter=given["hook"])[1][given["hook"]] - x).abs().max() / x.abs().max()
    largest = torch.zeros(features)
    config = SaeVisConfig(hook_point=given["hook"], features=list(range(features)), device="cpu", dtype="float32", **given["options"])
    start, cpu = time.perf_counter(), time.process_time()
    data = SaeVisRunner(config).run(encoder=sae, model=model, tokens=tokens)
    out = dict(wall_s=round(time.perf_counter() - start, 1), cpu_s=round(time.process_time() - cpu, 1), latents=len(data.feature_data_dict), model_apart=float(apart), versions={n: version(n) for n in names})
    for i, f in data.feature_data_dict.items():
        groups = f.sequence_data.seq_group_data
        largest[int(i)] = max((max(s.feat_acts) for s in groups[0].seq_data), default=0.) if groups else 0.
    torch.save(largest, folder/"theirs.pt")
    return out


def ours(folder:Path, features:int, threads:int) -> dict:
    "The same with this library."
    import torch
    from jumprelu_nb.data.lm import LanguageModel
    from jumprelu_nb.interpret import latents as room
    from jumprelu_nb.sae.model import SAE
    torch.set_num_threads(threads); torch.set_grad_enabled(False)
    lm, sae, tokens = LanguageModel.load("embedded"), SAE.load(folder/"sae"), torch.load(folder/"tokens.pt")
    site = lm.site(sae.metadata["site"])
    room.take(room.LatentStats(sae.d_sae, threshold=sae.threshold), sae, lm, site, tokens[:4])                  # compiled loops are read from disk
    start, cpu = time.perf_counter(), time.process_time()
    stats = room.LatentStats(sae.d_sae, threshold=sae.threshold)
    for ids in tokens.split(4096 // tokens.shape[1]): room.take(stats, sae, lm, site, ids)
    passed = time.perf_counter() - start
    stats.relate(sae, lm)
    stats.strings = room.token_strings(lm, room.used_tokens(stats))
    stats.save(folder/"stats")
    out = dict(wall_s=round(time.perf_counter() - start, 2), cpu_s=round(time.process_time() - cpu, 2), pass_s=round(passed, 2), latents=len(stats), l0=round(float(stats.frequency.sum()), 1), alive=int(stats.alive.sum()))
    torch.save(stats.max, folder/"ours.pt")
    return out


def main() -> None:
    "Make the environment, or measure."
    sys.path.insert(0, str(root/"bench"))
    import argparse
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--venv", type=Path, default=default, help=f"folder of SAEDashboard's environment (default: {default})")
    p.add_argument("--make", action="store_true", help="make that environment and stop")
    p.add_argument("--torch-index", help="where to find torch, as for peers.py")
    p.add_argument("--latents", type=int, default=2048)
    p.add_argument("--tokens", type=int, default=200_000)
    p.add_argument("--l0", type=float, default=48.)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--out", type=Path, help="also write the JSON to this file")
    p.add_argument("--side", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    p.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.make: return make(a.venv, a.torch_index)
    if a.side:
        (a.folder/f"{a.side}.json").write_text(json.dumps((ours if a.side == "ours" else theirs)(a.folder, a.latents, a.threads)))
        return None
    if not python_of(a.venv).exists(): raise SystemExit(f"{a.venv} holds no environment: python bench/dashboard.py --make --venv {a.venv}")
    import torch
    from _common import report
    from importlib.resources import files
    from latents import made
    from jumprelu_nb.data.lm import LanguageModel
    from jumprelu_nb.data.text import pack, texts
    torch.set_num_threads(a.threads)
    lm = LanguageModel.load("embedded")
    with tempfile.TemporaryDirectory() as tmp, torch.no_grad():
        folder = Path(tmp)
        sae = made(lm, "resid_post.2", a.latents, a.l0)
        sae.metadata.update(hook_name="blocks.2.hook_resid_post", prepend_bos=True, context_size=lm.context_size)
        sae.save(folder/"sae")
        tokens = pack(lm, texts("stdlib"), max_tokens=a.tokens)
        torch.save(tokens, folder/"tokens.pt"); torch.save(lm.capture(tokens[:2], "resid_post.2")["resid_post.2"], folder/"x.pt")
        options = dict(ignore_tokens=lm.special_ids.tolist())
        (folder/"given.json").write_text(json.dumps(dict(model=str(files("jumprelu_nb.data").joinpath("embedded_lm")), hook="blocks.2.hook_resid_post", options=options)))
        env = os.environ | {k: str(a.threads) for k in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")} | {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
        rows = {}
        for side, python, path in (("ours", sys.executable, str(root)), ("theirs", python_of(a.venv), "")):
            words = [python, str(Path(__file__).resolve()), "--side", side, "--folder", tmp, "--latents", str(a.latents), "--threads", str(a.threads)]
            done = subprocess.run(words, env=env | {"PYTHONPATH": path}, cwd=tmp, stdout=subprocess.DEVNULL)
            if done.returncode: raise SystemExit(f"The process of {side} ended with code {done.returncode}: see its message above.")
            rows[side] = json.loads((folder/f"{side}.json").read_text())
        x, y = (torch.load(folder/f"{side}.pt") for side in ("ours", "theirs"))
    agree = float(((x - y).abs() <= 1e-3 * x.clamp_min(1e-3)).double().mean())
    report("dashboard", dict(latents=a.latents, tokens=tokens.numel(), contexts=len(tokens), context_size=tokens.shape[1], **rows, latents_with_equal_maximum=round(agree, 4),
                             times_as_long_wall=round(rows["theirs"]["wall_s"] / rows["ours"]["wall_s"], 2), times_as_long_cpu=round(rows["theirs"]["cpu_s"] / rows["ours"]["cpu_s"], 2)), a)


if __name__ == "__main__": main()
