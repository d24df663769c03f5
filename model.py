"""The three networks and how they load and save.

SLM           units -> next unit     a transformer over speech units, the same function as transformers' qwen2, llama, opt, gpt-neox
UnitEncoder   wave  -> units         HuBERT-like features, or MFCC offline, and k-means
UnitVocoder   units -> wave          the unit HiFi-GAN, or offline a table of spectra and Griffin-Lim
"""

import contextlib
import io
import json
import math
import os
import pickle
import re
import shutil
import signal
import threading
import time
from bisect import bisect_left, insort
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import nn

PAD, BOS, EOS, OFFSET = 0, 1, 1, 2  # <S> is both ends of an utterance; unit u is token u + OFFSET
SAMPLE_RATE = 16000


class InputError(ValueError):
    """Something the user can mend; scripts print it as one line and exit with code 2."""


def pick_device(device='auto'):
    """'auto' -> cuda, else mps, else cpu; anything else as torch.device reads it. Raises InputError if it is unknown or not there."""
    if device == 'auto':
        device = (
            'cuda'
            if torch.cuda.is_available()
            else 'mps'
            if torch.backends.mps.is_available()
            else 'cpu'
        )
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f'device {device!r} cannot be used here: {str(error).splitlines()[0]}'
        ) from None


def pick_dtype(dtype, device):
    """'auto' -> bfloat16 on cuda, float32 elsewhere; else the torch dtype of that name."""
    if dtype == 'auto':
        return torch.bfloat16 if torch.device(device).type == 'cuda' else torch.float32
    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise InputError(f'dtype {dtype!r} is unknown: use auto, float32 or bfloat16')
    return getattr(torch, dtype)


# -----------------------------------------------------------------------------
# SLM: the speech language model

