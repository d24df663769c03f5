#!/usr/bin/env bash
# The losses of dpo.py on the demo, from the models of runs/seeds.sh: suites and immediate repeats.
#     bash runs/losses.sh ['1 2 3']      out/losses/eval.json, report.html
set -euo pipefail
source "$(dirname "$0")/setup.sh"
SEEDS=${1:-1 2 3} SLM=out/seeds/demo/slm-s OUT=out/losses
export OMP_NUM_THREADS=1
tune() {  # seed
    [ -e "$SLM$1/slam.json" ] || { echo "losses.sh: run bash runs/seeds.sh first" >&2; exit 2; }
    for loss in dpo:0.1 ipo:1 simpo:2; do
        python dpo.py config/demo_dpo.py --seed="$1" --init="$SLM$1" --train_hours=0 \
            --out_dir="$OUT/${loss%:*}-s$1" --loss="${loss%:*}" --beta="${loss#*:}"
    done
}
mkdir -p "$OUT"
for n in $SEEDS; do tune "$n" > "$OUT/$n.txt" 2>&1 & done
for job in $(jobs -p); do wait "$job" || { echo "losses.sh: see $OUT/*.txt" >&2; exit 1; }; done

models=pre-trained=$(echo $SEEDS | sed "s|[^ ]*|$SLM&|g; s/ /+/g")
for loss in dpo ipo simpo; do
    models+=,$loss=$(echo $SEEDS | sed "s|[^ ]*|$OUT/$loss-s&|g; s/ /+/g")
done
python eval_slm.py config/demo_eval.py --init="$models" --out="$OUT/eval.json" --html="$OUT/report.html"
python - "$OUT" $SEEDS <<'EOT'
import json, sys

out, *seeds = sys.argv[1:]
for loss in ('dpo', 'ipo', 'simpo'):
    found = []
    for seed in seeds:
        with open(f'{out}/{loss}-s{seed}/log.jsonl') as file:
            repeats = [row['val_repeats'] for row in map(json.loads, file) if 'val_repeats' in row]
        found.append(f'{repeats[0]:.1%} to {repeats[-1]:.1%}')
    print(f'immediate repeats under {loss}, before to after, a seed each:', ', '.join(found))
EOT
