"""SLM against transformers: the same function, packed, cached and on disk.

Checkpoints are small and random, written by transformers.
"""

import json
import os

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file

import model as slam
from model import BOS, EOS, OFFSET, SLM, InputError, SLMConfig

V = 42
LLAMA = dict(
    vocab_size=V,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=128,
    bos_token_id=1,
    eos_token_id=1,
    pad_token_id=0,
)
OPT = dict(
    vocab_size=V,
    hidden_size=32,
    ffn_dim=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=128,
    dropout=0.0,
    bos_token_id=1,
    eos_token_id=1,
    pad_token_id=0,
)
LLAMA3_ROPE = dict(
    rope_type='llama3',
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
FAMILIES = {
    'qwen2': lambda: transformers.Qwen2Config(
        **LLAMA, num_key_value_heads=2, tie_word_embeddings=True, rope_theta=1e6
    ),
    'qwen2 untied': lambda: transformers.Qwen2Config(
        **LLAMA, num_key_value_heads=1, tie_word_embeddings=False
    ),
    'llama': lambda: transformers.LlamaConfig(
        **LLAMA, num_key_value_heads=4, tie_word_embeddings=False
    ),
    'llama tied, wide heads': lambda: transformers.LlamaConfig(
        **LLAMA, num_key_value_heads=2, tie_word_embeddings=True, head_dim=16
    ),
    'llama 3 rope, biases': lambda: transformers.LlamaConfig(
        **LLAMA,
        num_key_value_heads=4,
        attention_bias=True,
        mlp_bias=True,
        rope_theta=5e5,
        rope_scaling=LLAMA3_ROPE,
    ),
    'llama linear rope': lambda: transformers.LlamaConfig(
        **LLAMA, rope_scaling=dict(rope_type='linear', factor=2.0)
    ),
    'qwen3': lambda: transformers.Qwen3Config(
        **LLAMA, num_key_value_heads=2, tie_word_embeddings=True, head_dim=16
    ),
    'qwen3 untied, biases': lambda: transformers.Qwen3Config(
        **LLAMA, num_key_value_heads=2, tie_word_embeddings=False, head_dim=8, attention_bias=True
    ),
    'opt': lambda: transformers.OPTConfig(**OPT, word_embed_proj_dim=32),
    'opt post-norm, projected': lambda: transformers.OPTConfig(
        **OPT, word_embed_proj_dim=16, do_layer_norm_before=False
    ),
    'gpt_neox': lambda: transformers.GPTNeoXConfig(**LLAMA, rotary_pct=0.25, hidden_act='gelu'),
    'gpt_neox sequential': lambda: transformers.GPTNeoXConfig(
        **LLAMA, rotary_pct=0.5, use_parallel_residual=False
    ),
}
PAPER = {
    'Qwen2.5-0.5B': 358_347_904,
    'SmolLM2-135M': 106_492_608,
    'MobileLLM-125M': 106_492_608,
    'SmolLM2-360M': 315_117_120,
    'MobileLLM-350M': 315_117_120,
    'OPT-125M': 87_015_936,
    'OPT-350M': 305_714_176,
    'Pythia-160M': 85_827_072,
    'Pythia-410M': 303_339_520,
}


@pytest.fixture(autouse=True)
def one_thread():
    torch.manual_seed(0)
    torch.set_num_threads(1)


def random_hf(config):
    """transformers' model with weights so large that every part of it matters, biases and norms
    included."""
    hf = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in hf.parameters():
            p.copy_(torch.randn_like(p) * 0.15 if p.ndim > 1 else p + 0.1 * torch.randn_like(p))
    hf.tie_weights()
    return hf


@pytest.fixture(params=FAMILIES)
def pair(request, tmp_path):
    """(transformers' model, ours loaded from its checkpoint)"""
    hf = random_hf(FAMILIES[request.param]())
    hf.save_pretrained(tmp_path / 'hf')
    return hf, SLM.from_pretrained(str(tmp_path / 'hf'), vocab_size=V).eval()


def small(**change):
    config = (
        dict(
            family='qwen2',
            n_layer=2,
            n_embd=32,
            n_head=4,
            n_kv_head=2,
            n_ffn=48,
            vocab_size=V,
            context=128,
        )
        | change
    )
    model = SLM(SLMConfig(**config)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.15 if p.ndim > 1 else p + 0.1 * torch.randn_like(p))
    return model


def pack(lengths, width):
    """Random tokens and doc ids for rows of utterances of these lengths, each row `width` long."""
    doc = torch.stack(
        [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths]
    )
    assert doc.shape[1] == width
    return torch.randint(OFFSET, V, doc.shape), doc


def utterances(tokens, lengths):
    return [piece for row, sizes in zip(tokens, lengths, strict=True) for piece in row.split(sizes)]


@pytest.mark.parametrize('name', PAPER)
def test_parameter_counts_of_table_7(name):
    with torch.device('meta'):
        assert SLM.from_preset(name).num_params() == PAPER[name]


def test_logits_equal_transformers_and_round_trip(pair, tmp_path):
    hf, ours = pair
    tokens = torch.randint(0, V, (3, 60))
    with torch.no_grad():
        expected = hf(tokens).logits
        assert (ours(tokens) - expected).abs().max() < 1e-4
        assert expected.std() > 0.1
        assert ours.num_params() == hf.num_parameters()
        ours.save_pretrained(tmp_path / 'ours', dict(n_units=V - OFFSET, frame_rate=25.0))
        back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'ours').eval()
        assert type(back) is type(hf)
        assert (back(tokens).logits - expected).abs().max() < 1e-4
        again = SLM.from_pretrained(str(tmp_path / 'ours'))
        assert (
            torch.equal(again.eval()(tokens), ours(tokens)) and again.slam['n_units'] == V - OFFSET
        )


