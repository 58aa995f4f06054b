#!/usr/bin/env python3
# SPDX-FileCopyrightText: kvtailor contributors
# SPDX-License-Identifier: Apache-2.0
"""Writes include/kvtailor/codec/codebooks.hpp: Lloyd-Max levels for one coordinate of a random unit vector, times sqrt(d).

The density is (1 - u^2/d)^((d-3)/2) on [-sqrt(d), sqrt(d)] (TurboQuant, arXiv 2504.19874, section 3). Needs numpy.
"""
import numpy as np

DIMS, BITS = (40, 64, 80, 96, 112, 128, 192, 256), range(1, 7)


def levels(d, bits):
    edge = min(np.sqrt(d), 12.0)
    u = np.linspace(0, edge, 1_000_001)
    f = np.maximum(1 - u * u / d, 0) ** ((d - 3) / 2)
    step = u[1] - u[0]
    mass = np.concatenate([[0], np.cumsum((f[1:] + f[:-1]) / 2)]) * step
    moment = np.concatenate([[0], np.cumsum((u[1:] * f[1:] + u[:-1] * f[:-1]) / 2)]) * step
    n = 1 << (bits - 1)
    c = np.interp((np.arange(n) + 0.5) / n * mass[-1], mass, u)
    for _ in range(20000):
        borders = np.concatenate([[0], (c[1:] + c[:-1]) / 2, [edge]])
        m, s = np.interp(borders, u, mass), np.interp(borders, u, moment)
        new = np.diff(s) / np.diff(m)
        done = np.abs(new - c).max() < 1e-9
        c = new
        if done:
            break
    second = np.trapezoid(u * u * f, u) / mass[-1]
    distortion = second - float((c * np.diff(s)).sum()) / mass[-1]
    return c, distortion


print("""// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Lloyd-Max levels of one coordinate of a random unit vector times sqrt(head_dim), positive half, and their mean squared
// error. Written by tools/codebooks.py; source: TurboQuant, arXiv 2504.19874, section 3.
#pragma once

namespace kvt::inline v0 {

// half_levels<head_dim, bits>.level[2^(bits-1)]; the other half is its mirror image.
template <int head_dim, int bits>
struct HalfLevels;
""")
for d in DIMS:
    for b in BITS:
        c, e = levels(d, b)
        print(f"template <>\nstruct HalfLevels<{d}, {b}> {{")
        print(f"  static constexpr double distortion = {e:.7f};")
        print(f"  static constexpr float level[{len(c)}] = {{" + ", ".join(f"{x:.7f}f" for x in c) + "};\n};")
print("}  // namespace kvt::inline v0")
