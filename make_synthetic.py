"""Text -> speech: stories to pre-train on, preference pairs for DPO, minimal pairs to evaluate on.

    python make_synthetic.py config/demo_synthetic.py                                     the demo's own stories, pairs and three suites

A file is spoken sentence by sentence; every sentence is trimmed, followed by a pause and rounded up to whole 40 ms frames, so that a prompt's
file and an ending's file laid end to end are the file of the whole. What a file sounds like depends on its text, its voice and nothing else.
"""
import json
import math
import os
import random
import re
import sys
import time
from functools import lru_cache

os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')  # each worker has one core
import numpy as np
import soundfile

from config import configure, fail

# -----------------------------------------------------------------------------
out = 'out/synthetic'        # each task gets a folder here: audio, manifest.jsonl, summary.json, skipped.jsonl
task = 'stories'             # comma-separated: stories, pairs; of the toy grammar also grammar, sstory, tstory
text = 'toy'                 # toy (our own grammar)
# how much of the toy grammar
n_stories = 6000
n_pairs = 2000
n_suite = 500                # pairs in each of grammar, sstory, tstory; an even number
val_share = 0.03             # of stories and pairs, marked split=val
# the voice
tts = 'espeak'
voices = 'gmw/en+m3,gmw/en+f2,gmw/en+m7,gmw/en+f5'  # one is drawn for each item
speed = '1.0-1.0'            # 1 is the voice's own; drawn evenly from this range for each item
pitch = '50-50'              # espeak: 0 to 99
pause = 0.2                  # seconds of silence after each sentence
audio_format = 'flac'        # flac or wav, 16-bit
# the machine
workers = 0                  # processes; 0: one a core
seed = 1234
# -----------------------------------------------------------------------------

SAMPLE_RATE = 16000          # model.SAMPLE_RATE, not imported: espeak needs no torch, and starts at once
GRID = 640                   # samples in a 40 ms frame of a 25 Hz encoder

# --- the toy grammar ---------------------------------------------------------------------------------------------------------------

# noun, plural, pronoun class; kin follow the hero in S1
HEROES = dict(
    he='boy boys|man men|king kings|brother brothers|uncle uncles|farmer farmers',
    she='girl girls|woman women|queen queens|sister sisters|aunt aunts|lady ladies')
NAMES = dict(he='Tom Ben Max Jack Peter David', she='Anna Lucy Mary Emma Kate Susan')
KIN = 'dog cat friend father mother baby'.split()
ADJECTIVES = 'old young small tall little big happy kind clever funny brave quiet'.split()
COLOURS = 'red blue green yellow white black brown new'.split()
NUMBERS = 'two three four five six'.split()
PRONOUNS = dict(he=dict(he='he', his='his', him='him', self='himself'), she=dict(he='she', his='her', him='her', self='herself'),
                they=dict(he='they', his='their', him='them', self='themselves'))
IRREGULAR = dict(be='is', have='has', do='does', go='goes')

