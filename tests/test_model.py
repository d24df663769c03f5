"""SLM against transformers: the same function, packed, cached and on disk."""

import copy
import json
import os
import shutil

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import small_slm
from safetensors.torch import load_file, save_file
from scipy.stats import chi2
from transformers.generation import logits_process

import model as M
from model import BOS, EOS, OFFSET, PAD, InputError, load_slm

V = 42
HF = dict(vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
HF |= dict(max_position_embeddings=128, bos_token_id=1, eos_token_id=1, pad_token_id=0)
LLAMA = HF | dict(intermediate_size=48, num_key_value_heads=2, tie_word_embeddings=True)
UNTIED, NEOX = LLAMA | dict(tie_word_embeddings=False), HF | dict(intermediate_size=48)
OPT = HF | dict(ffn_dim=48, dropout=0.0, word_embed_proj_dim=32)
LLAMA3 = dict(rope_type='llama3', rope_theta=5e5, factor=8.0, low_freq_factor=1.0)
LLAMA3 |= dict(high_freq_factor=4.0, original_max_position_embeddings=32)
YARN = dict(rope_type='yarn', rope_theta=1e4, factor=4.0, original_max_position_embeddings=32)
LINEAR = dict(rope_type='linear', factor=2.0, rope_theta=1e4)

# what must be equal: model type, and how its config differs from the small one
EQUAL = {
    'llama': LLAMA,
    'llama untied, biases': UNTIED | dict(head_dim=16, attention_bias=True, mlp_bias=True),
    'llama llama3 rope': LLAMA | dict(rope_parameters=LLAMA3),
    'llama yarn rope': LLAMA | dict(rope_parameters=YARN),
    'mistral': LLAMA | dict(sliding_window=None),
    'qwen2': LLAMA | dict(rope_theta=1e6),
    'qwen3': LLAMA | dict(head_dim=16),
    'phi3': UNTIED | dict(sliding_window=None),
    'stablelm': LLAMA | dict(partial_rotary_factor=0.25),
    'opt': OPT,
    'opt post-norm, projected': OPT | dict(word_embed_proj_dim=16, do_layer_norm_before=False),
    'gpt_neox': NEOX,
    'gpt_neox sequential': NEOX | dict(rotary_pct=0.5, use_parallel_residual=False),
}
# what must be refused: it computes something that Block does not
REFUSED = {
    'granite': LLAMA | dict(logits_scaling=4.0, attention_multiplier=0.1),
    'cohere': LLAMA,
    'gemma': LLAMA | dict(head_dim=8),
    'gemma2': LLAMA | dict(head_dim=8),
    'olmo2': LLAMA,
    'smollm3': LLAMA | dict(num_hidden_layers=4, no_rope_layer_interval=2),
    'llama dynamic rope': LLAMA | dict(rope_parameters=LINEAR | dict(rope_type='dynamic')),
    'mistral': LLAMA | dict(sliding_window=64),
}
PAPER = {'Qwen2.5-0.5B': 358_347_904, 'SmolLM2-135M': 106_492_608, 'MobileLLM-125M': 106_492_608}
PAPER |= {'SmolLM2-360M': 315_117_120, 'MobileLLM-350M': 315_117_120, 'OPT-125M': 87_015_936}
PAPER |= {'OPT-350M': 305_714_176, 'Pythia-160M': 85_827_072, 'Pythia-410M': 303_339_520}


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


def randomize(model):
    """Weights so large that every part of a model matters, biases and norms included."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.15 if p.ndim > 1 else p + 0.1 * torch.randn_like(p))
    return model.eval()


def random_hf(name, config):
    """transformers' model of a config; `name` begins with its type."""
    config = transformers.CONFIG_MAPPING[name.split()[0]](**config)
    hf = randomize(transformers.AutoModelForCausalLM.from_config(config))
    hf.tie_weights()
    return hf


def load_text_lm(where, vocab_size=V, **options):
    return load_slm(str(where), vocab_size=vocab_size, **options).eval()


@pytest.fixture(scope='module', params=EQUAL)
def pair(request, tmp_path_factory):
    """(transformers' model, ours loaded from its checkpoint)"""
    folder = tmp_path_factory.mktemp('pair')
    hf = random_hf(request.param, EQUAL[request.param])
    hf.save_pretrained(folder)
    return hf, load_text_lm(folder)


def prompts_of(*lengths):
    """Random prompts of so many tokens."""
    return [F.pad(torch.randint(OFFSET, V, (n - 1,)), (1, 0), value=BOS) for n in lengths]


def assert_same_logits(ours, hf, *shape):
    tokens = torch.randint(0, V, shape)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(tokens), hf(tokens).logits, atol=1e-4, rtol=0)


