"""Text -> speech: stories to pre-train on, preference pairs for DPO, minimal pairs to evaluate on.

    python make_synthetic.py config/demo_synthetic.py                                              the demo's own stories, pairs and suites
    python make_synthetic.py --text=TinyStoriesV2-GPT4-train.txt --out=data/stinystories           sTinyStories in espeak's voices
    python make_synthetic.py --task=pairs --text=swag/train.csv --tts=kokoro --out=data/spokenswag
    python make_synthetic.py --task=blimp --text=blimp/data --out=data/sblimp                      ZeroSpeech 2021 layout with gold.csv
    python make_synthetic.py --task=storycloze --text=cloze.csv --out=data/sc                      sstorycloze/ and tstorycloze/

A file is spoken sentence by sentence; every sentence is trimmed, followed by a pause and rounded up to whole 40 ms frames, so that a prompt's
file and an ending's file laid end to end are the file of the whole. With espeak a sentence's sound depends on its text and voice alone.
"""

import csv
import ctypes
import fcntl
import glob
import io
import json
import math
import multiprocessing
import os
import random
import re
import signal
import threading
import time
import unicodedata
import zlib
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from itertools import chain, islice

os.environ['OPENBLAS_NUM_THREADS'] = (
    '1'  # before numpy: a worker has one core, and the last bit of a sum depends on the number of threads
)
from config import configure, fail

import numpy as np
import soundfile

# -----------------------------------------------------------------------------
out = 'out/synthetic'  # each task gets a folder here: audio, manifest.jsonl, skipped.jsonl, summary.json
task = 'stories'  # comma-separated: stories, prompts, pairs, blimp, storycloze; of the toy grammar stories, pairs, grammar, sstory, tstory
text = 'toy'  # toy (config/toy_grammar.py), a file, folder or glob (.txt, .jsonl, .csv), or hub:NAME[:SPLIT] (package datasets)
text_field = 'text'  # where rows of .jsonl, .csv and hub data keep a story
limit = 0  # at most so many items of a task; 0: all
val_share = 0.03  # of stories and pairs, marked split=val
max_auto_bleu = 0.3  # pairs whose text (prompt + ' ' + chosen) repeats this share of its word bigrams are dropped
prompt_seconds = 3.0  # what is kept of a story by task prompts
n_stories = 6000  # how much of the toy grammar: stories,
n_pairs = 2000  # preference pairs,
n_suite = 500  # and minimal pairs in each of grammar, sstory, tstory (an even number)
# the voice
tts = 'espeak'  # espeak, vits, fastspeech2, kokoro
tts_model = ''  # folder or hub name; empty: facebook/mms-tts-eng (vits), espnet/fastspeech2_conformer_with_hifigan (fastspeech2)
voices = ''  # comma-separated, one is drawn for each item (blimp: every pair in each); espeak: languages with variants, en-us+f2,de
speed = '1.0-1.0'  # 1 is the voice's usual pace; every voice has its own, drawn from this range
pitch = '50-50'  # espeak: 0 to 99; likewise
pause = 0.2  # seconds of silence after each sentence
audio_format = 'flac'  # flac or wav, 16-bit
# the machine
workers = 0  # processes that run espeak; 0: one a core. A network runs in one
seed = 1234
device = 'auto'  # cuda, mps, cpu
dtype = 'auto'  # of the networks: bfloat16 on cuda, float32 elsewhere
# -----------------------------------------------------------------------------

SAMPLE_RATE = 16000  # model.SAMPLE_RATE, not imported: espeak needs no torch, and starts at once
GRID = 640  # samples in a 40 ms frame of a 25 Hz encoder
SILENCE = 0.002  # of full scale; what stays below it is pause
SHARD = 40  # items a worker takes at once
VOICES = dict(
    espeak='gmw/en+m3,gmw/en+m7,gmw/en+Annie,gmw/en+steph',  # a path below espeak's lang/ loads ten times as fast as a name (en-us)
    vits='0',
    fastspeech2='0',
    kokoro='af_heart,am_fenrir,bf_emma,bm_george',
)  # the last as SpokenSwag
PAIRS = [
    columns.split()
    for columns in (
        'prompt chosen rejected',
        'sent1 sent2 gold-source label ending0 ending1 ending2 ending3',  # SWAG
        'ctx_a ctx_b source_id label endings',
    )
]  # HellaSwag
DEV = 'syntactic/dev'  # of ZeroSpeech 2021
BLIMP = 'sentence_good sentence_bad linguistics_term UID pairID'.split()
CLOZE = [f'InputSentence{i}' for i in (1, 2, 3, 4)] + [
    'RandomFifthSentenceQuiz1',
    'RandomFifthSentenceQuiz2',
    'AnswerRightEnding',
]
PLAIN = str.maketrans(
    {'‘': "'", '’': "'", '“': '"', '”': '"', '—': ', ', '–': ', ', '…': '.', '\xad': None}
)
ARPABET = dict(
    pair.split('=')
    for pair in (  # espeak's IPA for English -> the phones of CMUdict
        'iː=IY i=IY ɪ=IH ᵻ=IH ɛ=EH æ=AE a=AE aa=AE ɑː=AA ɑ=AA ɒ=AA ɔː=AO ɔ=AO oː=AO o=OW ʊ=UH uː=UW u=UW ʌ=AH ə=AH ɐ=AH ɚ=ER ɜː=ER ɜ=ER eɪ=EY e=EH aɪ=AY '
        'ɔɪ=OY aʊ=AW oʊ=OW əʊ=OW tʃ=CH dʒ=JH θ=TH ð=DH ʃ=SH ʒ=ZH ŋ=NG j=Y ɹ=R r=R h=HH ɡ=G x=K ɾ=T ʔ=T b=B d=D f=F k=K l=L m=M n=N p=P s=S t=T v=V w=W '
        'z=Z'
    ).split()
)


