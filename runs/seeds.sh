#!/usr/bin/env bash
# Does the demo's gain from preference tuning hold? Pre-training and DPO with other seeds on the demo's data (after runs/demo.sh), side by side, a
# thread each; steps end them, not the clock, so that the table is the same on any machine.
#     bash runs/seeds.sh ['1 2 3']      out/seeds/*/eval.json and a table of mean and spread
set -euo pipefail
source "$(dirname "$0")/setup.sh"
export OMP_NUM_THREADS=1
UNITS=out/demo/units
[ -e "$UNITS/pairs.jsonl" ] || { echo "seeds.sh: no $UNITS/pairs.jsonl: run bash runs/demo.sh first" >&2; exit 2; }
seed() {
    python train.py config/demo.py --seed="$1" --out_dir="out/seeds/$1/slm" --save_init=False --train_hours=100
    python dpo.py config/demo_dpo.py --seed="$1" --init="out/seeds/$1/slm" --out_dir="out/seeds/$1/dpo" --train_hours=100
    python eval_slm.py config/demo_eval.py --init="out/seeds/$1/slm,out/seeds/$1/dpo" --out="out/seeds/$1/eval.json" --html=
}
mkdir -p out/seeds
for n in ${1:-1 2 3}; do seed "$n" > "out/seeds/$n.txt" 2>&1 & done
wait
python - <<'EOF'
import glob, json, statistics
runs = [json.load(open(path))['metrics'] for path in sorted(glob.glob('out/seeds/*/eval.json'))]
suites, stages = list(runs[0]['slm']), {'pre-trained': lambda run: run['slm'], 'DPO': lambda run: run['dpo']}
print('| mean ± standard deviation of', len(runs), 'seeds |', *(f'{suite} |' for suite in suites))
print('|---' * (len(suites) + 1) + '|')
score = lambda stage: [[stages[stage](run)[suite]['score'] for run in runs] for suite in suites]
gain = [[b - a for a, b in zip(*pair)] for pair in zip(score('pre-trained'), score('DPO'))]
for name, rows, sign in (('pre-trained', score('pre-trained'), ''), ('DPO', score('DPO'), ''), ('DPO - pre-trained', gain, '+')):
    print('|', name, '|', *(f'{statistics.mean(row):{sign}.1f} ± {statistics.stdev(row):.1f} |' for row in rows))
EOF