def test_gradients_equal_transformers(pair):
    hf, ours = pair
    tokens = torch.randint(OFFSET, V, (2, 40))
    loss = hf(tokens, labels=tokens).loss
    loss.backward()
    mine = ours(tokens, F.pad(tokens[:, 1:], (0, 1), value=-100))
    mine.backward()
    assert abs(loss.item() - mine.item()) < 1e-5
    entry = slam.FAMILIES[ours.config.family]
    grads = {name: p.grad for name, p in hf.named_parameters()}
    grads = slam.proper_names(grads, ours.config, entry)
    theirs = slam.to_our_tensors(grads, ours.config, entry)
    mine = {name: p.grad for name, p in ours.named_parameters()}
    torch.testing.assert_close(mine, {name: theirs[name] for name in mine}, atol=1e-5, rtol=1e-3)


def test_cached_greedy_generation_equals_transformers(pair):
    hf, ours = pair
    for lengths in ((12, 12, 12), (1, 7, 20)):
        prompts = [
            torch.cat((torch.tensor([BOS]), torch.randint(OFFSET, V, (n - 1,)))) for n in lengths
        ]
        longest = max(lengths)
        ids = torch.stack([F.pad(p, (longest - len(p), 0)) for p in prompts])
        mask = torch.stack([F.pad(torch.ones_like(p), (longest - len(p), 0)) for p in prompts])
        expected = hf.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=25,
            do_sample=False,
            repetition_penalty=1.1,
            eos_token_id=EOS,
            pad_token_id=0,
            suppress_tokens=[0],
        )[:, longest:].tolist()
        got = ours.generate(prompts, 25, temperature=0, repetition_penalty=1.1)
        for theirs, mine in zip(expected, got, strict=True):
            assert (theirs[: theirs.index(EOS)] if EOS in theirs else theirs) == mine.tolist()


def test_packed_equals_alone_with_gradients(pair):
    _, ours = pair
    lengths = [[30, 50, 48], [100, 1, 27]]
    tokens, doc = pack(lengths, 128)
    packed = ours(tokens, doc=doc)
    weight = torch.randn_like(packed)
    ours.zero_grad()
    (packed * weight).sum().backward()
    grads = {name: p.grad.clone() for name, p in ours.named_parameters()}
    alone = torch.cat([ours(u[None])[0] for u in utterances(tokens, lengths)]).view_as(packed)
    assert (packed - alone).abs().max() < 1e-5
    ours.zero_grad()
    (alone * weight).sum().backward()
    for name, p in ours.named_parameters():
        assert (p.grad - grads[name]).abs().max() < 1e-5 * max(1, p.grad.abs().max()), name