# --- text: rows of files, and items made of rows -----------------------------------------------------------------------------------


def documents(file, marked):
    """Stories of a text file: what stands between <|endoftext|> marks; if it has none, between blank lines."""
    document = ''
    for line in file:
        *ended, line = (
            line.split('<|endoftext|>') if marked else [line] if line.strip() else ['', '']
        )
        for part in ended:
            if marked or document.strip():
                yield document + part
            document = ''
        document += line if document or line.strip() else ''
    if document.strip():
        yield document


def text_files():
    """The files that the knob `text` names; [] for toy and hub."""
    pattern = glob.escape(text) + '/**' * os.path.isdir(text) if os.path.exists(text) else text
    return [
        path
        for path in sorted(glob.glob(pattern, recursive=True))
        if path.endswith(('.txt', '.jsonl', '.csv'))
        and os.path.isfile(path)
        and os.path.getsize(path)
    ]


def read_file(path):
    """Yields the rows of a text file; a story of a .txt file is a row of text_field."""
    csv.field_size_limit(1 << 30)
    with open(
        path, encoding='utf-8-sig', errors='replace', newline='' if path.endswith('.csv') else None
    ) as file:
        head = file.read(1 << 20)
        if (
            '\0' in head or head.count('\ufffd') > len(head) / 1000
        ):  # a few wrong bytes, as in TinyStories, do no harm
            fail(f'{path}: not text in UTF-8; convert it (iconv -t utf-8)')
        file.seek(0)
        if path.endswith('.jsonl'):
            yield from (dict(json.loads(line)) for line in file if line.strip())
        elif path.endswith('.csv'):
            yield from csv.DictReader(file)
        else:
            yield from (
                {text_field: document} for document in documents(file, '<|endoftext|>' in head)
            )


def read_rows(task):
    """Yields (row, where it stands) of the knob `text`; what is empty is '', a number its digits."""
    if text == 'toy':
        from config.toy_grammar import toy_rows

        yield from ((row, 'toy') for row in toy_rows(task, seed, n_stories, n_pairs, n_suite))
        return
    if text.startswith('hub:'):
        name, _, split = text[4:].partition(':')
        try:
            from datasets import load_dataset

            sources = {name: load_dataset(name, split=split or 'train')}
        except ImportError:
            fail('--text=hub:... needs the package datasets: pip install datasets')
        except Exception as error:  # of many kinds: no such name, no such split, no network
            fail(f'--text={text}: {error}')
    else:
        sources = {path: read_file(path) for path in text_files()} or fail(
            f'{text}: no text there; expected a .txt, .jsonl or .csv file, a folder or glob of such, hub:NAME, or toy'
        )
    for name, rows in sources.items():
        number = 0
        try:
            for number, row in enumerate(rows, 1):
                yield (
                    {
                        key: ''
                        if value is None
                        else str(value)
                        if isinstance(value, (int, float))
                        else value
                        for key, value in row.items()
                    },
                    f'{name} row {number}',
                )
        except (ValueError, TypeError, csv.Error) as error:
            fail(
                f'{name} row {number + 1}: {error}; expected an object a line (.jsonl), or columns (.csv)'
            )


def auto_bleu(document):
    """Share of a text's word bigrams that occur in it more than once; 0 for fewer than two words. Punctuation marks are words."""
    words = re.findall(r"[\w']+|[^\w\s]", document)
    counts = Counter(zip(words, words[1:]))
    return sum(n for n in counts.values() if n > 1) / max(1, len(words) - 1)


def preference(row, rng):
    """(prompt, chosen, rejected) of a row of PAIRS, the rejected ending drawn by rng; None for a row that the recipe leaves out (section 4), a
    str, the reason, for one that is not whole."""
    if 'rejected' in row:
        return row['prompt'], row['chosen'], row['rejected']
    if 'sent1' in row:
        first, second, endings, good = (
            row['sent1'],
            row['sent2'],
            [row[f'ending{i}'] for i in range(4)],
            row['gold-source'] == 'gold',
        )
    else:
        first, second, endings = row['ctx_a'], row['ctx_b'], row['endings']
        good = len(endings) > 1 and not re.search(
            r'[][(){}<>/\\]|www\.', ' '.join((first, second, *map(str, endings)))
        )
    if not good:
        return None
    if row['label'] not in map(str, range(len(endings))) or not all(
        isinstance(ending, str) and ending for ending in endings
    ):
        return f'label {row["label"]!r} of {len(endings)} endings, or one of them empty'
    right = int(row['label'])
    wrong = rng.choice([i for i in range(len(endings)) if i != right])
    return first, *(f'{second} {endings[i]}'.strip() for i in (right, wrong))


