/* Definitions that all compiled loops share. */
#ifndef HVD_COMPRESS_COMMON_H
#define HVD_COMPRESS_COMMON_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <sched.h>
#include <stdint.h>

/* A function marked CLONES is compiled once per instruction set; the processor's best one is chosen at load time. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CLONES
#endif

/* Python passes addresses as integers. */
#define AT(type, address) ((type *)(uintptr_t)(address))

#endif
