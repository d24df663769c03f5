#!/usr/bin/env bash
# The three losses of dpo.py on the demo, from the models of runs/seeds.sh: one table of mean and spread.
#     bash runs/losses.sh ['1 2 3']      out/losses/SEED/eval.json
set -euo pipefail
source "$(dirname "$0")/setup.sh"
export OMP_NUM_THREADS=1
seed() {
    local slm=out/seeds/$1/slm out=out/losses/$1
    [ -e "$slm/slam.json" ] || { echo "losses.sh: no $slm: run bash runs/seeds.sh first" >&2; exit 2; }
    for loss in dpo:0.1 ipo:1 simpo:2; do
        python dpo.py config/demo_dpo.py --seed="$1" --init="$slm" --out_dir="$out/${loss%:*}" \
            --loss="${loss%:*}" --beta="${loss#*:}" --train_hours=0
    done
    python eval_slm.py config/demo_eval.py --init="$slm,$out/dpo,$out/ipo,$out/simpo" --out="$out/eval.json" --html=
}
mkdir -p out/losses
for n in ${1:-1 2 3}; do seed "$n" > "out/losses/$n.txt" 2>&1 & done
wait
python - <<'EOT'
import glob, json, statistics

rows = {}
for path in sorted(glob.glob('out/losses/*/eval.json')):
    with open(path) as file:
        metrics = json.load(file)['metrics']
    for model, suites in metrics.items():
        scores = [suites[suite]['score'] for suite in ('grammar', 'sstory', 'tstory')]
        log = path.replace('eval.json', ('dpo' if model == 'slm' else model) + '/log.jsonl')
        with open(log) as file:
            repeats = [row['val_repeats'] for row in map(json.loads, file) if 'val_repeats' in row]
        scores.append(100 * repeats[0 if model == 'slm' else -1])
        rows.setdefault(model, []).append(scores)
print('| mean ± standard deviation | grammar | sstory | tstory | immediate repeats, % |')
print('|---' * 5 + '|')
for model, scores in rows.items():
    columns = zip(*scores, strict=True)
    cells = [f'{statistics.mean(c):.1f} ± {statistics.stdev(c):.1f}' for c in columns]
    print(f'| {model}, {len(scores)} seeds |', ' | '.join(cells), '|')
EOT
