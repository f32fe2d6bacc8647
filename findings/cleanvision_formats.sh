#!/usr/bin/env bash
# Expected: cleanvision checks all pictures of a folder that Pillow can read, or says which it leaves out.
# Happens:  files are found by a list of endings. It has .tiff, but not .tif, and no .bmp; those files are passed over
#           without a word, in the count of images, too.
# Matters:  a report of "no issues" is read as one on the data set. Dark, blurred and double pictures, also those that
#           are in the training and the test part, stay in it if a camera or a microscope writes .tif.
# Seen with cleanvision 0.3.7, Pillow 13.0.0, Python 3.11:
#   the same black picture in 6 formats: dark are gif, jpg, png, tiff; nothing on bmp, tif
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "cleanvision==0.3.7" "pillow==13.0.0" "numpy==2.4.6" 2>/dev/null
"$folder/env/bin/python" - "$folder" 2>/dev/null <<'PYTHON'
import contextlib
import sys
from pathlib import Path

from PIL import Image

from cleanvision import Imagelab

folder = Path(sys.argv[1]) / "photos"
folder.mkdir()
endings = ["bmp", "gif", "jpg", "png", "tif", "tiff"]
for ending in endings:
    Image.new("RGB", (64, 64)).save(folder / f"{ending}.{ending}")
    Image.open(folder / f"{ending}.{ending}").load()
with contextlib.redirect_stdout(sys.stderr):
    lab = Imagelab(data_path=str(folder))
    lab.find_issues({"dark": {}}, n_jobs=1)
dark = sorted(Path(name).stem for name in lab.issues.index[lab.issues["is_dark_issue"]])
absent = sorted(set(endings) - {Path(name).stem for name in lab.issues.index})
print(f"the same black picture in 6 formats: dark are {', '.join(dark)}; nothing on {', '.join(absent)}")
raise SystemExit((dark, absent) != (["gif", "jpg", "png", "tiff"], ["bmp", "tif"]))
PYTHON
