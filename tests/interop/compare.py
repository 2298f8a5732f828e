"""Run by run.py in an environment that holds the other libraries."""
from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import traceback
import warnings
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent/"bench"))
warnings.filterwarnings("ignore", category=UserWarning)
warnings.filterwarnings("ignore", category=DeprecationWarning)

import torch
from _peers import stub_nnsight
from torch import Tensor, nn

import jumprelu_nb as jr
from jumprelu_nb.sae.model import SAE
from jumprelu_nb.share.adapters import to_saelens
from jumprelu_nb.share.exchange import load_sae, save_as

d, F, k, tolerance = 32, 128, 8, 1e-6
data = torch.randn(4096, F, generator=torch.Generator().manual_seed(2)).relu().pow(3) @ nn.functional.normalize(torch.randn(F, d, generator=torch.Generator().manual_seed(3)), dim=-1) + torch.randn(d, generator=torch.Generator().manual_seed(4))
test = data[-1024:]
rows: list[dict] = []


class batches:
    "The data again and again, in copies: some trainers scale their batches in place."
    def __init__(self, size:int=256): self.parts, self.n = data.split(size), 0
    def __iter__(self): return self
    def __next__(self) -> Tensor: self.n += 1; return self.parts[self.n % len(self.parts)].clone()


def compare(name:str, theirs:tuple[Tensor, Tensor], ours:tuple[Tensor, Tensor]) -> None:
    "Codes and reconstructions of both sides on the same tokens."
    (f, y), (g, z) = ([v.detach().double() for v in pair] for pair in (theirs, ours))
    flips = int(((f != 0) != (g != 0)).sum())
    row = dict(name=name, l0=round((f != 0).double().sum(-1).mean().item(), 2), flips=flips, codes=((f - g).abs().max() / f.abs().max()).item(), reconstruction=((y - z).abs().max() / y.abs().max()).item())
    row["ok"] = flips == 0 and max(row["codes"], row["reconstruction"]) <= tolerance and 0 < row["l0"] < F
    rows.append(row)
    print(f"{'ok  ' if row['ok'] else 'FAIL'} {name:72} L0 {row['l0']:6.2f}  flips {flips}  codes {row['codes']:.1e}  reconstruction {row['reconstruction']:.1e}", flush=True)


def of(sae:SAE, x:Tensor=test) -> tuple[Tensor, Tensor]: return sae.encode(x), sae(x)


def attempt(fn, *args, **kw) -> None:
    "One comparison; what raises is a failure, and the others go on."
    try: fn(*args, **kw)
    except Exception:
        rows.append(dict(name=f"{fn.__name__} {args} {kw}", ok=False, error=traceback.format_exc(limit=-3)))
        print(f"FAIL {fn.__name__} {args} {kw}\n{rows[-1]['error']}", flush=True)


def folder() -> Path: return Path(tempfile.mkdtemp())


# -- SAELens ---------------------------------------------------------------------------------------------------------------------
def saelens_trained(arch:str, norm:str="none", pre:bool=True, **more) -> None:
    "Train with SAELens's own trainer, save the inference form, load it on both sides."
    from sae_lens import SAE as Theirs
    from sae_lens.config import SAETrainerConfig
    from sae_lens.registry import get_sae_training_class
    from sae_lens.training.sae_trainer import SAETrainer
    cls, config = get_sae_training_class(arch)
    torch.manual_seed(0)
    cfg = config(d_in=d, d_sae=F, dtype="float32", device="cpu", apply_b_dec_to_input=pre, normalize_activations=norm, **more)
    cfg.metadata.model_name, cfg.metadata.hook_name = "gpt2", "blocks.3.hook_resid_post"
    sae = cls(cfg)
    out = folder()
    tc = SAETrainerConfig(total_training_samples=256*60, train_batch_size_samples=256, lr=3e-3, lr_end=3e-4, device="cpu", n_batches_for_norm_estimate=16, checkpoint_path=str(out/"checkpoints"), n_checkpoints=1)
    trainer = SAETrainer(tc, sae, batches())
    trainer.fit()
    sae.save_inference_model(out/"final")
    theirs = Theirs.load_from_disk(out/"final").eval()
    title = f"SAELens {arch}, {norm}{', pre-bias' * pre}{''.join(f', {a} {b}' for a, b in more.items())}"
    with torch.no_grad(): f, y = (lambda f: (f, theirs.decode(f)))(theirs.encode(test))
    compare(title, (f, y), of(load_sae(out/"final")))
    ours = load_sae(out/"final")
    for how in ("files", "object"):
        if how == "files": save_as(ours, out/"back", "saelens"); back = Theirs.load_from_disk(out/"back").eval()
        else: back = to_saelens(ours).eval()
        with torch.no_grad(): compare(f"  and back as {how}", (f, y), (lambda f: (f, back.decode(f)))(back.encode(test)))
    for checkpoint in sorted((out/"checkpoints").rglob("cfg.json")): saelens_checkpoint(checkpoint.parent, cls)


