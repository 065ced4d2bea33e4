/* Memory-bound loops over float32 vectors that torch would need several passes for.
 *
 * Plain C on addresses: no torch headers, so one build serves every torch. Python (native/__init__.py)
 * checks dtypes, devices and lengths. The GIL is released, so slices of a vector may run in threads.
 *
 * No expression is contracted to a fused multiply-add (setup.py passes -ffp-contract=off): "x - c * e" must
 * round the same way wherever it is computed, on every processor, or a rank would take the difference for
 * an update.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <sched.h>
#include <stdint.h>

/* An exchange is under way while the fold runs: where ranks share cores, let its threads have their turn. */
#define TILE ((Py_ssize_t)1 << 15)

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CLONES
#endif

/* A coefficient of 0 means x itself, also where e is not finite.
 * u = (x - placed * e) - z;  e = decay * e + u;  z = x - coefficient * e */
CLONES static void fold_loop(const float *restrict x, float *restrict e, float *restrict z, Py_ssize_t n,
                             float placed, float coefficient, float decay)
{
    for (Py_ssize_t i = 0; i < n; i++) {
        const float stood = placed == 0.0f ? x[i] : x[i] - placed * e[i];
        const float moved = stood - z[i];
        const float owed = decay * e[i] + moved;
        e[i] = owed;
        z[i] = coefficient == 0.0f ? x[i] : x[i] - coefficient * owed;
    }
}

/* out = x - coefficient * e */
CLONES static void stand_loop(const float *restrict x, const float *restrict e, float *restrict out, Py_ssize_t n,
                              float coefficient)
{
    for (Py_ssize_t i = 0; i < n; i++)
        out[i] = x[i] - coefficient * e[i];
}

static PyObject *fold(PyObject *self, PyObject *args)
{
    unsigned long long x, e, z;
    Py_ssize_t n;
    float placed, coefficient, decay;
    if (!PyArg_ParseTuple(args, "KKKnfff", &x, &e, &z, &n, &placed, &coefficient, &decay))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < n; i += TILE) {
        const Py_ssize_t m = n - i < TILE ? n - i : TILE;
        fold_loop((const float *)(uintptr_t)x + i, (float *)(uintptr_t)e + i, (float *)(uintptr_t)z + i, m, placed,
                  coefficient, decay);
        sched_yield();
    }
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *stand(PyObject *self, PyObject *args)
{
    unsigned long long x, e, out;
    Py_ssize_t n;
    float coefficient;
    if (!PyArg_ParseTuple(args, "KKKnf", &x, &e, &out, &n, &coefficient))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    stand_loop((const float *)(uintptr_t)x, (const float *)(uintptr_t)e, (float *)(uintptr_t)out, n, coefficient);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"fold", fold, METH_VARARGS, "fold(x, e, z, n, placed, coefficient, decay): addresses of float32 vectors"},
    {"stand", stand, METH_VARARGS, "stand(x, e, out, n, coefficient): addresses of float32 vectors"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "hvd_compress.native._kernels", NULL, -1, methods,
                                    NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__kernels(void)
{
    return PyModule_Create(&module);
}