def make_items(task):
    """Yields a task's items, dict(files=[dict(name, text, ...), ...], ...), or dict(skip=reason, text). role: three files share a manifest row."""

    def minimal_pair(right, wrong, name='{n:06d}', **more):
        return dict(
            more,
            files=[
                dict(name=f'{name}_correct', text=right, correct=True),
                dict(name=f'{name}_incorrect', text=wrong, correct=False),
            ],
        )

    expected = dict(
        stories=[[text_field]],
        prompts=[[text_field]],
        pairs=PAIRS,
        blimp=[BLIMP],
        sstorycloze=[CLOZE],
        tstorycloze=[CLOZE],
    ).get(task)
    if task == 'tstorycloze':
        endings = [
            row.get(f'RandomFifthSentenceQuiz{row.get("AnswerRightEnding")}')
            for row, _ in read_rows(task)
        ]
    for number, (row, where) in enumerate(read_rows(task)):
        if expected and not any(
            all(isinstance(row.get(key), list if key == 'endings' else str) for key in columns)
            for columns in expected
        ):
            fail(
                f'{where}: task {task} expects {"; or ".join(map(", ".join, expected))}; there are '
                f'{", ".join(f"{key} ({type(value).__name__})" for key, value in row.items())}'
            )
        rng = random.Random(f'{seed}/{task}/{number}')
        if task in ('stories', 'prompts'):
            yield dict(files=[dict(name='{n:06d}', text=row[text_field])], split=task == 'stories')
        elif task == 'pairs':
            texts = preference(row, rng)
            if isinstance(texts, str):
                yield dict(skip=texts, text=where)
            elif texts and (share := auto_bleu(f'{texts[0]} {texts[1]}')) >= max_auto_bleu:
                yield dict(skip=f'auto-BLEU {share:.2f}', text=f'{texts[0]} {texts[1]}')
            elif texts:
                yield dict(
                    split=True,
                    files=[
                        dict(name=f'{{n:06d}}_{role}', role=role, text=what)
                        for role, what in zip(('prompt', 'chosen', 'rejected'), texts)
                    ],
                )
        elif task == 'blimp':
            for voice in voices.split(','):
                name = re.sub('[^A-Za-z0-9_]+', '-', f'_{row["UID"]}_{row["pairID"]}_{voice}')
                yield minimal_pair(
                    row['sentence_good'],
                    row['sentence_bad'],
                    '{n:06d}' + name,
                    voice=voice,
                    type=row['linguistics_term'],
                    subtype=row['UID'],
                    id=row['pairID'],
                )
        elif task in ('sstorycloze', 'tstorycloze'):
            if (answer := row['AnswerRightEnding']) not in ('1', '2'):
                fail(
                    f'{where}: AnswerRightEnding is {answer!r}, expected 1 or 2 (the test set without answers makes no pairs)'
                )
            right, wrong = (row[f'RandomFifthSentenceQuiz{i}'] for i in (answer, 3 - int(answer)))
            if task == 'tstorycloze':  # another story's right ending
                other = [
                    i
                    for i in rng.choices(range(len(endings)), k=20)
                    if endings[i] not in (right, wrong, None)
                ]
                wrong = (
                    endings[other[0]]
                    if other
                    else fail(f'{text}: too few stories to draw endings from')
                )
            prompt = ' '.join(row[key] for key in CLOZE[:4])
            yield minimal_pair(f'{prompt} {right}', f'{prompt} {wrong}')
        else:
            yield minimal_pair(**row)


def clean(document):
    """Only what a voice can say: letters, digits, plain punctuation; typographic signs become plain ones, links and everything else a space."""
    document = re.sub(
        'â€[œ\x9d]?', '"', re.sub('â€[˜™]', "'", document)
    )  # quotes that were read in a wrong encoding, as in TinyStories
    document = unicodedata.normalize('NFKC', document.translate(PLAIN))
    document = re.sub(r'https?://\S+|www\.\S+|<[^<>]*>', ' ', document)
    document = ''.join(
        c if unicodedata.category(c)[0] in 'LNM' or c in '.,!?;:\'"()-%&$€£+@/。！？،؟।' else ' '
        for c in document
    )
    return ' '.join(
        re.sub(r'([.,!?;:])[.,!?;:]+', r'\1', re.sub(r'\s+([.,!?;:])', r'\1', document)).split()
    )


def sentences(document, longest=300):
    """A text, cleaned, as sentences of at most `longest` letters (longer ones are cut at a comma or space); [] if there is no word in it."""
    pieces, ends = (
        [],
        r'(?:(?<=[.!?।؟])|(?<=[.!?।؟]["\')]))(?<!\bMr\.)(?<!\bMrs\.)(?<!\bMs\.)(?<!\bDr\.)(?<!\bSt\.)(?<!\b[A-Z]\.)\s+|(?<=[。！？])',
    )
    for piece in re.split(ends, clean(document)):
        while len(piece) > longest:
            at = piece.rfind(', ', 0, longest) + 1 or piece.rfind(' ', 0, longest) + 1 or longest
            pieces, piece = [*pieces, piece[:at].strip()], piece[at:].strip()
        pieces.append(piece)
    return [piece for piece in pieces if any(c.isalnum() for c in piece)]


# --- voices: speak(texts, voice, speed, pitch) -> [(wave (n,) float32, rate, [[word, start s, end s], ...] or None), ...] -----------


class Event(ctypes.Structure):  # espeak_EVENT of espeak-ng/speak_lib.h
    _fields_ = [
        (name, ctypes.c_int)
        for name in 'type identifier text_position length audio_position sample'.split()
    ] + [('user_data', ctypes.c_void_p), ('id', ctypes.c_char * 8)]