def pack(lengths):
    """Random rows of utterances of these lengths: tokens, doc ids, which tokens have one before
    them in their utterance, and the utterances by themselves."""
    doc = [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths]
    doc = torch.stack(doc)
    tokens = torch.randint(OFFSET, V, doc.shape)
    alone = [u for row, sizes in zip(tokens, lengths, strict=True) for u in row.split(sizes)]
    return tokens, doc, F.pad(doc[:, 1:] == doc[:, :-1], (1, 0)), alone


@pytest.mark.parametrize('name', PAPER)
def test_parameter_counts_of_table_7(name):
    with torch.device('meta'):
        assert load_slm(f'preset:{name}').num_params() == PAPER[name]


def test_logits_equal_transformers_and_round_trip(pair, tmp_path):
    hf, ours = pair
    assert_same_logits(ours, hf, 3, 60)
    assert ours.num_params() == hf.num_parameters()
    ours.save_pretrained(tmp_path, dict(n_units=V - OFFSET, encoder_id='5eed'))
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    again = load_slm(tmp_path)  # a path, or its name
    assert type(back) is type(hf)
    assert_same_logits(ours, back, 3, 60)
    assert_same_logits(again, hf, 3, 60)
    assert again.slam == dict(n_units=V - OFFSET, encoder_id='5eed', offset=OFFSET)
    assert again.config == ours.config


def test_cached_greedy_generation_equals_transformers(pair):
    hf, ours = pair
    prompts = prompts_of(1, 7, 20)
    ids = torch.stack([F.pad(prompt, (20 - len(prompt), 0)) for prompt in prompts])
    options = dict(max_new_tokens=15, repetition_penalty=1.1)
    more = dict(eos_token_id=EOS, pad_token_id=0, suppress_tokens=[0], do_sample=False)
    expected = hf.generate(ids, attention_mask=(ids != 0).long(), **options, **more)
    got = ours.generate(prompts, temperature=0, **options)
    for theirs, mine in zip(expected[:, 20:].tolist(), got, strict=True):
        assert (theirs[: theirs.index(EOS)] if EOS in theirs else theirs) == mine.tolist()


def test_packed_loss_and_gradients_equal_transformers_on_each_utterance(pair, tmp_path):
    hf, ours = copy.deepcopy(pair)
    tokens, doc, follows, alone = pack([[30, 50, 48], [100, 1, 27]])
    sums = [hf(u[None], labels=u[None]).loss * (len(u) - 1) for u in alone if len(u) > 1]
    expected = sum(sums) / follows.sum()
    expected.backward()
    targets = torch.where(follows, tokens, -100).roll(-1, dims=1)
    loss = ours(tokens, targets, doc=doc)
    loss.backward()
    assert abs(loss.item() - expected.item()) < 1e-5
    for p in ours.parameters():
        p.data = p.grad
    ours.save_pretrained(tmp_path)  # the gradients, for transformers
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, p in hf.named_parameters():
        torch.testing.assert_close(saved[name], p.grad, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize('name', REFUSED)
def test_what_block_does_not_compute_is_refused(tmp_path, name):
    hf = random_hf(name, REFUSED[name])
    hf.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f'{name.split()[0]}.*not supported'):
        load_text_lm(tmp_path)
    if name == 'mistral':  # a sliding window that covers the context is none
        assert_same_logits(load_text_lm(tmp_path, context=64), hf, 1, 64)


def test_the_block_masked_kernel_of_cuda_gives_the_same(monkeypatch):
    """Its reference on the CPU, forward. test_training_compiles has the third path, dense masks."""
    ours = small_slm(V)
    tokens, doc, _, _ = pack([[30, 50, 48], [100, 1, 27]])
    branch = torch.where(doc == 1, 1 + (torch.arange(128) > 60), 0)

    def logits():
        with torch.no_grad():
            return torch.stack((ours(tokens, doc=doc), ours(tokens, doc=doc * 0, branch=branch)))

    expected = logits()
    monkeypatch.setattr(M, 'compiled', lambda function: function)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
    monkeypatch.setattr(torch.Tensor, 'is_cuda', True)
    assert (logits() - expected).abs().max() < 1e-5