# topic: places | things (singular plural) | what is going on | [what happens | what follows from it] twice. [verb] is conjugated.
TOPICS = dict(
    picnic=(
        'in the park|on the hill|by the lake', 'basket baskets|blanket blankets|sandwich sandwiches',
        '{he} [want] a picnic on the grass|{he} [bring] bread and cheese for a picnic|{he} [put] the picnic under a tree',
        'the sky is blue and the sun is warm|the clouds go away and the sun is bright|a warm sun shines in the blue sky',
        '{he} [lie] in the warm sun and [smile]|{he} [eat] the picnic in the sunshine|{he} [play] on the dry grass in the sun',
        'dark clouds come and the rain is cold|the wind is strong and the rain falls|a cold rain falls from the dark clouds',
        '{he} [run] home in the cold rain|{he} [hide] from the rain in wet shoes|{he} [open] an umbrella in the dark rain'),
    pet=(
        'in the street|near the bridge|behind the house', 'puppy puppies|collar collars|kitten kittens',
        '{he} [look] for {his} lost puppy|{he} [call] the name of {his} puppy|{he} [ask] everyone about the lost puppy',
        'the puppy barks behind a door|a neighbour finds the puppy|the puppy jumps out of a bush and barks',
        '{he} [hug] the puppy and [kiss] its nose|{he} [give] the happy puppy a bone|{he} [carry] the puppy home and [laugh]',
        'nobody sees the puppy all night|the street is empty and there is no puppy|the puppy never comes back',
        '{he} [cry] for the puppy all night|{he} [go] home alone without the puppy|{he} [miss] the puppy and [cry]'),
    doctor=(
        'at the doctor|in the hospital|beside the nurse', 'pill pills|bandage bandages|bottle bottles',
        '{he} [have] a fever and a cough|{he} [tell] the doctor about the pain|{he} [show] the nurse {his} sore throat',
        'the medicine works and the fever is gone|the nurse says the pain is over|the doctor takes the fever away',
        '{he} [jump] out of bed and [feel] strong|{he} [thank] the doctor and [feel] healthy|{he} [leave] the hospital strong and healthy',
        'the fever is high and the cough is bad|the medicine is weak and the pain grows|the doctor says the cough is very bad',
        '{he} [stay] in bed with a bad cough|{he} [feel] weak and [sleep] in the hospital|{he} [shake] in bed with a high fever'),
    baking=(
        'in the kitchen|at the oven|in the bakery', 'cake cakes|spoon spoons|bowl bowls',
        '{he} [mix] butter and sugar for a cake|{he} [bake] a cake with eggs and flour|{he} [put] the cake into the oven',
        'the cake is golden and smells sweet|the sweet cake rises in the oven|the cake comes out soft and golden',
        '{he} [eat] the sweet cake with cream|{he} [cut] the golden cake into slices|{he} [share] the soft cake and the sweet cream',
        'black smoke comes out of the oven|the oven is too hot and the cake burns|the cake is black and smells of smoke',
        '{he} [throw] the burnt cake in the bin|{he} [cough] in the black smoke|{he} [scratch] black bits off the burnt cake'),
    garden=(
        'in the garden|beside the fence|near the well', 'seed seeds|pot pots|shovel shovels',
        '{he} [plant] seeds in the soil|{he} [dig] the soil for the seeds|{he} [water] the seeds in the garden',
        'green leaves grow out of the soil|the seeds grow into fresh flowers|fresh flowers open in the garden',
        '{he} [pick] the fresh flowers with joy|{he} [smell] the flowers and the green leaves|{he} [grow] more flowers in the green garden',
        'snails come and eat every leaf|the soil is dry and the plants die|hungry snails kill the plants',
        '{he} [pull] the dead plants from the dry soil|{he} [chase] the hungry snails away|{he} [burn] the dead dry plants'),
    school=(
        'at school|in the classroom|near the teacher', 'pencil pencils|book books|ruler rulers',
        '{he} [have] a test with many numbers|{he} [write] a test for the teacher|{he} [read] the questions in the test',
        'every answer is right|the answers are quick and right|the teacher likes every answer',
        '{he} [get] a gold star from the teacher|{he} [win] the best mark in the class|{he} [take] the gold star home with pride',
        'the pencil breaks and the answers are wrong|every number is wrong|the teacher finds too many mistakes',
        '{he} [fail] the test with many mistakes|{he} [must] write the wrong answers again|{he} [get] a low mark for the mistakes'),
    football=(
        'on the football field|beside the goal|in the stadium', 'ball balls|shirt shirts|whistle whistles',
        '{he} [play] football for {his} team|{he} [kick] the ball to the team|{he} [wear] the shirt of the football team',
        '{his} team scores the last goal|the ball flies into the goal and the team cheers|the team scores three goals',
        '{he} [lift] the silver cup with the team|{he} [cheer] and [kiss] the silver cup|{he} [dance] because the team wins the cup',
        'the other team scores nine times|the ball hits {his} foot and the others win|the other team is much too fast',
        '{he} [lose] the game without a prize|{he} [walk] off slowly after the lost game|{he} [kick] the mud because the others win'),
    fishing=(
        'on the boat|at the river|on the beach', 'net nets|hook hooks|bucket buckets',
        '{he} [throw] the net into the deep water|{he} [wait] for fish on the waves|{he} [hold] the line in the water',
        'a big fish pulls the line|the net is full of fish|many silver fish swim into the net',
        '{he} [fry] the big fish for dinner|{he} [sell] the full net of fish|{he} [cook] fish soup on the boat',
        'the net has a hole and is empty|no fish swims in the water|a shark bites the line in half',
        '{he} [sail] home with an empty net|{he} [eat] old bread for there is no fish|{he} [mend] the hole in the empty net'),
    birthday=(
        'at the birthday party|in the living room|beside the table', 'candle candles|balloon balloons|present presents',
        '{he} [turn] seven today and [wait] for guests|{he} [invite] everyone to the birthday|{he} [light] the birthday candles',
        'the guests come with songs and presents|the bell rings and all guests are here|music plays and the guests sing',
        '{he} [open] all the presents and [sing]|{he} [dance] with the guests to the music|{he} [unpack] a toy and [thank] the guests',
        'nobody rings the bell|no guests come and the house is silent|the guests forget the birthday',
        '{he} [blow] out the candles alone|{he} [sit] alone in the silent room|{he} [put] the plates away in silence'),
    train=(
        'at the station|on the platform|beside the train', 'ticket tickets|suitcase suitcases|map maps',
        '{he} [travel] to the city by train|{he} [buy] a ticket for the train|{he} [need] a train to the city',
        'the train comes early with free seats|the doors open and the seats are free|a fast train stops at the platform',
        '{he} [find] a seat by the window|{he} [ride] fast through the hills|{he} [look] out of the window of the fast train',
        'the clock is late and the train is gone|the train leaves without a sound|all trains stop because of snow',
        '{he} [sleep] on a bench in the snow|{he} [come] too late and [stand] in the snow|{he} [wait] for hours on the cold bench'),
    market=(
        'at the market|in the shop|in the village square', 'apple apples|carrot carrots|pear pears',
        '{he} [sell] fruit and eggs to people|{he} [bring] fresh fruit to the market|{he} [shout] the price of the fruit',
        'many people buy the fruit|people pay good money for the eggs|a rich lady buys everything',
        '{he} [count] the coins in {his} purse|{he} [go] to the bank with the money|{he} [fill] {his} purse with money and coins',
        'nobody stops and nobody buys|the eggs break and the fruit is bad|worms eat the bad fruit',
        '{he} [pack] the bad fruit back into boxes|{he} [push] the heavy boxes home|{he} [clean] the broken eggs off the boxes'),
    camping=(
        'in the forest|near the tent|on the mountain', 'lamp lamps|rope ropes|backpack backpacks',
        '{he} [build] a tent in the forest|{he} [camp] under the tall trees|{he} [gather] wood for the fire',
        'the stars shine and the fire is bright|the moon shines on the forest|the fire is warm and the stars are clear',
        '{he} [tell] tales under the moon and stars|{he} [roast] nuts over the bright fire|{he} [watch] the stars beside the fire',
        'a wolf howls near the tent|an angry bear comes to the tent|a bear and a wolf fight in the dark',
        '{he} [climb] a tree to escape the bear|{he} [scream] at the wolf|{he} [flee] from the angry bear'))


