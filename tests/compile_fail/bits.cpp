// expect: 1 to 6 bits
#include "kvtailor/kvtailor.hpp"
kvt::TurboQuant<7, 64> codec;
