#!/usr/bin/env bash
# Write one page back from its text form and bring everything in step:  tools/sync.sh sae/00_ste ["slow gpu"]
#   .nbtext/sae/00_ste.py -> nbs/sae/00_ste.ipynb (ids kept) -> jumprelu_nb/sae/ste.py -> executed, outputs saved, cleaned
set -euo pipefail
cd "$(dirname "$0")/.."
export PLOTLY_RENDERER=notebook_connected HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
nb="nbs/$1.ipynb"; txt=".nbtext/$1.py"
exec 9>.git/nb.lock   # several editors in one tree: one export at a time
if [ -f "$nb" ]; then jupytext -q --check-source-is-newer --to ipynb --update -o "$nb" "$txt"
else mkdir -p "$(dirname "$nb")"; jupytext -q --to ipynb -o "$nb" "$txt"; fi
flock 9 sh -c "nbdev_clean --fname '$nb' && nbdev_export"
python tools/run_save.py "$nb" "${2:-}"
flock 9 sh -c "nbdev_clean --fname '$nb' && nbdev_export"
touch "$txt"   # the text is in step again, and may be edited further