def test_every_attention_path_gives_the_same(monkeypatch):
    """The CPU's per-utterance calls, the dense mask, and the block-masked kernel that CUDA uses
    (its CPU reference, forward)."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    ours = small()
    tokens, doc = pack([[30, 50, 48], [100, 1, 27]], 128)

    with torch.no_grad():
        expected = ours(tokens, doc=doc)
        monkeypatch.setattr(torch.compiler, 'is_compiling', lambda: True)  # the dense mask
        assert (ours(tokens, doc=doc) - expected).abs().max() < 1e-5
        monkeypatch.undo()
        flex = slam.attend_flex
        monkeypatch.setattr(slam, 'compiled_flex', lambda: (flex_attention, create_block_mask))

        def attend(doc, branch, device, longest):
            return flex(slam.visibility(doc, branch), *doc.shape, device)

        monkeypatch.setattr(slam, 'attention_within', attend)
        assert (ours(tokens, doc=doc) - expected).abs().max() < 1e-5


def test_branches_see_the_prompt_and_themselves(monkeypatch):
    ours = small()
    prompt, one, two = (torch.randint(OFFSET, V, (n,)) for n in (9, 5, 7))
    for path in (
        torch.compiler.is_compiling,
        lambda: True,
    ):  # the CPU's calls, and the dense mask that branches mean
        monkeypatch.setattr(torch.compiler, 'is_compiling', path)
        check_branches(ours, prompt, one, two)


def check_branches(ours, prompt, one, two):
    tokens = torch.cat((prompt, one, two))[None]
    branch = torch.tensor([[0] * 9 + [1] * 5 + [2] * 7])
    positions = torch.tensor([[*range(9), *range(9, 14), *range(9, 16)]])
    with torch.no_grad():
        logits = ours(tokens, doc=torch.zeros_like(branch), positions=positions, branch=branch)[0]
        first, second = (
            ours(torch.cat((prompt, one))[None])[0],
            ours(torch.cat((prompt, two))[None])[0],
        )
        assert (logits[:14] - first).abs().max() < 1e-5
        assert (logits[14:] - second[9:]).abs().max() < 1e-5
        sums = ours.logps(
            tokens,
            branch > 0,
            torch.zeros_like(branch),
            positions,
            branch,
            segments=(branch - 1).clamp(min=0),
            n=2,
        )
    for got, logits, tail in ((sums[0], first, one), (sums[1], second, two)):
        assert abs(got - logits.log_softmax(-1)[8:-1].gather(1, tail[:, None]).sum()) < 1e-4


def test_loss_and_logps_against_the_definition():
    ours = small()
    lengths = [[20, 44], [33, 31]]
    tokens, doc = pack(lengths, 64)
    targets = torch.where(doc[:, 1:] == doc[:, :-1], tokens[:, 1:], -100)
    targets = F.pad(targets, (0, 1), value=-100)
    sums, counts = [], []
    with torch.no_grad():
        for u in utterances(tokens, lengths):
            logp = ours(u[None])[0].double().log_softmax(-1)
            sums.append(sum(logp[t, u[t + 1]].item() for t in range(len(u) - 1)))
            counts.append(len(u) - 1)
        assert abs(ours(tokens, targets, doc=doc).item() + sum(sums) / sum(counts)) < 1e-5
        mask = F.pad(doc[:, 1:] == doc[:, :-1], (1, 0))
        segments = doc + torch.tensor([[0], [2]])
        torch.testing.assert_close(
            ours.logps(tokens, mask, doc, segments=segments, n=4),
            torch.tensor(sums),
            atol=1e-3,
            rtol=1e-5,
        )
        alone = ours.logps(tokens[:, :20], torch.arange(20).expand(2, -1) > 0)
        assert abs(alone[0].item() - sums[0]) < 1e-3


@pytest.mark.parametrize('family', slam.FAMILIES)
def test_from_scratch_saved_and_loaded_is_transformers_model(tmp_path, family):
    """The same flags for every family: its entry says all else."""
    ours = small(family=family)
    ours.save_pretrained(tmp_path, dict(n_units=V - OFFSET))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    again = SLM.from_pretrained(str(tmp_path)).eval()
    tokens = torch.randint(0, V, (2, 50))
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert (ours(tokens) - expected).abs().max() < 1e-4
        assert torch.equal(again(tokens), ours(tokens))
        assert ours.num_params() == theirs.num_parameters()
    assert type(theirs).__name__ == slam.FAMILIES[family]['architecture']
    assert ours.config.family == (slam.FAMILIES[family]['becomes'] or family)
    assert again.config == ours.config


def forward_of_slm_scaling(state, args, tokens):
    """The plain forward of tiagoCuervo/slm_scaling, RoPE as complex numbers over pairs: (T, V)."""
    x, (T,) = state['tok_embeddings.weight'][tokens], tokens.shape
    heads = args['n_heads']
    kv_heads, D = args['n_kv_heads'] or heads, args['dim'] // heads
    frequency = 10000.0 ** (-torch.arange(0, D, 2).double() / D)
    angles = torch.outer(torch.arange(T).double(), frequency)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]  # (T, 1, D / 2)

    def norm(x, name):
        return x * (x.pow(2).mean(-1, keepdim=True) + args['norm_eps']).rsqrt() * state[name]

    def rotated(x):
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2)

    for i in range(args['n_layers']):
        layer = f'layers.{i}.'
        h = norm(x, layer + 'attention_norm.weight')
        q, k, v = (h @ state[f'{layer}attention.w{one}.weight'].T for one in 'qkv')
        q, k = rotated(q.view(T, heads, D)), rotated(k.view(T, kv_heads, D))
        k, v = (
            each.view(T, kv_heads, D).repeat_interleave(heads // kv_heads, 1) for each in (k, v)
        )
        scores = torch.einsum('ihd,jhd->hij', q, k) / D**0.5
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf).softmax(-1)
        out = torch.einsum('hij,jhd->ihd', scores, v).reshape(T, -1)
        x = x + out @ state[layer + 'attention.wo.weight'].T
        h = norm(x, layer + 'ffn_norm.weight')
        gate, down, up = (state[f'{layer}feed_forward.w{n}.weight'].T for n in (1, 2, 3))
        x = x + (F.silu(h @ gate) * (h @ up)) @ down
    return norm(x, 'norm.weight') @ state['tok_embeddings.weight'].T


@pytest.mark.parametrize('kept', ['tok_embeddings', 'output', 'both'])
@pytest.mark.parametrize('kv_heads', [None, 2])
def test_slm_scaling_scores_units_as_its_own_forward(tmp_path, kept, kv_heads):
    args = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=kv_heads, vocab_size=V)
    args |= dict(hidden_dim=None, norm_eps=1e-5, block_size=128)
    state = {'tok_embeddings.weight': torch.randn(V, 32), 'norm.weight': 1 + torch.randn(32) / 9}
    wide = 256  # 2 / 3 of 4 * 32, rounded up to a multiple of 256
    shapes = {f'attention.w{one}': (32, 32) for one in 'qo'}
    shapes |= {f'attention.w{one}': (8 * (kv_heads or 4), 32) for one in 'kv'}
    shapes |= {f'feed_forward.w{n}': (wide, 32) for n in (1, 3)} | {'feed_forward.w2': (32, wide)}
    for i in range(2):
        for name in ('attention_norm', 'ffn_norm'):
            state[f'layers.{i}.{name}.weight'] = 1 + torch.randn(32) / 9
        for name, shape in shapes.items():
            state[f'layers.{i}.{name}.weight'] = torch.randn(shape) * 0.15
    saved = state | {'output.weight': state['tok_embeddings.weight'].clone()}
    if kept != 'both':
        del saved[('output' if kept == 'tok_embeddings' else 'tok_embeddings') + '.weight']
    save_file(saved, tmp_path / 'model.safetensors')
    (tmp_path / 'config.json').write_text(json.dumps(dict(model_type='slm', model_args=args)))

    ours = SLM.from_pretrained(str(tmp_path)).eval()
    units = torch.randint(0, V - 2, (40,))
    with torch.no_grad():
        exact = {name: tensor.double() for name, tensor in state.items()}
        theirs = forward_of_slm_scaling(exact, args, units).log_softmax(-1).float()
        expected = theirs[:-1].gather(1, units[1:, None]).mean()
        found = ours.logps((units + OFFSET)[None], (torch.arange(40) > 0)[None]) / 39
        assert abs(found[0] - expected) < 1e-4
        # the end of an utterance is token V - 2 there, <S> here
        ends = ours((units + OFFSET)[None])[0, :, EOS] - ours((units + OFFSET)[None])[0, :, OFFSET]
        torch.testing.assert_close(ends, theirs[:, V - 2] - theirs[:, 0], atol=1e-4, rtol=1e-4)
    assert ours.slam['scoring'] == 'units' and ours.slam['n_units'] == V - OFFSET
    ours.save_pretrained(tmp_path / 'ours')
    again = SLM.from_pretrained(str(tmp_path / 'ours'))
    assert again.config.family == 'llama' and again.slam['scoring'] == 'units'


def test_interleaved_checkpoint_without_its_tokenizer_is_refused(tmp_path):
    """slprl/SIMS-*: the public layout with the text LM's vocabulary and the units."""
    hf = transformers.Qwen2Config(**LLAMA | dict(vocab_size=152_438), num_key_value_heads=2)
    config = dict(model_type='speech_language_model', base_config=hf.to_dict(), vocab_size=152_438)
    (tmp_path / 'config.json').write_text(json.dumps(config))
    save_file({'lm.model.norm.weight': torch.ones(32)}, tmp_path / 'model.safetensors')
    with pytest.raises(InputError, match='152,438.*interleaved speech-text model'):
        SLM.from_pretrained(str(tmp_path))


