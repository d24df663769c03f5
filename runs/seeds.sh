#!/usr/bin/env bash
# A recipe under other seeds: pre-training, DPO, and a table of means, spreads and differences.
#     bash runs/seeds.sh                                   the demo's, seeds 1 2 3 (after demo.sh)
#     bash runs/seeds.sh '1 2' config/slam_a5000.py config/slam_dpo.py --data_dir=data/eval
# The demo's runs go in parallel, one thread each, and end after a fixed number of steps, so the
# table is the same on any machine. Other configs run one by one. Results: out/seeds/NAME.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
SEEDS=${1:-1 2 3} TRAIN=${2:-config/demo.py} DPO=${3:-config/demo_dpo.py}
NAME=$(basename "$TRAIN" .py)
OUT=out/seeds/$NAME
EVAL=("${@:4}") SIDE_BY_SIDE=no
if [ "$NAME" = demo ]; then
    [ -e out/demo/units/pairs.jsonl ] ||
        { echo "seeds.sh: no out/demo/units/pairs.jsonl: run bash runs/demo.sh first" >&2; exit 2; }
    EVAL=(config/demo_eval.py --html="$OUT/report.html") SIDE_BY_SIDE=yes
    export OMP_NUM_THREADS=1
fi

seed() {
    python train.py "$TRAIN" --seed="$1" --out_dir="$OUT/slm-s$1"
    python dpo.py "$DPO" --seed="$1" --init="$OUT/slm-s$1" --out_dir="$OUT/dpo-s$1"
}
mkdir -p "$OUT"
for n in $SEEDS; do
    if [ $SIDE_BY_SIDE = yes ]; then
        seed "$n" > "$OUT/$n.txt" 2>&1 &
    else
        seed "$n"
    fi
done
for job in $(jobs -p); do
    wait "$job" || { echo "seeds.sh: a run failed: see $OUT/*.txt" >&2; exit 1; }
done
python eval_slm.py "${EVAL[@]}" --init="pre-trained=$(echo $SEEDS | sed "s|[^ ]*|$OUT/slm-s&|g; s/ /+/g"),\
DPO=$(echo $SEEDS | sed "s|[^ ]*|$OUT/dpo-s&|g; s/ /+/g")" --out="$OUT/eval.json"