# Where each family's checkpoint keeps the tensors of our modules; several names are joined along the output dimension, so that one
# matrix product computes them. Biases follow their weights.
LLAMA_NAMES = dict(
    prefix='model.',
    layer='layers',
    embed='embed_tokens',
    norm='norm',
    head='lm_head',
    norm1='input_layernorm',
    norm2='post_attention_layernorm',
    qkv=('self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj'),
    out='self_attn.o_proj',
    up=('mlp.gate_proj', 'mlp.up_proj'),
    down='mlp.down_proj',
)
NAMES = dict(
    qwen2=LLAMA_NAMES,
    llama=LLAMA_NAMES,
    opt=dict(
        prefix='model.decoder.',
        layer='layers',
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
    gpt_neox=dict(
        prefix='gpt_neox.',
        layer='layers',
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
)
_KEYS = dict(
    vocab_size='vocab_size',
    n_layer='num_hidden_layers',
    n_embd='hidden_size',
    n_head='num_attention_heads',
    context='max_position_embeddings',
    tied='tie_word_embeddings',
)
_LLAMA_KEYS = _KEYS | dict(
    n_kv_head='num_key_value_heads',
    n_ffn='intermediate_size',
    norm_eps='rms_norm_eps',
    act='hidden_act',
)
HF_KEYS = dict(  # our names of the dimensions -> those of a transformers config.json
    qwen2=_LLAMA_KEYS,
    llama=_LLAMA_KEYS | dict(head_dim='head_dim', mlp_bias='mlp_bias'),
    opt=_KEYS
    | dict(
        n_ffn='ffn_dim',
        embed_dim='word_embed_proj_dim',
        pre_norm='do_layer_norm_before',
        act='activation_function',
    ),
    gpt_neox=_KEYS
    | dict(
        n_ffn='intermediate_size',
        norm_eps='layer_norm_eps',
        rotary_pct='rotary_pct',
        act='hidden_act',
        parallel='use_parallel_residual',
    ),
)
HF_DEFAULTS = dict(  # what a config.json may leave out
    qwen2=dict(tied=False),
    llama=dict(tied=False),
    opt=dict(tied=True, norm_eps=1e-5, act='relu'),
    gpt_neox=dict(tied=False, rotary_pct=0.25, norm_eps=1e-5, act='gelu'),
)
ARCHITECTURES = dict(
    qwen2='Qwen2ForCausalLM',
    llama='LlamaForCausalLM',
    opt='OPTForCausalLM',
    gpt_neox='GPTNeoXForCausalLM',
)
OBSOLETE = (
    'rotary_emb.inv_freq',
    'attention.bias',
    'attention.masked_bias',
    'decoder.version',
)  # buffers that old files carry
POSITION_OFFSET = 2  # OPT's learned positions begin at row 2
ACTIVATIONS = dict(
    relu=F.relu, silu=F.silu, gelu=F.gelu, gelu_new=lambda x: F.gelu(x, approximate='tanh')
)


@dataclass
class SLMConfig:
    """The dimensions of an SLM; `family` spells the rest (norms, activation, biases, positions) as transformers' model does."""

    family: str = 'qwen2'  # qwen2, llama, opt or gpt_neox
    vocab_size: int = 502  # n_units + OFFSET
    n_layer: int = 24
    n_embd: int = 896
    n_head: int = 14
    n_kv_head: int = 2  # grouped-query attention: fewer heads for keys and values
    n_ffn: int = 4864
    head_dim: int = 0  # 0: n_embd / n_head
    context: int = 1024  # tokens; with learned positions (opt) a hard limit
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # Llama 3's, or linear, as in its config.json
    rotary_pct: float = 1.0  # share of each head that RoPE turns (gpt_neox: 0.25)
    tied: bool = True  # the head is the embedding
    embed_dim: int = 0  # 0: n_embd; OPT-350M projects 512 -> 1024 -> 512
    pre_norm: bool = True  # False: OPT-350M normalises after each residual
    parallel: bool = True  # gpt_neox: attention and MLP read the same input
    qkv_bias: bool = (
        True  # llama may have none; qwen2 has it on q, k, v alone; opt and gpt_neox on every layer
    )
    out_bias: bool = False  # llama's attention_bias puts one on the output projection too
    mlp_bias: bool = False
    norm_eps: float = 1e-6
    act: str = 'silu'
    dropout: float = 0.0  # on the residual branches, as OPT has it

    def __post_init__(self):
        if self.family not in NAMES:
            raise InputError(
                f'model family {self.family!r} is not supported: use one of {", ".join(NAMES)} (MobileLLM loads as llama)'
            )
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        self.embed_dim = self.embed_dim or self.n_embd
        self.parallel = self.parallel and self.family == 'gpt_neox'
        self.learned_positions = self.family == 'opt'
        self.rms_norm = self.gated = self.family in ('qwen2', 'llama')
        if self.family in ('opt', 'gpt_neox'):
            self.qkv_bias = self.out_bias = self.mlp_bias = True
        if self.act not in ACTIVATIONS:
            raise InputError(
                f'activation {self.act!r} is not supported: use one of {", ".join(ACTIVATIONS)}'
            )
        if (
            self.n_embd % self.n_head
            and self.head_dim * self.n_head != self.n_embd
            or self.n_head % self.n_kv_head
        ):
            raise InputError(
                f'{self.n_head} heads do not divide width {self.n_embd} or are no multiple of {self.n_kv_head} kv heads'
            )

    @classmethod
    def from_hf(cls, hf):
        """From the dict of a transformers config.json. Raises InputError for a family or a feature that SLM does not have."""
        family = {'mobilellm': 'llama'}.get(hf.get('model_type'), hf.get('model_type'))
        rope = (
            hf.get('rope_parameters') or hf.get('rope_scaling') or {}
        )  # transformers 5 writes the former, 4 the latter
        kind = rope.get('rope_type', rope.get('type', 'default'))
        if kind not in ('default', 'linear', 'llama3'):
            raise InputError(
                f'RoPE scaling {kind!r} is not supported: use default, linear or llama3'
            )
        for key in ('use_sliding_window', 'layer_sharing', '_remove_final_layer_norm'):
            if hf.get(key):
                raise InputError(f'{key}={hf[key]} in config.json is not supported')
        if family not in NAMES:
            return cls(family=family)  # raises: names the families there are
        fields = {
            ours: hf[theirs]
            for ours, theirs in HF_KEYS[family].items()
            if hf.get(theirs) is not None
        }
        fields.setdefault('n_kv_head', fields['n_head'])
        fields['rope_theta'] = float(
            rope.get('rope_theta') or hf.get('rope_theta') or hf.get('rotary_emb_base') or 10000.0
        )
        if kind != 'default':
            fields['rope_scaling'] = {
                key: value for key, value in rope.items() if key != 'rope_theta'
            }
        if family in ('qwen2', 'llama'):
            fields['qkv_bias'] = family == 'qwen2' or hf.get('attention_bias', False)
            fields['out_bias'] = fields['qkv_bias'] and family == 'llama'
            fields['tied'] = bool(
                fields.get('tied') or hf.get('share_embedding')
            )  # MobileLLM's word for it
        if family == 'gpt_neox' and 'partial_rotary_factor' in rope:
            fields['rotary_pct'] = rope['partial_rotary_factor']
        return cls(family=family, **dict(HF_DEFAULTS[family], **fields))

    def to_hf(self):
        """The dict of a config.json that transformers opens (4.x and 5.x read these keys)."""
        hf = {theirs: getattr(self, ours) for ours, theirs in HF_KEYS[self.family].items()}
        hf |= dict(
            architectures=[ARCHITECTURES[self.family]],
            model_type=self.family,
            bos_token_id=BOS,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
        if self.family == 'opt':
            return hf | dict(
                dropout=self.dropout,
                attention_dropout=0.0,
                enable_bias=True,
                _remove_final_layer_norm=False,
            )
        hf |= dict(rope_theta=self.rope_theta, rope_scaling=self.rope_scaling)
        if self.family == 'llama':
            hf |= dict(attention_bias=self.qkv_bias)
        return hf | dict(rotary_emb_base=self.rope_theta) if self.family == 'gpt_neox' else hf


def _qwen2(n_layer, n_embd, n_head, n_kv_head, n_ffn):
    return dict(
        family='qwen2',
        n_layer=n_layer,
        n_embd=n_embd,
        n_head=n_head,
        n_kv_head=n_kv_head,
        n_ffn=n_ffn,
        rope_theta=1e6,
        context=32768,
    )


def _llama(n_layer, n_embd, n_head, n_kv_head, n_ffn, rope_theta, context):
    return dict(
        family='llama',
        n_layer=n_layer,
        n_embd=n_embd,
        n_head=n_head,
        n_kv_head=n_kv_head,
        n_ffn=n_ffn,
        rope_theta=rope_theta,
        context=context,
        qkv_bias=False,
        norm_eps=1e-5,
    )


def _opt(n_layer, n_embd, n_head, n_ffn, **odd):
    return dict(
        family='opt',
        n_layer=n_layer,
        n_embd=n_embd,
        n_head=n_head,
        n_kv_head=n_head,
        n_ffn=n_ffn,
        context=2048,
        act='relu',
        norm_eps=1e-5,
        **odd,
    )


def _pythia(n_layer, n_embd, n_head, n_ffn):
    return dict(
        family='gpt_neox',
        n_layer=n_layer,
        n_embd=n_embd,
        n_head=n_head,
        n_kv_head=n_head,
        n_ffn=n_ffn,
        context=2048,
        act='gelu',
        rotary_pct=0.25,
        tied=False,
        norm_eps=1e-5,
    )


PRESETS = {  # Table 7 of the paper, and Slam (large)'s base
    'qwen2.5-0.5b': _qwen2(24, 896, 14, 2, 4864),
    'qwen2.5-1.5b': _qwen2(28, 1536, 12, 2, 8960),
    'smollm2-135m': _llama(30, 576, 9, 3, 1536, 1e5, 8192),
    'mobilellm-125m': _llama(30, 576, 9, 3, 1536, 1e4, 2048),
    'smollm2-360m': _llama(32, 960, 15, 5, 2560, 1e5, 8192),
    'mobilellm-350m': _llama(32, 960, 15, 5, 2560, 1e4, 2048),
    'opt-125m': _opt(12, 768, 12, 3072),
    'opt-350m': _opt(24, 1024, 16, 4096, embed_dim=512, pre_norm=False),
    'pythia-160m': _pythia(12, 768, 12, 3072),
    'pythia-410m': _pythia(24, 1024, 16, 4096),
}


class Norm(nn.Module):
    """RMSNorm or LayerNorm, computed in fp32."""

    def __init__(self, config):
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = None if config.rms_norm else nn.Parameter(torch.zeros(config.n_embd))

    def forward(self, x):
        if self.bias is None:
            return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(
                x.dtype
            )
        return F.layer_norm(
            x.float(), self.weight.shape, self.weight.float(), self.bias.float(), self.eps
        ).to(x.dtype)


class Block(nn.Module):
    """One transformer layer of any of the four families."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.norm1 = Norm(c)
        self.qkv = nn.Linear(c.n_embd, (c.n_head + 2 * c.n_kv_head) * c.head_dim, bias=c.qkv_bias)
        self.out = nn.Linear(c.n_head * c.head_dim, c.n_embd, bias=c.out_bias)
        self.norm2 = Norm(c)
        self.up = nn.Linear(
            c.n_embd, c.n_ffn * (2 if c.gated else 1), bias=c.mlp_bias
        )  # gated: gate and up in one product
        self.down = nn.Linear(c.n_ffn, c.n_embd, bias=c.mlp_bias)
        self.act = ACTIVATIONS[c.act]

    def attention(self, x, rope, attend):
        c, (B, T, _) = self.config, x.shape
        qkv = (
            self.qkv(x).view(B, T, c.n_head + 2 * c.n_kv_head, c.head_dim).transpose(1, 2)
        )  # (B, heads, T, D)
        qk, v = qkv.split([c.n_head + c.n_kv_head, c.n_kv_head], dim=1)
        if rope is not None:
            cos, sin = rope  # (B, 1, T, R): the first R of the D features of each head turn
            R = cos.shape[-1]
            turned = qk[..., :R]
            half = torch.cat((-turned[..., R // 2 :], turned[..., : R // 2]), dim=-1)
            turned = turned * cos + half * sin
            qk = turned if R == c.head_dim else torch.cat((turned, qk[..., R:]), dim=-1)
        q, k = qk.split([c.n_head, c.n_kv_head], dim=1)
        return self.out(attend(q, k, v).transpose(1, 2).reshape(B, T, -1))

    def mlp(self, x):
        x = self.up(x)
        if self.config.gated:
            gate, x = x.chunk(2, dim=-1)
            return self.down(self.act(gate) * x)
        return self.down(self.act(x))

    def forward(self, x, rope, attend):  # x (B, T, C)
        c = self.config
        drop = (
            partial(F.dropout, p=c.dropout, training=self.training)
            if c.dropout
            else lambda branch: branch
        )
        if c.parallel:
            return (
                x
                + drop(self.attention(self.norm1(x), rope, attend))
                + drop(self.mlp(self.norm2(x)))
            )
        if c.pre_norm:
            x = x + drop(self.attention(self.norm1(x), rope, attend))
            return x + drop(self.mlp(self.norm2(x)))
        x = self.norm1(x + drop(self.attention(x, rope, attend)))
        return self.norm2(x + drop(self.mlp(x)))


def _sdpa(q, k, v, mask=None, causal=False):
    """Scaled dot-product attention; q (B, H, T, D), k and v (B, H_kv, S, D)."""
    if q.shape[1] == k.shape[1]:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    if q.is_cuda:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True
        )
    groups = q.shape[1] // k.shape[1]  # the CPU's fused kernel wants equal heads
    return F.scaled_dot_product_attention(
        q,
        k.repeat_interleave(groups, 1),
        v.repeat_interleave(groups, 1),
        attn_mask=mask,
        is_causal=causal,
    )


def _attend_pieces(q, k, v, pieces):
    """Packed attention as one call an utterance: on the CPU the cost is the sum of squares, not the square of the row.

    pieces: (prompt, start, stop) in the rows laid end to end: that stretch sees itself causally, and before it the prompt, a slice, if any.
    """
    B, H, T, D = q.shape
    q, k, v = (x.transpose(1, 2).reshape(1, B * T, -1, D).transpose(1, 2) for x in (q, k, v))
    out = []
    for prompt, start, stop in pieces:
        own = [x[:, :, start:stop] for x in (q, k, v)]
        if prompt is None:
            out.append(_sdpa(*own, causal=True))
        else:
            shared = prompt.stop - prompt.start
            mask = torch.ones(stop - start, shared + stop - start, dtype=torch.bool).tril(shared)
            out.append(
                _sdpa(
                    own[0],
                    *(
                        torch.cat((x[:, :, prompt], part), dim=2)
                        for x, part in zip((k, v), own[1:])
                    ),
                    mask=mask,
                )
            )
    return torch.cat(out, dim=2).transpose(1, 2).reshape(B, T, H, D).transpose(1, 2)


def _pieces(doc, branch):
    """The (prompt, start, stop) of _attend_pieces from doc and branch (B, T); a prompt and its first alternative are one piece."""
    rows = torch.arange(len(doc)).repeat_interleave(doc.shape[1])
    kinds = torch.stack(
        (rows, doc.reshape(-1), torch.zeros_like(rows) if branch is None else branch.reshape(-1))
    )
    runs, lengths = torch.unique_consecutive(kinds, dim=1, return_counts=True)
    pieces, start, utterance = [], 0, None
    for (*this, branch), length in zip(runs.T.tolist(), lengths.tolist()):
        stop = start + length
        if this != utterance:  # a new utterance, or the prompt of one
            utterance, prompt = this, slice(start, stop)
            pieces.append((None, start, stop))
        elif pieces[-1] == (None, prompt.start, prompt.stop):
            pieces[-1] = (None, prompt.start, stop)
        else:
            pieces.append((prompt, start, stop))
        start = stop
    return pieces


@lru_cache(maxsize=1)
def _flex():
    """flex_attention and create_block_mask, compiled for callers that are not: the plain ones materialise the (T, T) scores."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    return torch.compile(flex_attention, dynamic=False), torch.compile(
        create_block_mask, dynamic=False
    )


def _attention(doc, branch, device, flex=None):
    """How every layer attends: a function of q, k, v made once a forward.

    doc, branch: (B, T) or None, see SLM.forward. flex: use the block-masked flash kernel; None: on CUDA.
    """
    if doc is None:
        return partial(_sdpa, causal=True)
    B, T = doc.shape
    if device.type == 'cpu' and not flex and not torch.compiler.is_compiling():
        return partial(_attend_pieces, pieces=_pieces(doc, branch))

    def visible(b, h, i, j):
        seen = (doc[b, i] == doc[b, j]) & (j <= i)
        return (
            seen
            if branch is None
            else seen & ((branch[b, j] == 0) | (branch[b, j] == branch[b, i]))
        )

    if device.type == 'cuda' if flex is None else flex:
        if torch.compiler.is_compiling():
            from torch.nn.attention.flex_attention import create_block_mask, flex_attention
        else:
            flex_attention, create_block_mask = _flex()
        mask = create_block_mask(visible, B, None, T, T, device=device)
        return lambda q, k, v: flex_attention(
            q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1]
        )
    row, i = torch.arange(B, device=device)[:, None, None], torch.arange(T, device=device)
    return partial(_sdpa, mask=visible(row, None, i[:, None], i[None, :])[:, None])  # (B, 1, T, T)


def _draw(logits, noise, top_k, top_p):
    """One token a row from softmax(logits) cut to the top_k likeliest and to the smallest set that holds top_p.

    logits: (B, V). noise: (B, top_k) of Exp(1): argmax(p / noise) falls on each token with its probability p. Returns: (B,)
    """
    logits, ids = logits.topk(top_k, dim=-1)
    probs = logits.softmax(-1)
    if top_p < 1:
        probs = probs.masked_fill(probs.cumsum(-1) - probs > top_p, 0)
    return ids.gather(1, (probs / noise).argmax(-1, keepdim=True))[:, 0]


class SLM(nn.Module):
    """A decoder-only transformer over speech units: the same function as transformers' model of its family.

    Tokens: PAD 0, `<S>` 1 (both ends of an utterance), unit u at u + OFFSET (RECIPE: the convention of slprl/slam).
    """

    def __init__(self, config, seed=0):
        super().__init__()
        c = self.config = config
        self._step = None  # the compiled step of generate
        self.slam = {}  # what slam.json knew: encoder, vocoder, n_units, frame_rate, recipe, scores ...
        # _weight: nn.Embedding's own initialisation would import the whole compiler for a model on the meta device
        self.embed = nn.Embedding(
            c.vocab_size, c.embed_dim, _weight=torch.empty(c.vocab_size, c.embed_dim)
        )
        if c.learned_positions:
            rows = c.context + POSITION_OFFSET
            self.embed_positions = nn.Embedding(rows, c.n_embd, _weight=torch.empty(rows, c.n_embd))
        if c.embed_dim != c.n_embd:
            self.project_in, self.project_out = (
                nn.Linear(c.embed_dim, c.n_embd, bias=False),
                nn.Linear(c.n_embd, c.embed_dim, bias=False),
            )
        self.blocks = nn.ModuleList([Block(c) for _ in range(c.n_layer)])
        if c.pre_norm:
            self.norm = Norm(c)
        self.head = nn.Linear(c.embed_dim, c.vocab_size, bias=False)
        if c.tied:
            self.head.weight = self.embed.weight
        R = int(c.head_dim * c.rotary_pct)
        self.inv_freq = _rope_frequencies(
            c, R
        )  # (R / 2,) fp32: no buffer, because .to(bfloat16) would round it
        if not self.embed.weight.is_meta:
            generator = torch.Generator().manual_seed(seed)
            for module in self.modules():  # transformers' cold start: normal(0, 0.02), biases 0
                if isinstance(module, (nn.Linear, nn.Embedding)):
                    nn.init.normal_(module.weight, std=0.02, generator=generator)
                    if getattr(module, 'bias', None) is not None:
                        nn.init.zeros_(module.bias)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.inv_freq = self.inv_freq.to(
            'cpu' if self.embed.weight.is_meta else self.embed.weight.device
        )
        return self

    # ------------------------------------------------------------------ forward

    def hidden(self, tokens, doc=None, positions=None, branch=None, attend=None):
        """The last hidden states (B, T, embed_dim), ready for the head; arguments as in forward."""
        c, (B, T) = self.config, tokens.shape
        if positions is None:
            positions = torch.arange(T, device=tokens.device).expand(B, T)
            if (
                doc is not None
            ):  # restart at each utterance: subtract the index at which the present one began
                first = torch.cat(
                    (torch.ones_like(doc[:, :1]), (doc[:, 1:] != doc[:, :-1])), dim=1
                ).bool()
                positions = positions - torch.where(first, positions, 0).cummax(dim=1).values
        if (
            c.learned_positions
            and T > c.context
            and not torch.compiler.is_compiling()
            and positions.max() >= c.context
        ):
            raise InputError(
                f'{int(positions.max()) + 1} tokens are more than the {c.context} learned positions of this {c.family} model'
            )
        x = self.embed(tokens)  # (B, T, embed_dim)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(
                torch.get_autocast_dtype(x.device.type)
            )  # the residual stream in bf16, as a bf16 model has it
        if c.embed_dim != c.n_embd:
            x = self.project_in(x)
        if c.learned_positions:
            x = x + self.embed_positions(positions + POSITION_OFFSET).to(x.dtype)
            rope = None
        else:
            angle = positions[:, None, :, None].float() * self.inv_freq  # (B, 1, T, R / 2)
            angle = torch.cat((angle, angle), dim=-1)
            rope = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        attend = _attention(doc, branch, tokens.device) if attend is None else attend
        for block in self.blocks:
            x = block(x, rope, attend)
        if c.pre_norm:
            x = self.norm(x)
        return self.project_out(x) if c.embed_dim != c.n_embd else x

    def forward(self, tokens, targets=None, doc=None, positions=None, branch=None):
        """Next-token logits, and the loss where targets are given.

        tokens: (B, T) int64. targets: (B, T) int64, the token after each, -100 where none is to be predicted.
        doc: (B, T) integers, equal along one utterance and changing at its border; a token sees its own utterance alone, with
        positions from 0. None: each row is one utterance. positions: (B, T), in place of those.
        branch: (B, T), 0 for a shared prompt, 1, 2, ... for its alternatives, which see the prompt and themselves.

        Returns: logits (B, T, vocab_size), or (logits, loss) with the mean cross-entropy in fp32 over targets != -100, in nats.
        Raises: InputError if learned positions do not reach that far.
        """
        logits = self.head(self.hidden(tokens, doc, positions, branch))
        if targets is None:
            return logits
        return logits, F.cross_entropy(
            logits.float().view(-1, logits.shape[-1]), targets.reshape(-1), ignore_index=-100
        )

    def logps(
        self, tokens, mask, doc=None, positions=None, branch=None, segments=None, n=None, mean=False
    ):
        """Log-probabilities in nats of the tokens where mask is 1, each given what it may see before it; differentiable, fp32.

        tokens, doc, positions, branch: as in forward. mask: (B, T), 0 on the first token of every utterance, which nothing predicts.
        segments: (B, T) int64, the output that each token counts towards, in 0 .. n - 1; None: its row.
        Returns: (n,) or (B,) sums, or means per token. The metrics of the field take means (sBLIMP, StoryCloze); DPO takes sums.
        """
        B, T = tokens.shape
        before = torch.arange(T, device=tokens.device).expand(B, T) - 1
        if (
            branch is not None
        ):  # an alternative's first token follows the prompt's last, not the alternative laid before it
            prompt_end = torch.where(branch == 0, before + 1, 0).cummax(dim=1).values
            begins = torch.cat(
                (torch.zeros_like(branch[:, :1]), branch[:, 1:] != branch[:, :-1]), dim=1
            ).bool() & (branch > 0)
            before = torch.where(begins, prompt_end, before)
        x = self.hidden(tokens, doc, positions, branch)
        x = x.gather(1, before.clamp(min=0)[:, :, None].expand(-1, -1, x.shape[-1]))
        token_logps = -F.cross_entropy(
            self.head(x).float().flatten(0, 1), tokens.flatten(), reduction='none'
        )  # (B * T,)
        mask = mask.flatten().to(token_logps.dtype)
        if segments is None:
            segments, n = torch.arange(B, device=tokens.device).repeat_interleave(T), B
        sums = torch.zeros(n, device=tokens.device).index_add(
            0, segments.flatten(), token_logps * mask
        )
        return (
            sums / torch.zeros_like(sums).index_add(0, segments.flatten(), mask).clamp(min=1)
            if mean
            else sums
        )

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
    ):
        """Continue prompts (defaults: Table 6 of the paper).

        prompts: list of 1-D int64 tensors, `<S>` + units + OFFSET, of any lengths >= 1. temperature: 0 takes the likeliest. top_k: 0 is off.
        repetition_penalty: over prompt and continuation, as transformers defines it. seed: of a generator of its own, None: torch's.
        compile: torch.compile the step of one token; half a minute the first time, then two to three times as fast where launching small
        operations is what costs. Pays for many tokens in batches of one size.
        Returns: list of 1-D int64 tensors on the CPU, the new tokens alone, without the final `<S>`.
        Raises: InputError if learned positions do not reach prompt + continuation.
        """
        c, device, dtype = self.config, self.embed.weight.device, self.embed.weight.dtype
        B, longest = len(prompts), max(len(p) for p in prompts)
        total = longest + max_new_tokens
        if c.learned_positions and total > c.context:
            raise InputError(
                f'{longest} prompt + {max_new_tokens} new tokens are more than the {c.context} learned positions of this model'
            )
        if (
            compile and self._step is None
        ):  # on a CPU no Python between the kernels, and small ones in one thread
            options = (
                {'cpp_wrapper': True, 'cpp.min_chunk_size': 8192} if device.type == 'cpu' else None
            )
            self._step = torch.compile(self._next, fullgraph=True, dynamic=True, options=options)
        pad = torch.tensor([longest - len(p) for p in prompts])
        tokens, seen = torch.full((B, total), PAD), torch.zeros(B, c.vocab_size, dtype=torch.bool)
        for i, prompt in enumerate(prompts):
            tokens[i, pad[i] : longest] = (
                prompt  # left-padded: all rows continue at the same column
            )
            seen[i, prompt] = True
        pad, tokens, seen = pad.to(device), tokens.to(device), seen.to(device)
        columns = torch.arange(total, device=device)
        keep = columns >= pad[:, None]  # (B, total)
        cache = [
            [
                torch.zeros(B, c.n_kv_head, total, c.head_dim, device=device, dtype=dtype)
                for _ in 'kv'
            ]
            for _ in range(c.n_layer)
        ]
        generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        cut = temperature, min(top_k or c.vocab_size, c.vocab_size), top_p, repetition_penalty
        noise = torch.empty(max_new_tokens, B, cut[1], device=device).exponential_(
            generator=generator
        )
        ended = torch.zeros(B, dtype=torch.bool, device=device)
        now, at = tokens[:, :longest], (columns[:longest] - pad[:, None]).clamp(min=0)
        for t in range(longest, total):
            step = self._step if compile and t > longest else self._next
            now = step(
                now,
                at,
                columns[t - now.shape[1] : t],
                keep,
                cache,
                t,
                seen,
                ended,
                noise[t - longest],
                *cut,
            )
            tokens[:, t] = now[:, 0]
            if (
                device.type == 'cpu' or t % 16 == 0
            ) and ended.all():  # reading the flag waits for the GPU: not every token
                break
            at = at[:, -1:] + 1
        rows, ends = tokens[:, longest:].cpu(), (tokens[:, longest:].cpu() < OFFSET)
        return [
            row[: int(end.float().argmax())] if end.any() else row for row, end in zip(rows, ends)
        ]

    def _next(
        self,
        tokens,
        positions,
        where,
        keep,
        cache,
        end,
        seen,
        ended,
        noise,
        temperature,
        top_k,
        top_p,
        repetition_penalty,
    ):
        """One round of generation: tokens (B, T) enter the cache at columns `where`, the next ones (B, 1) leave; seen and ended are updated.

        keep: (B, total), False on padding. cache: a layer's keys and values, (B, n_kv_head, total, head_dim); the first `end` columns are read.
        seen: (B, V) tokens under repetition penalty. noise: (B, top_k) of Exp(1), whose race against the probabilities draws the token.
        """
        c, (B, T), layers = self.config, tokens.shape, iter(cache)
        visible = keep[:, None, None, :end] & (
            torch.arange(end, device=where.device) <= where[:, None]
        )  # (B, 1, T, end)
        if T > 1:
            visible = visible | torch.eye(
                T, end, dtype=torch.bool, device=where.device
            )  # padding sees itself: no NaN

        def attend(q, k, v):
            keys, values = next(layers)
            keys.index_copy_(2, where, k)
            values.index_copy_(2, where, v)
            keys, values = keys[:, :, :end], values[:, :, :end]
            if T > 1:
                return _sdpa(q, keys, values, mask=visible)
            # one new token: the query heads of a key's group as that many queries, so that no key is copied
            q = q.view(B, c.n_kv_head, -1, c.head_dim)
            return F.scaled_dot_product_attention(q, keys, values, attn_mask=visible).view(
                B, c.n_head, 1, c.head_dim
            )

        logits = self.head(
            self.hidden(tokens, positions=positions, attend=attend)[:, -1]
        ).float()  # (B, V)
        if repetition_penalty != 1.0:
            logits = torch.where(
                seen,
                torch.where(logits < 0, logits * repetition_penalty, logits / repetition_penalty),
                logits,
            )
        logits = logits.masked_fill(
            torch.arange(c.vocab_size, device=where.device) == PAD, -torch.inf
        )  # padding is no speech
        new = (
            logits.argmax(-1)
            if temperature == 0
            else _draw(logits / temperature, noise, top_k, top_p)
        )
        new = torch.where(ended, PAD, new)[:, None]
        seen.scatter_(1, new, True)
        ended |= new[:, 0] == EOS
        return new

    # ------------------------------------------------------------------ loading and saving

    @classmethod
    def from_preset(cls, name, vocab_size=502, context=None, rope_theta=None, dropout=0.0, seed=0):
        """A freshly initialised model of one of the paper's shapes (Table 7), no download: the cold start of Figure 2."""
        if name.lower() not in PRESETS:
            raise InputError(f'no preset {name!r}: there are {", ".join(PRESETS)}')
        config = SLMConfig(**PRESETS[name.lower()], vocab_size=vocab_size, dropout=dropout)
        _set(config, context, rope_theta)
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
    ):
        """Load a folder or a hub name; no code of the checkpoint is ever run.

        (a) A text LM of a supported family: TWIST, everything but the embedding (and head) stays; the new vocabulary of vocab_size
        (None: 502) rows begins as `embed_init`: 'first_rows' of the old one (what resizing leaves; Hassid et al. 2023), 'random', or
        'mean', its mean row. (b) A checkpoint of ours, (c) a public SLM (`lm.` prefix, slprl/slam), (d) a TWIST checkpoint
        (`offset` in its config; rows are put in our order). Of these the vocabulary stays, and vocab_size, if given, must fit in it.
        context: tokens to note in the config (learned positions stay as many as they are). rope_theta: in place of the checkpoint's.

        Raises: InputError when there is no such folder or hub name, the family or a feature is not supported, tensors are missing or
        left over (named), the vocabulary cannot hold the units, or context is longer than the learned positions.
        """
        folder = _find_checkpoint(where)
        hf = _read_json(os.path.join(folder, 'config.json'))
        slam_file = os.path.join(folder, 'slam.json')
        slam = _read_json(slam_file) if os.path.exists(slam_file) else {}
        public, prefix = hf.get('model_type') == 'speech_language_model', ''
        if public:
            if not isinstance(hf.get('base_config'), dict):
                raise InputError(
                    f"{where}: config.json has no base_config, the text LM's own config"
                )
            hf, prefix = hf['base_config'] | {'vocab_size': hf['vocab_size']}, 'lm.'
        units_lm = bool(slam) or public or 'offset' in hf
        config = SLMConfig.from_hf(hf)
        config.dropout = dropout
        _set(config, context, rope_theta)
        state = _to_ours(_read_tensors(folder), config, prefix, where)
        if (
            units_lm and not slam and not public
        ):  # TWIST: unit u is token u + offset; ours is u + OFFSET
            bos = hf.get('bos_token_id')
            bos = bos if isinstance(bos, int) and bos < hf['offset'] else 0
            rows = torch.cat(
                (
                    torch.tensor([hf.get('pad_token_id') or 0, bos]).clamp(
                        max=config.vocab_size - 1
                    ),
                    torch.arange(hf['offset'], config.vocab_size),
                )
            )
            state |= {name: state[name][rows] for name in ('embed.weight', 'head.weight')}
            config.vocab_size = len(rows)
        if units_lm:
            if vocab_size is not None and vocab_size > config.vocab_size:
                raise InputError(
                    f'{where} has a vocabulary of {config.vocab_size}, which cannot hold the {vocab_size - OFFSET} units of the data'
                )
        else:
            config.vocab_size = 502 if vocab_size is None else vocab_size
            for name in ('embed.weight', 'head.weight'):
                state[name] = _twist_rows(state[name], config.vocab_size, embed_init, seed, where)
        if config.tied:
            state['head.weight'] = state['embed.weight']
        with torch.device('meta'):
            model = cls(config)
        model.load_state_dict(
            {name: tensor.to(dtype) for name, tensor in state.items()}, assign=True
        )
        if config.tied:
            model.head.weight = model.embed.weight
        model._apply(lambda tensor: tensor)
        for key in ('encoder', 'vocoder'):  # folders beside slam.json, or public names
            path = os.path.join(folder, str(slam.get(key) or '?'))
            if os.path.isdir(path):
                slam[key] = os.path.abspath(path)
        model.slam = slam or (
            dict(
                encoder='mhubert25',
                vocoder='hifigan25',
                n_units=config.vocab_size - OFFSET,
                frame_rate=25.0,
            )
            if units_lm
            else {}
        )
        return model

    def save_pretrained(self, folder, slam=None, state=None):
        """Write config.json, model.safetensors (both as transformers reads them) and slam.json, each whole or not at all.

        slam: dict for slam.json; None: self.slam. Where `encoder` and `vocoder` name folders, these are copied in, so that the checkpoint
        is complete by itself. state: a full state dict in place of self's (a sharded model's).
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        os.makedirs(folder, exist_ok=True)
        slam = dict(self.slam if slam is None else slam, offset=OFFSET)
        for key in ('encoder', 'vocoder'):
            source, target = str(slam.get(key) or ''), os.path.join(folder, key)
            if os.path.isdir(source):
                if os.path.abspath(source) != os.path.abspath(target):
                    shutil.copytree(source, target + '.tmp', dirs_exist_ok=True)
                    shutil.rmtree(target, ignore_errors=True)
                    os.replace(target + '.tmp', target)
                slam[key] = key
        tensors = _to_hf(self.state_dict() if state is None else state, self.config)
        write = dict([('config.json', self.config.to_hf()), ('slam.json', slam)])
        names = ('model.safetensors', *write)
        try:
            save_file(
                tensors, os.path.join(folder, 'model.safetensors.tmp'), metadata={'format': 'pt'}
            )
            for name, content in write.items():
                with open(os.path.join(folder, name + '.tmp'), 'w', encoding='utf-8') as file:
                    json.dump(content, file, indent=2)
            for name in names:
                os.replace(os.path.join(folder, name + '.tmp'), os.path.join(folder, name))
        except SafetensorError as error:  # a full disk
            raise OSError(f'{folder} cannot be written: {error}') from None
        finally:  # nothing half-written stays
            for name in names:
                with contextlib.suppress(OSError):
                    os.remove(os.path.join(folder, name + '.tmp'))

    def num_params(self):
        """Parameters, tied ones once: what Table 7 counts."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, span=None):
        """Floating-point operations of one token, forward and backward: 6 a weight that multiplies, and causal attention.

        span: mean tokens of an utterance (attention reaches half of it); None: the context.
        """
        c = self.config
        weights = sum(
            p.numel() for name, p in self.named_parameters() if p.ndim == 2 and 'embed' not in name
        ) + (c.vocab_size * c.embed_dim if c.tied else 0)
        return 6 * weights + 6 * c.n_layer * c.n_head * c.head_dim * (span or c.context)


