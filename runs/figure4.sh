#!/usr/bin/env bash
# Figure 4 in small, on stories spoken by espeak-ng, on one CPU: AdamW + cosine with the whole machine, then the paper's optimizers x schedules all
# at once, one thread each, so that whatever else the machine does falls on all alike. Needs pip install pytorch-optimizer.
#     bash runs/figure4.sh data/stories.txt [minutes]      out/figure4/*/log.jsonl and a line an arm; about 2 x minutes
set -euo pipefail
source "$(dirname "$0")/setup.sh"
TEXT=${1:?a text file of stories} MINUTES=${2:-20}
python make_synthetic.py --task=stories --text="$TEXT" --out=out/figure4/audio
python prepare_units.py config/demo_units.py --audio=out/figure4/audio/stories --out=out/figure4/units
arm() {
    python train.py config/demo.py --data=out/figure4/units --out_dir="out/figure4/$1" --save_init=False --n_layer=6 --n_embd=384 --n_head=6 --n_ffn=1536 \
        --context=1024 --batch_size=1 --global_batch=1 --max_steps=1000000 --lr=1e-3 --min_lr=5e-5 --beta2=0.95 --eval_interval=50 --save_interval=1000 \
        --train_hours="$(awk "BEGIN {print $MINUTES / 60}")" "${@:2}" > "out/figure4/$1.txt" 2>&1
    echo "$1: $(tail -n 1 "out/figure4/$1.txt")"
}
arm alone --batch_size=4 --global_batch=8 --warmup_fraction=0 --warmup_steps=50
for optimizer in adamw ademamix adalomo; do
    for schedule in cosine inverse_sqrt; do
        OMP_NUM_THREADS=1 arm "$optimizer-$schedule" --optimizer=$optimizer --schedule=$schedule --warmup_fraction=0 --warmup_steps=15 &
    done
done
wait
