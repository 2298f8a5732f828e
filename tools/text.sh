#!/usr/bin/env bash
# The text form of every page, fresh from the notebooks:  tools/text.sh
# Run it before editing and after every checkout, merge or rebase. It refuses to overwrite a text edited since it was written back.
set -euo pipefail
cd "$(dirname "$0")/.."
newer=$(find .nbtext -name '*.py' 2>/dev/null | while read -r t; do
  n="nbs/${t#.nbtext/}"; n="${n%.py}.ipynb"
  if [ ! -f "$n" ] || [ -n "$(find "$t" -newer "$n")" ]; then cmp -s <(jupytext -q --to py:percent -o - "$n" 2>/dev/null) "$t" || echo "$t"; fi
done)
if [ -n "$newer" ] && [ "${1:-}" != --force ]; then
  printf 'These texts hold edits that are not in their notebooks yet; write them back with tools/sync.sh, or drop them with tools/text.sh --force:\n%s\n' "$newer" >&2; exit 1
fi
rm -rf .nbtext
find nbs -name '*.ipynb' -not -path '*/_*' -not -path '*/.*' | sort | while read -r n; do
  t=".nbtext/${n#nbs/}"; mkdir -p "$(dirname "$t")"; jupytext -q --to py:percent -o "${t%.ipynb}.py" "$n"
done
