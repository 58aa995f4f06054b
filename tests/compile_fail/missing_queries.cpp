// expect: needs the evidence window_queries
#include "kvtailor/kvtailor.hpp"
kvt::KvCache<kvt::Uniform, kvt::SnapKv, kvt::KvCodec<kvt::Dense<kvt::Half, 64>>, kvt::cache_evidence> cache;
