"""The picture of the front page, drawn from measured numbers: how L0 and FVU develop, and what the language model loses.

    python bench/picture.py [--results bench/results/train_default.json] [--out nbs/images/first_run.svg]"""
from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

root = Path(__file__).resolve().parent.parent
blue, red, grey, ink = "#0072B2", "#D55E00", "#8a8a8a", "#222222"       # jumprelu_nb.figures.palette
font = "font-family='system-ui,-apple-system,Segoe UI,Helvetica,Arial,sans-serif'"


def text(x:float, y:float, s:str, size:int=12, color:str=ink, anchor:str="start", weight:str="normal") -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' font-size='{size}' fill='{color}' text-anchor='{anchor}' font-weight='{weight}'>{s}</text>"


def line(points:list[tuple[float, float]], color:str, width:float=2, dash:str="") -> str:
    return f"<polyline points='{' '.join(f'{x:.1f},{y:.1f}' for x, y in points)}' fill='none' stroke='{color}' stroke-width='{width}' stroke-linejoin='round'{f' stroke-dasharray={dash!r}' if dash else ''}/>"


def training(curve:list[dict], target:float, x0:float, y0:float, w:float, h:float) -> list[str]:
    "L0 on the left axis, FVU (logarithmic) on the right one."
    last, top = curve[-1]["tokens"], 1.25*max(target, max(r["l0"] for r in curve[1:]))
    low, high = min(r["fvu"] for r in curve)*.8, 1.
    at = lambda t: x0 + w*t/last
    y_l0 = lambda v: y0 + h*(1 - min(v, top)/top)
    y_fvu = lambda v: y0 + h*(1 - math.log(min(v, high)/low)/math.log(high/low))
    out = [text(x0, y0 - 22, f"Training: <tspan fill='{blue}'>L0</tspan> and <tspan fill='{red}'>unexplained variance</tspan>", 13, weight="600")]
    out += [line([(x0, y0 + h), (x0 + w, y0 + h)], "#cccccc", 1)]
    out += [line([(x0, y_l0(target)), (x0 + w, y_l0(target))], blue, 1, "3,3")]
    out += [line([(at(r["tokens"]), y_l0(r["l0"])) for r in curve], blue), line([(at(r["tokens"]), y_fvu(r["fvu"])) for r in curve], red)]
    out += [text(x0 - 6, y_l0(v) + 4, f"{v:g}", 11, blue, "end") for v in (0, target/2, target)]
    ticks = [v for v in (.05, .1, .2, .5, 1.) if low <= v <= high]
    out += [text(x0 + w + 6, y_fvu(v) + 4, f"{v:g}", 11, red) for v in ticks]
    out += [text(at(v), y0 + h + 16, f"{v/1e6:.2g} M" if v else "0", 11, grey, "middle") for v in (0, last/2, last)]
    out += [text(x0 + w/2, y0 + h + 32, "tokens", 11, grey, "middle")]
    return out


def losses(m:dict, x0:float, y0:float, w:float, h:float) -> list[str]:
    "Bars: the loss of the language model with its activations replaced."
    rows = [("untouched", "ce_clean", grey), ("through the SAE", "ce_sae", blue), ("through a random one", "ce_control", red), ("mean instead", "ce_mean", "#bbbbbb"), ("zero instead", "ce_zero", "#bbbbbb")]
    rows = [(n, m[k]["mean"], c) for n, k, c in rows if k in m]
    top, step, left = max(v for _, v, _ in rows), h/len(rows), 140
    out = [text(x0, y0 - 22, "What the language model loses", 13, weight="600")]
    for i, (name, v, color) in enumerate(rows):
        y, length = y0 + i*step, (w - left - 40)*v/top
        out += [text(x0 + left - 8, y + step/2 + 4, name, 12, anchor="end"), f"<rect x='{x0 + left:.1f}' y='{y + step*.18:.1f}' width='{length:.1f}' height='{step*.64:.1f}' fill='{color}' rx='2'/>",
                text(x0 + left + length + 6, y + step/2 + 4, f"{v:.2f}", 12)]
    return out + [text(x0 + left, y0 + h + 16, "cross-entropy on files it never saw, nats per token", 11, grey)]


def main() -> None:
    "Draw."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=root/"bench"/"results"/"train_default.json")
    parser.add_argument("--out", type=Path, default=root/"nbs"/"images"/"first_run.svg")
    args = parser.parse_args()
    r = json.loads(args.results.read_text(encoding="utf-8"))["results"]
    l0, first = next(iter(r["by_l0"].items()))
    body = training(r["curve"], float(l0), 46, 52, 330, 190) + losses(first["summary"], 450, 52, 410, 190)
    label = "Left: during training L0 rises to its target while the fraction of variance unexplained falls. Right: cross-entropy of the language model untouched, through the SAE, through a random SAE, and with the mean or zero instead."
    svg = [f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 880 290' width='880' role='img' aria-label='{label}' {font}>", "<rect width='880' height='290' fill='#ffffff' rx='6'/>", *body, "</svg>"]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n".join(svg) + "\n", encoding="utf-8")
    print(f"{args.out.name}: {args.out.stat().st_size/1024:.1f} KB")


if __name__ == "__main__": main()