class Espeak:
    """espeak-ng in this process; the library and its data come with the package espeakng-loader."""

    def __init__(self):
        import espeakng_loader

        self.path, self.data = espeakng_loader.get_library_path(), espeakng_loader.get_data_path()
        lang = os.path.join(self.data, 'lang')
        files = sorted(
            path
            for path in glob.glob(os.path.join(lang, '**'), recursive=True)
            if os.path.isfile(path)
        )
        ranks = [
            (*line.split()[1:], '5', path)
            for path in files
            for line in open(path, encoding='utf-8')
            if line.startswith('language')
        ]
        self.languages = {
            name: os.path.relpath(path[-1], lang)
            for name, rank, *path in sorted(ranks, key=lambda r: -int(r[1]))
        }  # the best last
        self.library, self.chunks, self.marks = None, [], []
        self.callback = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(Event)
        )(self.receive)

    def receive(self, wave, n, events):
        if wave and n > 0:
            self.chunks.append(ctypes.string_at(wave, 2 * n))
        i = 0
        while events[i].type:  # 0 ends the list
            if events[i].type == 1:  # a word begins
                self.marks.append((events[i].text_position - 1, events[i].sample))
            i += 1
        return 0

    def load(self, voice):
        """A library loaded anew: flutter and noise go on where the last utterance left them, even through espeak_Terminate."""
        if self.library:
            import _ctypes

            self.library.espeak_Terminate()
            _ctypes.dlclose(self.library._handle)
        self.library = ctypes.CDLL(self.path)
        rate = self.library.espeak_Initialize(
            2, 10000, self.data.encode(), 0x8000
        )  # synchronous, buffers of 10 s, never exit()
        language, plus, variant = voice.partition('+')
        names = (
            voice,
            self.languages.get(language, language) + plus + variant,
        )  # en-gb and fr-fr are names of no file
        if (
            rate <= 0
            or not os.path.exists(os.path.join(self.data, 'voices', '!v', variant))
            or all(self.library.espeak_ng_SetVoiceByName(name.encode()) for name in names)
        ):
            fail(
                f'espeak-ng has no voice {voice!r}: name a language (en-us, de, fr-fr ...), with a variant if you like (en-us+f2)'
            )
        self.library.espeak_SetSynthCallback(self.callback)
        self.library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # else the clock
        return rate

    def __call__(self, texts, voice, speed=1.0, pitch=50):
        results = []
        for sentence in texts:
            rate, self.chunks, self.marks, encoded = (
                self.load(voice),
                [],
                [],
                sentence.encode() + b'\0',
            )
            for parameter, value in (
                (1, 175 * speed),
                (2, 60),
                (3, pitch),
            ):  # words per minute, volume (at 100 some voices clip), pitch
                self.library.espeak_SetParameter(parameter, round(value), 0)
            self.library.espeak_Synth(encoded, len(encoded), 0, 1, 0, 1, None, None)
            wave = np.frombuffer(b''.join(self.chunks), np.int16).astype(np.float32) / 32768
            results.append((wave, rate, word_times(sentence, wave, rate, self.marks)))
        return results

    def phones(self, word):
        """'Cats' -> ['K', 'AE1', 'T', 'S']: the ARPAbet of the voice that is loaded; [] of a lone dash, which espeak would call by its name."""
        translate, pointer, stress, found = (
            self.library.espeak_TextToPhonemes,
            ctypes.c_char_p(word.encode()),
            '0',
            [],
        )
        translate.restype = ctypes.c_char_p
        ipa = (
            (translate(ctypes.byref(pointer), 1, 2) or b'').decode()
            if any(map(str.isalnum, word))
            else ''
        )
        for sign in re.findall('|'.join(sorted(ARPABET, key=len, reverse=True)) + '|[ˈˌ]', ipa):
            if phone := ARPABET.get(sign):
                vowel = phone[0] in 'AEIOU'
                found.append(phone + stress * vowel)
            stress = {'ˈ': '1', 'ˌ': '2'}.get(sign) or ('0' if vowel else stress)
        return found


def fix_noise(what):
    """A network's noise becomes a function of the seed and of what it says alone."""
    import torch

    torch.manual_seed(zlib.crc32(f'{seed}/{what}'.encode()))


def network(name, *loaders):
    """(run, what each loader makes of `name`, first the model): run(**inputs) computes without gradients."""
    import torch

    from model import pick_device, pick_dtype

    try:
        where = pick_device(device)
        kind = pick_dtype(dtype, where)
        model, *others = (load(name) for load in loaders)
        model.to(where).eval()
    except (
        Exception
    ) as error:  # of many kinds: no such name, file or device, no network, another architecture
        fail(f'--tts_model={name} --device={device}: {str(error).strip().partition(chr(10))[0]}')

    def run(**inputs):
        with (
            torch.inference_mode(),
            torch.autocast(where.type, kind, enabled=kind != torch.float32),
        ):
            return model(
                **{
                    key: value.to(where) if torch.is_tensor(value) else value
                    for key, value in inputs.items()
                }
            )

    return run, model, *others


