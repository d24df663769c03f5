#!/usr/bin/env bash
# Figure 4 in small: optimizer x schedule at equal time on one CPU, 20 minutes an arm, on stories spoken by espeak-ng (about 15 h of speech).
#     bash runs/figure4.sh data/stories.txt [minutes]      out/figure4/*/log.jsonl and one line an arm
set -euo pipefail
cd "$(dirname "$0")/.."
TEXT=${1:?a text file of stories} MINUTES=${2:-20}
python make_synthetic.py --task=stories --text="$TEXT" --out=out/figure4/audio
python prepare_units.py config/demo_units.py --audio=out/figure4/audio/stories --out=out/figure4/units
arm() {
    python train.py config/demo.py --data=out/figure4/units --out_dir="out/figure4/$1" --save_init=False --n_layer=6 --n_embd=384 --n_head=6 --n_ffn=1536 \
        --context=1024 --batch_size=4 --global_batch=8 --max_steps=1000000 --warmup_fraction=0 --train_hours="$(awk "BEGIN {print $MINUTES / 60}")" \
        --eval_interval=50 --save_interval=200 "${@:2}" | tail -n 1
}
for optimizer in adamw ademamix adalomo muon; do
    for schedule in cosine inverse_sqrt; do
        arm "$optimizer-$schedule" --optimizer=$optimizer --schedule=$schedule --warmup_steps=50 --lr=1e-3 --min_lr=5e-5
    done
done