def test_branches_see_the_prompt_and_themselves():
    ours = small_slm(V)
    prompt, one, two = (torch.randint(OFFSET, V, (n,)) for n in (9, 5, 7))
    tokens = torch.cat((prompt, one, two))[None]
    branch = torch.tensor([[0] * 9 + [1] * 5 + [2] * 7])
    positions = torch.tensor([[*range(9), *range(9, 14), *range(9, 16)]])
    rows = torch.zeros_like(branch), positions, branch
    with torch.no_grad():
        logits = ours(tokens, None, *rows)[0]
        first, second = (ours(torch.cat((prompt, x))[None])[0] for x in (one, two))
        assert (logits[:14] - first).abs().max() < 1e-5
        assert (logits[14:] - second[9:]).abs().max() < 1e-5
        sums = ours.logps(tokens, branch > 0, *rows, segments=(branch - 1).clamp(min=0), n=2)
    for got, logits, tail in ((sums[0], first, one), (sums[1], second, two)):
        assert abs(got - logits.log_softmax(-1)[8:-1].gather(1, tail[:, None]).sum()) < 1e-4


def test_logps_against_the_definition():
    ours = small_slm(V)
    tokens, doc, follows, alone = pack([[20, 44], [33, 31]])
    with torch.no_grad():
        logps = [ours(u[None])[0, :-1].double().log_softmax(-1) for u in alone]
        sums = [x.gather(1, u[1:, None]).sum() for x, u in zip(logps, alone, strict=True)]
        segments = doc + torch.tensor([[0], [2]])
        got = ours.logps(tokens, follows, doc, segments=segments, n=4)
    torch.testing.assert_close(got.double(), torch.stack(sums), atol=1e-3, rtol=1e-5)


OLD = dict(  # config.json as earlier versions wrote it, without what all families share
    llama=dict(hidden_act='silu', rms_norm_eps=1e-6, intermediate_size=48, num_key_value_heads=2)
    | dict(rope_theta=1e4, rope_scaling=dict(rope_type='linear', factor=2.0), head_dim=8),
    opt=dict(activation_function='relu', ffn_dim=48, word_embed_proj_dim=16, dropout=0.0)
    | dict(do_layer_norm_before=False, enable_bias=True, _remove_final_layer_norm=False),
    gpt_neox=dict(hidden_act='gelu', layer_norm_eps=1e-5, intermediate_size=48, rotary_pct=0.25)
    | dict(use_parallel_residual=True, rotary_emb_base=1e4, rope_theta=1e4, rope_scaling=None),
    # facebook/MobileLLM-125M: a model type and code of its own, which must not run
    mobilellm=LLAMA
    | dict(tie_word_embeddings=False, share_embedding=True, layer_sharing=False)
    | dict(auto_map={'AutoModelForCausalLM': 'modeling_mobilellm.MobileLLMForCausalLM'}),
)


@pytest.mark.parametrize('kind', OLD)
def test_old_checkpoints_load(tmp_path, kind):
    about = HF | dict(tie_word_embeddings=kind != 'gpt_neox')
    (tmp_path / 'config.json').write_text(json.dumps(about | OLD[kind] | dict(model_type=kind)))
    (tmp_path / 'modeling_mobilellm.py').write_text('raise SystemExit("remote code ran")')
    (tmp_path / 'slam.json').write_text(json.dumps(dict(n_units=40, dedup=True)))
    hf = random_hf('llama', LLAMA) if kind == 'mobilellm' else random_hf(kind, OLD[kind] | about)
    tensors = {name: tensor.clone() for name, tensor in hf.state_dict().items()}
    head = tensors.pop('lm_head.weight')
    tensors |= {'embed_out.weight': head} if kind == 'gpt_neox' else {}  # before transformers 5
    save_file(tensors, tmp_path / 'model.safetensors')
    ours = load_slm(str(tmp_path))
    assert_same_logits(ours, hf, 2, 30)
    assert ours.slam == dict(n_units=40, dedup=True)


