"""make_synthetic.py, espeak in process, against one espeak-ng process for each utterance.

    python tests/bench_synthetic.py [stories]

The alternative is a shell loop: `espeak-ng -w file.wav TEXT`, and then a resampler. Its program is
in the Debian package espeak-ng. Without it, only this repository's speed is measured.
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


def bench_alone(texts, folder):
    """Seconds of speech a second by a process for each utterance, one after the other."""
    began, seconds = time.time(), 0.0
    for i, text in enumerate(texts):
        path = os.path.join(folder, f'{i}.wav')
        subprocess.run(['espeak-ng', '-v', 'en+m3', '-s', '175', '-w', path, text], check=True)
        wave, rate = soundfile.read(path, dtype='float32')
        soundfile.write(path.replace('.wav', '.flac'), resample(wave, rate, 16000).numpy(), 16000)
        seconds += len(wave) / rate
    return seconds / (time.time() - began)


def bench_ours(stories, workers, folder):
    """What summary.json says of so many stories."""
    command = [sys.executable, 'make_synthetic.py', f'--n_stories={stories}', f'--out={folder}']
    command += [f'--workers={workers}', f'--voices={VOICE}', '--n_pairs=0', '--n_suite=0']
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    with open(os.path.join(folder, 'stories', 'summary.json')) as file:
        return json.load(file)


if __name__ == '__main__':
    torch.set_num_threads(1)
    stories = int(sys.argv[1]) if len(sys.argv) > 1 else 600
    alone = None
    with tempfile.TemporaryDirectory() as folder:
        if shutil.which('espeak-ng'):
            alone = bench_alone([row['text'] for row in toy_rows('stories', 1, 100, 0, 0)], folder)
            print(f'one process for each utterance, one at a time {alone:7.0f} x real time')
        for workers in sorted({1, os.cpu_count()}):
            made = bench_ours(stories * workers, workers, os.path.join(folder, str(workers)))
            name = f'make_synthetic.py, {workers} workers, {made["hours"]:.2f} h'
            rate = made['x_real_time']
            times = f', {rate / alone:.1f} x' if alone else ''
            print(f'{name:<45} {rate:7.0f} x real time{times}')
