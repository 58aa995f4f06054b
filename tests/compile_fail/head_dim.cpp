// expect: head_dim must be 40
#include "kvtailor/kvtailor.hpp"
kvt::Dense<kvt::Half, 63> codec;
