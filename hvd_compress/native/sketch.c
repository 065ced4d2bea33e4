/* Count-sketch of float32 vectors by block rotation, and the median estimate.
 *
 * A vector of n elements is cut into blocks of c; element q of block b goes to column (q + offset[j, b]) mod c of
 * row j with sign[j, b]. Everything is read and written as a stream: a rotation consists of two contiguous runs.
 *
 * Plain C on addresses, as in kernels.c: Python (native/sketch.py) checks dtypes, devices and lengths. Without
 * contraction to fused multiply-adds the bits do not depend on the processor.
 */
#include "sketch.h"
#include <string.h>

#define GROUP 4 /* blocks added to a row in one pass: the row is read and written a quarter as often */

int hvd_compress_valid(const Sketch *s)
{
    if (s->n < 0 || s->columns < 1 || s->rows < 0 || s->rows > MAX_ROWS) {
        PyErr_Format(PyExc_ValueError, "n=%zd, columns=%zd, rows=%zd are out of range", s->n, s->columns, s->rows);
        return 0;
    }
    for (Index i = 0; i < s->rows * s->blocks; i++)
        if (s->offsets[i] < 0 || s->offsets[i] >= s->columns) {
            PyErr_Format(PyExc_ValueError, "offset %zd is %lld; it must be in [0, %zd)", i, (long long)s->offsets[i],
                         s->columns);
            return 0;
        }
    return 1;
}

/* -- sketch -------------------------------------------------------------------------------------------- */

CLONES static void add_one(float *restrict row, const float *v, float sign, Index n)
{
    for (Index i = 0; i < n; i++)
        row[i] += sign * v[i];
}

CLONES static void add_four(float *restrict row, const float *const *v, const float *sign, Index n)
{
    const float *v0 = v[0], *v1 = v[1], *v2 = v[2], *v3 = v[3];
    const float s0 = sign[0], s1 = sign[1], s2 = sign[2], s3 = sign[3];
    for (Index i = 0; i < n; i++)
        row[i] += (s0 * v0[i] + s1 * v1[i]) + (s2 * v2[i] + s3 * v3[i]);
}

/* Add GROUP whole blocks to one row: column p takes element (p - offset) mod c of each block. */
static void add_group(float *row, const float *v, Index columns, const int64_t *offsets, const float *signs)
{
    const float *from[GROUP];
    Index left[GROUP];
    for (int g = 0; g < GROUP; g++) {
        const Index q = offsets[g] ? columns - (Index)offsets[g] : 0;
        from[g] = v + g * columns + q;
        left[g] = columns - q;
    }
    for (Index done = 0, run; done < columns; done += run) {
        run = columns - done;
        for (int g = 0; g < GROUP; g++)
            run = LOW(left[g], run);
        add_four(row + done, from, signs, run);
        for (int g = 0; g < GROUP; g++) {
            from[g] += run;
            left[g] -= run;
            if (left[g] == 0) {
                from[g] = v + g * columns;
                left[g] = columns;
            }
        }
    }
}