def _set(config, context, rope_theta):
    if context is not None:
        if config.learned_positions and context > config.context:
            raise InputError(
                f'context {context} is longer than the {config.context} learned positions of this {config.family} model'
            )
        config.context = config.context if config.learned_positions else context
    if rope_theta is not None:
        config.rope_theta = float(rope_theta)


def _rope_frequencies(config, R):
    """Angular frequencies (R / 2,) of RoPE in radians a token, scaled as Llama 3 does if asked."""
    freq = config.rope_theta ** (-torch.arange(0, R, 2, dtype=torch.float32, device='cpu') / R)
    scaling = config.rope_scaling
    if not scaling:
        return freq
    if scaling.get('rope_type', scaling.get('type')) == 'linear':
        return freq / scaling['factor']
    turns = (
        scaling['original_max_position_embeddings'] * freq / (2 * math.pi)
    )  # full turns within the original context
    low, high = scaling['low_freq_factor'], scaling['high_freq_factor']
    smooth = ((turns - low) / (high - low)).clamp(0, 1)  # 0: slow enough to be stretched, 1: kept
    return freq * (smooth + (1 - smooth) / scaling['factor'])


def _read_json(path):
    try:
        with open(path, encoding='utf-8') as file:
            return json.load(file)
    except FileNotFoundError:
        raise InputError(
            f'{path} is missing: a checkpoint is a folder with config.json and model.safetensors'
        ) from None
    except ValueError as error:
        raise InputError(f'{path} is not JSON: {error}') from None


