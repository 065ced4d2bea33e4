/* What the loops over count-sketches share: see sketch.c. */
#ifndef HVD_COMPRESS_SKETCH_H
#define HVD_COMPRESS_SKETCH_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>

#define MAX_ROWS 16
#define TILE 1024 /* estimates on the stack */

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CLONES
#endif

#define LOW(a, b) ((a) < (b) ? (a) : (b))
#define HIGH(a, b) ((a) > (b) ? (a) : (b))
#define AT(type, address) ((type *)(uintptr_t)(address))

typedef Py_ssize_t Index;

typedef struct {
    const float *table;     /* rows x columns */
    const int64_t *offsets; /* rows x blocks, below columns */
    const float *signs;     /* rows x blocks */
    Index n, columns, rows, blocks;
} Sketch;

/* Estimates of n elements of one block, from its element q on. */
void hvd_compress_estimate(const Sketch *s, Index block, Index q, Index n, float *out);

/* Python's largest(...): sketch_largest.c. */
PyObject *hvd_compress_largest(PyObject *self, PyObject *args);

#endif
