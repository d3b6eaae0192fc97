"""The rate at which the GPU copies memory, in TB/s read and written together: the floor of a decode step. As JSON.

    python scripts/gpu/copy_rate.py [cuda|cpu]

Random bytes, since zeros can be moved faster than real ones. Each copy is timed by itself: `tb_per_s` is the median, which
the floor is reckoned from, `best_tb_per_s` the fastest.
"""

import json
import statistics
import sys
import time

import torch

COPIES = 30


def seconds(target: torch.Tensor, source: torch.Tensor) -> float:
    """Of one copy, on the device's own clock where it is a GPU."""
    if source.device.type == "cpu":
        began = time.perf_counter()
        target.copy_(source)
        return time.perf_counter() - began
    began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    began.record()
    target.copy_(source)
    ended.record()
    torch.cuda.synchronize()
    return began.elapsed_time(ended) / 1e3


def main(device: str) -> None:
    source = torch.randint(0, 256, (4 << 30 if device != "cpu" else 4 << 20,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    for _ in range(3):
        seconds(target, source)
    taken = [seconds(target, source) for _ in range(COPIES)]
    rate = {"tb_per_s": statistics.median(taken), "best_tb_per_s": min(taken)}
    row = {name: 2 * source.numel() / value / 1e12 for name, value in rate.items()}
    print(json.dumps(row | {"copies": COPIES, "device": torch.cuda.get_device_name() if device != "cpu" else "CPU"}))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "cuda")
