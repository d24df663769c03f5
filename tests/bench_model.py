"""Speed of SLM beside transformers' model: the same weights and work, in the same run. By hand:

python tests/bench_model.py --preset=preset:qwen2.5-0.5b --device=cuda   # 358 M, bf16, compiled
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from config import configure

import statistics
import tempfile
import time

import torch
import torch.nn.functional as F
import transformers

from model import BOS, EOS, OFFSET, PAD, load_slm, pick_device, pick_dtype

# -----------------------------------------------------------------------------
preset = ''  # such as preset:opt-125m; '' is a Llama of 3 M parameters
device = 'auto'  # cuda, mps, cpu
rows = 8  # utterances of a padded batch, prompts of a generation
repeats = 5  # the median is reported, ours and theirs by turns
# -----------------------------------------------------------------------------


def alternate(*runs):
    """Median seconds of each, by turns so that noise falls on all alike; the first warms up."""
    times = [[] for _ in runs]
    for _ in range(repeats + 1):
        for run, spent in zip(runs, times, strict=True):
            begin = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            spent.append(time.perf_counter() - begin)
    return [statistics.median(spent[1:]) for spent in times]


def bench_training(ours, theirs, where):
    """Forward and backward: rows of packed utterances against padded batches."""
    # lengths as in speech, log-normal around 245 tokens
    lengths = torch.empty(48).log_normal_(5.5, 0.6).clamp(16, 1024).long().tolist()
    speech = [torch.randint(OFFSET, 502, (n,)) for n in lengths]
    room = -sum(lengths) % (1024 * rows)
    doc = torch.arange(len(speech)).repeat_interleave(torch.tensor(lengths))
    packed = F.pad(torch.cat(speech), (0, room)).view(-1, 1024).to(where).split(rows)
    docs = F.pad(doc, (0, room), value=-1).view(-1, 1024).to(where).split(rows)
    padded = [speech[i : i + rows] for i in range(0, len(speech), rows)]
    padded = [torch.nn.utils.rnn.pad_sequence(each, True, PAD).to(where) for each in padded]
    step = torch.compile(ours) if where.type == 'cuda' else ours

    def run_ours():
        for x, doc in zip(packed, docs, strict=True):
            step(x, x, doc=doc).backward()

    def run_theirs():
        for x in padded:
            theirs(x, attention_mask=(x != PAD).long(), labels=x).loss.backward()

    mine, plain = (sum(lengths) / seconds for seconds in alternate(run_ours, run_theirs))
    print(f'useful tokens/s: packed SLM {mine:,.0f}, transformers, padded {plain:,.0f}')


def bench_generation(ours, theirs, where):
    """Prompts of 61 tokens, continued."""
    ours.eval().head.weight.data[EOS] = theirs.eval().lm_head.weight.data[EOS] = 0  # never drawn
    prompts = F.pad(torch.randint(OFFSET, 502, (rows, 60)), (1, 0), value=BOS)
    ids = dict(input_ids=prompts.to(where), attention_mask=torch.ones_like(prompts).to(where))
    ids |= dict(do_sample=True, eos_token_id=None, pad_token_id=PAD, max_new_tokens=150)
    options = dict(temperature=0.8, top_k=25, repetition_penalty=1.1)
    seconds = alternate(
        lambda: ours.generate(list(prompts), 150, **options),
        lambda: theirs.generate(**ids, **options),
    )
    mine, plain = (rows * 150 / each for each in seconds)
    print(f'new tokens/s: SLM {mine:,.0f}, transformers {plain:,.0f}')


if __name__ == '__main__':
    configure(globals())
    torch.manual_seed(0)
    where = pick_device(device)
    sizes = dict(n_layer=4, n_embd=256, n_head=4, n_kv_head=2, n_ffn=768)
    ours = load_slm(preset or 'scratch', sizes=sizes, dtype=pick_dtype('auto', where)).to(where)
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).to(where)
    bench_training(ours, theirs, where)
    bench_generation(ours, theirs, where)
