#!/usr/bin/env bash
# Every arm of the paper's ablations, one line each: 24 hours of one A5000 an arm. Pick some by a pattern:
#     bash runs/ablations.sh              all
#     bash runs/ablations.sh fig4         those of Figure 4
# An arm is left alone once it is finished and goes on where it stopped if not. out/ablations/NAME/curve.png, eval.json.
set -euo pipefail
cd "$(dirname "$0")/.."
PATTERN=${1:-.}
arm() {  # name, flags of train.py
    [[ $1 =~ $PATTERN ]] || return 0
    python train.py config/slam_a5000.py --out_dir="out/ablations/$1" "${@:2}"
    python eval_slm.py --init="out/ablations/$1" --out="out/ablations/$1/eval.json" ${EVAL:-} || echo "$1: not all tasks could run" >&2
}
dpo() {  # name, minutes of DPO out of the 24 hours
    [[ $1 =~ $PATTERN ]] || return 0
    local hours=$(awk "BEGIN {print 24 - $2 / 60}") share=$(awk "BEGIN {print $2 / 60}")
    python train.py config/slam_a5000.py --out_dir="out/ablations/$1" --train_hours="$hours" --max_steps="$(awk "BEGIN {print int(17625 * $hours / 23.5)}")"
    python dpo.py --init="out/ablations/$1" --out_dir="out/ablations/$1-dpo" --train_hours="$share" --max_steps=0 --epochs=0
    python eval_slm.py --init="out/ablations/$1-dpo" --out="out/ablations/$1-dpo/eval.json" ${EVAL:-} || echo "$1: not all tasks could run" >&2
}
REAL=librilight,librispeech
SYN=stinystories
DIV=swc,tedlium,peoples_speech,voxpopuli

# Figures 2 and 3: the base model, from its text weights (TWIST) and from a cold start
arm fig2-qwen2.5-0.5b-twist    --init=Qwen/Qwen2.5-0.5B
arm fig2-smollm2-135m-twist    --init=HuggingFaceTB/SmolLM2-135M
arm fig2-smollm2-360m-twist    --init=HuggingFaceTB/SmolLM2-360M
arm fig2-mobilellm-125m-twist  --init=facebook/MobileLLM-125M
arm fig2-mobilellm-350m-twist  --init=facebook/MobileLLM-350M
arm fig2-opt-125m-twist        --init=facebook/opt-125m
arm fig2-opt-350m-twist        --init=facebook/opt-350m
arm fig2-pythia-160m-twist     --init=EleutherAI/pythia-160m
arm fig2-pythia-410m-twist     --init=EleutherAI/pythia-410m
arm fig3-qwen2.5-0.5b-cold     --init=preset:qwen2.5-0.5b
arm fig3-smollm2-135m-cold     --init=preset:smollm2-135m
arm fig3-smollm2-360m-cold     --init=preset:smollm2-360m
arm fig3-mobilellm-125m-cold   --init=preset:mobilellm-125m
arm fig3-mobilellm-350m-cold   --init=preset:mobilellm-350m
arm fig3-opt-125m-cold         --init=preset:opt-125m
arm fig3-opt-350m-cold         --init=preset:opt-350m
arm fig3-pythia-160m-cold      --init=preset:pythia-160m
arm fig3-pythia-410m-cold      --init=preset:pythia-410m

# Figure 4: optimizer x schedule
arm fig4-adamw-cosine          --optimizer=adamw    --schedule=cosine
arm fig4-adamw-inverse_sqrt    --optimizer=adamw    --schedule=inverse_sqrt
arm fig4-ademamix-cosine       --optimizer=ademamix --schedule=cosine
arm fig4-ademamix-inverse_sqrt --optimizer=ademamix --schedule=inverse_sqrt
arm fig4-adalomo-cosine        --optimizer=adalomo  --schedule=cosine
arm fig4-adalomo-inverse_sqrt  --optimizer=adalomo  --schedule=inverse_sqrt
arm fig4-muon-cosine           --optimizer=muon     --schedule=cosine        # not in the paper

# Table 1: data
arm tab1-qwen-syn              --data=$REAL,$SYN
arm tab1-qwen-div-syn          --data=$REAL,$DIV,$SYN
arm tab1-qwen-neither          --data=$REAL
arm tab1-qwen-div              --data=$REAL,$DIV
arm tab1-qwen-only-syn         --data=$SYN
arm tab1-opt-syn               --init=facebook/opt-125m --data=$REAL,$SYN
arm tab1-opt-div-syn           --init=facebook/opt-125m --data=$REAL,$DIV,$SYN
arm tab1-opt-neither           --init=facebook/opt-125m --data=$REAL
arm tab1-opt-div               --init=facebook/opt-125m --data=$REAL,$DIV

# Table 9: context x batch. Chunks of at most 1,024 tokens have 620 on average, those of at most 512 about 385:
# 128 x 385 = 6 rows of 8,192
arm tab9-512x128               --context=512  --batch_tokens=49152
arm tab9-512x256               --context=512  --batch_tokens=98304
arm tab9-1024x256              --context=1024 --batch_tokens=163840
arm tab9-1024x128              --context=1024 --batch_tokens=81920

# Figure 5: minutes of DPO out of the 24 hours
dpo fig5-dpo-0.25h             15
dpo fig5-dpo-0.5h              30
dpo fig5-dpo-1h                60
dpo fig5-dpo-2h                120
dpo fig5-dpo-4h                240
