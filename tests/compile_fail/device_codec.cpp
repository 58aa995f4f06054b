// expect: a device encodes and reads rows one by one
#include "kvtailor/kvtailor.hpp"
#include "kvtailor/store/device_cache.hpp"
kvt::DeviceCache<kvt::KvCodec<kvt::KiviKeys<2, 64>, kvt::KiviValues<2, 64>>, kvt::SimulatedDevice> cache;
