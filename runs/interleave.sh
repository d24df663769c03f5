#!/usr/bin/env bash
# Speech and text in one model, offline, in the toy language: does a model that was trained on spans
# of both (section 4.3 of the paper) relate text to speech? It is compared with a model of the same
# steps on separate speech and text, and with one of speech only. All three see as many units.
#     bash runs/interleave.sh                   results in out/interleave/eval.json
#     bash runs/interleave.sh '1 2 3' 2000      these seeds, so many steps (1000)
# All start from one small text LM, trained here on the stories' text. Runs go in parallel, with one
# thread each, and end after a fixed number of steps, not by the clock.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
SEEDS=${1:-1 2 3} STEPS=${2:-1000} OUT=out/interleave
SPEECH=$OUT/units/speech TEXT=$OUT/units/text MIXED=$OUT/units/interleaved
export OMP_NUM_THREADS=1

# --- speech in one voice, which a model this small learns soon, and its units
python make_synthetic.py config/demo_synthetic.py --out=$OUT/audio --task=stories,grammar,tstory \
    --voices=gmw/en --test_voices= --n_unseen=0 --speed=1.0-1.0 --pitch=50-50 --n_stories=5000
UNITS=(config/demo_units.py --audio=$OUT/audio/stories --out=$OUT/units)
python prepare_units.py "${UNITS[@]}"

# --- a text LM with a tokenizer of its own, as transformers saves them
[ -e $OUT/text_lm/model.safetensors ] || python - $OUT <<'PYTHON'
import json
import sys

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

STEPS, BATCH = 200, 32
out = sys.argv[1]
with open(f'{out}/units/units.jsonl') as file:
    rows = [json.loads(line) for line in file]
texts = [row['text'] for row in rows if row['split'] == 'train']
tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
options = dict(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
end = '<|endoftext|>'
trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=[end], **options)
tokenizer.train_from_iterator(texts, trainer)
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end)

torch.manual_seed(0)
size = dict(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
config = Qwen2Config(**size, intermediate_size=384, vocab_size=600, tie_word_embeddings=True)
model = Qwen2ForCausalLM(config)
optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99))
stories = [torch.tensor(tokenizer(text + end).input_ids) for text in texts]
for step in range(STEPS):
    batch = [stories[i] for i in torch.randint(len(stories), (BATCH,))]
    labels = pad_sequence(batch, batch_first=True, padding_value=-100)
    mask = (labels >= 0).long()
    loss = model(labels.clamp(min=0), attention_mask=mask, labels=labels).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.param_groups[0]['lr'] = 5e-3 * min((step + 1) / 20, 1 - step / STEPS)
    optimizer.step()
    optimizer.zero_grad()
print(f'text LM: {model.num_parameters():,} parameters, last loss {loss.item():.3f}')
tokenizer.save_pretrained(f'{out}/text_lm')
model.save_pretrained(f'{out}/text_lm')
PYTHON

# --- the three token sets, and the three arms of each seed
[ -e $MIXED/meta.json ] || python prepare_units.py "${UNITS[@]}" --text_lm=$OUT/text_lm
arm() {  # name, seed, data, steps
    python train.py config/demo.py --seed="$2" --out_dir="$OUT/$1-s$2" \
        --init=$OUT/text_lm --embed_init=mean --data="$3" --balanced --max_steps="$4" \
        --train_hours=100 --eval_interval=1000 --save_interval=1000
}
# Arm interleaved has 1/6 speech, 1/6 text and 4/6 interleaved tokens; 65.6 % of all are units. The
# others see as many units: 2/3 as many tokens of speech, of which 98.4 % are units
seed() {
    arm interleaved "$1" $SPEECH,$TEXT,$MIXED:4 $STEPS
    arm apart "$1" $SPEECH:2,$TEXT $STEPS
    arm speech "$1" $SPEECH $(((2 * STEPS + 2) / 3))
}
for n in $SEEDS; do seed "$n" > "$OUT/$n.txt" 2>&1 & done
for job in $(jobs -p); do wait "$job" || { echo "interleave.sh: see $OUT/*.txt" >&2; exit 1; }; done

models=()
for name in interleaved apart speech; do
    models+=("$name=$(echo $SEEDS | sed "s|[^ ]*|$OUT/$name-s&|g; s/ /+/g")")
done
python eval_slm.py --init="$(IFS=,; echo "${models[*]}")" --data_dir=$OUT/audio \
    --tasks=grammar,tstory,tstory_to_text,tstory_from_text --out=$OUT/eval.json
