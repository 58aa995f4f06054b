// expect: a device encodes blocks by a BlockEncoder
#include "kvtailor/kvtailor.hpp"
#include "kvtailor/store/device_cache.hpp"
struct Own : kvt::KiviKeys<2, 64> {};
kvt::DeviceCache<kvt::KvCodec<Own, kvt::KiviValues<2, 64>>, kvt::SimulatedDevice> cache;
