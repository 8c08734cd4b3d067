"""The demo's pictures: scikit-learn's handwritten digits, real scans, as PNGs in class folders.

`python -m app.demo FOLDER` writes `digits.zip` to train on and `held_out/` to predict. A program of its own, because
scikit-learn is an optional part and slow to import. Source: E. Alpaydin and C. Kaynak, Optical Recognition of
Handwritten Digits, UCI Machine Learning Repository; 1,797 scans of 8 × 8 pixels in 17 shades, CC BY 4.0.
"""

import io
import sys
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DARKEST_SHADE = 16
SIDE_PIXELS = 32  # four times the scan's own, so that a person can make it out
HELD_OUT_EVERY = 9  # every ninth scan is kept from training: 200 of 1,797


def write_pictures(folder: Path) -> None:
    digits = load_digits()
    held_out = folder / "held_out"
    held_out.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / "digits.zip", "w", zipfile.ZIP_STORED) as archive:
        for index, (scan, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
            name, encoded = CLASS_NAMES[digit], _encode(scan)
            if index % HELD_OUT_EVERY == 0:
                (held_out / f"{name}_{index:04}.png").write_bytes(encoded)
            else:
                archive.writestr(f"{name}/{index:04}.png", encoded)


def _encode(scan: np.ndarray) -> bytes:
    """scan: float (8, 8), 0 is paper and 16 is ink. Returns a PNG, dark on white."""
    shades = np.round((1 - scan / DARKEST_SHADE) * 255).astype(np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(shades).resize((SIDE_PIXELS, SIDE_PIXELS), Image.Resampling.BICUBIC).save(encoded, "PNG")
    return encoded.getvalue()


if __name__ == "__main__":
    write_pictures(Path(sys.argv[1]))
