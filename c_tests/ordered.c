/* Ordered resumes: readiness, waiting, wrong arguments, exit on the way; unchanged memory in results. */
#include "check.h"

#define SIZE ((size_t)12 << 20)
#define LAYERS 4

static const char *const BACKUPS[LAYERS] = {"pinned", "mmap", "pinned", "file"};

static void make_layers(const tms_saver_t *saver, void **layers)
{
    for (uint64_t i = 0; i < LAYERS; i++) {
        layers[i] = check_malloc(saver, SIZE, "layers", BACKUPS[i], i);
    }
}

static tms_op_t *start(const tms_saver_t *saver, void *const *pointers, size_t count)
{
    tms_op_t *op = NULL;
    CHECK_OK(tms_saver_resume_ordered_async(saver, pointers, count, NULL, &op));
    CHECK(op != NULL);
    return op;
}

static int32_t is_ready(const tms_op_t *op, const void *pointer)
{
    int32_t ready = -1;
    CHECK_OK(tms_op_ready(op, pointer, &ready));
    CHECK(ready == 0 || ready == 1);
    return ready;
}

/* Each layer is used as soon as it is there, while the rest arrives. */
static void used_as_they_come(const tms_saver_t *saver, void **layers)
{
    void *order[LAYERS] = {layers[2], (char *)layers[0] + SIZE - 1, layers[3], layers[2]};
    check_pause(saver, NULL);
    tms_op_t *op = start(saver, order, LAYERS);
    for (size_t i = 0; i < LAYERS; i++) {
        while (!is_ready(op, order[i])) {
            check_sleep_ms(1);
        }
        CHECK_OK(tms_op_stream_wait(op, order[i], NULL));
        CHECK(check_query(saver, order[i]).state == TMS_STATE_ACTIVE);
    }
    CHECK_KEPT(layers[2], SIZE, 2);
    CHECK_KEPT(layers[0], SIZE, 0);
    CHECK_KEPT(layers[3], SIZE, 3);
    CHECK_OK(tms_op_wait(op, 60000));
    tms_result_t result = check_result();
    CHECK_OK(tms_op_result(op, &result));
    CHECK(result.done_count == 3 && result.copied_bytes == 3 * SIZE);
    CHECK(check_query(saver, layers[1]).state == TMS_STATE_PAUSED);
    CHECK_STATUS(TMS_ERR_NOT_FOUND, tms_op_stream_wait(op, layers[1], NULL));
    CHECK_OK(tms_op_free(op));
    op = start(saver, layers, LAYERS);
    CHECK_OK(tms_op_stream_wait(op, layers[1], NULL));
    CHECK_OK(tms_op_wait(op, 60000));
    CHECK_OK(tms_op_result(op, &result));
    CHECK(result.done_count == 1 && result.unchanged_count == 3);
    CHECK_OK(tms_op_free(op));
    CHECK_KEPT(layers[1], SIZE, 1);
}

static void refused(const tms_saver_t *saver, void **layers)
{
    void *order[2] = {layers[0], &order};
    tms_op_t *op = NULL;
    check_pause(saver, NULL);
    CHECK_STATUS(TMS_ERR_NOT_FOUND, tms_saver_resume_ordered_async(saver, order, 2, NULL, &op));
    CHECK(strstr(tms_last_error_message(), "pointers[1]") != NULL);
    const char *tag = "layers";
    tms_resume_options_t options = check_resume_options(&tag, 1);
    CHECK_STATUS(TMS_ERR_INVALID_ARGUMENT,
                 tms_saver_resume_ordered_async(saver, order, 1, &options, &op));
    CHECK(op == NULL);
    CHECK(check_query(saver, layers[0]).state == TMS_STATE_PAUSED);
    /* Other operations have no order. */
    int32_t ready = 77;
    CHECK_OK(tms_saver_resume_async(saver, NULL, &op));
    CHECK_STATUS(TMS_ERR_INVALID_ARGUMENT, tms_op_stream_wait(op, layers[0], NULL));
    CHECK_STATUS(TMS_ERR_INVALID_ARGUMENT, tms_op_ready(op, layers[0], &ready));
    CHECK(ready == 77);
    CHECK_OK(tms_op_wait(op, 60000));
    CHECK_OK(tms_op_free(op));
}

