"""Kernels for a CPU that are written at load time: LLVM IR, compiled by llvmlite for the machine they run on."""