def load_vits():
    """transformers' VitsModel (facebook/mms-tts-*); a voice is the number of a speaker; no word times."""
    from transformers import AutoTokenizer, VitsModel

    run, model, tokenizer = network(
        tts_model or 'facebook/mms-tts-eng',
        VitsModel.from_pretrained,
        AutoTokenizer.from_pretrained,
    )

    def speak(texts, voice, speed=1.0, pitch=50):
        model.speaking_rate = model.config.speaking_rate * speed
        inputs = tokenizer(list(texts), return_tensors='pt', padding=True)
        if not inputs['attention_mask'].any(1).all():  # a sentence without a letter of its alphabet
            return (
                [part for one in texts for part in speak([one], voice, speed)]
                if len(texts) > 1
                else [(np.zeros(0, np.float32), 16000, None)]
            )
        fix_noise(f'{voice} {texts}')
        made = run(
            **inputs, **(dict(speaker_id=int(voice)) if model.config.num_speakers > 1 else {})
        )
        return [
            (wave[: int(n)].float().cpu().numpy(), model.config.sampling_rate, None)
            for wave, n in zip(made.waveform, made.sequence_lengths)
        ]

    return speak


def load_fastspeech2():
    """transformers' FastSpeech 2 Conformer + HiFi-GAN; phones are espeak's, times those of its durations. Not batched: it masks no padding."""
    import torch
    from transformers import FastSpeech2ConformerWithHifiGan
    from transformers.utils import cached_file

    run, model, vocab = network(
        tts_model or 'espnet/fastspeech2_conformer_with_hifigan',
        FastSpeech2ConformerWithHifiGan.from_pretrained,
        lambda name: json.load(open(cached_file(name, 'vocab.json'), encoding='utf-8')),
    )
    rate, hop = (
        getattr(model.config.vocoder_config, 'sampling_rate', 22050),
        math.prod(model.config.vocoder_config.upsample_rates),
    )
    espeak = Espeak()
    espeak.load('en-us')

    def speak(texts, voice, speed=1.0, pitch=50):
        model.model.config.speaking_speed, results = (
            1 / speed,
            [],
        )  # what it calls speed multiplies durations
        for sentence in texts:
            words = [
                (
                    word,
                    [vocab.get(phone, vocab['<unk>']) for phone in espeak.phones(word)]
                    + [
                        vocab[mark]
                        for mark in (word[-1] if word[-1] not in ';:' else ',')
                        if mark in vocab and not mark.isalnum()
                    ],
                )
                for word in sentence.split()
            ]
            tokens = torch.tensor(
                [[*(token for _, phones in words for token in phones), vocab['<sos/eos>']]]
            )
            fix_noise(f'{voice} {sentence}')
            made = run(
                input_ids=tokens,
                return_dict=True,
                **(
                    dict(speaker_ids=torch.tensor([[int(voice)]]))
                    if model.model.multispeaker_model
                    else {}
                ),
            )
            durations = made.duration_outputs[0].cpu()
            frames = [
                0,
                *np.cumsum(
                    durations if speed == 1 else torch.round(durations.float() / speed).long()
                ),
            ]
            ends = np.cumsum([len(phones) for _, phones in words])
            results.append(
                (
                    made.waveform[0].float().cpu().numpy(),
                    rate,
                    [
                        [word, frames[end - len(phones)] * hop / rate, frames[end] * hop / rate]
                        for (word, phones), end in zip(words, ends)
                    ],
                )
            )
        return results

    return speak


def load_kokoro():
    """The package kokoro; 24 kHz; word times for English. --tts_model: a hub name or a folder of its layout (config.json, *.pth, voices/*.pt)."""
    try:
        from kokoro import KModel, KPipeline
    except ImportError:
        fail('--tts=kokoro needs its package: pip install "kokoro>=0.9"')
    from model import pick_device

    name = tts_model or 'hexgrad/Kokoro-82M'
    try:
        files = {}
        if os.path.isdir(name):
            files = dict(
                config=f'{name}/config.json',
                model=max(
                    glob.glob(f'{glob.escape(name)}/*.pth'), default=f'{name}/kokoro-v1_0.pth'
                ),
            )
        model = KModel(name, **files).to(pick_device(device)).eval()  # one for all languages
    except (
        Exception
    ) as error:  # of many kinds: no such name or file, no network, another architecture
        fail(f'--tts_model={name} --device={device}: {str(error).strip().partition(chr(10))[0]}')
    pipeline = lru_cache(lambda language: KPipeline(language, name, model=model))

    def speak(texts, voice, speed=1.0, pitch=50):
        results = []
        for sentence in texts:
            waves, marks, at, end = [np.zeros(0, np.float32)], [], 0, 0
            fix_noise(f'{voice} {sentence}')
            for part in pipeline(voice[0])(
                sentence, voice=f'{name}/voices/{voice}.pt' if files else voice, speed=speed
            ):  # af_heart: a, American
                for token in part.tokens or ():  # punctuation is a token of its own
                    if (found := sentence.find(token.text, at)) >= 0 and token.start_ts is not None:
                        marks.append((found, end + round(24000 * token.start_ts)))
                        at = found + len(token.text)
                waves.append(part.audio.cpu().numpy())
                end += len(waves[-1])
            wave = np.concatenate(waves)
            results.append(
                (wave, 24000, word_times(sentence, wave, 24000, marks) if marks else None)
            )
        return results

    return speak


