"""The three networks, and how they are loaded and saved.

SLM           units -> next unit   a transformer over speech units; transformers reads and writes
                                   its checkpoints (load_slm, SLM.save_pretrained)
UnitEncoder   wave  -> units       HuBERT-like features, or MFCC offline, and k-means
UnitVocoder   units -> wave        the unit HiFi-GAN, or a table of spectra
"""

import contextlib
import copy
import hashlib
import importlib
import io
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from bisect import bisect_left, insort
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import chain
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

PAD, BOS, EOS, OFFSET = 0, 1, 1, 2  # <S> is both ends of an utterance; unit u is token u + OFFSET
SAMPLE_RATE = 16000
PARTS = ('encoder', 'vocoder', 'tokenizer')  # folders that a checkpoint may contain
ROPE_POSITIONS = 1 << 15  # rows of RoPE's tables: no utterance is longer than 32,768 tokens
POSITION_OFFSET = 2  # OPT's learned positions begin at row 2
LOGITS_AT_ONCE = 1 << 28  # numbers; a larger product of the head is computed in pieces


class InputError(ValueError):
    """Something the user can mend; scripts print it as one line and exit with code 2."""


# -----------------------------------------------------------------------------
# SLM: the speech language model


class Norm(nn.Module):
    """RMSNorm, or LayerNorm where it has a bias, over the last dimension, computed in fp32."""

    def __init__(self, config, size):
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if config.norm_bias else None

    def forward(self, x):
        weight = self.weight.float()
        if self.bias is None:
            y = F.rms_norm(x.float(), weight.shape, weight, self.eps)
        else:
            y = F.layer_norm(x.float(), weight.shape, weight, self.bias.float(), self.eps)
        return y.to(x.dtype)


