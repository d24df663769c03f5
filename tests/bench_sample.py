"""The table vocoder beside plain Griffin-Lim, on one core: python tests/bench_sample.py DATA_FOLDER AUDIO_FOLDER

DATA_FOLDER: of prepare_units.py (encoder/, vocoder/). AUDIO_FOLDER: speech it was not fitted on. Prints x real time, the share of frames
whose unit comes back, and harmonicity: the height of the pitch peak of the autocorrelation in loud frames (1: a pure voice, 0.4: a whisper).
"""

import os
import sys
import time

import torch
import torchaudio

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import model as M
import sample


def harmonicity(wave):
    frames = wave.unfold(0, 640, 160) * torch.hann_window(640)
    energy = frames.square().mean(1)
    r = torch.fft.irfft(torch.fft.rfft(frames[energy > energy.quantile(0.6)], 1280).abs() ** 2)
    own = torch.fft.irfft(torch.fft.rfft(torch.hann_window(640), 1280).abs() ** 2)
    return float((r / r[:, :1] * own[0] / own)[:, 40:230].max(1).values.mean())


@torch.inference_mode()
def plain(mel, iterations=32):
    """The usual recipe: pseudo-inverse of the mel filters, random phases, 32 rounds. (n, N_MELS) -> (n * HOP,)"""
    power = (mel.exp() @ torch.linalg.pinv(M.mel_filters())).clamp(min=0)
    power = torch.cat((power[:1], power[:-1], power[-1:])).T  # centred frames: one more
    torch.manual_seed(0)
    return torchaudio.functional.griffinlim(
        power,
        torch.hann_window(M.WINDOW),
        M.N_FFT,
        M.HOP,
        M.WINDOW,
        power=2.0,
        n_iter=iterations,
        momentum=0.99,
        length=len(mel) * M.HOP,
        rand_init=True,
    )


torch.set_num_threads(1)
data, audio = sys.argv[1:3]
encoder, vocoder = (
    M.UnitEncoder.from_pretrained(data + '/encoder'),
    M.UnitVocoder.from_pretrained(data + '/vocoder'),
)
waves = [M.load_audio(p['path']) for p in sample.find_prompts(audio, 'val', 40)]
units = encoder.encode(waves)
print(f'{"":<22}{"x real time":>12}{"frames kept":>13}{"harmonicity":>13}')
print(f'{"the recordings":<22}{"":>12}{"":>13}{sum(map(harmonicity, waves)) / len(waves):>13.3f}')
speeds = []
for name in ('plain, 32 rounds', 'ours'):
    vocoder.decode([units[0]], [torch.ones_like(units[0])])
    start = time.perf_counter()
    if name == 'ours':
        out = vocoder.decode(units, [torch.ones_like(u) for u in units])
    else:
        out = [M.finish_wave(plain(vocoder.tensors['mel'][u].flatten(0, 1))) for u in units]
    seconds = time.perf_counter() - start
    again = encoder.encode(out)
    kept = sum(int((a[: len(u)] == u[: len(a)]).sum()) for a, u in zip(again, units)) / sum(
        map(len, units)
    )
    speeds.append(sum(map(len, out)) / 16000 / seconds)
    print(
        f'{name:<22}{speeds[-1]:>12.0f}{100 * kept:>11.1f} %{sum(map(harmonicity, out)) / len(out):>13.3f}'
    )
print(f'{"ratio":<22}{speeds[1] / speeds[0]:>12.1f}')
