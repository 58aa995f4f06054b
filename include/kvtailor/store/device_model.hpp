// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// DeviceModel: what policies ask of the model, as a device reads it: RoPE and output projections.
#pragma once

#include <numbers>
#include <span>
#include <vector>

#include "kvtailor/core/device.hpp"
#include "kvtailor/core/evidence.hpp"
#include "kvtailor/store/scored_rows.hpp"

namespace kvt::inline v0 {

template <class Device>
class DeviceModel {
 public:
  // Takes what is needed. Weights of projections are of the device; ropes are one for all layers, or one a layer.
  Status init(Device& device, const Geometry& geometry, std::span<const Rope> ropes,
              std::span<const OutputProjection> projections, EvidenceSet needs) {
    if (needs.has(Evidence::rope) || needs.has(Evidence::query_moments)) {
      std::vector<double> turns;
      for (const Rope& rope : ropes) {
        for (int i = 0; i < rope.rotary_dim / 2; ++i) turns.push_back(rope.step(i) / (2 * std::numbers::pi));
      }
      KVT_TRY(turns_.allocate(device, turns.size()));
      KVT_TRY(device.copy_to(turns_.data(), turns.data(), turns.size() * sizeof(double)));
      std::vector<DeviceRope> all;
      const double* own = turns_.data();
      for (int l = 0; l < geometry.num_layers; ++l) {
        const Rope& rope = ropes[ropes.size() == 1 ? 0 : static_cast<std::size_t>(l)];
        all.push_back({rope, own});
        if (ropes.size() > 1) own += rope.rotary_dim / 2;
      }
      KVT_TRY(ropes_.allocate(device, all.size()));
      KVT_TRY(device.copy_to(ropes_.data(), all.data(), all.size() * sizeof(DeviceRope)));
    }
    if (needs.has(Evidence::output_projection)) {
      KVT_TRY(projections_.allocate(device, projections.size()));
      KVT_TRY(device.copy_to(projections_.data(), projections.data(), projections.size_bytes()));
    }
    return success();
  }
  const DeviceRope* ropes() const { return ropes_.data(); }
  const OutputProjection* projections() const { return projections_.data(); }
  long long bytes() const { return turns_.bytes() + ropes_.bytes() + projections_.bytes(); }

 private:
  DeviceArray<double, Device> turns_;
  DeviceArray<DeviceRope, Device> ropes_;              // [layers]
  DeviceArray<OutputProjection, Device> projections_;  // [layers]
};

}  // namespace kvt::inline v0
