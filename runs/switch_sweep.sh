#!/usr/bin/env bash
# Coarser units for less compute: the price of a change of unit, and the number of clusters, on the
# demo's speech. Every arm passes once over the same 15 hours, so that fewer tokens are fewer steps.
#     bash runs/switch_sweep.sh ['1 2 3']     after demo.sh; out/switch/table.md; two busy hours
# A finished arm is left alone. An arm is CLUSTERS:PRICE.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
SEEDS=${1:-1 2 3} OUT=out/switch AUDIO=out/demo/audio
ARMS=${ARMS:-100:0 100:1 100:2 100:4 100:8 50:1}
[ -e $AUDIO/stories/manifest.jsonl ] ||
    { echo "switch_sweep.sh: no $AUDIO: run bash runs/demo.sh first" >&2; exit 2; }
mkdir -p $OUT/suites
for suite in grammar sstory tstory; do ln -sfn "$PWD/$AUDIO/$suite" $OUT/suites/; done

for arm in $ARMS; do
    where=$OUT/${arm/:/-}
    python prepare_units.py config/demo_units.py --audio=$AUDIO/stories --out="$where/units" \
        --fit_kmeans="${arm%:*}" --switch="${arm#*:}"
    python sample.py --init="$where/units" --prompt=$AUDIO/stories --resynth --max_prompts=50 \
        --out="$where/resynth"
    steps=$(python -c "import json
print(json.load(open('$where/units/meta.json'))['tokens']['train'] // 1024)")
    for seed in $SEEDS; do
        python train.py config/demo.py --data="$where/units" --out_dir="$where/slm-s$seed" \
            --seed="$seed" --max_steps="$steps" --train_hours=100 --save_init=False
    done
    [ -e "$where/eval.json" ] || python eval_slm.py config/demo_eval.py --data_dir=$OUT/suites \
        --html= --init="slm=$(echo $SEEDS | sed "s|[^ ]*|$where/slm-s&|g; s/ /+/g")" --out="$where/eval.json"
done
encoders=$(for arm in $ARMS; do echo "$OUT/${arm/:/-}/units/encoder"; done | paste -sd,)
python prepare_units.py --audio=$AUDIO/stories --report="$encoders" --out=$OUT

# one table; Spearman's rank correlation of PNMI with the grammar suite over the arms
python - $OUT $ARMS <<'PYTHON' | tee $OUT/table.md
import json, statistics, sys

out, *arms = sys.argv[1:]


def read(path):
    with open(f'{out}/{path}') as file:
        return json.load(file)


suites = ('grammar', 'sstory', 'tstory')
report = read('report.json')
print('| clusters, price | tokens/s | PNMI | frames that come back, % |', ' | '.join(suites), '|')
print('|---' * (4 + len(suites)) + '|')
pnmi, grammar = [], []
for arm in arms:
    folder = arm.replace(':', '-')
    models = read(f'{folder}/eval.json')['metrics'].values()
    scores = [[model[suite]['score'] for model in models] for suite in suites]
    row = report[f'{out}/{folder}/units/encoder']
    pnmi.append(row['pnmi'])
    grammar.append(statistics.mean(scores[0]))
    cells = [arm.replace(':', ', '), f'{read(f"{folder}/units/meta.json")["tokens_per_second"]:.1f}']
    cells += [f'{row["pnmi"]:.3f}', f'{read(f"{folder}/resynth/sample.json")["frames_unchanged"]:.1f}']
    cells += [f'{statistics.mean(each):.1f} ± {statistics.stdev(each):.1f}' for each in scores]
    print('|', ' | '.join(cells), '|')


def ranks(values):
    return [sorted(values).index(value) for value in values]


n = len(arms)
apart = sum((a - b) ** 2 for a, b in zip(ranks(pnmi), ranks(grammar)))
print(f'\nrank correlation of PNMI with grammar: {1 - 6 * apart / (n**3 - n):.2f} ({n} settings)')
PYTHON