def conjugate(sentence, who):
    """'{he} [want] {his} ...' for who in he, she, they -> 'She wants her ...'"""
    def verb(match):
        stem = match[1]
        if who == 'they' or stem == 'must':
            return {'be': 'are'}.get(stem, stem)
        ending = 'es' if re.search('(s|sh|ch|x|z|o)$', stem) else 's'
        return IRREGULAR.get(stem) or (stem[:-1] + 'ies' if re.search('[^aeiou]y$', stem) else stem + ending)
    return re.sub(r'\[(\w+)\]', verb, sentence.format(**PRONOUNS[who]))


def finish(sentence):
    return sentence[0].upper() + sentence[1:] + '.'


def introduce(rng, topic, who):
    """The first sentence: who, where; one of ten patterns, half of them for one hero and half for several."""
    place, thing = rng.choice(TOPICS[topic][0].split('|')), rng.choice(TOPICS[topic][1].split('|')).split()
    he = who if who != 'they' else rng.choice(['he', 'she'])
    noun = rng.choice(HEROES[he].split('|')).split()[who == 'they']
    name, other = rng.sample(NAMES[he].split(), 2)
    adjective, colour, number, kin = rng.choice(ADJECTIVES), rng.choice(COLOURS), rng.choice(NUMBERS), rng.choice(KIN)
    his = PRONOUNS[he]['his']
    if who == 'they':
        return finish(rng.choice((
            f'these {noun} are {place}', f'these {adjective} {noun} are {place}', f'{number} {noun} are {place}', f'the {noun} are {place}',
            f'there are {number} {adjective} {noun} {place}', f'the {noun} have {number} {thing[1]} {place}', f'{name} and {other} are {place}',
            f'these {noun} have {number} {colour} {thing[1]} {place}', f'the {adjective} {noun} are {place} with these {thing[1]}')))
    return finish(rng.choice((
        f'this {noun} is {place}', f'this {adjective} {noun} is {place}', f'one {noun} is {place}', f'the {noun} is {place}',
        f'there is one {adjective} {noun} {place}', f'the {noun} has {his} {thing[0]} {place}', f'the {adjective} {noun} is {place} with {his} {kin}',
        f'{name} is {place} with {his} {kin}', f'this {noun} has {his} {colour} {thing[0]} {place}', f'the {noun} has one {colour} {thing[0]} {place}')))


