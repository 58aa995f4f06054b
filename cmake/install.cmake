# SPDX-FileCopyrightText: kvtailor contributors
# SPDX-License-Identifier: Apache-2.0
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

set(package_dir ${CMAKE_INSTALL_DATADIR}/cmake/kvtailor)
configure_package_config_file(cmake/kvtailorConfig.cmake.in ${PROJECT_BINARY_DIR}/kvtailorConfig.cmake
  INSTALL_DESTINATION ${package_dir} NO_SET_AND_CHECK_MACRO)
write_basic_package_version_file(${PROJECT_BINARY_DIR}/kvtailorConfigVersion.cmake
  COMPATIBILITY SameMinorVersion ARCH_INDEPENDENT)

install(TARGETS kvtailor kvtailor_cuda EXPORT kvtailorTargets)
install(EXPORT kvtailorTargets NAMESPACE kvtailor:: DESTINATION ${package_dir})
install(DIRECTORY include/kvtailor DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(FILES cmake/cpu_modules.cmake
  ${PROJECT_BINARY_DIR}/kvtailorConfig.cmake ${PROJECT_BINARY_DIR}/kvtailorConfigVersion.cmake
  DESTINATION ${package_dir})