def _find_checkpoint(where):
    """The folder `where`, or that of a hub name in the local cache, downloaded if need be (no code, safetensors before pickles)."""
    if os.path.isdir(where):
        return where
    if where.count('/') != 1 or where.startswith(('.', '/', 'out/')):
        raise InputError(f'no checkpoint folder {where!r}')
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(where, allow_patterns=['*.json', '*.safetensors'])
        if not any(name.endswith('.safetensors') for name in os.listdir(folder)):
            folder = snapshot_download(where, allow_patterns=['*.json', 'pytorch_model*.bin'])
        return folder
    except Exception as error:
        raise InputError(
            f'{where!r} is no folder, and the hub did not give it ({type(error).__name__}): download it elsewhere '
            f'and pass the folder'
        ) from None


def _read_tensors(folder):
    """All tensors of a checkpoint: one file or shards, safetensors or (weights_only) pickles."""
    from safetensors.torch import load_file

    for name, load in (
        ('model.safetensors', load_file),
        ('pytorch_model.bin', partial(torch.load, map_location='cpu', weights_only=True)),
    ):
        path, index = os.path.join(folder, name), os.path.join(folder, name + '.index.json')
        if os.path.exists(index):
            paths = [
                os.path.join(folder, os.path.basename(shard))
                for shard in sorted(set(_read_json(index)['weight_map'].values()))
            ]
        elif os.path.exists(path):
            paths = [path]
        else:
            continue
        state = {}
        for path in paths:
            try:
                state |= load(path)
            except Exception as error:
                raise InputError(
                    f'{path} cannot be read: {" ".join(str(error).split())[:200]}'
                ) from None
        return state
    raise InputError(
        f'{folder} has no model.safetensors (or pytorch_model.bin): is it a checkpoint?'
    )


def _their_names(name, config):
    """The names of our tensor in the family's own checkpoint."""
    names, (*path, kind) = NAMES[config.family], name.split('.')
    theirs = names[path[-1]]
    if path[-1] == 'head':
        return [f'{theirs}.{kind}']
    layer = f'{names["layer"]}.{path[1]}.' if path[0] == 'blocks' else ''
    return [
        f'{names["prefix"]}{layer}{one}.{kind}'
        for one in ([theirs] if isinstance(theirs, str) else theirs)
    ]


def _regroup_neox(tensor, config, to_theirs):
    """GPT-NeoX lays q, k, v out head by head, (H, 3, D, ...); ours is (3, H, D, ...)."""
    first, second = (3, config.n_head) if to_theirs else (config.n_head, 3)
    return tensor.view(first, second, config.head_dim, -1).transpose(0, 1).reshape(tensor.shape)


def _to_ours(state, config, prefix, where):
    """Rename and join the tensors of a transformers checkpoint. Raises InputError naming what is missing, left over or of wrong shape."""
    with torch.device('meta'):
        shapes = {name: tensor.shape for name, tensor in SLM(config).state_dict().items()}
    state = {
        name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        if not name.endswith(OBSOLETE)
    }
    if config.family == 'opt':  # some files were saved without the outer module
        state = {
            ('model.' + name if name.startswith('decoder.') else name): tensor
            for name, tensor in state.items()
        }
    if config.family == 'gpt_neox' and 'lm_head.weight' in state:  # transformers 5's name for it
        state['embed_out.weight'] = state.pop('lm_head.weight')
    wanted = {
        name: _their_names(name, config)
        for name in shapes
        if not (config.tied and name == 'head.weight')
    }
    missing = [their for theirs in wanted.values() for their in theirs if their not in state]
    extra = set(state).difference(
        *wanted.values(), _their_names('head.weight', config) if config.tied else []
    )
    if missing or extra:
        what = [
            f'{word} {len(names)} ({", ".join(sorted(names)[:4])}{", ..." if len(names) > 4 else ""})'
            for word, names in (('misses', missing), ('has unknown', extra))
            if names
        ]
        raise InputError(
            f'{where}: the checkpoint {" and ".join(what)} tensors of a {config.family} model'
        )
    ours = {}
    for name, theirs in wanted.items():
        tensor = (
            torch.cat([state[their] for their in theirs]) if len(theirs) > 1 else state[theirs[0]]
        )
        if tensor.shape != shapes[name]:
            raise InputError(
                f'{where}: {theirs[0]} has shape {tuple(tensor.shape)}, config.json says {tuple(shapes[name])}'
            )
        ours[name] = (
            _regroup_neox(tensor, config, False)
            if config.family == 'gpt_neox' and '.qkv.' in name
            else tensor
        )
    ours.setdefault('head.weight', ours['embed.weight'])
    return ours


def _to_hf(state, config):
    """The tensors under the family's own names, joined ones apart again, contiguous and on the CPU."""
    out = {}
    for name, tensor in state.items():
        if config.tied and name == 'head.weight':
            continue
        tensor, theirs = tensor.detach().cpu(), _their_names(name, config)
        if config.family == 'gpt_neox' and '.qkv.' in name:
            tensor = _regroup_neox(tensor, config, True)
        sizes = [len(tensor)]
        if len(theirs) == 3:
            sizes = [
                config.n_head * config.head_dim,
                config.n_kv_head * config.head_dim,
                config.n_kv_head * config.head_dim,
            ]
        elif len(theirs) == 2:
            sizes = [config.n_ffn, config.n_ffn]
        out |= {their: part.contiguous() for their, part in zip(theirs, tensor.split(sizes))}
    return out


def _twist_rows(old, vocab_size, embed_init, seed, where):
    """The rows (vocab_size, C) with which a unit embedding begins, out of the text embedding (V, C)."""
    if embed_init == 'first_rows':
        if vocab_size > len(old):
            raise InputError(
                f'{where} has {len(old)} embedding rows, too few for {vocab_size}: use embed_init=random or mean'
            )
        return old[:vocab_size].clone()
    if embed_init == 'mean':
        return old.float().mean(0, keepdim=True).repeat(vocab_size, 1)
    if embed_init == 'random':
        return torch.empty(vocab_size, old.shape[1]).normal_(
            std=0.02, generator=torch.Generator().manual_seed(seed)
        )
    raise InputError(f'embed_init {embed_init!r} is unknown: use first_rows, random or mean')


# -----------------------------------------------------------------------------
# Audio

HOP, WINDOW, N_FFT = 160, 400, 512  # samples at 16 kHz: 10 ms, 25 ms
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
        rate, blocks, error = _decode(source, start, seconds, size)
        if blocks or not error:
            break
    if not blocks:
        reason = f'not readable audio ({error})' if error else 'holds no samples'
        raise InputError(f'{name}: {reason}' + (f' at {start:g} s' if start and not error else ''))
    wave = torch.cat(blocks)
    if not float(wave.abs().max()) < 1e6:  # NaN fails too
        raise InputError(f'{name}: holds NaN or infinite samples, or such as are no sound')
    return resample(wave, rate, sample_rate)


