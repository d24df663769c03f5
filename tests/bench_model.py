"""Speed of SLM beside transformers' model with the same weights, on the same work, in the same run. By hand:

python tests/bench_model.py                  # CPU: a 3 M-parameter model; generation with the demo's 0.8 M as well
python tests/bench_model.py --preset=qwen2.5-0.5b --device=cuda   # the 358 M model, bf16, compiled
"""

import os
import statistics
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from config import configure

import torch
import torch.nn.functional as F
import transformers

from model import BOS, EOS, OFFSET, PAD, SLM, SLMConfig, pick_device, pick_dtype

# -----------------------------------------------------------------------------
preset = ''  # a name of model.PRESETS; '' is a qwen2 shape of 3 M parameters
device = 'auto'  # cuda, mps, cpu
n_utterances = 48  # lengths log-normal around 250 tokens, cut at 1,024, as in real speech
batch_size = 8  # utterances of a padded batch; packed rows hold as many tokens
context = 1024  # tokens of a packed row
repeats = 5  # the median is reported, ours and theirs by turns
seed = 0
# -----------------------------------------------------------------------------

if __name__ == '__main__':
    configure(globals())
    device = pick_device(device)
    dtype = pick_dtype('auto', device)
    torch.manual_seed(seed)
    transformers.utils.logging.set_verbosity_error()
    ours = (
        SLM.from_preset(preset, context=context)
        if preset
        else SLM(
            SLMConfig(n_layer=4, n_embd=256, n_head=4, n_kv_head=2, n_ffn=768, context=context)
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    ours = ours.to(device, dtype)
    sync = torch.cuda.synchronize if device.type == 'cuda' else lambda: None

    def alternate(*runs):
        """Median seconds of each, run by turns so that noise falls on all alike; the first turn warms up."""
        times = [[] for _ in runs]
        for turn in range(repeats + 1):
            for run, spent in zip(runs, times):
                sync()
                begin = time.perf_counter()
                run()
                sync()
                spent.append(time.perf_counter() - begin)
        return [statistics.median(spent[1:]) for spent in times]

    # ---------------------------------------------------------------- packed against padded, forward + backward
    lengths = (
        torch.empty(n_utterances).log_normal_(5.5, 0.6).clamp(16, context).long()
    )  # exp(5.5) = 245
    speech = [torch.randint(OFFSET, 502, (n,)) for n in lengths]
    useful = int(lengths.sum())
    padded = [
        torch.nn.utils.rnn.pad_sequence(
            speech[i : i + batch_size], batch_first=True, padding_value=PAD
        )
        for i in range(0, n_utterances, batch_size)
    ]
    flat, doc = torch.cat(speech), torch.arange(n_utterances).repeat_interleave(lengths)
    target = torch.where(F.pad(doc[1:] == doc[:-1], (0, 1)), F.pad(flat[1:], (0, 1)), -100)
    rows = -(-useful // context)
    flat, doc, target = (
        F.pad(x, (0, rows * context - useful), value=fill).view(rows, context)
        for x, fill in ((flat, PAD), (doc, -1), (target, -100))
    )
    per_batch = 2 if device.type == 'cpu' else batch_size
    rows = (
        rows // per_batch * per_batch if device.type == 'cuda' else rows
    )  # one fixed shape to compile
    step = torch.compile(ours) if device.type == 'cuda' else ours
    packed_tokens = int((doc[:rows] >= 0).sum())

    def run_ours():
        for i in range(0, rows, per_batch):
            tokens, targets, docs = (x[i : i + per_batch].to(device) for x in (flat, target, doc))
            step(tokens, targets, doc=docs).backward()
            ours.zero_grad()

    def run_theirs():
        for tokens in padded:
            tokens = tokens.to(device)
            mask = tokens != PAD
            theirs(
                tokens, attention_mask=mask, labels=tokens.masked_fill(~mask, -100)
            ).loss.backward()
            theirs.zero_grad()

    mine, plain = alternate(run_ours, run_theirs)
    mine, plain = packed_tokens / mine, useful / plain
    print(
        f'{ours.num_params() / 1e6:.1f} M parameters, {device}, {dtype}; {n_utterances} utterances, {useful} tokens'
    )
    print(
        f'forward + backward, useful tokens/s:  packed SLM {mine:,.0f}   transformers padded {plain:,.0f}   ratio {mine / plain:.2f}'
    )

    # ---------------------------------------------------------------- generation: 16 prompts x 150 tokens
    demo = SLM(
        SLMConfig(
            n_layer=4, n_embd=128, n_head=4, n_kv_head=2, n_ffn=384, vocab_size=102, context=512
        )
    )
    for ours in [ours] if preset else [demo, ours]:
        ours, V = ours.to(device, dtype).eval(), ours.config.vocab_size
        ours.head.weight.data[EOS] = (
            0  # none stops early: a seen token with logit 0 is not the likeliest
        )
        with tempfile.TemporaryDirectory() as folder:
            ours.save_pretrained(folder)
            theirs = (
                transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
                .to(device)
                .eval()
            )
        prompts = [
            torch.cat((torch.tensor([BOS]), torch.randint(OFFSET, V, (60,)))) for _ in range(16)
        ]
        ids = torch.stack(prompts).to(device)
        options = dict(temperature=0.8, top_k=25, repetition_penalty=1.1)

        def generate_ours(compile):
            assert all(
                len(new) == 150
                for new in ours.generate(prompts, 150, seed=seed, compile=compile, **options)
            )

        def generate_theirs():
            new = theirs.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=150,
                do_sample=True,
                eos_token_id=None,
                pad_token_id=PAD,
                **options,
            )
            assert new.shape == (16, 61 + 150)

        begin = time.perf_counter()
        generate_ours(True)
        compiling = time.perf_counter() - begin
        compiled, mine, plain = alternate(
            lambda: generate_ours(True), lambda: generate_ours(False), generate_theirs
        )
        print(
            f'{ours.num_params() / 1e6:.1f} M, 16 prompts x 150 tokens, tokens/s: SLM compiled {2400 / compiled:,.0f} (after {compiling:.0f} s)   SLM '
            f'{2400 / mine:,.0f}   transformers.generate {2400 / plain:,.0f}   ratio {plain / compiled:.2f}, {plain / mine:.2f}',
            flush=True,
        )