def saelens_checkpoint(path:Path, cls) -> None:
    "A checkpoint in the middle of a training: with its input scale, and for BatchTopK with the threshold it would be exported with."
    from sae_lens.training.activation_scaler import ActivationScaler
    native = cls.load_from_disk(path)
    from sae_lens.constants import ACTIVATION_SCALER_CFG_FILENAME
    scaler = ActivationScaler()
    if (path/ACTIVATION_SCALER_CFG_FILENAME).exists(): scaler.load(path/ACTIVATION_SCALER_CFG_FILENAME)
    if scaler.scaling_factor is not None: native.fold_activation_norm_scaling_factor(scaler.scaling_factor)
    if scaler.whitening is not None: native.fold_activation_whitening(scaler.whitening.mean, scaler.whitening.matrix, scaler.whitening.inverse_matrix)
    from sae_lens import SAE as Theirs
    out = folder()
    native.save_inference_model(out)
    theirs = Theirs.load_from_disk(out).eval()
    with torch.no_grad(): compare("  checkpoint of it, folded there and here", (lambda f: (f, theirs.decode(f)))(theirs.encode(test)), of(load_sae(path)))


def saelens_made(arch:str) -> None:
    "Transcoders, which SAELens runs and does not train: made there with random weights."
    from sae_lens import SAE as Theirs
    e = d + 4
    torch.manual_seed(0)
    theirs = Theirs.from_dict(dict(architecture=arch, d_in=d, d_sae=F, d_out=e, dtype="float32", device="cpu", apply_b_dec_to_input=False, normalize_activations="none", reshape_activations="none", metadata={}))
    with torch.no_grad():
        for p in theirs.parameters(): p.normal_(std=.3)
        if "jumprelu" in arch: theirs.threshold.abs_()
    out = folder()
    theirs.save_model(out)
    with torch.no_grad(): compare(f"SAELens {arch}", (theirs.encode(test), theirs(test)), of(load_sae(out)))
    save_as(load_sae(out), out/"back", "saelens")
    back = Theirs.load_from_disk(out/"back")
    with torch.no_grad(): compare("  and back", (theirs.encode(test), theirs(test)), (back.encode(test), back(test)))


