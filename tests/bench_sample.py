"""The vocoders of a data folder beside plain Griffin-Lim, on one core, on held-out speech.

    python tests/bench_sample.py DATA_FOLDER AUDIO_FOLDER [VOCODER ...]

DATA_FOLDER: of prepare_units.py (encoder/, vocoder/). AUDIO_FOLDER: with a manifest, whose split
val it was not fitted on. Prints x real time, the share of frames whose unit comes back, the mean
difference of the log-mel from the recordings' in nats, harmonicity (the height of the pitch peak of
the autocorrelation in loud frames: 1 a pure voice, 0.4 a whisper), and of a stream the seconds to
the first sound and the energy at its joints against the whole, in dB, at worst.
"""

import os
import sys
import time

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import model as M
import sample


def harmonicity(wave):
    window = torch.hann_window(640)
    frames = wave.unfold(0, 640, 160) * window
    energy = frames.square().mean(1)
    r = torch.fft.irfft(torch.fft.rfft(frames[energy > energy.quantile(0.6)], 1280).abs() ** 2)
    own = torch.fft.irfft(torch.fft.rfft(window, 1280).abs() ** 2)
    return float((r / r[:, :1] * own[0] / own)[:, 40:230].max(1).values.mean())


def plain_griffin_lim(mel, iterations=32):
    """The usual recipe: pseudo-inverse of the mel filters, random phases, 32 rounds with momentum
    (Perraudin et al. 2013). (n, N_MELS) -> (n * HOP,)"""
    power = (mel.exp() @ torch.linalg.pinv(M.mel_filters())).clamp(min=0)
    magnitude = torch.cat((power[:1], power[:-1], power[-1:])).T.sqrt()  # centred: one frame more
    how = dict(n_fft=M.N_FFT, hop_length=M.HOP, win_length=M.WINDOW)
    how['window'] = torch.hann_window(M.WINDOW)
    phase = torch.rand(magnitude.shape, generator=torch.Generator().manual_seed(0))
    phase, before = torch.polar(torch.ones_like(phase), 2 * torch.pi * phase), 0
    for _ in range(iterations):
        wave = torch.istft(magnitude * phase, length=len(mel) * M.HOP, **how)
        now = torch.stft(wave, return_complex=True, **how)
        phase = now - 0.99 / 1.99 * before
        phase, before = phase / phase.abs().clamp(min=1e-16), now
    return torch.istft(magnitude * phase, length=len(mel) * M.HOP, **how)


def log_mel_error(wave, real):
    """Nats; both at one level."""
    real = real[: len(wave)] * (M.speech_level(wave) / M.speech_level(real))
    n = len(real) // M.HOP
    return float((M.log_mel(wave)[:n] - M.log_mel(real)[:n]).abs().mean())


def measure(name, speak, pairs, waves, encoder):
    """Print a row for a function (units, durations) -> wave."""
    speak(*pairs[0])
    start = time.perf_counter()
    spoken = [speak(units, durations) for units, durations in pairs]
    speed = sum(map(len, spoken)) / 16000 / (time.perf_counter() - start)
    same = frames = 0
    for (u, d), again in zip(pairs, encoder.encode(spoken), strict=True):
        was = u.repeat_interleave(d)[: len(again)]
        same, frames = same + int((again[: len(was)] == was).sum()), frames + int(d.sum())
    error = sum(map(log_mel_error, spoken, waves)) / len(waves)
    voice = sum(map(harmonicity, spoken)) / len(spoken)
    print(f'{name:<26}{speed:>8.0f}{100 * same / frames:>11.1f} %{error:>12.3f}{voice:>13.3f}')
    return speed


def measure_stream(vocoder, units):
    start, first, pieces = time.perf_counter(), None, []
    for piece in vocoder.stream(units.split(9)):
        first = first or time.perf_counter() - start
        pieces.append(piece)
    wave, worst = torch.cat(pieces), 0.0
    whole = vocoder.voice.speak(units, vocoder.durations([units])[0])
    whole = M.limit_peaks(whole * (M.VOICE_LEVEL / vocoder.voice.level))
    for joint in torch.tensor([len(piece) for piece in pieces]).cumsum(0)[:-1].tolist():
        here, there = (x[joint - 40 : joint + 40].square().mean() + 1e-9 for x in (wave, whole))
        worst = max(worst, abs(float(10 * torch.log10(here / there))))
    print(f'{"  as a stream":<26}first sound after {first:.3f} s, joints within {worst:.3f} dB')


if __name__ == '__main__':
    torch.set_num_threads(1)
    data, audio, *others = sys.argv[1:]
    encoder = M.UnitEncoder.from_pretrained(data + '/encoder')
    found = sample.find_prompts(audio, 'val', 40)
    waves = [M.load_audio(p.path) for p in found]
    pairs = [M.dedup(units) for units in encoder.encode(waves)]
    with torch.inference_mode():
        print(f'{"":<26}{"x real":>8}{"kept":>13}{"log-mel":>12}{"harmonic":>13}')
        table = M.UnitVocoder.from_pretrained(data + '/vocoder')
        if table.config['kind'] == 'table':

            def plain(units, durations):
                mel = table.tensors['mel'][units.repeat_interleave(durations)]
                return M.finish_wave(plain_griffin_lim(mel.flatten(0, 1)))

            slow = measure('plain Griffin-Lim', plain, pairs, waves, encoder)
        for where in (data + '/vocoder', *others):
            vocoder = M.UnitVocoder.from_pretrained(where)
            kind = vocoder.config['kind']

            def ours(units, durations, vocoder=vocoder):
                return vocoder.decode([units], [durations])[0]

            speed = measure(f'{kind}, ours', ours, pairs, waves, encoder)
            if table.config['kind'] == 'table':
                print(f'{"  ratio":<26}{speed / slow:>8.1f}')
            measure_stream(vocoder, pairs[0][0])
