/* A CUDA runtime without CUDA: memory from malloc, calls counted, errors chosen by the environment.
 * FAKE_MALLOC_CODE and FAKE_GET_DEVICE_CODE make those functions fail with that code. */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, BLOCKS = 4096 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static void *blocks[BLOCKS];
static int mallocs, frees, last_errors;
static __thread int last_error;

static int fail(int code) {
    last_error = code;
    return code;
}

static int code_from(const char *variable) {
    const char *text = getenv(variable);
    return text ? atoi(text) : SUCCESS;
}

int fakecudart_calls(const char *name) {
    if (!strcmp(name, "cudaMalloc")) return mallocs;
    if (!strcmp(name, "cudaFree")) return frees;
    return last_errors;
}

int cudaMalloc(void **out, size_t bytes) {
    int code = code_from("FAKE_MALLOC_CODE");
    __sync_fetch_and_add(&mallocs, 1);
    if (code) return fail(code);
    if (!out) return fail(INVALID_VALUE);
    *out = NULL;
    if (!bytes) return SUCCESS;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < BLOCKS; i++) {
        if (blocks[i]) continue;
        *out = blocks[i] = malloc(bytes);
        break;
    }
    pthread_mutex_unlock(&lock);
    return *out ? SUCCESS : fail(2);
}

int cudaFree(void *pointer) {
    int code = INVALID_VALUE;
    __sync_fetch_and_add(&frees, 1);
    if (!pointer) return SUCCESS;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < BLOCKS; i++) {
        if (blocks[i] != pointer) continue;
        free(pointer);
        blocks[i] = NULL;
        code = SUCCESS;
        break;
    }
    pthread_mutex_unlock(&lock);
    return code ? fail(code) : SUCCESS;
}

int cudaGetDevice(int *device) {
    int code = code_from("FAKE_GET_DEVICE_CODE");
    *device = 0;
    return code ? fail(code) : SUCCESS;
}

int cudaGetLastError(void) {
    int code = last_error;
    __sync_fetch_and_add(&last_errors, 1);
    last_error = SUCCESS;
    return code;
}

int cudaHostGetFlags(unsigned *flags, void *pointer) {
    (void)pointer;
    *flags = 0;
    return fail(INVALID_VALUE);
}
