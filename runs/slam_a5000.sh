#!/usr/bin/env bash
# Slam on one GPU in a day, from audio to the table: 23.5 h of pre-training, 0.5 h of DPO; preparing units and evaluating come on top.
# Needs, below data/: audio/{librilight,librispeech,stinystories} (sTinyStories can be made: make_synthetic.py --help),
# audio/spokenswag (make_synthetic.py --task=pairs --out=data/audio/spokenswag), and the evaluation suites below data/eval.
# A killed run goes on where it stopped.
#     GPUS=1 bash runs/slam_a5000.sh
set -euo pipefail
cd "$(dirname "$0")/.."
CONFIG=${CONFIG:-config/slam_a5000.py} DPO=${DPO:-config/slam_dpo.py} OUT=${OUT:-out/slam} GPUS=${GPUS:-1}
launch() { if [ "$GPUS" -gt 1 ]; then torchrun --nproc_per_node="$GPUS" "$@"; else python "$@"; fi; }

for set in librilight librispeech stinystories spokenswag; do
    python prepare_units.py --audio="data/audio/$set" --out="data/$set" --encoder=mhubert25
done
launch train.py "$CONFIG" --out_dir="$OUT"
launch dpo.py "$DPO" --init="$OUT" --data=data/spokenswag/pairs.jsonl --out_dir="$OUT-dpo"
python eval_slm.py --init="$OUT,$OUT-dpo" --data_dir=data/eval --out="$OUT-dpo/eval.json"