def rotate(x, cos, sin):
    """RoPE. x: (B, T, H, D); cos, sin: (B, T, 1, R), the first half of sin negative. Feature i < R
    is rotated together with i + R / 2."""
    R = cos.shape[-1]
    part = x[..., :R]
    # roll, not cat: the compiler then makes one backward kernel for q and k, joined with v
    rotated = part * cos + part.roll(R // 2, -1) * sin
    return rotated if R == x.shape[-1] else torch.cat((rotated, x[..., R:]), dim=-1)


class Block(nn.Module):
    """One transformer layer, in the variant that its config describes (read_config)."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.norm1 = Norm(c, c.n_embd)
        self.qkv = nn.Linear(c.n_embd, (c.n_head + 2 * c.n_kv_head) * c.head_dim, bias=c.qkv_bias)
        self.out = nn.Linear(c.n_head * c.head_dim, c.n_embd, bias=c.out_bias)
        if c.qk_norm:
            self.norm_q = Norm(c, c.head_dim)
            self.norm_k = Norm(c, c.head_dim)
        self.norm2 = Norm(c, c.n_embd)
        # gated (SwiGLU): gate and up in one product
        self.up = nn.Linear(c.n_embd, c.n_ffn * (1 + c.gated), bias=c.mlp_bias)
        self.down = nn.Linear(c.n_ffn, c.n_embd, bias=c.mlp_bias)
        self.act = ACTIVATIONS[c.act]

    def attention(self, x, rope, attend):
        c, (B, T, _) = self.config, x.shape
        heads = self.qkv(x).view(B, T, -1, c.head_dim)
        q, k, v = heads.split([c.n_head, c.n_kv_head, c.n_kv_head], dim=2)  # (B, T, heads, D)
        if c.qk_norm:
            q, k = self.norm_q(q), self.norm_k(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return self.out(attend(q, k, v).transpose(1, 2).reshape(B, T, -1))

    def mlp(self, x):
        x = self.up(x)
        if self.config.gated:
            gate, x = x.chunk(2, dim=-1)
            return self.down(self.act(gate) * x)
        return self.down(self.act(x))

    def forward(self, x, rope, attend):  # x: (B, T, n_embd)
        c = self.config
        drop = partial(F.dropout, p=c.dropout, training=self.training)
        if c.parallel:  # attention and MLP read the same input
            attended = drop(self.attention(self.norm1(x), rope, attend))
            return x + attended + drop(self.mlp(self.norm2(x)))
        if c.pre_norm:
            x = x + drop(self.attention(self.norm1(x), rope, attend))
            return x + drop(self.mlp(self.norm2(x)))
        x = self.norm1(x + drop(self.attention(x, rope, attend)))
        return self.norm2(x + drop(self.mlp(x)))


class SLM(nn.Module):
    """A decoder-only transformer over speech units; load_slm makes one.

    Tokens: PAD 0, `<S>` 1 (both ends of an utterance), unit u at u + OFFSET, the convention of
    slprl/slam. An interleaved model has a text LM's tokens first, unit u at u + offset, then the
    switches `<speech>` and `<text>`, each before what it names; `end`, the text LM's own token,
    ends a document.

    hf_config: transformers' config of the same model; config: the numbers of it that Block needs.
    slam: the content of slam.json: encoder, encoder_id, vocoder, n_units, frame_rate, dedup,
    recipe, scores; of an interleaved model also tokenizer (a folder), offset and end;
    scoring='units' where the model was trained without `<S>` at the front, so that an utterance is
    scored as its units alone, the first of which nothing predicts.
    """

    def __init__(self, hf_config, dropout=0.0, seed=0):
        super().__init__()
        self.hf_config, self.slam = hf_config, {}
        c = self.config = read_config(hf_config, dropout)
        self.compiled_step = self.static_cache = None  # of generate
        self.embed = nn.Embedding(c.vocab_size, c.embed_dim)
        if not c.rope_freqs:
            self.embed_positions = nn.Embedding(c.max_positions + POSITION_OFFSET, c.n_embd)
        if c.embed_dim != c.n_embd:  # OPT-350M projects 512 -> 1024 -> 512
            self.project_in = nn.Linear(c.embed_dim, c.n_embd, bias=False)
            self.project_out = nn.Linear(c.n_embd, c.embed_dim, bias=False)
        self.blocks = nn.ModuleList([Block(c) for _ in range(c.n_layer)])
        if c.pre_norm:
            self.norm = Norm(c, c.n_embd)
        self.head = nn.Linear(c.embed_dim, c.vocab_size, bias=False)
        if c.tied:
            self.head.weight = self.embed.weight
        if not self.embed.weight.is_meta:
            generator = torch.Generator().manual_seed(seed)
            for module in self.modules():  # transformers' cold start: normal(0, 0.02), biases 0
                if isinstance(module, (nn.Linear, nn.Embedding)):
                    nn.init.normal_(module.weight, std=0.02, generator=generator)
                    if getattr(module, 'bias', None) is not None:
                        nn.init.zeros_(module.bias)
        self.make_rope()

    def _apply(self, fn, recurse=True):
        """What .to, .cuda and .bfloat16 call."""
        super()._apply(fn, recurse)
        self.make_rope()
        return self

    def make_rope(self):
        """RoPE's cos and sin by position as rotate takes them, (ROPE_POSITIONS, R) each, computed
        in fp32 and rounded once to the weights' dtype."""
        weight, c = self.embed.weight, self.config
        if c.rope_freqs and not weight.is_meta:
            positions = torch.arange(ROPE_POSITIONS, dtype=torch.float32)
            angles = torch.outer(positions, torch.tensor(c.rope_freqs))
            cos, sin = angles.cos() * c.rope_scale, angles.sin() * c.rope_scale
            tables = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
            self.rope = [table.to(weight) for table in tables]

    def hidden(self, tokens, doc=None, positions=None, branch=None, attend=None):
        """The last hidden states (B, T, embed_dim), ready for the head.

        tokens: (B, T) int64. doc: (B, T) integers, equal along one utterance and changing at its
        border; a token sees its own utterance alone, with positions from 0. None: each row is one
        utterance. positions: (B, T), in place of those. branch: (B, T), 0 for a shared prompt, 1,
        2, ... for its alternatives, which see the prompt and themselves. attend: a function of q, k
        and v, in place of attention within documents (for generation).
        Raises: InputError if the model has no position that large.
        """
        c, (B, T) = self.config, tokens.shape
        if positions is None:
            positions = torch.arange(T, device=tokens.device).expand(B, T)
            if doc is not None:
                # restart at each utterance: subtract the index at which the present one began
                first = F.pad(doc[:, 1:] != doc[:, :-1], (1, 0), value=True)
                positions = positions - torch.where(first, positions, 0).cummax(dim=1).values
        if T > c.max_positions and not torch.compiler.is_compiling():
            self.check_positions(int(positions.max()) + 1)

        x = self.embed(tokens)  # (B, T, embed_dim)
        if torch.is_autocast_enabled(x.device.type):
            # the residual stream in bf16, as in a bf16 model
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if c.embed_dim != c.n_embd:
            x = self.project_in(x)
        rope = None
        if c.rope_freqs:
            rope = [table[positions][:, :, None].to(x.dtype) for table in self.rope]  # (B, T, 1, R)
        else:
            x = x + self.embed_positions(positions + POSITION_OFFSET).to(x.dtype)

        if attend is None:
            attend = attention_within(doc, branch)
        for block, has_rope in zip(self.blocks, c.rope_layers, strict=True):
            x = block(x, rope if has_rope else None, attend)
        if c.pre_norm:
            x = self.norm(x)
        return self.project_out(x) if c.embed_dim != c.n_embd else x

    def forward(self, tokens, targets=None, doc=None, positions=None, branch=None):
        """Next-token logits, or the loss where targets are given.

        tokens, doc, positions, branch: (B, T), as in hidden. targets: (B, T) int64, the token after
        each, -100 where none is to be predicted.
        Returns: logits (B, T, vocab_size); with targets the mean cross-entropy over those that are
        not -100, in nats, a scalar computed in fp32.
        """
        x = self.hidden(tokens, doc, positions, branch)
        if targets is None:
            return self.logits(x)
        losses = self.cross_entropy(x.flatten(0, 1), targets.flatten())
        return losses.sum() / (targets != -100).sum()

    def head_weight(self, x, precise=False):
        """The head's weight in the dtype of its product with x, (vocab_size or more, embed_dim)."""
        weight = self.head.weight.to(torch.float32 if precise else x.dtype)
        if x.is_cuda:  # 502 columns are unaligned and slow, 512 are not
            weight = F.pad(weight, (0, 0, 0, -len(weight) % 128))
        return weight

    def logits(self, x, weight=None):
        """The head: (..., embed_dim) -> (..., vocab_size). weight: of head_weight, where several
        products share it."""
        weight = self.head_weight(x) if weight is None else weight
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(weight.dtype), weight)[..., : self.config.vocab_size]

    def cross_entropy(self, x, targets, precise=False):
        """-log p in nats, fp32, of each target: x (N, embed_dim), targets (N,) -> (N,); 0 where the
        target is -100. A large vocabulary's logits never all exist at once, nor in backward."""
        weight = self.head_weight(x, precise)

        def losses_of(x, targets):
            logits = self.logits(x, weight).float()
            return F.cross_entropy(logits, targets, reduction='none', ignore_index=-100)

        rows = max(1, LOGITS_AT_ONCE // self.config.vocab_size)
        if len(x) <= rows:
            return losses_of(x, targets)
        # nothing in it is random, and reading the generators' state would wait for the GPU
        keep = dict(use_reentrant=False, preserve_rng_state=False)
        pieces = zip(x.split(rows), targets.split(rows), strict=True)
        return torch.cat([checkpoint(losses_of, *piece, **keep) for piece in pieces])

    def logps(self, tokens, mask, doc=None, positions=None, branch=None, segments=None, n=None):
        """Log-probabilities in nats of the tokens where mask is 1, each given what it may see
        before it; differentiable; the head's product in fp32 (bf16 logits above 8 are 1/16 apart).

        tokens, doc, positions, branch: as in hidden. mask: (B, T), 0 on the first token of every
        utterance, which nothing predicts. segments: (B, T) int64, the output that each token counts
        towards, in 0 .. n - 1; None: its row.
        Returns: sums, (n,) or (B,).
        """
        B, T = tokens.shape
        before = torch.arange(T, device=tokens.device).expand(B, T) - 1
        if branch is not None:
            # an alternative's first token follows the prompt's last, not the alternative before it
            prompt_end = torch.where(branch == 0, before + 1, 0).cummax(dim=1).values
            begins = F.pad(branch[:, 1:] != branch[:, :-1], (1, 0)) & (branch > 0)
            before = torch.where(begins, prompt_end, before)
        x = self.hidden(tokens, doc, positions, branch)
        x = x.gather(1, before.clamp(min=0)[:, :, None].expand(-1, -1, x.shape[-1]))
        token_logps = -self.cross_entropy(x.flatten(0, 1), tokens.flatten(), precise=True)

        mask = mask.flatten().to(token_logps.dtype)
        if segments is None:
            segments, n = torch.arange(B, device=tokens.device).repeat_interleave(T), B
        zeros = torch.zeros(n, dtype=token_logps.dtype, device=tokens.device)
        return zeros.index_add(0, segments.flatten(), token_logps * mask)

    def check_positions(self, length):
        """Raise InputError where `length` tokens are more than the model has positions."""
        limit, name = self.config.max_positions, self.hf_config.model_type
        if length > limit:
            raise InputError(
                f'{length} tokens: this {name} model has no more than {limit} positions'
            )

    def num_params(self):
        """Parameters, tied ones once: what Table 7 counts."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, span):
        """Floating-point operations of one token, forward and backward: 6 a weight that multiplies,
        and causal attention. span: mean tokens of an utterance; attention covers half of it."""
        c = self.config
        weights = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        return 6 * weights + 6 * c.n_layer * c.n_head * c.head_dim * span

    # ------------------------------------------------------------------ tokens

    @property
    def offset(self):
        """The token of unit 0."""
        return self.slam.get('offset', OFFSET)

    @property
    def end(self):
        """The token that ends an utterance or a document."""
        return self.slam.get('end', EOS)

    def tokens_of(self, parts, alone=False):
        """Tokens (n,) int64 of a prompt, which the model may continue.

        parts: list of ('speech', units) and ('text', ids), in their order; an interleaved model
        puts its switches before each, a unit LM `<S>` before the units, its one part. alone:
        nothing is put before the units, as models with slam['scoring'] 'units' were trained.
        Raises: InputError for text where the model has no text tokens.
        """
        tokens = list(self.slam.get('prefix', ()))
        for kind, ids in parts:
            interleaved = self.tokenizer if kind == 'text' else self.slam.get('tokenizer')
            switch = self.config.vocab_size - (2 if kind == 'speech' else 1)
            tokens += [] if alone else [switch if interleaved else BOS]
            shift = self.offset if kind == 'speech' else 0
            tokens += (torch.as_tensor(ids) + shift).tolist()
        return torch.tensor(tokens, dtype=torch.long)

    @cached_property
    def tokenizer(self):
        """The text LM's. Raises InputError where the model has no text tokens."""
        if not self.slam.get('tokenizer'):
            raise InputError('the model has no text tokens: train one on interleaved data')
        return read_tokenizer(self.slam['tokenizer'])[0]

    def encode_text(self, text, inside=False):
        """The text LM's tokens of a text, list of int; inside: it continues other words, with a
        space before it. Raises InputError where the model has no text tokens."""
        return self.tokenizer.encode(' ' * inside + text, add_special_tokens=False).ids

    def allowed_tokens(self, kind='speech'):
        """Which tokens generation may choose, (vocab_size,) bool: of an interleaved model units,
        or the text LM's own tokens, and the end; of a unit LM all but PAD."""
        allowed = torch.ones(self.config.vocab_size, dtype=torch.bool)
        allowed[PAD] = False
        if self.slam.get('tokenizer'):
            is_text = torch.arange(len(allowed)) < self.offset
            allowed = is_text if kind == 'text' else ~is_text
            allowed[-2:] = False  # the switches
            allowed[self.end] = True
        return allowed

    # ------------------------------------------------------------------ generation

    @torch.inference_mode()
    def generate(
        self,
        prompts,
        max_new_tokens=150,
        temperature=0.8,
        top_k=25,
        top_p=1.0,
        repetition_penalty=1.1,
        seed=None,
        compile=False,
        ban_repeats=None,
        kind='speech',
    ):
        """Continue prompts (defaults: Table 6 of the paper).

        prompts: list of 1-D int64 tensors as of tokens_of, of any lengths >= 1. temperature: 0
        takes the most likely token. top_k: 0 is off. repetition_penalty: over prompt and
        continuation, as transformers defines it. seed: None draws from torch's own generator.
        compile: torch.compile the step of one token; half a minute the first time. ban_repeats: no
        unit directly after itself, as in de-duplicated units; None: where slam says dedup. kind:
        'speech' or 'text', what an interleaved model continues with, after that switch.
        Returns: list of 1-D int64 tensors on the CPU: the new tokens, without the one that ends.
        Raises: InputError if the model has fewer positions than prompt + continuation.
        """
        tokens, seen, padding = self.pad_left(prompts)
        (B, longest), device = tokens.shape, tokens.device
        self.check_positions(longest + max_new_tokens)

        # `columns` are the places of the tokens in the cache, whose width comes in steps of 128:
        # few shapes, so little to compile
        columns = torch.arange(longest, device=device)
        positions = (columns - padding).clamp(min=0)
        width = -(-(longest + max_new_tokens) // 128) * 128
        real = torch.arange(width, device=device) >= padding
        cache = self.make_cache(B, width, compile)

        # all random numbers at once
        top_k = min(top_k or self.config.vocab_size, self.config.vocab_size)
        noise = torch.empty(max_new_tokens, B, top_k, device=device)
        generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        noise.exponential_(generator=generator)
        options = self.sampling(temperature, top_p, repetition_penalty, ban_repeats, kind)

        # the first round takes the whole prompts, each further one the token before
        rows, ended = [tokens[:, :0]], torch.zeros(B, 1, dtype=torch.bool, device=device)
        for i in range(max_new_tokens):
            step = self.compile_step(device) if compile and i > 0 else self.next_tokens
            new = step(tokens, positions, columns, real, cache, seen, noise[i], options)
            tokens = torch.where(ended, PAD, new[:, None])
            seen.scatter_(1, tokens, True)
            ended = ended | (tokens == self.end)
            rows.append(tokens)
            # reading the flag waits for a GPU: not every token
            if (device.type == 'cpu' or i % 16 == 15) and ended.all():
                break
            positions, columns = positions[:, -1:] + 1, columns[-1:] + 1
        rows = torch.cat(rows, dim=1).cpu()  # (B, steps)
        lengths = (rows != self.end).long().cumprod(dim=1).sum(dim=1)
        return [row[:length] for row, length in zip(rows, lengths, strict=True)]

    def pad_left(self, prompts):
        """Prompts of any lengths side by side, so that all continue at the same column: tokens
        (B, longest), which tokens a row has seen (B, vocab_size), and its padding (B, 1)."""
        longest = max(map(len, prompts))
        tokens = torch.full((len(prompts), longest), PAD)
        seen = torch.zeros(len(prompts), self.config.vocab_size, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            tokens[row, longest - len(prompt) :] = prompt
            seen[row, prompt] = True
        padding = torch.tensor([[longest - len(prompt)] for prompt in prompts])
        return [x.to(self.embed.weight.device) for x in (tokens, seen, padding)]

    def sampling(self, temperature, top_p, penalty, ban_repeats, kind):
        """The options of `choose`, most of them as tensors: other values compile nothing."""
        device = self.embed.weight.device
        ban_repeats = self.slam.get('dedup') if ban_repeats is None else ban_repeats
        is_unit = torch.arange(self.config.vocab_size, device=device) >= self.offset
        return dict(
            temperature=torch.tensor(float(temperature or 1), device=device),
            top_p=torch.tensor(float(top_p), device=device),
            penalty=torch.tensor(float(penalty), device=device),
            allowed=self.allowed_tokens(kind).to(device),
            may_repeat=~is_unit if ban_repeats else torch.ones_like(is_unit),
            greedy=temperature == 0,
        )

    def make_cache(self, B, width, compile):
        """Keys and values of each layer in turn, a list of (B, n_kv_head, width, head_dim). For a
        compiled step they keep their addresses from call to call, as CUDA graphs need it."""
        c, weight, old = self.config, self.embed.weight, self.static_cache
        shape = (B, c.n_kv_head, width, c.head_dim)
        if compile and old and old[0].shape == shape and old[0].dtype == weight.dtype:
            return old
        cache = [weight.new_zeros(shape) for _ in range(2 * c.n_layer)]
        if compile and weight.is_cuda:
            self.static_cache = cache
            for tensor in cache:
                torch._dynamo.mark_static_address(tensor, guard=False)
        return cache

    def compile_step(self, device):
        """next_tokens compiled: CUDA graphs on a GPU, on a CPU no Python between the kernels."""
        if self.compiled_step is None:
            how = dict(mode='reduce-overhead')
            if device.type == 'cpu':  # small kernels in one thread
                how = dict(options={'cpp_wrapper': True, 'cpp.min_chunk_size': 8192})
            how |= dict(fullgraph=True, dynamic=True)
            self.compiled_step = torch.compile(self.next_tokens, **how)
        return self.compiled_step

    def next_tokens(self, tokens, positions, columns, real, cache, seen, noise, options):
        """One round of generation: tokens (B, T) enter the cache at `columns` (T,), and the tokens
        that follow them, (B,), are chosen.

        positions: (B, T). real: (B, width of the cache) bool, False on padding. cache: of
        make_cache. seen, noise, options: as in choose.
        """
        T = tokens.shape[1]
        places = torch.arange(real.shape[1], device=real.device)
        visible = real[:, None, None] & (places <= columns[:, None])  # (B, 1, T, width)
        if T > 1:  # padding sees itself: no NaN
            visible = visible | (places == columns[:, None])
        layers = iter(zip(cache[0::2], cache[1::2], strict=True))

        def attend(q, k, v):
            keys, values = next(layers)
            keys.index_copy_(2, columns, k)
            values.index_copy_(2, columns, v)
            if T > 1:
                return sdpa(q, keys, values, mask=visible)
            # one new token: the query heads of a key's group as that many queries, no key is copied
            groups = q.reshape(q.shape[0], keys.shape[1], -1, q.shape[-1])
            out = F.scaled_dot_product_attention(groups, keys, values, attn_mask=visible)
            return out.reshape(q.shape)

        x = self.hidden(tokens, positions=positions, attend=attend)
        return choose(self.logits(x[:, -1]).float(), tokens[:, -1:], seen, noise, options)

    # ------------------------------------------------------------------ saving

    def save_pretrained(self, folder, slam=None):
        """Write a checkpoint that transformers and load_slm open: config.json, model.safetensors
        and slam.json. A write that fails leaves the files that were there.

        slam: dict for slam.json; None: self.slam. Where PARTS of it name folders, these are copied
        in, so that the checkpoint is complete by itself. Raises: OSError naming the folder where it
        cannot be written.
        """
        slam = dict(self.slam if slam is None else slam)
        slam.setdefault('offset', OFFSET)
        for part in PARTS:
            if os.path.isdir(str(slam.get(part) or '')):
                copy_part(slam[part], folder, part)
                slam[part] = part
        hf, end = copy.deepcopy(self.hf_config), slam.get('end')
        if end is not None:  # an interleaved model
            hf.bos_token_id = hf.eos_token_id = hf.pad_token_id = end

        theirs = empty_model(hf).to(self.embed.weight.dtype)
        tensors = to_theirs(self, theirs)
        new = os.path.join(folder, 'saving.tmp')  # its files are then renamed into place
        shutil.rmtree(new, ignore_errors=True)
        try:
            theirs.save_pretrained(new, state_dict=tensors)
            with open(os.path.join(new, 'slam.json'), 'w', encoding='utf-8') as file:
                json.dump(slam, file, indent=2)
            for name in os.listdir(new):
                os.replace(os.path.join(new, name), os.path.join(folder, name))
        except Exception as error:  # safetensors has an error of its own for a full disk
            code = re.search(r'\(os error (\d+)\)', str(error))
            if not code:
                raise
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(folder)) from None
        finally:
            shutil.rmtree(new, ignore_errors=True)


# -----------------------------------------------------------------------------
# Attention within documents

# flex_attention's blocks by the card's compute capability, so that ptxas spills no register; heads
# of 128 features take 8 warps in backward. Every token sees itself: no row is empty.
FLEX = dict(ROWS_GUARANTEED_SAFE=True, PRESCALE_QK=True, fwd_num_warps=8)
FLEX |= dict(bwd_num_warps=4, bwd_num_stages=2)
FLEX_OPTIONS = {
    9: FLEX | dict(bwd_BLOCK_M1=64, bwd_BLOCK_N1=64, bwd_BLOCK_M2=64, bwd_BLOCK_N2=64),
    8: FLEX | dict(bwd_BLOCK_M1=32, bwd_BLOCK_N1=64, bwd_BLOCK_M2=64, bwd_BLOCK_N2=32),
}

# cuDNN's attention plans anew for each shape, and here shapes vary
torch.backends.cuda.enable_cudnn_sdp(False)


def sdpa(q, k, v, mask=None, causal=False):
    """Scaled dot-product attention; q (B, H, T, D), k and v (B, H_kv, S, D)."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and not q.is_cuda:  # the CPU's fused kernel needs equal heads
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=groups > 1 and q.is_cuda
    )


def attention_within(doc, branch):
    """How every layer attends: a function of q, k, v made once a forward. doc, branch: (B, T) or
    None, as in SLM.hidden."""
    if doc is None:
        return partial(sdpa, causal=True)

    def visible(b, h, i, j):  # does token i of row b see token j? as flex_attention asks it
        seen = (doc[b, i] == doc[b, j]) & (j <= i)
        if branch is None:
            return seen
        return seen & ((branch[b, j] == 0) | (branch[b, j] == branch[b, i]))

    if doc.is_cuda:
        return attend_flex(visible, *doc.shape, doc.device)
    rows = torch.arange(len(doc), device=doc.device)[:, None, None]
    i = torch.arange(doc.shape[1], device=doc.device)
    if doc.device.type != 'cpu' or torch.compiler.is_compiling():
        # an ordinary mask, (B, 1, T, T)
        return partial(sdpa, mask=visible(rows, None, i[:, None], i)[:, None])

    # one call a document: on a CPU the cost is then the sum of squares, not the square of the row
    documents = []
    for row, ids in enumerate(doc):
        stop = 0
        for length in torch.unique_consecutive(ids, return_counts=True)[1].tolist():
            start, stop = stop, stop + length
            inside, mask = torch.arange(start, stop), None
            if branch is not None:
                mask = visible(row, None, inside[:, None], inside)
            documents.append((row, start, stop, mask))
    return partial(attend_documents, documents=documents)


def attend_documents(q, k, v, documents):
    """Attention of each document to itself. documents: (row, start, stop, mask) in their order,
    which cover all rows; mask: (T, T) bool, None: causal."""
    B, H, T, D = q.shape
    out = []
    for row, start, stop, mask in documents:
        q_k_v = (x[row : row + 1, :, start:stop] for x in (q, k, v))
        out.append(sdpa(*q_k_v, mask=mask, causal=mask is None))
    return torch.cat(out, dim=2).view(H, B, T, D).transpose(0, 1)


@lru_cache(maxsize=1)
def compiled_flex():
    """flex_attention and create_block_mask for callers that are not compiled: the plain ones
    materialise the (T, T) scores."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    return torch.compile(flex_attention), torch.compile(create_block_mask)


def attend_flex(visible, B, T, device):
    """Block-masked flash attention: blocks in which `visible` is nowhere true are not computed."""
    if torch.compiler.is_compiling():
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    else:
        flex_attention, create_block_mask = compiled_flex()
    mask = create_block_mask(visible, B, None, T, T, device=device)
    options = {}
    if device.type == 'cuda':
        options = FLEX_OPTIONS.get(torch.cuda.get_device_capability(device)[0], {})

    def attend(q, k, v):
        grouped, wide = q.shape[1] != k.shape[1], q.shape[-1] > 64
        blocks = options | dict(bwd_num_warps=8) if options and wide else options or None
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=grouped, kernel_options=blocks)

    return attend


# -----------------------------------------------------------------------------
# Generation: how the next token is chosen


def choose(logits, last, seen, noise, options):
    """The next token of each row, (B,).

    logits: (B, V) fp32. last: (B, 1), the tokens before. seen: (B, V) bool, the tokens that the
    repetition penalty is for. noise: as in draw. options: temperature, top_p (1 is off) and
    penalty, tensors of shape (); allowed, the tokens that may be chosen at all, and may_repeat,
    those that may come directly after themselves, (V,) bool; greedy, the most likely token.
    """
    penalty = options['penalty']
    penalised = torch.where(logits < 0, logits * penalty, logits / penalty)
    logits = torch.where(seen, penalised, logits)
    repeats = torch.arange(logits.shape[1], device=logits.device) == last  # (B, V)
    banned = ~options['allowed'] | (repeats & ~options['may_repeat'])
    logits = logits.masked_fill(banned, -torch.inf)
    if options['greedy']:
        return logits.argmax(-1)
    return draw(logits / options['temperature'], noise, options['top_p'])


def draw(logits, noise, top_p):
    """One token a row from softmax(logits) cut to the top k and to the smallest set of them that
    holds top_p.

    logits: (B, V). noise: (B, top_k) of Exp(1): argmax(p / noise) falls on each token with its
    probability p. top_p: a number, 1 is off. Returns: (B,)
    """
    logits, ids = logits.topk(noise.shape[1], dim=-1)
    probs = logits.softmax(-1)
    before = probs.cumsum(-1) - probs
    probs = torch.where((before > top_p) & (top_p < 1), 0, probs)
    return ids.gather(1, (probs / noise).argmax(-1, keepdim=True))[:, 0]


# -----------------------------------------------------------------------------
# Kinds of models: how transformers names and computes what Block has


ACTIVATIONS = dict(
    relu=F.relu, silu=F.silu, gelu=F.gelu, gelu_new=partial(F.gelu, approximate='tanh')
)

# transformers' names of our modules; several are joined, so that one product computes them
QKV = ('self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj')
LLAMA = dict(embed='model.embed_tokens', blocks='model.layers', norm='model.norm', head='lm_head')
LLAMA |= dict(norm1='input_layernorm', norm2='post_attention_layernorm', out='self_attn.o_proj')
LLAMA |= dict(qkv=QKV, norm_q='self_attn.q_norm', norm_k='self_attn.k_norm')
LLAMA |= dict(up=('mlp.gate_proj', 'mlp.up_proj'), down='mlp.down_proj')
PHI3 = LLAMA | dict(qkv='self_attn.qkv_proj', up='mlp.gate_up_proj')
OPT = dict(embed='embed_tokens', embed_positions='embed_positions', norm='final_layer_norm')
OPT |= dict(project_in='project_in', project_out='project_out', blocks='layers')
OPT = {ours: f'model.decoder.{theirs}' for ours, theirs in OPT.items()}
OPT |= dict(norm1='self_attn_layer_norm', norm2='final_layer_norm', head='lm_head')
OPT |= dict(qkv=QKV, out='self_attn.out_proj', up='fc1', down='fc2')
NEOX = dict(embed='gpt_neox.embed_in', blocks='gpt_neox.layers', norm='gpt_neox.final_layer_norm')
NEOX |= dict(norm1='input_layernorm', norm2='post_attention_layernorm', head='lm_head')
NEOX |= dict(qkv='attention.query_key_value', out='attention.dense')  # qkv: head by head
NEOX |= dict(up='mlp.dense_h_to_4h', down='mlp.dense_4h_to_h')
KINDS = dict(llama=LLAMA, phi3=PHI3, opt=OPT, gpt_neox=NEOX)


def import_transformers():
    """transformers, which takes seconds to import, without its progress bars and warnings."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return transformers


def empty_model(hf):
    """transformers' model of a config, without memory for its tensors (meta device)."""
    model_class = import_transformers().MODEL_FOR_CAUSAL_LM_MAPPING.get(type(hf), None)
    if model_class is None:
        raise InputError(f'model type {hf.model_type!r} is not supported')
    with torch.device('meta'):
        return model_class(hf)


def their_names(name, kind):
    """The tensors of transformers that are joined in one of ours: 'blocks.3.up.weight' ->
    ['model.layers.3.mlp.gate_proj.weight', 'model.layers.3.mlp.up_proj.weight']."""
    *path, module, what = name.split('.')
    theirs = KINDS[kind].get(module, module)
    prefix = f'{KINDS[kind]["blocks"]}.{path[1]}.' if path else ''
    return [f'{prefix}{one}.{what}' for one in ((theirs,) if isinstance(theirs, str) else theirs)]


def read_config(hf, dropout=0.0):
    """What Block and SLM need to know of transformers' config, as a namespace of plain values.

    What the config only implies, such as biases, comes from the names of the tensors, and RoPE from
    transformers' rotary module, so that every variant is right.
    Raises: InputError naming the model type where Block cannot compute it.
    """
    theirs = empty_model(hf)
    names = set(theirs.state_dict())

    def has(kind, module, what='weight'):
        return their_names(f'blocks.0.{module}.{what}', kind)[0] in names

    def get(*keys, default=None):
        return next((x for key in keys if (x := getattr(hf, key, None)) is not None), default)

    kind = next((kind for kind in KINDS if has(kind, 'qkv') and has(kind, 'up')), None)
    act = get('hidden_act', 'activation_function')
    if kind is None or act not in ACTIVATIONS:
        raise InputError(f'model type {hf.model_type!r} (activation {act}) is not supported')
    config = SimpleNamespace(
        kind=kind,
        vocab_size=hf.vocab_size,
        n_layer=hf.num_hidden_layers,
        n_embd=hf.hidden_size,
        n_head=hf.num_attention_heads,
        n_kv_head=get('num_key_value_heads', default=hf.num_attention_heads),
        head_dim=get('head_dim', default=hf.hidden_size // hf.num_attention_heads),
        n_ffn=get('intermediate_size', 'ffn_dim'),
        embed_dim=get('word_embed_proj_dim', default=hf.hidden_size),  # of embedding and head
        context=hf.max_position_embeddings,  # tokens of a training row
        max_positions=hf.max_position_embeddings,  # tokens of the longest utterance
        dropout=dropout,  # on the residual branches
        norm_eps=get('rms_norm_eps', 'layer_norm_eps', default=1e-5),
        norm_bias=has(kind, 'norm1', 'bias'),  # LayerNorm
        qk_norm=has(kind, 'norm_q'),  # of each head's query and key
        qkv_bias=has(kind, 'qkv', 'bias'),
        out_bias=has(kind, 'out', 'bias'),
        mlp_bias=has(kind, 'down', 'bias'),
        gated=kind in ('llama', 'phi3'),  # SwiGLU
        act=act,
        tied=hf.tie_word_embeddings,  # the head is the embedding
        pre_norm=get('do_layer_norm_before', default=True),  # False: OPT-350M
        parallel=get('use_parallel_residual', default=False),  # GPT-NeoX
        rope_layers=get('no_rope_layers', default=[1] * hf.num_hidden_layers),  # 0s in SmolLM3
        rope_freqs=[],  # radians a token of each pair of features; empty: learned positions
        rope_scale=1.0,  # of cos and sin, in YaRN
    )
    read_rope(config, hf, theirs)
    slides = 'sliding_attention' in get('layer_types', default=['sliding_attention'])
    if slides and get('sliding_window', default=config.context) < config.context:
        raise InputError(
            f'{hf.model_type} with a sliding window of {hf.sliding_window} tokens is not '
            f'supported: use a context that is no longer, not {config.context}'
        )
    return config


def read_rope(config, hf, theirs):
    """Take RoPE's frequencies over from transformers' empty model, where it has RoPE."""
    rotary = next((module for module in theirs.modules() if hasattr(module, 'inv_freq')), None)
    if rotary is not None:
        with torch.device('cpu'):
            rotary = type(rotary)(hf)  # again, with numbers
        config.rope_freqs, config.rope_scale = rotary.inv_freq.tolist(), rotary.attention_scaling
        # two types change their frequencies in longer texts
        original = hf.rope_parameters.get('original_max_position_embeddings')
        limits = dict(dynamic=config.context, longrope=original)
        config.max_positions = limits.get(rotary.rope_type, ROPE_POSITIONS)


def layout(model):
    """{our name: [their names]} of a model's tensors, a tied head left out."""
    names = [name for name in model.state_dict() if name != 'head.weight' or not model.config.tied]
    return {name: their_names(name, model.config.kind) for name in names}


def by_head(name, tensor, config, first, second):
    """GPT-NeoX's qkv: rows in groups (first, second, head_dim) -> (second, first, head_dim)."""
    if config.kind != 'gpt_neox' or '.qkv.' not in name:
        return tensor
    return tensor.view(first, second, config.head_dim, -1).transpose(0, 1).reshape(tensor.shape)


def from_theirs(tensors, model):
    """Our state dict out of transformers', whose tensors are removed one by one. Raises InputError
    naming a tensor that only one of the two has."""
    c, names = model.config, layout(model)
    if c.tied:
        tensors.pop(their_names('head.weight', c.kind)[0], None)
    if odd := set(tensors).symmetric_difference(chain(*names.values())):
        model_type = model.hf_config.model_type
        raise InputError(f'model type {model_type!r} is not supported because of {min(odd)}')
    ours = {}
    for name, theirs in names.items():
        parts = [tensors.pop(one) for one in theirs]
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        ours[name] = by_head(name, tensor, c, c.n_head, 3)
    if c.tied:
        ours['head.weight'] = ours['embed.weight']
    return ours


def to_theirs(model, theirs):
    """The tensors of a model on the CPU, by their names in transformers' model `theirs`."""
    state, tensors, c = model.state_dict(), {}, model.config
    rows = {name: len(tensor) for name, tensor in theirs.state_dict().items()}
    for name, names in layout(model).items():
        tensor = by_head(name, state[name].detach().cpu(), c, 3, c.n_head)
        tensors |= zip(names, tensor.split([rows[one] for one in names]), strict=True)
    return tensors


# -----------------------------------------------------------------------------
# Loading


def shape(model_type, n_layer, n_embd, n_head, n_kv_head, n_ffn, context, **more):
    """The type and the arguments of a transformers config."""
    sizes = dict(num_hidden_layers=n_layer, hidden_size=n_embd, num_attention_heads=n_head)
    sizes |= dict(max_position_embeddings=context)
    if model_type == 'opt':
        sizes |= dict(ffn_dim=n_ffn, word_embed_proj_dim=n_embd, dropout=0.0)
    else:
        sizes |= dict(intermediate_size=n_ffn, tie_word_embeddings=model_type != 'gpt_neox')
    return model_type, sizes | (dict(num_key_value_heads=n_kv_head) if n_kv_head else {}) | more


SMOL = dict(rms_norm_eps=1e-5, rope_theta=1e5)
OPT_350M = dict(word_embed_proj_dim=512, do_layer_norm_before=False)
PRESETS = {  # Table 7 of the paper, Slam (large)'s base, and a newer one of the first's size
    'qwen2.5-0.5b': shape('qwen2', 24, 896, 14, 2, 4864, 32768, rope_theta=1e6),
    'qwen2.5-1.5b': shape('qwen2', 28, 1536, 12, 2, 8960, 32768, rope_theta=1e6),
    'smollm2-135m': shape('llama', 30, 576, 9, 3, 1536, 8192, **SMOL),
    'mobilellm-125m': shape('llama', 30, 576, 9, 3, 1536, 2048, rms_norm_eps=1e-5),
    'smollm2-360m': shape('llama', 32, 960, 15, 5, 2560, 8192, **SMOL),
    'mobilellm-350m': shape('llama', 32, 960, 15, 5, 2560, 2048, rms_norm_eps=1e-5),
    'opt-125m': shape('opt', 12, 768, 12, None, 3072, 2048),
    'opt-350m': shape('opt', 24, 1024, 16, None, 4096, 2048, **OPT_350M),
    'pythia-160m': shape('gpt_neox', 12, 768, 12, None, 3072, 2048),
    'pythia-410m': shape('gpt_neox', 24, 1024, 16, None, 4096, 2048),
    'qwen3-0.6b': shape('qwen3', 28, 1024, 16, 8, 3072, 40960, head_dim=128, rope_theta=1e6),
}


def load_slm(
    where,
    vocab_size=None,
    embed_init='first_rows',
    context=None,
    rope_theta=None,
    dropout=0.0,
    seed=0,
    dtype=torch.float32,
    text=None,
    sizes=None,
):
    """An SLM on the CPU: 'preset:NAME' (PRESETS) or 'scratch', a Llama, tied and without biases, of
    sizes dict(n_layer, n_embd, n_head, n_kv_head, n_ffn), both a cold start; or a folder or a hub
    name, of which no code is run:

    (a) a text LM: TWIST, everything but the embedding (and head) stays; the new vocabulary of
    vocab_size (None: 502) rows begins as `embed_init`: 'first_rows' of the old one (what resizing
    leaves; Hassid et al. 2023), 'random', or 'mean', its mean row. With `text`, meta.json of data
    of text and units, all rows stay and those of units and switches are added likewise.
    (b) a checkpoint of ours, or a public SLM (read_about). The vocabulary stays, in our order, and
    vocab_size, if given, must fit in it.

    context: tokens of a training row, noted in the config. rope_theta: in place of the old one.
    Raises: InputError when there is no such checkpoint, its model type computes something that
    Block does not, or data and model do not fit together.
    """
    if where == 'scratch' or where.startswith('preset:'):
        hf = new_config(where, vocab_size or 502, sizes)
        set_positions(hf, context, rope_theta)
        model = SLM(hf, dropout, seed)
    else:
        folder = find_checkpoint(where)
        hf, slam, order = read_about(folder, where)
        set_positions(hf, context, rope_theta)
        check_data_fit(hf.vocab_size, vocab_size, slam, folder, where, text)
        model = convert(rename(read_tensors(folder), hf), hf, where, dropout)
        embeddings = [model.embed] if model.config.tied else [model.embed, model.head]
        for module in embeddings:
            rows = old = module.weight.detach()
            if slam is None:  # a text LM
                n = vocab_size - len(old) if text else vocab_size or 502
                rows = twist_rows(old, n, embed_init, seed, where)
                rows = torch.cat((old, rows)) if text else rows
            elif order is not None:
                rows = old[order]
            module.weight = nn.Parameter(rows)
        if model.config.tied:
            model.head.weight = model.embed.weight
        hf.vocab_size = model.config.vocab_size = len(rows)
        model.slam = {} if slam is None else dict(n_units=hf.vocab_size - OFFSET) | slam
    hf.bos_token_id, hf.eos_token_id, hf.pad_token_id = BOS, EOS, PAD
    model.check_positions(context or 0)
    return model.to(dtype)


def new_config(where, vocab_size, sizes):
    """transformers' config of a preset, or of a Llama. Raises InputError naming the presets."""
    name = where.removeprefix('preset:').lower()
    if name not in PRESETS and where != 'scratch':
        raise InputError(f'no preset {name!r}: there are {", ".join(PRESETS)}')
    model_type, arguments = PRESETS.get(name) or shape('llama', **sizes, context=1024)
    arguments = arguments | dict(vocab_size=vocab_size, pad_token_id=PAD)
    return import_transformers().CONFIG_MAPPING[model_type](**arguments)


def set_positions(hf, context, rope_theta):
    """Note another context (tokens) and RoPE theta in a config, where given. Learned positions
    stay as many as they are; the other scaled RoPEs depend on their number."""
    rope = getattr(hf, 'rope_parameters', None)
    if rope and rope_theta:
        rope['rope_theta'] = float(rope_theta)
    if context and rope and rope.get('rope_type') in ('default', 'linear', 'llama3'):
        hf.max_position_embeddings = context


def convert(tensors, hf, where, dropout):
    """An SLM of transformers' tensors. 24 tokens go through both models: a difference means that
    transformers computes something that Block does not. Raises: InputError naming the type."""
    tokens = torch.arange(24)[None] * 7919 % hf.vocab_size
    model_class = type(empty_model(hf))
    options = dict(state_dict=tensors, config=hf, dtype=torch.float32, output_loading_info=True)
    with torch.random.fork_rng(devices=[]), reading(where):  # tensors of another shape: see below
        theirs, found = model_class.from_pretrained(None, ignore_mismatched_sizes=True, **options)
    for word in ('missing', 'unexpected', 'mismatched'):
        if names := sorted(map(str, found[f'{word}_keys'])):
            raise InputError(f'{where}: {word} {len(names)} tensors, such as {names[0]}')
    with torch.no_grad():
        expected = theirs.eval()(tokens, use_cache=False).logits

    state = theirs.state_dict()
    tensors.clear()
    del theirs, options  # our model takes the tensors over, one by one
    with torch.device('meta'):
        model = SLM(hf, dropout)
    with reading(where):
        model.load_state_dict(from_theirs(state, model), assign=True)
    if model.config.tied:
        model.head.weight = model.embed.weight
    model.make_rope()
    with torch.no_grad():
        difference = (model.eval()(tokens) - expected).abs().max() / expected.std()
    if not difference < 1e-3:
        raise InputError(
            f'{where}: model type {hf.model_type!r} is not supported: its logits and those of '
            f'Block differ by {difference:.1g} standard deviations'
        )
    return model.train()


def find_checkpoint(where, tensors=True):
    """The folder `where`, or that of a hub name in the local cache, downloaded if need be (no code,
    safetensors before pickles; its json files alone without `tensors`)."""
    if os.path.isdir(where):
        return where
    if where.count('/') != 1 or where.startswith(('.', '/', 'out/')):
        raise InputError(f'no checkpoint folder {where!r}')
    from huggingface_hub import snapshot_download

    try:
        kinds = ['*.json', '*.safetensors'] if tensors else ['*.json']
        folder = snapshot_download(where, allow_patterns=kinds)
        if tensors and not any(name.endswith('.safetensors') for name in os.listdir(folder)):
            folder = snapshot_download(where, allow_patterns=['*.json', 'pytorch_model*.bin'])
        return folder
    except Exception as error:
        reason = f'{where!r} is no folder, and the hub did not give it ({type(error).__name__})'
        raise InputError(f'{reason}: download it elsewhere and pass the folder') from None


def read_tensors(folder):
    """A checkpoint's tensors by name: model.safetensors, pytorch_model.bin (read with weights_only:
    no code runs), or their shards, in the folder itself."""
    from safetensors.torch import load_file

    for name in ('model.safetensors', 'pytorch_model.bin'):
        names, tensors = [name], {}
        if os.path.exists(index := os.path.join(folder, f'{name}.index.json')):
            names = {os.path.basename(shard) for shard in read_json(index)['weight_map'].values()}
        paths = [os.path.join(folder, name) for name in names]
        for path in filter(os.path.exists, paths):
            with reading(path):
                if name.endswith('.safetensors'):
                    tensors |= load_file(path)
                else:
                    tensors |= torch.load(path, map_location='cpu', weights_only=True)
        if tensors:
            return tensors
    raise InputError(f'{folder} has no model.safetensors (or pytorch_model.bin)')


def copy_part(source, folder, part):
    """Copy an encoder, a vocoder or a tokenizer into folder/part: its files and nothing else."""
    target = os.path.join(folder, part)
    if os.path.realpath(source) == os.path.realpath(target):
        return
    for name in (f'{part}.json', f'{part}.safetensors', f'{part}_config.json'):
        path = os.path.join(source, name)
        if os.path.isfile(path):
            with open(path, 'rb') as old, write_atomic(os.path.join(target, name), 'wb') as new:
                shutil.copyfileobj(old, new)


def twist_rows(old, n, embed_init, seed, where):
    """The n rows (n, C) with which a unit embedding begins, out of the text LM's (V, C)."""
    if embed_init == 'first_rows' and n > len(old):
        few = f'{where} has {len(old)} embedding rows, too few for {n}'
        raise InputError(f'{few}: use embed_init=random or mean')
    generator = torch.Generator().manual_seed(seed)
    if embed_init == 'first_rows':
        return old[:n].clone()
    if embed_init == 'mean':
        return old.mean(0, keepdim=True).repeat(n, 1)
    if embed_init == 'random':
        return torch.empty(n, old.shape[1]).normal_(std=0.02, generator=generator)
    raise InputError(f'embed_init {embed_init!r} is unknown: use first_rows, random or mean')


# -----------------------------------------------------------------------------
# Layouts of public SLMs, and text LMs beside units

PUBLIC_UNITS = dict(encoder='mhubert25', vocoder='hifigan25', frame_rate=25.0, dedup=True)

# tiagoCuervo/slm_scaling: its names in those of Llama's tensors, and in those of Llama's config
SCALING = dict(layers='model.layers', norm='model.norm', tok_embeddings='model.embed_tokens')
SCALING |= dict(attention_norm='input_layernorm', ffn_norm='post_attention_layernorm')
SCALING |= dict(attention='self_attn', wq='q_proj', wk='k_proj', wv='v_proj', wo='o_proj')
SCALING |= dict(feed_forward='mlp', w1='gate_proj', w2='down_proj', w3='up_proj')
SCALING_CONFIG = dict(
    dim='hidden_size', n_layers='num_hidden_layers', n_heads='num_attention_heads'
)
SCALING_CONFIG |= dict(n_kv_heads='num_key_value_heads', hidden_dim='intermediate_size')
SCALING_CONFIG |= dict(block_size='max_position_embeddings', norm_eps='rms_norm_eps')


def read_about(folder, where):
    """What a checkpoint's json files contain, of ours or in one of the public layouts.

    Returns: transformers' config object; slam, None for a text LM, with its PARTS as full paths (of
    those in the folder: others are not followed); and which of the checkpoint's tokens each of ours
    is (None: they are equal).
    """
    path = os.path.join(folder, 'config.json')
    about, slam, order = read_json(path), None, None
    with reading(path):
        kind, size = about.get('model_type'), about.get('vocab_size')
        if kind == 'speech_language_model':  # slprl/slam, SIMS: the text LM's under `lm.`
            base, slam = about.get('base_model_name'), {}
            about = about['base_config'] | dict(vocab_size=size)
            if size > 20_000:  # no vocabulary of units is so large
                slam = describe_sims(folder, where, base, size)
        elif 'offset' in about:  # TWIST: unit u is token u + offset
            first, slam = about.pop('offset'), {}
            bos, pad = about.get('bos_token_id'), about.get('pad_token_id') or 0
            bos = bos if isinstance(bos, int) and bos < first else 0
            order = torch.tensor([min(pad, size - 1), bos, *range(first, size)])
        elif kind == 'slm':  # slm_scaling: unit u is token u, then <S>, then padding
            args = about['model_args']
            about = {ours: args.get(theirs) for theirs, ours in SCALING_CONFIG.items()}
            about = {key: value for key, value in about.items() if value is not None}
            hidden = -(-int(8 * args['dim'] / 3) // 256) * 256  # Llama's rule
            about = dict(intermediate_size=hidden, rms_norm_eps=1e-5) | about
            about |= dict(model_type='llama', tie_word_embeddings=True)
            about['vocab_size'] = size = args['vocab_size']
            order = torch.tensor([size - 1, size - 2, *range(size - 2)])
            slam = dict(scoring='units')
        elif kind == 'mobilellm':  # facebook/MobileLLM: Llama, with code of its own
            if about.get('layer_sharing'):
                raise InputError(f'{where}: layer_sharing in config.json is not supported')
            about |= dict(model_type='llama', tie_word_embeddings=about.get('share_embedding'))
        about.pop('auto_map', None)
        configs = import_transformers().CONFIG_MAPPING
        if about.get('model_type') not in configs:
            raise InputError(f'{where}: model type {about.get("model_type")!r} is not supported')
        hf = configs[about['model_type']].from_dict(about)

    slam = None if slam is None else PUBLIC_UNITS | slam
    if os.path.exists(path := os.path.join(folder, 'slam.json')):  # ours
        slam = read_json(path)
        for part in PARTS:
            name = str(slam.get(part) or '')
            if os.path.isdir(inside := os.path.join(folder, os.path.basename(name) or '?')):
                slam[part] = os.path.abspath(inside)
            elif os.path.isabs(name) or '..' in name:
                slam[part] = None
    return hf, slam, order


def rename(tensors, hf):
    """Tensors of a public layout under transformers' names: slprl's without `lm.`; slm_scaling's
    with their rows of queries and keys, for RoPE on features 2 i and 2 i + 1, in the order for
    i and i + half a head."""
    tensors = {name.removeprefix('lm.'): tensor for name, tensor in tensors.items()}
    if 'layers.0.attention.wq.weight' not in tensors:
        return tensors
    renamed, half = {}, hf.head_dim // 2
    for name, tensor in tensors.items():
        if name.endswith(('wq.weight', 'wk.weight')):
            tensor = tensor.view(-1, half, 2, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        renamed['.'.join(SCALING.get(part, part) for part in name.split('.'))] = tensor
    head = renamed.pop('output.weight', None)  # tied: a file may hold either, or both
    renamed.setdefault('model.embed_tokens.weight', head)
    return renamed


def read_tokenizer(folder):
    """(tokenizer, end, digest) of a text LM's folder: a tokenizers.Tokenizer to which the names of
    special tokens are ordinary text, the token that ends a document, and the SHA-256 of
    tokenizer.json. No code of the folder is run. Raises InputError where there is none."""
    from tokenizers import Tokenizer

    path = os.path.join(folder, 'tokenizer.json')
    with reading(path):
        tokenizer, digest = Tokenizer.from_file(path), file_hash(path)
    tokenizer.encode_special_tokens = True
    eos = read_json(os.path.join(folder, 'tokenizer_config.json')).get('eos_token')
    end = tokenizer.token_to_id(eos.get('content') if isinstance(eos, dict) else str(eos))
    if end is None:
        raise InputError(f'{folder}: tokenizer_config.json names no eos_token of tokenizer.json')
    return tokenizer, end, digest


def describe_sims(folder, where, base, size):
    """slam of a public interleaved model (slprl/SIMS-7B, ...): after the tokens of its text LM's
    tokenizer come the units, `<speech>` and `<text>`. An utterance is scored as its units alone,
    behind what the tokenizer puts before all text (Llama's begin of text)."""
    try:
        if not os.path.exists(os.path.join(folder, 'tokenizer.json')):
            folder = find_checkpoint(str(base), tensors=False)
        tokenizer, end, _ = read_tokenizer(folder)
    except InputError as error:
        raise InputError(
            f'{where}: a vocabulary of {size:,} is of an interleaved speech-text model: it needs '
            f'tokenizer.json and tokenizer_config.json of its text LM, {base} ({error})'
        ) from None
    first = tokenizer.token_to_id('<Un0>') or tokenizer.get_vocab_size()
    prefix = [token for token in tokenizer.encode('').ids if token != end]
    slam = dict(n_units=size - 2 - first, offset=first, end=end, prefix=prefix, scoring='units')
    return slam | dict(tokenizer=os.path.abspath(folder), text_lm=base)


def check_data_fit(size, wanted, slam, folder, where, text):
    """Raise InputError where a model, whose embedding has `size` rows, does not fit the data that
    it is to learn from. wanted: their vocabulary, None if there are none. text: their meta.json,
    None if they hold no text. folder: where `where` lies."""
    interleaved = (slam or {}).get('tokenizer')
    if wanted is None:
        return
    if slam is not None and bool(text) != bool(interleaved):
        raise InputError(f'of {where} and the data only one has text: start from a text LM')
    if slam is not None and wanted > size:
        raise InputError(f'{where} has {size} tokens: it cannot hold the {wanted - OFFSET} units')
    if text:
        known = read_tokenizer(interleaved or folder)[2], slam['offset'] if interleaved else size
        if known != (text['tokenizer_sha256'], text['offset']) or interleaved and wanted != size:
            reason = f'{where} and the data have different tokenizers or vocabularies'
            raise InputError(f'{reason}: the data were made for {text["text_lm"]}')


# -----------------------------------------------------------------------------
# Audio

HOP, WINDOW, N_FFT = 160, 400, 512  # samples at 16 kHz: 10 ms, 25 ms
SIDE = (WINDOW - HOP) // 2  # samples of a window on each side of the 10 ms in its middle
N_MELS = 64  # bands: the most that bins of 31 Hz fill without gaps


def load_audio(path, sample_rate=SAMPLE_RATE, start=0.0, seconds=None):
    """Read a sound file, mix it to mono, resample: (samples,) float32, full scale 1.

    path: a name or a binary file object, in a format that libsndfile knows (AUDIO_EXTENSIONS; of
    .sph what is not compressed by shorten). start, seconds: the part that is wanted; no other is
    kept in memory. Of a broken file, what decodes. Raises InputError naming the file where there
    is no sound in it.
    """
    name = getattr(path, 'name', path)
    opened = hasattr(path, 'read')
    if not opened and not os.path.isfile(path):
        raise InputError(f'{name}: no such audio file')
    for size in (1 << 20, 1 << 10):  # of a broken flac a large read gives nothing, small ones do
        if opened:
            path.seek(0)
        source = path if opened else os.fsencode(path)  # bytes: names need not be UTF-8
        rate, samples, error = decode_audio(source, start, seconds, size)
        if samples or not error:
            break
    if not samples:
        reason = f'not readable audio ({error})' if error else 'holds no samples'
        raise InputError(f'{name}: {reason}' + (f' at {start:g} s' if start and not error else ''))
    wave = torch.frombuffer(samples, dtype=torch.float32)
    lowest, highest = torch.aminmax(wave)
    if not (lowest > -1e6 and highest < 1e6):  # NaN fails too
        raise InputError(f'{name}: holds NaN or infinite samples, or such as are no sound')
    return resample(wave, rate, sample_rate)


def decode_audio(source, start, seconds, size):
    """-> its rate, the samples, float32, read `size` at a time, and what stopped it or None."""
    import soundfile

    rate, samples = 0, bytearray()  # which grows in place: hours of sound are there once
    try:
        with soundfile.SoundFile(source) as file:
            rate = file.samplerate
            if start:
                file.seek(min(round(start * rate), file.frames))
            left = math.inf if seconds is None else round(seconds * rate)
            while left > 0 and len(block := file.read(min(size, left), dtype='float32')):
                left -= len(block)
                block = block if block.ndim == 1 else block.mean(axis=1)  # channels to mono
                samples += block.tobytes()
    except (RuntimeError, OSError, TypeError) as error:  # TypeError: of .raw it asks for a rate
        return rate, samples, str(error).rsplit(': ', 1)[-1].rstrip('.')
    return rate, samples, None


def save_audio(path, wave, sample_rate=SAMPLE_RATE):
    """Write (samples,) float as 16-bit wav or flac, whole or not at all.

    A wave that would clip is turned down as a whole.
    """
    import soundfile

    wave = torch.as_tensor(wave).detach().float().cpu()
    peak = float(wave.abs().max()) if len(wave) else 0.0
    wave = wave * (0.99 / peak) if peak > 0.99 else wave
    kind = 'FLAC' if str(path).endswith('.flac') else 'WAV'
    buffer = io.BytesIO()  # written by us: soundfile's own errors do not name a full disk
    soundfile.write(buffer, wave.numpy(), sample_rate, subtype='PCM_16', format=kind)
    with write_atomic(path, 'wb') as file:
        file.write(buffer.getbuffer())


def resample(wave, rate, wanted):
    """(samples,) at `rate` Hz -> (ceil(samples * wanted / rate),) at `wanted` Hz, float32.

    The filter of torchaudio.functional.resample, a sinc under a squared cosine with six zero
    crossings on each side and its cutoff at 0.99 of the lower Nyquist frequency, exact to 1e-6;
    but as matrix products of 40 neighbouring outputs, which takes a third to a tenth of the time.
    """
    wave = torch.as_tensor(wave, dtype=torch.float32)
    if rate == wanted or not len(wave):
        return wave
    if len(wave) > 62 * rate:  # a minute at a time, with the second before and after it
        starts = range(0, len(wave), 60 * rate)
        parts = (resample(wave[max(0, at - rate) : at + 61 * rate], rate, wanted) for at in starts)
        parts = (part[wanted * (i > 0) :][: 60 * wanted] for i, part in enumerate(parts))
        return torch.cat(list(parts))
    (taken, made), reach, kernels = sinc_kernels(rate, wanted)
    count = -(-len(wave) * wanted // rate)
    periods = -(-count // made)
    end = (periods - 1) * taken + kernels[-1][1] + len(kernels[-1][2])
    wave = F.pad(wave, (reach, max(0, end - reach - len(wave))))
    out = wave.new_empty(periods, made)
    for first, start, kernel in kernels:
        inputs = wave[start:].unfold(0, len(kernel), taken)[:periods]  # (periods, inputs)
        out[:, first : first + kernel.shape[1]] = inputs @ kernel.to(wave.device)
    return out.flatten()[:count]


@lru_cache(8)
def sinc_kernels(rate, wanted, group=40):
    """The filter of `resample`: (inputs, outputs) of a period, reach, [(output, input, kernel)].

    Each kernel (inputs, at most `group` outputs) makes the outputs from `output` on of the inputs
    from `input` on; a period is a whole number of samples of both rates and at least 320 outputs.
    """
    cutoff = 0.99 * min(1, wanted / rate)  # of the Nyquist frequency of the input
    reach = math.ceil(6 / cutoff)  # inputs on either side: six zero crossings
    common = math.gcd(rate, wanted)
    repeat = math.ceil(320 * common / wanted)
    kernels = []
    for first in range(0, repeat * wanted // common, group):
        last = min(first + group, repeat * wanted // common)
        outputs = torch.arange(first, last, dtype=torch.float64) * rate / wanted  # in inputs
        start, stop = int(outputs[0]), int(outputs[-1]) + 2 * reach + 1
        inputs = torch.arange(start - reach, stop - reach, dtype=torch.float64)
        t = (cutoff * (inputs[:, None] - outputs)).clamp(-6, 6)
        kernel = cutoff * torch.sinc(t) * torch.cos(t * math.pi / 12).square()
        kernels.append((first, start, kernel.float()))
    return (repeat * rate // common, repeat * wanted // common), reach, kernels


def dedup(units):
    """Collapse runs of equal units: (frames,) -> units (n,), and the frames of each (n,), long."""
    return torch.unique_consecutive(torch.as_tensor(units, dtype=torch.long), return_counts=True)


@lru_cache
@torch.inference_mode(False)
def mel_filters():
    """Triangles (N_FFT // 2 + 1, N_MELS) evenly spaced on the mel scale, 0 to 8,000 Hz, peak 1."""
    top = 2595 * math.log10(1 + SAMPLE_RATE / 2 / 700)
    edges = torch.linspace(0, top, N_MELS + 2, dtype=torch.float64)  # mel
    low, peak, high = (700 * (10 ** (edges / 2595) - 1)).unfold(0, N_MELS, 1)  # Hz
    bins = torch.arange(N_FFT // 2 + 1, dtype=torch.float64)[:, None] * SAMPLE_RATE / N_FFT
    rise, fall = (bins - low) / (peak - low), (high - bins) / (high - peak)
    return torch.minimum(rise, fall).clamp(min=0).float()


def log_mel(wave):
    """Natural log of mel energies: (samples,) at 16 kHz -> (max(1, samples // 160), N_MELS).

    Frame t covers samples 160 t ... 160 t + 159: its 400-sample Hann window is centred on
    160 t + 80; outside the wave is silence. Floored at -16.
    """
    frames = max(1, len(wave) // HOP)
    hann, filters = torch.hann_window(WINDOW).to(wave.device), mel_filters().to(wave.device)
    mel = wave.new_empty(frames, N_MELS)
    for first, out in zip(range(0, frames, 1000), mel.split(1000), strict=True):
        # some seconds at a time: hours stay small
        start, stop = first * HOP - SIDE, (first + len(out)) * HOP + SIDE
        part = F.pad(wave[max(0, start) : stop], (max(0, -start), max(0, stop - len(wave))))
        windows = part.unfold(0, WINDOW, HOP)  # (at most 1000, WINDOW)
        spectrum = torch.fft.rfft(F.pad(windows * hann, (0, N_FFT - WINDOW)))  # 3 x as fast padded
        torch.log((power_of(spectrum) @ filters).clamp(min=1e-7), out=out)
    return mel


def power_of(spectra):
    """Complex -> real: the squared magnitudes."""
    return spectra.real.square() + spectra.imag.square()


# -----------------------------------------------------------------------------
# UnitEncoder: wave -> units

TWIST = 'https://dl.fbaipublicfiles.com/textless_nlp/twist/speech_tokenizer/'
ENCODERS = {  # the public ones: net, layer, zeros put at each end of the wave, vocoder, k-means
    'mhubert25': dict(
        model='slprl/mhubert-base-25hz',
        layer=11,
        pad=40,
        vocoder='hifigan25',
        kmeans=TWIST + 'mhubert_base_25hz_cp_mls_cv_sp_fisher_L11_km500.bin',
        sha256='03cc04a9c24fec4285e73e709c485756d8f116aa8e724eac555de6a7cf8d28ad',
    ),
    'hubert50': dict(
        model='facebook/hubert-base-ls960',
        layer=9,
        pad=0,
        vocoder=None,
        kmeans='https://dl.fbaipublicfiles.com/hubert/hubert_base_ls960_L9_km500.bin',
        sha256=None,  # not known
    ),
}
MFCC = dict(kind='mfcc', name='mfcc', frame_rate=25.0, n_cep=13, lifter=0.3, c0=0.4, range=9.0)
MFCC |= dict(switch=1.0, distortion=0.0, vocoder='vocoder')  # the offline encoder
BLOCK = 1000  # frames whose distances to all centroids are in memory at once
SMALL_NET = 100 << 20  # bytes: a local net up to this size is saved with its encoder


class UnitEncoder:
    """Speech to units: features at 25 or 50 frames a second, of each the nearest of n centroids.

    `extractor` computes the features, in one of the ways of EXTRACTORS; clusters and files are
    here. No wave's units depend on the batch it is in.

    With `switch` in its configuration, neighbours share a unit unless a change gains more than
    `switch` times `distortion`, the mean squared distance of a frame to its centroid (Kamper & van
    Niekerk 2021, eq. 2): fewer tokens a second.
    """

    def __init__(self, config, centroids=None, device='cpu', dtype='auto', net=None):
        self.config = dict(config)
        more = {} if net is None else dict(net=net)
        self.extractor = EXTRACTORS[config['kind']](self.config, device, dtype, **more)
        self.config['frame_rate'] = self.frame_rate = self.extractor.frame_rate
        self.device = self.extractor.device
        self.centroids = None if centroids is None else centroids.to(self.device)  # None: to fit
        self.name, self.vocoder = self.config['name'], self.config.get('vocoder')

    @property
    def n_units(self):
        return 0 if self.centroids is None else len(self.centroids)

    @classmethod
    def from_pretrained(cls, where, layer=None, kmeans=None, device='cpu', dtype='auto'):
        """Load an encoder, and its clusters as far as there are any.

        where: a folder of save_pretrained; 'mhubert25' or 'hubert50'; a folder or hub name of any
        HuBERT, wav2vec 2 or WavLM with `layer`; or 'mfcc'. kmeans: a file of clusters; '' for
        none, to be fitted. Raises InputError naming what is missing.
        """
        folder, centroids, net = os.path.abspath(where), None, None
        saved = os.path.exists(os.path.join(folder, 'encoder.json'))
        public = None if saved else ENCODERS.get(where)
        if saved:
            config, centroids, net = read_encoder(folder)
            if layer not in (None, config.get('layer')):
                raise InputError(
                    f'{where} is an encoder of layer {config.get("layer")}, not {layer}'
                )
        elif where == 'mfcc':
            config = MFCC
        elif public:
            config = dict(kind='hubert', name=where) | without(public, 'kmeans', 'sha256')
            config['layer'] = public['layer'] if layer is None else layer
        elif layer is not None:
            model = folder if os.path.isdir(where) else where
            config = dict(kind='hubert', name=os.path.basename(model), model=model, layer=layer)
            config |= dict(pad=0, vocoder='vocoder')
        else:
            raise InputError(
                f'no encoder {where!r}: expected {", ".join(ENCODERS)}, mfcc, a folder with '
                'encoder.json, or a HuBERT, wav2vec 2 or WavLM and --layer'
            )
        encoder = cls(config, centroids, device, dtype, net)
        if public and kmeans is None and config['layer'] == public['layer']:
            kmeans = fetch(public['kmeans'], public['sha256'])
        if kmeans:
            encoder.centroids = KMeansReader.centroids(kmeans).to(encoder.device)
            encoder.config.pop('distortion', None)  # it was that of other clusters
        if saved and encoder.vocoder == 'vocoder':
            encoder.vocoder = os.path.join(os.path.dirname(folder), 'vocoder')
        return encoder

    def save_pretrained(self, folder):
        """Write encoder.json and encoder.safetensors, all that an encoder has, whole or not at all.

        A net that lies in a local folder comes along if it has at most SMALL_NET bytes; any other
        stays where it is, by name or path.
        """
        from safetensors.torch import save

        config = dict(self.config, n_units=self.n_units)
        tensors = dict(centroids=self.centroids)
        net = getattr(self.extractor, 'net', None)
        if net is not None:
            weights = {f'net.{name}': tensor for name, tensor in net.state_dict().items()}
            size = sum(tensor.nbytes for tensor in weights.values())
            if 'net' in config or (os.path.isdir(config['model']) and size <= SMALL_NET):
                config['net'] = json.loads(net.config.to_json_string(use_diff=False))
                tensors |= weights
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        with write_atomic(os.path.join(folder, 'encoder.safetensors'), 'wb') as file:
            file.write(save(tensors))
        with write_atomic(os.path.join(folder, 'encoder.json')) as file:
            json.dump(config, file, indent=2)

    @torch.inference_mode()
    def features(self, waves):
        """List of (samples,) at 16 kHz, of any length -> list of (frames, D) float32."""
        return self.extractor(waves, torch.Tensor.float)

    @torch.inference_mode()
    def encode(self, waves):
        if isinstance(waves, torch.Tensor):
            return self.encode([waves])[0]
        return self.encode_all(waves)

    @property
    def encoder_id(self):
        return content_hash(self.centroids)[:12]

    @torch.inference_mode()
    def encode_all(self, waves):
        """List of (samples,) at 16 kHz -> list of (frames,) long units on the CPU, one a frame.

        Raises InputError as `assign` does.
        """
        if self.config.get('switch'):
            return self.assign(self.features(waves))
        self._check_clusters(self.extractor.width)
        # unit by unit as features come, so that those of hours are never kept
        return self._to_cpu(self.extractor(waves, self._nearest))

    @torch.inference_mode()
    def assign(self, features):
        """List of (frames, D) -> list of (frames,) long units on the CPU.

        Raises InputError if there are no clusters, or of another width, or if a change of unit has
        a price and `distortion`, its unit of measure, is not known.
        """
        if not features:
            return []
        self._check_clusters(features[0].shape[1])
        if not self.config.get('switch'):
            return self._to_cpu([self._nearest(f) for f in features])
        price = self.config['switch'] * self.config.get('distortion', 0) / 2
        if not price:
            raise InputError(f'{self.name}: `switch` needs `distortion`, the mean squared distance')
        units = [None] * len(features)
        by_length = sorted(range(len(features)), key=lambda i: len(features[i]))
        for start in range(0, len(by_length), 32):
            batch = by_length[start : start + 32]
            paths = self._cheapest_paths([features[i] for i in batch], price)
            for i, path in zip(batch, paths, strict=True):
                units[i] = path
        return units

    @torch.inference_mode()
    def distance(self, features):
        """Mean squared distance of frames to their centroids, for `distortion`; list of (T, D)."""
        parts = [part for f in features for part in f.split(BLOCK)]
        nearest = [2 * self._costs(x).min(1).values + x.square().sum(1) for x in parts]
        return float(torch.cat(nearest).mean())

    def _check_clusters(self, width):
        """Raises InputError if there are no clusters for features of this width."""
        if self.centroids is None:
            raise InputError(f'{self.name} has no k-means')
        if width != self.centroids.shape[1]:
            found = f'the k-means is for {self.centroids.shape[1]} features'
            raise InputError(f'{found}, {self.name} gives {width}')

    def _costs(self, features):
        """Half the squared distances (frames, n_units), less what all units of a frame share."""
        return self.centroids.square().sum(1) / 2 - features @ self.centroids.T

    def _nearest(self, features):
        """(frames, D) -> (frames,) the nearest centroid of each."""
        return torch.cat([self._costs(part.float()).argmin(1) for part in features.split(BLOCK)])

    @staticmethod
    def _to_cpu(units):
        """List of (frames,) on any device -> on the CPU, in one copy."""
        return list(torch.cat(units).cpu().split([len(u) for u in units])) if units else []

    def _cheapest_paths(self, features, price):
        """Units of the least sum of costs and `price` a change: list of (frames, D) -> (frames,).

        Viterbi, all utterances in step. A path that changes its unit at t comes from the unit that
        was cheapest at t - 1. So it can be told from its last unit, when that began, and for each t
        the cheapest unit and when that had begun: two numbers a frame, however many units there
        are.
        """
        rows = torch.arange(len(features))
        total = torch.zeros(len(features), self.n_units)  # the least cost that ends in each unit
        began = torch.zeros(len(features), self.n_units, dtype=torch.long)
        longest = max(map(len, features))
        # for each t, (B,): the cheapest unit at t - 1, and when it began
        source, before = (torch.zeros(longest, len(rows), dtype=torch.long) for _ in range(2))
        for start in range(0, longest, BLOCK):
            # past an utterance's end all costs are 0, and its cheapest unit stays
            costs = [self._costs(f[start : start + BLOCK]).cpu() for f in features]
            for t, cost in enumerate(nn.utils.rnn.pad_sequence(costs), start):  # (B, n_units)
                best, source[t] = total.min(1)
                total -= best[:, None]
                before[t] = began[rows, source[t]]
                began[total > price] = t
                total = total.clamp(max=price) + cost

        # each path from its end to its beginning, a run of one unit at a time
        source, before = source.T.tolist(), before.T.tolist()
        paths = []
        for row, f in enumerate(features):
            unit = int(total[row].argmin())
            start, stop = int(began[row, unit]), len(f)
            path = torch.empty(stop, dtype=torch.long)
            while stop:
                path[start:stop] = unit
                unit, start, stop = source[row][start], before[row][start], start
            paths.append(path)
        return paths


# -----------------------------------------------------------------------------
# Feature extractors: a new kind of units is a class here and a line in EXTRACTORS
#
# One is made of the values of encoder.json (`example` has those that it needs), a device and a
# dtype, and has `device`, `frame_rate`, `width` (D) and `cheap`: whether whoever reads a file
# computes its features. Called with a list of (samples,) and a function, it gives
# function((frames, D)) of each wave.


class MfccExtractor:
    """Offline: two 20 ms cepstra a frame of 40 ms, of the log-mel spectrum relative to the
    utterance's loudness. Frame t begins at sample 640 t; n samples have max(1, n // 640)."""

    example = MFCC
    cheap = True

    def __init__(self, config, device, dtype):
        self.device, self.frame_rate = torch.device('cpu'), config['frame_rate']
        self.width, self.range = 2 * config['n_cep'], config['range']
        # a cosine transform, its rows weighted: (N_MELS, n_cep)
        order = torch.arange(config['n_cep'])
        angle = torch.outer(torch.arange(N_MELS) + 0.5, order) * math.pi / N_MELS
        weight = order.clamp(min=1) ** config['lifter']
        weight[0] = config['c0']
        self.basis = angle.cos() * (2 / N_MELS) ** 0.5 * weight / 2**0.5

    def __call__(self, waves, finish):
        return [finish(self.cepstra(torch.as_tensor(w, dtype=torch.float32))) for w in waves]

    def cepstra(self, wave):
        """(samples,) -> (max(1, samples // 640), 2 n_cep)."""
        if len(wave) < 4 * HOP:  # one frame at least; longer waves are not copied
            wave = F.pad(wave, (0, 4 * HOP - len(wave)))
        mel = log_mel(wave)[: len(wave) // (4 * HOP) * 4].split(4 * BLOCK)  # hours stay small
        energy = torch.cat([torch.logsumexp(part, 1) for part in mel]) - math.log(N_MELS)
        loud = energy.sort().values[int(0.95 * (len(energy) - 1))].clamp(min=-7)  # -7 is silence
        cepstra = []
        for part in mel:
            relative = (part + (self.range - loud)).clamp_(min=0)
            halves = relative.view(-1, 2, 2, N_MELS).mean(2)  # 20 ms each, two a frame
            cepstra.append((halves @ self.basis).flatten(1))
        return torch.cat(cepstra)


STRETCH = 100  # seconds that a net takes at once (WavLM, which keeps its attention, a third)
BATCH_SECONDS = 300  # of padded audio that a GPU takes at once; a CPU gains nothing from batches
CONVOLVE = 64  # frames that a CPU convolves at once
BUCKET = 64  # on a GPU, batches are padded to a multiple of so many frames


@dataclass
class Stretch:
    """What a net takes at once: an utterance, or a part of a long one with its context."""

    wave: torch.Tensor  # (samples,), as many as its frames need
    norm: tuple  # scale and shift, (C,) each, of the first layer's group norm; () without one
    frames: int
    wanted: slice  # of the frames: those that are no context
    result: torch.Tensor = None  # features or units, (wanted frames, ...)


class HubertExtractor:
    """A layer of transformers' HuBERT, wav2vec 2 or WavLM, of the raw wave, in float32; on CUDA
    products are TF32 (10 bits of mantissa) unless dtype='float32' asks for all 24, or 'bfloat16'
    for fewer. Waves of up to STRETCH seconds are computed whole; longer ones in stretches that see
    a tenth of that on either side, joined on the net's own frames."""

    example = dict(name='', model='', layer=0, pad=0)
    cheap = False

    def __init__(self, config, device, dtype, net=None):
        self.device, self.pad = pick_device(device), config['pad']
        self.tf32 = dtype == 'auto'
        self.dtype = torch.float32 if dtype == 'auto' else pick_dtype(dtype, self.device)
        net = load_net(config) if net is None else net
        self.net = net.to(self.device, self.dtype).eval().requires_grad_(False)
        self.width, self.wavlm = net.config.hidden_size, net.config.model_type == 'wavlm'

        # samples from one frame to the next, samples that one frame covers
        strides, kernels = net.config.conv_stride, net.config.conv_kernel
        self.hop, self.reach = math.prod(strides), 1
        for kernel, stride in zip(kernels[::-1], strides[::-1], strict=True):
            self.reach = (self.reach - 1) * stride + kernel
        self.frame_rate = SAMPLE_RATE / self.hop
        self.longest = STRETCH * SAMPLE_RATE // self.hop // (3 if self.wavlm else 1)  # frames
        self.batch_seconds = BATCH_SECONDS if self.device.type == 'cuda' else 0
        if self.device.type == 'cuda':  # a layer is compiled once, for all layers and lengths
            self._convolve = torch.compile(self._convolve, dynamic=True)
            for layer in self.net.encoder.layers:
                layer.compile(dynamic=True)

    def __call__(self, waves, finish):
        """`finish` of the features (frames, D) of each wave, stretch by stretch, joined."""
        # on a CPU a core an utterance: threads that share one wait for each other, and round by
        # their number
        threads = torch.get_num_threads()
        with ThreadPoolExecutor(threads, None, torch.set_num_threads, (1,)) as pool:
            each = pool.map if self.device.type == 'cpu' else map
            cut = list(each(self._stretches, waves))
            list(each(partial(self._compute, finish), self._batches(chain(*cut))))
        torch.set_num_threads(threads)  # also of the threads to come
        return [torch.cat([stretch.result for stretch in stretches]) for stretches in cut]

    @torch.inference_mode()
    def _stretches(self, wave):
        """The stretches of a wave."""
        wave = torch.as_tensor(wave, dtype=torch.float32)
        wave = F.pad(wave, (self.pad, max(self.pad, self.reach - self.pad - len(wave))))
        wave = wave.pin_memory() if self.device.type == 'cuda' else wave
        wave = wave.to(self.device, non_blocking=True)
        norm = self._first_norm(wave)
        frames = (len(wave) - self.reach) // self.hop + 1
        context = self.longest // 10 if frames > self.longest else 0
        count = -(-frames // (self.longest - 2 * context))
        stretches = []
        for i in range(count):
            start, stop = frames * i // count, frames * (i + 1) // count  # the wanted ones
            first, last = max(0, start - context), min(frames, stop + context)
            part = wave[first * self.hop : (last - 1) * self.hop + self.reach]
            wanted = slice(start - first, stop - first)
            stretches.append(Stretch(part, norm, last - first, wanted))
        return stretches

    def _first_norm(self, wave):
        """The first layer's group norm, a channel a group: scale and shift, (C,) each; () if none.

        Its mean and variance are over all of the wave (samples,), whatever stretches it is cut
        into. The convolution is linear in windows of k samples, so that they follow from the mean
        and the covariance of the windows.
        """
        layer = self.net.feature_extractor.conv_layers[0]
        conv, norm = layer.conv, getattr(layer, 'layer_norm', None)
        if not isinstance(norm, nn.GroupNorm):
            return ()
        windows = wave.unfold(0, conv.kernel_size[0], conv.stride[0])  # (T, k)
        mean = windows.mean(0)
        centred = (part - mean for part in windows.split(1 << 18))
        covariance = sum(part.T @ part for part in centred) / len(windows)  # (k, k)
        weight = conv.weight[:, 0].float()  # (C, k)
        variance = ((weight @ covariance) * weight).sum(1)
        scale = norm.weight.float() * (variance + norm.eps).rsqrt()
        mean = weight @ mean + (0 if conv.bias is None else conv.bias.float())
        return scale, norm.bias.float() - scale * mean

    def _batches(self, stretches):
        """Stretches of similar lengths, longest first, of batch_seconds at most; at least one."""
        batches, frames = [], self.batch_seconds * self.frame_rate
        for stretch in sorted(stretches, key=lambda stretch: -stretch.frames):
            if not batches or batches[-1][0].frames * (len(batches[-1]) + 1) > frames:
                batches.append([])
            batches[-1].append(stretch)
        return batches

    @torch.inference_mode()
    def _compute(self, finish, batch):
        """Fill the results of a batch of stretches; nothing here waits for a GPU."""
        longest = batch[0].frames
        if self.device.type == 'cuda':
            longest = -(-longest // BUCKET) * BUCKET
        x = torch.zeros(len(batch), (longest - 1) * self.hop + self.reach, device=self.device)
        for row, stretch in zip(x, batch, strict=True):
            row[: len(stretch.wave)] = stretch.wave
        norm = [torch.stack(part) for part in zip(*(s.norm for s in batch), strict=True)]  # (B, C)
        frames = torch.tensor([stretch.frames for stretch in batch])
        if self.device.type == 'cuda':
            frames = frames.pin_memory().to(self.device, non_blocking=True)
        elif batch[-1].frames == longest:
            frames = None  # there is no padding
        with self._precision():
            x = self._hidden(x, norm, frames)
        for row, stretch in zip(x, batch, strict=True):
            stretch.result = finish(row[stretch.wanted])

    @contextlib.contextmanager
    def _precision(self):
        """On CUDA: products in TF32, or not, as the dtype says, and afterwards as it was before."""
        if self.device.type != 'cuda':
            yield
            return
        cudnn = torch.backends.cudnn
        products, convolutions = torch.get_float32_matmul_precision(), cudnn.allow_tf32
        torch.set_float32_matmul_precision('high' if self.tf32 else 'highest')
        cudnn.allow_tf32 = self.tf32
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(products)
            cudnn.allow_tf32 = convolutions

    def _hidden(self, x, norm, frames):
        """The net: waves (B, samples) -> (B, T, D), the output of the last layer that it keeps.

        norm: scale and shift (B, C) of the first layer, or nothing. frames: how many of the T are
        real, (B,), or None for all. What lies past an utterance's end changes nothing: attention
        leaves it out, and the position convolution finds zeros there. Of nets with a norm before
        each layer the last norm is left out, as the public k-means were made.
        """
        net, encoder = self.net, self.net.encoder
        if self.device.type == 'cpu':  # in pieces that stay in the cache
            step = CONVOLVE * self.hop
            starts = range(0, x.shape[1] - self.reach + 1, step)
            pieces = [x[:, start : start + step - self.hop + self.reach] for start in starts]
            x = torch.cat([self._convolve(piece, norm) for piece in pieces], dim=1)
        else:
            x = self._convolve(x, norm)
        x = first_of(net.feature_projection(x))  # (B, T, D)
        real = mask = bias = None
        if frames is not None:
            real = torch.arange(x.shape[1], device=x.device) < frames[:, None]  # (B, T)
            mask = real if self.wavlm else real[:, None, None]
        x = x + self._position(x, real)
        x = x if net.config.do_stable_layer_norm else encoder.layer_norm(x)
        for layer in encoder.layers:
            if self.wavlm:
                x, bias = layer(x, attention_mask=mask, position_bias=bias)[:2]
            else:
                x = first_of(layer(x, attention_mask=mask))
        return x

    def _convolve(self, x, norm):
        """The net's convolutions: (B, samples) -> (B, T, C)."""
        x = x[:, None].to(self.dtype)
        for layer in self.net.feature_extractor.conv_layers:
            if norm:  # the first layer's
                scale, shift = norm
                x = torch.addcmul(shift[..., None], layer.conv(x), scale[..., None])
                x, norm = layer.activation(x.to(self.dtype)), None
            else:
                x = layer(x)
        return x.transpose(1, 2)

    def _position(self, x, real):
        """The position convolution: (B, T, D) -> (B, T, D); real (B, T), or None for all."""
        position = self.net.encoder.pos_conv_embed
        x = x.transpose(1, 2)
        if getattr(position, 'batch_norm', None) is not None:
            x = position.batch_norm(x)
        x = x if real is None else x * real[:, None]
        return position.activation(position.padding(position.conv(x))).transpose(1, 2)


EXTRACTORS = dict(mfcc=MfccExtractor, hubert=HubertExtractor)  # by `kind` in encoder.json


def first_of(result):
    """What a module of transformers returns: in some versions the first of a tuple."""
    return result[0] if isinstance(result, tuple) else result


# -----------------------------------------------------------------------------
# The files of an encoder: a net, clusters, encoder.json; strangers' too


def load_net(config):
    """The net that encoder.json names, without the layers above the encoder's. Raises InputError
    saying what is missing."""
    from transformers import AutoModel, logging

    name, where, remedy = config['name'], config['model'], '--encoder names another'
    if name in ENCODERS:
        local = cache_path(name)
        remedy = (
            f'put config.json and model.safetensors of https://huggingface.co/{where} in {local}, '
            f'and {ENCODERS[name]["kmeans"]} in {cache_path("")}'
        )
        where = local if os.path.isdir(local) else where
    try:
        folder = find_checkpoint(where)
        hf = net_config(read_json(os.path.join(folder, 'config.json')), config['layer'], folder)
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # it lists each tensor of the layers above
        logging.disable_progress_bar()
        with one_line(f'{folder} cannot be loaded'):
            net, report = AutoModel.from_pretrained(folder, config=hf, output_loading_info=True)
        logging.set_verbosity(verbosity)
        lost = sorted(name for name in report['missing_keys'] if name != 'masked_spec_embed')
        if lost:
            raise InputError(f'{folder}: {len(lost)} tensors are missing, such as {lost[0]}')
    except InputError as error:
        raise InputError(f'{error}; encoder {name!r} needs this net: {remedy}') from None
    return fold_weight_norm(net)


def net_config(values, layer, where):
    """transformers' configuration of a net of `layer` layers: what lies above is not computed."""
    from transformers import AutoConfig

    kind = values.get('model_type')
    if kind not in ('hubert', 'wav2vec2', 'wavlm'):
        raise InputError(f'{where}: model_type {kind!r} is no hubert, wav2vec2 or wavlm')
    with one_line(f'{where}: config.json is of no net'):
        hf = AutoConfig.for_model(**values)
    if not 0 <= layer <= min(hf.num_hidden_layers, 1000):
        raise InputError(f'layer {layer} of {where}: it has {hf.num_hidden_layers}')
    if min(*hf.conv_stride, *hf.conv_kernel) < 1:
        raise InputError(f'{where}: convolutions of {hf.conv_kernel}, strides {hf.conv_stride}')
    hf.num_hidden_layers = layer
    hf._attn_implementation = 'eager' if kind == 'wavlm' else 'sdpa'
    return hf


def fold_weight_norm(net):
    """The net with the weight norm of its position convolution folded into the weights."""
    conv = net.encoder.pos_conv_embed.conv
    if nn.utils.parametrize.is_parametrized(conv):
        nn.utils.parametrize.remove_parametrizations(conv, 'weight')
    return net


def read_encoder(folder):
    """-> configuration, centroids (n_units, D), net or None, of a folder of save_pretrained.

    Whoever made the folder may be a stranger: raises InputError naming what cannot be right.
    """
    about = os.path.join(folder, 'encoder.json')
    path = os.path.join(folder, 'encoder.safetensors')
    config, tensors = read_json(about), read_tensors(path)
    check_encoder(config, about)
    centroids = tensors.pop('centroids', None)
    check_centroids(centroids, path)
    if config.get('n_units') not in (None, len(centroids)):
        raise InputError(
            f'{path} has {len(centroids)} units, encoder.json says {config["n_units"]}'
        )
    if not config.get('net'):
        return config, centroids.float(), None

    from transformers import AutoModel

    with one_line(f'{path} does not hold the net of encoder.json'):
        with torch.device('meta'):  # it takes no memory before its tensors fit
            net = AutoModel.from_config(net_config(config['net'], config['layer'], folder))
            fold_weight_norm(net)
        net.load_state_dict({name[4:]: tensor for name, tensor in tensors.items()}, assign=True)
    return config, centroids.float(), net


def check_encoder(config, path):
    """Raises InputError naming the first value in an encoder.json that cannot be right."""
    if config.get('kind') not in EXTRACTORS:
        raise InputError(f'{path}: expected an encoder of `kind` {" or ".join(EXTRACTORS)}')
    optional = dict(switch=0.0, distortion=0.0, vocoder='', n_units=0, net={})
    for key, example in (EXTRACTORS[config['kind']].example | optional).items():
        value = config.get(key)
        kinds = (int, float) if isinstance(example, float) else (type(example),)
        if value is None and key in optional:
            continue
        if type(value) not in kinds or (isinstance(value, int | float) and not 0 <= value < 1e6):
            raise InputError(f'{path}: `{key}` cannot be {value!r}')
    if config['kind'] == 'mfcc' and (config['frame_rate'] != 25 or config['n_cep'] > N_MELS):
        raise InputError(f'{path}: mfcc has 25 frames a second and at most {N_MELS} cepstra')
    if config.get('vocoder') not in (None, 'vocoder', *HIFIGAN):  # no path of others
        raise InputError(f'{path}: `vocoder` cannot be {config["vocoder"]!r}')


def check_centroids(centroids, path):
    """Raises InputError if these are no clusters, (n_units, D) finite numbers."""
    right = isinstance(centroids, torch.Tensor) and centroids.ndim == 2 and len(centroids)
    if not right or not centroids.is_floating_point() or not centroids.isfinite().all():
        raise InputError(f'{path}: no `centroids` (n_units, D) of finite numbers')


@contextlib.contextmanager
def one_line(message):
    """Whatever libraries raise of a file that is none becomes an InputError of one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f'{message}: {" ".join(str(error).split())[:200]}') from None


def cache_path(name):
    """Where public files are kept: $SLAM_CACHE, or ~/.cache/slam."""
    return os.path.join(os.environ.get('SLAM_CACHE') or os.path.expanduser('~/.cache/slam'), name)


def fetch(url, sha256=None):
    """The local copy of a public file, downloaded on first use and checked each time.

    Raises InputError offline, or if the file is not the published one.
    """
    import hashlib
    import urllib.request

    path = cache_path(url.rsplit('/', 1)[-1])
    if not os.path.exists(path):
        try:
            with (
                write_atomic(path, 'wb') as file,
                urllib.request.urlopen(url, timeout=60) as remote,
            ):
                shutil.copyfileobj(remote, file)
        except OSError as error:
            raise InputError(
                f'{url} cannot be downloaded ({error}): put it at {path} (SLAM_CACHE sets the '
                'folder)'
            ) from None
    with open(path, 'rb') as file:
        if sha256 and hashlib.file_digest(file, 'sha256').hexdigest() != sha256:
            raise InputError(f'{path} is not the published file (its sha256 differs): delete it')
    return path


class KMeansReader(pickle._Unpickler):
    """Reads a joblib dump of scikit-learn's KMeans, and can execute nothing.

    Each class that such a file names becomes an inert stand-in; any other is refused. joblib
    writes an array as a wrapper that says dtype, shape and order; the array's bytes follow the
    BUILD of the wrapper.
    """

    Inert = type('Inert', (), dict(__init__=lambda self, *args, **kwargs: None))
    Array = type('Array', (Inert,), {})
    dispatch = dict(pickle._Unpickler.dispatch)

    def find_class(self, module, name):
        import numpy

        if (module, name) == ('numpy', 'dtype'):
            return numpy.dtype
        if (module, name) == ('joblib.numpy_pickle', 'NumpyArrayWrapper'):
            return self.Array
        plain = (module.split('.')[0], name) in (('numpy', 'ndarray'), ('numpy', 'scalar'))
        if plain or module.startswith(('sklearn.cluster.', 'numpy.random.')):
            return self.Inert
        raise pickle.UnpicklingError(f'it asks to run {module}.{name}; refused')

    def load_build(self):
        import numpy

        super().load_build()
        array = self.stack[-1]
        if not isinstance(array, self.Array):
            return
        if array.dtype.hasobject:
            raise pickle.UnpicklingError('it holds an array of objects; refused')
        if 'numpy_array_alignment_bytes' in vars(array):
            self.file.read(self.file.read(1)[0])
        content = self.file.read(math.prod(array.shape) * array.dtype.itemsize)
        self.stack[-1] = numpy.frombuffer(content, array.dtype).reshape(
            array.shape, order=array.order
        )

    dispatch[pickle.BUILD[0]] = load_build

    @classmethod
    def centroids(cls, path):
        """The clusters (n_units, D), float32, of a joblib dump, or of a .safetensors file with a
        tensor `centroids`. Raises InputError."""
        from safetensors.torch import load_file

        kinds = '.safetensors with `centroids`, or a plain joblib dump of KMeans'
        with one_line(f'{path} is no k-means file ({kinds})'):
            if path.endswith('.safetensors'):
                centroids = load_file(path)['centroids'].float()
            else:
                with open(path, 'rb') as file:
                    reader = cls(file)
                    reader.file = file
                    centres = vars(reader.load())['cluster_centers_']
                centroids = torch.from_numpy(centres.astype('float32'))
        check_centroids(centroids, path)
        return centroids


# -----------------------------------------------------------------------------
# UnitVocoder: units -> wave

HIFIGAN = {  # mhubert25's, trained on LJSpeech: generator and config, each with its sha256
    'hifigan25': (
        (
            TWIST + 'hifigan_lj_mhubert_base_25hz.pt',
            'd88224e95c501e2cd59a6e4014753169cfe060fb7ade3cc0da03c809fef73b79',
        ),
        (
            TWIST + 'hifigan_lj_mhubert_base_25hz_config.json',
            '116dc39be4970cd393e562acd0a0ec70a86aaba7e9ca469b8b836cb3fe46afc7',
        ),
    )
}
VOICE_LEVEL = 0.08  # root mean square of the spoken parts of what a vocoder says: -22 dB
VOICE_PEAK = 0.95  # the highest sample allowed


def speech_level(wave):
    """Root mean square of the spoken parts of (samples,): of the 25 ms blocks less than 13 dB below
    the loud ones."""
    if len(wave) < WINDOW:
        return float(wave.square().mean().sqrt())
    power = wave[: len(wave) // WINDOW * WINDOW].view(-1, WINDOW).square().mean(1)
    loud = power.sort().values[int(0.95 * (len(power) - 1))]
    return float(power[power >= 0.05 * loud].mean().sqrt())


def finish_wave(wave):
    """(samples,), at least one, without DC, its speech at VOICE_LEVEL, its peaks below VOICE_PEAK,
    with 5 ms fades so that no end clicks."""
    wave = wave - wave.mean()
    gain = VOICE_LEVEL / max(speech_level(wave), 1e-6)
    wave = wave * min(gain, VOICE_PEAK / max(float(wave.abs().max()), 1e-6))
    return fade_ends(wave)


def fade_ends(wave, start=True, end=True):
    """(samples,) with 5 ms fades at its start, its end or both, in place."""
    ramp = torch.linspace(0, 1, min(80, len(wave)), device=wave.device)
    if start:
        wave[: len(ramp)] *= ramp
    if end and len(ramp):
        wave[-len(ramp) :] *= ramp.flip(0)
    return wave


def limit_peaks(wave, knee=0.7):
    """Samples above the knee bent so that none passes VOICE_PEAK, each by itself: for a stream,
    whose loudest moment is not known yet."""
    room = VOICE_PEAK - knee
    beyond = (wave.abs() - knee).clamp(min=0)
    return torch.where(beyond > 0, wave.sign() * (knee + room * torch.tanh(beyond / room)), wave)


def frame_spectra(wave):
    """(..., samples) -> (..., samples // HOP, bins) complex: the spectra of log_mel's frames."""
    windows = F.pad(wave, (SIDE, SIDE)).unfold(-1, WINDOW, HOP)
    return torch.fft.rfft(windows * torch.hann_window(WINDOW, device=wave.device), N_FFT)


def overlap_add(spectra):
    """The inverse of frame_spectra, by least squares: (..., n, bins) -> (..., n * HOP)."""
    n, window = spectra.shape[-2], torch.hann_window(WINDOW, device=spectra.device)

    def add(parts):  # (rows, n, WINDOW) -> (rows, n * HOP)
        size = (1, (n - 1) * HOP + WINDOW)
        whole = F.fold(parts.transpose(1, 2), size, (1, WINDOW), stride=(1, HOP))
        return whole[:, 0, 0, SIDE : SIDE + n * HOP]

    parts = torch.fft.irfft(spectra, N_FFT)[..., :WINDOW] * window
    weight = add(window.square().expand(1, n, WINDOW)).clamp(min=0.05)
    wave = add(parts.reshape(-1, n, WINDOW)) / weight
    return wave.view(*spectra.shape[:-2], n * HOP)


@lru_cache
@torch.inference_mode(False)
def mel_spread():
    """(N_MELS, bins): the log energy of each bin out of those of the mel bands around it."""
    filters = mel_filters()
    return (filters / filters.sum(1, keepdim=True).clamp(min=1e-6)).T.contiguous()


@lru_cache
@torch.inference_mode(False)
def fixed_noise():
    """4 s of white noise, power 1, that every wave takes from the same place at the same time."""
    return torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))


class Source:
    """The excitation of a voice: pulses at a pitch, and noise, each of power 1.

    In a stream it keeps the phase of the pulses, in cycles, at the sample `at`, where the next
    stretch goes on; that may begin earlier, so that stretches overlap.
    """

    def __init__(self):
        self.at, self.phase = 0, 0.0

    def __call__(self, pitch, first=0, until=None):
        """pitch: (n,) Hz, one a 10 ms step from sample `first` of the utterance on; (B, n) of
        stretches that begin at 0. until: the sample from which the next stretch goes on.
        Returns: pulses (..., n * HOP), noise (n * HOP,), on the device of `pitch`."""
        device, pitch = pitch.device, pitch.detach().cpu().double().repeat_interleave(HOP, dim=-1)
        phase = (pitch / SAMPLE_RATE).cumsum(-1)
        if pitch.ndim == 1:
            at = self.at - first
            phase += self.phase - (float(phase[at - 1]) if at else 0.0)
            if until is not None:
                self.at, self.phase = until, float(phase[until - first - 1])
        # a pulse where a cycle ends, shared by the two samples on either side of that moment
        cycles = phase.floor()
        ends = cycles > (phase - pitch / SAMPLE_RATE).floor()
        pulse = ends * (SAMPLE_RATE / pitch).sqrt()
        early = (phase - cycles) * SAMPLE_RATE / pitch  # samples since that moment
        pulses = pulse * (1 - early)
        pulses[..., :-1] += (pulse * early)[..., 1:]
        places = torch.arange(first, first + phase.shape[-1]) % len(fixed_noise())
        return pulses.float().to(device), fixed_noise()[places].to(device)


def filter_source(mel, voiced, pulses, noise, rounds=0, basis=None):
    """A wave of a given envelope: the source of a voice, shaped, by an inverse STFT.

    mel: (..., n, N_MELS) what log_mel of the wave is to be. voiced: (..., n, bins) share of the
    power that is pulses. pulses, noise: (..., n * HOP) of power 1, see Source. rounds: of Griffin
    & Lim 1984, changed to keep the fine structure, so that speech stays voiced, while the envelope
    is corrected by what log_mel misses. basis: (N_MELS, N_MELS) that a correction goes through.
    """
    filters, spread = mel_filters().to(mel.device), mel_spread().to(mel.device)
    hertz = torch.linspace(0, SAMPLE_RATE / 2, N_FFT // 2 + 1, device=mel.device)
    shape = (1 - voiced).clamp(min=1e-4).sqrt() * frame_spectra(noise)
    shape = shape + voiced.clamp(min=1e-4).sqrt() * frame_spectra(pulses)
    shape = shape * ((hertz > 50) & (hertz < SAMPLE_RATE / 2)) / (3 * WINDOW / 8) ** 0.5
    target = mel - filters.sum(0).log()
    wave = overlap_add(shape * torch.exp(0.5 * target @ spread))
    for _ in range(rounds):
        heard = frame_spectra(wave)
        power = power_of(heard)
        missed = mel - (power @ filters).clamp(min=1e-7).log()
        missed = missed.clamp(-3, 3)
        target = target + (missed if basis is None else missed @ basis)
        shape = heard * (power_of(shape) / power.clamp(min=1e-18)).sqrt()
        wave = overlap_add(shape * torch.exp(0.5 * target @ spread))
    return wave


@lru_cache
@torch.inference_mode(False)
def envelope_basis():
    """(N_MELS, N_MELS): keeps the envelope, the lower half of the cepstrum, and drops harmonics."""
    angles = torch.outer(torch.arange(N_MELS) + 0.5, torch.arange(N_MELS // 2) * math.pi)
    basis = F.normalize((angles / N_MELS).cos(), dim=0)
    return basis @ basis.T


# -----------------------------------------------------------------------------
# Voices: a new one is a class here and a line in VOICES
#
# One is made of vocoder.json, its tensors and a device. `durations` gives the frames of units (n,),
# `speak` the samples of units and durations, of an utterance or of a stretch from frame `first` on.
# A sample depends on `reach` frames on each side, a duration on `unit_reach` units. `level` is the
# speech_level of what it gives.

ROUNDS = 3  # of filter_source in a vocoder: they bring 98 % of the units back
# 10 ms steps on each side that a sample depends on: of every round two windows
ROUNDS_REACH = -(-WINDOW * (ROUNDS + 1) // HOP) + 1


class TableVoice:
    """The offline voice: the mean log-mel spectra of each unit, made into a wave by Griffin-Lim
    from the phases of a voice-like excitation.

    tensors: mel (n_units, 10 ms steps a unit, N_MELS), durations (n_units,) mean frames of a run.
    """

    level = 0.065  # speech_level of what `speak` gives: means of logs are below the log of means

    def __init__(self, config, tensors, device):
        self.device, self.mel = device, tensors['mel']
        self.mean_durations = tensors['durations'].cpu()
        self.steps = round(SAMPLE_RATE / HOP / config['frame_rate'])  # of 10 ms in a frame
        if self.mel.shape != (config['n_units'], self.steps, N_MELS):
            raise ValueError(f'its table is of shape {tuple(self.mel.shape)}')
        # frames that a sample depends on, on each side; the pitch follows the loudness of 0.3 s
        self.reach = math.ceil((ROUNDS_REACH + 15) / self.steps)
        self.unit_reach = 0

    def durations(self, units):
        """Each unit's mean; what rounding takes from one the next gains: the tempo is right."""
        return round_durations(self.mean_durations[units])

    def pitch(self, mel):
        """100 to 125 Hz, higher where it is louder, as people speak: (n, N_MELS) -> (n,)."""
        loudness = torch.logsumexp(mel, 1)
        slow = F.avg_pool1d(loudness[None], 31, 1, 15, count_include_pad=False)[0]  # over 0.3 s
        loudest = torch.logsumexp(self.mel.mean(1), 1).max()
        return 125 - 5 * (loudest - slow).clamp(0, 5)

    def voiced(self, mel):
        """The share of pulses in each bin: a voice falls towards 4 kHz and is a hiss above; speech
        whose spectrum does not fall is none. (n, N_MELS) -> (n, bins)."""
        hertz = torch.linspace(0, SAMPLE_RATE / 2, N_FFT // 2 + 1)
        peaks = hertz[mel_filters().argmax(0)]
        tilt = torch.logsumexp(mel[:, peaks < 1000], 1) - torch.logsumexp(mel[:, peaks > 3000], 1)
        below = torch.sigmoid((4500 - hertz.to(mel.device)) / 400)
        return torch.sigmoid(2 * tilt - 1)[:, None] * below

    def speak(self, units, durations, first=0, until=None, source=None, **who):
        """Units (n,) of so many frames -> (frames * hop,) samples whose log_mel is the table's.

        first, until (frames of the utterance), source: for a stretch of one, see Source. It has one
        speaker and one style.
        """
        frames = units.repeat_interleave(durations).to(self.device)
        mel = self.mel[frames].flatten(0, 1)  # (10 ms steps, N_MELS)
        hop = self.steps * HOP
        ends = first * hop, None if until is None else until * hop
        pulses, noise = (source or Source())(self.pitch(mel), *ends)
        basis = envelope_basis().to(self.device)
        return filter_source(mel, self.voiced(mel), pulses, noise, ROUNDS, basis)


def round_durations(mean):
    """(n,) mean frames -> (n,) long, at least 1, whose sums stay within half a frame of theirs."""
    beyond = (mean.clamp(min=1) - 1).double().cumsum(0).add(0.5).floor().long()
    return 1 + torch.diff(beyond, prepend=beyond.new_zeros(1))


class HifiganVoice:
    """The unit HiFi-GAN with its duration predictor (Polyak et al. 2021, fairseq's code HiFi-GAN).

    config: its JSON. tensors: as published, weight norm folded.
    """

    level = 0.13  # of its training data: files whose highest sample is 0.95

    def __init__(self, config, tensors, device):
        self.config, self.tensors, self.device = config, tensors, device
        self.hop = math.prod(config['upsample_rates'])
        self.unit_reach, self.reach = 0, self._count_reach()
        for i in (1, 2):
            if f'dur_predictor.conv{i}.0.weight' in tensors:
                self.unit_reach += tensors[f'dur_predictor.conv{i}.0.weight'].shape[-1] // 2

    def _count_reach(self):
        """Frames on each side that a sample depends on, from the kernels' sizes, last first."""
        c = self.config
        kernels = zip(c['resblock_kernel_sizes'], c['resblock_dilation_sizes'], strict=True)
        block = max(sum(kernel // 2 * (d + 1) for d in dilations) for kernel, dilations in kernels)
        reach = self.tensors['conv_post.weight'].shape[-1] // 2
        rates, sizes = c['upsample_rates'][::-1], c['upsample_kernel_sizes'][::-1]
        for rate, size in zip(rates, sizes, strict=True):
            reach = -(-(reach + block + size) // rate)
        return reach + self.tensors['conv_pre.weight'].shape[-1] // 2

    def durations(self, units):
        """exp(prediction) - 1 rounded, at least 1; 1 where there is no predictor."""
        t = self.tensors
        if 'dur_predictor.proj.weight' not in t or not len(units):
            return torch.ones(len(units), dtype=torch.long)
        x = t['dict.weight'][units.to(self.device)][None]  # (1, n, C)
        for i in (1, 2):
            norm = t[f'dur_predictor.ln{i}.weight'], t[f'dur_predictor.ln{i}.bias']
            x = F.relu(self._conv(f'dur_predictor.conv{i}.0', x.transpose(1, 2))).transpose(1, 2)
            x = F.layer_norm(x, x.shape[-1:], *norm)
        x = F.linear(x, t['dur_predictor.proj.weight'], t['dur_predictor.proj.bias'])[0, :, 0]
        return (x.exp() - 1).round().clamp(min=1).long().cpu()

    def speak(self, units, durations, speaker=0, style=0, **where):
        """Units (n,) of so many frames -> (frames * hop,) samples in [-1, 1]."""
        c = self.config
        frames = units.repeat_interleave(durations).to(self.device)
        x = self._conv('conv_pre', self._embed(frames, speaker, style)[None])  # (1, C, frames)
        for i, rate in enumerate(c['upsample_rates']):
            weight, bias = (self.tensors[f'ups.{i}.{kind}'] for kind in ('weight', 'bias'))
            padding = (c['upsample_kernel_sizes'][i] - rate) // 2
            x = F.leaky_relu(x, 0.1)
            x = F.conv_transpose1d(x, weight, bias, stride=rate, padding=padding)
            x = self._residual_blocks(x, i)
        x = torch.tanh(self._conv('conv_post', F.leaky_relu(x)))[0, 0]  # here the slope is 0.01
        return x[: len(frames) * self.hop]

    def _embed(self, frames, speaker, style):
        """(T,) units -> (channels, T): unit, speaker and style, those that there are."""
        parts = [self.tensors['dict.weight'][frames]]
        for name, row in (('spkr', speaker), ('style', style)):
            table = self.tensors.get(name + '.weight')
            if table is None:
                continue
            if not 0 <= row < len(table):
                raise InputError(f'{name} {row} is not among the {len(table)} of this vocoder')
            parts.append(table[row].expand(len(frames), -1))
        return torch.cat(parts, dim=-1).T

    def _residual_blocks(self, x, stage):
        """Multi-receptive field fusion: the mean of the residual blocks of a stage."""
        dilation_sizes = self.config['resblock_dilation_sizes']
        total = 0
        for j, dilations in enumerate(dilation_sizes):
            y, block = x, f'resblocks.{stage * len(dilation_sizes) + j}'
            for k, dilation in enumerate(dilations):
                z = self._conv(f'{block}.convs1.{k}', F.leaky_relu(y, 0.1), dilation)
                y = y + self._conv(f'{block}.convs2.{k}', F.leaky_relu(z, 0.1))
            total = total + y
        return total / len(dilation_sizes)

    def _conv(self, name, x, dilation=1):
        """The convolution `name` over (B, C, T), padded with zeros to the same length."""
        weight, bias = self.tensors[name + '.weight'], self.tensors[name + '.bias']
        padding = (weight.shape[-1] - 1) * dilation // 2
        return F.conv1d(x, weight, bias, dilation=dilation, padding=padding)


class ConvBlock(nn.Module):
    """ConvNeXt in one dimension (Liu et al. 2022; Vocos: Siuzdak 2023): (B, T, C) -> (B, T, C)."""

    def __init__(self, width, kernel):
        super().__init__()
        self.mix = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x):
        y = self.mix(x.transpose(1, 2)).transpose(1, 2)
        return x + self.down(F.gelu(self.up(self.norm(y))))


class NeuralVoice(nn.Module):
    """A voice that prepare_units.py trains: convolutions over units and their durations, at the
    end, as in Vocos, an inverse STFT. Of each 10 ms step they give the log mel energies, the share
    of pulses in each band and the pitch; filter_source makes the wave.

    config: n_units, frame_rate, voices (their names), width, kernel, blocks.
    """

    level = VOICE_LEVEL  # of the speech it is trained on

    def __init__(self, config, tensors=None, device='cpu'):
        super().__init__()
        self.device, width, kernel = device, config['width'], config['kernel']
        self.steps = round(SAMPLE_RATE / HOP / config['frame_rate'])  # of 10 ms in a frame
        if tensors is not None:  # a stranger's sizes, held against the tensors before a net is made
            shapes = {'unit.weight': (config['n_units'], width)}
            shapes['base.weight'] = config['n_units'], self.steps * N_MELS
            shapes[f'blocks.{config["blocks"] - 1}.mix.weight'] = width, 1, kernel
            for name, shape in shapes.items():
                if name not in tensors or tensors[name].shape != shape:
                    raise ValueError(f'{name} is not of shape {shape}')
        self.unit = nn.Embedding(config['n_units'], width)
        self.voice = nn.Embedding(max(1, len(config['voices'])), width)
        self.place = nn.Linear(4, width)
        self.blocks = nn.Sequential(*(ConvBlock(width, kernel) for _ in range(config['blocks'])))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, self.steps * (2 * N_MELS + 1))
        self.base = nn.Embedding(config['n_units'], self.steps * N_MELS)  # the table's, fixed
        self.base.weight.requires_grad = False
        # the durations' own net: over units, before any frame is known
        self.tempo = nn.Sequential(
            nn.Embedding(config['n_units'], 64),
            ConvBlock(64, 5),
            nn.LayerNorm(64),
            nn.Linear(64, 1),
        )
        self.unit_reach = 2
        # frames that a sample depends on, on each side, from the sizes of the kernels
        self.reach = config['blocks'] * (kernel // 2) + -(-ROUNDS_REACH // self.steps)
        if tensors is not None:
            self.load_state_dict(tensors)
        self.to(device)

    def forward(self, frames, place, voice, share=1.0):
        """frames (B, T) units, place (B, T, 4) of `places`, voice (B,) -> log mel energies and
        logits of the pulses' share (B, steps T, N_MELS), log of the pitch in Hz (B, steps T).
        share: of what the net adds to the table's energies."""
        x = self.unit(frames) + self.voice(voice)[:, None] + self.place(place)
        x = self.head(self.norm(self.blocks(x))).unflatten(2, (self.steps, -1)).flatten(1, 2)
        base = self.base(frames).unflatten(2, (self.steps, -1)).flatten(1, 2)
        return base + share * x[..., :N_MELS], x[..., N_MELS:-1], x[..., -1]

    @staticmethod
    def places(durations):
        """Where each frame is in the run of its unit: (n,) frames -> (sum, 4) float."""
        length = durations.repeat_interleave(durations).float()
        start = (durations.cumsum(0) - durations).repeat_interleave(durations)
        at = torch.arange(len(length)) - start
        return torch.stack((length.log(), (at + 0.5) / length, 1 / (at + 1), 1 / (length - at)), 1)

    @staticmethod
    def voiced(logits):
        """Logits of the pulses' share in mel bands -> the share in bins."""
        return torch.sigmoid(logits) @ mel_spread().to(logits.device)

    def mean_durations(self, units):
        """(B, n) units -> (B, n) mean frames of each."""
        return 1 + F.softplus(self.tempo(units)[..., 0])

    def durations(self, units):
        """Predicted, rounded so that the tempo stays."""
        if not len(units):
            return units
        return round_durations(self.mean_durations(units[None].to(self.device))[0].cpu())

    def speak(self, units, durations, first=0, until=None, source=None, speaker=0, style=0):
        """Units (n,) of so many frames -> (frames * hop,) samples; of a stretch: see Source."""
        voices = self.voice.num_embeddings
        if not 0 <= speaker < voices:
            raise InputError(f'speaker {speaker} is not among the {voices} of this vocoder')
        frames = units.repeat_interleave(durations)[None].to(self.device)
        place = self.places(durations)[None].to(self.device)
        which = torch.tensor([speaker], device=self.device)
        # nearer to the table more units come back, 98.9 % for 98.4 % at 0.95, at the same log-mel
        mel, logits, pitch = self(frames, place, which, share=0.88)
        hop = self.steps * HOP
        ends = first * hop, None if until is None else until * hop
        pulses, noise = (source or Source())(pitch[0].exp().clamp(40, 600), *ends)
        return filter_source(mel[0], self.voiced(logits[0]), pulses, noise, ROUNDS)


VOICES = dict(table=TableVoice, hifigan=HifiganVoice, neural=NeuralVoice)


class UnitVocoder:
    """Units to speech, in one of three ways: a table of spectra (offline, fitted in seconds), a
    small net that one can train, or the unit HiFi-GAN. Files and the choice among them are here;
    `voice` computes."""

    def __init__(self, config, tensors, device='cpu'):
        self.config, self.device = config, torch.device(device)
        self.tensors = {name: tensor.to(self.device) for name, tensor in tensors.items()}
        self.n_units, self.sample_rate = config['n_units'], config['sample_rate']
        self.frame_rate = config['frame_rate']
        self.hop = round(self.sample_rate / self.frame_rate)  # samples a frame
        self.voice = VOICES[config['kind']](config, self.tensors, self.device)

    @classmethod
    def from_pretrained(cls, where, device='cpu'):
        """Load a folder of save_pretrained, 'hifigan25' (downloaded once, checked), or a HiFi-GAN
        generator .pt with its .json beside it.

        Raises: InputError if there is none, the download fails or differs, or what is in the files
        is no vocoder.
        """
        if os.path.exists(os.path.join(where, 'vocoder.json')):
            path = os.path.join(where, 'vocoder.safetensors')
            about = os.path.join(where, 'vocoder.json')
        elif where in HIFIGAN:
            path, about = (fetch(*file) for file in HIFIGAN[where])
        elif where.endswith('.pt') and os.path.exists(where):
            path, about = where, where[:-3] + '_config.json'
            if not os.path.exists(about):
                about = where[:-3] + '.json'
        else:
            raise InputError(
                f'no vocoder {where!r}: expected a folder with vocoder.json, a HiFi-GAN .pt with '
                f'its .json, or one of {", ".join(HIFIGAN)}'
            )
        config = read_json(about)
        try:
            if path.endswith('.pt'):
                config, tensors = read_hifigan(path, config)
            else:
                tensors = read_tensors(path)
            vocoder = cls(config, tensors, device)
            one = torch.ones(1, dtype=torch.long)
            with torch.inference_mode():  # nothing is missing, everything fits
                vocoder.voice.durations(0 * one)
                vocoder.voice.speak(0 * one, one)
        except Exception as error:  # files of strangers: unpickling raises anything
            why = ' '.join(repr(error).split())[:200]
            raise InputError(f'{path} and its .json are no vocoder: {why}') from None
        return vocoder

    def save_pretrained(self, folder):
        """Write vocoder.json and vocoder.safetensors, each whole or not at all."""
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.tensors.items()}
        write_tensors(os.path.join(folder, 'vocoder.safetensors'), tensors)
        with write_atomic(os.path.join(folder, 'vocoder.json')) as file:
            json.dump(self.config, file, indent=2)

    def check(self, units):
        """List of units -> list of (n,) long on the CPU. Raises InputError for unknown ones."""
        units = [torch.as_tensor(u, dtype=torch.long, device='cpu') for u in units]
        worst = max((int(u.max()) for u in units if len(u)), default=0)
        if worst >= self.n_units:
            raise InputError(
                f'unit {worst} is not among the {self.n_units} of this vocoder: it belongs to '
                'another encoder'
            )
        return units

    @torch.inference_mode()
    def durations(self, units):
        """Frames of each unit, at least 1: list of (n,) de-duplicated units -> list of (n,)."""
        return [self.voice.durations(u) for u in self.check(units)]

    @torch.inference_mode()
    def decode(self, units, durations=None, speaker=0, style=0):
        """Speak.

        units: list of (n,) long, de-duplicated. durations: list of (n,) frames; None: predicted.
        speaker: row of the voices of a HiFi-GAN or a trained net; style: of a HiFi-GAN's styles.
        Returns: list of (frames * hop,) float32 at sample_rate on the CPU: no DC, speech at
        VOICE_LEVEL, peaks <= VOICE_PEAK. No wave depends on the others.
        Raises: InputError for units, speakers or styles that this vocoder does not have.
        """
        if isinstance(units, torch.Tensor):
            return self.decode([units], None if durations is None else [durations], speaker, style)[
                0
            ]
        units = self.check(units)
        durations = self.durations(units) if durations is None else durations
        durations = [torch.as_tensor(d, dtype=torch.long, device='cpu') for d in durations]
        waves = []
        for u, d in zip(units, durations, strict=True):
            wave = torch.zeros(0)
            if int(d.sum()):
                wave = finish_wave(self.voice.speak(u, d, speaker=speaker, style=style)).cpu()
            waves.append(wave)
        return waves

    @torch.inference_mode()
    def stream(self, pieces, prompt=None, speaker=0, style=0):
        """Speak while the units are still being made.

        pieces: iterable of (n,) long units, as they come. prompt: (units, durations) said before
        them. Yields (samples,) float32 on the CPU as soon as no further unit can change them:
        laid end to end they are the wave of `decode` before its level is set, since a sample
        depends on `voice.reach` frames on each side and no more. The level is the voice's own,
        the same from the first piece on; peaks are bent below VOICE_PEAK.
        """
        none = torch.zeros(0, dtype=torch.long)
        units, durations = prompt or (none, none)
        units, n_given = self.check([units])[0], len(units)
        spoken, source, reach = 0, Source(), self.voice.reach
        for piece in chain([none], pieces, [None]):
            final = piece is None
            if not final:
                units = torch.cat((units, *self.check([piece])))
            # a duration depends on some units to come, and a sample on `reach` frames to come
            known = len(units) if final else max(n_given, len(units) - self.voice.unit_reach)
            new = self.voice.durations(units[n_given:])[len(durations) - n_given : known - n_given]
            durations = torch.cat((durations, new))
            until = known if final else max(spoken, known - reach)
            if until == spoken:
                continue

            # `reach` units are at least as many frames: what is spoken again is thrown away
            first = max(0, spoken - reach)
            before, start, stop = (int(durations[:n].sum()) for n in (first, spoken, until))
            wave = self.voice.speak(
                units[first:known],
                durations[first:known],
                first=before,
                until=stop,
                source=source,
                speaker=speaker,
                style=style,
            )
            wave = wave[(start - before) * self.hop : (stop - before) * self.hop]
            wave = limit_peaks(wave * (VOICE_LEVEL / self.voice.level))
            yield fade_ends(wave, start=spoken == 0, end=final).cpu()
            spoken = until


def read_hifigan(path, config):
    """The config and the tensors of a unit HiFi-GAN's generator, its weight norm folded."""
    state = torch.load(path, map_location='cpu', weights_only=True)['generator']
    tensors = {name: tensor.float() for name, tensor in state.items()}
    for name in [name[:-2] for name in tensors if name.endswith('.weight_g')]:
        g, v = tensors.pop(name + '_g'), tensors.pop(name + '_v')
        tensors[name] = v * (g / v.flatten(1).norm(dim=1).view(g.shape))  # w = g v / |v|
    rate = config.get('sampling_rate', SAMPLE_RATE)
    known = dict(
        kind='hifigan',
        n_units=len(tensors['dict.weight']),
        sample_rate=rate,
        frame_rate=rate / math.prod(config['upsample_rates']),
    )
    return config | known, tensors


class UnitTable:
    """What a table vocoder is made of: per unit the sum of its spectra, its frames and its runs."""

    def __init__(self, n_units, frame_rate):
        self.n_units, self.frame_rate = n_units, frame_rate
        self.steps = round(SAMPLE_RATE / HOP / frame_rate)  # of 10 ms in a frame
        if abs(self.steps * HOP * frame_rate - SAMPLE_RATE) > 1:
            raise InputError(f'a voice needs frames of whole 10 ms, not {frame_rate:g} a second')
        self.mels = torch.zeros(n_units, self.steps * N_MELS, dtype=torch.float64)
        self.frames, self.runs = (torch.zeros(n_units, dtype=torch.long) for _ in range(2))

    def add(self, wave, units):
        """Count in one utterance: wave (samples,) at 16 kHz, units (frames,), one a frame, not
        de-duplicated."""
        wave, units = torch.as_tensor(wave), torch.as_tensor(units, dtype=torch.long)
        mel = log_mel(wave * (VOICE_LEVEL / max(speech_level(wave), 1e-5)))
        n = min(len(units), len(mel) // self.steps)  # frames that are whole
        self.mels.index_add_(
            0, units[:n], mel[: n * self.steps].view(-1, self.mels.shape[1]).double()
        )
        self.frames += torch.bincount(units[:n], minlength=self.n_units)
        self.runs += torch.bincount(dedup(units)[0], minlength=self.n_units)

    def finish(self):
        """The vocoder of the mean spectra and mean durations; a unit never seen sounds as the mean
        of all."""
        seen = self.frames[:, None] > 0
        frames = torch.where(seen, self.frames[:, None], self.frames.sum()).clamp(min=1)
        mel = torch.where(seen, self.mels, self.mels.sum(0)) / frames
        durations = (self.frames / self.runs.clamp(min=1)).clamp(min=1)
        config = dict(kind='table', n_units=self.n_units, frame_rate=self.frame_rate)
        tensors = dict(mel=mel.float().view(self.n_units, self.steps, N_MELS))
        tensors['durations'] = durations.float()
        return UnitVocoder(config | dict(sample_rate=SAMPLE_RATE), tensors)


# -----------------------------------------------------------------------------
# Finding and reading data

AUDIO_EXTENSIONS = (
    *('.wav', '.flac', '.ogg', '.oga', '.opus', '.mp3'),
    *('.aiff', '.aif', '.aifc', '.au', '.sph', '.caf', '.w64'),
)


def find_audio(path, extensions=AUDIO_EXTENSIONS):
    """The sound files below a folder, or [path] for a file: sorted, hidden ones left out.

    Links are followed, each folder once, so that links in a circle end. Raises InputError where
    there is no such path or no sound in the folder.
    """
    if os.path.isfile(path):
        return [path]
    if not os.path.isdir(path):
        raise InputError(f'{path}: no such file or folder')
    found, seen = [], set()
    for folder, folders, names in os.walk(path, followlinks=True):
        if os.path.realpath(folder) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(folder))
        folders.sort()
        for name in names:
            if name.lower().endswith(extensions) and not name.startswith('.'):
                found.append(os.path.join(folder, name))
    if not found:
        raise InputError(f'{path}: no sound in this folder (looked for {" ".join(extensions)})')
    return sorted(found)


def check_marks(row, where):
    """Raises InputError naming `where` if a row's words or phones, should it have some, are not
    [[text, start in seconds, end in seconds], ...]."""
    for key in ('words', 'phones'):
        marks = row.get(key) or []
        for mark in marks if isinstance(marks, list) else [None]:
            text, *times = mark if isinstance(mark, list) and len(mark) == 3 else [None]
            seconds = [time for time in times if type(time) in (int, float) and 0 <= time < 1e6]
            if not isinstance(text, str) or len(seconds) != 2:
                raise InputError(f'{where}: `{key}` must be [[text, start s, end s], ...]')


def parquet_files(where):
    """The .parquet files that `where` names, sorted: a file, a folder of shards, or one of the hub.

    `hub:owner/name` is a data set of the Hugging Face hub, `hub:owner/name:split` the part of it
    whose folder or file is called so (`train`, or `en/train`: a configuration and its split),
    `hub:owner/name@revision` another revision. Its files stay there, one is named
    `hub:owner/name@revision:path.parquet`, and read_parquet fetches it. Raises InputError.
    """
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise InputError(f'{where}: parquet is read by a package: pip install pyarrow') from None
    if not where.startswith('hub:'):
        return find_audio(where, ('.parquet',))

    repo, _, split = where.removeprefix('hub:').partition(':')
    if split.endswith('.parquet'):
        return [where]
    name, _, revision = repo.partition('@')
    # a data set in another format has a copy in parquet, made by the hub, in this branch
    for branch in [revision] if revision else ['main', 'refs/convert/parquet']:
        names = [path for path in _hub_files(name, branch) if path.endswith('.parquet')]
        if names:
            break
    pattern = ''.join(
        rf'(.*/)?{re.escape(part)}([-_.][^/]*)?/' for part in split.split('/') if part
    )
    found = [path for path in sorted(names) if re.match(pattern, path + '/')]
    if not found:
        there = ', '.join(sorted({os.path.dirname(path) or path for path in names})[:8]) or 'none'
        raise InputError(f'{where}: no .parquet file of that name on the hub (there: {there})')
    return [f'hub:{name}@{branch}:{path}' for path in found]


def _hub_files(name, revision):
    """The files of a data set of the hub or, where the hub cannot be reached, of its local copy."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        return HfApi().list_repo_files(name, repo_type='dataset', revision=revision)
    except RevisionNotFoundError:
        return []
    except Exception as error:
        reason = ' '.join(str(error).split())[:200]
    try:
        folder = snapshot_download(
            name, repo_type='dataset', revision=revision, local_files_only=True
        )
    except Exception:
        raise InputError(f'hub:{name}: the hub did not give it ({reason})') from None
    return [os.path.relpath(path, folder) for path in parquet_files(folder)]


def read_parquet(where):
    """Yields the rows of parquet data, dicts of plain Python values, a few at a time in memory.

    where: as of parquet_files. Audio stays a struct dict(bytes=..., path=...): load_audio takes
    io.BytesIO(row['audio']['bytes']). Raises InputError naming the file.
    """
    files = parquet_files(where)  # says what to install
    import pyarrow
    import pyarrow.parquet

    for name in files:
        path = name
        if name.startswith('hub:'):
            from huggingface_hub import hf_hub_download

            repo, _, file = name.removeprefix('hub:').partition(':')
            repo, _, revision = repo.partition('@')
            try:
                path = hf_hub_download(repo, file, repo_type='dataset', revision=revision or None)
            except Exception as error:
                reason = ' '.join(str(error).split())[:200]
                raise InputError(f'{name}: the hub did not give it ({reason})') from None
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=16):
                    yield from batch.to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(f'{path}: not readable as parquet ({error})') from None


# -----------------------------------------------------------------------------
# Helpers of several scripts: files, names, words


def pick_device(device='auto'):
    """'auto' -> cuda, else mps, else cpu; anything else as torch.device reads it. Raises InputError
    where that device is not available."""
    if device == 'auto':
        has_mps = torch.backends.mps.is_available()
        device = 'cuda' if torch.cuda.is_available() else 'mps' if has_mps else 'cpu'
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f'device {device!r} cannot be used here: {reason}') from None


def pick_dtype(dtype, device):
    """'auto' -> bfloat16 on cuda, float32 elsewhere; else the torch dtype of that name."""
    if dtype == 'auto':
        return torch.bfloat16 if torch.device(device).type == 'cuda' else torch.float32
    if dtype not in ('float32', 'bfloat16'):  # float16 would need its gradients scaled
        raise InputError(f'dtype {dtype!r} is not supported: use auto, bfloat16 or float32')
    return getattr(torch, dtype)


@contextlib.contextmanager
def reading(path):
    """Whatever a library raises while it reads this file becomes an InputError that names it."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:
        reason = ' '.join(str(error).split())[:200] or type(error).__name__
        raise InputError(f'{path} cannot be read: {reason}') from None


def read_json(path):
    """The object of a JSON file. Raises InputError."""
    with reading(path), open(path, encoding='utf-8') as file:
        content = json.load(file)
    if not isinstance(content, dict):
        raise InputError(f'{path}: expected a JSON object {{...}}')
    return content


def read_jsonl(path):
    """Yield (line number from 1, object) of a file of JSON lines; empty lines are skipped.

    NaN and Infinity, which are not JSON, are read as None. Raises InputError naming the line.
    """
    with reading(path), open(path, 'rb') as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            with reading(f'{path}, line {number}'):
                row = json.loads(line, parse_constant=lambda name: None)
            if not isinstance(row, dict):
                raise InputError(f'{path}, line {number}: expected a JSON object {{...}}')
            yield number, row


@contextlib.contextmanager
def write_atomic(path, mode='w'):
    """`with write_atomic(path) as file: ...`: the file appears under `path` complete or not at all.

    It is written under a temporary name and renamed; folders are made. mode: 'w' (UTF-8) or 'wb'.
    """
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    temporary = f'{path}.{os.getpid()}.tmp'
    try:
        with open(temporary, mode, encoding=None if 'b' in mode else 'utf-8') as file:
            yield file
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or path  # a full disk names no file
        raise
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def content_hash(*parts):
    """SHA-256 as 64 hexadecimal digits. A part: bytes, a tensor, or anything that is JSON."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.Tensor):
            part = part.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        if not isinstance(part, bytes):
            part = json.dumps(part, sort_keys=True).encode()
        digest.update(len(part).to_bytes(8, 'big') + part)
    return digest.hexdigest()


def file_hash(path):
    """SHA-256 of a file's content, as 64 hexadecimal digits."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


SPLITS = dict(
    **dict.fromkeys(('train', 'training'), 'train'),
    **dict.fromkeys(('val', 'valid', 'validation', 'dev', 'eval'), 'val'),
    **dict.fromkeys(('test', 'testing'), 'test'),
)


def split_of(name, default=None):
    """'train', 'val' or 'test' for a split's name in any case: dev-clean, train.100, TEST ...

    default: returned for a name that is none of these, such as a folder's. None: raises InputError.
    """
    match = re.fullmatch(r'([a-z]+)([-_.:/\[\d].*)?', str(name).strip().lower())
    if match and match[1] in SPLITS:
        return SPLITS[match[1]]
    if default is None:
        raise InputError(
            f'split {name!r} is not known: use one of {", ".join(SPLITS)}, also as in train-100'
        )
    return default


def split_documents(text):
    """The documents of a text, parted by <|endoftext|> wherever it stands; empty ones left out."""
    return [part.strip() for part in text.split('<|endoftext|>') if part.strip()]


def check_encoder_ids(parts):
    """Raise InputError where units of two encoders meet. parts: {name: encoder_id or None}; None,
    of files older than encoder_id, agrees with all."""
    known = {name: encoder_id for name, encoder_id in parts.items() if encoder_id}
    if len(set(known.values())) > 1:
        names = ', '.join(f'{name}: {encoder_id}' for name, encoder_id in known.items())
        raise InputError(f'the units are of different encoders, so they do not mix ({names})')


@lru_cache(1)
def word_tokenizer():
    from nltk.tokenize import NLTKWordTokenizer  # a second to import; needs no data

    return NLTKWordTokenizer()


def tokenize_words(text):
    """The words and punctuation marks of a text by the Penn Treebank rules of NLTK."""
    return word_tokenizer().tokenize(text)


def auto_bleu(words, n=2):
    """The share of a sequence's n-grams that occur in it more than once; 0 where there is none.

    Lakhotia et al. 2021 (auto-BLEU). words: any sequence, of tokenize_words or of units.
    """
    ngrams = list(zip(*(words[i:] for i in range(n)), strict=False))
    counts = Counter(ngrams)
    repeated = sum(count for count in counts.values() if count > 1)
    return repeated / max(1, len(ngrams))


def pack_rows(lengths, width):
    """Best fit decreasing: rows of indices into `lengths`, the lengths of each row sum to <= width.

    The longest goes first, each into the fullest row that still takes it. A length over `width`
    has a row of its own. Deterministic: equal lengths keep their order.
    """
    rows = []
    free = []  # (room, row), sorted by room
    for i in sorted(range(len(lengths)), key=lambda i: -int(lengths[i])):
        length = int(lengths[i])
        at = bisect_left(free, (length, -1))
        if at == len(free):
            rows.append([])
            room, row = width, len(rows) - 1
        else:
            room, row = free.pop(at)
        rows[row].append(i)
        insort(free, (room - length, row))
    return rows


def start_worker(threads=1):
    """Initializer of worker processes: Ctrl-C is left to the parent, and a worker ends with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def log(text, rank=0):
    """Print a line, in the first process only. A closed pipe (`| head`) does not end a run."""
    try:
        if rank == 0:
            print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def format_time(seconds):
    """'45 s', '3.2 min' or '23.5 h'."""
    if seconds < 90:
        return f'{seconds:.0f} s'
    return f'{seconds / 60:.1f} min' if seconds < 5400 else f'{seconds / 3600:.1f} h'


def git_commit():
    """The commit of this folder; None where git does not know it."""
    here = os.path.dirname(os.path.abspath(__file__))
    try:
        done = subprocess.run(['git', '-C', here, 'rev-parse', 'HEAD'], capture_output=True)
    except OSError:
        return None
    return done.stdout.decode().strip() or None


# -----------------------------------------------------------------------------
# Runs: processes, signals, logs and resuming, for train.py and dpo.py


def start_processes(device):
    """This process's device, its rank and the number of processes, as torchrun set them."""
    rank, local, world = (
        int(os.environ.get(key, default))
        for key, default in (('RANK', 0), ('LOCAL_RANK', 0), ('WORLD_SIZE', 1))
    )
    device = pick_device(device)
    if device.type == 'cuda':
        device = torch.device('cuda', local) if world > 1 else device
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')
    if world > 1:
        dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo')
    return device, rank, world


def stop_processes(world):
    """All processes end together: one that ends alone can abort the others."""
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def sum_over_processes(numbers, device):
    """A list of numbers, each summed over the processes."""
    if not dist.is_initialized():
        return numbers
    sums = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return sums.tolist()


def catch_signals(rank):
    """The list of signals received so far: the first SIGINT or SIGTERM is appended to it, so that
    the loop can save and stop; the second ends the process at once."""
    caught = []

    def catch(number, frame):
        caught.append(number)
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
        if rank == 0:  # no print: it may be what was interrupted
            os.write(2, b'\nstopping after this step, which is saved; press again to end at once\n')

    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, catch)
    return caught


def start_tracker(name, config):
    """A run of the package `name`, wandb or trackio, whose `log` takes records; '': None."""
    if not name:
        return None
    if name not in ('wandb', 'trackio'):
        raise InputError(f'tracker {name!r} is not known: use wandb or trackio')
    try:
        tracker = importlib.import_module(name)
    except ImportError:
        raise InputError(f'{name} is not installed: pip install {name}') from None
    return tracker.init(project='slam', config=config)


def open_log(out_dir, step, rank=0):
    """out_dir/log.jsonl, to append to, without the lines that a killed run wrote past `step`.

    It stays locked while the process lives. Raises InputError if another one trains in out_dir.
    """
    import fcntl  # not available on Windows

    if rank:
        return open(os.devnull, 'w')
    os.makedirs(out_dir, exist_ok=True)
    file = open(os.path.join(out_dir, 'log.jsonl'), 'a+', buffering=1, encoding='utf-8')
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(
            f'another process is training in {out_dir}: wait for it, or choose another --out_dir'
        ) from None
    except OSError:
        pass  # a file system without locks
    file.seek(0)
    kept = 0  # bytes: JSON is ASCII
    for line in file.readlines() if step else []:
        if not line.endswith('\n') or json.loads(line)['step'] > step:  # the last may be incomplete
            break
        kept += len(line)
    file.truncate(kept)
    return file


def load_run(out_dir, fresh, config, free):
    """The state that a run with these settings left in out_dir/train_state.pt; `fresh` if none.

    free: the knobs that may have another value now. Raises InputError if the file cannot be read
    or another knob differs. A knob that only one of two versions knows does not matter.
    """
    path = os.path.join(out_dir, 'train_state.pt')
    if not os.path.exists(path):
        return fresh
    with reading(path):
        state = torch.load(path, map_location='cpu', mmap=True, weights_only=True)
    if not isinstance(state, dict) or {*fresh, 'config'} - set(state):
        raise InputError(f'{path} is not of this version: --resume=False starts over')
    for knob in sorted(set(state['config']) & set(config) - set(free)):
        if state['config'][knob] != config[knob]:
            raise InputError(
                f'{out_dir} is a run with {knob}={state["config"][knob]!r}, not {config[knob]!r}: '
                'choose another --out_dir, or --resume=False to start over'
            )
    return state


def save_run(folder, model, slam, state):
    """Write a checkpoint, and last, in one file, the state from which a killed run continues.
    Raises InputError where the disk is full; the checkpoint before it is kept."""
    try:
        model.save_pretrained(folder, slam)
        with write_atomic(os.path.join(folder, 'train_state.pt'), 'wb') as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:
        # for a full disk torch.save raises a RuntimeError whose cause is the OSError
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise InputError(f'cannot write {folder} ({cause}): the last checkpoint is kept') from None


# -----------------------------------------------------------------------------
# LEGACY: only until the scripts that use it are rewritten

say = log


def without(mapping, *names):
    return {name: value for name, value in mapping.items() if name not in names}


def write_tensors(path, tensors):
    """A .safetensors file that appears whole or not at all."""
    from safetensors.torch import save

    with write_atomic(path, 'wb') as file:
        file.write(save(tensors, metadata={'format': 'pt'}))


def check_knobs(config, least, below):
    """Raises InputError where a number is under its `least` (0 if none) or not `below` its limit
    (dicts by knob), `compile` is neither None nor a truth value, or a run would lose its init."""
    for knob, value in config.items():
        if type(value) in (int, float):
            low, high = least.get(knob, 0), below.get(knob, math.inf)
            if not low <= value < high:
                raise InputError(f'--{knob}={value} is out of range: at least {low}, below {high}')
    if config['compile'] not in (None, True, False):
        raise InputError(f'--compile={config["compile"]}: use True or False')
    init, out_dir = config['init'], config['out_dir']
    if init != 'scratch' and os.path.abspath(init) == os.path.abspath(out_dir):
        raise InputError(
            f'init and out_dir are both {init}: choose another --out_dir, this one would be lost'
        )


def explain_memory(remedy):
    """From now on, running out of memory is an InputError that names the remedy."""
    before = sys.excepthook

    def hook(kind, error, trace):
        none_left = issubclass(kind, torch.OutOfMemoryError | MemoryError)
        if none_left or "can't allocate memory" in str(error):
            kind, error = InputError, InputError(f'out of memory: {remedy}')
        before(kind, error, trace)

    sys.excepthook = hook


def start_wandb(config):
    """A run of Weights & Biases; its `log` takes records. Raises InputError if there is none."""
    try:
        import wandb
    except ImportError:
        raise InputError('wandb is not installed: pip install wandb, or --wandb=False') from None
    return wandb.init(project='slam', config=config)


def add_up(totals, numbers):
    """totals, (k + 3,) on the device, and a step, without waiting for either: sums of its numbers
    (k,), the last the gradient norm, over finite steps; how many steps were finite and how many
    not, and of these how many in a row until now."""
    none, one = torch.zeros(1, device=totals.device), torch.ones(1, device=totals.device)
    good = torch.cat((numbers, one, none, -totals[-1:]))  # the row of bad steps ends
    bad = torch.cat((torch.zeros_like(numbers), none, one, one))
    return totals + torch.where(numbers[-1].isfinite(), good, bad)
