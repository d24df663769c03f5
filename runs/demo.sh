#!/usr/bin/env bash
# The whole pipeline on one CPU, offline: speech in, speech out. Each line below can be run by hand.
#     bash runs/demo.sh               about 13 hours of stories
#     DEMO=short bash runs/demo.sh    the same stages, with too little speech to learn from
# Run it again to continue a run that was stopped; rm -r out/demo to start over.
set -euo pipefail
begin=$SECONDS
source "$(dirname "$0")/setup.sh"
mkdir -p out/demo
echo "set-up,$((SECONDS - begin))" > out/demo/stages.csv
synthetic='' train='' dpo=''
if [ "${DEMO:-full}" = short ]; then
    synthetic='--n_stories=600 --n_pairs=200 --n_suite=60' train='--max_steps=60' dpo='--max_steps=4'
fi

stage() {  # name, command: run it, remember its seconds
    echo
    echo "\$ ${*:2}"
    local start=$SECONDS
    "${@:2}"
    echo "$1,$((SECONDS - start))" >> out/demo/stages.csv
}
stage synthetic python make_synthetic.py config/demo_synthetic.py $synthetic
stage units     python prepare_units.py config/demo_units.py
stage train     python train.py config/demo.py $train
stage dpo       python dpo.py config/demo_dpo.py $dpo
stage eval      python eval_slm.py config/demo_eval.py
stage sample    python sample.py config/demo_sample.py
stage resynth   python sample.py config/demo_sample.py --resynth --max_prompts=20 \
    --out=out/demo/resynth --html=out/demo/resynth/page.html
echo "total,$((SECONDS - begin))" >> out/demo/stages.csv

# print one line per stage and one per model; out/demo/summary.json gets the same numbers
python - <<'PYTHON'
import json


def read(path):
    with open('out/demo/' + path) as file:
        return json.load(file)


with open('out/demo/stages.csv') as file:
    seconds = {name: int(spent) for name, spent in (line.split(',') for line in file)}
meta, loss = read('units/meta.json'), read('slm/slam.json')['scores']['val_loss']
scores = {
    model: {suite: round(result['score'], 2) for suite, result in suites.items()}
    for model, suites in read('eval.json')['metrics'].items()
}
hours, tokens = sum(meta['hours'].values()), meta['tokens']
with open('out/demo/summary.json', 'w') as file:
    summary = dict(seconds=seconds, hours=hours, tokens=tokens, val_loss=loss, metrics=scores)
    json.dump(summary, file, indent=2)

results = dict(
    synthetic=f'{hours:.1f} h of speech',
    units=f'{sum(tokens.values()):,} tokens of {meta["n_units"]} units',
    train=f'validation loss {loss:.3f}',
    eval='out/demo/report.html',
    sample='out/demo/sample/page.html',
    resynth=f'{read("resynth/sample.json")["frames_unchanged"]:.1f} % of the frames come back',
    total='out/demo/summary.json',
)
print(f'\n{"stage":<10} {"seconds":>7}  result')
for name, spent in seconds.items():
    print(f'{name:<10} {spent:>7}  {results.get(name, "")}')
for model, suites in scores.items():
    print(f'{model:<12}', *(f'{suite} {score:.1f} ' for suite, score in suites.items()))
PYTHON
