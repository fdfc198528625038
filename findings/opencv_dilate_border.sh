#!/usr/bin/env bash
# opencv-python-headless 5.0.0.93 and 4.13.0.92, numpy 2.4: cv2.dilate of a float image of zeros holds -1.8e308 (float32:
# -3.4e38) wherever no pixel of the kernel lies inside the image; of bytes it holds 0 there. The kernel need not be
# large, only off its centre, as that of a line from the anchor outwards is. The border counts as the dtype's smallest
# value, and the maximum over nothing else is that value.
#
# A good guess: a dilation of zeros is zeros, in any dtype, and is never below the image's smallest value.
# It matters in this field: generators of dashed curves (Pathfinder) ask by such a dilation where a dash has room, and a
# test on the sum or mean of what comes back sees the border, not the image.
# Seen, an 8 x 8 image of zeros, a 5 x 5 kernel whose one pixel is two up and two left:
#   uint8 least 0, 0 changed   uint16 least 0, 0 changed   float32 least -3.4e+38, 28 changed
#   float64 least -1.8e+308, 28 changed   a full 3 x 3 kernel on float64: least 0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for version in 5.0.0.93 4.13.0.92; do
  python3 -m venv --clear "$folder/env"
  "$folder/env/bin/python" -m pip --disable-pip-version-check --quiet install "opencv-python-headless==$version" numpy==2.4.6
  "$folder/env/bin/python" - <<'PY'
import cv2
import numpy as np

print("OpenCV", cv2.__version__)
off_centre = np.zeros((5, 5), np.uint8)
off_centre[0, 0] = 1
for dtype in (np.uint8, np.uint16, np.float32, np.float64):
    grown = cv2.dilate(np.zeros((8, 8), dtype), off_centre)
    changed = int((grown != 0).sum())
    print(f"  {np.dtype(dtype).name} least {grown.min():.2g}, {changed} changed")
    floating = np.issubdtype(dtype, np.floating)
    assert changed == (28 if floating else 0)
    assert grown.min() == (np.finfo(dtype).min if floating else 0)
assert cv2.dilate(np.zeros((8, 8)), np.ones((3, 3), np.uint8)).min() == 0
PY
done