def test_public_layout_gives_the_same_likelihoods(tmp_path):
    """slprl/slam: transformers' Qwen2 under `lm.`, its config inside ours."""
    hf = random_hf(FAMILIES['qwen2']())
    os.makedirs(tmp_path / 'public')
    save_file(
        {
            'lm.' + name: tensor.contiguous().clone()
            for name, tensor in hf.state_dict().items()
            if name != 'lm_head.weight'
        },
        tmp_path / 'public/model.safetensors',
    )
    config = dict(
        model_type='speech_language_model',
        architectures=['UnitLM'],
        base_config=hf.config.to_dict() | dict(vocab_size=151936),
        vocab_size=V,
        twist_init=True,
        torch_dtype='bfloat16',
    )
    (tmp_path / 'public/config.json').write_text(json.dumps(config))
    ours = SLM.from_pretrained(str(tmp_path / 'public')).eval()
    tokens = torch.randint(OFFSET, V, (2, 50))
    with torch.no_grad():
        expected = (
            hf(tokens).logits.log_softmax(-1)[:, :-1].gather(2, tokens[:, 1:, None]).sum((1, 2))
        )
        torch.testing.assert_close(
            ours.logps(tokens, torch.arange(50).expand(2, -1) > 0), expected, atol=1e-3, rtol=1e-5
        )
    assert ours.slam['n_units'] == V - OFFSET and ours.slam['encoder'] == 'mhubert25'


