/* One-bit signs of float32 vectors: each loop reads and writes its vectors once.
 *
 * Plain C on addresses, as in kernels.c; Python (native/signs.py) checks dtypes, devices and lengths. The GIL
 * is released, so slices of a vector may run in threads. Element i is bit i % 8 of byte i / 8.
 */
#include "common.h"
#include <string.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

/* The signs and the magnitudes of a tile are taken in two passes: the second finds it in the first-level cache. */
#define TILE ((Py_ssize_t)1 << 12)
/* Elements after which a loop yields the processor: where ranks share cores, the exchange's threads need time too. */
#define YIELD_EVERY ((Py_ssize_t)1 << 15)

typedef float floats __attribute__((vector_size(32)));
typedef int32_t ints __attribute__((vector_size(32)));

/* The eight signs (+1 or -1) that each byte encodes; filled when the module is loaded. */
static float table[256][8];

/* Write the bits v >= 0: 1 for -0.0, 0 for nan. Unused bits of the last byte are 0. */
static void pack_bits(const float *v, uint8_t *bits, Py_ssize_t n)
{
    Py_ssize_t i = 0;
#ifdef __SSE2__
    const __m128 zero = _mm_setzero_ps();
    for (; i + 16 <= n; i += 16) {
        const __m128i a = _mm_castps_si128(_mm_cmpge_ps(_mm_loadu_ps(v + i), zero));
        const __m128i b = _mm_castps_si128(_mm_cmpge_ps(_mm_loadu_ps(v + i + 4), zero));
        const __m128i c = _mm_castps_si128(_mm_cmpge_ps(_mm_loadu_ps(v + i + 8), zero));
        const __m128i d = _mm_castps_si128(_mm_cmpge_ps(_mm_loadu_ps(v + i + 12), zero));
        const int mask = _mm_movemask_epi8(_mm_packs_epi16(_mm_packs_epi32(a, b), _mm_packs_epi32(c, d)));
        bits[i / 8] = (uint8_t)mask;
        bits[i / 8 + 1] = (uint8_t)(mask >> 8);
    }
#endif
    for (; i < n; i += 8) {
        unsigned byte = 0;
        for (int j = 0; j < 8 && i + j < n; j++)
            byte |= (unsigned)(v[i + j] >= 0.0f) << j;
        bits[i / 8] = (uint8_t)byte;
    }
}

/* Return the sum of |v|. Each float32 lane adds up few terms; the lanes are added in float64. */
CLONES static double magnitude(const float *v, Py_ssize_t n)
{
    const ints mask = {INT32_MAX, INT32_MAX, INT32_MAX, INT32_MAX, INT32_MAX, INT32_MAX, INT32_MAX, INT32_MAX};
    floats lanes[4] = {{0}};
    Py_ssize_t i = 0;
    for (; i + 32 <= n; i += 32)
        for (int k = 0; k < 4; k++) {
            ints x;
            memcpy(&x, v + i + 8 * k, sizeof x);
            lanes[k] += (floats)(x & mask);
        }
    const floats all = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
    double total = 0.0;
    for (int j = 0; j < 8; j++)
        total += all[j];
    for (; i < n; i++)
        total += v[i] < 0.0f ? -v[i] : v[i];
    return total;
}

/* v += factor * sign, for whole bytes of signs. */
CLONES static void add_bytes(const uint8_t *bits, float *v, Py_ssize_t bytes, float factor)
{
    for (Py_ssize_t i = 0; i < bytes; i++) {
        floats x, sign;
        memcpy(&x, v + 8 * i, sizeof x);
        memcpy(&sign, table[bits[i]], sizeof sign);
        x += factor * sign;
        memcpy(v + 8 * i, &x, sizeof x);
    }
}

/* v += factor * sign, for the elements from start to stop. */
static void add_range(const uint8_t *bits, float *v, Py_ssize_t start, Py_ssize_t stop, float factor)
{
    Py_ssize_t i = start;
    for (; i < stop && i % 8; i++)
        v[i] += bits[i / 8] >> i % 8 & 1 ? factor : -factor;
    add_bytes(bits + i / 8, v + i, (stop - i) / 8, factor);
    for (i += (stop - i) / 8 * 8; i < stop; i++)
        v[i] += bits[i / 8] >> i % 8 & 1 ? factor : -factor;
}

