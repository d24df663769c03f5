"""The three networks and how they load and save.

SLM           units -> next unit   a transformer over speech units; it computes what transformers'
                                   model of the same family computes (FAMILIES)
UnitEncoder   wave  -> units       HuBERT-like features, or MFCC offline, and k-means
UnitVocoder   units -> wave        the unit HiFi-GAN, a small net to train, or a table of spectra
"""

import contextlib
import hashlib
import importlib
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from bisect import bisect_left, insort
from collections import Counter
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

PAD, BOS, EOS, OFFSET = 0, 1, 1, 2  # <S> is both ends of an utterance; unit u is token u + OFFSET
SAMPLE_RATE = 16000


class InputError(ValueError):
    """Something the user can mend; scripts print it as one line and exit with code 2."""


# -----------------------------------------------------------------------------
# SLM: the speech language model


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last dimension, computed in fp32."""

    def __init__(self, config, size):
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if config.norm == 'layer' else None

    def forward(self, x):
        weight = self.weight.float()
        if self.bias is None:
            y = F.rms_norm(x.float(), weight.shape, weight, self.eps)
        else:
            y = F.layer_norm(x.float(), weight.shape, weight, self.bias.float(), self.eps)
        return y.to(x.dtype)


def rotate(x, cos, sin):
    """RoPE. x: (B, T, H, D); cos, sin: (B, T, 1, R), as of rope_tables. Of the D features the first
    R turn, feature i together with i + R / 2."""
    R = cos.shape[-1]
    turning = x[..., :R]
    # roll, not cat: then the compiler makes one backward kernel for q and k, joined with v
    turned = turning * cos + turning.roll(R // 2, -1) * sin
    return turned if R == x.shape[-1] else torch.cat((turned, x[..., R:]), dim=-1)


class Block(nn.Module):
    """One transformer layer of any family; its SLMConfig says which (FAMILIES)."""

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
        # gated: gate and up in one product
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

    def forward(self, x, rope, attend):  # x (B, T, C)
        c = self.config
        drop = partial(F.dropout, p=c.dropout, training=self.training)
        if c.parallel:
            attended = drop(self.attention(self.norm1(x), rope, attend))
            return x + attended + drop(self.mlp(self.norm2(x)))
        if c.pre_norm:
            x = x + drop(self.attention(self.norm1(x), rope, attend))
            return x + drop(self.mlp(self.norm2(x)))
        x = self.norm1(x + drop(self.attention(x, rope, attend)))
        return self.norm2(x + drop(self.mlp(x)))


class SLM(nn.Module):
    """A decoder-only transformer over speech units.

    Tokens: PAD 0, `<S>` 1 (both ends of an utterance), unit u at u + OFFSET, the convention of
    slprl/slam. An interleaved model has a text LM's tokens first, unit u at u + offset, then the
    switches `<speech>` and `<text>`, each before what it names; `end`, the text LM's own token,
    closes a document.

    slam: the content of slam.json: encoder, vocoder, n_units, frame_rate, dedup, recipe, scores;
    of an interleaved model also tokenizer (a folder), offset and end; scoring='units' where the
    model was trained without `<S>` at the front, so that an utterance is scored as its units alone,
    the first of which nothing predicts.
    """

    def __init__(self, config, seed=0):
        super().__init__()
        c = self.config = config
        self.slam = {}
        self.compiled_step = self.static_cache = None  # of generate
        # _weight: nn.Embedding's own initialisation would import the whole compiler on meta
        self.embed = nn.Embedding(
            c.vocab_size, c.embed_dim, _weight=torch.empty(c.vocab_size, c.embed_dim)
        )
        if c.positions == 'learned':
            rows = c.context + POSITION_OFFSET
            self.embed_positions = nn.Embedding(rows, c.n_embd, _weight=torch.empty(rows, c.n_embd))
        if c.embed_dim != c.n_embd:
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
        """RoPE's tables, computed in fp32 and rounded once to the weights' dtype."""
        weight = self.embed.weight
        if self.config.positions == 'rope' and not weight.is_meta:
            self.rope = [table.to(weight) for table in rope_tables(self.config)]

    def hidden(self, tokens, doc=None, positions=None, branch=None, attend=None):
        """The last hidden states (B, T, embed_dim), ready for the head.

        tokens: (B, T) int64. doc: (B, T) integers, equal along one utterance and changing at its
        border; a token sees its own utterance alone, with positions from 0. None: each row is one
        utterance. positions: (B, T), in place of those. branch: (B, T), 0 for a shared prompt, 1,
        2, ... for its alternatives, which see the prompt and themselves. attend: a function of q, k
        and v, in place of attention within documents (generation's).
        Raises: InputError if the model's positions do not reach that far.
        """
        c, (B, T) = self.config, tokens.shape
        if positions is None:
            positions = torch.arange(T, device=tokens.device).expand(B, T)
            if doc is not None:
                # restart at each utterance: subtract the index at which the present one began
                first = F.pad(doc[:, 1:] != doc[:, :-1], (1, 0), value=True)
                positions = positions - torch.where(first, positions, 0).cummax(dim=1).values
        limit = position_limit(c)
        if T > limit and not torch.compiler.is_compiling() and positions.max() >= limit:
            raise InputError(
                f'{int(positions.max()) + 1} tokens are more than the {limit} '
                f'{c.positions} positions of this {c.family} model'
            )

        x = self.embed(tokens)  # (B, T, embed_dim)
        if torch.is_autocast_enabled(x.device.type):
            # the residual stream in bf16, as a bf16 model has it
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if c.embed_dim != c.n_embd:
            x = self.project_in(x)
        rope = None
        if c.positions == 'learned':
            x = x + self.embed_positions(positions + POSITION_OFFSET).to(x.dtype)
        else:
            rope = [table[positions][:, :, None].to(x.dtype) for table in self.rope]  # (B,T,1,R)

        if attend is None:
            attend = attention_within(doc, branch, tokens.device, min(T, c.context))
        for block in self.blocks:
            x = block(x, rope, attend)
        if c.pre_norm:
            x = self.norm(x)
        return self.project_out(x) if c.embed_dim != c.n_embd else x

    def head_weight(self, x, precise=False):
        """The head's weight as its product with x takes it, (vocab_size or more, embed_dim)."""
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

    def num_params(self):
        """Parameters, tied ones once: what Table 7 counts."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, span):
        """Floating-point operations of one token, forward and backward: 6 a weight that multiplies,
        and causal attention. span: mean tokens of an utterance; attention reaches half of it."""
        c = self.config
        weights = c.vocab_size * c.embed_dim  # the head
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2 and 'embed' not in name and name != 'head.weight':
                weights += parameter.numel()
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
        Raises: InputError for text where the model knows none.
        """
        tokens = list(self.slam.get('prefix', ()))
        for kind, ids in parts:
            if self.slam.get('tokenizer'):
                before = self.config.vocab_size - (2 if kind == 'speech' else 1)
            elif kind == 'text':
                raise InputError('the model knows no text: train one on interleaved data')
            else:
                before = BOS
            if not alone:
                tokens.append(before)
            shift = self.offset if kind == 'speech' else 0
            tokens += (torch.as_tensor(ids) + shift).tolist()
        return torch.tensor(tokens, dtype=torch.long)

    @cached_property
    def tokenizer(self):
        """The text LM's. Raises InputError where the model knows no text."""
        if not self.slam.get('tokenizer'):
            raise InputError('the model knows no text: train one on interleaved data')
        return read_tokenizer(self.slam['tokenizer'])[0]

    def encode_text(self, text, inside=False):
        """The text LM's tokens of a text, list of int; inside: it goes on after other words, with a
        space before it. Raises InputError where the model knows no text."""
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

    def generate(self, prompts, *args, **kwargs):
        """Continue prompts; arguments as in generate_steps.

        Returns: list of 1-D int64 tensors on the CPU: the new tokens, without the one that ends.
        """
        steps = list(self.generate_steps(prompts, *args, **kwargs))
        if not steps:
            return [torch.empty(0, dtype=torch.long) for _ in prompts]
        rows = torch.stack(steps, dim=1).cpu()  # (B, steps)
        lengths = (rows != self.end).long().cumprod(dim=1).sum(dim=1)
        return [row[:length] for row, length in zip(rows, lengths, strict=True)]

    @torch.inference_mode()
    def generate_steps(
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
        """Continue prompts token by token (defaults: Table 6 of the paper).

        prompts: list of 1-D int64 tensors as of tokens_of, of any lengths >= 1.
        temperature: 0 takes the likeliest. top_k: 0 is off. repetition_penalty: over prompt and
        continuation, as transformers defines it. seed: of a generator of its own, None: torch's.
        ban_repeats: no unit directly after itself, which de-duplicated units never show; None:
        where slam says dedup. compile: torch.compile the step of one token; half a minute the first
        time, then faster where launching small operations is what costs. kind: 'speech' or 'text',
        what an interleaved model is to go on with, after that switch.

        Yields: (B,) int64, the new tokens as they are made, on the model's device; self.end where a
        row ends, PAD after that. Stops when all rows have ended.
        Raises: InputError if the model's positions do not reach prompt + continuation.
        """
        c, device = self.config, self.embed.weight.device
        longest = max(len(prompt) for prompt in prompts)
        if longest + max_new_tokens > position_limit(c):
            raise InputError(
                f'{longest} prompt + {max_new_tokens} new tokens are more than the '
                f'{position_limit(c)} {c.positions} positions of this model'
            )

        # the prompts side by side; `columns` are the places that their tokens take in the cache
        tokens, seen, padding = (x.to(device) for x in pad_left(prompts, c.vocab_size))
        columns = torch.arange(longest, device=device)
        positions = (columns - padding[:, None]).clamp(min=0)
        ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)

        # the cache has room for all columns, in steps of 128: few shapes, so little to compile
        width = -(-(longest + max_new_tokens) // 128) * 128
        real = torch.arange(width, device=device) >= padding[:, None]
        cache = self._cache(len(prompts), width, compile)

        # what chance decides, for all tokens at once, and what the knobs say of each choice
        generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        top_k = min(top_k or c.vocab_size, c.vocab_size)
        noise = torch.empty(max_new_tokens, len(prompts), top_k, device=device)
        noise.exponential_(generator=generator)
        if ban_repeats is None:
            ban_repeats = self.slam.get('dedup')
        is_unit = torch.arange(c.vocab_size, device=device) >= self.offset
        number = partial(torch.tensor, dtype=torch.float32, device=device)
        sampling = Sampling(
            temperature=number(temperature or 1.0),
            top_p=number(top_p),
            repetition_penalty=number(repetition_penalty),
            allowed=self.allowed_tokens(kind).to(device),
            may_repeat=~is_unit if ban_repeats else torch.ones_like(is_unit),
            greedy=temperature == 0,
        )

        # the first round takes the prompts whole, each further one the token before
        for i in range(max_new_tokens):
            step = self._compiled(device) if compile and i > 0 else self._next
            new = step(tokens, positions, columns, real, cache, seen, noise[i], sampling)
            tokens = torch.where(ended, PAD, new)[:, None]
            seen.scatter_(1, tokens, True)
            ended = ended | (tokens[:, 0] == self.end)
            yield tokens[:, 0]
            # reading the flag waits for a GPU: not every token
            if (device.type == 'cpu' or i % 16 == 15) and ended.all():
                return
            positions, columns = positions[:, -1:] + 1, columns[-1:] + 1

    def _cache(self, B, width, compile):
        """Keys and values of each layer in turn, a list of (B, n_kv_head, width, head_dim). For a
        compiled step they stay at one address, as CUDA graphs want it, from call to call."""
        c, weight = self.config, self.embed.weight
        shape = (B, c.n_kv_head, width, c.head_dim)
        static = compile and weight.is_cuda
        old = self.static_cache
        if static and old and old[0].shape == shape and old[0].dtype == weight.dtype:
            return old
        cache = [weight.new_zeros(shape) for _ in range(2 * c.n_layer)]
        if static:
            self.static_cache = cache
            for tensor in cache:
                torch._dynamo.mark_static_address(tensor, guard=False)
        return cache

    def _compiled(self, device):
        """The compiled step: CUDA graphs on a GPU, on a CPU no Python between the kernels."""
        if self.compiled_step is None:
            how = dict(mode='reduce-overhead')
            if device.type == 'cpu':  # small kernels in one thread
                how = dict(options={'cpp_wrapper': True, 'cpp.min_chunk_size': 8192})
            self.compiled_step = torch.compile(self._next, fullgraph=True, dynamic=True, **how)
        return self.compiled_step

    def _next(self, tokens, positions, columns, real, cache, seen, noise, sampling):
        """One round of generation: tokens (B, T) enter the cache at `columns` (T,), and the tokens
        that follow them, (B,), are chosen.

        positions: (B, T). real: (B, width of the cache) bool, False on padding. cache: of _cache.
        seen, noise, sampling: as in choose.
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
        return choose(self.logits(x[:, -1]).float(), tokens[:, -1:], seen, noise, sampling)

    # ------------------------------------------------------------------ loading and saving

    @classmethod
    def from_preset(cls, name, vocab_size=502, context=None, rope_theta=None, dropout=0.0, seed=0):
        """A freshly initialised model of one of the paper's shapes (Table 7), no download: the cold
        start of Figure 2. Raises InputError naming the shapes there are."""
        if name.lower() not in PRESETS:
            raise InputError(f'no preset {name!r}: there are {", ".join(PRESETS)}')
        config = SLMConfig(**PRESETS[name.lower()], vocab_size=vocab_size, dropout=dropout)
        set_positions(config, context, rope_theta)
        return cls(config, seed)

    @classmethod
    def from_pretrained(
        cls,
        where,
        vocab_size=None,
        embed_init='first_rows',
        context=None,
        rope_theta=None,
        dropout=0.0,
        seed=0,
        dtype=torch.float32,
        text=None,
    ):
        """Load a folder or a hub name; no code of the checkpoint is ever run.

        (a) A text LM of a family in FAMILIES: TWIST, everything but the embedding (and head) stays;
        the new vocabulary of vocab_size (None: 502) rows begins as `embed_init`: 'first_rows' of
        the old one (what resizing leaves; Hassid et al. 2023), 'random', or 'mean', its mean row.
        With `text`, meta.json of data of text and units (offset, tokenizer_sha256), all rows stay
        and those of units and switches are added, out of the old ones likewise.
        (b) A checkpoint of ours, (c) a public SLM (`lm.` prefix: slprl/slam; slprl/SIMS-7B, which
        needs the tokenizer of its text LM, in its folder or from the hub), (d) a TWIST checkpoint
        (`offset` in its config), (e) one of tiagoCuervo/slm_scaling (slam['scoring'] is 'units').
        Their vocabulary stays, in our order, and vocab_size, if given, must fit in it.
        context: tokens to note in the config (learned positions stay as many as they are).
        rope_theta: in place of the checkpoint's.

        Raises: InputError when there is no such folder or hub name, the family or a feature is not
        supported, config.json and the tensors do not fit (named), the vocabulary cannot hold the
        units, data and model differ in their text, or context is longer than the model's positions.
        """
        folder = find_checkpoint(where)
        hf, prefix, slam = read_description(folder, where)
        config = from_hf_config(hf)
        config.dropout = dropout
        set_positions(config, context, rope_theta)
        check_data_fit(config.vocab_size, vocab_size, slam, folder, where, text)
        state = load_state(folder, config, FAMILIES[hf['model_type']], prefix)

        embeddings = ['embed.weight'] if config.tied else ['embed.weight', 'head.weight']
        order = token_order(hf, config.vocab_size)
        for name in embeddings:
            old = state[name]
            if slam is None and text:  # a text LM that is to learn units, too: rows are added
                new = twist_rows(old, vocab_size - len(old), embed_init, seed, where)
                state[name] = torch.cat((old, new.to(old)))
            elif slam is None:  # a text LM that becomes a unit LM
                state[name] = twist_rows(old, vocab_size or 502, embed_init, seed, where)
            elif order is not None:  # an SLM whose tokens are in another order
                state[name] = old[order]
        config.vocab_size = len(state['embed.weight'])
        if config.tied:
            state['head.weight'] = state['embed.weight']

        with torch.device('meta'):
            model = cls(config)
        state = {name: tensor.to(dtype) for name, tensor in state.items()}
        model.load_state_dict(state, assign=True)
        if config.tied:
            model.head.weight = model.embed.weight
        model.make_rope()
        if slam is not None:
            model.slam = dict(n_units=config.vocab_size - OFFSET) | slam
        return model

    def save_pretrained(self, folder, slam=None):
        """Write config.json, model.safetensors (both as transformers reads them) and slam.json,
        each whole or not at all.

        slam: dict for slam.json; None: self.slam. Where PARTS of it name folders, these are copied
        in, so that the checkpoint is complete by itself. Raises OSError naming the folder where it
        cannot be written.
        """
        slam = dict(self.slam if slam is None else slam)
        slam.setdefault('offset', OFFSET)
        for part in PARTS:
            if os.path.isdir(str(slam.get(part) or '')):
                copy_part(slam[part], folder, part)
                slam[part] = part
        tensors = to_hf_tensors(self.state_dict(), self.config)
        config_file = os.path.join(folder, 'config.json')
        slam_file = os.path.join(folder, 'slam.json')
        # the three appear one right after the other, the large one first
        with write_atomic(config_file) as about_model, write_atomic(slam_file) as about_units:
            hf = to_hf_config(self.config)
            if slam.get('tokenizer'):
                hf |= dict.fromkeys(('bos_token_id', 'eos_token_id', 'pad_token_id'), slam['end'])
            json.dump(hf, about_model, indent=2)
            json.dump(slam, about_units, indent=2)
            write_tensors(os.path.join(folder, 'model.safetensors'), tensors)


def load_slm(where, sizes=None, seed=0, **options):
    if where == 'scratch':
        options.pop('text', None), options.pop('embed_init', None)
        options.setdefault('rope_theta', 10000.0)
        return SLM(SLMConfig('llama', **sizes, **options), seed)
    if where.startswith('preset:'):
        options.pop('text', None), options.pop('embed_init', None)
        return SLM.from_preset(where.removeprefix('preset:'), seed=seed, **options)
    return SLM.from_pretrained(where, seed=seed, **options)


PARTS = ('encoder', 'vocoder', 'tokenizer')  # folders that a checkpoint may have
ROPE_POSITIONS = 1 << 15  # rows of RoPE's tables: no utterance is longer than 32,768 tokens
LOGITS_AT_ONCE = 1 << 28  # numbers; a vocabulary of units never comes near


def position_limit(config):
    """Tokens of the longest utterance that the model can take."""
    return config.context if config.positions == 'learned' else ROPE_POSITIONS


def rope_tables(config):
    """cos and sin of RoPE's angles by position, as rotate wants them: (ROPE_POSITIONS, R) each, the
    first half of sin negative, fp32; scaled as in Llama 3 or linearly if the config says so."""
    R = int(config.head_dim * config.rotary_share)
    turning = torch.arange(0, R, 2, dtype=torch.float32, device='cpu')
    frequency = config.rope_theta ** (-turning / R)  # radians a token
    scaling = config.rope_scaling or {}
    if rope_kind(scaling) == 'linear':
        frequency = frequency / scaling['factor']
    elif rope_kind(scaling) == 'llama3':
        # full turns within the original context; 0: slow enough to be stretched, 1: kept
        turns = scaling['original_max_position_embeddings'] * frequency / (2 * math.pi)
        low, high = scaling['low_freq_factor'], scaling['high_freq_factor']
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (kept + (1 - kept) / scaling['factor'])
    positions = torch.arange(ROPE_POSITIONS, dtype=torch.float32, device='cpu')
    angles = torch.outer(positions, frequency)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


# -----------------------------------------------------------------------------
# Attention within documents

# On CUDA, of documents without branches in training: 'flex' (flex_attention, block-masked) or
# 'varlen' (flash attention by cumulative lengths). Everything else takes flex.
ATTENTION = 'flex'
VARLEN_TOKENS = 64  # varlen: tokens of a document on average, at least; its lists have fixed length

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
    if groups > 1 and not q.is_cuda:  # the CPU's fused kernel wants equal heads
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=groups > 1 and q.is_cuda
    )


def visibility(doc, branch):
    """Whether token i sees token j: its own document's, from the prompt or its own branch, before
    it. A function of indices (row, head, i, j), as flex_attention takes it."""

    def visible(b, h, i, j):
        seen = (doc[b, i] == doc[b, j]) & (j <= i)
        if branch is None:
            return seen
        return seen & ((branch[b, j] == 0) | (branch[b, j] == branch[b, i]))

    return visible


def attention_within(doc, branch, device, longest):
    """How every layer attends: a function of q, k, v made once a forward.

    doc, branch: (B, T) or None, as in SLM.hidden. longest: tokens of the longest document that is
    to be expected (varlen).
    """
    if doc is None:
        return partial(sdpa, causal=True)
    B, T = doc.shape
    visible = visibility(doc, branch)
    if device.type == 'cuda':
        if ATTENTION == 'varlen' and branch is None and torch.is_grad_enabled():
            return attend_varlen(doc, longest)
        return attend_flex(visible, B, T, device)
    if device.type == 'cpu' and not torch.compiler.is_compiling():
        return partial(attend_pieces, pieces=find_pieces(doc, branch))
    # elsewhere the mask is an ordinary tensor, (B, 1, T, T)
    rows, i = torch.arange(B, device=device)[:, None, None], torch.arange(T, device=device)
    return partial(sdpa, mask=visible(rows, None, i[:, None], i[None, :])[:, None])


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


def attend_varlen(doc, longest):
    """Flash attention by the documents' cumulative lengths, of rows laid end to end."""
    from torch.nn.attention.varlen import varlen_attn

    B, T = doc.shape
    first = F.pad(doc[:, 1:] != doc[:, :-1], (1, 0), value=True).flatten()
    number = first.cumsum(0) - 1  # (B * T,): which document a token is of
    most = max(B, B * T // VARLEN_TOKENS)
    torch._assert_async(number[-1] < most, f'documents shorter than {VARLEN_TOKENS} on average')
    starts = torch.full((most + 1,), B * T, dtype=torch.int32, device=doc.device)
    starts = starts.scatter_reduce(
        0, number, torch.arange(B * T, dtype=torch.int32, device=doc.device), 'amin'
    )

    def attend(q, k, v):
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (B * T, heads, D)
        out = varlen_attn(q, k, v, starts, starts, longest, longest, window_size=(-1, 0))
        return out.unflatten(0, (B, T)).transpose(1, 2)

    return attend


def attend_pieces(q, k, v, pieces):
    """Packed attention as one call an utterance: on a CPU the cost is then the sum of squares, not
    the square of the row.

    pieces: (prompt, start, stop) in the rows laid end to end: that stretch sees itself causally,
    and before it the prompt, a slice, if any.
    """
    B, H, T, D = q.shape
    q, k, v = (x.transpose(1, 2).reshape(1, B * T, -1, D).transpose(1, 2) for x in (q, k, v))
    out = []
    for prompt, start, stop in pieces:
        queries, keys, values = (x[:, :, start:stop] for x in (q, k, v))
        if prompt is None:
            out.append(sdpa(queries, keys, values, causal=True))
            continue
        keys = torch.cat((k[:, :, prompt], keys), dim=2)
        values = torch.cat((v[:, :, prompt], values), dim=2)
        mask = torch.ones(stop - start, keys.shape[2], dtype=torch.bool)
        out.append(sdpa(queries, keys, values, mask=mask.tril(prompt.stop - prompt.start)))
    return torch.cat(out, dim=2).transpose(1, 2).reshape(B, T, H, D).transpose(1, 2)


def find_pieces(doc, branch):
    """The (prompt, start, stop) of attend_pieces from doc and branch (B, T); a prompt and its first
    alternative are one piece."""
    rows = torch.arange(len(doc)).repeat_interleave(doc.shape[1])
    branches = torch.zeros_like(rows) if branch is None else branch.reshape(-1)
    kinds = torch.stack((rows, doc.reshape(-1), branches))
    runs, lengths = torch.unique_consecutive(kinds, dim=1, return_counts=True)
    pieces, start, before = [], 0, None
    for (row, document, _), length in zip(runs.T.tolist(), lengths.tolist(), strict=True):
        stop = start + length
        if (row, document) != before:  # a new utterance, or the prompt of one
            before, prompt = (row, document), slice(start, stop)
            pieces.append((None, start, stop))
        elif pieces[-1] == (None, prompt.start, prompt.stop):  # its first alternative
            pieces[-1] = (None, prompt.start, stop)
        else:
            pieces.append((prompt, start, stop))
        start = stop
    return pieces


# -----------------------------------------------------------------------------
# Generation: how the next token is chosen


class Sampling(NamedTuple):
    """What the options of generate_steps say of each token. Numbers are tensors of shape (): other
    values need no other compilation."""

    temperature: torch.Tensor
    top_p: torch.Tensor  # 1 is off
    repetition_penalty: torch.Tensor
    allowed: torch.Tensor  # (V,) bool: the tokens that may be chosen at all
    may_repeat: torch.Tensor  # (V,) bool: those that may come directly after themselves
    greedy: bool  # the likeliest, whatever the temperature


def pad_left(prompts, vocab_size):
    """Prompts of any lengths side by side, so that all continue at the same column.

    Returns: tokens (B, longest), which tokens a row has seen (B, vocab_size), and how many of its
    columns are padding (B,).
    """
    longest = max(len(prompt) for prompt in prompts)
    tokens = torch.full((len(prompts), longest), PAD)
    seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = prompt
        seen[row, prompt] = True
    return tokens, seen, torch.tensor([longest - len(prompt) for prompt in prompts])


def choose(logits, last, seen, noise, sampling):
    """The next token of each row, (B,).

    logits: (B, V) fp32. last: (B, 1), the tokens before. seen: (B, V) bool, the tokens that the
    repetition penalty is for. noise: as in draw. sampling: Sampling.
    """
    penalty = sampling.repetition_penalty
    penalised = torch.where(logits < 0, logits * penalty, logits / penalty)
    logits = torch.where(seen, penalised, logits)
    repeats = torch.arange(logits.shape[1], device=logits.device) == last  # (B, V)
    banned = ~sampling.allowed | (repeats & ~sampling.may_repeat)
    logits = logits.masked_fill(banned, -torch.inf)
    if sampling.greedy:
        return logits.argmax(-1)
    return draw(logits / sampling.temperature, noise, sampling.top_p)


def draw(logits, noise, top_p):
    """One token a row from softmax(logits) cut to the likeliest and to the smallest set of them
    that holds top_p.

    logits: (B, V). noise: (B, top_k) of Exp(1): argmax(p / noise) falls on each token with its
    probability p. top_p: a number, 1 is off. Returns: (B,)
    """
    logits, ids = logits.topk(noise.shape[1], dim=-1)
    probs = logits.softmax(-1)
    before = probs.cumsum(-1) - probs
    probs = torch.where((before > top_p) & (top_p < 1), 0, probs)
    return ids.gather(1, (probs / noise).argmax(-1, keepdim=True))[:, 0]


# -----------------------------------------------------------------------------
# Families, and the files of an SLM


@dataclass
class SLMConfig:
    """The dimensions of an SLM. A field left at None takes its family's value from FAMILIES."""

    family: str = 'qwen2'  # a name of FAMILIES
    vocab_size: int = 502  # n_units + OFFSET
    n_layer: int = 24
    n_embd: int = 896
    n_head: int = 14
    n_kv_head: int = 2  # grouped-query attention; opt and gpt_neox have none: n_head
    head_dim: int | None = None  # None: n_embd / n_head
    n_ffn: int = 4864
    embed_dim: int | None = None  # None: n_embd; OPT-350M projects 512 -> 1024 -> 512
    context: int = 1024  # tokens; with learned positions a hard limit
    dropout: float = 0.0  # on the residual branches, as OPT has it
    norm: str | None = None  # 'rms' or 'layer'
    norm_eps: float | None = None
    pre_norm: bool | None = None  # False: OPT-350M, norms after each residual and none at the end
    parallel: bool | None = None  # attention and MLP read the same input
    positions: str | None = None  # 'rope' or 'learned'
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # Llama 3's, or linear, as in its config.json
    rotary_share: float | None = None  # of each head's features, what RoPE turns
    qk_norm: bool | None = None  # RMSNorm of each head's query and key
    qkv_bias: bool | None = None
    out_bias: bool | None = None
    mlp_bias: bool | None = None
    act: str | None = None  # a name of ACTIVATIONS
    gated: bool | None = None  # SwiGLU
    tied: bool | None = None  # the head is the embedding

    def __post_init__(self):
        complete_config(self)


POSITION_OFFSET = 2  # OPT's learned positions begin at row 2
ACTIVATIONS = dict(
    relu=F.relu, silu=F.silu, gelu=F.gelu, gelu_new=partial(F.gelu, approximate='tanh')
)

# All that differs between families, one entry each; most say how they differ from Llama. To add a
# family, add an entry; what it alone computes becomes a field of SLMConfig, with the others' value
# in LLAMA, and a line of Block.
KEYS = dict(  # config.json's names of our fields, where most families agree
    vocab_size='vocab_size',
    n_layer='num_hidden_layers',
    n_embd='hidden_size',
    n_head='num_attention_heads',
    n_ffn='intermediate_size',
    context='max_position_embeddings',
    act='hidden_act',
    tied='tie_word_embeddings',
)
LLAMA = dict(
    architecture='LlamaForCausalLM',  # the class of transformers
    becomes=None,  # a family that is only read: the one that it is saved as
    # fields of SLMConfig: what a new model of the family has
    norm='rms',
    norm_eps=1e-6,
    pre_norm=True,
    parallel=False,
    positions='rope',
    rotary_share=1.0,
    qk_norm=False,
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    act='silu',
    gated=True,
    tied=True,
    # config.json: its names of our fields, what leaving one out means, and what else is written
    keys=KEYS
    | dict(
        n_kv_head='num_key_value_heads',
        head_dim='head_dim',
        norm_eps='rms_norm_eps',
        qkv_bias='attention_bias',
        out_bias='attention_bias',
        mlp_bias='mlp_bias',
    ),
    absent=dict(tied=False),
    constant={},
    # the checkpoint's names of our modules; several are joined, so that one product computes them
    prefix='model.',
    layer='layers',
    tensors=dict(
        embed='embed_tokens',
        norm='norm',
        head='lm_head',
        norm1='input_layernorm',
        norm2='post_attention_layernorm',
        qkv=('self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj'),
        out='self_attn.o_proj',
        norm_q='self_attn.q_norm',
        norm_k='self_attn.k_norm',
        up=('mlp.gate_proj', 'mlp.up_proj'),
        down='mlp.down_proj',
    ),
    other_names={},  # beginnings of names in some files
    qkv_by_head=False,  # rows of q, k and v lie head by head
    rope_pairs=False,  # RoPE turns features 2 i and 2 i + 1 together
    units=None,  # what slam.json would say where the family is of unit LMs
)


def without(mapping, *names):
    """A copy of a dict that lacks these keys."""
    return {name: value for name, value in mapping.items() if name not in names}


FAMILIES = dict(
    llama=LLAMA,
    qwen2=LLAMA
    | dict(
        architecture='Qwen2ForCausalLM',
        qkv_bias=True,
        keys=without(LLAMA['keys'], 'head_dim', 'qkv_bias', 'out_bias', 'mlp_bias'),
    ),
    qwen3=LLAMA
    | dict(
        architecture='Qwen3ForCausalLM',
        qk_norm=True,
        keys=without(LLAMA['keys'], 'mlp_bias'),
        absent=dict(tied=False, head_dim=128),
    ),
    # facebook/MobileLLM-125M names a model type and code of its own
    mobilellm=LLAMA | dict(becomes='llama', keys=LLAMA['keys'] | dict(tied='share_embedding')),
    # tiagoCuervo/slm_scaling: unit u is token u, then <S>, then padding
    slm=LLAMA
    | dict(
        becomes='llama',
        keys=dict(
            vocab_size='vocab_size',
            n_layer='n_layers',
            n_embd='dim',
            n_head='n_heads',
            n_kv_head='n_kv_heads',
            n_ffn='hidden_dim',
            context='block_size',
            norm_eps='norm_eps',
        ),
        absent=dict(norm_eps=1e-5),
        prefix='',
        tensors=dict(
            embed='tok_embeddings',
            norm='norm',
            head='output',
            norm1='attention_norm',
            norm2='ffn_norm',
            qkv=('attention.wq', 'attention.wk', 'attention.wv'),
            out='attention.wo',
            up=('feed_forward.w1', 'feed_forward.w3'),
            down='feed_forward.w2',
        ),
        rope_pairs=True,
        units=dict(scoring='units'),
    ),
    opt=LLAMA
    | dict(
        architecture='OPTForCausalLM',
        norm='layer',
        norm_eps=1e-5,
        positions='learned',
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        act='relu',
        gated=False,
        keys=KEYS
        | dict(
            n_ffn='ffn_dim',
            embed_dim='word_embed_proj_dim',
            dropout='dropout',
            pre_norm='do_layer_norm_before',
            act='activation_function',
        ),
        absent=dict(tied=True),
        constant=dict(attention_dropout=0.0, enable_bias=True, _remove_final_layer_norm=False),
        prefix='model.decoder.',
        tensors=dict(
            embed='embed_tokens',
            embed_positions='embed_positions',
            project_in='project_in',
            project_out='project_out',
            norm='final_layer_norm',
            head='lm_head',
            norm1='self_attn_layer_norm',
            norm2='final_layer_norm',
            qkv=('self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj'),
            out='self_attn.out_proj',
            up='fc1',
            down='fc2',
        ),
        other_names={'decoder.': 'model.decoder.'},
    ),
    gpt_neox=LLAMA
    | dict(
        architecture='GPTNeoXForCausalLM',
        norm='layer',
        norm_eps=1e-5,
        parallel=True,
        rotary_share=0.25,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        act='gelu',
        gated=False,
        tied=False,
        keys=KEYS
        | dict(
            norm_eps='layer_norm_eps',
            parallel='use_parallel_residual',
            rope_theta='rotary_emb_base',
            rotary_share='rotary_pct',
        ),
        prefix='gpt_neox.',
        tensors=dict(
            embed='embed_in',
            norm='final_layer_norm',
            head='embed_out',
            norm1='input_layernorm',
            norm2='post_attention_layernorm',
            qkv='attention.query_key_value',
            out='attention.dense',
            up='mlp.dense_h_to_4h',
            down='mlp.dense_4h_to_h',
        ),
        other_names={'lm_head.': 'embed_out.'},  # transformers 5's name for it
        qkv_by_head=True,
    ),
)


def preset(family, n_layer, n_embd, n_head, n_kv_head, n_ffn, context, **more):
    """The arguments as a dict: fields of SLMConfig."""
    sizes = dict(n_layer=n_layer, n_embd=n_embd, n_head=n_head, n_kv_head=n_kv_head, n_ffn=n_ffn)
    return dict(family=family, context=context, **sizes, **more)


SMOL = dict(norm_eps=1e-5, rope_theta=1e5)
PRESETS = {  # Table 7 of the paper, Slam (large)'s base, and a newer one of the first's size
    'qwen2.5-0.5b': preset('qwen2', 24, 896, 14, 2, 4864, 32768, rope_theta=1e6),
    'qwen2.5-1.5b': preset('qwen2', 28, 1536, 12, 2, 8960, 32768, rope_theta=1e6),
    'smollm2-135m': preset('llama', 30, 576, 9, 3, 1536, 8192, **SMOL),
    'mobilellm-125m': preset('llama', 30, 576, 9, 3, 1536, 2048, norm_eps=1e-5),
    'smollm2-360m': preset('llama', 32, 960, 15, 5, 2560, 8192, **SMOL),
    'mobilellm-350m': preset('llama', 32, 960, 15, 5, 2560, 2048, norm_eps=1e-5),
    'opt-125m': preset('opt', 12, 768, 12, 12, 3072, 2048),
    'opt-350m': preset('opt', 24, 1024, 16, 16, 4096, 2048, embed_dim=512, pre_norm=False),
    'pythia-160m': preset('gpt_neox', 12, 768, 12, 12, 3072, 2048),
    'pythia-410m': preset('gpt_neox', 24, 1024, 16, 16, 4096, 2048),
    'qwen3-0.6b': preset('qwen3', 28, 1024, 16, 8, 3072, 40960, head_dim=128, rope_theta=1e6),
}


def find_family(name):
    """The entry of a family. Raises InputError naming those there are."""
    if not isinstance(name, str) or name not in FAMILIES:
        there = [name for name, entry in FAMILIES.items() if not entry['becomes']]
        raise InputError(f'model family {name!r} is not supported: use one of {", ".join(there)}')
    return FAMILIES[name]


def complete_config(config):
    """Fill in what the family says and check the dimensions. Raises InputError."""
    entry = find_family(config.family)
    config.family = entry['becomes'] or config.family
    for name, field in config.__dataclass_fields__.items():
        value = getattr(config, name)
        most = 1000 if name == 'n_layer' else 1 << 24  # what no model exceeds
        if value is None and name in entry:
            setattr(config, name, entry[name])
        elif field.type in (int, int | None) and value is not None and not 1 <= value <= most:
            raise InputError(f'{name} is {value}: expected 1 to {most:,}')
    if 'n_kv_head' not in entry['keys']:
        config.n_kv_head = config.n_head
    if config.act not in ACTIVATIONS:
        raise InputError(
            f'activation {config.act!r} is not supported: use one of {", ".join(ACTIVATIONS)}'
        )
    if config.head_dim is None and config.n_embd % config.n_head:
        raise InputError(f'{config.n_head} heads do not divide width {config.n_embd}')
    if config.n_head % config.n_kv_head:
        raise InputError(f'{config.n_head} heads are no multiple of {config.n_kv_head} kv heads')
    config.head_dim = config.head_dim or config.n_embd // config.n_head
    config.embed_dim = config.embed_dim or config.n_embd
    if config.positions == 'rope' and (config.head_dim % 2 or not 0 <= config.rotary_share <= 1):
        raise InputError(
            f'RoPE cannot turn {config.rotary_share} of the {config.head_dim} features of a head: '
            'expected 0 to 1 of an even number'
        )


def set_positions(config, context, rope_theta):
    """Note another context (tokens) and RoPE theta, where given."""
    if context is not None:
        if context > position_limit(config):
            raise InputError(
                f'context {context} is longer than the {position_limit(config)} '
                f'{config.positions} positions of this {config.family} model'
            )
        if config.positions != 'learned':
            config.context = context
    if rope_theta is not None:
        config.rope_theta = float(rope_theta)


def rope_kind(rope):
    """The kind of RoPE that the dict rope_scaling of a config.json tells of."""
    return rope.get('rope_type', rope.get('type', 'default'))


LLAMA3 = ('factor', 'original_max_position_embeddings', 'low_freq_factor', 'high_freq_factor')
ROPE_KINDS = dict(default=(), linear=('factor',), llama3=LLAMA3)  # and the numbers each needs


def check_rope(rope):
    """Raises InputError where the RoPE of a config.json is of a kind that SLM has not, or lacks a
    number."""
    kind = rope_kind(rope) if isinstance(rope, dict) else rope
    if not isinstance(kind, str) or kind not in ROPE_KINDS:
        raise InputError(f'RoPE scaling {kind!r} is not supported: use {", ".join(ROPE_KINDS)}')
    optional = [key for key in ('rope_theta', 'partial_rotary_factor') if key in rope]
    for key in (*ROPE_KINDS[kind], *optional):
        if not isinstance(rope.get(key), int | float) or not rope[key] > 0:
            raise InputError(f'config.json: RoPE ({kind}) needs {key} > 0, not {rope.get(key)!r}')


def from_hf_config(hf):
    """SLMConfig from the dict of a transformers config.json. Raises InputError for a family or a
    feature that SLM does not have, and for values that are none."""
    entry = find_family(hf.get('model_type'))
    # transformers 5 writes the former, 4 the latter
    rope = hf.get('rope_parameters') or hf.get('rope_scaling') or {}
    check_rope(rope)
    for key in ('use_sliding_window', 'layer_sharing', '_remove_final_layer_norm'):
        if hf.get(key):
            raise InputError(f'{key}={hf[key]} in config.json is not supported')
    # sliding_window itself says nothing: without one of these transformers, too, attends to all
    if 'sliding_attention' in (hf.get('layer_types') or ()):
        raise InputError('config.json has layer_types with a sliding window: not supported')

    fields = dict(entry['absent'])
    for ours, theirs in entry['keys'].items():
        kind, value = SLMConfig.__dataclass_fields__[ours].type, hf.get(theirs)
        if value is None:
            continue
        if kind in (float, float | None):
            kind |= int
        if not isinstance(value, kind):
            raise InputError(f'config.json has {theirs}={value!r}, which is no such value')
        fields[ours] = value
    missing = {'n_layer', 'n_embd', 'n_head', 'vocab_size'} - set(fields)
    if missing:
        raise InputError(f'config.json lacks {entry["keys"][min(missing)]}')
    fields.setdefault('n_kv_head', fields['n_head'])
    hidden = -(-int(8 * fields['n_embd'] / 3) // 256) * 256  # Llama's rule, for slm
    fields.setdefault('n_ffn', hidden)
    theta = rope.get('rope_theta') or hf.get('rope_theta') or fields.get('rope_theta')
    fields['rope_theta'] = float(theta or 10000.0)
    if rope_kind(rope) != 'default':
        fields['rope_scaling'] = without(rope, 'rope_theta')
    if 'rotary_share' in entry['keys'] and 'partial_rotary_factor' in rope:
        fields['rotary_share'] = rope['partial_rotary_factor']
    return SLMConfig(hf['model_type'], **fields)


def to_hf_config(config):
    """The dict of a config.json that transformers opens (4.x and 5.x read these keys)."""
    entry = FAMILIES[config.family]
    ours = [name for name in config.__dataclass_fields__ if name in entry['keys']]
    hf = {entry['keys'][name]: getattr(config, name) for name in ours}
    if config.positions == 'rope':
        hf |= dict(rope_theta=config.rope_theta, rope_scaling=config.rope_scaling)
    return hf | dict(
        architectures=[entry['architecture']],
        model_type=config.family,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        **entry['constant'],
    )


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
        raise InputError(
            f'{where!r} is no folder, and the hub did not give it ({type(error).__name__}): '
            f'download it elsewhere and pass the folder'
        ) from None


PUBLIC_UNITS = dict(encoder='mhubert25', vocoder='hifigan25', frame_rate=25.0, dedup=True)


def read_description(folder, where):
    """What a checkpoint's json files say: the text LM's own config.json, the prefix of the tensors'
    names, and slam: None for a text LM. Parts beside slam.json are named by their full path; a path
    that leads elsewhere is not followed."""
    hf, prefix = read_json(os.path.join(folder, 'config.json')), ''
    hf |= hf.get('model_args') or {}  # slm_scaling
    slam = FAMILIES.get(str(hf.get('model_type')), LLAMA)['units']
    if hf.get('model_type') == 'speech_language_model':  # slprl/slam and the like
        if not isinstance(hf.get('base_config'), dict):
            raise InputError(f"{where}: config.json has no base_config, the text LM's own config")
        base, size = hf.get('base_model_name'), hf.get('vocab_size')
        hf, prefix, slam = hf['base_config'] | {'vocab_size': size}, 'lm.', {}
        if isinstance(size, int) and size > 20_000:  # no vocabulary of units is so large
            slam = describe_sims(folder, where, base, size)
    if 'offset' in hf:  # TWIST
        slam = {}
    if slam is not None:
        slam = PUBLIC_UNITS | slam
    if os.path.exists(os.path.join(folder, 'slam.json')):  # ours
        slam = read_json(os.path.join(folder, 'slam.json'))
        for part in PARTS:
            name = str(slam.get(part) or '')
            if os.path.isdir(os.path.join(folder, os.path.basename(name) or '?')):
                slam[part] = os.path.abspath(os.path.join(folder, os.path.basename(name)))
            elif os.path.isabs(name) or '..' in name:
                slam[part] = None
    return hf, prefix, slam


def read_tokenizer(folder):
    """(tokenizer, end, digest) of a text LM's folder: a tokenizers.Tokenizer to which the names of
    special tokens are text like any other, the token that ends a document, and the SHA-256 of
    tokenizer.json. No code of the folder is run. Raises InputError where there is none."""
    import hashlib

    from tokenizers import Tokenizer

    path = os.path.join(folder, 'tokenizer.json')
    read_json(path)
    with open(path, 'rb') as file:
        content = file.read()
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:
        raise InputError(f'{path} cannot be read: {" ".join(str(error).split())[:200]}') from None
    tokenizer.encode_special_tokens = True
    eos = read_json(os.path.join(folder, 'tokenizer_config.json')).get('eos_token')
    end = tokenizer.token_to_id(eos.get('content') if isinstance(eos, dict) else str(eos))
    if end is None:
        raise InputError(f'{folder}: tokenizer_config.json names no eos_token of tokenizer.json')
    return tokenizer, end, hashlib.sha256(content).hexdigest()


def describe_sims(folder, where, base, size):
    """What slam.json would say of a public interleaved model (slprl/SIMS-7B, ...): after the tokens
    of its text LM's tokenizer come the units, `<speech>` and `<text>`. An utterance is scored as
    its units alone, behind what the tokenizer puts before all text (Llama's begin of text)."""
    try:
        if not os.path.exists(os.path.join(folder, 'tokenizer.json')):
            folder = find_checkpoint(str(base), tensors=False)
        tokenizer, end, _ = read_tokenizer(folder)
    except InputError as error:
        raise InputError(
            f'{where} has a vocabulary of {size:,}, that of an interleaved speech-text model, and '
            f'its tokenizer is missing ({error}): copy tokenizer.json and tokenizer_config.json of '
            f'its text LM, {base}, into its folder'
        ) from None
    first = tokenizer.token_to_id('<Un0>') or tokenizer.get_vocab_size()
    prefix = [token for token in tokenizer.encode('').ids if token != end]
    slam = dict(n_units=size - 2 - first, offset=first, end=end, prefix=prefix, scoring='units')
    return slam | dict(tokenizer=os.path.abspath(folder), text_lm=base)


def check_data_fit(size, wanted, slam, folder, where, text):
    """Raises InputError where a model cannot hold the units of the data that it is to learn from,
    or differs from them in its text.

    size: rows of its embedding. wanted, text: vocabulary and meta.json of the data, None if it is
    only to be loaded, or if they hold no text. folder: where `where` lies.
    """
    interleaved = slam is not None and bool(slam.get('tokenizer'))
    if wanted is None:
        return
    if not (text or interleaved):
        if slam is not None and wanted > size:
            raise InputError(
                f'{where} has a vocabulary of {size}, which cannot hold the {wanted - OFFSET} '
                f'units of the data'
            )
        return
    if slam is not None and bool(text) != interleaved:
        has = ('units alone', 'text and units')
        raise InputError(
            f'{where} is a model of {has[interleaved]}, the data hold {has[bool(text)]}: start '
            'from a text LM, or prepare the data with --text_lm'
        )
    old = slam['offset'] if interleaved else size
    known = read_tokenizer(slam['tokenizer'] if interleaved else folder)[2], old
    if known != (text['tokenizer_sha256'], text['offset']) or interleaved and wanted != size:
        raise InputError(
            f'{where} and the data have different tokenizers or vocabularies: start from '
            f'{text["text_lm"]}, for which the data were made, or make them for another --text_lm'
        )


def token_order(hf, vocab_size):
    """Which of a checkpoint's tokens each of ours is: PAD, `<S>`, units. None: they are equal."""
    if 'offset' in hf:  # TWIST: unit u is token u + offset
        bos, pad = hf.get('bos_token_id'), hf.get('pad_token_id') or 0
        bos = bos if isinstance(bos, int) and bos < hf['offset'] else 0
        return torch.tensor([min(pad, vocab_size - 1), bos, *range(hf['offset'], vocab_size)])
    if FAMILIES[hf['model_type']]['units']:  # slm_scaling: the units, <S>, padding
        return torch.tensor([vocab_size - 1, vocab_size - 2, *range(vocab_size - 2)])
    return None


def twist_rows(old, vocab_size, embed_init, seed, where):
    """The rows (vocab_size, C) with which a unit embedding begins, out of the text LM's (V, C)."""
    if embed_init == 'first_rows':
        if vocab_size > len(old):
            raise InputError(
                f'{where} has {len(old)} embedding rows, too few for {vocab_size}: '
                f'use embed_init=random or mean'
            )
        return old[:vocab_size].clone()
    if embed_init == 'mean':
        return old.float().mean(0, keepdim=True).repeat(vocab_size, 1)
    if embed_init == 'random':
        generator = torch.Generator().manual_seed(seed)
        return torch.empty(vocab_size, old.shape[1]).normal_(std=0.02, generator=generator)
    raise InputError(f'embed_init {embed_init!r} is unknown: use first_rows, random or mean')


def tensor_layout(config, entry):
    """Where our tensors lie in a checkpoint of the family: {our name: [(their name, shape), ...]},
    to be joined along the first dimension. Biases follow their weights."""
    with torch.device('meta'):
        state = SLM(config).state_dict()
    queries, keys = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    # rows of the parts, by how many there are: q, k, v; gate, up
    rows = {3: (queries, keys, keys), 2: (config.n_ffn, config.n_ffn)}
    layout = {}
    for name, tensor in state.items():
        *path, module, kind = name.split('.')
        theirs = entry['tensors'][module]
        theirs = theirs if isinstance(theirs, tuple) else (theirs,)
        prefix = '' if module == 'head' else entry['prefix']
        if path:
            prefix += f'{entry["layer"]}.{path[1]}.'
        layout[name] = [
            (f'{prefix}{one}.{kind}', (size, *tensor.shape[1:]))
            for one, size in zip(theirs, rows.get(len(theirs), tensor.shape), strict=False)
        ]
    if config.tied:
        del layout['head.weight']
    return layout


# buffers that old files carry
OBSOLETE = ('rotary_emb.inv_freq', 'attention.bias', 'attention.masked_bias', 'decoder.version')


def proper_names(tensors, config, entry, prefix=''):
    """A file's tensors that count, under the family's own names."""
    found = {}
    for name, tensor in tensors.items():
        if name.endswith(OBSOLETE):
            continue
        name = name.removeprefix(prefix)
        for other, usual in entry['other_names'].items():
            if name.startswith(other):
                name = usual + name.removeprefix(other)
        found[name] = tensor
    head = f'{entry["tensors"]["head"]}.weight'
    if config.tied and head in found:  # it is the embedding; a file may hold either, or both
        embed = f'{entry["prefix"]}{entry["tensors"]["embed"]}.weight'
        found.setdefault(embed, found.pop(head))
    return found


def tensor_files(folder):
    """The paths of a checkpoint's tensors: model.safetensors, pytorch_model.bin, or shards."""
    for name in ('model.safetensors', 'pytorch_model.bin'):
        path, index = os.path.join(folder, name), os.path.join(folder, name + '.index.json')
        if os.path.exists(index):
            shards = read_json(index).get('weight_map') or {}
            names = sorted({os.path.basename(str(shard)) for shard in shards.values()})
            return [os.path.join(folder, name) for name in names]
        if os.path.exists(path):
            return [path]
    raise InputError(
        f'{folder} has no model.safetensors (or pytorch_model.bin): is it a checkpoint?'
    )


def read_tensors(path):
    """The tensors of a file by name. Pickles are read with weights_only: no code runs."""
    from safetensors.torch import load_file

    try:
        if path.endswith('.safetensors'):
            return load_file(path)
        return torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:
        reason = ' '.join(str(error).split())[:200]
        raise InputError(f'{path} cannot be read: {reason}') from None


def check_shapes(state, layout, config, where):
    """Hold a file's tensors against the layout. Raises InputError naming those that do not fit."""
    wanted = dict(part for parts in layout.values() for part in parts)
    problems = []
    for word, names in (('misses', wanted.keys() - state), ('has unknown', state.keys() - wanted)):
        if names:
            some = ', '.join(sorted(names)[:4]) + (', ...' if len(names) > 4 else '')
            problems.append(f'{word} {len(names)} ({some})')
    if problems:
        raise InputError(
            f'{where}: the checkpoint {" and ".join(problems)} tensors of a {config.family} model'
        )
    for name, shape in wanted.items():
        if tuple(state[name].shape) != tuple(shape):
            raise InputError(
                f'{where}: {name} has shape {tuple(state[name].shape)}, '
                f'config.json says {tuple(shape)}'
            )


def load_state(folder, config, entry, prefix=''):
    """The state dict of an SLM out of a checkpoint's files; names and shapes are held against the
    config before a model is made. Raises InputError naming what does not fit."""
    tensors = {}
    for path in tensor_files(folder):
        tensors |= read_tensors(path)
    state = proper_names(tensors, config, entry, prefix)
    check_shapes(state, tensor_layout(config, entry), config, folder)
    return to_our_tensors(state, config, entry)


def regroup(tensor, config, first, second):
    """Rows in groups (first, second, head_dim) -> (second, first, head_dim)."""
    return tensor.view(first, second, config.head_dim, -1).transpose(0, 1).reshape(tensor.shape)


def pair_to_halves(tensor, config):
    """Rows of queries or keys for RoPE on features 2 i and 2 i + 1 -> on i and i + head_dim / 2."""
    pairs = tensor.view(-1, config.head_dim // 2, 2, tensor.shape[-1])
    return pairs.transpose(1, 2).reshape(tensor.shape)


def to_our_tensors(state, config, entry):
    """Tensors under the family's names -> ours, joined."""
    ours = {}
    for name, parts in tensor_layout(config, entry).items():
        tensors = [state[theirs] for theirs, _ in parts]
        if '.qkv.' in name and entry['rope_pairs']:
            tensors[:2] = (pair_to_halves(tensor, config) for tensor in tensors[:2])
        if '.qkv.' in name and entry['qkv_by_head']:
            tensors = [regroup(tensors[0], config, config.n_head, 3)]
        ours[name] = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
    return ours


def to_hf_tensors(state, config):
    """Our tensors -> under the family's own names, apart again, contiguous and on the CPU."""
    entry, out = FAMILIES[config.family], {}
    for name, parts in tensor_layout(config, entry).items():
        tensor = state[name].detach().cpu()
        if '.qkv.' in name and entry['qkv_by_head']:
            tensor = regroup(tensor, config, 3, config.n_head)
        pieces = tensor.split([shape[0] for _, shape in parts])
        for (theirs, _), piece in zip(parts, pieces, strict=True):
            out[theirs] = piece.contiguous()
    return out


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


# -----------------------------------------------------------------------------
# Audio

HOP, WINDOW, N_FFT, N_MELS = 160, 400, 512, 64  # at 16 kHz: 10 ms, 25 ms; 64 bands leave no gaps


def load_audio(
    path, sample_rate=SAMPLE_RATE, start=0.0, seconds=None, keep_partial=False, notes=None
):
    """Read a sound file, mix it to mono and resample it: (samples,) float32, full scale 1.

    path: a name or a binary file object. start, seconds: the part that is decoded. notes: a list
    that receives a line for each doubt: channels that cancel (the louder one is taken), a decoder
    that stopped early, digital silence. Raises InputError for a missing, unreadable, empty or,
    without keep_partial, truncated file, and for samples that are not finite.
    """
    import soundfile

    name, notes = getattr(path, 'name', path), [] if notes is None else notes
    if not hasattr(path, 'read') and not os.path.isfile(path):
        raise InputError(f'{name}: no such audio file')
    source = path if hasattr(path, 'read') else os.fsencode(path)  # names need not be UTF-8
    with reading(name), soundfile.SoundFile(source) as file:
        rate, total, begin = file.samplerate, file.frames, round(start * file.samplerate)
        # libsndfile corrects the length of a truncated .wav, .aiff or .au; pipes write 2^31 or more
        cut = re.search(r'(?:data|SSND|Data Size) *: (\d+) \(should be (\d+)\)', file.extra_info)
        if cut and int(cut[1]) < 0x7FFF0000:
            total = max(total, total * int(cut[1]) // max(1, int(cut[2])))
        count = min(total - begin, math.inf if seconds is None else round(seconds * rate))
        samples, energies, error = decode(file, begin, count)
        # the mix of n unrelated channels has 1/n of their mean energy
        if energies[-1] < 0.1 * energies[:-1].mean() / file.channels:
            notes.append('channels cancel: one of them taken')
            samples, _, error = decode(file, begin, count, int(energies[:-1].argmax()))
    if not samples:
        raise InputError(f'{name} holds no samples at {start:g} s' + (error and f' ({error})'))
    wave = torch.frombuffer(samples, dtype=torch.float32)
    lowest, highest = map(float, torch.aminmax(wave))
    if not (lowest > -1e6 and highest < 1e6):  # NaN fails too
        raise InputError(f'{name} holds NaN, infinite or very large samples')
    # lossy formats estimate their length, streams do not know it (2^63 - 1)
    if error or len(wave) < count - 0.1 * rate < 1e14:
        notes.append(f'stopped early at {len(wave) / rate:.1f} of {count / rate:.1f} s')
        if not keep_partial:
            raise InputError(f'{name}: the decoder {notes[-1]}' + (error and f' ({error})'))
    if highest - lowest < 1e-4:
        notes.append('digital silence')
    return resample(wave, rate, sample_rate)


def decode(file, begin, count, channel=None):
    """`count` frames of an open sound file, in blocks, so that hours of sound are in memory once.

    -> the mix or one channel, a bytearray of float32; the energies of the channels and of that;
    what stopped the decoder, or ''.
    """
    samples, energies = bytearray(), np.zeros(file.channels + 1)
    try:
        file.seek(min(begin, file.frames))
        while count > 0 and len(block := file.read(4096, dtype='float32', always_2d=True)[:count]):
            mono = block.mean(axis=1) if channel is None else block[:, channel]
            energies += *np.square(block).sum(0), np.square(mono).sum()
            samples += mono.tobytes()
            count -= len(block)
    except (RuntimeError, OSError) as error:
        return samples, energies, ' '.join(str(error).split()) or 'damaged'
    return samples, energies, ''


def save_audio(path, wave, sample_rate=SAMPLE_RATE):
    """Write (samples,) as 16-bit wav or flac, complete or not at all, scaled down if it clips."""
    import soundfile

    wave = torch.as_tensor(wave).detach().float().cpu()
    wave = wave * min(1, 0.99 / max(float(wave.abs().max()), 0.99)) if len(wave) else wave
    buffer = io.BytesIO()  # soundfile's own errors do not mention a full disk
    kind = 'FLAC' if str(path).endswith('.flac') else 'WAV'
    soundfile.write(buffer, wave.numpy(), sample_rate, subtype='PCM_16', format=kind)
    with write_atomic(path, 'wb') as file:
        file.write(buffer.getbuffer())


@lru_cache(16)
def transform(name, *args, **options):
    """A module of torchaudio.transforms, made once for each choice of arguments."""
    import torchaudio  # a second to import

    return getattr(torchaudio.transforms, name)(*args, **options)


def resample(wave, rate, wanted):
    """(samples,) at `rate` Hz -> (ceil(samples * wanted / rate),) at `wanted` Hz, float32."""
    wave = torch.as_tensor(wave, dtype=torch.float32)
    return wave if rate == wanted or not len(wave) else transform('Resample', rate, wanted)(wave)


def dedup(units):
    """Collapse runs of equal units: (frames,) -> units (n,), and the frames of each (n,), long."""
    return torch.unique_consecutive(torch.as_tensor(units, dtype=torch.long), return_counts=True)


def mel_filters():
    return transform('MelScale', N_MELS, SAMPLE_RATE, n_stft=N_FFT // 2 + 1).fb  # (bins, N_MELS)


def log_mel(wave):
    """Natural log of mel energies: (samples,) at 16 kHz -> (max(1, samples // 160), N_MELS).

    Frame t describes samples 160 t ... 160 t + 159: its 400-sample Hann window is centred on
    160 t + 80, with zeros outside the wave. Values are at least log(1e-7) = -16.
    """
    frames, side = max(1, len(wave) // HOP), (N_FFT - HOP) // 2
    wave, parts = F.pad(wave, (side, side + max(0, HOP - len(wave)))), []
    for first in range(0, frames, 6000):  # a minute at a time
        last = min(frames, first + 6000) - 1
        spectra = transform('Spectrogram', N_FFT, WINDOW, HOP, power=None, center=False)(
            wave[first * HOP : last * HOP + N_FFT]
        )
        power = spectra.real.square() + spectra.imag.square()  # (bins, frames)
        parts.append(power.T @ mel_filters())
    return torch.cat(parts).clamp_(min=1e-7).log_()


# -----------------------------------------------------------------------------
# UnitEncoder: wave -> units

TWIST = 'https://dl.fbaipublicfiles.com/textless_nlp/twist/speech_tokenizer/'
KMEANS = dict(  # published centroids: where, and their sha256 (of hubert50's not known)
    mhubert25=(
        TWIST + 'mhubert_base_25hz_cp_mls_cv_sp_fisher_L11_km500.bin',
        '03cc04a9c24fec4285e73e709c485756d8f116aa8e724eac555de6a7cf8d28ad',
    ),
    hubert50=('https://dl.fbaipublicfiles.com/hubert/hubert_base_ls960_L9_km500.bin', None),
)
ENCODERS = dict(  # pad: zeros added at each end of the wave
    mfcc=dict(kind='mfcc', n_cep=13, lifter=0.3, c0=0.4, range=9.0, switch=1.0, vocoder='vocoder'),
    mhubert25=dict(model='slprl/mhubert-base-25hz', layer=11, pad=40, vocoder='hifigan25'),
    hubert50=dict(model='facebook/hubert-base-ls960', layer=9, pad=0, vocoder=None),
)
SMALL_NET = 100 << 20  # bytes: a local net up to this size is saved with its encoder


class UnitEncoder:
    """Speech to units: features at 25 or 50 frames a second, of each the nearest of n centroids.

    Features are a layer of HuBERT, wav2vec 2 or WavLM (kind 'hubert') or cepstra ('mfcc', offline).
    With `switch`, neighbours share a unit unless a change gains more than `switch` times
    `distortion`, the mean squared distance to the centroids (Kamper & van Niekerk 2021, eq. 2).
    """

    def __init__(self, config, centroids=None, device='cpu', net=None):
        self.config, self.net, self.device = dict(config), net, torch.device('cpu')
        self.frame_rate = 25.0
        if config['kind'] == 'hubert':
            self.device = pick_device(device)
            self.net = (net or load_net(config['model'], config['layer'])).to(self.device)
            strides, kernels = self.net.config.conv_stride, self.net.config.conv_kernel
            # samples from one frame to the next, samples that one frame covers
            self.hop = math.prod(strides)
            self.reach = 1 + sum((k - 1) * math.prod(strides[:i]) for i, k in enumerate(kernels))
            self.frame_rate = SAMPLE_RATE / self.hop
            # seconds that are processed at once; WavLM's attention takes memory
            self.stretch = 100 if self.net.config.model_type == 'wavlm' else 300
        self.config['frame_rate'] = self.frame_rate
        self.centroids = None if centroids is None else centroids.to(self.device)  # None: to fit
        self.name, self.vocoder = self.config['name'], self.config.get('vocoder')

    @classmethod
    def from_pretrained(cls, where, layer=None, kmeans=None, device='cpu'):
        """Load an encoder, with its centroids if it has some.

        where: a folder of save_pretrained; 'mhubert25' or 'hubert50'; a folder or hub name of any
        HuBERT, wav2vec 2 or WavLM, with `layer`; or 'mfcc'. kmeans: a file of centroids; '': none,
        they are to be fitted. Raises InputError for what is missing, damaged or does not match.
        """
        where, centroids, net = str(where).rstrip('/'), None, None
        saved = os.path.exists(os.path.join(where, 'encoder.json'))
        if saved:
            config, centroids, net = read_encoder(where)
            if layer not in (None, config.get('layer')):
                raise InputError(f'{where} uses layer {config.get("layer")}, not {layer}')
        elif where in ENCODERS:
            config = dict(kind='hubert', name=where) | ENCODERS[where]
        elif layer is None:
            names = ', '.join(ENCODERS)
            raise InputError(f'no encoder {where!r}: use {names}, a folder of one, or set --layer')
        else:
            model = os.path.abspath(where) if os.path.isdir(where) else where
            config = dict(kind='hubert', name=os.path.basename(model), model=model, pad=0)
            config['vocoder'] = 'vocoder'
        public = where in KMEANS and kmeans is None and layer in (None, config['layer'])
        if layer is not None:
            config['layer'] = layer
        if kmeans or public:
            centroids = read_kmeans(kmeans or fetch(*KMEANS[where]))
            config |= dict(encoder_id=where if public else None, distortion=0.0)
        encoder = cls(config, centroids, device, net)
        if saved and encoder.vocoder == 'vocoder':
            encoder.vocoder = os.path.join(os.path.dirname(os.path.abspath(where)), 'vocoder')
        return encoder

    def save_pretrained(self, folder):
        """Write encoder.json and encoder.safetensors. A net from a local folder is included if it
        has at most SMALL_NET bytes; any other is kept by name or path."""
        config = dict(self.config, n_units=self.n_units, encoder_id=self.encoder_id)
        tensors = dict(centroids=self.centroids)
        weights = self.net.state_dict() if self.net else {}
        small = sum(tensor.nbytes for tensor in weights.values()) <= SMALL_NET
        if weights and ('net' in config or (os.path.isdir(config['model']) and small)):
            config['net'] = json.loads(self.net.config.to_json_string(use_diff=False))
            tensors |= {f'net.{name}': tensor for name, tensor in weights.items()}
        write_part(folder, 'encoder', config, tensors)

    @property
    def n_units(self):
        return 0 if self.centroids is None else len(self.centroids)

    @property
    def encoder_id(self):
        """What the units depend on: the name of a public encoder with its published centroids, else
        a hash of the settings, the centroids and the net."""
        config = self.config
        if config.get('encoder_id') in KMEANS and not config.get('switch'):
            return config['encoder_id']
        keys = ['layer', 'pad'] if self.net else ['n_cep', 'lifter', 'c0', 'range']
        keys += ['switch', 'distortion'] if config.get('switch') else []
        settings = [float(config.get(key, 0)) for key in keys]
        # without a mask that is random, and the weight norm, which each machine rounds in its way
        weights = sorted(self.net.state_dict().items()) if self.net else []
        unsure = ('masked_spec_embed', 'encoder.pos_conv_embed.conv.weight')
        weights = [tensor.flatten() for name, tensor in weights if name not in unsure]
        return f'{config["kind"]}-{content_hash(settings, self.centroids, *weights)[:12]}'

    @torch.inference_mode()
    def features(self, wave):
        """(samples,) at 16 kHz -> (frames, D) float32, at least one frame."""
        wave = torch.as_tensor(wave, dtype=torch.float32)
        return self._hidden_states(wave) if self.net else mfcc(wave, self.config)

    def encode(self, wave):
        """(samples,) at 16 kHz -> (frames,) long units on the CPU. Raises as `assign`."""
        return self.assign(self.features(wave))

    @torch.inference_mode()
    def assign(self, features):
        """(frames, D) -> (frames,) long units on the CPU.

        Raises InputError without centroids, for centroids of another width, and for `switch`
        without `distortion`.
        """
        switch, distortion = (self.config.get(key) for key in ('switch', 'distortion'))
        if self.centroids is None or features.shape[1] != self.centroids.shape[1]:
            raise InputError(f'{self.name} has no k-means for {features.shape[1]} features')
        if switch and not distortion:
            raise InputError(f'{self.name}: `switch` needs `distortion`, the mean squared distance')
        costs = self._costs(features)
        if not switch:
            return costs.argmin(1).cpu()
        return torch.from_numpy(cheapest_path(costs.cpu().numpy(), switch * distortion / 2))

    @torch.inference_mode()
    def distance(self, features):
        """Mean squared distance of frames (T, D) to their centroids, for `distortion`."""
        return float((2 * self._costs(features).amin(1) + features.square().sum(1)).mean())

    def _costs(self, features):
        """Half the squared distances (T, n_units), minus what all units of a frame share."""
        return self.centroids.square().sum(1) / 2 - features @ self.centroids.T

    def _hidden_states(self, wave):
        """transformers' hidden_states[layer] of the raw wave, float32 (on CUDA with TF32 products).

        Longer recordings than `stretch` are cut into parts that see a tenth of it on either side.
        """
        pad, precision = self.config['pad'], torch.get_float32_matmul_precision()
        wave = F.pad(wave, (pad, max(pad, self.reach - pad - len(wave)))).to(self.device)
        frames, parts = (len(wave) - self.reach) // self.hop + 1, []
        longest = int(self.stretch * self.frame_rate)
        context = longest // 10 if frames > longest else 0
        step = longest - 2 * context
        torch.set_float32_matmul_precision('high' if self.device.type == 'cuda' else precision)
        for start in range(0, frames, step):
            first, last = max(0, start - context), min(frames, start + step + context)
            end = None if last == frames else (last - 1) * self.hop + self.reach
            hidden = self.net(wave[None, first * self.hop : end]).last_hidden_state[0]
            parts.append(hidden[start - first :][:step])
        torch.set_float32_matmul_precision(precision)
        return torch.cat(parts)


@lru_cache(4)
def cepstral_basis(n_cep, lifter, c0):
    """Cosines with weights: (N_MELS, n_cep)."""
    from torchaudio.functional import create_dct

    weight = torch.arange(n_cep).clamp(min=1) ** lifter / 2**0.5
    weight[0] = c0
    return create_dct(n_cep, N_MELS, 'ortho') * weight


def mfcc(wave, config):
    """Two 20 ms cepstra a frame of 40 ms, of the log-mel spectrum relative to the loudness of the
    utterance: (samples,) -> (max(1, samples // 640), 2 n_cep)."""
    mel = log_mel(F.pad(wave, (0, 4 * HOP - len(wave))) if len(wave) < 4 * HOP else wave)
    mel = mel[: len(mel) // 4 * 4]
    energy = torch.logsumexp(mel, 1) - math.log(N_MELS)
    loud = energy.sort().values[int(0.95 * (len(energy) - 1))].clamp(min=-7)  # -7 is silence
    relative = (mel + (config['range'] - loud)).clamp_(min=0)
    halves = relative.view(-1, 2, 2, N_MELS).mean(2)  # 20 ms each, two a frame
    return (halves @ cepstral_basis(*(config[key] for key in ('n_cep', 'lifter', 'c0')))).flatten(1)


def cheapest_path(costs, price):
    """The units (T,) with the least sum of costs (T, n_units) and `price` a change (Viterbi).

    A path that changes its unit at t comes from the unit that was cheapest at t - 1, so that one
    number a frame and one bit a unit describe all paths.
    """
    total = np.zeros_like(costs[0])  # of the best path that ends in each unit
    source, changed = np.zeros(len(costs), dtype=int), np.zeros(costs.shape, dtype=bool)
    for t, cost in enumerate(costs):
        source[t] = total.argmin()
        total -= total[source[t]]
        changed[t] = total > price
        total = np.minimum(total, total.dtype.type(price)) + cost
    path, unit = np.zeros(len(costs), dtype=int), total.argmin()
    for t in reversed(range(len(costs))):
        path[t] = unit
        unit = source[t] if changed[t, unit] else unit
    return path


# -----------------------------------------------------------------------------
# Files of encoders and vocoders; they may come from strangers


def write_part(folder, name, config, tensors):
    """Write name.safetensors and name.json, each complete or not at all."""
    from safetensors.torch import save

    tensors = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
    with write_atomic(os.path.join(folder, name + '.safetensors'), 'wb') as file:
        file.write(save(tensors))
    with write_atomic(os.path.join(folder, name + '.json')) as file:
        json.dump(config, file, indent=2)


def read_encoder(folder):
    """-> configuration, centroids (n_units, D), net or None, of a folder of save_pretrained."""
    from safetensors.torch import load_file

    config, net = read_json(os.path.join(folder, 'encoder.json')), None
    with reading(folder):
        tensors = load_file(os.path.join(folder, 'encoder.safetensors'))
        centroids = tensors.pop('centroids').float()
        right = (
            centroids.ndim == 2
            and len(centroids) == config['n_units']
            and centroids.isfinite().all()
        )
        if config['kind'] not in ('mfcc', 'hubert') or not right:
            raise ValueError('encoder.json does not fit encoder.safetensors')
        if config.get('vocoder') not in (None, 'vocoder', 'hifigan25'):  # no path is followed
            raise ValueError(f'`vocoder` {config["vocoder"]!r} is not allowed')
        if config.get('net'):
            weights = {name[4:]: tensor for name, tensor in tensors.items()}
            net = load_net(config['net'], config['layer'], weights)
    # folders of earlier versions do not name their encoder
    known = config['name'] in KMEANS and 'fitted' not in config
    config.setdefault('encoder_id', config['name'] if known else None)
    return config, centroids, net


def load_net(source, layer, weights=None):
    """transformers' HuBERT, wav2vec 2 or WavLM up to a layer, without a last norm after it.

    source: a folder or hub name, or, with weights, the values of its config.json. Raises InputError
    for other nets, missing layers and missing tensors.
    """
    from transformers import AutoConfig, AutoModel, logging

    if weights is None:
        local = cache_path(os.path.basename(source))
        try:
            source = find_checkpoint(local if os.path.isdir(local) else source)
        except InputError as error:
            raise InputError(f'{error} (a copy may be put in {local})') from None
    with reading(source if weights is None else 'the net of encoder.json'):
        hf = (
            AutoConfig.from_pretrained(source)
            if weights is None
            else AutoConfig.for_model(**source)
        )
        nets = ('hubert', 'wav2vec2', 'wavlm')
        if hf.model_type not in nets or not 0 <= layer <= hf.num_hidden_layers:
            raise ValueError(f'layer {layer} of a {hf.model_type} of {hf.num_hidden_layers} layers')
        hf.num_hidden_layers, hf.add_adapter = layer, False
        if weights is None:
            logging.set_verbosity_error()  # it would list each tensor of the layers above
            logging.disable_progress_bar()
            options = dict(dtype=torch.float32, output_loading_info=True)
            net, report = AutoModel.from_pretrained(source, config=hf, **options)
            if lost := sorted(set(report['missing_keys']) - {'masked_spec_embed'}):
                raise ValueError(f'{len(lost)} tensors are missing, such as {lost[0]}')
        else:
            with torch.device('meta'):  # no memory before the tensors fit
                net = AutoModel.from_config(hf)
        conv = net.encoder.pos_conv_embed.conv
        if nn.utils.parametrize.is_parametrized(conv):  # fold the weight norm
            nn.utils.parametrize.remove_parametrizations(conv, 'weight')
        if weights is not None:
            net.load_state_dict(weights, assign=True)
    if hf.do_stable_layer_norm:  # the norm after the last layer is not part of hidden_states
        net.encoder.layer_norm.register_forward_hook(lambda norm, inputs, output: inputs[0])
    return net.eval()


def cache_path(name):
    """Where public files are kept: $SLAM_CACHE, or ~/.cache/slam."""
    return os.path.join(os.environ.get('SLAM_CACHE') or os.path.expanduser('~/.cache/slam'), name)


def fetch(url, sha256=None):
    """The local copy of a public file, downloaded on first use and checked each time.

    Raises InputError offline, or if the file is not the published one.
    """
    path = cache_path(os.path.basename(url))
    if not os.path.exists(path):
        os.makedirs(cache_path(''), exist_ok=True)
        with reading(f'{url} (a copy may be put at {path})'):
            torch.hub.download_url_to_file(url, path, progress=False)
    if sha256 and file_hash(path) != sha256:
        raise InputError(f'{path} is not the published file (its sha256 differs): delete it')
    return path


def read_kmeans(path):
    """The centroids (n_units, D) of a .safetensors file with `centroids`, or of a joblib dump of
    scikit-learn's KMeans, of which nothing is executed. Raises InputError."""
    from joblib import numpy_pickle
    from safetensors.torch import load_file

    class Inert:  # in place of the classes and functions of scikit-learn and numpy
        def __init__(self, *args, **kwargs):
            pass

    class Array(numpy_pickle.NumpyArrayWrapper):
        def read(self, *args):
            if self.dtype.hasobject:  # a pickle inside the pickle
                raise ValueError('it holds Python objects: refused')
            return super().read(*args)

    class Reader(numpy_pickle.NumpyUnpickler):
        def find_class(self, module, name):
            if (module, name) == ('joblib.numpy_pickle', 'NumpyArrayWrapper'):
                return Array
            if module == 'numpy' and name in ('dtype', 'ndarray'):
                return getattr(np, name)
            scalar = module.split('.')[0] == 'numpy' and name == 'scalar'
            if scalar or module.startswith(('sklearn.cluster.', 'numpy.random.')):
                return Inert
            raise ValueError(f'it asks to run {module}.{name}: refused')

    with reading(f'{path} (.safetensors with `centroids`, or a joblib dump of KMeans)'):
        if path.endswith('.safetensors'):
            centroids = load_file(path)['centroids'].float()
        else:
            with open(path, 'rb') as file:
                kmeans = Reader(path, file, ensure_native_byte_order=True).load()
            centroids = torch.from_numpy(kmeans.cluster_centers_).float()
        if centroids.ndim != 2 or not len(centroids) or not centroids.isfinite().all():
            raise ValueError('its centroids are not (n_units, D) finite numbers')
    return centroids


# -----------------------------------------------------------------------------
# UnitVocoder: units -> wave

HIFIGAN = (  # 'hifigan25', trained on LJSpeech: generator and config, each with its sha256
    TWIST + 'hifigan_lj_mhubert_base_25hz.pt',
    'd88224e95c501e2cd59a6e4014753169cfe060fb7ade3cc0da03c809fef73b79',
    TWIST + 'hifigan_lj_mhubert_base_25hz_config.json',
    '116dc39be4970cd393e562acd0a0ec70a86aaba7e9ca469b8b836cb3fe46afc7',
)
VOICE_LEVEL, VOICE_PEAK = 0.08, 0.95  # of a decoded wave: root mean square of speech; limit


def speech_level(wave):
    """Root mean square of (samples,) in the 25 ms blocks less than 13 dB below the loud ones."""
    power = wave[: len(wave) // WINDOW * WINDOW].view(-1, WINDOW).square().mean(1)
    if not len(power):
        return float(wave.square().mean().sqrt())
    loud = power.sort().values[int(0.95 * (len(power) - 1))]
    return float(power[power >= 0.05 * loud].mean().sqrt())


def finish_wave(wave):
    """(samples,), at least one, without DC, speech at VOICE_LEVEL, peaks at most VOICE_PEAK, with
    5 ms fades so that no end clicks."""
    wave = wave - wave.mean()
    peak = max(float(wave.abs().max()), 1e-6)
    wave = wave * min(VOICE_LEVEL / max(speech_level(wave), 1e-6), VOICE_PEAK / peak)
    ramp = torch.linspace(0, 1, min(80, len(wave)), device=wave.device)
    wave[: len(ramp)] *= ramp
    wave[-len(ramp) :] *= ramp.flip(0)
    return wave


class TableVoice(nn.Module):
    """The offline voice: the mean log-mel spectra of each unit, made into a wave by Griffin-Lim.

    Tensors: mel (n_units, 10 ms steps a frame, N_MELS), durations (n_units,) mean frames of a run.
    """

    def __init__(self, config, tensors):
        super().__init__()
        steps = round(SAMPLE_RATE / HOP / config['frame_rate'])
        self.register_buffer('mel', torch.zeros(config['n_units'], steps, N_MELS))
        self.register_buffer('durations', torch.ones(config['n_units']))

    def predict_durations(self, units):
        """Each unit's mean, rounded so that sums stay within half a frame: the tempo is right."""
        beyond = (self.durations[units].clamp(min=1) - 1).double().cumsum(0).add(0.5).long()
        return 1 + torch.diff(beyond, prepend=beyond.new_zeros(1))

    def forward(self, frames, speaker=0, style=0):
        """Units (frames,), one a frame -> (frames * 640,) samples at 25 Hz. It has one voice."""
        mel = (
            self.mel[frames].flatten(0, 1).cpu()
        )  # (10 ms steps, N_MELS); the same wave everywhere
        mel = torch.cat((mel[:1], mel, mel[-1:])).T  # one step more on each side
        # an FFT bin has the energy of the bands around it, and none at 0 and 8 kHz
        filters = mel_filters()
        spread = filters / filters.sum(1, keepdim=True).clamp(min=1e-6)
        magnitude = torch.exp(0.5 * spread @ (mel - filters.sum(0).log()[:, None]))
        magnitude[[0, 1, -1]] = 0
        invert = transform('GriffinLim', N_FFT, 32, WINDOW, HOP, power=1, rand_init=False)
        # our steps are centred on their 10 ms, torchaudio's windows on multiples of 10 ms
        return invert(magnitude)[HOP // 2 :][: (mel.shape[1] - 2) * HOP]


class HifiGan(nn.Module):
    """The unit HiFi-GAN with its duration predictor (Polyak et al. 2021), tensors named as in
    fairseq. config: its JSON. tensors: the weights, whose names and shapes say what is optional."""

    def __init__(self, config, tensors):
        super().__init__()
        for name in ('dict', 'spkr', 'style'):  # embeddings of unit, speaker and style
            if name + '.weight' in tensors:
                self.add_module(name, nn.Embedding(*tensors[name + '.weight'].shape))
        if 'dur_predictor.proj.weight' in tensors:
            hidden, width, size = tensors['dur_predictor.conv1.0.weight'].shape
            self.dur_predictor = nn.ModuleDict(dict(proj=nn.Linear(hidden, 1)))
            for i, inputs in enumerate((width, hidden), 1):
                layers = nn.Sequential(convolution(inputs, hidden, size), nn.ReLU())
                self.dur_predictor.update({f'conv{i}': layers, f'ln{i}': nn.LayerNorm(hidden)})
        width, inputs, size = tensors['conv_pre.weight'].shape
        self.conv_pre = convolution(inputs, width, size)
        self.ups, self.resblocks = nn.ModuleList(), nn.ModuleList()
        sizes, dilations = config['resblock_kernel_sizes'], config['resblock_dilation_sizes']
        for i, rate in enumerate(config['upsample_rates']):
            size, width = config['upsample_kernel_sizes'][i], width // 2
            up = nn.ConvTranspose1d(2 * width, width, size, rate, padding=(size - rate) // 2)
            self.ups.append(up)
            for size, wide in zip(sizes, dilations, strict=True):
                convs1 = nn.ModuleList(convolution(width, width, size, d) for d in wide)
                convs2 = nn.ModuleList(convolution(width, width, size) for d in wide)
                self.resblocks.append(nn.ModuleDict(dict(convs1=convs1, convs2=convs2)))
        self.conv_post = convolution(width, 1, tensors['conv_post.weight'].shape[-1])

    def predict_durations(self, units):
        """exp(prediction) - 1 rounded, at least 1; 1 where there is no predictor."""
        if not hasattr(self, 'dur_predictor') or not len(units):
            return torch.ones_like(units)
        x, net = self.dict(units), self.dur_predictor  # (n, C)
        for i in (1, 2):
            x = net[f'ln{i}'](net[f'conv{i}'](x.T).T)
        return (net['proj'](x)[:, 0].exp() - 1).round().clamp(min=1).long()

    def forward(self, frames, speaker=0, style=0):
        """Units (frames,), one a frame -> (frames * hop,) samples in [-1, 1]."""
        parts = [self.dict(frames)]
        for name, row in (('spkr', speaker), ('style', style)):
            if hasattr(self, name):
                table = getattr(self, name).weight
                if not 0 <= row < len(table):
                    raise InputError(f'{name} {row} is not among the {len(table)} of this vocoder')
                parts.append(table[row].expand(len(frames), -1))
        x = self.conv_pre(torch.cat(parts, dim=1).T)  # (C, frames)
        each = len(self.resblocks) // len(self.ups)
        for i, up in enumerate(self.ups):
            x, total = up(F.leaky_relu(x, 0.1)), 0
            for block in self.resblocks[i * each : (i + 1) * each]:
                y = x
                for conv1, conv2 in zip(block['convs1'], block['convs2'], strict=True):
                    y = y + conv2(F.leaky_relu(conv1(F.leaky_relu(y, 0.1)), 0.1))
                total = total + y
            x = total / each
        return torch.tanh(self.conv_post(F.leaky_relu(x)))[0]  # here the slope is 0.01


def convolution(inputs, outputs, size, dilation=1):
    return nn.Conv1d(inputs, outputs, size, dilation=dilation, padding=(size - 1) * dilation // 2)


class UnitVocoder:
    """Units to speech: the unit HiFi-GAN, or a table of spectra that is fitted in seconds."""

    def __init__(self, config, tensors, device='cpu'):
        self.config, self.device = config, torch.device(device)
        self.n_units, self.frame_rate = config['n_units'], config['frame_rate']
        self.sample_rate, self.encoder_id = config['sample_rate'], config.get('encoder_id')
        voices = dict(table=TableVoice, hifigan=HifiGan)
        if config['kind'] not in voices:
            raise InputError(f'vocoders of kind {config["kind"]!r} are not supported')
        with torch.device('meta'):  # no memory before the tensors fit
            self.voice = voices[config['kind']](config, tensors).eval()
        self.voice.load_state_dict(tensors, assign=True)
        self.voice.to(self.device)

    @classmethod
    def from_pretrained(cls, where, device='cpu'):
        """Load a folder of save_pretrained, 'hifigan25' (downloaded once, checked), or a HiFi-GAN
        generator .pt with its .json beside it. Raises InputError if it is none of these."""
        from safetensors.torch import load_file

        path, about = (os.path.join(where, f'vocoder.{end}') for end in ('safetensors', 'json'))
        if where == 'hifigan25':
            path, about = fetch(*HIFIGAN[:2]), fetch(*HIFIGAN[2:])
        elif where.endswith('.pt'):
            path, about = where, where[:-3] + '_config.json'
            about = about if os.path.exists(about) else where[:-3] + '.json'
        config = read_json(about)
        with reading(f'vocoder {path}'):
            if path.endswith('.pt'):
                config |= dict(encoder_id='mhubert25') if where == 'hifigan25' else {}
                return cls(*read_hifigan(path, config), device)
            return cls(config, load_file(path), device)

    def save_pretrained(self, folder):
        """Write vocoder.json and vocoder.safetensors."""
        write_part(folder, 'vocoder', self.config, self.voice.state_dict())

    def check(self, units):
        """(n,) long on the CPU. Raises InputError for units of another encoder."""
        units = torch.as_tensor(units, dtype=torch.long, device='cpu')
        if len(units) and not 0 <= int(units.min()) <= int(units.max()) < self.n_units:
            raise InputError(f'unit {int(units.max())}: this vocoder has {self.n_units} units')
        return units

    @torch.inference_mode()
    def durations(self, units):
        """De-duplicated units (n,) -> frames of each (n,), at least 1, on the CPU."""
        return self.voice.predict_durations(self.check(units).to(self.device)).cpu()

    @torch.inference_mode()
    def decode(self, units, durations=None, speaker=0, style=0):
        """De-duplicated units (n,) of one utterance -> (frames * hop,) float32 on the CPU.

        durations: (n,) frames; None: predicted. speaker, style: rows of a HiFi-GAN's tables.
        The wave is at sample_rate, without DC, speech at VOICE_LEVEL, peaks <= VOICE_PEAK.
        Raises InputError for units, speakers or styles that this vocoder does not have.
        """
        durations = self.durations(units) if durations is None else torch.as_tensor(durations)
        frames = self.check(units).repeat_interleave(durations.cpu()).to(self.device)
        if not len(frames):
            return torch.zeros(0)
        wave = self.voice(frames, speaker, style)
        return finish_wave(wave[: round(len(frames) * self.sample_rate / self.frame_rate)]).cpu()


def read_hifigan(path, config):
    """The config and the tensors of a unit HiFi-GAN's generator, its weight norm folded."""
    state = torch.load(path, map_location='cpu', weights_only=True)['generator']
    tensors = {name: tensor.float() for name, tensor in state.items()}
    for name in [name[:-2] for name in tensors if name.endswith('.weight_g')]:
        g, v = tensors.pop(name + '_g'), tensors.pop(name + '_v')
        tensors[name] = v * (g / v.flatten(1).norm(dim=1).view(g.shape))  # w = g v / |v|
    rate = config.get('sampling_rate', SAMPLE_RATE)
    known = dict(kind='hifigan', n_units=len(tensors['dict.weight']), sample_rate=rate)
    return config | known | dict(frame_rate=rate / math.prod(config['upsample_rates'])), tensors


class UnitTable:
    """What a TableVoice is made of: per unit the sum of its spectra, its frames and its runs."""

    def __init__(self, n_units, frame_rate):
        self.n_units, self.frame_rate = n_units, frame_rate
        self.steps = round(SAMPLE_RATE / HOP / frame_rate)  # of 10 ms in a frame
        if abs(self.steps * HOP * frame_rate - SAMPLE_RATE) > 1:
            raise InputError(f'a voice needs frames of whole 10 ms, not {frame_rate:g} a second')
        self.mels = torch.zeros(n_units, self.steps * N_MELS, dtype=torch.float64)
        self.frames, self.runs = torch.zeros(2, n_units, dtype=torch.long)

    def add(self, wave, units):
        """Add one utterance: wave (samples,) at 16 kHz, units (frames,), not de-duplicated."""
        wave, units = torch.as_tensor(wave), torch.as_tensor(units, dtype=torch.long)
        mel = log_mel(wave * (VOICE_LEVEL / max(speech_level(wave), 1e-5)))
        n = min(len(units), len(mel) // self.steps)  # complete frames
        mel = mel[: n * self.steps].view(n, self.steps * N_MELS).double()
        self.mels.index_add_(0, units[:n], mel)
        self.frames += torch.bincount(units[:n], minlength=self.n_units)
        self.runs += torch.bincount(dedup(units)[0], minlength=self.n_units)

    def finish(self, encoder_id=None):
        """The vocoder of the mean spectra and durations; a unit never seen is the mean of all."""
        seen = self.frames[:, None] > 0
        frames = torch.where(seen, self.frames[:, None], self.frames.sum()).clamp(min=1)
        mel = torch.where(seen, self.mels, self.mels.sum(0)) / frames
        durations = (self.frames / self.runs.clamp(min=1)).clamp(min=1)
        config = dict(kind='table', n_units=self.n_units, frame_rate=self.frame_rate)
        config |= dict(sample_rate=SAMPLE_RATE, encoder_id=encoder_id)
        mel = mel.float().view(self.n_units, self.steps, N_MELS)
        return UnitVocoder(config, dict(mel=mel, durations=durations))


# -----------------------------------------------------------------------------
# Finding and reading data

AUDIO_EXTENSIONS = ('.wav', '.flac', '.ogg', '.oga', '.opus', '.mp3', '.aiff', '.aif', '.aifc')
AUDIO_EXTENSIONS += ('.au', '.sph', '.caf', '.w64')
UNREADABLE_EXTENSIONS = ('.m4a', '.mp4', '.aac', '.wma', '.amr', '.webm', '.mka', '.ape', '.wv')


def find_audio(path, extensions=AUDIO_EXTENSIONS, ignored=None):
    """The sound files below a folder, or [path] for a file: sorted, hidden ones left out.

    ignored: a list that receives the files of UNREADABLE_EXTENSIONS, which libsndfile does not
    read. Links are followed. Raises InputError where there is no such path or no such file in it.
    """
    if os.path.isfile(path):
        return [path]
    files, seen = [], set()
    for folder, folders, names in os.walk(path, followlinks=True):
        if os.path.realpath(folder) in seen:  # links in a circle end here
            folders.clear()
            continue
        seen.add(os.path.realpath(folder))
        files += [os.path.join(folder, name) for name in names if not name.startswith('.')]
    found = sorted(file for file in files if file.lower().endswith(extensions))
    other = sorted(file for file in files if file.lower().endswith(UNREADABLE_EXTENSIONS))
    if not found:
        kinds = f'no file with {" ".join(extensions)} ({len(other)} that cannot be read)'
        raise InputError(f'{path}: {kinds if seen else "no such file or folder"}')
    if ignored is not None:
        ignored += other
    return found


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


def open_hub(where):
    """hub:NAME[:[CONFIG/]SPLIT] -> {its name with a split: streaming rows, audio as bytes}."""
    with reading(where):
        from datasets import load_dataset

        name, _, part = where.removeprefix('hub:').partition(':')
        config, slash, split = part.rpartition('/')
        data = load_dataset(name, config or None, split=split or None, streaming=True)
    data = {split: data} if split else data
    return {f'hub:{name}:{config}{slash}{key}': rows.decode(False) for key, rows in data.items()}


def parquet_files(where):
    """The shards that `where` names, sorted, each of which read_parquet takes.

    where: a .parquet file, a folder of them, or hub:NAME[:[config/]split] for a data set of the
    Hugging Face hub, whose shards are called hub:NAME:split#3/64. Raises InputError.
    """
    if not where.startswith('hub:'):
        return find_audio(where, ('.parquet',))
    if '#' in where:
        return [where]
    counts = {name: data.num_shards for name, data in open_hub(where).items()}
    return [f'{name}#{i}/{counts[name]}' for name in counts for i in range(counts[name])]


def read_parquet(where):
    """Yields the rows of the shards of parquet_files(where), dicts of plain Python values, a few at
    a time. Audio stays dict(bytes=..., path=...), a null stays None. Raises InputError."""
    for name in parquet_files(where):
        if name.startswith('hub:'):
            base, index, count = re.fullmatch(r'(.*)#(\d+)/(\d+)', name).groups()
            [data] = open_hub(base).values()
            with reading(name):
                yield from data.shard(num_shards=int(count), index=int(index))
            continue
        import pyarrow.parquet

        with reading(name), pyarrow.parquet.ParquetFile(name) as file:
            for batch in file.iter_batches(batch_size=16):
                yield from batch.to_pylist()


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
