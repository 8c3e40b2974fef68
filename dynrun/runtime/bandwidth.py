"""How many bytes a second the memories of this machine give, measured, or by the name of the device.

Takes nothing and gives bytes per second; keeps nothing (this_machine.py does). Reading is what counts: generating text
reads every weight once for each token.
"""

from __future__ import annotations

import json
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from dynrun.llamacpp.process import capture

# More than the caches of a large processor hold, little enough for a small machine.
_LEAST_BYTES, _MOST_BYTES = 1 << 26, 1 << 29
_LEAST_PASSES, _ENOUGH_S = 3, 0.5
# Peak bandwidths in GB/s by the vendors' data sheets; the first match counts, so longer names come first.
_DATA_SHEETS: tuple[tuple[str, float], ...] = (
    *(("b200", 8000), ("h200", 4800), ("h100 pcie", 2000), ("h100 nvl", 3900), ("h100", 3350), ("gh200", 4000)),
    *(("a100.*80", 2039), ("a100", 1555), ("l40", 864), ("l4", 300), ("a40", 696), ("a10", 600), ("t4", 320)),
    *(("v100", 900), ("rtx pro 6000", 1792), ("rtx 6000 ada", 960), ("a6000", 768), ("a5000", 768), ("a4000", 448)),
    *(("rtx 5090", 1792), ("rtx 5080", 960), ("rtx 5070 ti", 896), ("rtx 5070", 672), ("rtx 5060", 448)),
    *(("rtx 4090", 1008), ("rtx 4080 super", 736), ("rtx 4080", 717), ("rtx 4070 ti super", 672)),
    *(("rtx 4070", 504), ("rtx 4060 ti", 288), ("rtx 4060", 272), ("rtx 3090 ti", 1008), ("rtx 3090", 936)),
    *(("rtx 3080 ti", 912), ("rtx 3080", 760), ("rtx 3070", 448), ("rtx 3060 ti", 448), ("rtx 3060", 360)),
    *(("rtx 2080 ti", 616), ("rtx 2080", 448), ("gtx 1080 ti", 484), ("p40", 347), ("p100", 732)),
    *(("mi325", 6000), ("mi300", 5300), ("mi250", 3277), ("mi210", 1638), ("rx 9070", 640), ("rx 7900 xtx", 960)),
    *(("rx 7900 xt", 800), ("rx 7900", 576), ("rx 7800", 624), ("rx 6900", 512), ("rx 6800", 512)),
    *(("arc.*b580", 456), ("arc.*a770", 560), ("arc", 400)),
    *(("m5 max", 614), ("m5 pro", 307), ("m5", 153), ("m4 max", 546), ("m4 pro", 273), ("m4", 120)),
    *(("m3 ultra", 819), ("m3 max", 400), ("m3 pro", 150), ("m3", 100), ("m2 ultra", 800), ("m2 max", 400)),
    *(("m2 pro", 200), ("m2", 100), ("m1 ultra", 800), ("m1 max", 400), ("m1 pro", 200), ("m1", 68)),
)
# In a process of its own: a CUDA context stays with the process that made it, and takes the device's memory.
_CUDA = """
import json, torch, time
found = []
for index in range(torch.cuda.device_count()):
    with torch.cuda.device(index):
        size = min(1 << 30, torch.cuda.mem_get_info()[0] // 4)
        x = torch.zeros(size // 4, device="cuda"); y = torch.empty_like(x); best = 0.0
        for _ in range(12):
            torch.cuda.synchronize(); began = time.perf_counter()
            y.copy_(x); torch.cuda.synchronize()
            best = max(best, 2 * x.numel() * 4 / (time.perf_counter() - began))
        found.append(best)
print(json.dumps(found))
"""


def ram_bytes_per_s(n_threads: int, free_bytes: int) -> float:
    """The fastest of a few readings of an array that no cache holds, by all threads at once."""
    size = max(_LEAST_BYTES, min(_MOST_BYTES, free_bytes // 8))
    parts = [np.ones(size // n_threads // 4, dtype=np.float32) for _ in range(n_threads)]
    size, best, began, n_passes = sum(part.nbytes for part in parts), 0.0, time.perf_counter(), 0
    with ThreadPoolExecutor(n_threads) as pool:
        while n_passes < _LEAST_PASSES or time.perf_counter() - began < _ENOUGH_S:
            started = time.perf_counter()
            # numpy lets go of the interpreter's lock in a dot product, which reads its vector once.
            list(pool.map(lambda part: part.dot(part), parts))
            best = max(best, size / (time.perf_counter() - started))
            n_passes += 1
    return best


def cuda_bytes_per_s() -> list[float]:
    """Of each CUDA or HIP device, by a copy within it; empty where torch has none."""
    done = capture((sys.executable, "-c", _CUDA), check=False)
    try:
        return [float(value) for value in json.loads(done.stdout or "[]")]
    except (ValueError, TypeError):
        return []


def data_sheet(description: str) -> float | None:
    """Bytes per second of a device by its name; None for an unknown one."""
    name = description.lower()
    found = next((gb for pattern, gb in _DATA_SHEETS if re.search(rf"\b{pattern}(?!\d)", name)), None)
    return None if found is None else found * 1e9
