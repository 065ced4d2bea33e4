/* Memory-bound loops over float32 vectors that torch would need several passes for.
 *
 * Plain C on addresses: no torch headers, so one build serves every torch. Python (native/__init__.py)
 * checks dtypes, devices and lengths. The GIL is released, so slices of a vector may run in threads.
 *
 * No expression is contracted to a fused multiply-add (setup.py passes -ffp-contract=off): "x - c * e" must
 * round the same way wherever it is computed, on every processor, or a rank would take the difference for
 * an update.
 */
#include "common.h"

/* An exchange is in progress while the residual is updated. Where ranks share cores, its threads need time too, so
 * the loop yields the processor after each tile. */
#define TILE ((Py_ssize_t)1 << 15)

/* u = (x - local_coefficient * e) - z;  e = decay * e + u;  z = x - coefficient * e
 *
 * With a coefficient of 0 the point is x itself, also where e is not finite. */
CLONES static void residual_update_loop(const float *restrict x, float *restrict e, float *restrict z, Py_ssize_t n,
                                        float local_coefficient, float coefficient, float decay)
{
    for (Py_ssize_t i = 0; i < n; i++) {
        const float point = local_coefficient == 0.0f ? x[i] : x[i] - local_coefficient * e[i];
        const float update = point - z[i];
        const float residual = decay * e[i] + update;
        e[i] = residual;
        z[i] = coefficient == 0.0f ? x[i] : x[i] - coefficient * residual;
    }
}

/* out = x - coefficient * e */
CLONES static void detached_point_loop(const float *restrict x, const float *restrict e, float *restrict out,
                                       Py_ssize_t n, float coefficient)
{
    for (Py_ssize_t i = 0; i < n; i++)
        out[i] = x[i] - coefficient * e[i];
}

/* out += alpha * (p[0] * columns[0] + ... + p[r - 1] * columns[r - 1]), the terms added in this order; m <= COLUMNS */
#define COLUMNS 512
CLONES static void add_row(const float *restrict p, const float *restrict columns, float *restrict out, Py_ssize_t m,
                           Py_ssize_t stride, Py_ssize_t r, float alpha)
{
    float sum[COLUMNS];
    for (Py_ssize_t j = 0; j < m; j++)
        sum[j] = p[0] * columns[j];
    for (Py_ssize_t c = 1; c < r; c++)
        for (Py_ssize_t j = 0; j < m; j++)
            sum[j] += p[c] * columns[c * stride + j];
    for (Py_ssize_t j = 0; j < m; j++)
        out[j] += alpha * sum[j];
}

static PyObject *fused_residual_update(PyObject *self, PyObject *args)
{
    unsigned long long x, e, z;
    Py_ssize_t n;
    float local_coefficient, coefficient, decay;
    if (!PyArg_ParseTuple(args, "KKKnfff", &x, &e, &z, &n, &local_coefficient, &coefficient, &decay))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < n; i += TILE) {
        const Py_ssize_t m = n - i < TILE ? n - i : TILE;
        residual_update_loop(AT(const float, x) + i, AT(float, e) + i, AT(float, z) + i, m, local_coefficient,
                             coefficient, decay);
        sched_yield();
    }
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *detached_point(PyObject *self, PyObject *args)
{
    unsigned long long x, e, out;
    Py_ssize_t n;
    float coefficient;
    if (!PyArg_ParseTuple(args, "KKKnf", &x, &e, &out, &n, &coefficient))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    detached_point_loop(AT(const float, x), AT(const float, e), AT(float, out), n, coefficient);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *add_product(PyObject *self, PyObject *args)
{
    unsigned long long out, p, columns;
    Py_ssize_t n, m, r;
    float alpha;
    if (!PyArg_ParseTuple(args, "KKKnnnf", &out, &p, &columns, &n, &m, &r, &alpha))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t j = 0; r > 0 && j < m; j += COLUMNS) {
        const Py_ssize_t width = m - j < COLUMNS ? m - j : COLUMNS;
        for (Py_ssize_t i = 0; i < n; i++)
            add_row(AT(const float, p) + i * r, AT(const float, columns) + j, AT(float, out) + i * m + j, width, m, r,
                    alpha);
        sched_yield();
    }
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

/* The sum of words, each times an odd number that depends on its place */
CLONES static uint64_t digest_loop(const uint32_t *restrict words, Py_ssize_t n, uint32_t first)
{
    uint64_t total = 0;
    for (Py_ssize_t i = 0; i < n; i++)
        total += (uint64_t)words[i] * (uint64_t)((first + (uint32_t)i) * 2654435761u | 1u);
    return total;
}

static PyObject *digest(PyObject *self, PyObject *args)
{
    unsigned long long words;
    Py_ssize_t n, first;
    uint64_t total;
    if (!PyArg_ParseTuple(args, "Knn", &words, &n, &first))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    total = digest_loop(AT(const uint32_t, words), n, (uint32_t)first);
    Py_END_ALLOW_THREADS
    return PyLong_FromUnsignedLongLong(total);
}

/* 0 if a word is an infinity or nan, else 1 */
CLONES static uint32_t finite_loop(const uint32_t *restrict words, Py_ssize_t n)
{
    uint32_t found = 0;
    for (Py_ssize_t i = 0; i < n; i++)
        found |= (words[i] & 0x7f800000u) == 0x7f800000u;
    return !found;
}

static PyObject *all_finite(PyObject *self, PyObject *args)
{
    unsigned long long words;
    Py_ssize_t n;
    uint32_t finite;
    if (!PyArg_ParseTuple(args, "Kn", &words, &n))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    finite = finite_loop(AT(const uint32_t, words), n);
    Py_END_ALLOW_THREADS
    return PyBool_FromLong(finite);
}

static PyMethodDef methods[] = {
    {"fused_residual_update", fused_residual_update, METH_VARARGS,
     "fused_residual_update(x, e, z, n, local_coefficient, coefficient, decay): addresses of float32 vectors"},
    {"detached_point", detached_point, METH_VARARGS,
     "detached_point(x, e, out, n, coefficient): addresses of float32 vectors"},
    {"add_product", add_product, METH_VARARGS,
     "add_product(out, p, columns, n, m, r, alpha): addresses of float32 matrices of n x m, n x r and r x m"},
    {"digest", digest, METH_VARARGS, "digest(words, n, first): address of 32-bit words, the first of them at a place"},
    {"all_finite", all_finite, METH_VARARGS, "all_finite(words, n): address of a float32 vector"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "hvd_compress.native._kernels", NULL, -1, methods,
                                    NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__kernels(void)
{
    return PyModule_Create(&module);
}