@pytest.mark.parametrize('kv_heads', [None, 2])
def test_slm_scaling_is_llama_under_other_names_with_rope_on_pairs(tmp_path, kv_heads):
    """tiagoCuervo/slm_scaling rotates features 2 i and 2 i + 1 together, and unit u is token u."""
    config = dict(num_key_value_heads=kv_heads or 4, rms_norm_eps=1e-5, intermediate_size=256)
    hf = random_hf('llama', LLAMA | config)
    names = dict(input_layernorm='attention_norm', post_attention_layernorm='ffn_norm')
    names |= dict(self_attn='attention', q_proj='wq', k_proj='wk', v_proj='wv', o_proj='wo')
    names |= dict(mlp='feed_forward', gate_proj='w1', down_proj='w2', up_proj='w3')
    names |= dict(embed_tokens='tok_embeddings' if kv_heads else 'output')
    pairs, state = torch.arange(8).view(2, 4).T.flatten(), {}  # 0, 4, 1, 5, ...
    for name, tensor in hf.model.state_dict().items():
        if 'q_proj' in name or 'k_proj' in name:
            tensor = tensor.view(-1, 8, 32)[:, pairs].reshape(-1, 32)
        state['.'.join(names.get(word, word) for word in name.split('.'))] = tensor.clone()
    save_file(state, tmp_path / 'model.safetensors')
    args = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=kv_heads, vocab_size=V)
    args |= dict(hidden_dim=None, norm_eps=1e-5, block_size=128)
    (tmp_path / 'config.json').write_text(json.dumps(dict(model_type='slm', model_args=args)))

    ours = load_slm(str(tmp_path)).eval()
    units = torch.randint(0, V - 2, (1, 40))
    with torch.no_grad():
        theirs, mine = hf(units).logits, ours(units + OFFSET)
    assert (mine[..., OFFSET:] - theirs[..., : V - 2]).abs().max() < 1e-4
    assert (mine[..., EOS] - theirs[..., V - 2]).abs().max() < 1e-4  # the end of an utterance
    assert ours.slam['scoring'] == 'units' and ours.slam['n_units'] == V - OFFSET


def test_public_layout_gives_the_same_likelihoods(tmp_path):
    """slprl/slam: transformers' model under `lm.`, its config inside."""
    hf, tokens = random_hf('qwen2', LLAMA), torch.randint(OFFSET, V, (2, 50))
    state = {'lm.' + name: t.clone() for name, t in hf.state_dict().items() if 'head' not in name}
    save_file(state, tmp_path / 'model.safetensors')
    base = hf.config.to_dict() | dict(vocab_size=151936, torch_dtype='bfloat16')
    config = dict(model_type='speech_language_model', base_config=base, vocab_size=V)
    (tmp_path / 'config.json').write_text(json.dumps(config))
    ours = load_slm(str(tmp_path)).eval()
    with torch.no_grad():
        expected = hf(tokens).logits.log_softmax(-1)[:, :-1].gather(2, tokens[:, 1:, None])
        got = ours.logps(tokens, torch.arange(50).expand(2, -1) > 0)
        torch.testing.assert_close(got, expected.sum((1, 2)), atol=1e-3, rtol=1e-5)
    assert ours.slam['n_units'] == V - OFFSET and ours.slam['encoder'] == 'mhubert25'


def test_twist_checkpoint_with_offset_comes_in_our_token_order(tmp_path):
    hf = random_hf('opt', OPT | dict(bos_token_id=0, offset=1))  # unit u is token u + 1
    hf.save_pretrained(tmp_path)
    ours = load_slm(str(tmp_path)).eval()
    units = torch.randint(0, V - 1, (1, 30))
    ours.save_pretrained(tmp_path / 'ours')
    with torch.no_grad():
        theirs = hf(F.pad(units + 1, (1, 0), value=0)).logits[..., 1:]
        for model in (ours, load_slm(str(tmp_path / 'ours')).eval()):
            assert model.config.vocab_size == V - 1 + OFFSET
            got = model(F.pad(units + OFFSET, (1, 0), value=BOS))[..., OFFSET:]
            assert (got - theirs).abs().max() < 1e-4


@pytest.mark.parametrize('name', ['qwen2', 'gpt_neox', 'opt post-norm, projected'])
def test_twist_keeps_all_but_the_embedding(tmp_path, name):
    hf = random_hf(name, EQUAL[name])
    hf.save_pretrained(tmp_path)
    state, options = torch.get_rng_state(), dict(rope_theta=20000, context=64)
    ours = load_slm(str(tmp_path), vocab_size=30, **options).eval()
    assert torch.equal(torch.get_rng_state(), state)
    assert ours.config.context == (128 if name.startswith('opt') else 64)
    rope = getattr(hf.config, 'rope_parameters', None)
    change = dict(rope_parameters=rope | dict(rope_theta=20000.0)) if rope else {}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **change).eval()
    theirs.resize_token_embeddings(30, mean_resizing=False)  # the public code's way
    tokens = torch.randint(0, 30, (2, 40))
    with torch.no_grad():
        assert (ours(tokens) - theirs(tokens).logits).abs().max() < 1e-4
    if name == 'qwen2':  # the other ways to begin the embedding
        rows = hf.get_input_embeddings().weight.mean(0, keepdim=True).expand(30, -1)
        mean, new = (load_text_lm(tmp_path, 30, embed_init=how) for how in ('mean', 'random'))
        torch.testing.assert_close(mean.embed.weight, rows)
        assert 0.015 < new.embed.weight.std() < 0.025


