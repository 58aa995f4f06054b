# SPDX-FileCopyrightText: kvtailor contributors
# SPDX-License-Identifier: Apache-2.0
"""The same decode steps with PyTorch's attention and, where it is installed, FlashInfer, on fp16 rows. JSON, as bench_decode."""
import json
import statistics

import torch

DIM, KV_HEADS, Q_HEADS, PASSES, COLD_BYTES = 128, 8, 32, 21, 400e6


def microseconds(work, layers):
    times = []
    for i in range(-2, PASSES):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for layer in range(layers):
            work(layer)
        end.record()
        end.synchronize()
        if i >= 0:
            times.append(1e3 * begin.elapsed_time(end) / layers)
    return [statistics.median(times), min(times), max(times)]


results = []
for rows, batch in ((4096, 1), (32768, 1), (32768, 8)):
    stored = rows * batch * KV_HEADS * DIM * 4
    layers = int(min(max(COLD_BYTES / stored + 1, 2), 32))
    keys, values = (torch.randn(layers, batch, KV_HEADS, rows, DIM, device="cuda", dtype=torch.float16) for _ in range(2))
    query = torch.randn(batch, Q_HEADS, 1, DIM, device="cuda", dtype=torch.float16)

    def sdpa(layer):
        torch.nn.functional.scaled_dot_product_attention(query, keys[layer], values[layer], enable_gqa=True)

    peers = {"torch sdpa": sdpa}
    try:
        import flashinfer
    except ImportError:
        flashinfer = None
    if flashinfer and batch == 1:
        peers["flashinfer"] = lambda layer: flashinfer.single_decode_with_kv_cache(
            query[0, :, 0], keys[layer, 0], values[layer, 0], kv_layout="HND", use_tensor_cores=True)
    for name, work in peers.items():
        times = microseconds(work, layers)
        results.append({"peer": name, "rows": rows, "batch": batch, "layers": layers, "stored_bytes_a_layer": stored,
                        "attend_us": times, "bytes_a_second": 1e6 * stored / times[0]})
print(json.dumps({"torch": torch.__version__, "gpu": torch.cuda.get_device_name(), "results": results}, indent=1))
