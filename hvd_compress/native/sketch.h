/* Definitions that the loops over count-sketches share: see sketch.c. */
#ifndef HVD_COMPRESS_SKETCH_H
#define HVD_COMPRESS_SKETCH_H

#include "common.h"

#define MAX_ROWS 16
#define TILE 1024 /* estimates that are kept on the stack at once */

#define LOW(a, b) ((a) < (b) ? (a) : (b))
#define HIGH(a, b) ((a) > (b) ? (a) : (b))
#define BUSY 32 /* blocks after which a loop yields the processor: where ranks share cores, others need time too */

typedef Py_ssize_t Index;

typedef struct {
    const float *table;     /* rows x columns */
    const int64_t *offsets; /* rows x blocks, below columns */
    const float *signs;     /* rows x blocks */
    Index n, columns, rows, blocks;
} Sketch;

/* Return True if the sizes are in range and each offset is below `columns`; else raise ValueError naming the first. */
int hvd_compress_valid(const Sketch *s);

/* Write the estimates of n elements of one block, from its element q on. */
void hvd_compress_estimate(const Sketch *s, Index block, Index q, Index n, float *out);

/* The Python function largest(...), see sketch_largest.c. */
PyObject *hvd_compress_largest(PyObject *self, PyObject *args);

#endif
