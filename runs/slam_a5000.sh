#!/usr/bin/env bash
# Slam on one GPU in a day, from the downloads to the table. Pre-training (23.5 h) and DPO (0.5 h)
# are the day; downloading, preparing units and evaluating come on top.
#     bash runs/slam_a5000.sh
#     GPUS=8 LIBRILIGHT='small medium large' bash runs/slam_a5000.sh
# A finished part is skipped; a stopped part continues where it stopped. Disk: see README's table of
# sets. Suites are expected below data/eval, laid out as README says.
#     GPUS          GPUs to use                                               1
#     LIBRILIGHT    parts of it: small (35 GB), medium (321 GB), large (3 TB)  small medium
#     SPOKENSWAG    download, or make: SWAG's texts spoken by kokoro here      download
#     CONFIG, DPO, OUT                                     the recipe, and where its results go
set -euo pipefail
source "$(dirname "$0")/setup.sh"
GPUS=${GPUS:-1} LIBRILIGHT=${LIBRILIGHT:-small medium} SPOKENSWAG=${SPOKENSWAG:-download}
CONFIG=${CONFIG:-config/slam_a5000.py} DPO=${DPO:-config/slam_dpo.py} OUT=${OUT:-out/slam}

launch() {
    if [ "$GPUS" -gt 1 ]; then torchrun --nproc_per_node="$GPUS" "$@"; else python "$@"; fi
}
fetch() {  # url, folder: download and unpack once; a broken download is resumed
    local file=data/download/${1##*/}
    [ ! -e "$file.done" ] || return 0
    mkdir -p data/download "$2"
    curl --fail --location --continue-at - --output "$file" "$1"
    tar -xf "$file" -C "$2"
    touch "$file.done"
    rm "$file"
}
units() {  # audio, name
    [ -e "data/$2/meta.json" ] ||
        launch prepare_units.py --audio="$1" --out="data/$2" --encoder=mhubert25
}
has pyarrow datasets || install pyarrow datasets

# speech -> units: real speech, synthetic stories, preference pairs
for part in train-clean-100 train-clean-360 train-other-500 dev-clean dev-other; do
    fetch "https://www.openslr.org/resources/12/$part.tar.gz" data/audio
done
for part in $LIBRILIGHT; do
    fetch "https://dl.fbaipublicfiles.com/librilight/data/$part.tar" data/audio/librilight
done
units data/audio/LibriSpeech librispeech  # dev-clean and dev-other validate
units data/audio/librilight librilight
units hub:slprl/sTinyStories stinystories
if [ "$SPOKENSWAG" = make ]; then
    has kokoro || install 'kokoro>=0.9'
    python make_synthetic.py --task=pairs --text=hub:allenai/swag:regular/train --tts=kokoro \
        --out=data/audio/spokenswag
    units data/audio/spokenswag/pairs spokenswag
else
    units hub:slprl/SpokenSwag spokenswag
fi

# units -> model -> preferences
launch train.py "$CONFIG" --out_dir="$OUT"
launch dpo.py "$DPO" --init="$OUT" --data=data/spokenswag/pairs.jsonl --out_dir="$OUT-dpo"

# the table, and a page to listen to
python eval_slm.py --init="$OUT,$OUT-dpo" --data_dir=data/eval --html="$OUT-dpo/report.html" \
    --tasks=sblimp,sstorycloze,tstorycloze,genppl,autobleu --out="$OUT-dpo/eval.json"
