"""Audio and UnitEncoder of model.py; the oracles are closed forms, torchaudio and transformers."""

import numpy as np
import pytest
import torch

from model import resample


@pytest.fixture(autouse=True)
def one_thread():
    torch.manual_seed(0)
    torch.set_num_threads(1)


# ---------------------------------------------------------------------------- resampling


def windowed_sinc(wave, rate, wanted):
    """The definition, sample by sample, in float64."""
    cutoff, at = 0.99 * min(1, wanted / rate), np.arange(len(wave))
    out = []
    for j in range(-(-len(wave) * wanted // rate)):
        t = cutoff * (at - j * rate / wanted)
        window = np.where(np.abs(t) < 6, np.cos(np.pi * t / 12) ** 2, 0)
        out.append(cutoff * (wave * np.sinc(t) * window).sum())
    return np.array(out)


RATES = [(r, 16000) for r in (8000, 11025, 22050, 24000, 44100, 48000)] + [(16000, 24000)]


@pytest.mark.parametrize(('rate', 'wanted'), [*RATES, (16000, 22050), (11127, 16000)])
def test_resample_is_the_windowed_sinc(rate, wanted):
    for samples in (0, 1, 7, 1999):
        wave = np.random.default_rng(samples).uniform(-1, 1, samples)
        ours = resample(wave, rate, wanted).numpy()
        theirs = windowed_sinc(wave, rate, wanted)
        assert len(ours) == len(theirs)
        assert np.allclose(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize(('rate', 'wanted'), RATES)
def test_resample_equals_torchaudio(rate, wanted):
    torchaudio = pytest.importorskip('torchaudio', exc_type=(ImportError, OSError))
    for samples in (1, 12345, 3 * rate):
        wave = 0.3 * torch.randn(samples)
        # in float32 torchaudio rounds its filter's phases: 1e-5 at 22,050 Hz
        theirs = torchaudio.functional.resample(wave.double(), rate, wanted).float()
        ours = resample(wave, rate, wanted)
        assert ours.shape == theirs.shape and ours.dtype == torch.float32
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-6)