def test_twist_checkpoint_with_offset_comes_in_our_token_order(tmp_path):
    config = transformers.OPTConfig(**OPT | dict(bos_token_id=0), word_embed_proj_dim=32)
    config.offset = 1  # unit u is token u + 1
    hf = random_hf(config)
    hf.save_pretrained(tmp_path)
    ours = SLM.from_pretrained(str(tmp_path)).eval()
    units = torch.randint(0, V - 1, (1, 30))
    with torch.no_grad():
        theirs = hf(torch.cat((torch.tensor([[0]]), units + 1), 1)).logits[..., 1:]
        assert ours.config.vocab_size == V - 1 + OFFSET
        assert (
            ours(torch.cat((torch.tensor([[BOS]]), units + OFFSET), 1))[..., OFFSET:] - theirs
        ).abs().max() < 1e-4


@pytest.mark.parametrize('embed_init', ['first_rows', 'random', 'mean'])
@pytest.mark.parametrize('family', ['qwen2', 'gpt_neox', 'opt post-norm, projected'])
def test_twist_keeps_all_but_the_embedding(tmp_path, family, embed_init):
    hf = random_hf(FAMILIES[family]())
    hf.save_pretrained(tmp_path)
    ours = SLM.from_pretrained(
        str(tmp_path), vocab_size=30, embed_init=embed_init, rope_theta=10000, context=64
    )
    old = hf.get_input_embeddings().weight
    if embed_init == 'random':
        assert 0.015 < ours.embed.weight.std() < 0.025
    if embed_init == 'mean':
        torch.testing.assert_close(ours.embed.weight, old.mean(0, keepdim=True).expand(30, -1))
    if family == 'qwen2':
        assert ours.config.rope_theta == 10000 and ours.config.context == 64
    if embed_init == 'first_rows':
        assert torch.equal(ours.embed.weight, old[:30])
        rope = dict(rope_parameters=dict(rope_type='default', rope_theta=10000.0))
        change = rope if family == 'qwen2' else {}
        hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **change).eval()
        hf.resize_token_embeddings(30, mean_resizing=False)  # the public code's way
        tokens = torch.randint(0, 30, (2, 40))
        with torch.no_grad():
            assert (ours.eval()(tokens) - hf(tokens).logits).abs().max() < 1e-4


