#!/usr/bin/env bash
# Figure 4 in small, on stories spoken by espeak-ng, on one CPU: AdamW + cosine with the whole machine, then the paper's optimizers x schedules, two
# side by side, a thread each. Needs pip install pytorch-optimizer.
#     bash runs/figure4.sh data/stories.txt [minutes, 20]      out/figure4/*/log.jsonl, curve.png and a line an arm; about 4 x minutes
# The arms' time is counted in steps, so that nothing else on the machine matters: on the machine of README's figures each of the three optimizers
# takes 1.25 s a step of 1,024 tokens. AdaLomo's rate is relative to the weights; of 1e-3, 1e-2, 3e-2 and 1e-1 it learns fastest with 1e-2 (60 steps).
set -euo pipefail
source "$(dirname "$0")/setup.sh"
TEXT=${1:?a text file of stories} MINUTES=${2:-20}
python make_synthetic.py --task=stories --text="$TEXT" --out=out/figure4/audio
python prepare_units.py config/demo_units.py --audio=out/figure4/audio/stories --out=out/figure4/units
arm() {
    python train.py config/demo.py --data=out/figure4/units --out_dir="out/figure4/$1" --save_init=False --n_layer=6 --n_embd=384 --n_head=6 --n_ffn=1536 \
        --context=1024 --row_tokens=1024 --batch_tokens=1024 --min_lr=5e-5 --beta2=0.95 --warmup_fraction=0 --warmup_steps=50 "${@:2}" > "out/figure4/$1.txt" 2>&1
    echo "$1: $(tail -n 1 "out/figure4/$1.txt")"
}
arm alone --lr=1e-3 --batch_tokens=8192 --max_steps=1000000 --train_hours="$(awk "BEGIN {print $MINUTES / 60}")" --eval_interval=50
for optimizer in adamw ademamix adalomo; do
    for schedule in cosine inverse_sqrt; do
        OMP_NUM_THREADS=1 arm "$optimizer-$schedule" --optimizer=$optimizer --schedule=$schedule --max_steps=$((MINUTES * 48)) --train_hours=100 \
            --eval_interval=$((MINUTES * 12)) --save_interval=$((MINUTES * 12)) --lr=$([ $optimizer = adalomo ] && echo 1e-2 || echo 1e-3) &
    done
    wait
done