/* Freed while it is resumed, ready or not; the handle goes first. */
static void freed_on_the_way(tms_saver_t *saver, void **layers)
{
    check_pause(saver, NULL);
    tms_op_t *op = start(saver, layers, LAYERS);
    CHECK_OK(tms_op_stream_wait(op, layers[0], NULL));
    for (size_t i = 0; i < LAYERS; i++) {
        CHECK_OK(tms_saver_free_memory(saver, layers[i]));
    }
    CHECK_OK(tms_op_free(op));
    size_t count = 1;
    CHECK_OK(tms_saver_stats(saver, NULL, 0, &count));
    CHECK(count == 0);
    int32_t status = TMS_ERR_BUSY;
    while (status == TMS_ERR_BUSY) {
        check_sleep_ms(1);
        status = tms_saver_free(saver);
    }
    CHECK(status == TMS_OK);
}

/* exit does not hang or crash in the middle of an ordered resume. */
static void exit_on_the_way(void)
{
    for (unsigned i = 0; i < 4; i++) {
        pid_t child = fork();
        CHECK(child >= 0);
        if (child == 0) {
            /* Where a leak check finds what is deliberately not freed. */
            static tms_saver_t *volatile saver;
            static tms_op_t *volatile op;
            saver = check_saver();
            void *layers[LAYERS];
            make_layers(saver, layers);
            check_pause(saver, NULL);
            op = start(saver, layers, LAYERS);
            if (i % 2 == 1) {
                CHECK_OK(tms_op_stream_wait(op, layers[i / 2], NULL));
            }
            exit(0);
        }
        int status = -1;
        CHECK(waitpid(child, &status, 0) == child);
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    }
}

static void unchanged_is_told(const tms_saver_t *saver)
{
    tms_region_options_t region = check_region("kept", "pinned");
    region.flags = TMS_REGION_RETAIN;
    void *memory = NULL;
    CHECK_OK(tms_saver_malloc(saver, SIZE, -1, &region, &memory));
    check_fill(memory, SIZE, 5);
    tms_result_t result = check_pause(saver, "kept");
    CHECK(result.copied_bytes == SIZE && result.unchanged_bytes == 0);
    check_resume(saver, "kept");
    result = check_pause(saver, "kept");
    CHECK(result.copied_bytes == 0 && result.unchanged_bytes == SIZE && result.done_count == 1);
    check_resume(saver, "kept");
    CHECK_KEPT(memory, SIZE, 5);

    /* A program of before has no room for the number. */
    result = check_result();
    result.struct_size = (uint32_t)offsetof(tms_result_t, unchanged_bytes);
    result.unchanged_bytes = 77;
    CHECK_OK(tms_saver_pause(saver, NULL, &result));
    CHECK(result.done_count == 1 && result.unchanged_bytes == 77);
    check_resume(saver, "kept");

    tms_pause_options_t options = check_pause_options(NULL, 0);
    options.flags = TMS_PAUSE_COPY_ALL;
    result = check_result();
    CHECK_OK(tms_saver_pause(saver, &options, &result));
    CHECK(result.copied_bytes == SIZE && result.unchanged_bytes == 0);
    options.flags = 1u << 31;
    CHECK_STATUS(TMS_ERR_INVALID_ARGUMENT, tms_saver_pause(saver, &options, NULL));
    check_resume(saver, "kept");
    CHECK_KEPT(memory, SIZE, 5);
    CHECK_OK(tms_saver_free_memory(saver, memory));
}

int main(void)
{
    check_begin();
    exit_on_the_way();
    tms_saver_t *saver = check_saver();
    void *layers[LAYERS];
    make_layers(saver, layers);
    for (int i = 0; i < 3; i++) {
        used_as_they_come(saver, layers);
    }
    refused(saver, layers);
    freed_on_the_way(saver, layers);
    saver = check_saver();
    unchanged_is_told(saver);
    CHECK_OK(tms_saver_free(saver));
    return 0;
}