def test_mobilellm_layout_loads_as_llama(tmp_path):
    """facebook/MobileLLM-125M has a model type and code of its own, which must not run, and shares
    the embedding without saying `tie`."""
    hf = random_hf(FAMILIES['llama tied, wide heads']())
    hf.save_pretrained(tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    config |= dict(
        model_type='mobilellm',
        architectures=['MobileLLMForCausalLM'],
        share_embedding=True,
        layer_sharing=False,
        tie_word_embeddings=False,
        auto_map={'AutoModelForCausalLM': 'modeling_mobilellm.MobileLLMForCausalLM'},
    )
    (tmp_path / 'config.json').write_text(json.dumps(config))
    (tmp_path / 'modeling_mobilellm.py').write_text('raise SystemExit("remote code ran")')
    tokens = torch.randint(0, V, (2, 30))
    with torch.no_grad():
        assert (
            SLM.from_pretrained(str(tmp_path), vocab_size=V).eval()(tokens) - hf(tokens).logits
        ).abs().max() < 1e-4


def test_sharded_and_pickled_checkpoints_load_and_code_does_not(tmp_path):
    hf = random_hf(FAMILIES['llama']())
    hf.save_pretrained(tmp_path / 'shards', max_shard_size='10KB')
    assert len(list((tmp_path / 'shards').glob('*.safetensors'))) > 2
    tokens = torch.randint(0, V, (2, 30))
    for name in ('pickle', 'evil'):
        os.makedirs(tmp_path / name)
        hf.config.save_pretrained(tmp_path / name)
    torch.save(hf.state_dict(), tmp_path / 'pickle/pytorch_model.bin')
    with torch.no_grad():
        for name in ('shards', 'pickle'):
            assert (
                SLM.from_pretrained(str(tmp_path / name), vocab_size=V).eval()(tokens)
                - hf(tokens).logits
            ).abs().max() < 1e-4

    class Evil:
        def __reduce__(self):
            return os.system, (f'touch {tmp_path}/owned',)

    torch.save({'model.norm.weight': Evil()}, tmp_path / 'evil/pytorch_model.bin')
    with pytest.raises(InputError, match='cannot be read'):
        SLM.from_pretrained(str(tmp_path / 'evil'))
    assert not (tmp_path / 'owned').exists()


def test_errors_name_the_cause(tmp_path):
    hf = random_hf(FAMILIES['opt']())
    hf.save_pretrained(tmp_path / 'opt')
    state = load_file(tmp_path / 'opt/model.safetensors')
    with pytest.raises(InputError, match='context 500 is longer than the 128 learned positions'):
        SLM.from_pretrained(str(tmp_path / 'opt'), context=500)
    ours = SLM.from_pretrained(str(tmp_path / 'opt'), vocab_size=V)
    with pytest.raises(InputError, match='129 tokens are more than the 128 learned positions'):
        ours(torch.zeros(1, 129, dtype=torch.long))
    with pytest.raises(InputError, match='100 new tokens are more than the 128'):
        ours.generate([torch.ones(60, dtype=torch.long)], 100)
    with pytest.raises(InputError, match='too few for 502'):
        SLM.from_pretrained(str(tmp_path / 'opt'))
    ours.save_pretrained(tmp_path / 'ours', dict(n_units=V - OFFSET))
    with pytest.raises(InputError, match='cannot hold the 500 units'):
        SLM.from_pretrained(str(tmp_path / 'ours'), vocab_size=502)
    for change, message in (
        (
            {'model.decoder.layers.0.fc1.weight': None},
            r'misses 1 \(model.decoder.layers.0.fc1.weight\)',
        ),
        ({'model.adapter.weight': torch.zeros(2)}, r'has unknown 1 \(model.adapter.weight\)'),
        (
            {'model.decoder.layers.0.fc1.weight': torch.zeros(3, 32)},
            r'has shape \(3, 32\), config.json says \(48, 32\)',
        ),
    ):
        save_file(
            {k: v for k, v in (state | change).items() if v is not None},
            tmp_path / 'opt/model.safetensors',
        )
        with pytest.raises(InputError, match=message):
            SLM.from_pretrained(str(tmp_path / 'opt'), vocab_size=V)
    (tmp_path / 'opt/model.safetensors').write_bytes(b'garbage')
    with pytest.raises(InputError, match='cannot be read'):
        SLM.from_pretrained(str(tmp_path / 'opt'), vocab_size=V)
    transformers.MambaConfig().save_pretrained(tmp_path / 'mamba')
    with pytest.raises(
        InputError, match="'mamba' is not supported: use one of llama, qwen2, qwen3, opt, gpt_neox"
    ):
        SLM.from_pretrained(str(tmp_path / 'mamba'))
    for where, message in (
        ('out/nothing', 'no checkpoint folder'),
        (str(tmp_path), 'config.json is missing'),
    ):
        with pytest.raises(InputError, match=message):
            SLM.from_pretrained(where)
    with pytest.raises(InputError, match='there are qwen2.5-0.5b'):
        SLM.from_preset('gpt-5')


def test_a_window_that_transformers_ignores_and_one_that_it_obeys(tmp_path):
    """sliding_window without use_sliding_window is none, as in Qwen2.5's config.json."""
    config = transformers.Qwen2Config(**LLAMA, num_key_value_heads=2, sliding_window=4)
    theirs = random_hf(config)
    theirs.save_pretrained(tmp_path)
    about = json.loads((tmp_path / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(json.dumps(about | dict(sliding_window=4)))
    tokens = torch.randint(OFFSET, V, (2, 20))
    ours = SLM.from_pretrained(str(tmp_path), vocab_size=V)
    reloaded = type(theirs).from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), reloaded(tokens).logits, atol=1e-5, rtol=1e-5)
    layers = ['full_attention', 'sliding_attention']
    for sliding in (dict(use_sliding_window=True), dict(layer_types=layers)):
        (tmp_path / 'config.json').write_text(json.dumps(about | sliding))
        with pytest.raises(InputError, match='sliding'):
            SLM.from_pretrained(str(tmp_path), vocab_size=V)


@pytest.mark.parametrize(
    ('key', 'value', 'message'),
    [
        ('hidden_size', -32, 'n_embd is -32'),
        ('hidden_size', 'wide', "hidden_size='wide'"),
        ('hidden_size', 64, 'config.json says'),
        ('num_attention_heads', 0, 'n_head is 0'),
        ('num_attention_heads', 10**30, 'n_head is 1000'),
        ('num_hidden_layers', 10_000_000, 'n_layer is 10000000'),
        ('num_hidden_layers', 900, 'misses'),
        ('num_key_value_heads', 3, 'no multiple of 3'),
        ('vocab_size', 2**40, 'vocab_size is'),
        ('intermediate_size', None, 'config.json says'),
        ('head_dim', 6, 'config.json says'),
        ('head_dim', 7, 'RoPE cannot turn 1.0 of the 7 features'),
        ('rope_parameters', dict(rope_type='llama3', factor='x'), 'RoPE'),
        ('rope_parameters', dict(rope_type='linear'), 'RoPE'),
        ('rope_parameters', [1], 'RoPE'),
        ('rope_parameters', dict(rope_theta='much'), 'RoPE'),
        ('model_type', ['llama'], 'not supported'),
    ],
)
def test_a_strangers_config_is_one_line(tmp_path, key, value, message):
    random_hf(FAMILIES['llama']()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(json.dumps(config | {key: value}))
    with pytest.raises(InputError, match=message):
        SLM.from_pretrained(str(tmp_path), vocab_size=V)


@pytest.mark.parametrize('name', ['../../secret', '{secret}', '../secret'])
def test_a_strangers_parts_are_not_followed(tmp_path, name):
    """slam.json naming a folder elsewhere does not bring that folder into the next checkpoint."""
    secret = tmp_path / 'secret'
    os.makedirs(secret)
    (secret / 'key').write_text('private')
    (secret / 'encoder.json').write_text('{}')
    small().save_pretrained(tmp_path / 'slm/evil', dict(n_units=V - OFFSET))
    about = dict(n_units=V - OFFSET, encoder=name.format(secret=secret), vocoder='hifigan25')
    (tmp_path / 'slm/evil/slam.json').write_text(json.dumps(about))
    ours = SLM.from_pretrained(str(tmp_path / 'slm/evil'))
    assert ours.slam['encoder'] is None and ours.slam['vocoder'] == 'hifigan25'
    ours.save_pretrained(tmp_path / 'next')
    assert sorted(os.listdir(tmp_path / 'next')) == [
        'config.json',
        'model.safetensors',
        'slam.json',
    ]


def test_a_disk_that_is_full_leaves_the_checkpoint_before(tmp_path):
    """Full here: no file may grow beyond 4 kB."""
    import resource

    ours = small()
    ours.save_pretrained(tmp_path / 'slm')
    before = {path.name: path.read_bytes() for path in (tmp_path / 'slm').iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            ours.save_pretrained(tmp_path / 'slm', dict(n_units=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.filename == str(tmp_path / 'slm/model.safetensors')
    assert {path.name: path.read_bytes() for path in (tmp_path / 'slm').iterdir()} == before


def test_saved_folder_is_complete_by_itself(tmp_path):
    os.makedirs(tmp_path / 'data/encoder')
    (tmp_path / 'data/encoder/encoder.json').write_text('{}')
    (tmp_path / 'data/encoder/notes.txt').write_text('not a part of an encoder')
    small().save_pretrained(
        tmp_path / 'slm',
        dict(encoder=str(tmp_path / 'data/encoder'), vocoder='hifigan25', n_units=V - OFFSET),
    )
    assert json.loads((tmp_path / 'slm/slam.json').read_text())['encoder'] == 'encoder'
    ours = SLM.from_pretrained(str(tmp_path / 'slm'))
    assert (
        ours.slam['encoder'] == str(tmp_path / 'slm/encoder')
        and ours.slam['vocoder'] == 'hifigan25'
    )
    ours.save_pretrained(tmp_path / 'next')
    ours.save_pretrained(tmp_path / 'next')  # twice is as good as once
    assert os.listdir(tmp_path / 'next/encoder') == ['encoder.json']
    plain = tmp_path / 'plain'
    plain.write_text('')  # any new file: the umask's mode
    for path in (tmp_path / 'next').iterdir():
        assert path.is_dir() or path.stat().st_mode == plain.stat().st_mode
    assert not list(tmp_path.rglob('*.tmp'))


def test_same_seed_same_weights_and_samples():
    one, two = (
        SLM.from_preset('opt-125m', vocab_size=12, seed=3).embed.weight,
        SLM.from_preset('opt-125m', vocab_size=12, seed=3).embed.weight,
    )
    assert torch.equal(one, two)
    ours, prompts = small(), [torch.tensor([BOS, 5, 6]), torch.tensor([BOS])]
    first, again, other = (ours.generate(prompts, 30, seed=seed) for seed in (1, 1, 2))
    assert all(map(torch.equal, first, again)) and not all(map(torch.equal, first, other))
    assert all(len(new) <= 30 and (len(new) == 0 or new.min() >= OFFSET) for new in first)


def test_no_unit_follows_itself_where_repeats_are_banned():
    ours, prompts = small(), [torch.tensor([BOS, 5, 6]), torch.tensor([BOS, 9])]
    options = dict(max_new_tokens=60, temperature=3.0, top_k=0, seed=4)

    def repeats(rows):
        rows = [torch.cat(pair) for pair in zip(prompts, rows, strict=True)]
        return sum(int((row[1:] == row[:-1]).sum()) for row in rows)

    assert repeats(ours.generate(prompts, **options, ban_repeats=False)) > 0
    assert repeats(ours.generate(prompts, **options, ban_repeats=True)) == 0
    ours.slam = dict(dedup=True)
    assert repeats(ours.generate(prompts, **options)) == 0


def test_steps_are_the_rows_as_they_are_made():
    ours, prompts = small(), [torch.tensor([BOS, 5, 6]), torch.tensor([BOS]), torch.tensor([7])]
    steps = ours.generate_steps(prompts, 80, temperature=2.0, seed=1)
    rows = torch.stack(list(steps), dim=1)
    for row, new in zip(rows, ours.generate(prompts, 80, temperature=2.0, seed=1), strict=True):
        assert torch.equal(row[: len(new)], new)
        assert len(new) == len(row) or row[len(new)] == EOS
        assert not row[len(new) + 1 :].any()
    assert len(set(map(len, ours.generate(prompts, 80, temperature=2.0, seed=1)))) > 1
    assert ours.generate(prompts, 0)[0].shape == (0,)


def test_a_large_vocabulary_goes_through_the_head_in_pieces(monkeypatch):
    ours, tokens = small(), torch.randint(OFFSET, V, (2, 50))
    mask = torch.arange(50).expand(2, -1) > 0
    found = []
    for numbers in (slam.LOGITS_AT_ONCE, 7 * V):  # 100 rows at once, or 7
        monkeypatch.setattr(slam, 'LOGITS_AT_ONCE', numbers)
        ours.zero_grad()
        (ours(tokens, tokens) + ours.logps(tokens, mask).sum()).backward()
        found.append({name: p.grad.clone() for name, p in ours.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], atol=1e-4, rtol=1e-4)


def test_compiled_generation_gives_the_same_tokens_and_compiles_once():
    """Whatever the batch, the prompts' lengths and the number of tokens."""
    ours = small()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for lengths, n in (((3, 9, 2), 20), ((1, 4, 17, 5, 5), 30), ((8, 8, 8, 30, 1, 2, 3), 25)):
        units = [torch.randint(OFFSET, V, (length - 1,)) for length in lengths]
        prompts = [torch.cat((torch.tensor([BOS]), prompt)) for prompt in units]
        options = dict(top_k=5, top_p=0.9, seed=n)
        plain = ours.generate(prompts, n, **options)
        for one, two in zip(plain, ours.generate(prompts, n, **options, compile=True), strict=True):
            assert torch.equal(one, two)
    counters = torch._dynamo.utils.counters
    assert counters['stats']['unique_graphs'] == 1 and not counters['graph_break']


@pytest.mark.parametrize(
    'options', [dict(top_k=0), dict(top_k=5), dict(top_k=0, top_p=0.7), dict(top_k=8, top_p=0.9)]
)
def test_sampled_distribution(options):
    """Chi-square of 20,000 draws against the distribution that transformers' own warpers leave."""
    from transformers.generation.logits_process import (
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits, draws = torch.randn(1, 12) * 1.5, 20_000
    warped = TemperatureLogitsWarper(0.8)(None, logits)
    if options['top_k']:
        warped = TopKLogitsWarper(options['top_k'])(None, warped)
    if 'top_p' in options:
        warped = TopPLogitsWarper(options['top_p'])(None, warped)
    expected = warped.softmax(-1)[0] * draws
    noise = torch.empty(draws, options['top_k'] or 12).exponential_(
        generator=torch.Generator().manual_seed(0)
    )
    sampled = slam.draw(
        (logits / 0.8).expand(draws, -1), noise, torch.tensor(options.get('top_p', 1.0))
    )
    counts = torch.bincount(sampled, minlength=12).float()
    assert counts[expected == 0].sum() == 0
    live = expected > 0
    chi2 = ((counts - expected)[live] ** 2 / expected[live]).sum()
    assert chi2 < 31.3  # 99.9 % point of chi-square with 11 degrees of freedom


def test_compiles_whole_and_once():
    ours = small()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(ours, fullgraph=True)
    for step in range(4):
        doc = torch.randint(0, 5, (2, 64)).sort(dim=1).values
        tokens, targets = torch.randint(OFFSET, V, (2, 64)), torch.randint(OFFSET, V, (2, 64))
        targets[0, :step] = -100
        loss = compiled(tokens, targets, doc=doc)
        loss.backward()
        assert abs(loss.item() - ours(tokens, targets, doc=doc).item()) < 1e-5
    assert (
        torch._dynamo.utils.counters['stats']['unique_graphs'] == 1
        and not torch._dynamo.utils.counters['graph_break']
    )


def test_flops_per_token_counts_every_product():
    """Against torch's own counter of a forward pass; backward costs twice that."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    for change in (
        {},
        dict(family='opt', act='relu', n_kv_head=4, embed_dim=16, pre_norm=False),
        dict(family='gpt_neox', tied=False, n_kv_head=4),
    ):
        ours, T = small(**change), 100
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            ours(torch.randint(0, V, (1, T)))
        causal = (
            2 * ours.config.n_layer * T * T * 32
        )  # the counter takes attention for full, twice the causal half
        assert counter.get_total_flops() == ours.flops_per_token(T) * T / 3 + causal
