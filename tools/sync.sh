#!/usr/bin/env bash
# Write one page back from its text form and bring everything in step:  tools/sync.sh sae/00_ste ["slow gpu"]
#   .nbtext/sae/00_ste.py -> nbs/sae/00_ste.ipynb (ids kept) -> jumprelu_nb/sae/ste.py -> executed, outputs saved, cleaned
# The second argument names the flags (`#| slow` …) whose cells are to run too. Safe beside other editors: one export at a time.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 1 ] || { echo "usage: tools/sync.sh CHAPTER/NN_room [\"flags to run\"]" >&2; exit 2; }
export PLOTLY_RENDERER=notebook_connected HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
page="${1#nbs/}"; page="${page%.ipynb}"
nb="nbs/$page.ipynb"; txt=".nbtext/$page.py"
[ -f "$txt" ] || { echo "$txt is missing: write it (copy tools/nbheader.txt to its top), or take the text of all pages with python tools/text.py" >&2; exit 1; }
lock="$(git rev-parse --git-path nb.lock)"
alone() { if command -v flock >/dev/null; then flock "$lock" sh -c "$1"; else sh -c "$1"; fi; }
# more than one empty line under the header would become an empty first cell
awk 'body || n < 2 { if ($0 == "# ---") n++; print; next } /^[[:space:]]*$/ { if (!blank++) print; next } { body = 1; print }' "$txt" >"$txt.part"
if cmp -s "$txt" "$txt.part"; then rm "$txt.part"; else mv "$txt.part" "$txt"; fi
if [ -f "$nb" ]; then jupytext -q --check-source-is-newer --to ipynb --update -o "$nb" "$txt"
else mkdir -p "$(dirname "$nb")"; jupytext -q --to ipynb -o "$nb" "$txt"; fi
alone "nbdev_clean --fname '$nb' && nbdev_export"
python tools/run_save.py "$nb" "${2:-}"
alone "nbdev_clean --fname '$nb' && nbdev_export"
touch "$txt"   # the text is in step again, and may be edited further
