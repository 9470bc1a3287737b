/* Modules and kernels. PTX is read only as far as a launch needs it: version, target, the names of
 * the entries and the sizes of their parameters. What a kernel does is a C function registered
 * under its name. */
#define _GNU_SOURCE
#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

enum { MAX_KERNELS = 128, MAX_PARAMS = 64, MAX_NAME = 256, TARGET_LIMIT = 90 };

struct module {
    struct object object;
    struct fc_context *context;
    char *text; /* the PTX without comments */
};

struct function {
    struct object object;
    struct module *module;
    char name[MAX_NAME];
    unsigned param_count;
    size_t sizes[MAX_PARAMS];
    size_t aligns[MAX_PARAMS];
};

struct model {
    char name[MAX_NAME];
    fakecuda_kernel kernel;
};

/* What fakecuda_kernel_read and _write need of a launch. */
struct launch_state {
    int device;
    int error;
};

static void fill_kernel(const struct fakecuda_launch *launch);

static struct model models[MAX_KERNELS] = {
    {"fakecuda_fill", fill_kernel},
    {"tms_copy_pieces", copy_pieces_kernel},
    {"tms_fingerprint", fingerprint_kernel},
};
static int model_count = 3;

/* ---- Registry ---- */

static struct model *model_find(const char *name) {
    for (int i = 0; i < model_count; i++) {
        if (strcmp(models[i].name, name) == 0) {
            return &models[i];
        }
    }
    return NULL;
}

static bool model_exists(const char *name) {
    const struct model *model = model_find(name);
    return model && model->kernel;
}

void fakecuda_register_kernel(const char *name, fakecuda_kernel kernel) {
    state_lock();
    struct model *model = model_find(name);
    if (!model && model_count < MAX_KERNELS) {
        model = &models[model_count++];
        snprintf(model->name, sizeof model->name, "%s", name);
    }
    if (model) {
        model->kernel = kernel;
    } else {
        fprintf(stderr, "fakecuda: more than %d kernels\n", MAX_KERNELS);
    }
    state_unlock();
}

/* ---- PTX ---- */

static char *without_comments(const char *text) {
    char *out = malloc(strlen(text) + 1), *to = out;
    while (out && *text) {
        if (text[0] == '/' && text[1] == '/') {
            text += strcspn(text, "\n");
        } else if (text[0] == '/' && text[1] == '*') {
            const char *end = strstr(text + 2, "*/");
            text = end ? end + 2 : text + strlen(text);
            *to++ = ' ';
        } else {
            *to++ = *text++;
        }
    }
    if (out) {
        *to = 0;
    }
    return out;
}

static bool is_word(char c) {
    return isalnum((unsigned char)c) || c == '_' || c == '$' || c == '%';
}

/* The text behind a directive at the start of a line, or NULL. */
static const char *directive(const char *text, const char *name) {
    size_t length = strlen(name);
    for (const char *at = text; at; at = strchr(at, '\n')) {
        at += strspn(at, " \t\r\n");
        if (strncmp(at, name, length) == 0 && !is_word(at[length])) {
            return at + length;
        }
    }
    return NULL;
}

/* The PTX version, as 10 * major + minor, that came with a driver version. */
static int ptx_version_of_driver(int driver) {
    static const int twelve[] = {80, 81, 82, 83, 84, 85, 85, 86, 87, 88};
    int major = driver / 1000, minor = driver % 1000 / 10;
    if (major == 12 && minor < 10) {
        return twelve[minor];
    }
    return major >= 13 ? (major - 4) * 10 + minor : 78;
}

static int check_ptx(const char *text) {
    int major, minor, target;
    const char *version = directive(text, ".version");
    const char *architecture = directive(text, ".target");
    if (!version || sscanf(version, " %d.%d", &major, &minor) != 2) {
        return CUDA_ERROR_INVALID_PTX;
    }
    if (!architecture || sscanf(architecture, " sm_%d", &target) != 1) {
        return CUDA_ERROR_INVALID_PTX;
    }
    if (major * 10 + minor > ptx_version_of_driver(settings.version)) {
        return CUDA_ERROR_UNSUPPORTED_PTX_VERSION;
    }
    return target > TARGET_LIMIT ? CUDA_ERROR_NO_BINARY_FOR_GPU : CUDA_SUCCESS;
}

/* The parameter list of an entry, just behind its name; NULL if there is no such entry. */
static const char *find_entry(const char *text, const char *name) {
    size_t length = strlen(name);
    for (const char *at = strstr(text, ".entry"); at; at = strstr(at, ".entry")) {
        at += strlen(".entry");
        at += strspn(at, " \t\r\n");
        if (strncmp(at, name, length) == 0 && !is_word(at[length])) {
            return at + length;
        }
    }
    return NULL;
}

