"""The rate at which the GPU copies memory, in TB/s read and written together: the floor of a decode step. As JSON."""

import json

import torch

source = torch.empty(4 << 30, dtype=torch.uint8, device="cuda")
target = torch.empty_like(source)
for _ in range(3):
    target.copy_(source)
began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
began.record()
for _ in range(20):
    target.copy_(source)
ended.record()
torch.cuda.synchronize()
seconds = began.elapsed_time(ended) / 1e3 / 20
print(json.dumps({"tb_per_s": 2 * source.numel() / seconds / 1e12, "gpu": torch.cuda.get_device_name()}))
