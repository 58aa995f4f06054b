#!/usr/bin/env python3
# SPDX-FileCopyrightText: kvtailor contributors
# SPDX-License-Identifier: Apache-2.0
"""Writes include/kvtailor/codec/codebooks.hpp: Lloyd-Max levels for one coordinate of a random unit vector, times sqrt(d), as
whole multiples of a unit.

The density is (1 - u^2/d)^((d-3)/2) on [-sqrt(d), sqrt(d)] (TurboQuant, arXiv 2504.19874, section 3). Needs numpy.

Levels are the smallest whole numbers whose error is within .05 % of the least that numbers up to 64 allow, or up to 127 above 4
bits. That is .6 % more than the best levels have at 5 bits, and 2 % at 6, and a byte holds them.
"""
import numpy as np

DIMS, BITS = (40, 64, 80, 96, 112, 128, 192, 256, 512), range(1, 7)
SLACK = 1.0005


class Density:
    def __init__(self, d, points):
        self.edge = min(np.sqrt(d), 12.0)
        self.u = u = np.linspace(0, self.edge, points)
        f = np.maximum(1 - u * u / d, 0) ** ((d - 3) / 2)
        up_to = lambda g: np.concatenate([[0], np.cumsum((g[1:] + g[:-1]) / 2)]) * (u[1] - u[0])
        mass = up_to(f)
        self.mass, self.moment = mass / mass[-1], up_to(u * f) / mass[-1]
        self.second = up_to(u * u * f)[-1] / mass[-1]

    def cells(self, levels):
        """Mass and first moment of what is nearest to each level."""
        borders = np.concatenate([[0], (levels[1:] + levels[:-1]) / 2, [self.edge]])
        return np.diff(np.interp(borders, self.u, self.mass)), np.diff(np.interp(borders, self.u, self.moment))

    def error(self, levels):
        mass, moment = self.cells(levels)
        return self.second - 2 * float((levels * moment).sum()) + float((levels * levels * mass).sum())

    def lloyd(self, n):
        levels = np.interp((np.arange(n) + 0.5) / n, self.mass, self.u)
        for _ in range(20000):
            mass, moment = self.cells(levels)
            new = moment / mass
            done = np.abs(new - levels).max() < 1e-9
            levels = new
            if done:
                break
        return levels

    def fit_unit(self, whole, unit):
        """The best unit for these whole numbers, and the error with it."""
        for _ in range(60):
            mass, moment = self.cells(whole * unit)
            new = float((whole * moment).sum() / (whole * whole * mass).sum())
            done = abs(new - unit) < 1e-10
            unit = new
            if done:
                break
        return unit, self.error(whole * unit)


def whole_levels(density, levels, limit):
    """Whole numbers for each largest one up to the limit: those next to the levels, then changed by one as long as it helps."""
    found = []
    for most in range(len(levels), limit + 1):
        whole = np.round(levels * most / levels[-1])
        if whole[0] < 1 or (np.diff(whole) < 1).any():
            continue
        unit, error = density.fit_unit(whole, levels[-1] / most)
        better = True
        while better:
            better = False
            for i in range(len(whole) - 1):
                for step in (-1, 1):
                    near = whole.copy()
                    near[i] += step
                    if near[0] < 1 or (np.diff(near) < 1).any():
                        continue
                    near_unit, near_error = density.fit_unit(near, unit)
                    if near_error < error - 1e-12:
                        whole, unit, error, better = near, near_unit, near_error, True
        found.append((whole, unit, error))
    least = min(error for _, _, error in found)
    return next(f for f in found if f[2] <= least * SLACK)


print("""// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Lloyd-Max levels of one coordinate of a random unit vector times sqrt(head_dim), as whole multiples of a unit, positive half,
// and their mean squared error. Written by tools/codebooks.py; source: TurboQuant, arXiv 2504.19874, section 3.
#pragma once

namespace kvt::inline v0 {

// A level is HalfLevels<head_dim, bits>::whole[i] * unit, i below 2^(bits-1); the other half is its mirror image. Whole numbers
// are at most 64 up to 4 bits, and at most 127 above.
template <int head_dim, int bits>
struct HalfLevels;
""")
for d in DIMS:
    fine, coarse = Density(d, 1_000_001), Density(d, 100_001)
    for b in BITS:
        levels = fine.lloyd(1 << (b - 1))
        whole, unit, _ = whole_levels(coarse, levels, 64 if b <= 4 else 127)
        unit, error = fine.fit_unit(whole, unit)
        print(f"template <>\nstruct HalfLevels<{d}, {b}> {{")
        print(f"  static constexpr double distortion = {error:.7f};")
        print(f"  static constexpr float unit = {unit:.9g}f;")
        print(f"  static constexpr short whole[{len(whole)}] = {{" + ", ".join(f"{x:.0f}" for x in whole) + "};\n};")
print("}  // namespace kvt::inline v0")