/* Return the index of the first block that ends after element i. */
static Py_ssize_t block_of(const int64_t *ends, Py_ssize_t blocks, Py_ssize_t i)
{
    Py_ssize_t low = 0, high = blocks;
    while (low < high) {
        const Py_ssize_t middle = low + (high - low) / 2;
        if (ends[middle] > i)
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

/* Return None, or raise ValueError if the ends of the blocks have been found not to ascend. */
static PyObject *done(Py_ssize_t bad)
{
    if (bad < 0)
        Py_RETURN_NONE;
    return PyErr_Format(PyExc_ValueError, "ends of blocks must ascend, and the end of block %zd does not", bad);
}

static PyObject *pack(PyObject *self, PyObject *args)
{
    unsigned long long v_at, bits_at, ends_at, sums_at;
    Py_ssize_t blocks, start, stop, block, bad = -1;
    if (!PyArg_ParseTuple(args, "KKKKnnn", &v_at, &bits_at, &ends_at, &sums_at, &blocks, &start, &stop))
        return NULL;
    const float *v = AT(const float, v_at);
    uint8_t *bits = AT(uint8_t, bits_at);
    const int64_t *ends = AT(const int64_t, ends_at);
    double *sums = AT(double, sums_at);
    Py_BEGIN_ALLOW_THREADS
    block = block_of(ends, blocks, start);
    for (Py_ssize_t t = start; t < stop; t += TILE) {
        const Py_ssize_t end = stop - t < TILE ? stop : t + TILE;
        pack_bits(v + t, bits + t / 8, end - t);
        for (Py_ssize_t i = t; i < end && block < blocks && bad < 0;) {
            const Py_ssize_t until = ends[block] < end ? (Py_ssize_t)ends[block] : end;
            if (until <= i) {
                bad = block;
                break;
            }
            sums[block] += magnitude(v + i, until - i);
            i = until;
            block += until == ends[block];
        }
        if ((t - start) % YIELD_EVERY == 0)
            sched_yield();
    }
    Py_END_ALLOW_THREADS
    return done(bad);
}

static PyObject *add(PyObject *self, PyObject *args)
{
    unsigned long long bits_at, v_at, ends_at, factors_at;
    Py_ssize_t blocks, start, stop, block, bad = -1;
    if (!PyArg_ParseTuple(args, "KKKKnnn", &bits_at, &v_at, &ends_at, &factors_at, &blocks, &start, &stop))
        return NULL;
    const uint8_t *bits = AT(const uint8_t, bits_at);
    float *v = AT(float, v_at);
    const int64_t *ends = AT(const int64_t, ends_at);
    const float *factors = AT(const float, factors_at);
    Py_BEGIN_ALLOW_THREADS
    block = block_of(ends, blocks, start);
    for (Py_ssize_t t = start; t < stop; t += YIELD_EVERY) {
        const Py_ssize_t end = stop - t < YIELD_EVERY ? stop : t + YIELD_EVERY;
        for (Py_ssize_t i = t; i < end && block < blocks && bad < 0;) {
            const Py_ssize_t until = ends[block] < end ? (Py_ssize_t)ends[block] : end;
            if (until <= i) {
                bad = block;
                break;
            }
            add_range(bits, v, i, until, factors[block]);
            i = until;
            block += until == ends[block];
        }
        sched_yield();
    }
    Py_END_ALLOW_THREADS
    return done(bad);
}

static PyMethodDef methods[] = {
    {"pack", pack, METH_VARARGS,
     "pack(v, bits, ends, sums, blocks, start, stop): write the bits of v, add |v| of block b to sums[b]"},
    {"add", add, METH_VARARGS, "add(bits, v, ends, factors, blocks, start, stop): v += factors[b] * sign in block b"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "hvd_compress.native._signs", NULL, -1, methods,
                                    NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__signs(void)
{
    for (int byte = 0; byte < 256; byte++)
        for (int j = 0; j < 8; j++)
            table[byte][j] = byte >> j & 1 ? 1.0f : -1.0f;
    return PyModule_Create(&module);
}
