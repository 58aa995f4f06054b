// expect: must be a TokenSelector
#include "kvtailor/kvtailor.hpp"
struct Nothing {};
kvt::KvCache<kvt::Uniform, Nothing, kvt::KvCodec<kvt::Dense<kvt::Half, 64>>> cache;