/* Reads one ".param [.align N] .TYPE [.ptr ...] NAME[COUNT]" up to its comma or bracket. */
static const char *read_param(const char *at, struct function *function) {
    size_t length = strcspn(at, ",)");
    char text[512];
    snprintf(text, sizeof text, "%.*s", (int)length, at);
    size_t size = 0, align = 0, count = 1;
    char *rest;
    for (char *word = strtok_r(text, " \t\r\n", &rest); word; word = strtok_r(NULL, " \t\r\n", &rest)) {
        unsigned bits;
        char kind;
        if (strcmp(word, ".align") == 0) {
            word = strtok_r(NULL, " \t\r\n", &rest);
            if (word && align == 0) {
                align = strtoul(word, NULL, 10);
            }
        } else if (size == 0 && sscanf(word, ".%c%u", &kind, &bits) == 2 && strchr("usbf", kind)) {
            size = bits / 8;
        } else if (strchr(word, '[')) {
            count = strtoul(strchr(word, '[') + 1, NULL, 10);
        }
    }
    if (size && function->param_count < MAX_PARAMS) {
        function->aligns[function->param_count] = align > size ? align : size;
        function->sizes[function->param_count++] = size * count;
    }
    return at + length;
}

static void read_params(const char *at, struct function *function) {
    at += strspn(at, " \t\r\n");
    if (*at != '(') {
        return;
    }
    while (*at && *at != ')') {
        at = read_param(at + 1, function);
    }
}

/* ---- Modules ---- */

static int load(CUmodule *handle, const char *image) {
    if (!handle || !image) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    if (memcmp(image, "\177ELF", 4) == 0) {
        return CUDA_ERROR_INVALID_IMAGE; /* machine code: there is nothing to run it on */
    }
    char *text = without_comments(image);
    int rc = text ? check_ptx(text) : CUDA_ERROR_OUT_OF_MEMORY;
    struct module *module = rc == 0 ? calloc(1, sizeof *module) : NULL;
    if (!module) {
        free(text);
        return rc ? rc : CUDA_ERROR_OUT_OF_MEMORY;
    }
    module->context = context_current();
    module->text = text;
    object_add(&module->object, OBJECT_MODULE);
    *handle = (CUmodule)(uintptr_t)module->object.handle;
    return CUDA_SUCCESS;
}

static void free_function_of(void *object, void *module) {
    struct function *function = object;
    if (function->module == module) {
        object_remove(&function->object);
        free(function);
    }
}

static void module_free(struct module *module) {
    object_each(OBJECT_FUNCTION, free_function_of, module);
    object_remove(&module->object);
    free(module->text);
    free(module);
}

static void free_module_of(void *object, void *context) {
    struct module *module = object;
    if (module->context == context) {
        module_free(module);
    }
}

void modules_destroy_of(struct fc_context *context) {
    object_each(OBJECT_MODULE, free_module_of, context);
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    ENTER(NEEDS_CONTEXT | UNSAFE_IN_CAPTURE)
    return call_end(load(module, image));
}

CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned count, int *options, void **values) {
    ENTER(NEEDS_CONTEXT | UNSAFE_IN_CAPTURE)
    if (count && (!options || !values)) {
        return call_end(CUDA_ERROR_INVALID_VALUE);
    }
    return call_end(load(module, image));
}

CUresult cuModuleUnload(CUmodule handle) {
    ENTER(NEEDS_CONTEXT | UNSAFE_IN_CAPTURE)
    struct module *module = object_find(OBJECT_MODULE, (uintptr_t)handle);
    if (!module) {
        return call_end(CUDA_ERROR_INVALID_HANDLE);
    }
    module_free(module);
    return call_end(CUDA_SUCCESS);
}

CUresult cuModuleGetFunction(CUfunction *handle, CUmodule module_handle, const char *name) {
    ENTER(NEEDS_CONTEXT)
    struct module *module = object_find(OBJECT_MODULE, (uintptr_t)module_handle);
    if (!handle || !name || !module) {
        return call_end(module ? CUDA_ERROR_INVALID_VALUE : CUDA_ERROR_INVALID_HANDLE);
    }
    const char *entry = strlen(name) < MAX_NAME ? find_entry(module->text, name) : NULL;
    if (!entry) {
        return call_end(CUDA_ERROR_NOT_FOUND);
    }
    struct function *function = calloc(1, sizeof *function);
    if (!function) {
        return call_end(CUDA_ERROR_OUT_OF_MEMORY);
    }
    function->module = module;
    snprintf(function->name, sizeof function->name, "%s", name);
    read_params(entry, function);
    object_add(&function->object, OBJECT_FUNCTION);
    *handle = (CUfunction)(uintptr_t)function->object.handle;
    return call_end(CUDA_SUCCESS);
}