def test_sharded_and_pickled_checkpoints_load_and_code_does_not(tmp_path):
    hf = random_hf('llama', UNTIED)
    hf.save_pretrained(tmp_path / 'shards', max_shard_size='10KB')
    assert len(list((tmp_path / 'shards').glob('*.safetensors'))) > 2
    hf.config.save_pretrained(tmp_path / 'pickle')
    torch.save(hf.state_dict(), tmp_path / 'pickle/pytorch_model.bin')
    for name in ('shards', 'pickle'):
        assert_same_logits(load_text_lm(tmp_path / name), hf, 2, 30)

    class Evil:
        def __reduce__(self):
            return os.system, (f'touch {tmp_path}/owned',)

    torch.save({'model.norm.weight': Evil()}, tmp_path / 'pickle/pytorch_model.bin')
    with pytest.raises(InputError, match='cannot be read'):
        load_text_lm(tmp_path / 'pickle')
    assert not (tmp_path / 'owned').exists()


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """A text LM, opt, and a checkpoint of ours, ours."""
    place = tmp_path_factory.mktemp('folders')
    random_hf('opt', OPT).save_pretrained(place / 'opt')
    load_text_lm(place / 'opt').save_pretrained(place / 'ours', dict(n_units=V - OFFSET))
    return place


@pytest.mark.parametrize(
    ('mistake', 'message'),
    [
        (dict(where='out/nothing'), 'no such folder'),
        (dict(where='preset:gpt-5'), 'there are qwen2.5-0.5b'),
        (dict(vocab_size=502), 'cannot make 502 rows from 42'),
        (dict(tensors={'model.decoder.layers.0.fc1.weight': None}), 'missing.*0.fc1.weight'),
        (dict(tensors={'model.decoder.layers.0.fc1.weight': torch.zeros(3, 32)}), 'shape.*0.fc1'),
        (dict(config=dict(model_type='speech_language_model')), 'base_config'),
        (dict(config=dict(model_type='none_such')), 'none_such'),
    ],
)
def test_mistakes_are_one_line_that_names_the_cause(folders, tmp_path, mistake, message):
    shutil.copytree(folders, tmp_path, dirs_exist_ok=True)
    mistake = dict(where='{folder}/opt', vocab_size=V) | mistake
    if tensors := mistake.pop('tensors', {}):
        path = tmp_path / 'opt/model.safetensors'
        tensors = load_file(path) | tensors
        save_file({name: one for name, one in tensors.items() if one is not None}, path)
    path = tmp_path / 'opt/config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | mistake.pop('config', {})))
    with pytest.raises(InputError, match=message):
        load_slm(mistake.pop('where').format(folder=tmp_path), **mistake)


def test_a_saved_folder_is_complete_by_itself_and_follows_nothing_outside(tmp_path):
    for name in ('data/encoder', 'secret'):
        os.makedirs(tmp_path / name)
        (tmp_path / name / 'encoder.json').write_text('{}')
        (tmp_path / name / 'notes.txt').write_text('not a part of an encoder')
    slam = dict(encoder=str(tmp_path / 'data/encoder'), vocoder='hifigan25')
    small_slm(V).save_pretrained(tmp_path / 'slm', slam)
    assert json.loads((tmp_path / 'slm/slam.json').read_text())['encoder'] == 'encoder'
    ours = load_slm(str(tmp_path / 'slm'))
    assert ours.slam['encoder'] == str(tmp_path / 'slm/encoder')
    for _ in range(2):
        ours.save_pretrained(tmp_path / 'next')
    assert os.listdir(tmp_path / 'next/encoder') == ['encoder.json']
    assert not list(tmp_path.rglob('*.tmp'))
    # folders of an earlier run, which slam.json does not name, are not used
    for part in ('vocoder', 'tokenizer'):
        os.makedirs(tmp_path / 'slm' / part)
    assert load_slm(str(tmp_path / 'slm')).slam == ours.slam
    for name in ('..', '../secret', '../../secret', str(tmp_path / 'secret'), 'encoder'):
        about = json.dumps(dict(slam, encoder=name))
        (tmp_path / 'slm/slam.json').write_text(about)
        shutil.rmtree(tmp_path / 'slm/encoder', ignore_errors=True)
        ours = load_slm(str(tmp_path / 'slm'))
        assert ours.slam['encoder'] is None and ours.slam['vocoder'] == 'hifigan25'


