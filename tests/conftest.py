"""What several test files use: how scripts are run, rows of JSON, sound, and small networks."""

import config

import builtins
import contextlib
import io
import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import model as M

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SIZES = dict(n_layer=2, n_embd=32, n_head=4, n_kv_head=2, n_ffn=48)
torch.set_num_threads(1)
os.environ['OMP_NUM_THREADS'] = '1'  # of processes that tests start
# pytest started in the background of a shell ignores SIGINT, and so would scripts that it starts
signal.signal(signal.SIGINT, signal.default_int_handler)


# -----------------------------------------------------------------------------
# Scripts


def run_script(name, *args, folder=ROOT):
    """A script with these arguments, in this process, which has loaded its libraries already.

    folder: where it runs. Returns: its returncode, stdout and stderr, as subprocess.run has them.
    """
    out, err, code = io.StringIO(), io.StringIO(), 0
    before = sys.argv, os.getcwd()
    handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    sys.argv = [name, *map(str, args)]
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                runpy.run_path(os.path.join(ROOT, name), run_name='__main__')
            except (OSError, M.InputError) as error:
                config.report_error(type(error), error, error.__traceback__)
    except SystemExit as error:
        code = error.code
    finally:
        sys.argv = before[0]
        os.chdir(before[1])
        for each, handler in handlers.items():
            signal.signal(each, handler)
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def fork_script(name, *args, at='', number=0, times=1, **environment):
    """A script in a process of its own that need not load the libraries: multiprocessing.Process.

    at: the process gets the signal `number`, `times` times, when it prints a line that begins so;
    from outside the signal would come at another line each time.
    """

    def print_and_signal(text, print=print, **options):
        print(text, **options)
        for _ in range(times if number and text.startswith(at) else 0):
            os.kill(os.getpid(), number)

    def child():
        builtins.print = print_and_signal
        os.environ.update(environment)
        sys.exit(run_script(name, *args).returncode)

    process = multiprocessing.get_context('fork').Process(target=child)
    process.start()
    return process


def run_in_two(name, *args):
    """A script twice, with the variables that torchrun sets."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        place = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free.getsockname()[1]))
    ranks = [dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE='2') for rank in '01']
    group = [fork_script(name, *args, **place, **rank) for rank in ranks]
    try:
        for process in group:
            process.join()
            assert process.exitcode == 0
    finally:
        for process in group:
            process.kill()


def run_checked(name, *args, mistake=None, folder=ROOT):
    """run_script of what succeeds, or of what ends with code 2 and a line that has `mistake`."""
    done = run_script(name, *args, folder=folder)
    assert done.returncode == (0 if mistake is None else 2), done.stderr
    assert mistake is None or mistake in done.stderr and done.stderr.count('\n') == 1, done.stderr
    return done


# -----------------------------------------------------------------------------
# Rows, sound, networks


def write_jsonl(path, rows):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, 'w') as file:
        file.writelines(json.dumps(row) + '\n' for row in rows)
    return str(path)


def read_jsonl(path):
    with open(path, encoding='utf-8') as file:
        return [json.loads(line) for line in file]


def speech(seed, seconds):
    """Syllables of two tones each: (samples,) float32."""
    rng, n = np.random.default_rng(seed), int(seconds * M.SAMPLE_RATE)
    tones = np.repeat(rng.integers(200, 3000, (n // 1600 + 1, 2)), 1600, 0)[:n]
    wave = np.sin(2 * np.pi * tones.cumsum(0) / M.SAMPLE_RATE).sum(1)
    return torch.from_numpy(0.1 * (wave + 0.1 * rng.standard_normal(n))).float()


def small_slm(vocab_size, context=128, seed=0, sizes=SIZES):
    """A model whose predictions are far from uniform."""
    slm = M.load_slm('scratch', vocab_size, context=context, sizes=sizes, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in slm.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return slm


def fit_parts(folder, waves, n_units):
    """An encoder of MFCC and a table vocoder, fitted on these waves, in two folders -> the part of
    slam.json that names them."""
    from sklearn.cluster import KMeans

    encoder = M.UnitEncoder.from_pretrained('mfcc')
    features = torch.cat([encoder.features(wave) for wave in waves])
    fitted = KMeans(n_units, n_init=1, random_state=0).fit(features.numpy())
    encoder.centroids = torch.from_numpy(fitted.cluster_centers_).float()
    encoder.save_pretrained(folder / 'encoder')
    speech = [(wave, encoder.encode(wave)) for wave in waves]
    M.UnitVocoder.fit(speech, encoder).save_pretrained(folder / 'vocoder')
    parts = dict(encoder=str(folder / 'encoder'), vocoder=str(folder / 'vocoder'))
    return parts | dict(encoder_id=encoder.encoder_id, n_units=n_units, frame_rate=25.0)


@pytest.fixture(scope='session')
def listeners(tmp_path_factory):
    """Folders of a random Whisper, which writes ASCII without sense, and of a random Llama with a
    tokenizer of bytes, in which token 256 ends a document."""
    import tokenizers
    import transformers

    torch.manual_seed(0)
    asr, lm = (str(tmp_path_factory.mktemp(name)) for name in ('asr', 'lm'))
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    letters = {letter: token for token, letter in enumerate(alphabet)}
    tokenizer = transformers.WhisperTokenizer(letters | {'<|endoftext|>': 256}, merges=[])
    special = ('startoftranscript', 'en', 'transcribe', 'notimestamps')
    tokenizer.add_special_tokens(dict(additional_special_tokens=[f'<|{s}|>' for s in special]))
    extractor = transformers.WhisperFeatureExtractor(feature_size=20)
    transformers.WhisperProcessor(extractor, tokenizer).save_pretrained(asr)
    shape = dict(num_mel_bins=20, d_model=16, max_target_positions=32, init_std=1.0)
    for part in ('encoder', 'decoder'):
        shape |= {f'{part}_layers': 1, f'{part}_attention_heads': 2, f'{part}_ffn_dim': 32}
    shape |= dict(decoder_start_token_id=257, eos_token_id=256, pad_token_id=256, bos_token_id=256)
    config = transformers.WhisperConfig(vocab_size=len(tokenizer), **shape)
    whisper = transformers.WhisperForConditionalGeneration(config)
    whisper.generation_config.update(max_length=20, suppress_tokens=list(range(100, 256)))
    whisper.generation_config.update(begin_suppress_tokens=[256])
    whisper.save_pretrained(asr)

    words = tokenizers.Tokenizer(tokenizers.models.BPE(letters | {'<|end|>': 256}, merges=[]))
    words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token='<|end|>')
    fast.save_pretrained(lm)
    shape = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.LlamaConfig(vocab_size=257, initializer_range=0.5, **shape)
    transformers.LlamaForCausalLM(config).save_pretrained(lm)
    return asr, lm