CUresult cuFuncGetAttribute(int *value, int attribute, CUfunction handle) {
    enum { MAX_THREADS_PER_BLOCK = 0, REGISTERS = 4 };
    ENTER(NEEDS_CONTEXT)
    if (!value || attribute < 0 || attribute > 15) {
        return call_end(CUDA_ERROR_INVALID_VALUE);
    }
    if (!object_find(OBJECT_FUNCTION, (uintptr_t)handle)) {
        return call_end(CUDA_ERROR_INVALID_HANDLE);
    }
    *value = attribute == MAX_THREADS_PER_BLOCK ? 1024 : attribute == REGISTERS ? 32 : 0;
    return call_end(CUDA_SUCCESS);
}

CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, CUfunction handle, int block_size, size_t shared_bytes) {
    ENTER(NEEDS_CONTEXT)
    if (!blocks || block_size < 1 || block_size > 1024) {
        return call_end(CUDA_ERROR_INVALID_VALUE);
    }
    if (!object_find(OBJECT_FUNCTION, (uintptr_t)handle)) {
        return call_end(CUDA_ERROR_INVALID_HANDLE);
    }
    size_t by_threads = 2048 / (size_t)block_size;
    size_t by_memory = shared_bytes ? 233472 / shared_bytes : 32;
    size_t most = by_threads < by_memory ? by_threads : by_memory;
    *blocks = (int)(most < 32 ? most : 32);
    return call_end(CUDA_SUCCESS);
}

/* ---- Launches ---- */

void kernel_free(struct kernel_call *kernel) {
    free(kernel->name);
    free(kernel->sizes);
    free(kernel->params);
    free(kernel->bytes);
    free(kernel);
}

/* A call with room for its parameters, laid out one behind the other as in a parameter buffer. */
static struct kernel_call *kernel_new(const char *name, unsigned count, const size_t *sizes, const size_t *aligns) {
    struct kernel_call *kernel = calloc(1, sizeof *kernel);
    if (!kernel) {
        return NULL;
    }
    kernel->name = strdup(name);
    kernel->param_count = count;
    kernel->sizes = calloc(count + 1, sizeof *kernel->sizes);
    kernel->params = calloc(count + 1, sizeof *kernel->params);
    size_t offsets[MAX_PARAMS], end = 0;
    for (unsigned i = 0; i < count; i++) {
        offsets[i] = (end + aligns[i] - 1) / aligns[i] * aligns[i];
        end = offsets[i] + sizes[i];
    }
    kernel->byte_count = end;
    kernel->bytes = calloc(1, end + 1);
    if (!kernel->name || !kernel->sizes || !kernel->params || !kernel->bytes) {
        kernel_free(kernel);
        return NULL;
    }
    for (unsigned i = 0; i < count; i++) {
        kernel->sizes[i] = sizes[i];
        kernel->params[i] = kernel->bytes + offsets[i];
    }
    return kernel;
}

struct kernel_call *kernel_clone(const struct kernel_call *from) {
    struct kernel_call *kernel = calloc(1, sizeof *kernel);
    if (!kernel) {
        return NULL;
    }
    *kernel = *from;
    kernel->name = strdup(from->name);
    kernel->sizes = calloc(from->param_count + 1, sizeof *kernel->sizes);
    kernel->params = calloc(from->param_count + 1, sizeof *kernel->params);
    kernel->bytes = calloc(1, from->byte_count + 1);
    if (!kernel->name || !kernel->sizes || !kernel->params || !kernel->bytes) {
        kernel_free(kernel);
        return NULL;
    }
    memcpy(kernel->bytes, from->bytes, from->byte_count);
    for (unsigned i = 0; i < from->param_count; i++) {
        kernel->sizes[i] = from->sizes[i];
        kernel->params[i] = kernel->bytes + ((char *)from->params[i] - from->bytes);
    }
    return kernel;
}

/* The alternative to a list of pointers: one buffer with all parameters. */
static bool params_from_buffer(struct kernel_call *kernel, void **extra) {
    const void *buffer = NULL;
    size_t size = 0;
    for (; *extra != (void *)CU_LAUNCH_PARAM_END; extra += 2) {
        if (*extra == (void *)CU_LAUNCH_PARAM_BUFFER_POINTER) {
            buffer = extra[1];
        } else if (*extra == (void *)CU_LAUNCH_PARAM_BUFFER_SIZE) {
            size = *(size_t *)extra[1];
        } else {
            return false;
        }
    }
    if (!buffer || size < kernel->byte_count) {
        return false;
    }
    memcpy(kernel->bytes, buffer, kernel->byte_count);
    return true;
}

static bool params_read(struct kernel_call *kernel, void **params, void **extra) {
    if (params && extra) {
        return false;
    }
    if (kernel->param_count == 0) {
        return true;
    }
    if (extra) {
        return params_from_buffer(kernel, extra);
    }
    for (unsigned i = 0; i < kernel->param_count; i++) {
        if (!params || !params[i]) {
            return false;
        }
        memcpy(kernel->params[i], params[i], kernel->sizes[i]);
    }
    return true;
}