def _decode(source, start, seconds, size):
    """-> its rate, blocks (samples,) of at most `size` samples, and what stopped it or None."""
    import soundfile

    rate, blocks = 0, []
    try:
        with soundfile.SoundFile(source) as file:
            rate = file.samplerate
            if start:
                file.seek(min(round(start * rate), file.frames))
            left = math.inf if seconds is None else round(seconds * rate)
            while left > 0 and len(block := file.read(min(size, left), dtype='float32')):
                left -= len(block)
                block = block if block.ndim == 1 else block.mean(axis=1)  # channels to mono
                blocks.append(torch.from_numpy(block))
    except (RuntimeError, OSError, TypeError) as error:  # TypeError: of .raw it asks for a rate
        return rate, blocks, str(error).rsplit(': ', 1)[-1].rstrip('.')
    return rate, blocks, None


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
    (taken, made), reach, kernels = _sinc_kernels(rate, wanted)
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
def _sinc_kernels(rate, wanted, group=40):
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
    left = (WINDOW - HOP) // 2
    right = max(0, (frames - 1) * HOP + WINDOW - left - len(wave))
    windows = F.pad(wave, (left, right)).unfold(0, WINDOW, HOP)[:frames]  # (frames, WINDOW)
    hann, filters = torch.hann_window(WINDOW).to(wave.device), mel_filters().to(wave.device)
    mel = wave.new_empty(frames, N_MELS)
    for some, out in zip(windows.split(1000), mel.split(1000), strict=True):  # hours stay small
        spectrum = torch.fft.rfft(F.pad(some * hann, (0, N_FFT - WINDOW)))  # padded: 3 x as fast
        power = spectrum.real.square() + spectrum.imag.square()
        torch.log((power @ filters).clamp(min=1e-7), out=out)
    return mel


# -----------------------------------------------------------------------------
# UnitEncoder: wave -> units

