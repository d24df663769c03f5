"""make_synthetic.py, espeak in process, against one espeak-ng process an utterance.   python tests/bench_synthetic.py [hours]

The alternative is what a shell loop does: `espeak-ng -w file.wav TEXT` and then a resampler (torchaudio's). Its program is in the Debian package
espeak-ng (apt-get install espeak-ng); without it the bench starts this Python's own library once a process instead, and says so.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, ROOT := os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from config.toy_grammar import toy_rows

import soundfile
import torch
import torchaudio

torch.set_num_threads(1)
texts = [row['text'] for row in toy_rows('stories', 1, 100, 0, 0)]
hours = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0

with tempfile.TemporaryDirectory() as folder:
    program = shutil.which('espeak-ng')
    if not program:
        print(
            'no program espeak-ng here (apt-get install espeak-ng): timing a Python process an utterance instead, which is slower to start'
        )
    began, seconds = time.time(), 0.0
    for i, text in enumerate(texts):
        path = os.path.join(folder, f'{i}.wav')
        if program:
            subprocess.run([program, '-v', 'en+m3', '-s', '175', '-w', path, text], check=True)
        else:
            subprocess.run(
                [
                    sys.executable,
                    '-c',
                    'import sys, make_synthetic as ms, soundfile\nwave, rate, _ = ms.Espeak()([sys.argv[1]], '
                    '"gmw/en+m3")[0]\nsoundfile.write(sys.argv[2], wave, rate)',
                    text,
                    path,
                ],
                check=True,
                cwd=ROOT,
            )
        wave, rate = soundfile.read(path, dtype='float32')
        soundfile.write(
            path.replace('.wav', '.flac'),
            torchaudio.functional.resample(torch.from_numpy(wave), rate, 16000).numpy(),
            16000,
        )
        seconds += len(wave) / rate
    alone = seconds / (time.time() - began)
    print(f'one process an utterance, one at a time      {alone:7.0f} x real time')
    for workers in (1, os.cpu_count()):
        n = round(hours * 600 * workers)
        subprocess.run(
            [
                sys.executable,
                'make_synthetic.py',
                f'--out={folder}/{workers}',
                f'--n_stories={n}',
                '--n_pairs=0',
                '--n_suite=0',
                '--voices=gmw/en+m3',
                f'--workers={workers}',
            ],
            cwd=ROOT,
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        summary = json.load(open(f'{folder}/{workers}/stories/summary.json'))
        ratio = summary['x_real_time'] / alone
        print(
            f'make_synthetic.py, {workers} worker{"s" * (workers > 1)}, {summary["hours"]:.2f} h      {summary["x_real_time"]:7.0f} x real time, {ratio:.1f} x'
        )