def toy_story(rng, topic=None, outcome=None, who=None):
    """One story as dict: prompt (three sentences), ending, topic, outcome (0 or 1), who, endings: all that would follow from it."""
    topic = topic or rng.choice(list(TOPICS))
    outcome = rng.randrange(2) if outcome is None else outcome
    who = who or rng.choice(('he', 'she', 'they'))
    _, _, doing, *outcomes = (part.split('|') for part in TOPICS[topic])
    events, endings = outcomes[2 * outcome:2 * outcome + 2]
    prompt = [introduce(rng, topic, who), finish(conjugate(rng.choice(doing), who)), finish(conjugate(rng.choice(events), who))]
    return dict(prompt=' '.join(prompt), ending=finish(conjugate(rng.choice(endings), who)), topic=topic, outcome=outcome, who=who)


def toy_couple(rng, contradict, fresh):
    """Two stories with their endings exchanged: each ending is right once and wrong once, so that preferring an ending as such gains nothing."""
    who, topics = rng.choice(('he', 'she', 'they')), rng.sample(list(TOPICS), 2)
    one, two = (fresh(topics[0] if contradict else topics[i], i if contradict else None, who) for i in range(2))
    return [dict(one, wrong=two['ending']), dict(two, wrong=one['ending'])]


def toy_grammar_couple(rng):
    """Two minimal pairs (right, wrong, kind) that mirror each other: what is wrong in one is right in the other."""
    topic, he = rng.choice(list(TOPICS)), rng.choice(('he', 'she'))
    place = rng.choice(TOPICS[topic][0].split('|'))
    one, many = rng.choice(HEROES[he].split('|')).split()
    thing, things = rng.choice(TOPICS[topic][1].split('|')).split()
    adjective, number, kin = rng.choice(ADJECTIVES), rng.choice(NUMBERS), rng.choice(KIN)
    kind = rng.choice(('this', 'number', 'be', 'be', 'pronoun', 'have', 'gender'))
    if kind == 'this':
        a, b = rng.choice((('this {} is', 'these {} are'), (f'this {{}} has one {thing}', f'these {{}} have {number} {things}')))
        quad = [f'{a.format(one)} {place}', f'{b.format(one).replace(" are", " is").replace(" have", " has")} {place}',
                f'{b.format(many)} {place}', f'{a.format(many).replace(" is", " are").replace(" has", " have")} {place}']
    elif kind == 'number':
        quad = [f'there is one {one} {place}', f'there is one {many} {place}', f'there are {number} {many} {place}', f'there are {number} {one} {place}']
    elif kind == 'be':
        the = rng.choice(('the', f'the {adjective}'))
        quad = [f'{the} {one} is {place}', f'{the} {one} are {place}', f'{the} {many} are {place}', f'{the} {many} is {place}']
    elif kind == 'have':
        quad = [f'the {one} has {number} {things} {place}', f'the {one} have {number} {things} {place}',
                f'the {many} have {number} {things} {place}', f'the {many} has {number} {things} {place}']
    elif kind == 'gender':
        man, woman = (rng.choice(HEROES[x].split('|')).split()[0] for x in ('he', 'she'))
        quad = [f'the {x} has {y} {thing} {place}' for x, y in ((man, 'his'), (man, 'her'), (woman, 'her'), (woman, 'his'))]
    else:
        doing = rng.choice([d for d in TOPICS[topic][2].split('|') if d.startswith('{he} [')])
        lead = [f'the {one} is {place}', f'the {many} are {place}']
        quad = [f'{lead[i]}. {finish(conjugate(doing, who))[:-1]}' for i, who in ((0, he), (0, 'they'), (1, 'they'), (1, he))]
    quad = [finish(sentence) for sentence in quad]
    return [dict(right=quad[0], wrong=quad[1], kind=kind), dict(right=quad[2], wrong=quad[3], kind=kind)]


