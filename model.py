"""The three networks and how they load and save.

    SLM           units -> next unit     a transformer over speech units, the same function as transformers' qwen2, llama, opt, gpt-neox
    UnitEncoder   wave  -> units         HuBERT-like features, or MFCC offline, and k-means
    UnitVocoder   units -> wave          the unit HiFi-GAN, or offline a table of spectra and Griffin-Lim
"""
import torch

PAD, BOS, EOS, OFFSET = 0, 1, 1, 2  # <S> is both ends of an utterance; unit u is token u + OFFSET
SAMPLE_RATE = 16000


class InputError(ValueError):
    """Something the user can mend; scripts print it as one line and exit with code 2."""


def pick_device(device='auto'):
    """'auto' -> cuda, else mps, else cpu; anything else as torch.device reads it."""
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    return torch.device(device)


def pick_dtype(dtype, device):
    """'auto' -> bfloat16 on cuda, float32 elsewhere; else the torch dtype of that name."""
    if dtype == 'auto':
        return torch.bfloat16 if torch.device(device).type == 'cuda' else torch.float32
    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise InputError(f'dtype {dtype!r} is unknown: use auto, float32 or bfloat16')
    return getattr(torch, dtype)


# -----------------------------------------------------------------------------
# SLM: the speech language model


# -----------------------------------------------------------------------------
# Audio


# -----------------------------------------------------------------------------
# UnitEncoder: wave -> units


# -----------------------------------------------------------------------------
# UnitVocoder: units -> wave
