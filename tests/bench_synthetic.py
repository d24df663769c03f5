"""make_synthetic.py, espeak in process, against one espeak-ng process an utterance.

    python tests/bench_synthetic.py [hours]

The alternative is what a shell loop does: `espeak-ng -w file.wav TEXT`, and then a resampler. Its
program is in the Debian package espeak-ng (apt-get install espeak-ng); without it the bench starts
the library of this Python once a process instead, and says so.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, ROOT := os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import soundfile
import torch

from make_synthetic import toy_rows
from model import resample

VOICE = 'gmw/en+m3'
ALONE = """
import sys, ctypes, espeakng_loader, soundfile, numpy
library = ctypes.CDLL(espeakng_loader.get_library_path())
rate = library.espeak_Initialize(2, 10000, espeakng_loader.get_data_path().encode(), 0)
library.espeak_ng_SetVoiceByName(sys.argv[1].encode())
chunks = []
@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
def receive(samples, length, events):
    if samples and length > 0:
        chunks.append(ctypes.string_at(samples, 2 * length))
    return 0
library.espeak_SetSynthCallback(receive)
library.espeak_Synth(sys.argv[3].encode(), len(sys.argv[3]) + 1, 0, 1, 0, 1, None, None)
soundfile.write(sys.argv[2], numpy.frombuffer(b''.join(chunks), numpy.int16), rate)
"""


def bench_alone(texts, folder):
    """x real time of a process an utterance, one after the other."""
    program = shutil.which('espeak-ng')
    if not program:
        print(
            'no program espeak-ng here (apt-get install espeak-ng): a Python process an utterance'
        )
    began, seconds = time.time(), 0.0
    for i, text in enumerate(texts):
        path = os.path.join(folder, f'{i}.wav')
        command = [program, '-v', 'en+m3', '-s', '175', '-w', path, text]
        if not program:
            command = [sys.executable, '-c', ALONE, VOICE, path, text]
        subprocess.run(command, check=True)
        wave, rate = soundfile.read(path, dtype='float32')
        soundfile.write(path.replace('.wav', '.flac'), resample(wave, rate, 16000).numpy(), 16000)
        seconds += len(wave) / rate
    return seconds / (time.time() - began)


def bench_ours(stories, workers, folder):
    """What summary.json says of so many stories."""
    command = [
        *(sys.executable, 'make_synthetic.py', f'--n_stories={stories}', f'--workers={workers}'),
        *(f'--voices={VOICE}', '--n_pairs=0', '--n_suite=0', f'--out={folder}'),
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    with open(os.path.join(folder, 'stories', 'summary.json')) as file:
        return json.load(file)


if __name__ == '__main__':
    torch.set_num_threads(1)
    hours = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0
    texts = [row['text'] for row in toy_rows('stories', 1, 100, 0, 0)]
    with tempfile.TemporaryDirectory() as folder:
        alone = bench_alone(texts, folder)
        print(f'one process an utterance, one at a time      {alone:7.0f} x real time')
        for workers in sorted({1, os.cpu_count()}):
            made = bench_ours(round(hours * 600 * workers), workers, f'{folder}/{workers}')
            name = f'make_synthetic.py, {workers} workers, {made["hours"]:.2f} h'
            rate = made['x_real_time']
            print(f'{name:<44} {rate:7.0f} x real time, {rate / alone:.1f} x')