CUresult cuLaunchKernel(CUfunction handle, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                        unsigned block_z, unsigned shared_bytes, CUstream stream_handle, void **params, void **extra) {
    ENTER(NEEDS_CONTEXT)
    struct function *function = object_find(OBJECT_FUNCTION, (uintptr_t)handle);
    struct stream *stream = stream_lookup(stream_handle);
    if (!function || !stream || stream->context != function->module->context) {
        return call_end(CUDA_ERROR_INVALID_HANDLE);
    }
    bool shape = grid_x && grid_y && grid_z && block_x && block_y && block_z && grid_x <= 0x7fffffff && grid_y <= 65535 &&
                 grid_z <= 65535 && block_x <= 1024 && block_y <= 1024 && block_z <= 64 &&
                 (uint64_t)block_x * block_y * block_z <= 1024 && shared_bytes <= 232448;
    if (!shape) {
        return call_end(CUDA_ERROR_INVALID_VALUE);
    }
    if (!model_exists(function->name)) {
        return call_end(CUDA_ERROR_NOT_FOUND);
    }
    struct op *op = op_new(OP_KERNEL);
    struct kernel_call *kernel = op ? kernel_new(function->name, function->param_count, function->sizes, function->aligns) : NULL;
    if (!kernel) {
        free(op);
        return call_end(CUDA_ERROR_OUT_OF_MEMORY);
    }
    op->kernel = kernel;
    memcpy(kernel->grid, (unsigned[]){grid_x, grid_y, grid_z}, sizeof kernel->grid);
    memcpy(kernel->block, (unsigned[]){block_x, block_y, block_z}, sizeof kernel->block);
    kernel->shared_bytes = shared_bytes;
    if (!params_read(kernel, params, extra)) {
        op_free(op);
        return call_end(CUDA_ERROR_INVALID_VALUE);
    }
    return call_end(stream_submit(stream, op, NULL));
}

int kernel_run(struct fc_context *context, struct kernel_call *kernel) {
    const struct model *model = model_find(kernel->name);
    if (!model || !model->kernel) {
        return CUDA_ERROR_NOT_FOUND;
    }
    fakecuda_kernel run = model->kernel;
    struct launch_state state = {.device = context->device};
    struct fakecuda_launch launch = {.name = kernel->name,
                                     .device = context->device,
                                     .grid = {kernel->grid[0], kernel->grid[1], kernel->grid[2]},
                                     .block = {kernel->block[0], kernel->block[1], kernel->block[2]},
                                     .shared_bytes = kernel->shared_bytes,
                                     .param_count = kernel->param_count,
                                     .params = kernel->params,
                                     .param_sizes = kernel->sizes,
                                     .state = &state};
    state_unlock();
    in_callback = true;
    run(&launch);
    in_callback = false;
    state_lock();
    return state.error;
}

static int kernel_access(const struct fakecuda_launch *launch, uint64_t address, void *out, const void *in, size_t size) {
    struct launch_state *launched = launch->state;
    struct side side;
    int rc = CUDA_SUCCESS;
    state_lock();
    if (size) {
        bool reachable = side_classify(&side, (uintptr_t)address, size, launched->device) &&
                         (side.kind == SIDE_DEVICE || side.registration);
        rc = !reachable ? CUDA_ERROR_ILLEGAL_ADDRESS : out ? side_read(&side, out, size) : side_write(&side, in, size);
    }
    if (rc) {
        launched->error = rc;
    }
    state_unlock();
    return rc != 0;
}

int fakecuda_kernel_read(const struct fakecuda_launch *launch, uint64_t address, void *out, size_t size) {
    return kernel_access(launch, address, out, NULL, size);
}

int fakecuda_kernel_write(const struct fakecuda_launch *launch, uint64_t address, const void *in, size_t size) {
    return kernel_access(launch, address, NULL, in, size);
}

/* fakecuda_fill(u64 address, u32 value, u64 count): sets bytes. */
static void fill_kernel(const struct fakecuda_launch *launch) {
    uint64_t address, count;
    uint32_t value;
    if (launch->param_count != 3) {
        return;
    }
    memcpy(&address, launch->params[0], sizeof address);
    memcpy(&value, launch->params[1], sizeof value);
    memcpy(&count, launch->params[2], sizeof count);
    char bytes[4096];
    memset(bytes, (int)value, sizeof bytes);
    for (uint64_t done = 0; done < count;) {
        size_t piece = count - done < sizeof bytes ? (size_t)(count - done) : sizeof bytes;
        if (fakecuda_kernel_write(launch, address + done, bytes, piece)) {
            return;
        }
        done += piece;
    }
}
