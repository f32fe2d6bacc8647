#!/usr/bin/env bash
# Expected: Image.open(...).convert("L") maps the 65536 grey levels of a 16-bit PNG onto the 256 of 8 bits.
# Happens:  levels are clipped: everything from 255 up, 99.6 % of the range, becomes white. convert("RGB") does the
#           same, and there is no warning.
# Matters:  X-rays and micrographs are 16-bit PNGs, and loaders begin with convert("RGB"): all pictures are nearly
#           white, a network still trains, and the accuracy looks like that of a hard task.
# Seen with Pillow 13.0.0, NumPy 2.4.6, Python 3.11:
#   I;16, levels 0 to 65535 in 16 steps: L has 0 and 15 times 255, RGB the same; levels divided by 257: 16 greys
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "pillow==13.0.0" "numpy==2.4.6" 2>/dev/null
"$folder/env/bin/python" - <<'PYTHON'
import io
import warnings

import numpy as np
from PIL import Image

warnings.simplefilter("error")
file = io.BytesIO()
Image.fromarray(np.linspace(0, 65_535, 16).astype(np.uint16).reshape(4, 4)).save(file, "png")
image = Image.open(file)
grey, colour = np.asarray(image.convert("L")), np.asarray(image.convert("RGB"))
scaled = (np.asarray(image) // 257).astype(np.uint8)
same = (colour == grey[..., None]).all()
print(
    f"{image.mode}, levels 0 to 65535 in 16 steps: L has 0 and {(grey == 255).sum()} times 255, RGB "
    f"{'the same' if same else 'others'}; levels divided by 257: {len(np.unique(scaled))} greys"
)
raise SystemExit(not (image.mode == "I;16" and grey.ravel().tolist() == [0, *[255] * 15] and same))
PYTHON
