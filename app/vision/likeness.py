"""Pictures made to look as another one was taken: as bright, as sharp, as noisy; what they show stays what it is.

Knows pixels; not networks, not data sets.
"""

from functools import lru_cache

import torch
from torch import Tensor

# A frequency is at most so much amplified: beyond it, it is rounding errors that are.
_MAX_GAIN = 4.0
# Of the 0..255 values' power; below it a ring of frequencies is empty.
_EMPTY = 1e-3
# Rings that tell contrast: coarse enough for no blur to reach and no noise to matter.
_COARSE = slice(1, 9)


def seen_alike(pictures: Tensor, like: Tensor) -> Tensor:
    """The pictures with the light, the contrast, the sharpness and the noise of another one.

    pictures: uint8 (K, 3, S, S), S > 16. like: uint8 (3, S, S). Returns uint8 (K, 3, S, S), the same for the same.

    Their mean colour becomes the other's, and so does the power of each ring of frequencies, averaged over the
    pictures: natural ones have much the same spectrum whatever they show (Field 1987), so what differs is how they
    were taken. Where the other has less, a filter takes it away; where it has more than its contrast explains, that
    is noise, and is added as such. Phases, and with them what is where, stay (Oppenheim and Lim 1981).
    """
    side = like.shape[-1]
    rings, sizes = _rings(side)
    shown, target = pictures.float(), like.float().unsqueeze(0)
    means, mean = shown.mean((2, 3), keepdim=True), target.mean((2, 3), keepdim=True)
    spectra = torch.fft.rfft2(shown - means)
    power = _power(spectra, rings, sizes)
    wanted = _power(torch.fft.rfft2(target - mean), rings, sizes)
    ratio = wanted / (power + _EMPTY)
    gain = ratio.minimum(ratio[_COARSE].mean()).sqrt().clamp(max=_MAX_GAIN)
    noise = torch.fft.rfft2(torch.randn(shown.shape, generator=torch.Generator().manual_seed(0)))
    loudness = (wanted - gain.square() * power).clamp(min=0).sqrt() / side
    seen = torch.fft.irfft2(spectra * gain[rings] + noise * loudness[rings], s=(side, side))
    lighter = mean - means.mean(0, keepdim=True)
    alike: Tensor = seen + means + lighter
    return alike.round().clamp(0, 255).to(torch.uint8)


def _power(spectra: Tensor, rings: Tensor, sizes: Tensor) -> Tensor:
    """Mean power of each ring, over pictures and colours: float32 (R,)."""
    power = spectra.abs().square().mean((0, 1)).flatten()
    return torch.zeros(len(sizes)).index_add_(0, rings.flatten(), power) / sizes


@lru_cache(maxsize=8)
def _rings(side: int) -> tuple[Tensor, Tensor]:
    """Which ring each frequency of a real transform is in, int64 (S, S // 2 + 1), and how many are in each, (R,)."""
    rows, columns = torch.fft.fftfreq(side).unsqueeze(1), torch.fft.rfftfreq(side).unsqueeze(0)
    rings = ((rows.square() + columns.square()).sqrt() * side).round().long().clamp(max=side // 2)
    return rings, torch.bincount(rings.flatten()).float()
