/* The largest median estimates of a count-sketch, found without storing the others. See sketch.c. */
#include "sketch.h"
#include <string.h>

#define SAMPLE 256 /* consecutive estimates in each piece of the sample for the first threshold */
#define SPARSE 64  /* one piece in so many is in the sample */
#define BINS 2048
#define INFINITE 0x7f800000u

/* Write magnitudes as integers of the same order; nan counts as infinite. */
CLONES static void to_keys(const float *v, Index n, uint32_t *restrict keys)
{
    for (Index i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, v + i, sizeof bits);
        bits &= 0x7fffffffu;
        keys[i] = LOW(bits, INFINITE);
    }
}

/* Return the rank-th largest key, 1 <= rank <= n: three rounds of counting by 11 bits, from the highest. */
static uint32_t rank_th_largest(const uint32_t *keys, Index n, Index rank)
{
    static const int shifts[] = {22, 11, 0};
    Index count[BINS];
    uint32_t prefix = 0, mask = 0;
    for (int round = 0; round < 3; round++) {
        memset(count, 0, sizeof count);
        for (Index i = 0; i < n; i++)
            count[(keys[i] >> shifts[round]) & (BINS - 1)] += (keys[i] & mask) == prefix;
        uint32_t bin = BINS - 1;
        while (count[bin] < rank)
            rank -= count[bin--];
        prefix |= bin << shifts[round];
        mask |= (uint32_t)(BINS - 1) << shifts[round];
    }
    return prefix;
}

/* Keep the `count` largest of n candidates in their order, of equal ones the first; return the smallest key kept. */
static uint32_t keep_largest(int64_t *indices, uint32_t *keys, Index n, Index count)
{
    const uint32_t least = rank_th_largest(keys, n, count);
    Index ties = count, kept = 0;
    for (Index i = 0; i < n; i++)
        ties -= keys[i] > least;
    for (Index i = 0; i < n; i++) {
        const int tie = keys[i] == least && ties > 0;
        const int keep = keys[i] > least || tie;
        indices[kept] = indices[i];
        keys[kept] = keys[i];
        kept += keep;
        ties -= tie;
        if (kept == count)
            break;
    }
    return least;
}

/* Return a key that, judging by a sample, a few more than `count` elements reach; 0 for short vectors: all reach it. */
static uint32_t sampled_threshold(const Sketch *s, uint32_t *keys, Index count, Index capacity)
{
    float tile[SAMPLE];
    Index n = 0;
    for (Index i = 0; i < s->n && n + SAMPLE <= capacity; i += (Index)SAMPLE * SPARSE) {
        const Index block = i / s->columns, q = i % s->columns;
        const Index run = LOW(SAMPLE, LOW(s->columns - q, s->n - i));
        hvd_compress_estimate(s, block, q, run, tile);
        to_keys(tile, run, keys + n);
        n += run;
    }
    const Index expected = (Index)((double)n * (double)count / (double)s->n), rank = expected + expected / 4 + 64;
    return rank < n ? rank_th_largest(keys, n, rank) : 0;
}

/* Collect candidates with a key of at least `least` in ascending order and return their number. When there is no more
 * room only the largest are kept, and `least` rises. */
static Index collect(const Sketch *s, uint32_t least, int64_t *indices, uint32_t *keys, Index count, Index capacity)
{
    float tile[TILE];
    uint32_t key[TILE];
    Index found = 0;
    for (Index b = 0; b < s->blocks; b++) {
        const Index base = b * s->columns, length = LOW(s->columns, s->n - base);
        for (Index q = 0; q < length; q += TILE) {
            const Index run = LOW(TILE, length - q);
            if (found + run > capacity) {
                least = keep_largest(indices, keys, found, count) + 1; /* of equal keys the first are kept */
                found = count;
            }
            hvd_compress_estimate(s, b, q, run, tile);
            to_keys(tile, run, key);
            for (Index i = 0; i < run; i++) {
                indices[found] = base + q + i;
                keys[found] = key[i];
                found += key[i] >= least;
            }
        }
        if (b % BUSY == 0)
            sched_yield();
    }
    return found;
}

PyObject *hvd_compress_largest(PyObject *self, PyObject *args)
{
    Sketch s;
    unsigned long long indices_at, keys_at, table, offsets, signs;
    Index count, capacity;
    if (!PyArg_ParseTuple(args, "KKKnnnKKnn", &table, &offsets, &signs, &s.n, &s.columns, &s.rows, &indices_at,
                          &keys_at, &count, &capacity))
        return NULL;
    if (count < 1 || count > s.n || capacity < count + TILE)
        return PyErr_Format(PyExc_ValueError, "count=%zd or capacity=%zd out of range", count, capacity);
    s.table = AT(const float, table);
    s.offsets = AT(const int64_t, offsets);
    s.signs = AT(const float, signs);
    s.blocks = s.columns > 0 ? (s.n + s.columns - 1) / s.columns : 0;
    if (!hvd_compress_valid(&s))
        return NULL;
    int64_t *indices = AT(int64_t, indices_at);
    uint32_t *keys = AT(uint32_t, keys_at);
    Py_BEGIN_ALLOW_THREADS
    Index found = collect(&s, sampled_threshold(&s, keys, count, capacity), indices, keys, count, capacity);
    if (found < count) /* the sample was not like the vector */
        found = collect(&s, 0, indices, keys, count, capacity);
    keep_largest(indices, keys, found, count);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}