def saelens_hook_z() -> None:
    "Attention outputs by heads there, flat here."
    from sae_lens import SAE as Theirs
    torch.manual_seed(0)
    theirs = Theirs.from_dict(dict(architecture="standard", d_in=d, d_sae=F, dtype="float32", device="cpu", apply_b_dec_to_input=True, normalize_activations="none", reshape_activations="hook_z", metadata=dict(sae_lens_version="6.54.12", hook_name="blocks.2.attn.hook_z")))
    with torch.no_grad(): theirs.b_dec.normal_(); theirs.b_enc.normal_()
    out, heads = folder(), test.unflatten(-1, (4, d // 4))
    theirs.save_model(out)
    ours = load_sae(out)
    assert ours.metadata["site"] == "attn_out.2"
    with torch.no_grad(): f = theirs.encode(heads); compare("SAELens hook_z", (f, theirs.decode(f).flatten(-2)), of(ours))


# -- dictionary_learning ---------------------------------------------------------------------------------------------------------
def dictionary_trained(trainer:str, normalize:bool=True, **more) -> None:
    "trainSAE, its files, its from_pretrained."
    import dictionary_learning.dictionary as D
    import dictionary_learning.trainers as T
    from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, standard, top_k
    from dictionary_learning.training import trainSAE
    cls = next(getattr(m, trainer) for m in (T, standard, matryoshka_batch_top_k) if hasattr(m, trainer))
    torch.manual_seed(0)
    out = folder()
    trainSAE(batches(), [dict(trainer=cls, activation_dim=d, dict_size=F, steps=60, layer=3, lm_name="none", device="cpu", **({} if trainer == "GatedAnnealTrainer" else dict(submodule_name="resid_post_layer_3")), **more)], 60, save_dir=str(out), normalize_activations=normalize, device="cpu")
    file = out/"trainer_0"/"ae.pt"
    kind = json.loads((out/"trainer_0"/"config.json").read_text())["trainer"]["dict_class"]
    home = {"AutoEncoderTopK": top_k, "BatchTopKSAE": batch_top_k, "MatryoshkaBatchTopKSAE": matryoshka_batch_top_k}.get(kind, D)
    native = getattr(home, kind).from_pretrained(file)
    ours = load_sae(out/"trainer_0")
    assert trainer == "GatedAnnealTrainer" or ours.metadata["site"] == "resid_post.3"
    with torch.no_grad(): compare(f"dictionary_learning {trainer}{', normalised' * normalize}", (native.encode(test), native(test)), of(ours))


def dictionary_written(name:str, ours:SAE) -> None:
    "Ours, loaded by dictionary_learning."
    import dictionary_learning.dictionary as D
    from dictionary_learning.trainers import top_k
    out = folder()
    save_as(ours, out, "dictionary_learning")
    kind = json.loads((out/"config.json").read_text())["trainer"]["dict_class"]
    theirs = getattr(top_k if kind == "AutoEncoderTopK" else D, kind).from_pretrained(out/"ae.pt")
    with torch.no_grad(): compare(f"ours → dictionary_learning, {name}", (theirs.encode(test), theirs(test)), of(ours))


# -- sparsify --------------------------------------------------------------------------------------------------------------------
def dense(acts:Tensor, at:Tensor) -> Tensor: return torch.zeros(len(acts), F).scatter(-1, at, acts)


def sparsify_trained(activation:str="topk", transcode:bool=False, skip:bool=False, latents:int=0) -> None:
    "Adam on its own loss, its save_to_disk, its load_from_disk."
    from sparsify import SparseCoder, SparseCoderConfig
    torch.manual_seed(0)
    coder = SparseCoder(d, SparseCoderConfig(activation=activation, expansion_factor=F//d, num_latents=latents, k=k, transcode=transcode, skip_connection=skip))
    with torch.no_grad(): coder.b_dec.copy_(data.mean(0))
    target = torch.randn(d, d) / d**.5
    opt = torch.optim.Adam(coder.parameters(), 3e-3)
    for _, x in zip(range(60), batches(), strict=False):
        opt.zero_grad(); coder(x, x @ target if transcode else None).fvu.backward(); opt.step()
    out = folder()/"layers.3"
    coder.save_to_disk(out)
    theirs, ours = SparseCoder.load_from_disk(out), load_sae(out)
    with torch.no_grad(): native = dense(*theirs.encode(test)[:2]), theirs(test).sae_out
    compare(f"sparsify {activation}{', transcoder' * transcode}{', skip' * skip}", native, of(ours))
    save_as(ours, out/"back", "sparsify")
    back = SparseCoder.load_from_disk(out/"back")
    with torch.no_grad(): compare("  and back", native, (dense(*back.encode(test)[:2]), back(test).sae_out))


# -- ours ------------------------------------------------------------------------------------------------------------------------
def trained_here(recipe:str, **more) -> SAE:
    "An SAE that this library trained, in inference form."
    return jr.train(data, recipe=recipe, d_sae=F, l0=float(k), tokens=20_000, seed=0, progress=False, **more).sae


def ours_everywhere(recipe:str) -> None:
    from sae_lens import SAE as Theirs
    sae, out = trained_here(recipe), folder()
    save_as(sae, out/"sl", "saelens")
    theirs = Theirs.load_from_disk(out/"sl").eval()
    with torch.no_grad(): compare(f"ours → SAELens, {recipe}", (lambda f: (f, theirs.decode(f)))(theirs.encode(test)), of(sae))
    theirs = to_saelens(sae).eval()
    with torch.no_grad(): compare(f"ours → to_saelens, {recipe}", (lambda f: (f, theirs.decode(f)))(theirs.encode(test)), of(sae))
    if sae.gate.name in ("relu", "jumprelu", "topk"): dictionary_written(recipe, sae)
    if sae.gate.name == "topk":
        from sparsify import SparseCoder
        save_as(sae, out/"sp", "sparsify")
        coder = SparseCoder.load_from_disk(out/"sp")
        with torch.no_grad(): compare(f"ours → sparsify, {recipe}", (dense(*coder.encode(test)[:2]), coder(test).sae_out), of(sae))


def main() -> int:
    p = argparse.ArgumentParser()
    p.add_argument("--out", type=Path)
    a = p.parse_args()
    stub_nnsight()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    have = {n: version(n) for n in ("sae-lens", "dictionary-learning", "eai-sparsify", "torch", "numpy", "safetensors", "jumprelu_nb")}
    print(", ".join(f"{n} {v}" for n, v in have.items()), flush=True)
    for arch in ("standard", "jumprelu", "gated", "topk", "abstopk", "batchtopk", "matryoshka_batchtopk"):
        more = {"standard": dict(l1_coefficient=.1), "jumprelu": dict(jumprelu_init_threshold=.3, l0_coefficient=.1), "gated": dict(l1_coefficient=.1), "matryoshka_batchtopk": dict(k=k, matryoshka_widths=[F//4, F])}.get(arch, dict(k=k))
        for norm in ("none", "expected_average_only_in", "covariance_whitening", "layer_norm", "constant_norm_rescale"):
            if arch == "matryoshka_batchtopk" and norm.startswith(("layer", "constant")): continue      # SAELens undoes the normalisation once per width and fails
            attempt(saelens_trained, arch, norm, **more)
        attempt(saelens_trained, arch, pre=False, **more)
        if "topk" in arch: attempt(saelens_trained, arch, "expected_average_only_in", rescale_acts_by_decoder_norm=False, **more)
    for arch in ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"): attempt(saelens_made, arch)
    attempt(saelens_hook_z)
    short, both = dict(warmup_steps=5), dict(warmup_steps=5, sparsity_warmup_steps=5)
    for trainer, more in (("StandardTrainer", both), ("StandardTrainerAprilUpdate", both), ("PAnnealTrainer", dict(anneal_start=20, p_end=.2) | both), ("GatedSAETrainer", both), ("GatedAnnealTrainer", dict(anneal_start=20) | both), ("JumpReluTrainer", dict(bandwidth=.01, lr=3e-3) | both),
                          ("TopKTrainer", dict(k=k) | short), ("BatchTopKTrainer", dict(k=k, threshold_start_step=5) | short), ("MatryoshkaBatchTopKTrainer", dict(k=k, group_fractions=[.25, .75], threshold_start_step=5) | short)):
        for normalize in (True, False): attempt(dictionary_trained, trainer, normalize, **more)
    for kw in (dict(), dict(activation="groupmax"), dict(latents=F), dict(transcode=True), dict(transcode=True, skip=True), dict(skip=True)): attempt(sparsify_trained, **kw)
    for recipe in ("practical", "relu_l1", "gated", "topk", "batch_topk", "matryoshka", "abs_topk", "gemma_scope"): attempt(ours_everywhere, recipe)
    bad = [r for r in rows if not r["ok"]]
    print(f"{len(rows)} comparisons, {len(bad)} failed; largest relative difference {max(max(r.get('codes', 0), r.get('reconstruction', 0)) for r in rows):.1e}")
    if a.out: a.out.write_text(json.dumps(dict(versions=have, tolerance=tolerance, comparisons=rows), indent=1) + "\n", encoding="utf-8")
    return 1 if bad else 0


if __name__ == "__main__": sys.exit(main())
