"""The three networks, how they are loaded and saved, and helpers that the scripts share.

SLM           units -> next unit   a transformer over speech units; transformers reads and writes
                                   its checkpoints (load_slm, SLM.save_pretrained)
UnitEncoder   wave  -> units       HuBERT-like features, or MFCC offline, and k-means
UnitVocoder   units -> wave        the unit HiFi-GAN, or a table of spectra
"""

import contextlib
import hashlib
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
from bisect import bisect_left, insort
from collections import Counter
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial

import numpy as np
import soundfile
import torch
import torch.distributed as dist
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save
from tokenizers import Tokenizer
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchaudio import functional, transforms

PAD, BOS, EOS, OFFSET = 0, 1, 1, 2  # <S> is both ends of an utterance; unit u is token u + OFFSET
SAMPLE_RATE = 16000
PARTS = ('encoder', 'vocoder', 'tokenizer')  # folders that a checkpoint may contain
ROPE_POSITIONS = 1 << 15  # rows of RoPE's tables: no utterance is longer than 32,768 tokens
POSITION_OFFSET = 2  # OPT's learned positions begin at row 2
LOGITS_AT_ONCE = 1 << 28  # numbers; a larger product of the head is computed in pieces


class InputError(ValueError):
    """An error that the user can fix; scripts print it as one line and exit with code 2."""


# -----------------------------------------------------------------------------
# SLM: the speech language model


@dataclass
class Config:
    """What SLM and Block need to know; read_config fills it from transformers' config."""

    kind: str  # how transformers names the tensors, a key of KINDS
    vocab_size: int
    n_embd: int
    n_head: int
    n_kv_head: int
    head_dim: int
    n_ffn: int
    embed_dim: int  # of embedding and head
    context: int  # maximum tokens of a chunk in training
    max_positions: int  # tokens of the longest utterance
    dropout: float  # on the residual branches
    norm_eps: float
    biases: list  # modules with a bias: norm1 (then all norms are LayerNorm), qkv, out, up, down
    qk_norm: bool  # normalise each head's query and key
    gated: bool  # SwiGLU
    act: str  # a key of ACTIVATIONS
    pre_norm: bool  # False: OPT-350M
    parallel: bool  # GPT-NeoX: attention and the MLP both read the block's input
    rope_freqs: list  # radians a token; empty: learned positions
    rope_scale: float  # of cos and sin, in YaRN


class Norm(nn.Module):
    """RMSNorm, or LayerNorm where it has a bias, over the last dimension, computed in fp32."""

    def __init__(self, config, size):
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if 'norm1' in config.biases else None

    def forward(self, x):
        weight = self.weight.float()
        if self.bias is None:
            y = F.rms_norm(x.float(), weight.shape, weight, self.eps)
        else:
            y = F.layer_norm(x.float(), weight.shape, weight, self.bias.float(), self.eps)
        return y.to(x.dtype)


