#!/usr/bin/env bash
# torch 2.13.0 (CPU), Linux with glibc 2.36: torch keeps no memory of CPU tensors, and glibc, left as it is, gives what a
# step frees at the end of its heap back to the system, to take it again in the next step, page by page, each cleared.
# So the same step on the same shapes (quadratic linear attention, tensors of up to 14 MiB, one thread) takes 700 to
# 13,000 page faults every time, and 1 to 26 ms of the system's time beside 40 ms of its own. After
# mallopt(M_MMAP_THRESHOLD, 32 MiB) and mallopt(M_TRIM_THRESHOLD, -1) in the same process it takes 0 to 50 faults and
# less than 0.5 ms. How many there are differs from process to process (by what lies at the end of the heap).
#
# A good guess: memory of a step is cached for the next one, as on CUDA; or glibc's own free lists do it after a few
# steps, as its threshold for mmap rises to 32 MiB by itself.
# Seen: 738, 738, 5560, and before that 12762, 4797, 2060 faults a step in three processes each; 0 to 50 after mallopt.
set -euo pipefail
[ "$(uname)" = Linux ] && getconf GNU_LIBC_VERSION >/dev/null 2>&1 || { echo "Linux with glibc only"; exit 1; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip --disable-pip-version-check --quiet install torch==2.13.0 numpy
cat >"$folder/step.py" <<'PY'
import ctypes
import resource

import torch

assert torch.__version__.split("+")[0] == "2.13.0"
torch.set_num_threads(1)
torch.manual_seed(0)
q, k, v = (torch.randn(32, 48, 48, requires_grad=True) for _ in range(3))


def features(x):
    return (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2)


def step():
    scores = features(q) @ features(k).transpose(1, 2)
    (scores.tril() @ v).square().mean().backward()
    q.grad = k.grad = v.grad = None


def used(steps=10):
    before = resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(steps):
        step()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return (after.ru_minflt - before.ru_minflt) / steps, 1000 * (after.ru_stime - before.ru_stime) / steps


used()
plain = used()
libc = ctypes.CDLL(None)
assert libc.mallopt(-3, 32 << 20) and libc.mallopt(-1, -1)  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
used()
kept = used()
print(f"as it is: {plain[0]:.0f} faults a step, {plain[1]:.1f} ms of the system; after mallopt: {kept[0]:.0f}, {kept[1]:.1f} ms")
assert plain[0] > 300 and kept[0] < 200, (plain, kept)
PY
for _ in 1 2 3; do
  env -u MALLOC_TRIM_THRESHOLD_ -u MALLOC_MMAP_THRESHOLD_ -u GLIBC_TUNABLES -u LD_PRELOAD "$folder/env/bin/python" "$folder/step.py"
done
