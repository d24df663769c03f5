"""Speed of SLM beside transformers' model: the same weights and work, in the same run. By hand:

python tests/bench_model.py                  # CPU: a 3 M-parameter model, then the demo's 0.8 M
python tests/bench_model.py --preset=qwen2.5-0.5b --device=cuda   # 358 M, bf16, compiled
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

from model import BOS, EOS, OFFSET, PAD, SLM, SLMConfig, pick_device, pick_dtype

# -----------------------------------------------------------------------------
preset = ''  # a name of model.PRESETS; '' is a qwen2 shape of 3 M parameters
device = 'auto'  # cuda, mps, cpu
n_utterances = 48  # lengths log-normal around 250 tokens, cut at the context, as in real speech
batch_size = 8  # utterances of a padded batch; packed rows hold as many tokens
context = 1024  # tokens of a packed row
repeats = 5  # the median is reported, ours and theirs by turns
seed = 0
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


def transformers_model(ours, device, dtype):
    """transformers' model with the same weights."""
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.to(device)


def pack(speech, rows):
    """Utterances -> tokens, targets and documents, whole batches of (rows, context)."""
    tokens = torch.cat(speech)
    doc = torch.arange(len(speech)).repeat_interleave(torch.tensor([len(s) for s in speech]))
    follows = F.pad(doc[1:] == doc[:-1], (0, 1))
    targets = torch.where(follows, F.pad(tokens[1:], (0, 1)), -100)
    room = -len(tokens) % (context * rows)
    filled = ((tokens, PAD), (targets, -100), (doc, -1))
    return [F.pad(x, (0, room), value=fill).view(-1, context) for x, fill in filled]


def bench_training(ours, device, dtype):
    """Forward and backward: packed rows against transformers' padded batches."""
    theirs = transformers_model(ours, device, dtype)
    lengths = torch.empty(n_utterances).log_normal_(5.5, 0.6).clamp(16, context)  # exp(5.5) = 245
    speech = [torch.randint(OFFSET, 502, (int(n),)) for n in lengths]
    useful = sum(len(utterance) for utterance in speech)
    # a GPU compiles for one shape
    rows = batch_size if device.type == 'cuda' else 1
    packed = [x.to(device) for x in pack(speech, rows)]
    step = torch.compile(ours) if device.type == 'cuda' else ours

    def run_ours():
        for tokens, targets, doc in zip(*(x.split(batch_size) for x in packed), strict=True):
            step(tokens, targets, doc=doc).backward()
            ours.zero_grad()

    def run_theirs():
        for i in range(0, n_utterances, batch_size):
            tokens = torch.nn.utils.rnn.pad_sequence(speech[i : i + batch_size], True, PAD)
            tokens = tokens.to(device)
            labels = tokens.masked_fill(tokens == PAD, -100)
            theirs(tokens, attention_mask=tokens != PAD, labels=labels).loss.backward()
            theirs.zero_grad()

    mine, plain = (useful / seconds for seconds in alternate(run_ours, run_theirs))
    print(
        f'{ours.num_params() / 1e6:.1f} M, {device}, {dtype}, {useful} tokens: forward + backward'
    )
    print(f'  useful tokens/s: packed SLM {mine:,.0f}   transformers, padded {plain:,.0f}')
    print(f'  ratio {mine / plain:.2f}')


def bench_generation(ours, device, dtype, n=150):
    """16 prompts of 61 tokens continued by n."""
    ours.eval().head.weight.data[EOS] = 0  # a seen token with logit 0 is not drawn: none ends early
    theirs = transformers_model(ours, device, dtype).eval()
    units = torch.randint(OFFSET, ours.config.vocab_size, (16, 60))
    prompts = F.pad(units, (1, 0), value=BOS)
    options = dict(temperature=0.8, top_k=25, repetition_penalty=1.1)

    def generate(compile):
        new = ours.generate(list(prompts), n, seed=seed, compile=compile, **options)
        assert all(len(row) == n for row in new)

    def generate_theirs():
        options_of_theirs = dict(max_new_tokens=n, do_sample=True, eos_token_id=None)
        ids, mask = prompts.to(device), torch.ones_like(prompts).to(device)
        theirs.generate(ids, attention_mask=mask, pad_token_id=PAD, **options_of_theirs, **options)

    begin = time.perf_counter()
    generate(True)
    compiling = time.perf_counter() - begin
    seconds = alternate(lambda: generate(True), lambda: generate(False), generate_theirs)
    compiled, mine, plain = (16 * n / each for each in seconds)
    print(f'{ours.num_params() / 1e6:.1f} M, 16 prompts x {n} tokens, tokens/s:')
    print(f'  SLM compiled {compiled:,.0f} (after {compiling:.0f} s)   SLM {mine:,.0f}')
    print(f'  transformers.generate {plain:,.0f}')
    print(f'  ratio {compiled / plain:.2f}, {mine / plain:.2f}', flush=True)


if __name__ == '__main__':
    configure(globals())
    where = pick_device(device)
    precision = pick_dtype('auto', where)
    torch.manual_seed(seed)
    transformers.utils.logging.set_verbosity_error()
    if preset:
        models = [SLM.from_preset(preset, context=context)]
    else:
        shapes = [dict(n_embd=256, n_ffn=768), dict(n_embd=128, n_ffn=384, vocab_size=102)]
        common = dict(n_layer=4, n_head=4, n_kv_head=2, context=context)
        models = [SLM(SLMConfig(**common, **shape)) for shape in shapes]
    models = [model.to(where, precision) for model in models]
    bench_training(models[0], where, precision)
    for slm in models:
        bench_generation(slm, where, precision)
