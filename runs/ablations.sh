#!/usr/bin/env bash
# Every arm of the paper's ablations, one line each; an arm takes 24 hours on one A5000.
#     bash runs/ablations.sh              all
#     bash runs/ablations.sh fig4         those of Figure 4
#     GPUS=4 bash runs/ablations.sh tab1  four GPUs an arm, the same batch and steps
# A finished arm is skipped, a stopped one continues. Results are in
# out/ablations/NAME/eval.json; data as in slam_a5000.sh, suites below data/eval. Compare arms with
#     python eval_slm.py --init=out/ablations/tab1-qwen-syn,out/ablations/tab1-qwen-neither
set -euo pipefail
source "$(dirname "$0")/setup.sh"
PATTERN=${1:-.} GPUS=${GPUS:-1}
ROWS=--row_tokens=$((GPUS > 2 ? 16384 / GPUS : 8192))  # a step's rows in equal parts for 1, 2, 4, 8

launch() {
    if [ "$GPUS" -gt 1 ]; then torchrun --nproc_per_node="$GPUS" "$@"; else python "$@"; fi
}
evaluate() {  # checkpoint
    python eval_slm.py --init="$1" --data_dir=data/eval --out="$1/eval.json" ||
        echo "$1: not all tasks could run" >&2
}
arm() {  # name, config, flags of train.py
    [[ $1 =~ $PATTERN ]] || return 0
    launch train.py "$2" "$ROWS" --out_dir="out/ablations/$1" "${@:3}"
    evaluate "out/ablations/$1"
}
dpo() {  # name, minutes of DPO out of the 24 hours; 17,625 steps are 23.5 hours
    [[ $1 =~ $PATTERN ]] || return 0
    local hours share
    hours=$(awk "BEGIN {print 24 - $2 / 60}") share=$(awk "BEGIN {print $2 / 60}")
    launch train.py config/slam_a5000.py "$ROWS" --out_dir="out/ablations/$1" --train_hours="$hours" \
        --max_steps="$(awk "BEGIN {print int(17625 * $hours / 23.5)}")"
    launch dpo.py config/slam_dpo.py --init="out/ablations/$1" --out_dir="out/ablations/$1-dpo" \
        --train_hours="$share" --max_steps=0 --epochs=0
    evaluate "out/ablations/$1-dpo"
}
SLAM=config/slam_a5000.py
REAL=librilight,librispeech
SYN=stinystories
DIV=swc,tedlium,peoples_speech,voxpopuli
# The setting before the recipe was found: real speech, context 512, 256 chunks a step. Chunks of
# at most 512 tokens are about 400 long, so 98,304 tokens a step.
BEFORE="--data=$REAL --context=512 --batch_tokens=98304"

# Figure 2: TWIST against a cold start
for base in qwen2.5-0.5b=Qwen/Qwen2.5-0.5B mobilellm-350m=facebook/MobileLLM-350M \
    opt-350m=facebook/opt-350m; do
    arm "fig2-${base%=*}-twist" $SLAM $BEFORE --schedule=inverse_sqrt --init="${base#*=}"
    arm "fig2-${base%=*}-cold" $SLAM $BEFORE --schedule=inverse_sqrt --init="preset:${base%=*}"
done

# Figure 3: the base model, all nine under TWIST
for base in qwen2.5-0.5b=Qwen/Qwen2.5-0.5B smollm2-135m=HuggingFaceTB/SmolLM2-135M \
    smollm2-360m=HuggingFaceTB/SmolLM2-360M mobilellm-125m=facebook/MobileLLM-125M \
    mobilellm-350m=facebook/MobileLLM-350M opt-125m=facebook/opt-125m opt-350m=facebook/opt-350m \
    pythia-160m=EleutherAI/pythia-160m pythia-410m=EleutherAI/pythia-410m; do
    arm "fig3-${base%=*}" $SLAM $BEFORE --schedule=inverse_sqrt --init="${base#*=}"
done

# Figure 4: optimizer x schedule
for optimizer in adamw ademamix adalomo; do
    for schedule in cosine inverse_sqrt; do
        arm "fig4-$optimizer-$schedule" $SLAM $BEFORE --optimizer=$optimizer --schedule=$schedule
    done
done

# Section 4.1: what else was tried (8-bit AdamW, which gained nothing, is not here)
arm sec41-dropout $SLAM --dropout=0.1
arm sec41-theta-1e6 $SLAM --rope_theta=1e6  # the text LM's own

# Section 4.3: text, speech and spans of both; the data as in the config
arm sec43-interleaved config/slam_interleaved.py

# Table 1: data
arm tab1-qwen-syn      $SLAM --data=$REAL,$SYN
arm tab1-qwen-div-syn  $SLAM --data=$REAL,$DIV,$SYN
arm tab1-qwen-neither  $SLAM --data=$REAL
arm tab1-qwen-div      $SLAM --data=$REAL,$DIV
arm tab1-qwen-only-syn $SLAM --data=$SYN
arm tab1-opt-syn       $SLAM --init=facebook/opt-125m --data=$REAL,$SYN
arm tab1-opt-div-syn   $SLAM --init=facebook/opt-125m --data=$REAL,$DIV,$SYN
arm tab1-opt-neither   $SLAM --init=facebook/opt-125m --data=$REAL
arm tab1-opt-div       $SLAM --init=facebook/opt-125m --data=$REAL,$DIV

# Table 2: TWIST-350M by its own recipe, without and with synthetic stories
arm tab2-twist-350m               config/twist_350m.py
arm tab2-twist-350m-stinystories  config/twist_350m_stinystories.py

# Table 9: context x batch of 128 or 256 chunks, about 400 and 640 tokens each
arm tab9-512x128  $SLAM --context=512  --batch_tokens=49152
arm tab9-512x256  $SLAM --context=512  --batch_tokens=98304
arm tab9-1024x128 $SLAM --context=1024 --batch_tokens=81920
arm tab9-1024x256 $SLAM --context=1024 --batch_tokens=163840

# Figure 5: minutes of DPO out of the 24 hours
for minutes in 15 30 60 120 240; do dpo "fig5-dpo-${minutes}min" $minutes; done

# The recipe with three seeds
for seed in 1 2 3; do
    arm "slam-seed$seed" $SLAM --seed=$seed
done
