#!/usr/bin/env bash
# Figure 5 in small: the share of a fixed budget that preference tuning gets, five points on the demo's data (after runs/demo.sh), side by side, a
# thread each.
#     bash runs/figure5.sh [seconds, 240]      out/figure5/share-*.json, figure5.csv and a table
# The budget is counted in steps, so that nothing else on the machine matters: with both cores of the machine of README's figures a second is
# 16 steps of pre-training, or 2.4 of DPO after 9 s for its reference pass.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
export OMP_NUM_THREADS=1
BUDGET=${1:-240}
DATA=out/demo/units
[ -e "$DATA/pairs.jsonl" ] || { echo "figure5.sh: no $DATA/pairs.jsonl: run bash runs/demo.sh first" >&2; exit 2; }
point() {
    local out=out/figure5/share-$1 model=out/figure5/share-$1/slm
    python train.py config/demo.py --data=$DATA --out_dir="$model" --save_init=False --train_hours=100 --max_steps=$((BUDGET * (100 - $1) * 16 / 100))
    if [ "$1" -gt 0 ]; then
        python dpo.py config/demo_dpo.py --init="$model" --data=$DATA/pairs.jsonl --out_dir="$out/dpo" --train_hours=100 \
            --max_steps=$(((BUDGET * $1 - 900) * 24 / 1000))
        model=$out/dpo
    fi
    python eval_slm.py config/demo_eval.py --init="$model" --out="$out.json" --html=
}
mkdir -p out/figure5
for share in 0 5 12 25 50; do  # percent for DPO; the paper's best point, 30 minutes of a day, is 2
    point $share > out/figure5/share-$share.txt 2>&1 &
done
wait
python - <<'EOF'
import glob, json
read = lambda path: (int(path[:-5].rpartition('-')[2]), list(json.load(open(path))['metrics'].values())[0])
rows = sorted(map(read, glob.glob('out/figure5/share-*.json')), key=lambda row: row[0])
suites = list(rows[0][1])
with open('out/figure5/figure5.csv', 'w') as file:
    for line in [['dpo_percent', *suites]] + [[share, *(f'{scores[suite]["score"]:.2f}' for suite in suites)] for share, scores in rows]:
        print(*line, sep=',', file=file)
        print('| ' + ' | '.join(f'{x}' for x in line) + ' |')
EOF