def word_times(sentence, wave, rate, marks):
    """[[word, start s, end s], ...] from marks [(character, sample), ...]; words without a mark share the time since the last one by letters."""
    spans = [(match[0], *match.span()) for match in re.finditer(r'\S+', sentence)]
    starts = [
        next((sample for at, sample in marks if begin <= at < end), None) for _, begin, end in spans
    ] + [len(wave)]
    starts[0] = starts[0] or 0
    for i in range(1, len(spans)):
        if starts[i] is None or starts[i] < starts[i - 1]:
            j = next(
                j
                for j in range(i + 1, len(starts))
                if starts[j] is not None and starts[j] >= starts[i - 1]
            )
            share = len(spans[i - 1][0]) / sum(len(span[0]) for span in spans[i - 1 : j])
            starts[i] = starts[i - 1] + round(share * (starts[j] - starts[i - 1]))
    loud, words = np.abs(wave) > SILENCE, []
    for (word, _, _), begin, end in zip(spans, starts, starts[1:]):
        sounding = np.flatnonzero(
            loud[begin:end]
        )  # a word ends where its sound does, not after the pause of a comma
        words.append(
            [word, begin / rate, (begin + sounding[-1] + 1 if len(sounding) else end) / rate]
        )
    return words


# --- waves -------------------------------------------------------------------------------------------------------------------------


