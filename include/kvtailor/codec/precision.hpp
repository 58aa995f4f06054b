// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Precision: what a host may round queries and weights to where it multiplies rows as integers (integer_rows.hpp).
//
// A field of codecs whose own error is large: LloydMax up to 4 bits, Trellis, TurboQuantUnbiased up to 5 bits, PerChannelInt of
// 2 bits; set_precision() finds it in codecs made of others. It is about reading: either reads the bytes that the other wrote.
// Other codecs of integers are always accurate. Devices, hosts without AVX2 and codecs without tiles multiply floats, and do
// not look at it.
//
// Error:   rms of outputs of attention, as a share of theirs, against double precision on the decoded rows:
//          fast       .011 of 32,768 random rows; of a block at most .02, with AVX2 alone .03
//          accurate   7e-5; of a block at most 1.5e-4
//          whether weights are even, spread, or those of a first row that takes a third of them.
//          What each element may be off by is said in integer_rows.hpp and wide_rows.hpp.
// Cost:    a branch a block, and the code of both.
#pragma once

#include <tuple>

#include "kvtailor/core/config.hpp"

namespace kvt::inline v0 {

enum class Precision : unsigned char {
  fast,      // weights are bytes; with AVX2 alone queries are, too
  accurate,  // both are 16 bits
};

template <class Codec>
concept HasPrecision = requires(const Codec& codec) {
  codec.precision == Precision::fast;
};

// Of a codec and all that it is made of; false if there is nothing to set.
template <class Codec>
constexpr bool set_precision(Codec& codec, Precision precision) {
  if constexpr (HasPrecision<Codec>) {
    codec.precision = precision;
    return true;
  } else if constexpr (requires { codec.residual; }) {  // LowRank
    return set_precision(codec.residual, precision);
  } else if constexpr (requires { codec.codec; }) {  // Shifted
    return set_precision(codec.codec, precision);
  } else if constexpr (requires { codec.codecs; }) {  // OneOf
    return std::apply([&](auto&... each) { return (0 + ... + set_precision(each, precision)) > 0; }, codec.codecs);
  } else if constexpr (requires { codec.keys; }) {  // KvCodec
    const bool keys = set_precision(codec.keys, precision);
    return set_precision(codec.values, precision) || keys;
  } else {
    return false;
  }
}

namespace detail {

// The base of a codec that has the choice.
template <bool has = true>
struct PrecisionField {
  Precision precision = Precision::fast;
};
template <>
struct PrecisionField<false> {};

// f.operator()<precision of the codec>()
template <class Codec, class F>
KVT_INLINE void with_precision(const Codec& codec, const F& f) {
  if constexpr (HasPrecision<Codec>) {
    if (codec.precision == Precision::fast) return f.template operator()<Precision::fast>();
  }
  f.template operator()<Precision::accurate>();
}

}  // namespace detail

}  // namespace kvt::inline v0