static PyObject *sketch(PyObject *self, PyObject *args)
{
    unsigned long long flat_at, table_at, offsets_at, signs_at;
    Index n, columns, rows;
    if (!PyArg_ParseTuple(args, "KKKKnnn", &flat_at, &table_at, &offsets_at, &signs_at, &n, &columns, &rows))
        return NULL;
    const float *flat = AT(const float, flat_at), *signs = AT(const float, signs_at);
    const int64_t *offsets = AT(const int64_t, offsets_at);
    float *table = AT(float, table_at);
    const Index blocks = columns > 0 ? (n + columns - 1) / columns : 0;
    const Sketch s = {table, offsets, signs, n, columns, rows, blocks};
    if (!hvd_compress_valid(&s))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    const Index whole = n / columns;
    memset(table, 0, sizeof(float) * (size_t)(rows * columns));
    Index b = 0;
    for (; b + GROUP <= whole; b += GROUP) {
        for (Index j = 0; j < rows; j++)
            add_group(table + j * columns, flat + b * columns, columns, offsets + j * blocks + b,
                      signs + j * blocks + b);
        if (b % BUSY == 0)
            sched_yield();
    }
    for (; b < blocks; b++) {
        const float *block = flat + b * columns;
        const Index length = LOW(columns, n - b * columns);
        for (Index j = 0; j < rows; j++) {
            const Index offset = (Index)offsets[j * blocks + b], head = LOW(length, columns - offset);
            add_one(table + j * columns + offset, block, signs[j * blocks + b], head);
            add_one(table + j * columns, block + head, signs[j * blocks + b], length - head);
        }
    }
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

/* -- estimates ----------------------------------------------------------------------------------------- */

CLONES static void median_of_three(const float *const *row, const float *sign, Index n, float *restrict out)
{
    const float *r0 = row[0], *r1 = row[1], *r2 = row[2];
    const float s0 = sign[0], s1 = sign[1], s2 = sign[2];
    for (Index i = 0; i < n; i++) {
        const float a = s0 * r0[i], b = s1 * r1[i], c = s2 * r2[i];
        const float low = LOW(a, b), high = HIGH(a, b), rest = LOW(high, c);
        out[i] = HIGH(low, rest);
    }
}

/* The median of five is the median of three: the larger minimum and the smaller maximum of two pairs, and the fifth. */
CLONES static void median_of_five(const float *const *row, const float *sign, Index n, float *restrict out)
{
    const float *r0 = row[0], *r1 = row[1], *r2 = row[2], *r3 = row[3], *r4 = row[4];
    const float s0 = sign[0], s1 = sign[1], s2 = sign[2], s3 = sign[3], s4 = sign[4];
    for (Index i = 0; i < n; i++) {
        const float a = s0 * r0[i], b = s1 * r1[i], c = s2 * r2[i], d = s3 * r3[i], e = s4 * r4[i];
        const float ab = LOW(a, b), AB = HIGH(a, b), cd = LOW(c, d), CD = HIGH(c, d);
        const float f = HIGH(ab, cd), g = LOW(AB, CD);
        const float low = LOW(f, g), high = HIGH(f, g), rest = LOW(high, e);
        out[i] = HIGH(low, rest);
    }
}

CLONES static void compare_exchange(float *restrict low, float *restrict high, Index n)
{
    for (Index i = 0; i < n; i++) {
        const float a = low[i], b = high[i];
        low[i] = LOW(a, b);
        high[i] = HIGH(a, b);
    }
}

CLONES static void signed_copy(const float *row, float sign, Index n, float *restrict out)
{
    for (Index i = 0; i < n; i++)
        out[i] = sign * row[i];
}

CLONES static void mean_of_two(const float *a, const float *b, Index n, float *restrict out)
{
    for (Index i = 0; i < n; i++)
        out[i] = 0.5f * a[i] + 0.5f * b[i];
}

/* Sort the rows by insertion, many columns at a time, and take the middle one, or the mean of the middle two. */
static void median_of_any(const float *const *row, const float *sign, Index rows, Index n, float *out)
{
    float sorted[MAX_ROWS][TILE / 4];
    for (Index start = 0, run; start < n; start += run) {
        run = LOW(n - start, TILE / 4);
        for (Index j = 0; j < rows; j++) {
            signed_copy(row[j] + start, sign[j], run, sorted[j]);
            for (Index k = j; k > 0; k--)
                compare_exchange(sorted[k - 1], sorted[k], run);
        }
        mean_of_two(sorted[(rows - 1) / 2], sorted[rows / 2], run, out + start);
    }
}

void hvd_compress_estimate(const Sketch *s, Index block, Index q, Index n, float *out)
{
    const float *from[MAX_ROWS];
    float sign[MAX_ROWS];
    Index left[MAX_ROWS];
    for (Index j = 0; j < s->rows; j++) {
        Index column = q + (Index)s->offsets[j * s->blocks + block];
        if (column >= s->columns)
            column -= s->columns;
        from[j] = s->table + j * s->columns + column;
        left[j] = s->columns - column;
        sign[j] = s->signs[j * s->blocks + block];
    }
    for (Index done = 0, run; done < n; done += run) {
        run = n - done;
        for (Index j = 0; j < s->rows; j++)
            run = LOW(left[j], run);
        if (s->rows == 5)
            median_of_five(from, sign, run, out + done);
        else if (s->rows == 3)
            median_of_three(from, sign, run, out + done);
        else if (s->rows == 1)
            signed_copy(from[0], sign[0], run, out + done);
        else
            median_of_any(from, sign, s->rows, run, out + done);
        for (Index j = 0; j < s->rows; j++) {
            from[j] += run;
            left[j] -= run;
            if (left[j] == 0) {
                from[j] = s->table + j * s->columns;
                left[j] = s->columns;
            }
        }
    }
}

static PyObject *estimate(PyObject *self, PyObject *args)
{
    unsigned long long table, offsets, signs, out_at;
    Sketch s;
    Index first, last;
    int add;
    float alpha, tile[TILE];
    if (!PyArg_ParseTuple(args, "KKKnnnKnnpf", &table, &offsets, &signs, &s.n, &s.columns, &s.rows, &out_at, &first,
                          &last, &add, &alpha))
        return NULL;
    s.table = AT(const float, table);
    s.offsets = AT(const int64_t, offsets);
    s.signs = AT(const float, signs);
    s.blocks = s.columns > 0 ? (s.n + s.columns - 1) / s.columns : 0;
    if (!hvd_compress_valid(&s))
        return NULL;
    if (first < 0 || last > s.blocks)
        return PyErr_Format(PyExc_ValueError, "blocks %zd to %zd; there are %zd", first, last, s.blocks);
    Py_BEGIN_ALLOW_THREADS
    for (Index b = first; b < last; b++) {
        const Index length = LOW(s.columns, s.n - b * s.columns);
        float *out = AT(float, out_at) + b * s.columns;
        if (!add)
            hvd_compress_estimate(&s, b, 0, length, out);
        for (Index q = 0; add && q < length; q += TILE) {
            const Index run = LOW(TILE, length - q);
            hvd_compress_estimate(&s, b, q, run, tile);
            add_one(out + q, tile, alpha, run);
        }
        if (b % BUSY == 0)
            sched_yield();
    }
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"sketch", sketch, METH_VARARGS, "sketch(flat, table, offsets, signs, n, columns, rows): table is overwritten"},
    {"estimate", estimate, METH_VARARGS,
     "estimate(table, offsets, signs, n, columns, rows, out, first, last, add, alpha): blocks first to last of out, "
     "or alpha times them added to it"},
    {"largest", hvd_compress_largest, METH_VARARGS,
     "largest(table, offsets, signs, n, columns, rows, indices, keys, count, capacity): the first count of indices"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "hvd_compress.native._sketch", NULL, -1, methods,
                                    NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__sketch(void)
{
    return PyModule_Create(&module);
}
