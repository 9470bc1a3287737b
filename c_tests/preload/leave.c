/* The process ends with code 0, in whatever way and moment it ends. Argument 1 chooses. Run with
 * the library preloaded. */
#include <pthread.h>
#include <sys/wait.h>

#include "preload.h"

enum { BYTES = 4 << 20 };

static hooks_t hooks;
static void *memory, *paused;
static int foreign;

static void free_at_exit(void) {
    CHECK_EQ(hooks.cudaFree(memory), 0);
    CHECK_EQ(hooks.cudaFree(paused), 0);
    hooks.cudaFree(&foreign);
    hooks.cudaFree(NULL);
    void *late = NULL;
    hooks.set_region(true);
    hooks.cudaMalloc(&late, BYTES);
    hooks.cudaGetLastError();
    hooks.pause(NULL);
    hooks.resume(NULL);
}

static void *work_forever(void *unused) {
    hooks.set_region(true);
    for (;;) {
        void *block = NULL;
        if (!hooks.cudaMalloc(&block, BYTES)) hooks.cudaFree(block);
    }
    return unused;
}

static void *exit_here(void *unused) {
    exit(0);
    return unused;
}

static pthread_key_t key;

static void free_in_teardown(void *block) {
    CHECK_EQ(hooks.cudaFree(block), 0);
    void *fresh = NULL;
    hooks.cudaMalloc(&fresh, 64);
    hooks.cudaFree(fresh);
}

static void *use_key(void *unused) {
    void *block = NULL;
    hooks.set_region(true);
    CHECK_EQ(hooks.cudaMalloc(&block, BYTES), 0);
    pthread_setspecific(key, block);
    return unused;
}

static void in_child(void) {
    void *block = NULL;
    hooks.set_region(true);
    CHECK(hooks.cudaMalloc(&block, BYTES) != 0);
    CHECK(!block);
    CHECK(hooks.pause(NULL) != 0);
    CHECK(hooks.resume(NULL) != 0);
    hooks.cudaFree(memory);
    hooks.cudaFree(&foreign);
    exit(0);
}

int main(int argc, char **argv) {
    CHECK(argc == 2);
    const char *how = argv[1];
    pthread_t thread;
    hooks = hooks_of(RTLD_DEFAULT);
    if (!strcmp(how, "atexit-before")) atexit(free_at_exit);

    hooks.set_region(true);
    hooks.set_cpu_backup(true);
    hooks.set_tag("paused");
    CHECK_EQ(hooks.cudaMalloc(&paused, BYTES), 0);
    CHECK_EQ(hooks.pause("paused"), 0);
    hooks.set_tag("default");
    CHECK_EQ(hooks.cudaMalloc(&memory, BYTES), 0);
    fill_random(memory, BYTES, 5);

    if (!strcmp(how, "atexit-after")) {
        atexit(free_at_exit);
    } else if (!strcmp(how, "threads")) {
        for (int i = 0; i < 3; i++) CHECK(!pthread_create(&thread, NULL, work_forever, NULL));
        usleep(20000);
    } else if (!strcmp(how, "exit-in-thread")) {
        CHECK(!pthread_create(&thread, NULL, exit_here, NULL));
        pthread_join(thread, NULL);
    } else if (!strcmp(how, "thread-teardown")) {
        CHECK(!pthread_key_create(&key, free_in_teardown));
        CHECK(!pthread_create(&thread, NULL, use_key, NULL));
        pthread_join(thread, NULL);
    } else if (!strcmp(how, "fork")) {
        int status = -1;
        pid_t child = fork();
        CHECK(child >= 0);
        if (!child) in_child();
        CHECK(waitpid(child, &status, 0) == child);
        CHECK(WIFEXITED(status));
        CHECK_EQ(WEXITSTATUS(status), 0);
        CHECK(holds_random(memory, BYTES, 5));
        CHECK_EQ(hooks.resume(NULL), 0);
        CHECK_EQ(hooks.cudaFree(memory), 0);
    } else {
        CHECK(!strcmp(how, "live") || !strcmp(how, "atexit-before"));
    }
    return 0;
}