@lru_cache
def filter_bank(rate, taps=32):
    """(L outputs to every M inputs, half a filter's length in inputs, [(first output, its first input, (inputs, outputs) kernel), ...])"""
    g = math.gcd(rate, SAMPLE_RATE)
    repeat = -(-320 * g // SAMPLE_RATE)  # a period of at least 320 outputs
    L, M, bank = SAMPLE_RATE // g * repeat, rate // g * repeat, []
    step, cutoff = M / L, 0.94 * min(1.0, L / M)  # 7.5 kHz, if the input has it
    half = math.ceil(taps * max(1.0, step))
    for first in range(
        0, L, 40
    ):  # 40 outputs span about as many inputs as a filter is long: little of a kernel is zero
        outputs, low = np.arange(first, min(first + 40, L)), int(first * step)
        t = np.arange(low - half, int(outputs[-1] * step) + half + 1)[:, None] - outputs * step
        window = np.i0(9 * np.sqrt(np.maximum(0, 1 - (t / half) ** 2))) / np.i0(9)
        bank.append(
            (
                first,
                low,
                (cutoff * np.sinc(cutoff * t) * window * (np.abs(t) < half)).astype(np.float32),
            )
        )
    return L, M, half, bank


def resample(wave, rate):
    """(n,) float32 at `rate` -> (ceil(n * 16000 / rate),) at 16 kHz by a Kaiser-windowed sinc, its phases as matrix products: 2,600 x real time."""
    if rate == SAMPLE_RATE:
        return wave
    L, M, half, bank = filter_bank(rate)
    n = -(-len(wave) * L // M)
    blocks = -(-n // L)
    padded, result = (
        np.zeros((blocks + 1) * M + 2 * half, np.float32),
        np.empty((blocks, L), np.float32),
    )
    padded[half : half + len(wave)] = wave
    for first, low, kernel in bank:
        frames = np.lib.stride_tricks.as_strided(padded[low:], (blocks, len(kernel)), (4 * M, 4))
        result[:, first : first + kernel.shape[1]] = frames @ kernel
    return result.reshape(-1)[:n]


def assemble(spoken):
    """[(wave, rate, words), ...], one a sentence, none silent -> (wave at 16 kHz, words or None): trimmed, joined, each followed by the pause."""
    waves, words, at = [], [], 0.0
    for wave, rate, times in spoken:
        sounding = np.flatnonzero(np.abs(wave) > SILENCE)
        piece, start = resample(wave[sounding[0] : sounding[-1] + 1], rate), sounding[0] / rate
        waves.append(
            np.pad(
                piece,
                (0, -(-(len(piece) + round(pause * SAMPLE_RATE)) // GRID) * GRID - len(piece)),
            )
        )
        words += [
            [word, *(round(at + min(max(t - start, 0), len(piece) / SAMPLE_RATE), 3) for t in span)]
            for word, *span in times or ()
        ]
        at += len(waves[-1]) / SAMPLE_RATE
    return np.concatenate(waves), words if all(
        times is not None for _, _, times in spoken
    ) else None


def save(path, wave):
    """16-bit audio, whole or not at all; louder than full scale is scaled down, never clipped. Returns its size in bytes."""
    samples = np.round(wave * (32767 / max(1.0, float(np.abs(wave).max())))).astype(np.int16)
    soundfile.write(
        buffer := io.BytesIO(),
        samples,
        SAMPLE_RATE,
        format=audio_format,
        subtype='PCM_16',  # soundfile names no full disk
        **(dict(compression_level=0.0) if audio_format == 'flac' else {}),
    )
    with open(path + '.tmp', 'wb') as file:
        size = file.write(buffer.getbuffer())
    os.replace(path + '.tmp', path)
    return size


# --- the work ----------------------------------------------------------------------------------------------------------------------


def in_worker(parent):
    """A worker leaves ctrl-C to the parent, and does not outlive it."""

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()


def do_shard(job):
    """Speaks and saves some items of a task. Returns dict(shard, items, seconds, bytes, rows, skipped), what the journal keeps of them."""
    shard, task, folder, items = job
    done = dict(shard=shard, items=len(items), seconds=0.0, bytes=0, rows=[], skipped=[])
    for n, item in items:
        files = item.get('files', [])
        said = [sentences(file['text']) for file in files]
        rng = random.Random(
            f'{seed}/{task}/{item.get("alike", n)}'
        )  # pairs that mirror each other have one voice
        voice = item.get('voice') or rng.choice(voices.split(','))
        own = random.Random(f'{seed}/{voice}')  # a voice has a pace and a pitch of its own
        how = [own.uniform(*map(float, span.split('-'))) for span in (speed, pitch)]
        if files and all(said):
            texts = list(dict.fromkeys(chain(*said)))  # what they share is spoken once
            spoken = {
                sentence: one
                for sentence, one in zip(texts, speak(texts, voice, *how))
                if np.abs(one[0]).max(initial=0) > SILENCE
            }
            said = [[sentence for sentence in one if sentence in spoken] for one in said]
        if not files or not all(said):
            done['skipped'].append(
                dict(
                    n=n,
                    reason=item.get('skip', 'nothing to say'),
                    text=item.get('text') or ' | '.join(file['text'] for file in files),
                )
            )
            continue
        more = {
            key: value for key, value in item.items() if key not in ('files', 'split', 'alike')
        } | dict(voice=voice)
        if item.get('split'):
            more['split'] = (
                'val' if random.Random(f'{seed}/{task}/{n}/split').random() < val_share else 'train'
            )
        rows = []
        for file, one in zip(files, said):
            wave, words = assemble([spoken[sentence] for sentence in one])
            place = f'{n // ((1000 - (task == "blimp")) // len(files)):03d}'  # at most 1,000 files a folder, gold.csv among them
            if (
                task == 'blimp'
            ):  # ZeroSpeech has no sub-folders: as many as may stand beside gold.csv
                place = os.path.join(DEV, place).removesuffix('/000')
            row = dict(
                path=os.path.join(place, f'{file["name"].format(n=n)}.{audio_format}'),
                text=' '.join(one),
            )
            if task == 'prompts':
                wave = wave[: round(prompt_seconds * SAMPLE_RATE)]
                if words:
                    words = [word for word in words if word[2] <= prompt_seconds]
                    row['text'] = ' '.join(word for word, _, _ in words)
            os.makedirs(os.path.dirname(path := os.path.join(folder, row['path'])), exist_ok=True)
            done['bytes'] += save(path, wave)
            done['seconds'] += (seconds := round(len(wave) / SAMPLE_RATE, 3))
            rows.append(
                row
                | dict(seconds=seconds, words=words)
                | ({'correct': file['correct']} if 'correct' in file else {})
            )
        if 'role' in files[0]:
            rows = [
                {
                    f'{file["role"]}_{key}': value
                    for file, row in zip(files, rows)
                    for key, value in row.items()
                }
            ]
        done['rows'] += [row | more for row in rows]
    return done


def in_order(pool, jobs, ahead):
    """map(do_shard, jobs) by the pool, never more than `ahead` of what was taken: a corpus is not drawn into memory."""
    waiting = deque(pool.submit(do_shard, job) for job in islice(jobs, ahead))
    while waiting:
        try:
            yield waiting.popleft().result()
        except BrokenProcessPool:
            fail(
                'a worker was killed (no memory left?): run the same command to continue, with fewer --workers'
            )
        waiting.extend(pool.submit(do_shard, job) for job in islice(jobs, 1))


def lock(file):
    """The file is ours as long as this process or a worker lives. Those of a killed run end within a second; another run does not."""
    for _ in range(30):
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.1)
    fail(f'{file.name}: another run is at work here')


@contextmanager
def written(path):
    """A text file to write, which appears whole."""
    with open(path + '.tmp', 'w', encoding='utf-8', errors='replace', newline='') as file:
        yield file
    os.replace(path + '.tmp', path)


if __name__ == '__main__':
    config = configure(globals())
    from tqdm import tqdm

    tasks = [
        name
        for one in task.split(',')
        for name in (('sstorycloze', 'tstorycloze') if one == 'storycloze' else (one,))
    ]
    known = (
        'stories pairs grammar sstory tstory'
        if text == 'toy'
        else 'stories prompts pairs blimp sstorycloze tstorycloze'
    )
    for name in tasks:
        if name not in known.split():
            fail(
                f'no task {name!r} for --text={text}; there are {known.replace(" sstorycloze t", " ").replace(" ", ", ")}'
            )
    for knob, low, high in (('speed', 0.1, 10), ('pitch', 0, 99)):
        if not re.fullmatch(r'\d+(\.\d+)?-\d+(\.\d+)?', config[knob]) or not all(
            low <= float(number) <= high for number in config[knob].split('-')
        ):
            fail(
                f'--{knob}={config[knob]}: expected a range within {low} and {high}, such as {"0.9-1.1" if knob == "speed" else "40-60"}'
            )
    for knob, good, expected in (
        ('tts', tts in VOICES, ', '.join(VOICES)),
        ('audio_format', audio_format in ('flac', 'wav'), 'flac or wav'),
        ('val_share', 0 <= val_share <= 1, '0 to 1'),
        ('prompt_seconds', prompt_seconds > 0, 'more than 0'),
        *((knob, config[knob] >= 0, '0 or more') for knob in ('limit', 'pause', 'workers')),
    ):
        if not good:
            fail(f'--{knob}={config[knob]}: expected {expected}')
    voices = voices or VOICES[tts]
    processes = (workers or os.cpu_count()) if tts == 'espeak' else 1
    settings = {
        key: value
        for key, value in config.items()
        if key not in ('out', 'task', 'workers', 'device')
    } | dict(voices=voices, text_bytes=sum(map(os.path.getsize, text_files())))
    speak = None
    for name in tasks:
        folder = os.path.join(out, name)
        journal, manifest, summary = (
            os.path.join(folder, file)
            for file in ('journal.jsonl', 'manifest.jsonl', 'summary.json')
        )

        def agree(old):
            if changed := [key for key in settings if settings[key] != old['settings'].get(key)]:
                fail(
                    f'{folder} holds speech made with other {", ".join(changed)}: choose another --out, or remove it'
                )

        def count(done):
            total.update(
                {key: done[key] for key in ('items', 'seconds', 'bytes')},
                skipped=len(done['skipped']),
                shards=1,
            )

        def note(line):
            log.write((json.dumps(line, ensure_ascii=False) + '\n').encode(errors='replace'))
            log.flush()

        if os.path.exists(summary):
            agree(json.load(open(summary, encoding='utf-8')))
            print(f'{name}: already in {folder}, nothing to do')
            continue
        speak = (
            speak
            or dict(
                espeak=Espeak, vits=load_vits, fastspeech2=load_fastspeech2, kokoro=load_kokoro
            )[tts]()
        )  # forked workers have it
        for voice in voices.split(','):
            try:
                speak(['a'], voice)
            except Exception as error:  # a voice that is not there is said now
                fail(f'--voices={voice}: {tts} does not speak with it: {error}')
        toy = list(make_items(name)) if text == 'toy' else None
        full = sum(1 for _ in toy or make_items(name)) or fail(
            f'{text}: no text in it for task {name}'
        )
        items = islice(enumerate(toy or make_items(name)), limit or full)
        try:
            os.makedirs(os.path.join(folder, DEV if name == 'blimp' else ''), exist_ok=True)
        except OSError as error:
            fail(f'--out={out}: {error.strerror}: {error.filename}')

        with open(
            journal, 'a+b'
        ) as log:  # shards are written in order: a killed run goes on after the last whole line
            lock(log)
            total, whole = Counter(), 0
            log.seek(0)
            for line in log:
                if line.endswith(b'\n'):
                    (count if whole else agree)(json.loads(line))
                    whole += len(line)
            log.truncate(whole)
            if not whole:
                note(dict(settings=settings))
            before, start, began = total['seconds'], total['shards'], time.time()
            jobs = (
                (i, name, folder, shard)
                for i, shard in enumerate(iter(lambda: list(islice(items, SHARD)), []))
                if i >= start
            )
            pool = (
                ProcessPoolExecutor(
                    processes, multiprocessing.get_context('fork'), in_worker, (os.getpid(),)
                )
                if processes > 1
                else None
            )
            with (
                tqdm(
                    total=min(limit or full, full), initial=total['items'], desc=name, unit=' items'
                ) as bar,
                pool or nullcontext(),
            ):
                for done in in_order(pool, jobs, 4 * processes) if pool else map(do_shard, jobs):
                    note(done)
                    count(done)
                    bar.update(done['items'])
                    bar.set_postfix_str(
                        f'{total["seconds"] / 3600:.2f} h, {(total["seconds"] - before) / (time.time() - began):.0f} x real time'
                    )

            log.seek(0)
            with (
                written(manifest) as rows,
                written(os.path.join(folder, 'skipped.jsonl')) as skipped,
            ):
                for done in map(json.loads, islice(log, 1, None)):
                    rows.writelines(
                        json.dumps(row, ensure_ascii=False) + '\n' for row in done['rows']
                    )
                    skipped.writelines(
                        json.dumps(row, ensure_ascii=False) + '\n' for row in done['skipped']
                    )
            if name == 'blimp':
                with (
                    written(os.path.join(folder, DEV, 'gold.csv')) as file,
                    open(manifest, encoding='utf-8') as lines,
                ):
                    gold = csv.writer(file)
                    gold.writerow('id filename voice type subtype correct transcription'.split())
                    gold.writerows(
                        [
                            row['id'],
                            os.path.relpath(os.path.splitext(row['path'])[0], DEV),
                            row['voice'],
                            row['type'],
                            row['subtype'],
                            int(row['correct']),
                            row['text'],
                        ]
                        for row in map(json.loads, lines)
                    )
            seconds, hours = time.time() - began, total['seconds'] / 3600
            rate, full_hours = (total['seconds'] - before) / seconds, hours * full / total['items']
            takes = full_hours / rate if rate else None  # nothing was left to speak: no rate
            with written(summary) as file:
                file.write(
                    json.dumps(
                        dict(
                            items=total['items'],
                            skipped=total['skipped'],
                            bytes=total['bytes'],
                            hours=hours,
                            seconds=seconds,
                            x_real_time=rate,
                            full_items=full,
                            full_hours=full_hours,
                            full_machine_hours=takes,
                            settings=settings,
                        )
                    )
                    + '\n'
                )
            os.remove(journal)
        print(
            f'{name}: {total["items"]} items, {hours:.2f} h, {total["skipped"]} skipped, {total["bytes"] / 1e6:.0f} MB in {seconds:.1f} s, '
            f'{rate:.0f} x real time; the full set, {full} items, {full_hours:.2f} h of speech'
            + (f', takes {takes:.3f} h' if rate else '')
        )