def toy_items(task):
    """Items of a task. Every task is drawn in the same order whatever is asked for, and no prompt is drawn twice: nothing is shared among them."""
    rng, used, held_out = random.Random(f'{seed}/toy'), set(), set()

    def fresh(*what):
        while True:
            story = toy_story(rng, *what)
            parts = sentences(story['prompt'])
            if story['prompt'] not in used and not held_out & {*parts, ' '.join(parts[:2])}:
                used.add(story['prompt'])
                return story

    def sides(right, wrong):
        return [dict(name='{n:06d}_correct', text=right, correct=True), dict(name='{n:06d}_incorrect', text=wrong, correct=False)]

    while len(held_out) < n_suite:
        couple = toy_grammar_couple(rng)
        for one in couple if not {one['right'] for one in couple} & held_out else ():
            held_out.add(one['right'])
            if task == 'grammar':
                yield dict(files=sides(one['right'], one['wrong']), type=one['kind'])
    for suite, contradict in (('sstory', True), ('tstory', False)):
        for _ in range(n_suite // 2):
            for story in toy_couple(rng, contradict, fresh):
                if task == suite:
                    yield dict(files=sides(f'{story["prompt"]} {story["ending"]}', f'{story["prompt"]} {story["wrong"]}'), type=story['topic'])
    for i in range(n_pairs // 2):
        for story in toy_couple(rng, i % 2 == 0, fresh):
            if task == 'pairs':
                yield dict(one_row=True, split=True, files=[dict(name=f'{{n:06d}}_{role}', role=role, text=what) for role, what in (
                    ('prompt', story['prompt']), ('chosen', story['ending']), ('rejected', story['wrong']))])
    for _ in range(n_stories if task == 'stories' else 0):
        story = fresh()
        yield dict(files=[dict(name='{n:06d}', text=f'{story["prompt"]} {story["ending"]}')], split=True)


# --- text --------------------------------------------------------------------------------------------------------------------------

def sentences(document):
    return re.split(r'(?<=[.!?])\s+', document.strip())


# --- voices: speak(texts, voice, speed, pitch) -> [(wave, rate, [[word, start s, end s], ...] or None), ...] ------------------------

def load_espeak():
    """espeak-ng in this process, by ctypes; the library and its data come with the package espeakng-loader."""
    import _ctypes
    import ctypes

    import espeakng_loader

    class Event(ctypes.Structure):  # espeak_EVENT of speak_lib.h
        _fields_ = [(name, ctypes.c_int) for name in 'type identifier text_position length audio_position sample'.split()] + [
            ('user_data', ctypes.c_void_p), ('id', ctypes.c_char * 8)]

    path, data = espeakng_loader.get_library_path(), espeakng_loader.get_data_path().encode()
    chunks, marks, library = [], [], None

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(Event))
    def receive(wave, n, events):
        if wave and n > 0:
            chunks.append(ctypes.string_at(wave, 2 * n))
        i = 0
        while events[i].type:
            if events[i].type == 1:  # espeakEVENT_WORD
                marks.append((events[i].text_position - 1, events[i].sample))
            i += 1
        return 0

    def speak(texts, voice, speed=1.0, pitch=50):
        nonlocal library
        if library:  # flutter and noise go on where the last utterance left them, even through Terminate: only a library loaded anew starts anew
            library.espeak_Terminate()
            _ctypes.dlclose(library._handle)
        library = ctypes.CDLL(path)
        rate = library.espeak_Initialize(2, 10000, data, 0x8000)  # synchronous, buffers of 10 s, never exit()
        if rate <= 0 or library.espeak_ng_SetVoiceByName(voice.encode()):
            fail(f'espeak-ng has no voice {voice!r}: name a language (en-us, de, fr ...), with a variant if you like (en-us+f2)')
        library.espeak_SetSynthCallback(receive)
        library.espeak_SetParameter(1, round(175 * speed), 0)
        library.espeak_SetParameter(3, round(pitch), 0)
        results = []
        for sentence in texts:
            chunks.clear(), marks.clear()
            encoded = sentence.encode() + b'\0'
            library.espeak_Synth(encoded, len(encoded), 0, 1, 0, 1, None, None)
            wave = np.frombuffer(b''.join(chunks), np.int16).astype(np.float32) / 32768
            results.append((wave, rate, word_times(sentence, wave, rate, marks)))
        return results
    return speak


def word_times(sentence, wave, rate, marks):
    """[[word, start s, end s], ...] from marks [(character, sample), ...]. A word without a mark shares the time of the one before by letters."""
    spans = [(match[0], match.start(), match.end()) for match in re.finditer(r'\S+', sentence)]
    starts = [next((sample for at, sample in marks if begin <= at < end), None) for _, begin, end in spans] + [len(wave)]
    starts[0] = starts[0] or 0
    for i in range(1, len(spans)):
        if starts[i] is None or starts[i] < starts[i - 1]:
            j = next(j for j in range(i + 1, len(starts)) if starts[j] is not None and starts[j] >= starts[i - 1])
            share = len(spans[i - 1][0]) / sum(len(span[0]) for span in spans[i - 1:j])
            starts[i] = starts[i - 1] + round(share * (starts[j] - starts[i - 1]))
    loud = np.abs(wave) > SILENCE
    words = []
    for (word, _, _), begin, end in zip(spans, starts, starts[1:]):
        sounding = np.flatnonzero(loud[begin:end])  # a word ends where its sound does, not after the pause of a comma
        words.append([word, begin / rate, (begin + sounding[-1] + 1 if len(sounding) else end) / rate])
    return words


# --- waves -------------------------------------------------------------------------------------------------------------------------

SILENCE = 0.002  # of full scale; below it is pause


@lru_cache
def filter_bank(rate, taps=32):
    """What `resample` multiplies by: (L outputs, M inputs, half a filter's length in inputs, [(first output, its first input, kernel), ...])."""
    g = math.gcd(rate, SAMPLE_RATE)
    repeat = -(-320 * g // SAMPLE_RATE)             # a period of at least 320 outputs
    L, M, bank = SAMPLE_RATE // g * repeat, rate // g * repeat, []
    step = M / L
    half = math.ceil(taps * max(1.0, step))
    for first in range(0, L, 40):                   # 40 outputs span about as many inputs as a filter is long: little of a matrix is zero
        outputs, low = np.arange(first, min(first + 40, L)), int(first * step)
        t = np.arange(low - half, int(outputs[-1] * step) + half + 1)[:, None] - outputs * step              # (width, outputs) inputs from the centre
        cutoff = 0.94 * min(1.0, 1 / step)          # of the input's Nyquist frequency: 7.5 kHz for 16 kHz
        kernel = cutoff * np.sinc(cutoff * t) * np.i0(9 * np.sqrt(np.maximum(0, 1 - (t / half) ** 2))) / np.i0(9) * (np.abs(t) < half)
        bank.append((first, low, kernel.astype(np.float32)))
    return L, M, half, bank


def resample(wave, rate):
    """(n,) float32 at `rate` -> (ceil(n * 16000 / rate),) at 16 kHz by a Kaiser-windowed sinc.

    The filter's phases repeat every L outputs = M inputs, so a stretch of outputs is one matrix product with overlapping frames of the input.
    """
    if rate == SAMPLE_RATE:
        return wave
    L, M, half, bank = filter_bank(rate)
    n = -(-len(wave) * L // M)
    blocks = -(-n // L)
    padded = np.zeros((blocks + 1) * M + 2 * half, np.float32)
    padded[half:half + len(wave)] = wave
    result = np.empty((blocks, L), np.float32)
    for first, low, kernel in bank:
        frames = np.lib.stride_tricks.as_strided(padded[low:], (blocks, len(kernel)), (4 * M, 4))
        result[:, first:first + kernel.shape[1]] = frames @ kernel
    return result.reshape(-1)[:n]


def assemble(spoken):
    """[(wave, rate, words), ...], one a sentence -> (wave at 16 kHz, words or None): trimmed, joined, each followed by the pause."""
    waves, words, at = [], [], 0.0
    for wave, rate, times in spoken:
        sounding = np.flatnonzero(np.abs(wave) > SILENCE)
        if not len(sounding):
            continue
        start, end = sounding[0], sounding[-1] + 1
        piece = resample(wave[start:end], rate)
        length = -(-(len(piece) + round(pause * SAMPLE_RATE)) // GRID) * GRID
        waves.append(np.pad(piece, (0, length - len(piece))))
        words += [[word, round(at + max(0, a - start / rate), 3), round(at + (min(b, end / rate) - start / rate), 3)] for word, a, b in times or ()]
        at += length / SAMPLE_RATE
    return np.concatenate(waves or [np.zeros(0, np.float32)]), words if all(times is not None for _, _, times in spoken) else None


def save(path, wave):
    """16-bit audio, whole or not at all; louder than full scale is scaled down, never clipped. Returns its size in bytes."""
    wave = wave / max(1.0, float(np.abs(wave).max()))
    soundfile.write(path + '.tmp', np.round(wave * 32767).astype(np.int16), SAMPLE_RATE, format=audio_format.upper(), subtype='PCM_16',
                    **(dict(compression_level=0.0) if audio_format == 'flac' else {}))
    os.replace(path + '.tmp', path)
    return os.path.getsize(path)


# --- the work ----------------------------------------------------------------------------------------------------------------------

speak = None


def do_shard(job):
    """Speak and save some items of a task. Returns dict(shard, rows, skipped, seconds, bytes): what the journal keeps of them."""
    global speak
    shard, task, items = job
    speak = speak or dict(espeak=load_espeak)[tts]()
    done = dict(shard=shard, rows=[], skipped=[], seconds=0.0, bytes=0)
    for n, item in items:
        rng = random.Random(f'{seed}/{task}/{item.get("alike", n)}')  # a couple of minimal pairs has one voice
        voice = rng.choice(voices.split(','))
        how = [rng.uniform(*map(float, span.split('-'))) for span in (speed, pitch)]
        rows, keep = [], {key: value for key, value in item.items() if key not in ('files', 'one_row', 'split', 'alike')}
        if item.get('split'):
            keep['split'] = 'val' if random.Random(f'{seed}/{task}/{n}/split').random() < val_share else 'train'
        for file in item['files']:
            wave, words = assemble(speak(sentences(file['text']), voice, *how))
            if not len(wave):
                done['skipped'].append(dict(n=n, reason='nothing to hear', text=file['text']))
                rows = []
                break
            name = f'{n // (1000 // len(item["files"])):03d}/{file["name"].format(n=n)}.{audio_format}'
            done['bytes'] += save(os.path.join(out, task, name), wave)
            done['seconds'] += len(wave) / SAMPLE_RATE
            row = dict(path=name, text=file['text'], seconds=round(len(wave) / SAMPLE_RATE, 3), words=words)
            rows.append({f'{file["role"]}_{key}' if 'role' in file else key: value for key, value in row.items()}
                        | {key: value for key, value in file.items() if key not in ('name', 'role', 'text')})
        rows = [{key: value for row in rows for key, value in row.items()}] if rows and item.get('one_row') else rows
        done['rows'] += [dict(row, voice=voice, **keep) for row in rows]
    return done


if __name__ == '__main__':
    config = configure(globals())
    import multiprocessing
    from itertools import islice

    from tqdm import tqdm

    for task_name in task.split(','):
        folder, began = os.path.join(out, task_name), time.time()
        manifest = os.path.join(folder, 'manifest.jsonl')
        items = enumerate(toy_items(task_name))
        shards = iter(lambda: list(islice(items, 40)), [])
        jobs = []
        for i, shard in enumerate(shards):
            for n, item in shard:
                os.makedirs(os.path.join(folder, f'{n // (1000 // len(item["files"])):03d}'), exist_ok=True)
                if task_name in ('grammar', 'sstory', 'tstory'):
                    item.update(alike=n // 2, pair=n)
            jobs.append((i, task_name, shard))
        with multiprocessing.get_context('fork').Pool(workers or os.cpu_count()) as pool, tqdm(total=len(jobs), desc=task_name) as bar:
            results = []
            for done in pool.imap_unordered(do_shard, jobs):
                results.append(done)
                bar.update()
        results.sort(key=lambda done: done['shard'])
        with open(manifest + '.tmp', 'w', encoding='utf-8') as file:
            file.writelines(json.dumps(row) + '\n' for done in results for row in done['rows'])
        os.replace(manifest + '.tmp', manifest)
        seconds = sum(done['seconds'] for done in results)
        print(f'{task_name}: {sum(len(done["rows"]) for done in results)} rows, {seconds / 3600:.2f} h, {sum(len(d["skipped"]) for d in results)} skipped, '
              f'{sum(d["bytes"] for d in results) / 1e6:.0f} MB, {time.time() - began:.1f} s, {seconds / (time.time() - began):.0f} x real time')