_TWIST = 'https://dl.fbaipublicfiles.com/textless_nlp/twist/speech_tokenizer/'
ENCODERS = {  # the public ones: net, layer, zeros put at each end of the wave, vocoder, k-means
    'mhubert25': dict(
        model='slprl/mhubert-base-25hz',
        layer=11,
        pad=40,
        vocoder='hifigan25',
        kmeans=_TWIST + 'mhubert_base_25hz_cp_mls_cv_sp_fisher_L11_km500.bin',
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
MFCC = dict(  # the offline encoder
    kind='mfcc',
    name='mfcc',
    frame_rate=25.0,
    n_cep=13,
    lifter=0.3,
    c0=0.4,
    range=9.0,
    switch=1.0,
    distortion=0.0,
    vocoder='vocoder',
)
STRETCH = 100  # seconds that a net takes at once (WavLM, which keeps its attention, a third)
BATCH_SECONDS = 300  # of padded audio that a GPU takes at once; a CPU gains nothing from batches
CONVOLVE = 64  # frames that a CPU convolves at once
BLOCK = 1000  # frames whose distances to all centroids are in memory at once
BUCKET = 64  # on a GPU, batches are padded to a multiple of so many frames
SMALL_NET = 100 << 20  # bytes: a local net up to this size is saved with its encoder


@dataclass
class Stretch:
    """What a net takes at once: an utterance, or a part of a long one with its context."""

    wave: torch.Tensor  # (samples,), as many as its frames need
    norm: tuple  # scale and shift, (C,) each, of the first layer's group norm; () without one
    frames: int
    skip: int  # frames of context before those that are wanted
    out: torch.Tensor  # (wanted frames, D): where the result goes


class UnitEncoder:
    """Speech to units: features at 25 or 50 frames a second, of each the nearest of n centroids.

    HuBERT-like nets: a layer of transformers' HuBERT, wav2vec 2 or WavLM, of the raw wave, in
    float32; on CUDA products are TF32 (10 bits of mantissa) unless dtype='float32' asks for all
    24, or 'bfloat16' for fewer. Waves of up to STRETCH seconds are computed whole; longer ones in
    stretches that see a tenth of that on either side, joined on the net's own frames.

    The offline features ('mfcc') are two 20 ms cepstra a frame, of the log-mel spectrum relative
    to the utterance's loudness. Frame t begins at sample 640 t; n samples have max(1, n // 640).

    With `switch` in its configuration, neighbours share a unit unless a change gains more than
    `switch` times `distortion`, the mean squared distance of a frame to its centroid (Kamper & van
    Niekerk 2021, eq. 2): fewer tokens a second. No wave's units depend on the batch it is in.
    """

    def __init__(self, config, centroids=None, device='cpu', dtype='auto', net=None):
        self.config, self.device = dict(config), pick_device(device)
        self.tf32 = dtype == 'auto'
        self.dtype = torch.float32 if dtype == 'auto' else pick_dtype(dtype, self.device)
        self.centroids = None if centroids is None else centroids.to(self.device)  # None: to fit
        self.batch_seconds = BATCH_SECONDS if self.device.type == 'cuda' else 0
        if self.config['kind'] == 'mfcc':
            self.basis = _cepstrum(self.config).to(self.device)  # (N_MELS, n_cep)
        else:
            self._take(_load_net(self.config) if net is None else net)
        self.name, self.frame_rate = self.config['name'], self.config['frame_rate']
        self.vocoder = self.config.get('vocoder')

    def _take(self, net):
        """Make the net ready: on the device, its frames' size known, on CUDA compiled."""
        hf, self.net = net.config, net.to(self.device, self.dtype).eval().requires_grad_(False)
        self.hop = math.prod(hf.conv_stride)  # samples from one frame to the next
        self.reach = 1  # samples that one frame covers
        for kernel, stride in zip(hf.conv_kernel[::-1], hf.conv_stride[::-1], strict=True):
            self.reach = (self.reach - 1) * stride + kernel
        self.config['frame_rate'] = SAMPLE_RATE / self.hop
        self.wavlm = hf.model_type == 'wavlm'
        self.longest = STRETCH * SAMPLE_RATE // self.hop // (3 if self.wavlm else 1)  # frames
        if self.device.type == 'cuda':
            self._hidden = torch.compile(self._hidden, dynamic=True)

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
        public = ENCODERS.get(where, {}) if not saved else {}
        if saved:
            config, centroids, net = _read_encoder(folder)
            if layer not in (None, config.get('layer')):
                raise InputError(
                    f'{where} is an encoder of layer {config.get("layer")}, not {layer}'
                )
        elif where == 'mfcc':
            config = MFCC
        elif public or layer is not None:
            config = _net_encoder(where, layer, public)
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
        if self.config['kind'] != 'mfcc':
            weights = {f'net.{name}': tensor for name, tensor in self.net.state_dict().items()}
            size = sum(tensor.nbytes for tensor in weights.values())
            if 'net' in config or (os.path.isdir(config['model']) and size <= SMALL_NET):
                config['net'] = json.loads(self.net.config.to_json_string(use_diff=False))
                tensors |= weights
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        with write_atomic(os.path.join(folder, 'encoder.safetensors'), 'wb') as file:
            file.write(save(tensors))
        with write_atomic(os.path.join(folder, 'encoder.json')) as file:
            json.dump(config, file, indent=2)

    def encode(self, waves):
        """List of (samples,) at 16 kHz -> list of (frames,) long units on the CPU, one a frame."""
        return self.assign(self.features(waves))

    @torch.inference_mode()
    def features(self, waves):
        """List of (samples,) at 16 kHz, of any length -> list of (frames, D) float32, on the device."""
        waves = [torch.as_tensor(wave, dtype=torch.float32) for wave in waves]
        if self.config['kind'] == 'mfcc':
            return [self._mfcc(wave.to(self.device)) for wave in waves]
        out, stretches = [], []
        for wave in waves:
            features, parts = self._stretches(wave)
            out.append(features)
            stretches += parts
        batches = self._batches(stretches)
        if self.device.type == 'cpu':
            # a core an utterance: threads that share one wait for each other
            threads = torch.get_num_threads()
            with ThreadPoolExecutor(threads, None, torch.set_num_threads, (1,)) as pool:
                list(pool.map(self._compute, batches))
            torch.set_num_threads(threads)  # also of the threads to come
        else:
            for batch in batches:
                self._compute(batch)
        return out

    def _stretches(self, wave):
        """-> features of a wave, (frames, D), yet to be filled, and the stretches that fill them."""
        wave = F.pad(wave, (self.config['pad'],) * 2)
        wave = F.pad(wave, (0, max(0, self.reach - len(wave))))
        wave = wave.pin_memory() if self.device.type == 'cuda' else wave
        wave = wave.to(self.device, non_blocking=True)
        frames = (len(wave) - self.reach) // self.hop + 1
        features = torch.empty(frames, self.net.config.hidden_size, device=self.device)
        norm = self._first_norm(wave)
        if frames <= self.longest:
            count, context = 1, 0
        else:
            context = self.longest // 10
            count = -(-frames // (self.longest - 2 * context))
        stretches = []
        for i in range(count):
            start, stop = frames * i // count, frames * (i + 1) // count  # the wanted ones
            first, last = max(0, start - context), min(frames, stop + context)
            part = wave[first * self.hop : (last - 1) * self.hop + self.reach]
            out = features[start:stop]
            stretches.append(Stretch(part, norm, last - first, start - first, out))
        return features, stretches

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
        parts = [part - mean for part in windows.split(1 << 18)]
        covariance = sum(part.T @ part for part in parts) / len(windows)  # (k, k)
        weight = conv.weight[:, 0].float()  # (C, k)
        variance = ((weight @ covariance) * weight).sum(1)
        scale = norm.weight.float() * (variance + norm.eps).rsqrt()
        mean = weight @ mean + (0 if conv.bias is None else conv.bias.float())
        return scale, norm.bias.float() - scale * mean

    def _batches(self, stretches):
        """Stretches of similar lengths, longest first, of batch_seconds at most; at least one."""
        batches, frames = [], self.batch_seconds * self.config['frame_rate']
        for stretch in sorted(stretches, key=lambda stretch: -stretch.frames):
            if not batches or batches[-1][0].frames * (len(batches[-1]) + 1) > frames:
                batches.append([])
            batches[-1].append(stretch)
        return batches

    @torch.inference_mode()
    def _compute(self, batch):
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
            stretch.out.copy_(row[stretch.skip : stretch.skip + len(stretch.out)])

    @contextlib.contextmanager
    def _precision(self):
        """On CUDA: products in TF32, or not, as the dtype says, and afterwards as it was before."""
        cudnn, before = torch.backends.cudnn, torch.get_float32_matmul_precision()
        if self.device.type != 'cuda':
            yield
            return
        torch.set_float32_matmul_precision('high' if self.tf32 else 'highest')
        convolutions, cudnn.allow_tf32 = cudnn.allow_tf32, self.tf32
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
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
        x = _first(net.feature_projection(x))  # (B, T, D)
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
                x = _first(layer(x, attention_mask=mask))
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

    def _mfcc(self, wave):
        """The offline features: (samples,) -> (max(1, samples // 640), 2 n_cep)."""
        wave = F.pad(wave, (0, max(0, 4 * HOP - len(wave))))
        mel = log_mel(wave)[: len(wave) // (4 * HOP) * 4]
        energy = torch.logsumexp(mel, 1) - math.log(N_MELS)
        loud = energy.sort().values[int(0.95 * (len(energy) - 1))].clamp(min=-7)  # -7 is silence
        mel = (mel - loud + self.config['range']).clamp(min=0)
        return (mel.view(-1, 2, 2, N_MELS).mean(2) @ self.basis).flatten(1)

    @torch.inference_mode()
    def assign(self, features):
        """List of (frames, D) -> list of (frames,) long units on the CPU.

        Raises InputError if there are no clusters, or of another width, or if a change of unit has
        a price and `distortion`, its unit of measure, is not known.
        """
        if self.centroids is None:
            raise InputError(f'{self.name} has no k-means')
        width = self.centroids.shape[1]
        if features and features[0].shape[1] != width:
            raise InputError(
                f'the k-means is for {width} features, {self.name} gives {features[0].shape[1]}'
            )
        if not self.config.get('switch'):
            nearest = [self._costs(part).argmin(1) for f in features for part in f.split(BLOCK)]
            lengths = [len(f) for f in features]
            return list(torch.cat(nearest).cpu().split(lengths)) if features else []
        price = self.config['switch'] * self.config.get('distortion', 0) / 2
        if not price:
            raise InputError(f'{self.name}: `switch` needs `distortion`, the mean squared distance')
        order = sorted(range(len(features)), key=lambda i: len(features[i]))
        units = {}
        for some in (order[i : i + 32] for i in range(0, len(order), 32)):
            paths = self._cheapest([features[i] for i in some], price)
            units |= zip(some, paths, strict=True)
        return [units[i] for i in range(len(features))]

    @torch.inference_mode()
    def distance(self, features):
        """Mean squared distance of frames to their centroids, for `distortion`; list of (T, D)."""
        parts = [part for f in features for part in f.split(BLOCK)]
        nearest = [2 * self._costs(x).min(1).values + x.square().sum(1) for x in parts]
        return float(torch.cat(nearest).mean())

    def _costs(self, features):
        """Half the squared distances (frames, n_units), less what all units of a frame share."""
        return self.centroids.square().sum(1) / 2 - features @ self.centroids.T

    def _cheapest(self, features, price):
        """Units with the least sum of costs plus `price` a change: list of (frames, D) -> (frames,).

        Viterbi, in step for all. Whoever changes at t comes from the unit that was cheapest at
        t - 1; so a path is known by its last unit, when that began, and for each t the cheapest
        unit and when that had begun. This is two numbers a frame, however many units there are.
        """
        rows = torch.arange(len(features))
        total = torch.zeros(len(features), self.n_units)  # the least cost that ends in each unit
        began = torch.zeros(len(features), self.n_units, dtype=torch.long)
        source, before = [], []  # for each t, (B,): the cheapest unit at t - 1, and when it began
        for start in range(0, max(map(len, features)), BLOCK):
            # past an utterance's end all costs are 0, and its cheapest unit stays
            costs = [self._costs(f[start : start + BLOCK]).cpu() for f in features]
            for cost in nn.utils.rnn.pad_sequence(costs):  # (B, n_units)
                best, cheapest = total.min(1)
                total -= best[:, None]
                source.append(cheapest)
                before.append(began[rows, cheapest])
                began[total > price] = len(source) - 1
                total = total.clamp(max=price) + cost
        source, before = torch.stack(source, 1).tolist(), torch.stack(before, 1).tolist()
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


def _first(result):
    """What a module of transformers returns: in some versions the first of a tuple."""
    return result[0] if isinstance(result, tuple) else result


def _cepstrum(config):
    """The offline features' basis (N_MELS, n_cep): a cosine transform, its rows weighted."""
    order = torch.arange(config['n_cep'])
    angle = torch.outer(torch.arange(N_MELS) + 0.5, order) * math.pi / N_MELS
    weight = order.clamp(min=1) ** config['lifter']
    weight[0] = config['c0']
    return angle.cos() * (2 / N_MELS) ** 0.5 * weight / 2**0.5


def _net_encoder(where, layer, public):
    """The configuration of an encoder of a net: `public`, an entry of ENCODERS, or a folder."""
    model = os.path.abspath(where) if os.path.isdir(where) else where
    return dict(
        kind='hubert',
        name=where if public else os.path.basename(model),
        model=public.get('model', model),
        layer=public['layer'] if layer is None else layer,
        pad=public.get('pad', 0),
        vocoder=public.get('vocoder', 'vocoder'),
    )


def _load_net(config):
    """The net that an encoder's configuration names. Raises InputError saying what is missing."""
    name = config['name']
    public = ENCODERS.get(name)
    here = public and os.path.isdir(cache_path(name))
    try:
        return _read_net(_find_checkpoint(cache_path(name) if here else config['model']), config)
    except InputError as error:
        if not public:
            raise InputError(
                f'{error} (the net of encoder {name!r}; --encoder names another)'
            ) from None
        raise InputError(
            f'{name} is not on this machine ({error}). It needs three files: config.json and '
            f'model.safetensors of https://huggingface.co/{config["model"]} in {cache_path(name)}, '
            f'and {public["kmeans"]} in {cache_path("")}'
        ) from None


def _net_config(values, layer, where):
    """transformers' configuration of a net of `layer` layers: what lies above is not computed."""
    from transformers import AutoConfig

    kind = values.get('model_type')
    if kind not in ('hubert', 'wav2vec2', 'wavlm'):
        raise InputError(f'{where}: model_type {kind!r} is no hubert, wav2vec2 or wavlm')
    hf = AutoConfig.for_model(**values)
    if not 0 <= layer <= min(hf.num_hidden_layers, 1000):
        raise InputError(f'layer {layer} of {where}: it has {hf.num_hidden_layers}')
    if min(*hf.conv_stride, *hf.conv_kernel) < 1:
        raise InputError(f'{where}: convolutions of {hf.conv_kernel}, strides {hf.conv_stride}')
    hf.num_hidden_layers = layer
    hf._attn_implementation = 'eager' if kind == 'wavlm' else 'sdpa'
    return hf


def _read_net(folder, config):
    """The net of a checkpoint, without the layers above the encoder's. Raises InputError."""
    from transformers import AutoModel, logging

    values = _read_json(os.path.join(folder, 'config.json'))
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it lists each tensor of the layers above
    logging.disable_progress_bar()
    try:
        hf = _net_config(values, config['layer'], folder)
        net, report = AutoModel.from_pretrained(folder, config=hf, output_loading_info=True)
    except InputError:
        raise
    except Exception as error:  # what transformers raises of a folder that is no checkpoint
        reason = ' '.join(str(error).split())[:200]
        raise InputError(f'{folder} is no {values.get("model_type")}: {reason}') from None
    finally:
        logging.set_verbosity(verbosity)
    lost = sorted(name for name in report['missing_keys'] if name != 'masked_spec_embed')
    if lost:
        raise InputError(f'{folder}: {len(lost)} tensors are missing, such as {lost[0]}')
    return _fold(net)


def _fold(net):
    """The net with the weight norm of its position convolution folded into the weights."""
    conv = net.encoder.pos_conv_embed.conv
    if nn.utils.parametrize.is_parametrized(conv):
        nn.utils.parametrize.remove_parametrizations(conv, 'weight')
    return net


def _read_encoder(folder):
    """-> configuration, centroids (n_units, D), net or None, of a folder of save_pretrained.

    Whoever made the folder may be a stranger: raises InputError naming what cannot be right.
    """
    from safetensors.torch import load_file

    path = os.path.join(folder, 'encoder.safetensors')
    config = _read_json(os.path.join(folder, 'encoder.json'))
    _check_encoder(config, os.path.join(folder, 'encoder.json'))
    try:
        tensors = load_file(path)
    except Exception as error:
        raise InputError(f'{path} cannot be read: {error}') from None
    centroids = tensors.pop('centroids', None)
    _check_centroids(centroids, path)
    if config.get('n_units') not in (None, len(centroids)):
        raise InputError(
            f'{path} has {len(centroids)} units, encoder.json says {config["n_units"]}'
        )
    if not config.get('net'):
        return config, centroids.float(), None
    from transformers import AutoModel

    try:
        with torch.device('meta'):  # it takes no memory before its tensors fit
            net = _fold(AutoModel.from_config(_net_config(config['net'], config['layer'], folder)))
        net.load_state_dict({name[4:]: tensor for name, tensor in tensors.items()}, assign=True)
    except InputError:
        raise
    except Exception as error:
        reason = ' '.join(str(error).split())[:200]
        raise InputError(f'{path} does not hold the net of encoder.json: {reason}') from None
    return config, centroids.float(), net


def _check_encoder(config, path):
    """Raises InputError naming the first value in an encoder.json that cannot be right."""
    if not isinstance(config, dict) or config.get('kind') not in ('mfcc', 'hubert'):
        raise InputError(f'{path}: expected an encoder of `kind` mfcc or hubert')
    number, nothing = (int, float), type(None)
    wanted = dict(name=[str], vocoder=[str, nothing], n_units=[int, nothing], net=[dict, nothing])
    wanted |= dict(switch=[*number, nothing], distortion=[*number, nothing])
    if config['kind'] == 'mfcc':
        wanted |= dict(frame_rate=number, n_cep=[int], lifter=number, c0=number, range=number)
    else:
        wanted |= dict(model=[str], layer=[int], pad=[int])
    for key, kinds in wanted.items():
        value = config.get(key)
        if type(value) not in kinds or (type(value) in number and not 0 <= value < 1e6):
            raise InputError(f'{path}: `{key}` cannot be {value!r}')
    if config['kind'] == 'mfcc' and (config['frame_rate'], config['n_cep'] <= N_MELS) != (25, True):
        raise InputError(f'{path}: mfcc has 25 frames a second and at most {N_MELS} cepstra')


def _check_centroids(centroids, path):
    """Raises InputError if these are no clusters, (n_units, D) finite numbers."""
    right = isinstance(centroids, torch.Tensor) and centroids.ndim == 2 and len(centroids)
    if not right or not centroids.is_floating_point() or not centroids.isfinite().all():
        raise InputError(f'{path}: no `centroids` (n_units, D) of finite numbers')


def cache_path(name):
    """Where public files are kept: $SLAM_CACHE, or ~/.cache/slam."""
    return os.path.join(os.environ.get('SLAM_CACHE') or os.path.expanduser('~/.cache/slam'), name)


def fetch(url, sha256=None):
    """The local copy of a public file, downloaded on first use and checked.

    Raises InputError offline, or if the file is not the published one.
    """
    path = cache_path(url.rsplit('/', 1)[-1])
    if os.path.exists(path):
        _check_sha256(path, path, sha256)
        return path
    import urllib.request

    try:
        with write_atomic(path, 'wb') as file:
            with urllib.request.urlopen(url, timeout=60) as remote:
                shutil.copyfileobj(remote, file)
            file.flush()
            _check_sha256(file.name, path, sha256)
    except OSError as error:
        raise InputError(
            f'{url} cannot be downloaded ({error}): put it at {path} (SLAM_CACHE sets the folder)'
        ) from None
    return path


def _check_sha256(path, name, sha256):
    import hashlib

    with open(path, 'rb') as file:
        if sha256 and hashlib.file_digest(file, 'sha256').hexdigest() != sha256:
            published = os.path.basename(name)
            raise InputError(f'{name} is not the published {published} (its sha256 differs)')


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
        raise InputError(f'it asks to run {module}.{name}; refused')

    def load_build(self):
        import numpy

        super().load_build()
        array = self.stack[-1]
        if not isinstance(array, self.Array):
            return
        if array.dtype.hasobject:
            raise InputError('it holds an array of objects; refused')
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

        try:
            if path.endswith('.safetensors'):
                centroids = load_file(path)['centroids'].float()
            else:
                with open(path, 'rb') as file:
                    reader = cls(file)
                    reader.file = file
                    centres = vars(reader.load())['cluster_centers_']
                centroids = torch.from_numpy(centres.astype('float32'))
        except Exception as error:
            raise InputError(
                f'{path} is no k-means file (.safetensors with `centroids`, or a plain joblib dump '
                f'of KMeans): {error}'
            ) from None
        _check_centroids(centroids, path)
        return centroids


# -----------------------------------------------------------------------------
# UnitVocoder: units -> wave

_LJ = 'https://dl.fbaipublicfiles.com/textless_nlp/twist/speech_tokenizer/hifigan_lj_mhubert_base_25hz'
HIFIGAN = {
    'hifigan25': (  # mhubert25's, trained on LJSpeech: generator and config, each with its sha256
        (_LJ + '.pt', 'd88224e95c501e2cd59a6e4014753169cfe060fb7ade3cc0da03c809fef73b79'),
        (_LJ + '_config.json', '116dc39be4970cd393e562acd0a0ec70a86aaba7e9ca469b8b836cb3fe46afc7'),
    )
}
VOICE_LEVEL, VOICE_PEAK = (
    0.08,
    0.95,
)  # root mean square of the spoken parts (-22 dB), and the highest sample allowed


def speech_level(wave):
    """Root mean square of the spoken parts of (samples,): of the 25 ms blocks less than 13 dB below the loud ones."""
    power = (
        wave[: len(wave) // WINDOW * WINDOW].view(-1, WINDOW).square().mean(1)
        if len(wave) >= WINDOW
        else wave.square().mean()[None]
    )
    loud = power.sort().values[int(0.95 * (len(power) - 1))]
    return float(power[power >= 0.05 * loud].mean().sqrt())


def finish_wave(wave, level=VOICE_LEVEL):
    """What a listener expects of (samples,), at least one: no DC, speech at `level`, peaks below VOICE_PEAK, 5 ms fades so that no end clicks."""
    wave = wave - wave.mean()
    wave = wave * min(
        level / max(speech_level(wave), 1e-6), VOICE_PEAK / max(float(wave.abs().max()), 1e-6)
    )
    fade = torch.linspace(0, 1, min(80, len(wave)), device=wave.device)
    wave[: len(fade)] *= fade
    wave[-len(fade) :] *= fade.flip(0)
    return wave


class UnitTable:
    """What a table vocoder is made of: per unit the sum of its spectra, its frames and its runs. Tables of parts add up."""

    def __init__(self, n_units, frame_rate):
        self.n_units, self.frame_rate, self.steps = (
            n_units,
            frame_rate,
            max(1, round(SAMPLE_RATE / HOP / frame_rate)),
        )
        self.mels = torch.zeros(n_units, self.steps * N_MELS, dtype=torch.float64)
        self.frames, self.runs = (
            torch.zeros(n_units, dtype=torch.long),
            torch.zeros(n_units, dtype=torch.long),
        )

    def add(self, wave, units):
        """Count in one utterance: wave (samples,) at 16 kHz, units (frames,), one a frame, not de-duplicated."""
        wave, units = torch.as_tensor(wave), torch.as_tensor(units, dtype=torch.long)
        mel = log_mel(wave * (VOICE_LEVEL / max(speech_level(wave), 1e-5)))
        at = (torch.arange(len(units)) * (SAMPLE_RATE / HOP / self.frame_rate)).round().long()[
            :, None
        ] + torch.arange(self.steps)
        inside = at[:, -1] < len(mel)
        self.mels.index_add_(0, units[inside], mel[at[inside]].flatten(1).double())
        self.frames += torch.bincount(units[inside], minlength=self.n_units)
        self.runs += torch.bincount(dedup(units)[0], minlength=self.n_units)

    def to_bytes(self):
        """The counts as bytes, all tables of one encoder equally many: appended to each other they add up."""
        return (
            torch.cat((self.mels, self.frames[:, None], self.runs[:, None]), dim=1)
            .numpy()
            .tobytes()
        )

    @classmethod
    def from_bytes(cls, path, n_units, frame_rate):
        """The sum of the tables in a file."""
        total = cls(n_units, frame_rate)
        size = n_units * (total.mels.shape[1] + 2) * 8
        with open(path, 'rb') as file:
            while part := file.read(size):
                part = torch.frombuffer(bytearray(part), dtype=torch.float64).view(n_units, -1)
                total.mels += part[:, :-2]
                total.frames += part[:, -2].long()
                total.runs += part[:, -1].long()
        return total

    def finish(self):
        """The vocoder of the mean spectra and mean durations; a unit never seen sounds as the mean of all."""
        seen = self.frames[:, None] > 0
        mel = torch.where(seen, self.mels, self.mels.sum(0)) / torch.where(
            seen, self.frames[:, None], self.frames.sum()
        ).clamp(min=1)
        durations = (self.frames / self.runs.clamp(min=1)).clamp(min=1)
        return UnitVocoder(
            dict(
                kind='table',
                n_units=self.n_units,
                frame_rate=self.frame_rate,
                sample_rate=SAMPLE_RATE,
            ),
            dict(
                mel=mel.float().view(self.n_units, self.steps, N_MELS), durations=durations.float()
            ),
        )


class UnitVocoder:
    """Units to speech, in one of two ways. Offline a table: the mean log-mel spectra of each unit, made into a wave by Griffin-Lim from the
    phases of a voice-like excitation. Or the unit HiFi-GAN with duration predictor (Polyak et al. 2021, fairseq's code HiFi-GAN)."""

    def __init__(self, config, tensors, device='cpu'):
        self.config, self.device = config, torch.device(device)
        self.tensors = {name: tensor.to(self.device) for name, tensor in tensors.items()}
        self.n_units, self.sample_rate, self.frame_rate = (
            config['n_units'],
            config['sample_rate'],
            config['frame_rate'],
        )
        self.hop = round(self.sample_rate / self.frame_rate)  # samples a frame

    @classmethod
    def from_pretrained(cls, where, device='cpu'):
        """Load a folder of save_pretrained, 'hifigan25' (downloaded once, checked), or a generator .pt with its .json beside it.
        Raises: InputError if there is none, the download fails or differs, or tensors are missing."""
        if os.path.exists(os.path.join(where, 'vocoder.json')):
            from safetensors.torch import load_file

            config, path = (
                _read_json(os.path.join(where, 'vocoder.json')),
                os.path.join(where, 'vocoder.safetensors'),
            )
            try:
                return cls(config, load_file(path), device)
            except Exception as error:
                raise InputError(
                    f'{path} cannot be read: {" ".join(str(error).split())[:200]}'
                ) from None
        if where in HIFIGAN:
            path, config = (fetch(*file) for file in HIFIGAN[where])
        elif where.endswith('.pt') and os.path.exists(where):
            beside = [
                where[:-3] + '_config.json',
                where[:-3] + '.json',
                os.path.join(os.path.dirname(where), 'config.json'),
            ]
            path, config = where, next(filter(os.path.exists, beside), None)
            if not config:
                raise InputError(f'{where} needs its config beside it: {beside[0]}')
        else:
            raise InputError(
                f'no vocoder {where!r}: expected a folder with vocoder.json, a HiFi-GAN .pt, or one of {", ".join(HIFIGAN)}'
            )
        c = _read_json(config)
        try:
            state = torch.load(path, map_location='cpu', weights_only=True)['generator']
            state = {
                name.replace('parametrizations.weight.original', 'weight_')
                .replace('weight_0', 'weight_g')
                .replace('weight_1', 'weight_v'): tensor.float()
                for name, tensor in state.items()
            }
            for name in [
                name[:-2] for name in state if name.endswith('.weight_g')
            ]:  # fold weight norm: w = g v / |v| (Salimans & Kingma 2016)
                g, v = state.pop(name + '_g'), state.pop(name + '_v')
                state[name] = v * (g / v.flatten(1).norm(dim=1).view(g.shape))
            rate = c.get('sampling_rate', SAMPLE_RATE)
            config = dict(
                c,
                kind='hifigan',
                n_units=len(state['dict.weight']),
                sample_rate=rate,
                frame_rate=rate / math.prod(c['upsample_rates']),
            )
            wide = sum(
                state[name].shape[1]
                for name in ('dict.weight', 'spkr.weight', 'style.weight')
                if name in state
            )
            assert state['conv_pre.weight'].shape[1] == wide, (
                f'its embeddings give {wide} channels, conv_pre takes another number'
            )
        except Exception as error:  # unpickling raises anything
            raise InputError(
                f'{path} is no unit HiFi-GAN generator: {" ".join(repr(error).split())[:200]}'
            ) from None
        return cls(config, state, device)

    def save_pretrained(self, folder):
        """Write a table vocoder as vocoder.json and vocoder.safetensors, each whole or not at all."""
        from safetensors.torch import save_file

        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, 'vocoder')
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in self.tensors.items()},
            path + '.safetensors.tmp',
        )
        with open(path + '.json.tmp', 'w', encoding='utf-8') as file:
            json.dump(self.config, file, indent=2)
        for end in ('.safetensors', '.json'):
            os.replace(path + end + '.tmp', path + end)

    @torch.inference_mode()
    def durations(self, units):
        """Frames of each unit, at least 1: list of de-duplicated units (n,) -> list of (n,) long."""
        if (
            self.config['kind'] == 'table'
        ):  # each unit's mean; what rounding takes from one the next gains, so that the tempo is right
            beyond = [
                (self.tensors['durations'].cpu()[u] - 1).cumsum(0).add(0.5).floor().long()
                for u in units
            ]
            return [1 + torch.diff(x, prepend=x.new_zeros(1)) for x in beyond]
        out, t, name = (
            [torch.ones(len(u), dtype=torch.long) for u in units],
            self.tensors,
            'dur_predictor.',
        )
        for row, u in [
            pair for pair in zip(out, units) if name + 'proj.weight' in t and len(pair[1])
        ]:
            x = t['dict.weight'][u.to(self.device)][None]  # (1, n, C)
            for i in (1, 2):
                x = F.relu(self._conv(f'{name}conv{i}.0', x.transpose(1, 2))).transpose(1, 2)
                x = F.layer_norm(x, x.shape[-1:], t[f'{name}ln{i}.weight'], t[f'{name}ln{i}.bias'])
            row[:] = (
                (F.linear(x, t[name + 'proj.weight'], t[name + 'proj.bias'])[0, :, 0].exp() - 1)
                .round()
                .clamp(min=1)
            )
        return out

    @torch.inference_mode()
    def decode(self, units, durations=None, speaker=0, style=0):
        """Speak.

        units: list of (n,) long, de-duplicated. durations: list of (n,) frames; None: predicted. speaker, style: rows of a HiFi-GAN's tables.
        Returns: list of (frames * hop,) float32 at sample_rate on the CPU: no DC, speech at VOICE_LEVEL, peaks <= VOICE_PEAK. No wave
        depends on the others. Raises: InputError for units, speakers or styles that this vocoder does not have.
        """
        units = [torch.as_tensor(u, dtype=torch.long, device='cpu') for u in units]
        worst = max((int(u.max()) for u in units if len(u)), default=0)
        if worst >= self.n_units:
            raise InputError(
                f'unit {worst} is not among the {self.n_units} of this vocoder: it belongs to another encoder'
            )
        durations = self.durations(units) if durations is None else durations
        frames = [u.repeat_interleave(torch.as_tensor(d)) for u, d in zip(units, durations)]
        waves = [torch.zeros(0) for _ in frames]
        order = sorted(
            (i for i in range(len(frames)) if len(frames[i])), key=lambda i: len(frames[i])
        )
        for batch in [order[i : i + 16] for i in range(0, len(order), 16)]:  # like lengths together
            some = [frames[i].to(self.device) for i in batch]
            spoken = (
                map(self._griffin_lim, some)
                if self.config['kind'] == 'table'
                else self._hifigan(some, speaker, style)
            )
            for i, wave in zip(batch, spoken):
                waves[i] = finish_wave(wave).cpu()
        return waves

    def _conv(self, name, x, dilation=1):
        """The convolution `name` over (B, C, T), padded with zeros to the same length."""
        weight = self.tensors[name + '.weight']
        return F.conv1d(
            x,
            weight,
            self.tensors[name + '.bias'],
            dilation=dilation,
            padding=(weight.shape[-1] - 1) * dilation // 2,
        )

    def _hifigan(self, frames, speaker, style):
        """List of (frames,) units -> list of (frames * hop,) samples in [-1, 1], one batch. Layer by layer what lies past an utterance's end
        is set to the zeros that padding would show it alone, so the batch changes nothing."""
        t, c = self.tensors, self.config
        codes = nn.utils.rnn.pad_sequence(frames, batch_first=True)  # (B, T)
        parts = [t['dict.weight'][codes]]
        for name, row in (('spkr', speaker), ('style', style)):
            if name + '.weight' in t:
                if not 0 <= row < len(t[name + '.weight']):
                    raise InputError(
                        f'{name} {row} is not among the {len(t[name + ".weight"])} of this vocoder'
                    )
                parts.append(t[name + '.weight'][row].expand(*codes.shape, -1))
        lengths = torch.tensor([len(f) for f in frames], device=self.device)
        mask = (torch.arange(codes.shape[1], device=self.device) < lengths[:, None])[
            :, None
        ].float()  # (B, 1, T)
        x = self._conv('conv_pre', torch.cat(parts, dim=-1).transpose(1, 2) * mask)
        n = len(c['resblock_kernel_sizes'])
        for i, (rate, kernel) in enumerate(zip(c['upsample_rates'], c['upsample_kernel_sizes'])):
            x = F.leaky_relu(x * mask, 0.1)
            x = F.conv_transpose1d(
                x,
                t[f'ups.{i}.weight'],
                t[f'ups.{i}.bias'],
                stride=rate,
                padding=(kernel - rate) // 2,
            )
            mask = mask.repeat_interleave(rate, dim=-1)
            blocks = 0
            for j, dilations in enumerate(
                c['resblock_dilation_sizes']
            ):  # multi-receptive field fusion: the mean of n residual blocks
                y, block = x * mask, f'resblocks.{i * n + j}'
                for k, dilation in enumerate(dilations):
                    z = self._conv(f'{block}.convs1.{k}', F.leaky_relu(y, 0.1), dilation)
                    y = (self._conv(f'{block}.convs2.{k}', F.leaky_relu(z * mask, 0.1)) + y) * mask
                blocks = blocks + y
            x = blocks / n
        x = torch.tanh(self._conv('conv_post', F.leaky_relu(x)))[
            :, 0
        ]  # (B, T * hop); here the slope is 0.01
        return [row[: len(f) * self.hop] for row, f in zip(x, frames)]

    def _griffin_lim(self, frames, rounds=3):
        """(frames,) units -> (frames * hop,) samples whose log_mel is the table's.

        Griffin & Lim 1984, with two changes. It begins from a voice: pulses at 100 to 125 Hz (higher where it is louder, as people speak)
        below 4.5 kHz where the spectrum falls as that of voiced speech does, noise elsewhere. And it keeps that fine structure, so that speech
        stays voiced, while the envelope is corrected by what log_mel misses of the table. Three rounds bring 98 % of the units back.
        """
        table, device = self.tensors['mel'], self.device  # (n_units, steps, N_MELS)
        n = round(len(frames) * SAMPLE_RATE / HOP / self.frame_rate)  # 10 ms steps
        at = torch.arange(n, device=device) * (self.frame_rate * HOP / SAMPLE_RATE)
        mel = table[frames[at.long()], (at.frac() * table.shape[1] + 1e-3).long()]  # (n, N_MELS)
        filters, window = (
            mel_filters().to(device),
            torch.hann_window(WINDOW, device=device),
        )  # (bins, N_MELS), (WINDOW,)
        hertz = torch.linspace(0, SAMPLE_RATE / 2, N_FFT // 2 + 1, device=device)
        spread = filters / filters.sum(1, keepdim=True).clamp(
            min=1e-6
        )  # a bin's log energy out of the bands'
        basis = (
            torch.outer(
                torch.arange(N_MELS, device=device) + 0.5, torch.arange(N_MELS // 2, device=device)
            )
            .mul(math.pi / N_MELS)
            .cos()
        )
        basis = F.normalize(basis, dim=0)
        smooth = (
            basis @ basis.T
        )  # keeps the envelope, the lower half of the cepstrum, and drops the harmonics
        side, length = (WINDOW - HOP) // 2, (n - 1) * HOP + WINDOW

        def analyse(wave):  # (n * HOP,) -> (n, bins), on log_mel's frames
            return torch.fft.rfft(F.pad(wave, (side, side)).unfold(0, WINDOW, HOP) * window, N_FFT)

        def overlap(parts):  # (n, WINDOW) -> (n * HOP,)
            return F.fold(parts.T[None], (1, length), (1, WINDOW), stride=(1, HOP))[
                0, 0, 0, side : side + n * HOP
            ]

        slow = F.avg_pool1d(torch.logsumexp(mel, 1)[None], 31, 1, 15, count_include_pad=False)[
            0
        ]  # loudness over 0.3 s
        pitch = 125 - 5 * (slow.max() - slow).clamp(max=5)  # Hz
        cycles = (pitch / SAMPLE_RATE).cpu().double().repeat_interleave(HOP).cumsum(0).floor()
        pulses = (
            torch.diff(cycles, prepend=cycles.new_zeros(1)).float().to(device)
            * (SAMPLE_RATE / 112) ** 0.5
        )  # power 1, as the noise
        noise = torch.randn(n * HOP, generator=torch.Generator().manual_seed(0)).to(device)
        peaks = hertz[filters.argmax(0)]
        tilt = torch.logsumexp(mel[:, peaks < 1000], 1) - torch.logsumexp(
            mel[:, peaks > 3000], 1
        )  # above 0.5: voiced in 94 of 100 frames
        voiced = torch.sigmoid(2 * tilt - 1)[:, None] * torch.sigmoid(
            (4500 - hertz) / 400
        )  # (n, bins)
        source = (
            analyse(noise) * (1 - voiced).sqrt() + analyse(pulses) * voiced.sqrt()
        ) / window.square().sum().sqrt()
        source = source * ((hertz > 50) & (hertz < SAMPLE_RATE / 2))  # no DC, no rumble
        weight, target = (
            overlap((window**2).expand(n, -1)).clamp(min=0.05),
            mel - filters.sum(0).log(),
        )
        for turn in range(rounds + 1):
            wave = (
                overlap(
                    torch.fft.irfft(source * torch.exp(0.5 * target @ spread.T), N_FFT)[:, :WINDOW]
                    * window
                )
                / weight
            )
            if turn < rounds:
                heard = analyse(wave)
                target = (
                    target
                    + (mel - (heard.abs().square() @ filters).clamp(min=1e-7).log()).clamp(-3, 3)
                    @ smooth
                )
                source = source.abs() * heard / heard.abs().clamp(min=1e-9)
        return wave


# -----------------------------------------------------------------------------
# What several scripts need

AUDIO_EXTENSIONS = (
    *('.wav', '.flac', '.ogg', '.oga', '.opus', '.mp3'),
    *('.aiff', '.aif', '.aifc', '.au', '.sph', '.caf', '.w64'),
)


def find_audio(path):
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
            if name.lower().endswith(AUDIO_EXTENSIONS) and not name.startswith('.'):
                found.append(os.path.join(folder, name))
    if not found:
        raise InputError(
            f'{path}: no sound in this folder (looked for {" ".join(AUDIO_EXTENSIONS)})'
        )
    return sorted(found)


def read_jsonl(path):
    """Yields (line number from 1, object) of a file of JSON lines; empty lines are passed over.

    NaN and Infinity, which JSON proper does not have, are read as None. Raises InputError naming
    the file, and the line where one is no JSON object.
    """
    try:
        with open(path, 'rb') as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line, parse_constant=lambda name: None)
                except (ValueError, RecursionError) as error:
                    raise InputError(f'{path}, line {number}: not JSON ({error})') from None
                if not isinstance(row, dict):
                    raise InputError(f'{path}, line {number}: expected a JSON object {{...}}')
                yield number, row
    except OSError as error:
        raise InputError(f'{path}: {error.strerror}') from None


def parquet_files(where):
    """The .parquet files that `where` names, sorted: a file, a folder of shards, or one of the hub.

    `hub:owner/name` is a data set of the Hugging Face hub, `hub:owner/name:split` the part of it
    whose folder or file is called so (`train`, or `en/train`: a configuration and its split),
    `hub:owner/name@revision` another revision. Its files stay there, one is named
    `hub:owner/name@revision:path.parquet`, and read_parquet fetches it. Raises InputError.
    """
    if not where.startswith('hub:'):
        if os.path.isfile(where):
            return [where]
        found = []
        for folder, folders, names in os.walk(where):
            folders.sort()
            found += [os.path.join(folder, name) for name in sorted(names)]
        found = [path for path in found if path.endswith('.parquet')]
        if not found:
            raise InputError(f'{where}: no .parquet file there')
        return found

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


def read_parquet(where, group=None):
    """Yields the rows of parquet data, dicts of plain Python values, a few at a time in memory.

    where: as of parquet_files. group: of each file this row group alone, from 0. Audio stays a struct dict(bytes=..., path=...): load_audio takes
    io.BytesIO(row['audio']['bytes']). Raises InputError naming the file, or what to install.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError('parquet is read by a package: pip install pyarrow') from None

    for name in parquet_files(where):
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
                groups = range(file.num_row_groups) if group is None else [group]
                for batch in file.iter_batches(batch_size=16, row_groups=groups):
                    yield from batch.to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(f'{path}: not readable as parquet ({error})') from None


@contextlib.contextmanager
def write_atomic(path, mode='w'):
    """A file that appears under `path` whole or not at all: `with write_atomic(path) as file: ...`

    It is written aside, under a name that no other process uses, and renamed at the end; folders
    are made as needed. mode: 'w' (UTF-8) or 'wb'. After an error nothing is left behind.
    """
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    aside = f'{path}.{os.getpid()}.tmp'
    try:
        with open(aside, mode, encoding=None if 'b' in mode else 'utf-8') as file:
            yield file
        os.replace(aside, path)
    finally:
        with contextlib.suppress(OSError):
            os.remove(aside)


# The Penn Treebank's word rule as NLTK's word_tokenize has it, each rule in its turn: what is to
# become a word of its own gets spaces around it. Auto-BLEU counts such words.
WORD_RULES = [
    # quotes that open
    (r'([«“‘„]|`+)', r' \1 '),
    (r'^"', '``'),
    (r'(``)', r' \1 '),
    (r'([ (\[{<])("|\'{2})', r'\1 `` '),
    (r"(?i)(?<!\w)(')(?!(?:re|ve|ll|m|t|s|d|n)\b)(?=\w)", r'\1 '),
    # punctuation: a full stop only where the text ends, a comma or a colon not before a digit
    (r'([^.])(\.)([\])}>"\'»”’ ]*+)\s*$', r'\1 \2 \3 '),
    (r'([:,])([^\d])', r' \1 \2'),
    (r'([:,])$', r' \1 '),
    (r'(\.{2,}|[;@#$%&\u2012-\u2015])', r' \1 '),
    (r'([^.])(\.)([\])}>"\']*)\s*$', r'\1 \2\3 '),
    (r'([?!])', r' \1 '),
    (r"([^'])' ", r"\1 ' "),
    (r'([*\]\[(){}<>]|--)', r' \1 '),
    (r'^|$', ' '),
    # quotes that close, and what an apostrophe joins to a word
    (r'([»”’])', r' \1 '),
    (r'\'\'|"', " '' "),
    (r'\s+', ' '),
    (r"([^' ])('[sSmMdD]|') ", r'\1 \2 '),
    (r"([^' ])('ll|'LL|'re|'RE|'ve|'VE|n't|N'T) ", r'\1 \2 '),
    # contractions without one
    (r'(?i)\b(can)(not)\b', r' \1 \2 '),
    (r"(?i)\b(d)('ye)\b", r' \1 \2 '),
    (r'(?i)\b(gim)(me)\b', r' \1 \2 '),
    (r'(?i)\b(gon)(na)\b', r' \1 \2 '),
    (r'(?i)\b(got)(ta)\b', r' \1 \2 '),
    (r'(?i)\b(lem)(me)\b', r' \1 \2 '),
    (r"(?i)\b(more)('n)\b", r' \1 \2 '),
    (r'(?i)\b(wan)(na)(?=\s)', r' \1 \2 '),
    (r"(?i) ('t)(is|was)\b", r' \1 \2 '),
]


def tokenize_words(text):
    """The words and punctuation marks of a text: NLTK's word_tokenize(text, preserve_line=True)."""
    for pattern, replacement in WORD_RULES:
        text = re.sub(pattern, replacement, text)
    return text.split()


def auto_bleu(words, n=2):
    """Share of the n-grams of a sequence that occur in it more than once; 0 where there is none.

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
    """Initializer of worker processes: so many threads; Ctrl-C is left to the parent, and a worker
    whose parent is gone, killed by whatever signal, ends too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
