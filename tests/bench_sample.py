"""What a voice keeps of held-out speech, on one core, beside 32 rounds of plain Griffin-Lim.

    python tests/bench_sample.py DATA_FOLDER AUDIO_FOLDER [N]

DATA_FOLDER: of prepare_units.py, with encoder/ and vocoder/. AUDIO_FOLDER has a manifest, of whose
split val the first N (20) recordings are used. Prints for each way: times real time, the share of
frames whose unit comes back, and the mean difference of the log-mel from the recording's in nats.
"""

import os
import sys
import time

import torch
from torchaudio.transforms import GriffinLim, Spectrogram

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import model as M
import sample


def plain(wave):
    """Griffin-Lim of the recording's own power spectrogram: no units, the ceiling of the method."""
    sizes = dict(n_fft=512, win_length=400, hop_length=160)
    return GriffinLim(**sizes)(Spectrogram(**sizes)(wave))


def log_mel_error(wave, real):
    """Nats, without a difference of level."""
    n = min(len(wave), len(real))
    gap = M.log_mel(wave[:n]) - M.log_mel(real[:n])
    return float((gap - gap.mean()).abs().mean())


if __name__ == '__main__':
    torch.set_num_threads(1)
    data, audio, *n = sys.argv[1:]
    encoder = M.UnitEncoder.from_pretrained(data + '/encoder')
    vocoder = M.UnitVocoder.from_pretrained(data + '/vocoder')
    prompts, _ = sample.find_prompts(audio, 'val', int(n[0]) if n else 20)
    waves = [M.load_audio(p.path) for p in prompts]
    units = [encoder.encode(wave) for wave in waves]
    ways = {
        'our voice': lambda wave, units: vocoder.decode(*M.dedup(units)),
        'Griffin-Lim of the recording': lambda wave, units: plain(wave),
    }
    print(f'{"":<30}{"x real":>8}{"kept":>10}{"log-mel":>10}')
    for name, speak in ways.items():
        speak(waves[0], units[0])
        begin = time.perf_counter()
        spoken = [speak(*pair) for pair in zip(waves, units, strict=True)]
        speed = sum(map(len, waves)) / 16000 / (time.perf_counter() - begin)
        kept, frames = 0, 0
        for before, wave in zip(units, spoken, strict=True):
            again = encoder.encode(wave)[: len(before)]
            kept, frames = kept + int((again == before[: len(again)]).sum()), frames + len(before)
        error = sum(map(log_mel_error, spoken, waves)) / len(waves)
        print(f'{name:<30}{speed:>8.0f}{100 * kept / frames:>9.1f}%{error:>10.3f}')
