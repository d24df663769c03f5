#!/usr/bin/env bash
# Figure 5 in small: the share of a fixed budget that preference tuning gets, five points on the demo's data (after runs/demo.sh).
#     bash runs/figure5.sh [minutes]      out/figure5/share-*.json, figure5.csv and a table; about 5 x minutes in all
# Each point has the same minutes in total: pre-training takes what DPO leaves, and the schedule of each follows its own part. The clock
# of DPO includes its reference pass.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
MINUTES=${1:-4}
DATA=out/demo/units
[ -e "$DATA/pairs.jsonl" ] || { echo "figure5.sh: no $DATA/pairs.jsonl: run bash runs/demo.sh first" >&2; exit 2; }
hours() { awk "BEGIN {print $MINUTES / 60 * $1 / 100}"; }
for share in 0 5 12 25 50; do  # percent for DPO; the paper's best point, 30 minutes of a day, is 2
    out=out/figure5/share-$share
    python train.py config/demo.py --data=$DATA --out_dir=$out/slm --save_init=False --max_steps=1000000 --warmup_fraction=0 --warmup_steps=50 \
        --train_hours="$(hours $((100 - share)))" | tail -n 1
    model=$out/slm
    if [ $share -gt 0 ]; then
        python dpo.py config/demo_dpo.py --init=$out/slm --data=$DATA/pairs.jsonl --out_dir=$out/dpo --max_steps=0 \
            --train_hours="$(hours $share)" | tail -n 1
        model=$out/dpo
    fi
    python eval_slm.py config/demo_eval.py --init=$model --out=out/figure5/share-$share.json --html= | tail -n 1
done
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
