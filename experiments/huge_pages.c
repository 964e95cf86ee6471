/* Python's small objects in huge pages, where Linux has them. A large run uses objects all over its memory, more of it
 * than a processor's tables of 4 KB pages cover. */

#include <Python.h>
#include <stdint.h>

#ifdef __linux__
#include <sys/mman.h>

enum { ARENA = 1 << 20, PAGE = 2 << 20, CHUNK = 16 * PAGE };

static PyObjectArenaAllocator before;
static char *next, *end; /* what is left of the newest chunk */
static void *returned;   /* arenas that were given back, each with a pointer to the next; not only from here */

static void *
take(void *context, size_t size)
{
    if (size != ARENA) /* the interpreter's stack, whose pieces are smaller */
        return before.alloc(before.ctx, size);
    if (returned != NULL) {
        void *arena = returned;
        returned = *(void **)arena;
        return arena;
    }
    if (next == end) {
        char *chunk = mmap(NULL, CHUNK + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (chunk == MAP_FAILED)
            return NULL;
        next = (char *)(((uintptr_t)chunk + PAGE - 1) / PAGE * PAGE);
        end = next + CHUNK;
        madvise(next, CHUNK, MADV_HUGEPAGE); /* advice: without huge pages these are ordinary ones */
    }
    next += size;
    return next - size;
}

static void
give_back(void *context, void *arena, size_t size)
{
    if (size != ARENA) {
        before.free(before.ctx, arena, size);
        return;
    }
    *(void **)arena = returned;
    returned = arena;
}

static PyObject *
use(PyObject *module, PyObject *nothing)
{
    if (before.alloc == NULL) {
        PyObjectArenaAllocator here = {NULL, take, give_back};
        PyObject_GetArenaAllocator(&before);
        PyObject_SetArenaAllocator(&here);
    }
    Py_RETURN_NONE;
}
#else
static PyObject *
use(PyObject *module, PyObject *nothing)
{
    Py_RETURN_NONE;
}
#endif

static PyMethodDef methods[] = {
    {"use", use, METH_NOARGS, "Place what is made from here on in huge pages; elsewhere than on Linux nothing changes."},
    {NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "huge_pages", NULL, -1, methods};

PyMODINIT_FUNC
PyInit_huge_pages(void)
{
    return PyModule_Create(&definition);
}