def rotate(x, cos, sin):
    """Rotary position embedding: rotates features i and i + R / 2 of each head. x: (B, T, H, D);
    cos, sin: (B, T, 1, R), the first half of sin negated."""
    R = cos.shape[-1]
    part = x[..., :R]
    # with roll in place of cat, the compiler makes one backward kernel for q, k and v
    rotated = part * cos + part.roll(R // 2, -1) * sin
    return rotated if R == x.shape[-1] else torch.cat((rotated, x[..., R:]), dim=-1)


class Block(nn.Module):
    """One transformer layer, in the variant that its config describes."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.norm1 = Norm(c, c.n_embd)
        self.qkv = nn.Linear(
            c.n_embd, (c.n_head + 2 * c.n_kv_head) * c.head_dim, bias='qkv' in c.biases
        )
        self.out = nn.Linear(c.n_head * c.head_dim, c.n_embd, bias='out' in c.biases)
        if c.qk_norm:
            self.norm_q = Norm(c, c.head_dim)
            self.norm_k = Norm(c, c.head_dim)
        self.norm2 = Norm(c, c.n_embd)
        # gated (SwiGLU): gate and up in one product
        self.up = nn.Linear(c.n_embd, c.n_ffn * (1 + c.gated), bias='up' in c.biases)
        self.down = nn.Linear(c.n_ffn, c.n_embd, bias='down' in c.biases)
        self.act, self.drop = ACTIVATIONS[c.act], nn.Dropout(c.dropout)

    def attention(self, x, rope, attend):
        c, (B, T, _) = self.config, x.shape
        heads = self.qkv(x).view(B, T, -1, c.head_dim)
        q, k, v = heads.split([c.n_head, c.n_kv_head, c.n_kv_head], dim=2)  # (B, T, heads, D)
        if c.qk_norm:
            q, k = self.norm_q(q), self.norm_k(k)
        if rope:
            q, k = rotate(q, *rope), rotate(k, *rope)
        y = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))  # (B, heads, T, D)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))

    def mlp(self, x):
        x = self.up(x)
        if not self.config.gated:
            return self.down(self.act(x))
        gate, x = x.chunk(2, dim=-1)
        return self.down(self.act(gate) * x)

    def forward(self, x, rope, attend):  # x: (B, T, n_embd)
        if not self.config.pre_norm:
            x = self.norm1(x + self.drop(self.attention(x, rope, attend)))
            return self.norm2(x + self.drop(self.mlp(x)))
        y = x + self.drop(self.attention(self.norm1(x), rope, attend))
        return y + self.drop(self.mlp(self.norm2(x if self.config.parallel else y)))


class SLM(nn.Module):
    """A decoder-only transformer over speech units; load_slm makes one.

    Tokens, as in slprl/slam: PAD 0, `<S>` 1 (start and end of an utterance), unit u at u + OFFSET.
    An interleaved model has a text LM's tokens, unit u at u + offset, then the switches `<speech>`
    and `<text>`. A switch precedes a span of its modality; the text LM's `end` ends a document.

    hf_config: transformers' config of the same model. slam: the content of slam.json: encoder,
    encoder_id, vocoder, n_units, frame_rate, dedup, recipe, scores; tokenizer (a folder), offset
    and end of an interleaved model; scoring='units' if an utterance is scored as its units alone.
    """

    def __init__(self, hf_config, dropout=0.0, seed=0):
        super().__init__()
        self.hf_config, self.slam = hf_config, {}
        c = self.config = read_config(hf_config, dropout)
        self.embed = nn.Embedding(c.vocab_size, c.embed_dim)
        if c.rope_freqs:  # cos and sin by position as rotate takes them, (ROPE_POSITIONS, R) each
            with torch.device('cpu'):
                positions = torch.arange(ROPE_POSITIONS, dtype=torch.float32)
                angles = torch.outer(positions, torch.tensor(c.rope_freqs))
            cos, sin = angles.cos() * c.rope_scale, angles.sin() * c.rope_scale
            self.register_buffer('cos', torch.cat((cos, cos), dim=-1), persistent=False)
            self.register_buffer('sin', torch.cat((-sin, sin), dim=-1), persistent=False)
        else:
            self.embed_positions = nn.Embedding(c.max_positions + POSITION_OFFSET, c.n_embd)
        if c.embed_dim != c.n_embd:  # OPT-350M projects 512 -> 1024 -> 512
            self.project_in = nn.Linear(c.embed_dim, c.n_embd, bias=False)
            self.project_out = nn.Linear(c.n_embd, c.embed_dim, bias=False)
        self.blocks = nn.ModuleList([Block(c) for _ in range(hf_config.num_hidden_layers)])
        if c.pre_norm:
            self.norm = Norm(c, c.n_embd)
        self.head = nn.Linear(c.embed_dim, c.vocab_size, bias=False)
        if hf_config.tie_word_embeddings:
            self.head.weight = self.embed.weight
        if not self.embed.weight.is_meta:  # the initial values that transformers uses
            generator = torch.Generator().manual_seed(seed)
            for name, parameter in self.named_parameters():
                if parameter.ndim == 2:
                    nn.init.normal_(parameter, std=0.02, generator=generator)
                elif name.endswith('bias'):
                    nn.init.zeros_(parameter)

    def hidden(self, tokens, doc=None, positions=None, branch=None, attend=None):
        """The last hidden states (B, T, embed_dim), ready for the head.

        tokens: (B, T) int64. doc: (B, T) integers, a different one for each utterance of a row;
        tokens attend only within their utterance, and positions restart at 0. None: each row is
        one utterance. positions: (B, T), to replace these. branch: (B, T), 0 for a shared prompt
        and 1, 2, ... for its alternatives; each attends to the prompt and itself. attend: a
        function of q, k and v that replaces attention within documents.
        """
        c, (B, T) = self.config, tokens.shape
        if positions is None:
            positions = torch.arange(T, device=tokens.device).expand(B, T)
            if doc is not None:  # subtract the index at which the utterance begins
                positions = positions - torch.where(begins(doc), positions, 0).cummax(1).values

        x = self.embed(tokens)  # (B, T, embed_dim)
        if torch.is_autocast_enabled(x.device.type):  # the residual stream in bf16
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if c.embed_dim != c.n_embd:
            x = self.project_in(x)
        if c.rope_freqs:
            rope = [table[positions][:, :, None].to(x.dtype) for table in (self.cos, self.sin)]
        else:
            rope, x = None, x + self.embed_positions(positions + POSITION_OFFSET).to(x.dtype)
        attend = attend or attention_within(doc, branch)
        for block in self.blocks:
            x = block(x, rope, attend)
        if c.pre_norm:
            x = self.norm(x)
        return self.project_out(x) if c.embed_dim != c.n_embd else x

    def forward(self, tokens, targets=None, doc=None, positions=None, branch=None):
        """Next-token logits (B, T, vocab_size), or the mean loss in nats if targets are given.

        tokens, doc, positions, branch: (B, T), as in hidden. targets: (B, T) int64, the next token
        at each position, or -100 where nothing is predicted.
        """
        x = self.hidden(tokens, doc, positions, branch)
        if targets is None:
            return self.logits(x)
        losses = self.cross_entropy(x.flatten(0, 1), targets.flatten())
        return losses.sum() / (targets != -100).sum()

    def logits(self, x, weight=None):
        """The head: (..., embed_dim) -> (..., vocab_size). weight: the head's weight in the dtype
        of x, converted once if several calls share it."""
        weight = self.head.weight.to(x.dtype) if weight is None else weight
        if x.is_cuda:  # 502 columns are unaligned and slow, 512 are not
            weight = F.pad(weight, (0, 0, 0, -len(weight) % 128))
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, weight)[..., : self.config.vocab_size]

    def cross_entropy(self, x, targets):
        """-log p in nats, fp32, of each target: x (N, embed_dim), targets (N,) -> (N,); 0 where the
        target is -100. Logits of a large vocabulary are computed in pieces, also in backward."""
        weight = self.head.weight.to(x.dtype)

        def losses_of(x, targets):
            logits = self.logits(x, weight).float()
            return F.cross_entropy(logits, targets, reduction='none', ignore_index=-100)

        rows = max(1, LOGITS_AT_ONCE // self.config.vocab_size)
        if len(x) <= rows:
            return losses_of(x, targets)
        # nothing here is random, so keep no generator state: reading it would wait for the GPU
        keep = dict(use_reentrant=False, preserve_rng_state=False)
        pieces = zip(x.split(rows), targets.split(rows), strict=True)
        return torch.cat([checkpoint(losses_of, *piece, **keep) for piece in pieces])

    def logps(self, tokens, mask, doc=None, positions=None, branch=None, segments=None, n=None):
        """Differentiable sums of log-probabilities in nats of the tokens where mask is 1, given the
        earlier tokens that each sees. The head uses fp32 (bf16 logits above 8 are 1/16 apart).

        tokens, doc, positions, branch: as in hidden. mask: (B, T), 0 on the first token of every
        utterance, which nothing predicts. segments: (B, T) int64, the index in 0 .. n - 1 of the
        sum that each token is added to; None: one sum per row. Returns: (n,) or (B,).
        """
        B, T = tokens.shape
        before = torch.arange(T, device=tokens.device).expand(B, T) - 1
        if branch is not None:
            # an alternative's first token follows the prompt's last, not the alternative before it
            prompt_end = torch.where(branch == 0, before + 1, 0).cummax(dim=1).values
            before = torch.where(begins(branch) & (branch > 0), prompt_end, before)
        x = self.hidden(tokens, doc, positions, branch)
        x = x.gather(1, before.clamp(min=0)[:, :, None].expand(-1, -1, x.shape[-1]))
        token_logps = -self.cross_entropy(x.flatten(0, 1).float(), tokens.flatten())
        if segments is None:
            segments, n = torch.arange(B, device=tokens.device).repeat_interleave(T), B
        zeros = torch.zeros(n, dtype=token_logps.dtype, device=tokens.device)
        return zeros.index_add(0, segments.flatten(), token_logps * mask.flatten())

    def num_params(self):
        """Parameters, tied ones once, as in Table 7 of the paper."""
        return sum(p.numel() for p in self.parameters())

    offset = property(lambda self: self.slam.get('offset', OFFSET))  # the token of unit 0
    end = property(lambda self: self.slam.get('end', EOS))  # of an utterance or a document

    @cached_property
    def tokenizer(self):
        """The text LM's tokenizer. Raises InputError if the model has no text tokens."""
        if not self.slam.get('tokenizer'):
            raise InputError('the model has no text tokens: train one on interleaved data')
        return read_tokenizer(self.slam['tokenizer'])[0]

    def tokens_of(self, parts, alone=False):
        """Tokens (n,) of a prompt, slam['prefix'] first. parts: ('speech', units) and ('text', text
        or ids), in order. An interleaved model gets a switch before each part; a unit LM gets `<S>`
        before its only part. alone: no switch and no `<S>`, for slam['scoring'] 'units'."""
        tokens = list(self.slam.get('prefix', ()))
        for n, (kind, ids) in enumerate(parts):
            if isinstance(ids, str):  # a text that continues a sentence begins with a space
                ids = self.tokenizer.encode(' ' * (n > 0) + ids, add_special_tokens=False).ids
            interleaved = self.tokenizer if kind == 'text' else self.slam.get('tokenizer')
            switch = self.config.vocab_size - (2 if kind == 'speech' else 1)
            tokens += [] if alone else [switch if interleaved else BOS]
            shift = self.offset if kind == 'speech' else 0
            tokens += (torch.as_tensor(ids) + shift).tolist()
        return torch.tensor(tokens, dtype=torch.long)

    def allowed_tokens(self, kind='speech'):
        """Which tokens generation may choose, (vocab_size,) bool. Interleaved model: the units or
        the text LM's own tokens, and the end token. Unit LM: all tokens but PAD."""
        tokens = torch.arange(self.config.vocab_size)
        if not self.slam.get('tokenizer'):
            return tokens != PAD
        allowed = tokens < self.offset if kind == 'text' else tokens >= self.offset
        allowed[-2:] = False  # the switches
        allowed[self.end] = True
        return allowed

    @torch.inference_mode()
    def generate(self, prompts, max_new_tokens=150, seed=None, kind='speech', **sampling):
        """Continue prompts. With slam['dedup'] no unit occurs twice in a row. Raises: InputError if
        the model has fewer positions than prompt + continuation.

        prompts: list of 1-D int64 tensors from tokens_of, of any lengths >= 1. seed: None draws
        from torch's own generator. kind: 'speech' or 'text', the modality of the continuation; a
        prompt of the other modality must end with a switch to it. sampling: options of `sample`.
        Returns: list of 1-D int64 tensors on the CPU: the new tokens without the end token.
        """
        c, device, longest = self.config, self.embed.weight.device, max(map(len, prompts))
        if longest + max_new_tokens > c.max_positions:
            raise InputError(f'the model has no more than {c.max_positions} positions')
        # left padding repeats the first token, which the penalty counts anyway
        tokens = [F.pad(p, (longest - len(p), 0), value=int(p[0])) for p in prompts]
        tokens = torch.stack(tokens).to(device)  # (B, longest)
        padding = torch.tensor([[longest - len(p)] for p in prompts], device=device)
        columns = torch.arange(longest, device=device)  # places of the tokens in the cache
        shape = len(prompts), c.n_kv_head, longest + max_new_tokens, c.head_dim
        # keys and values of each layer in turn
        cache = [self.embed.weight.new_zeros(shape) for _ in range(2 * len(self.blocks))]
        generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        forbidden = ~self.allowed_tokens(kind).to(device)
        seen = torch.zeros(len(prompts), c.vocab_size, dtype=torch.bool, device=device)

        # the first pass takes the whole prompts, each later pass the newest token
        rows, ended = [tokens[:, :0]], torch.zeros_like(padding, dtype=torch.bool)
        for i in range(max_new_tokens):
            seen.scatter_(1, tokens, True)
            logits = self.next_logits(tokens, columns, padding, cache)  # (B, V)
            logits = logits.masked_fill(forbidden, -torch.inf)
            if self.slam.get('dedup'):  # no unit twice in a row
                last = tokens[:, -1:]
                same = logits.gather(1, last).masked_fill(last >= self.offset, -torch.inf)
                logits = logits.scatter(1, last, same)
            new = sample(logits, seen, generator, **sampling)
            tokens, columns = torch.where(ended, PAD, new), columns[-1:] + 1
            ended = ended | (tokens == self.end)
            rows.append(tokens)
            # reading the flag waits for the GPU: only every 16 tokens
            if (device.type == 'cpu' or i % 16 == 15) and ended.all():
                break
        rows = torch.cat(rows, dim=1).cpu()  # (B, steps)
        lengths = (rows != self.end).long().cumprod(dim=1).sum(dim=1)
        return [row[:length] for row, length in zip(rows, lengths, strict=True)]

    def next_logits(self, tokens, columns, padding, cache):
        """Logits (B, V), float32, of the tokens after `tokens` (B, T), whose keys and values are
        written to the cache at `columns` (T,). padding: (B, 1), padding columns of each prompt."""
        places = torch.arange(cache[0].shape[2], device=tokens.device)
        visible = (places >= padding)[:, None, None] & (places <= columns[:, None])
        visible = visible | (places == columns[:, None])  # padding sees itself: no NaN
        layers = iter(zip(cache[0::2], cache[1::2], strict=True))

        def attend(q, k, v):
            keys, values = next(layers)
            keys.index_copy_(2, columns, k)
            values.index_copy_(2, columns, v)
            return sdpa(q, keys, values, visible)

        x = self.hidden(tokens, positions=(columns - padding).clamp(min=0), attend=attend)
        return self.logits(x[:, -1]).float()

    def save_pretrained(self, folder, slam=None):
        """Write a checkpoint that transformers and load_slm open: config.json, model.safetensors
        and slam.json. A write that fails leaves the files that were there.

        slam: dict for slam.json; None: self.slam. The folders of PARTS that it names are copied in,
        so the checkpoint is complete, except that an encoder's net is stored by name or path only.
        """
        slam = dict(offset=OFFSET) | (self.slam if slam is None else slam)
        for part in PARTS:
            if os.path.isdir(str(slam.get(part) or '')):
                copy_part(slam[part], os.path.join(folder, part), part)
                slam[part] = part
        hf, end = self.hf_config, slam.get('end')
        ids = (PAD, BOS, EOS) if end is None else (end, end, end)  # interleaved: one token for all
        hf.pad_token_id, hf.bos_token_id, hf.eos_token_id = ids
        theirs = empty_model(hf).to(self.embed.weight.dtype).to_empty(device='cpu')
        for ours, other in matching(self, theirs.state_dict()):
            other.copy_(ours)
        theirs.tie_weights()

        new = os.path.join(folder, 'saving.tmp')  # its files are then renamed into place
        shutil.rmtree(new, ignore_errors=True)
        try:
            theirs.save_pretrained(new)
            with open(os.path.join(new, 'slam.json'), 'w', encoding='utf-8') as file:
                json.dump(slam, file, indent=2)
            for name in os.listdir(new):
                os.replace(os.path.join(new, name), os.path.join(folder, name))
        finally:
            shutil.rmtree(new, ignore_errors=True)


def sample(logits, seen, generator, temperature=0.8, top_k=25, top_p=1.0, repetition_penalty=1.1):
    """Draw a token from each row of logits: (B, V) -> (B, 1). Defaults: Table 6 of the paper.

    seen: (B, V) bool, the tokens of prompt and continuation; the penalty makes them less likely, as
    in transformers. temperature: 0 takes the most likely token. top_k: 0 is off. top_p: only the
    smallest set that holds this probability; 1 is off.
    """
    lower = torch.where(logits < 0, logits * repetition_penalty, logits / repetition_penalty)
    logits, size = torch.where(seen, lower, logits), logits.shape[1]
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits, ids = (logits / temperature).topk(min(top_k or size, size))
    probs = logits.softmax(-1)
    if top_p < 1:
        probs = probs.masked_fill(probs.cumsum(-1) - probs > top_p, 0)
    return ids.gather(1, torch.multinomial(probs, 1, generator=generator))


# -----------------------------------------------------------------------------
# Attention within documents

# cuDNN's attention plans anew for each shape, and here shapes vary
torch.backends.cuda.enable_cudnn_sdp(False)
compiled = lru_cache(torch.compile)


def begins(ids):
    """Marks where ids change along a row: (B, T) -> (B, T) bool, True in the first column."""
    return F.pad(ids[:, 1:] != ids[:, :-1], (1, 0), value=True)


def sdpa(q, k, v, mask=None):
    """Scaled dot-product attention, causal without a mask; q (B, H, T, D), k, v (B, H_kv, S, D)."""
    groups = q.shape[1] // k.shape[1]
    if mask is not None and q.shape[2] == 1:  # heads that share a key become queries: no copy
        heads = q.reshape(len(q), k.shape[1], groups, -1)
        return F.scaled_dot_product_attention(heads, k, v, attn_mask=mask).reshape(q.shape)
    if groups > 1 and not q.is_cuda:  # the CPU's fused kernel needs equal heads
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    how = dict(attn_mask=mask, is_causal=mask is None, enable_gqa=groups > 1 and q.is_cuda)
    return F.scaled_dot_product_attention(q, k, v, **how)


def attention_within(doc, branch):
    """The attention function of q, k and v that all layers of one forward pass share. doc, branch:
    (B, T) or None, as in SLM.hidden."""
    if doc is None and branch is None:
        return sdpa
    doc = torch.zeros_like(branch) if doc is None else doc
    B, T = doc.shape

    def visible(b, h, i, j):  # True if token i of row b attends to token j; flex's mask_mod
        seen = (doc[b, i] == doc[b, j]) & (j <= i)
        if branch is None:
            return seen
        return seen & ((branch[b, j] == 0) | (branch[b, j] == branch[b, i]))

    if doc.is_cuda:
        return attend_flex(visible, B, T, doc.device)
    if doc.device.type != 'cpu' or torch.compiler.is_compiling():
        rows, i = (torch.arange(n, device=doc.device) for n in (B, T))
        return partial(sdpa, mask=visible(rows[:, None, None], None, i[:, None], i)[:, None])

    # one call a document: a CPU then computes no scores between different documents
    starts = begins(doc).flatten().nonzero()[:, 0]
    lengths = torch.diff(starts, append=torch.tensor([B * T])).tolist()
    masks = [None] * len(lengths)
    if branch is not None:
        branches = branch.flatten().split(lengths)
        masks = [((ids == 0) | (ids == ids[:, None])).tril() for ids in branches]

    def attend(q, k, v):
        # (B, H, T, D) -> per document (1, H, length, D), and back
        pieces = [x.transpose(1, 2).flatten(0, 1).split(lengths) for x in (q, k, v)]
        out = [
            sdpa(*(x.transpose(0, 1)[None] for x in qkv), mask)
            for *qkv, mask in zip(*pieces, masks, strict=True)
        ]
        return torch.cat(out, dim=2).view(-1, B, T, q.shape[-1]).transpose(0, 1)

    return attend


def attend_flex(visible, B, T, device):
    """Flex attention with a block mask: blocks without a visible pair are not computed."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if not torch.compiler.is_compiling():  # uncompiled, they would materialise the (T, T) scores
        create_block_mask, flex_attention = compiled(create_block_mask), compiled(flex_attention)
    mask = create_block_mask(visible, B, None, T, T, device=device)
    # with these block sizes ptxas spills no register for sm_90 and sm_86; no row is empty, because
    # each token attends to itself
    small = 64 if torch.cuda.get_device_capability(device)[0] in (9, 10) else 32
    options = dict(ROWS_GUARANTEED_SAFE=True, PRESCALE_QK=True, fwd_num_warps=8, bwd_num_stages=2)
    options |= dict(bwd_BLOCK_M1=small, bwd_BLOCK_N1=64, bwd_BLOCK_M2=64, bwd_BLOCK_N2=small)

    def attend(q, k, v):
        blocks = options | dict(bwd_num_warps=4 if q.shape[-1] <= 64 else 8)
        gqa = q.shape[1] != k.shape[1]
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=gqa, kernel_options=blocks)

    return attend


# -----------------------------------------------------------------------------
# Loading and saving: transformers' names of our tensors, checkpoints, and public SLMs

ACTIVATIONS = dict(
    relu=F.relu, silu=F.silu, gelu=F.gelu, gelu_new=partial(F.gelu, approximate='tanh')
)

# transformers' names of our modules; several are joined, so that one product computes them
QKV = 'self_attn.q_proj self_attn.k_proj self_attn.v_proj'
LLAMA = dict(embed='model.embed_tokens', blocks='model.layers', norm='model.norm', head='lm_head')
LLAMA |= dict(norm1='input_layernorm', norm2='post_attention_layernorm', out='self_attn.o_proj')
LLAMA |= dict(qkv=QKV, norm_q='self_attn.q_norm', norm_k='self_attn.k_norm')
LLAMA |= dict(up='mlp.gate_proj mlp.up_proj', down='mlp.down_proj')
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
    """transformers' model of a config on the meta device: its tensors take no memory."""
    model_class = import_transformers().MODEL_FOR_CAUSAL_LM_MAPPING.get(type(hf), None)
    if model_class is None:
        raise InputError(f'model type {hf.model_type!r} is not supported')
    with torch.device('meta'):
        return model_class(hf)


def their_names(name, kind):
    """transformers' names of the tensors that one of ours joins: 'blocks.3.up.weight' ->
    ['model.layers.3.mlp.gate_proj.weight', 'model.layers.3.mlp.up_proj.weight']."""
    *path, module, what = name.split('.')
    prefix = f'{KINDS[kind]["blocks"]}.{path[1]}.' if path else ''
    return [f'{prefix}{theirs}.{what}' for theirs in KINDS[kind].get(module, module).split()]


def read_config(hf, dropout=0.0):
    """transformers' config -> Config. Facts that are missing there, such as biases, come from the
    tensors of transformers' model, and RoPE from its rotary module. So all kinds use this function.
    Raises InputError for a model type that Block cannot compute."""
    theirs = empty_model(hf)
    tensors = theirs.state_dict()

    def size(kind, name):  # of transformers' tensor, () where there is none
        return getattr(tensors.get(their_names(f'blocks.0.{name}', kind)[0]), 'shape', ())

    def get(*keys, default=None):
        return next((x for key in keys if (x := getattr(hf, key, None)) is not None), default)

    kind = next((k for k in KINDS if size(k, 'qkv.weight') and size(k, 'up.weight')), None)
    act = get('hidden_act', 'activation_function')
    rotary = next((module for module in theirs.modules() if hasattr(module, 'inv_freq')), None)
    rope = getattr(rotary, 'rope_type', None)  # two types depend on the length of the text
    context, n_head = hf.max_position_embeddings, hf.num_attention_heads
    window = get('sliding_window', default=ROPE_POSITIONS)  # of attention
    known = kind and act in ACTIVATIONS and rope not in ('dynamic', 'longrope')
    if not known or window < context:
        raise InputError(f'{hf.model_type!r} is not supported ({act}, {rope}, window {window})')
    if rotary is not None:
        with torch.device('cpu'):
            rotary = type(rotary)(hf)  # the same module, but not on the meta device
    return Config(
        kind=kind,
        vocab_size=hf.vocab_size,
        n_embd=hf.hidden_size,
        n_head=n_head,
        n_kv_head=get('num_key_value_heads', default=n_head),
        head_dim=size(kind, 'out.weight')[1] // n_head,
        n_ffn=size(kind, 'down.weight')[1],
        embed_dim=get('word_embed_proj_dim', default=hf.hidden_size),
        context=context,
        max_positions=min(ROPE_POSITIONS, window) if rotary else context,
        dropout=dropout,
        norm_eps=get('rms_norm_eps', 'layer_norm_eps', default=1e-5),
        biases=[m for m in 'norm1 qkv out up down'.split() if size(kind, f'{m}.bias')],
        qk_norm=bool(size(kind, 'norm_q.weight')),
        gated=kind in ('llama', 'phi3'),
        act=act,
        pre_norm=get('do_layer_norm_before', default=True),
        parallel=get('use_parallel_residual', default=False),
        rope_freqs=rotary.inv_freq.tolist() if rotary else [],
        rope_scale=rotary.attention_scaling if rotary else 1.0,
    )


def matching(model, tensors):
    """Yield pairs (ours, theirs) of matching tensors of the two models, views of one shape; removes
    theirs from `tensors`. Raises InputError for a tensor without a partner."""
    c, state = model.config, model.state_dict()
    names = {name: their_names(name, c.kind) for name in state}
    if odd := set(tensors).symmetric_difference(sum(names.values(), [])):
        model_type = model.hf_config.model_type
        differ = f"Block and transformers' model differ in {min(odd)}"
        raise InputError(f'model type {model_type!r} is not supported: {differ}')
    for name, tensor in state.items():
        theirs = [tensors.pop(one) for one in names[name]]
        for ours, other in zip(tensor.split([len(x) for x in theirs]), theirs, strict=True):
            if c.kind == 'gpt_neox' and '.qkv.' in name:  # theirs goes head by head
                ours = ours.view(3, c.n_head, c.head_dim, -1)
                other = other.view(c.n_head, 3, c.head_dim, -1).transpose(0, 1)
            yield ours, other


# sizes as train.py names them, and as transformers does
SIZES = dict(n_layer='num_hidden_layers', n_embd='hidden_size', n_head='num_attention_heads')
SIZES |= dict(n_kv_head='num_key_value_heads', n_ffn='intermediate_size')


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
    """An SLM on the CPU. where, for a cold start: 'preset:NAME' (config/presets.json) or 'scratch',
    a Qwen2 of sizes dict(n_layer, n_embd, n_head, n_kv_head, n_ffn); else a folder or hub name of
    (a) a text LM, for TWIST (Hassid et al. 2023). All weights are kept except embedding and head,
    which get vocab_size (None: 502) new rows (embed_init: see twist_rows). With `text` (meta.json
    of interleaved data), the old rows are kept too, and rows for units and switches are added.
    (b) a checkpoint of ours, or a public SLM (read_about). Its vocabulary is kept, in our order.

    context: tokens of a training row, saved in the config. rope_theta: replaces the checkpoint's.
    Raises InputError for a missing checkpoint, another tokenizer, or a model Block cannot compute.
    """
    cold = where == 'scratch' or str(where).startswith('preset:')
    if cold:
        presets = read_json(os.path.join(os.path.dirname(__file__), 'config', 'presets.json'))
        presets['scratch'] |= {SIZES[name]: size for name, size in (sizes or {}).items()}
        if (name := where.removeprefix('preset:').lower()) not in presets:
            raise InputError(f'no preset {name!r}: there are {", ".join(presets)}')
        hf = import_transformers().AutoConfig.for_model(**presets[name])
    else:
        folder = find_checkpoint(where)
        hf, slam, order, renames = read_about(folder)
        needed = text and (text['tokenizer_sha256'], text['offset'])
        if text and slam is None and (read_tokenizer(folder)[2], hf.vocab_size) != needed:
            raise InputError(f'{where}: the data need the tokenizer of {text["text_lm"]}')
    rope = getattr(hf, 'rope_parameters', None)
    if rope and rope_theta:
        rope['rope_theta'] = float(rope_theta)
    if rope and context:  # learned positions stay as many as they are
        hf.max_position_embeddings = context
    if cold:
        hf.vocab_size = vocab_size or 502
        model = SLM(hf, dropout, seed)
    else:
        model = convert(folder, hf, renames, where, dropout)
        for module in (model.embed, model.head):
            rows = old = module.weight.detach()
            if slam is None:
                kept, seed = old[: len(old) if text else 0], seed + (module is model.head)
                rows = twist_rows(old, (vocab_size or 502) - len(kept), embed_init, seed, where)
                rows = torch.cat((kept, rows))
            elif order is not None:
                rows = old[order]
            module.weight = nn.Parameter(rows)
        if hf.tie_word_embeddings:
            model.head.weight = model.embed.weight
        hf.vocab_size = model.config.vocab_size = len(rows)
        model.slam = {} if slam is None else dict(n_units=len(rows) - OFFSET) | slam
    return model.to(dtype)


def convert(folder, hf, renames, where, dropout):
    """An SLM from a checkpoint that transformers reads (from pickles only tensors). 24 tokens go
    through both models; if their logits differ, Block does not support this type of model.
    renames: {pattern: name} of tensors. Raises InputError naming the model type."""
    for name in os.listdir(folder):
        if name.endswith('.index.json'):
            shards = read_json(os.path.join(folder, name)).get('weight_map', {}).values()
            if any(os.path.basename(str(shard)) != shard for shard in shards):
                raise InputError(f'{where}: {name} names a file outside of the folder')
    options = dict(config=hf, dtype=torch.float32, key_mapping=renames, output_loading_info=True)
    options |= dict(ignore_mismatched_sizes=True)  # mismatched sizes are reported below
    with torch.random.fork_rng(devices=[]), reading(where):
        theirs, found = type(empty_model(hf)).from_pretrained(folder, **options)
    odd = [*found['missing_keys'], *found['unexpected_keys'], *found['mismatched_keys']]
    if odd:
        raise InputError(f'{where}: missing, unexpected or of another shape: {min(map(str, odd))}')
    if renames is SCALING:
        for name, weight in theirs.state_dict().items():
            if name.endswith(('q_proj.weight', 'k_proj.weight')):
                # RoPE on features 2 i and 2 i + 1 -> on i and i + half a head
                pairs = weight.view(-1, hf.head_dim // 2, 2, hf.hidden_size)
                weight.copy_(pairs.transpose(1, 2).reshape(weight.shape).clone())
    tokens = torch.arange(24)[None] * 7919 % hf.vocab_size
    with torch.no_grad():
        expected = theirs.eval()(tokens, use_cache=False).logits

    tensors = theirs.state_dict()
    del theirs  # its tensors are freed as ours are filled
    with torch.device('meta'):
        model = SLM(hf, dropout)
    empty = {name: torch.empty(tensor.shape) for name, tensor in model.state_dict().items()}
    model.load_state_dict(empty, assign=True)
    with reading(where):
        for ours, other in matching(model, tensors):
            ours.copy_(other)
    with torch.no_grad():
        difference = (model.eval()(tokens) - expected).abs().max() / expected.std()
    if not difference < 1e-3:
        off = f'its logits differ by {difference:.1g} standard deviations'
        raise InputError(f'{where}: model type {hf.model_type!r} is not supported: {off}')
    return model.train()


def twist_rows(old, n, embed_init, seed, where):
    """The n initial rows (n, C) of a unit embedding, from the text LM's rows (V, C). embed_init:
    first_rows (as when the embedding is resized), random, or mean (each is the mean row)."""
    generator = torch.Generator().manual_seed(seed)
    rows = old.new_empty(n, old.shape[1]).normal_(std=0.02, generator=generator)
    if embed_init == 'mean':
        rows[:] = old.mean(0)
    elif embed_init == 'first_rows' and n <= len(old):
        rows[:] = old[:n]
    elif embed_init != 'random':
        raise InputError(f'embed_init={embed_init} cannot make {n} rows from {len(old)} of {where}')
    return rows


def find_checkpoint(where, tensors=True):
    """The folder `where`, or the cache folder of a hub name, downloaded if needed: no code, and
    pickles only if there are no safetensors. Without `tensors`: only the json files."""
    if os.path.isdir(where):
        return where
    with reading(f'checkpoint {where!r}'):
        if where.count('/') != 1 or where.startswith(('.', '/', 'out/')):
            raise InputError('there is no such folder')
        files = ['*.json', '*.safetensors'] if tensors else ['*.json']
        folder = snapshot_download(where, allow_patterns=files)
        if tensors and not any(name.endswith('.safetensors') for name in os.listdir(folder)):
            folder = snapshot_download(where, allow_patterns=['*.json', 'pytorch_model*.bin'])
        return folder


def copy_part(source, target, part):
    """Copy the files of an encoder, a vocoder or a tokenizer, and nothing else of its folder."""
    for name in (f'{part}.json', f'{part}.safetensors', f'{part}_config.json'):
        path = os.path.join(source, name)
        if os.path.isfile(path):
            with open(path, 'rb') as old, write_atomic(os.path.join(target, name), 'wb') as new:
                shutil.copyfileobj(old, new)


PUBLIC_UNITS = dict(encoder='mhubert25', encoder_id='mhubert25', vocoder='hifigan25')
PUBLIC_UNITS |= dict(frame_rate=25.0, dedup=True)

# tiagoCuervo/slm_scaling: words in the names of its tensors, and transformers' words
SCALING = dict(output='model.embed_tokens', tok_embeddings='model.embed_tokens')
SCALING |= dict(layers='model.layers', norm='model.norm', attention_norm='input_layernorm')
SCALING |= dict(ffn_norm='post_attention_layernorm', attention='self_attn', feed_forward='mlp')
SCALING |= dict(wq='q_proj', wk='k_proj', wv='v_proj', wo='o_proj')
SCALING |= dict(w1='gate_proj', w2='down_proj', w3='up_proj')
SCALING = {rf'\b{theirs}\b': ours for theirs, ours in SCALING.items()}


def read_about(folder):
    """The content of a checkpoint's json files, in our layout or in one of the public layouts.

    Returns: transformers' config object; slam (None for a text LM), where PARTS in the folder
    are full paths and paths outside are dropped; order, the checkpoint's token for each of our
    tokens (None: the same); and renames, {pattern: name} of tensors, for `convert`.
    """
    path = os.path.join(folder, 'config.json')
    about, slam, order, renames = read_json(path), None, None, None
    with reading(path):
        kind, size = about.get('model_type'), about.get('vocab_size')
        if kind == 'speech_language_model':  # slprl/slam: the text LM's tensors under `lm.`
            base, slam, renames = about.get('base_model_name'), {**PUBLIC_UNITS}, {r'^lm\.': ''}
            about = about['base_config'] | dict(vocab_size=size)
            if size > 20_000:  # too large for units alone: this is SIMS. Its tokens are those of
                # the text LM, the units, `<speech>` and `<text>`. An utterance is scored as its
                # units, after the tokenizer's own prefix for text (Llama's begin of text)
                there = os.path.exists(os.path.join(folder, 'tokenizer.json'))
                place = folder if there else find_checkpoint(str(base), tensors=False)
                tokenizer, end, _ = read_tokenizer(place)
                first = tokenizer.token_to_id('<Un0>') or tokenizer.get_vocab_size()
                slam |= dict(tokenizer=os.path.abspath(place), text_lm=base, offset=first, end=end)
                prefix = [token for token in tokenizer.encode('').ids if token != end]
                slam |= dict(n_units=size - 2 - first, prefix=prefix, scoring='units')
        elif 'offset' in about:  # TWIST: unit u is token u + offset
            first, slam = about.pop('offset'), PUBLIC_UNITS
            bos, pad = about.get('bos_token_id'), about.get('pad_token_id') or 0
            bos = bos if isinstance(bos, int) and bos < first else 0
            order = torch.tensor([min(pad, size - 1), bos, *range(first, size)])
        elif kind == 'slm':  # slm_scaling: unit u is token u, then <S>, then padding
            a, slam, renames = about['model_args'], PUBLIC_UNITS | dict(scoring='units'), SCALING
            sizes = a['n_layers'], a['dim'], a['n_heads'], a.get('n_kv_heads') or a['n_heads']
            wide = a.get('hidden_dim') or -(-int(8 * a['dim'] / 3) // 256) * 256  # Llama's rule
            about = dict(zip(SIZES.values(), (*sizes, wide), strict=True), model_type='llama')
            about |= dict(rms_norm_eps=a.get('norm_eps') or 1e-5, tie_word_embeddings=True)
            about |= dict(max_position_embeddings=a.get('block_size') or 2048)
            about['vocab_size'] = size = a['vocab_size']
            order = torch.tensor([size - 1, size - 2, *range(size - 2)])
        elif kind == 'mobilellm' and not about.get('layer_sharing'):  # Llama, with code of its own
            about |= dict(model_type='llama', tie_word_embeddings=about.get('share_embedding'))
        about.pop('auto_map', None)
        hf = import_transformers().AutoConfig.for_model(**about)

    if os.path.exists(path := os.path.join(folder, 'slam.json')):  # ours
        slam = read_json(path)
        for part in PARTS:
            if slam.get(part) == part and os.path.isdir(inside := os.path.join(folder, part)):
                slam[part] = os.path.abspath(inside)
            elif (name := str(slam.get(part))) == part or '..' in name or os.path.isabs(name):
                slam[part] = None
    return hf, slam, order, renames


def read_tokenizer(folder):
    """(tokenizer, end, digest) of a text LM's folder: a tokenizers.Tokenizer that reads the names
    of special tokens as ordinary text; the token that ends a document; and the SHA-256 of
    tokenizer.json. No code of the folder is run. Raises InputError if there is no tokenizer."""
    path = os.path.join(folder, 'tokenizer.json')
    with reading(path):
        tokenizer, digest = Tokenizer.from_file(path), file_hash(path)
    tokenizer.encode_special_tokens = True
    eos = read_json(os.path.join(folder, 'tokenizer_config.json')).get('eos_token')
    end = tokenizer.token_to_id(eos.get('content') if isinstance(eos, dict) else str(eos))
    if end is None:
        raise InputError(f'{folder}: eos_token of tokenizer_config.json is not in tokenizer.json')
    return tokenizer, end, digest


# -----------------------------------------------------------------------------
# Audio

HOP, WINDOW, N_FFT, N_MELS = 160, 400, 512, 64  # 10 ms, 25 ms at 16 kHz; 64 bands leave none empty
MEL_SCALE = 'MelScale', N_MELS, SAMPLE_RATE, 0.0, None, N_FFT // 2 + 1


def load_audio(path, start=0.0, seconds=None, keep_partial=False, notes=None):
    """Read a sound file and mix it to mono: (samples,) at 16 kHz, float32, full scale 1.

    path: a name or a binary file object. start, seconds: the part to decode. notes: a list that
    receives a line for each doubt: cancelling channels (the louder one is used), a decoder that
    stopped early, digital silence. Raises InputError for a missing, unreadable or empty file, for a
    truncated one (unless keep_partial), and for samples that are not finite.
    """
    notes, is_path = [] if notes is None else notes, isinstance(path, (str, os.PathLike))
    name = path if is_path else 'the sound'  # the address of an object would differ between runs
    # names need not be UTF-8
    with reading(name), soundfile.SoundFile(os.fsencode(path) if is_path else path) as file:
        rate, total, begin = file.samplerate, file.frames, round(start * file.samplerate)
        # libsndfile corrects the length of truncated .wav, .aiff and .au; pipes write 2^31 or more
        cut = re.search(r'(?:data|SSND|Data Size) *: (\d+) \(should be (\d+)\)', file.extra_info)
        if cut and int(cut[1]) < 0x7FFF0000:
            total = max(total, total * int(cut[1]) // max(1, int(cut[2])))
        count = max(0, min(total - begin, math.inf if seconds is None else round(seconds * rate)))
        # read in blocks, to keep everything before the damage in a damaged file
        blocks, left, reason = [], count, ''
        try:
            file.seek(min(begin, file.frames))
            while len(block := file.read(min(1 << 14, left), 'float32', always_2d=True)):
                blocks.append(block)
                left -= len(block)
        except (RuntimeError, OSError) as error:
            reason = f' ({" ".join(str(error).split()) or "damaged"})'
    if not blocks:
        raise InputError(f'{name} holds no samples at {start:g} s{reason}')
    # lossy formats estimate their length; streams do not know it (2^63 - 1)
    if reason or 0.1 * rate < left < 1e14:
        notes.append(f'stopped early at {(count - left) / rate:.1f} of {count / rate:.1f} s')
        if not keep_partial:
            raise InputError(f'{name}: the decoder {notes[-1]}{reason}')

    samples = np.concatenate(blocks)  # (n, channels)
    wave, energies = samples.mean(1), np.square(samples).mean(0, dtype=float)
    # mixing n uncorrelated channels leaves 1/n of their mean energy
    if np.square(wave).mean(dtype=float) < 0.1 * energies.mean() / len(energies):
        notes.append('channels cancel: one of them taken')
        wave = samples[:, energies.argmax()].copy()
    if not np.ptp(wave) < 1e6:  # NaN fails too
        raise InputError(f'{name} holds NaN, infinite or very large samples')
    if np.ptp(wave) < 1e-4:
        notes.append('digital silence')
    return resample(wave, rate, SAMPLE_RATE)


def save_audio(path, wave, sample_rate=SAMPLE_RATE):
    """Write (samples,) as 16-bit wav or flac, atomically, scaled down if it would clip."""
    wave = np.asarray(wave, dtype=np.float32)
    wave = wave * (0.99 / np.abs(wave).max(initial=0.99))
    buffer = io.BytesIO()  # soundfile's errors do not mention a full disk
    soundfile.write(buffer, wave, sample_rate, 'PCM_16', format=str(path).rpartition('.')[2])
    with write_atomic(path, 'wb') as file:
        file.write(buffer.getbuffer())


@lru_cache(16)
def transform(name, *args, **options):
    """A module of torchaudio.transforms, cached by its arguments."""
    return getattr(transforms, name)(*args, **options)


def resample(wave, rate, wanted):
    """(samples,) at `rate` Hz -> (ceil(samples * wanted / rate),) at `wanted` Hz, float32."""
    wave = torch.as_tensor(wave, dtype=torch.float32)
    return wave if rate == wanted or not len(wave) else transform('Resample', rate, wanted)(wave)


def dedup(units):
    """Collapse runs of equal units: (frames,) -> units (n,) and their frames (n,), both long."""
    return torch.unique_consecutive(torch.as_tensor(units, dtype=torch.long), return_counts=True)


def log_mel(wave):
    """Natural log of mel energies, at least -16: (samples,) at 16 kHz -> (max(1, samples // 160),
    N_MELS). Frame t has the 25 ms around sample 160 t + 80, with zeros outside the wave."""
    side, block, mels = (N_FFT - HOP) // 2, 500 * HOP, []
    wave = F.pad(wave, (side, side + max(0, HOP - len(wave))))
    spectrogram = transform('Spectrogram', N_FFT, WINDOW, HOP, power=None, center=False)
    for first in range(0, len(wave) - N_FFT + 1, block):  # 5 s at a time stay in the cache
        spectra = spectrogram(wave[first:][: block + N_FFT - HOP])  # (bins, frames), complex
        mels.append(transform(*MEL_SCALE)(spectra.real.square() + spectra.imag.square()).T)
    return torch.cat(mels).clamp_(min=1e-7).log_()


# -----------------------------------------------------------------------------
# UnitEncoder: wave -> units

# encoders by name (pad: zeros added at each end of the wave); URL and sha256 of published files
with open(os.path.join(os.path.dirname(__file__), 'config', 'encoders.json')) as file:
    ENCODERS, PUBLISHED = json.load(file).values()
# settings that change the units, by kind; encoder_id hashes them with the centroids and the net
SETTINGS = dict(hubert=('layer', 'pad'), mfcc=('n_cep', 'lifter', 'c0', 'range', 'delta'))


class UnitEncoder:
    """Speech to units: features at 25 or 50 frames per second, each assigned to one of n centroids.

    Features are a layer of HuBERT, wav2vec 2 or WavLM (kind 'hubert') or cepstra ('mfcc', offline).
    """

    def __init__(self, config, centroids=None, device='cpu'):
        self.config, self.centroids, self.net = dict(config), centroids, None  # None: not fitted
        self.settings, self.frame_rate = SETTINGS[config['kind']], 25.0
        if config['kind'] == 'mfcc':
            return
        layer, nets = config.get('layer'), ('hubert', 'wav2vec2', 'wavlm')
        with reading(f'the net of the encoder: {config["model"]}'):
            folder, transformers = find_checkpoint(config['model']), import_transformers()
            hf = transformers.AutoConfig.from_pretrained(folder)
            if hf.model_type not in nets or layer not in range(hf.num_hidden_layers + 1):
                raise ValueError(f'layer {layer} of a {hf.model_type} of {hf.num_hidden_layers}')
            hf.num_hidden_layers, hf.add_adapter = layer, False
            options = dict(config=hf, dtype=torch.float32, output_loading_info=True)
            self.net, report = transformers.AutoModel.from_pretrained(folder, **options)
            if lost := sorted(set(report['missing_keys']) - {'masked_spec_embed'}):
                raise ValueError(f'{len(lost)} tensors are missing, such as {lost[0]}')
        if hf.do_stable_layer_norm:  # the norm after the last layer is not part of hidden_states
            self.net.encoder.layer_norm.register_forward_hook(lambda norm, x, normed: x[0])
        self.net.to(pick_device(device))
        # samples between frames, and samples that one frame covers
        self.hop, kernels = math.prod(hf.conv_stride), enumerate(hf.conv_kernel)
        self.reach = 1 + sum((k - 1) * math.prod(hf.conv_stride[:i]) for i, k in kernels)
        self.frame_rate = SAMPLE_RATE / self.hop
        # maximum seconds in one forward pass; WavLM's attention needs much memory
        self.stretch = 100 if hf.model_type == 'wavlm' else 300

    @classmethod
    def from_pretrained(cls, where, layer=None, kmeans=None, device='cpu'):
        """Load a folder by save_pretrained; 'mhubert25', 'hubert50' or 'mfcc'; or, with `layer`, a
        folder or hub name of any HuBERT, wav2vec 2 or WavLM. kmeans: a file of centroids; '': none,
        to be fitted. Raises InputError for missing, damaged or mismatched parts."""
        where, centroids, public = str(where).rstrip('/'), None, None
        if os.path.exists(os.path.join(where, 'encoder.json')):
            config = read_json(os.path.join(where, 'encoder.json'))
            centroids = read_kmeans(os.path.join(where, 'encoder.safetensors'))
            if layer not in (None, config.get('layer')):
                raise InputError(f'{where} uses layer {config.get("layer")}, not {layer}')
            if config.get('switch'):
                raise InputError(f'{where}: encoders with `switch` are no longer supported')
        else:
            model = os.path.abspath(where) if os.path.isdir(where) else where
            config = ENCODERS.get(where, dict(kind='hubert', model=model, pad=0)) | dict(name=where)
            if kmeans is None and where in PUBLISHED and layer in (None, config['layer']):
                kmeans, public = fetch(where), where
            config |= {} if layer is None else dict(layer=layer)
        if kmeans:
            centroids = read_kmeans(kmeans)
            config['encoder_id'] = public
        with reading(where):
            return cls(config, centroids, device)

    def save_pretrained(self, folder):
        """Write encoder.json and encoder.safetensors (the centroids). The net is stored by its hub
        name, or by the path of its local folder, which must stay in place."""
        about = dict(frame_rate=self.frame_rate, n_units=self.n_units, encoder_id=self.encoder_id)
        write_part(folder, 'encoder', self.config | about, dict(centroids=self.centroids))

    n_units = property(lambda self: 0 if self.centroids is None else len(self.centroids))

    @property
    def encoder_id(self):
        """Identifies the units: the name of a public encoder with its published centroids, else a
        hash of the settings, the centroids and the net."""
        if self.config.get('encoder_id') in PUBLISHED:
            return self.config['encoder_id']
        settings = [float(self.config[key]) for key in self.settings if key in self.config]
        # leave out the random mask embedding, and the weight norm, whose rounding varies by machine
        unsure = re.compile(r'masked_spec_embed|encoder\.pos_conv_embed\.conv\.(weight|param)')
        tensors = sorted(self.net.state_dict().items()) if self.net else []
        tensors = [self.centroids, *(x for name, x in tensors if not unsure.match(name))]
        digest = content_hash(settings, *(x.cpu().numpy().tobytes() for x in tensors))
        return f'{self.config["kind"]}-{digest[:12]}'

    @torch.inference_mode()
    def features(self, wave):
        """(samples,) at 16 kHz -> (frames, D) float32, frames >= 1. With a net: transformers'
        hidden_states[layer] of the raw wave, in overlapping parts if over `stretch` seconds."""
        wave = torch.as_tensor(wave, dtype=torch.float32)
        if self.net is None:
            return mfcc(wave, self.config)
        pad, precision = self.config['pad'], torch.get_float32_matmul_precision()
        wave = F.pad(wave, (pad, max(pad, self.reach - pad - len(wave)))).to(self.net.device)
        frames, parts = (len(wave) - self.reach) // self.hop + 1, []
        longest = int(self.stretch * self.frame_rate)
        context = longest // 10 if frames > longest else 0
        step = longest - 2 * context  # the context of each side is a tenth
        torch.set_float32_matmul_precision('high' if wave.is_cuda else precision)  # TF32
        for start in range(0, frames, step):
            first, last = max(0, start - context), min(frames, start + step + context)
            end = None if last == frames else (last - 1) * self.hop + self.reach
            hidden = self.net(wave[None, first * self.hop : end]).last_hidden_state[0]
            parts.append(hidden[start - first :][:step])
        torch.set_float32_matmul_precision(precision)
        return torch.cat(parts)

    def fit(self, features, n_units, seed=0):
        """k-means on features (frames, D), the same for any number of threads. Raises InputError
        for fewer frames than units, or for silence only."""
        from sklearn.cluster import MiniBatchKMeans

        fitted = MiniBatchKMeans(n_units, batch_size=10_000, n_init=1, random_state=seed)
        with reading('the speech to fit on'):
            fitted.fit(features.numpy())
        if not fitted.inertia_ > 0:
            raise InputError('the speech to fit on is silent, or no two of its sounds differ')
        self.centroids = torch.from_numpy(fitted.cluster_centers_).float()
        self.config['encoder_id'] = None

    def encode(self, wave):
        """(samples,) at 16 kHz -> (frames,) long units on the CPU: the nearest centroids."""
        features = self.features(wave)
        if not self.n_units or features.shape[1] != self.centroids.shape[1]:
            raise InputError(f'the encoder has no k-means for {features.shape[1]} features')
        centroids = self.centroids.to(features.device)
        # half the squared distances, without the term that all units of a frame share
        return (centroids.square().sum(1) / 2 - features @ centroids.T).argmin(1).cpu()


def mfcc(wave, config):
    """Log-mel cepstra relative to the utterance's loudness, two of 20 ms a frame, and `delta` times
    their slopes, which voices share more: (samples,) -> (max(1, samples // 640), 4 n_cep)."""
    mel = log_mel(F.pad(wave, (0, max(0, 4 * HOP - len(wave)))))
    mel = mel[: len(mel) // 4 * 4]
    energy = torch.logsumexp(mel, 1) - math.log(N_MELS)
    loud = energy.sort().values[int(0.95 * (len(energy) - 1))].clamp(min=-7)  # -7 is silence
    halves = (mel + (config['range'] - loud)).clamp_(min=0).view(-1, 2, 2, N_MELS).mean(2)
    weight = torch.arange(config['n_cep']).clamp(min=1) ** config['lifter'] / 2**0.5
    weight[0] = config['c0']
    cepstra = (halves @ functional.create_dct(len(weight), N_MELS, 'ortho') * weight).flatten(1)
    slopes = functional.compute_deltas(cepstra.T, 3).T  # not in encoders of earlier versions
    return torch.cat([cepstra, config['delta'] * slopes], 1) if 'delta' in config else cepstra


def write_part(folder, name, config, tensors):
    """Write name.safetensors and name.json, each atomically."""
    with write_atomic(os.path.join(folder, name + '.safetensors'), 'wb') as file:
        file.write(save(tensors))
    with write_atomic(os.path.join(folder, name + '.json')) as file:
        json.dump(config, file, indent=2)


def fetch(name):
    """The local copy of a file of PUBLISHED, in torch.hub's cache. Raises InputError."""
    url, sha256 = PUBLISHED[name]
    path = os.path.join(torch.hub.get_dir(), 'checkpoints', os.path.basename(url))
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with reading(f'{url} (a copy may be put at {path})'):
            torch.hub.download_url_to_file(url, path, progress=False)
    if sha256 and file_hash(path) != sha256:
        raise InputError(f'{path} is not the published file (its sha256 differs): delete it')
    return path


def read_kmeans(path):
    """The centroids (n_units, D) of a .safetensors file with `centroids`, or of a joblib dump of
    scikit-learn's KMeans, without executing any of its code. Raises InputError."""
    from joblib import numpy_pickle

    class Array(numpy_pickle.NumpyArrayWrapper):
        def read(self, *args):
            if self.dtype.hasobject:  # a pickle inside the pickle
                raise ValueError('it holds Python objects: refused')
            self.subclass = np.ndarray
            return super().read(*args)

    class Reader(numpy_pickle.NumpyUnpickler):
        def find_class(self, module, name):
            if not module.startswith(('sklearn.cluster.', 'numpy', 'joblib.numpy_pickle')):
                raise ValueError(f'it asks to run {module}.{name}: refused')
            # a class that does nothing replaces all others, and ndarray, which reads any memory
            inert = type(name, (), dict(__init__=lambda self, *args: None))
            return dict(NumpyArrayWrapper=Array, dtype=np.dtype).get(name, inert)

    with reading(path), open(path, 'rb') as file:
        if path.endswith('.safetensors'):
            centroids = load_file(path)['centroids'].float()
        else:
            kmeans = Reader(path, file, ensure_native_byte_order=True).load()
            centroids = torch.from_numpy(kmeans.cluster_centers_).float()
        if centroids.ndim != 2 or not len(centroids) or not centroids.isfinite().all():
            raise ValueError('its centroids are not (n_units, D) finite numbers')
    return centroids


# -----------------------------------------------------------------------------
# UnitVocoder: units -> wave


class UnitVocoder:
    """Units to speech. This voice is a table, the mean log-mel spectra of each unit, inverted by
    Griffin-Lim; from_pretrained may return a HifiGan instead.

    config: the content of vocoder.json. tensors: mel (n_units, 10 ms steps per frame, N_MELS), and
    durations (n_units,), the mean run lengths in frames.
    """

    def __init__(self, config, tensors, device='cpu'):
        self.config, self.device = config, torch.device(device)
        self.tensors = {name: x.to(self.device, torch.float32) for name, x in tensors.items()}
        self.n_units, self.encoder_id = config['n_units'], config.get('encoder_id')
        self.sample_rate, self.frame_rate = config['sample_rate'], float(config['frame_rate'])

    @classmethod
    def from_pretrained(cls, where, device='cpu'):
        """Load a folder from save_pretrained, 'hifigan25' (downloaded once, checked), or a HiFi-GAN
        generator NAME.pt with NAME_config.json beside it. Raises InputError for anything else."""
        if not where:
            raise InputError('there is no vocoder for these units: give one with --vocoder')
        with reading(f'vocoder {where}'):
            if public := where == 'hifigan25':
                where = [fetch(where + end) for end in ('_config.json', '.pt')][-1]
            if where.endswith('.pt'):
                config = read_json(where[:-3] + '_config.json') | dict(kind='hifigan')
                config |= dict(encoder_id='mhubert25') if public else {}
                tensors = torch.load(where, map_location='cpu', weights_only=True)['generator']
            else:
                config = read_json(os.path.join(where, 'vocoder.json'))
                tensors = load_file(os.path.join(where, 'vocoder.safetensors'))
            kind = dict(table=UnitVocoder, hifigan=HifiGan)[config['kind']]
            voice = kind(config, tensors, device)
            voice.decode([voice.n_units - 1])  # fails if a tensor is missing or has a wrong shape
        return voice

    @classmethod
    def fit(cls, speech, encoder):
        """The voice of an encoder's units; an unseen unit gets the mean of all. speech: pairs of a
        wave (samples,) at 16 kHz and its units (frames,), not de-duplicated."""
        n_units, steps = encoder.n_units, round(100 / encoder.frame_rate)  # of 10 ms
        if steps * encoder.frame_rate != 100:
            raise InputError(f'a voice needs frames of whole 10 ms: {encoder.frame_rate:g} Hz')
        mel = torch.zeros(n_units, steps, N_MELS, dtype=torch.float64)  # sums
        frames, runs = torch.zeros(2, n_units, dtype=torch.long)
        for wave, units in speech:
            wave, units = torch.as_tensor(wave), torch.as_tensor(units, dtype=torch.long)
            level = wave.square().mean().sqrt().clamp(min=1e-5)
            found = log_mel(wave * (0.08 / level))  # all speech with one RMS
            n = min(len(units), len(found) // steps)  # complete frames
            mel.index_add_(0, units[:n], found[: n * steps].view(n, steps, N_MELS).double())
            frames += torch.bincount(units[:n], minlength=n_units)
            runs += torch.bincount(dedup(units)[0], minlength=n_units)
        durations = (frames / runs.clamp(min=1)).clamp(min=1)
        mel[frames == 0], frames[frames == 0] = mel.sum(0), frames.sum()
        mel = (mel / frames[:, None, None]).float()
        config = dict(kind='table', n_units=n_units, frame_rate=encoder.frame_rate)
        config |= dict(sample_rate=SAMPLE_RATE, encoder_id=encoder.encoder_id)
        return cls(config, dict(mel=mel, durations=durations))

    def save_pretrained(self, folder):
        """Write vocoder.json and vocoder.safetensors."""
        write_part(folder, 'vocoder', self.config, self.tensors)

    def durations(self, units):
        """De-duplicated units (n,) -> the frames of each (n,), at least 1, on the CPU: their means,
        rounded so that cumulative sums stay within half a frame."""
        units = torch.as_tensor(units, dtype=torch.long)
        mean = self.tensors['durations'].cpu()[units].clamp(min=1)
        beyond = (mean - 1).double().cumsum(0).add(0.5).long()
        return 1 + torch.diff(beyond, prepend=beyond.new_zeros(1))

    @torch.inference_mode()
    def decode(self, units, durations=None):
        """De-duplicated units (n,) of one utterance -> (samples,) float32 at `sample_rate`, on the
        CPU. durations: (n,) frames; None: predicted."""
        durations = self.durations(units) if durations is None else torch.as_tensor(durations)
        frames = torch.as_tensor(units, dtype=torch.long).repeat_interleave(durations)
        return self.synthesize(frames.to(self.device)).cpu() if len(frames) else torch.zeros(0)

    def synthesize(self, frames):
        """Units (frames,), one per frame -> (samples,)."""
        # (N_MELS, 10 ms steps), on the CPU, so that the wave is the same on all devices; a step of
        # silence at each end prevents clicks
        mel = F.pad(self.tensors['mel'][frames].cpu().flatten(0, 1), (0, 0, 1, 1), value=-16.0).T
        # an FFT bin gets the energy of the bands around it, and none at 0 and 8 kHz
        filters = transform(*MEL_SCALE).fb  # (bins, N_MELS)
        spread = filters / filters.sum(1, keepdim=True).clamp(min=1e-6)
        magnitude = torch.exp(0.5 * spread @ (mel - filters.sum(0).log()[:, None]))
        magnitude[[0, 1, -1]] = 0
        invert = transform('GriffinLim', N_FFT, 32, WINDOW, HOP, power=1, rand_init=False)
        # our steps are centred in their 10 ms, torchaudio's windows on multiples of 10 ms
        return invert(magnitude)[HOP // 2 :][: (mel.shape[1] - 2) * HOP]


class HifiGan(UnitVocoder):
    """The unit HiFi-GAN (Polyak et al. 2021): transformers' generator, and a duration predictor. It
    speaks with the first speaker and style. config: its JSON. tensors: named as in fairseq; weight
    norm is folded in place."""

    def __init__(self, config, tensors, device='cpu'):
        transformers = import_transformers()
        for name in [name[:-2] for name in tensors if name.endswith('.weight_g')]:
            g, v = tensors.pop(name + '_g'), tensors.pop(name + '_v')
            tensors[name] = v * (g / v.flatten(1).norm(dim=1).view(g.shape))  # w = g v / |v|
        channels, width, _ = tensors['conv_pre.weight'].shape
        known = dict(upsample_initial_channel=channels, model_in_dim=width, normalize_before=False)
        hf = transformers.SpeechT5HifiGanConfig(**config | known)
        about = dict(n_units=len(tensors['dict.weight']), sample_rate=hf.sampling_rate)
        about |= dict(frame_rate=hf.sampling_rate / math.prod(hf.upsample_rates))
        super().__init__(config | about, tensors, device)
        with torch.device('meta'):  # without memory: load_state_dict assigns our tensors
            net = self.net = transformers.SpeechT5HifiGan(hf)
        ours = {n: self.tensors[n.replace('upsampler', 'ups')] for n, _ in net.named_parameters()}
        net.load_state_dict(ours, strict=False, assign=True)

    def durations(self, units):
        """As above: exp(prediction) - 1, rounded; all 1 if there is no predictor."""
        units = torch.as_tensor(units, dtype=torch.long, device=self.device)
        net = {k[14:]: v for k, v in self.tensors.items() if k.startswith('dur_predictor.')}
        if not net or not len(units):
            return torch.ones_like(units).cpu()
        x = self.tensors['dict.weight'][units]  # (n, C)
        for i in '12':
            weight, bias = net[f'conv{i}.0.weight'], net[f'conv{i}.0.bias']
            x = F.conv1d(x.T, weight, bias, padding='same').relu().T
            x = F.layer_norm(x, x.shape[1:], net[f'ln{i}.weight'], net[f'ln{i}.bias'])
        x = F.linear(x, net['proj.weight'], net['proj.bias'])[:, 0]
        return (x.exp() - 1).round().clamp(min=1).long().cpu()

    def synthesize(self, frames):
        """Units (frames,), one per frame -> (samples,) in [-1, 1]."""
        tables = [self.tensors.get(name + '.weight', ()) for name in ('spkr', 'style')]
        rows = [table[0].expand(len(frames), -1) for table in tables if len(table)]
        return self.net(torch.cat((self.tensors['dict.weight'][frames], *rows), dim=1))


# -----------------------------------------------------------------------------
# Finding and reading data

AUDIO_EXTENSIONS = ('.wav', '.flac', '.ogg', '.oga', '.opus', '.mp3', '.aiff', '.aif', '.aifc')
AUDIO_EXTENSIONS += ('.au', '.sph', '.caf', '.w64')
MARK = '<|endoftext|>'  # separates the documents of a text


def find_audio(path, extensions=AUDIO_EXTENSIONS):
    """The files with these extensions below a folder, or [path] for a file: sorted, without hidden
    ones. Links are followed. Raises InputError if there is none."""
    if os.path.isfile(path):
        return [path]
    files, seen = [], set()
    for folder, folders, names in os.walk(path, followlinks=True):
        if os.path.realpath(folder) in seen:  # a cycle of links
            folders.clear()
            continue
        seen.add(os.path.realpath(folder))
        files += [os.path.join(folder, name) for name in names if not name.startswith('.')]
    if found := sorted(file for file in files if file.lower().endswith(extensions)):
        return found
    raise InputError(f'{path} is no file, and no folder with {" ".join(extensions)}')


def open_shards(where):
    """The shards of a data set, {name: function that opens it}, in order.

    where: a .parquet file, a folder of them, hub:NAME[:[config/]split] for a data set on the
    Hugging Face hub, or one of its shards, hub:NAME:split#3/64. Raises InputError.
    """
    with reading(where):
        from datasets import load_dataset

        load = partial(load_dataset, streaming=True)
        if not where.startswith('hub:'):  # data_files takes patterns, in which [*] is a plain *
            load, paths = partial(load, 'parquet', split='train'), find_audio(where, ('.parquet',))
            return {p: partial(load, data_files=re.sub('[*?[]', r'[\g<0>]', p)) for p in paths}
        name, split = re.fullmatch('hub:([^:#]+):?([^#]*)#?.*', where).groups()
        config, slash, wanted = split.rpartition('/')
        data, shards = load(name, config or None, split=wanted or None), {}
        for key, rows in ({wanted: data} if wanted else data).items():
            for i in range(n := rows.num_shards):
                shards[f'hub:{name}:{config}{slash}{key}#{i}/{n}'] = partial(rows.shard, n, i)
        return {where: shards[where]} if '#' in where else shards


def read_parquet(where):
    """Yields the rows of the shards of open_shards(where), as dicts of plain Python values. Audio
    is dict(bytes=..., path=...), null is None. Memory: one row group. Raises InputError."""
    for name, open_shard in open_shards(where).items():
        with reading(name):
            yield from open_shard().decode(False)


def read_documents(path):
    """The documents of a text file. They end at <|endoftext|> or, without it, at blank lines."""
    with reading(path), open_text(path) as file:
        text = file.read()
    return re.split(re.escape(MARK) if MARK in text else r'\n\s*\n', text)


def open_text(path, newline=None):
    """Open a text file: UTF-8, or UTF-16 with a byte order mark. Raises InputError for UTF-16
    without a mark; text in any other encoding fails when it is read."""
    with open(path, 'rb') as file:
        head = file.read(4096)
    wide = head.startswith((b'\xff\xfe', b'\xfe\xff'))
    if b'\0' in head and not wide:
        raise InputError(f'{path}: byte 0x00, as in UTF-16 without a mark: save it as UTF-8')
    return open(path, encoding='utf-16' if wide else 'utf-8-sig', newline=newline)


@contextlib.contextmanager
def reading(path):
    """Turns any error raised while this file is read into an InputError that names it."""
    try:
        yield
    except InputError as error:
        raise InputError(error if str(path) in str(error) else f'{path}: {error}') from None
    except Exception as error:
        reason = ' '.join(str(error).split())[:200] or type(error).__name__
        raise InputError(f'{path} cannot be read: {reason}') from None


def read_json(path):
    """The content of a JSON file. Raises InputError."""
    with reading(path), open(path, 'rb') as file:
        return json.load(file)


def read_jsonl(path):
    """Yields (line number from 1, dict) of a file of JSON lines; empty lines are skipped. NaN,
    which is not JSON, is read as None. Raises InputError naming the line."""
    with reading(path), open_text(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                with reading(f'{path}, line {number}'):
                    row = {**json.loads(line, parse_constant=lambda name: None)}  # an object
                yield number, row


@contextlib.contextmanager
def write_atomic(path, mode='w'):
    """`with write_atomic(path) as file: ...`: `path` gets the complete file or none at all. Makes
    missing folders. mode: 'w' (UTF-8) or 'wb'."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    temporary = f'{path}.{os.getpid()}.tmp'
    try:
        with open(temporary, mode, encoding=None if 'b' in mode else 'utf-8') as file:
            yield file
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)


# -----------------------------------------------------------------------------
# Helpers shared by scripts; devices, processes and runs


def content_hash(*parts):
    """SHA-256 as 64 hexadecimal digits. Parts: bytes, or anything that JSON can hold."""
    parts = (x if isinstance(x, bytes) else json.dumps(x, sort_keys=True).encode() for x in parts)
    return hashlib.sha256(b''.join(len(x).to_bytes(8, 'big') + x for x in parts)).hexdigest()


def file_hash(path):
    """SHA-256 of a file's content, as 64 hexadecimal digits."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


SPLITS = dict(train='train', training='train', test='test', testing='test')
SPLITS |= dict.fromkeys(('val', 'valid', 'validation', 'dev', 'eval'), 'val')


def split_of(name, default=None):
    """'train', 'val' or 'test' for a split's name in any case: dev-clean, train.100, TEST ... For
    any other name `default`, or InputError if that is None."""
    word = re.split(r'[-_.:/\[\d]', str(name).strip().lower())[0]
    if word not in SPLITS and default is None:
        raise InputError(f'split {name!r} is not known: expected {", ".join(SPLITS)}, or train-100')
    return SPLITS.get(word, default)


def check_encoder_ids(parts):
    """Raise InputError if units of different encoders would be mixed. parts: {name: encoder_id or
    None}. None, from files older than encoder_id, matches everything."""
    known = {name: encoder_id for name, encoder_id in parts.items() if encoder_id}
    if len(set(known.values())) > 1:
        raise InputError(f'units of different encoders do not mix: encoder_id of {known}')


def auto_bleu(words, n=2):
    """auto-BLEU (Lakhotia et al. 2021): the share of a sequence's n-grams that occur in it more
    than once; 0 without n-grams. words: a list of words or units, or a text, of which NLTK's Penn
    Treebank rules make words."""
    if isinstance(words, str):
        from nltk.tokenize import NLTKWordTokenizer  # a second to import; needs no data

        words = NLTKWordTokenizer().tokenize(words)
    counts = Counter(zip(*(words[i:] for i in range(n)), strict=False))
    return sum(count for count in counts.values() if count > 1) / max(1, counts.total())


def pack_rows(lengths, width):
    """Best fit decreasing: rows of indices into `lengths`; the lengths in a row sum to <= width.
    The longest is placed first, each in the fullest row that has room; equal lengths keep their
    order. A length over `width` gets its own row."""
    rows, free = [], []  # free: (room, row), sorted by room
    for i in sorted(range(len(lengths)), key=lambda i: -int(lengths[i])):
        length = int(lengths[i])
        at = bisect_left(free, (length, -1))
        room, row = free.pop(at) if at < len(free) else (width, len(rows))
        rows += [[]] * (row == len(rows))
        rows[row].append(i)
        insort(free, (room - length, row))
    return rows


def pick_device(device='auto'):
    """'auto' -> cuda, mps or cpu; any other name -> that torch.device. Raises InputError."""
    if device == 'auto':
        device = 'mps' if torch.backends.mps.is_available() else 'cpu'
        device = 'cuda' if torch.cuda.is_available() else device
    with reading(f'--device={device}'):  # fails if the machine does not have it
        return torch.empty(0, device=device).device


def pick_dtype(dtype, device):
    """'auto' -> bfloat16 on cuda, else float32; or one of the two by name, no float16."""
    auto = torch.bfloat16 if torch.device(device).type == 'cuda' else torch.float32
    with reading(f'--dtype={dtype}'):
        return dict(auto=auto, bfloat16=torch.bfloat16, float32=torch.float32)[dtype]


def start_worker():
    """Initializer of worker processes: ignore Ctrl-C, and end when the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)

    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def start_processes(device):
    """This process's device and rank, and the number of processes, as set by torchrun."""
    rank, local = (int(os.environ.get(key, 0)) for key in ('RANK', 'LOCAL_RANK'))
    world, device = int(os.environ.get('WORLD_SIZE', 1)), pick_device(device)
    if device.type == 'cuda':
        device = torch.device('cuda', local) if world > 1 else device
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')
    if world > 1:
        dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo')
    if rank:
        sys.stdout = open(os.devnull, 'w')  # only the first process prints
    return device, rank, world


def catch_signals():
    """The SIGINT and SIGTERM received so far. The second one ends the process at once."""
    caught = []

    def catch(number, frame):
        caught.append(number)
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)

    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, catch)
    return caught


def open_run(out_dir, fresh, resume, free, rank=0):
    """Continue the run in out_dir, or start one. Returns its state (train_state.pt, or `fresh`) and
    log.jsonl, open for appending. Log lines that a killed run wrote after that state are removed.

    The log stays locked while the process lives. Raises InputError if another process trains in
    out_dir, if the state cannot be read, or if a knob that is not in `free` has changed.
    """
    import fcntl  # not available on Windows

    path, state = os.path.join(out_dir, 'train_state.pt'), fresh
    if resume and os.path.exists(path):
        with reading(path):
            state = torch.load(path, map_location='cpu', mmap=True, weights_only=True)
            before, now = state['config'], fresh['config']
        for knob in sorted(before.keys() & now.keys() - set(free)):
            if before[knob] != now[knob]:
                known = f'{out_dir} is a run with {knob}={before[knob]!r}, not {now[knob]!r}'
                raise InputError(f'{known}: choose another --out_dir, or --resume=False')
    if rank:
        return state, open(os.devnull, 'w')
    os.makedirs(out_dir, exist_ok=True)
    file = open(os.path.join(out_dir, 'log.jsonl'), 'a+', buffering=1, encoding='utf-8')
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f'another process is training in {out_dir}') from None
    except OSError:
        pass  # a file system without locks
    end = file.seek(0)
    while (line := file.readline()).endswith('\n') and json.loads(line)['step'] <= state['step']:
        end = file.tell()
    file.truncate(end)
    return state, file