def test_seeds_and_no_unit_after_itself():
    ours, prompts = small_slm(V), prompts_of(3, 1) * 8
    first, again, other = (ours.generate(prompts, 30, seed=seed) for seed in (1, 1, 2))
    assert all(map(torch.equal, first, again)) and not all(map(torch.equal, first, other))
    assert all(len(new) <= 30 and (new >= OFFSET).all() for new in first)
    assert ours.generate(prompts, 0)[0].shape == (0,)

    def repeats():
        rows = ours.generate(prompts, 60, temperature=3.0, top_k=0, seed=4)
        rows = map(torch.cat, zip(prompts, rows, strict=True))
        return sum(int((row[1:] == row[:-1]).sum()) for row in rows)

    assert repeats() > 0
    ours.slam = dict(dedup=True)
    assert repeats() == 0


def test_a_large_vocabulary_goes_through_the_head_in_pieces(monkeypatch):
    ours, tokens = small_slm(V), torch.randint(OFFSET, V, (2, 50))
    mask = torch.arange(50).expand(2, -1) > 0
    found = []
    for numbers in (M.LOGITS_AT_ONCE, 7 * V):  # 100 rows at once, or 7
        monkeypatch.setattr(M, 'LOGITS_AT_ONCE', numbers)
        ours.zero_grad()
        (ours(tokens, tokens) + ours.logps(tokens, mask).sum()).backward()
        found.append({name: p.grad.clone() for name, p in ours.named_parameters()})
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


@pytest.fixture
def counters(monkeypatch):
    """torch's counts of what it compiles; graphs run as they are, without the C++ compiler."""
    original = torch.compile

    def compile_only(function, mode=None, options=None, **how):
        return original(function, backend='aot_eager', **how)

    monkeypatch.setattr(torch, 'compile', compile_only)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return torch._dynamo.utils.counters


def test_training_compiles_whole_and_once(counters):
    ours = small_slm(V)
    compiled = torch.compile(ours, fullgraph=True)
    for step in range(4):
        doc = torch.randint(0, 5, (2, 64)).sort(dim=1).values
        tokens, targets = torch.randint(OFFSET, V, (2, 2, 64))
        targets[0, :step] = -100
        loss = compiled(tokens, targets, doc=doc)
        loss.backward()
        assert abs(loss.item() - ours(tokens, targets, doc=doc).item()) < 1e-5
    assert counters['stats']['unique_graphs'] == 1 and not counters['graph_break']


@pytest.mark.parametrize(
    'options', [dict(top_k=5, top_p=1.0), dict(top_k=V, top_p=0.7), dict(top_k=8, top_p=0.9)]
)
def test_sampled_distribution(options):
    """Chi-square of 3,000 draws against the distribution that transformers' own warpers leave."""
    ours, prompt = small_slm(V), torch.tensor([BOS, 7, 9])
    ours.allowed_tokens = lambda kind: torch.arange(V) >= OFFSET  # no end: each row has one token
    with torch.no_grad():
        logits = ours(prompt[None])[:, -1].index_fill(1, torch.tensor([PAD, EOS]), -torch.inf)
    warped = logits_process.TemperatureLogitsWarper(0.8)(None, logits)
    warped = logits_process.TopKLogitsWarper(options['top_k'])(None, warped)
    warped = logits_process.TopPLogitsWarper(options['top_p'])(None, warped)
    draws = dict(temperature=0.8, repetition_penalty=1.0, seed=0) | options
    drawn = torch.cat(ours.generate([prompt] * 3000, 1, **draws))
    counts, expected = torch.bincount(drawn, minlength=V), warped.softmax(-1)[0] * 3000
    assert counts[expected == 0].sum() == 0
    often = expected > 5
    statistic = ((counts - expected)[often] ** 2 / expected[often]).sum()
    assert chi2.sf(float(statistic), int(often.sum())) > 1e-3
