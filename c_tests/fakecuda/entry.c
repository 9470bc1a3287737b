/* The way into and out of every driver call: settings from the environment, the lock, the checks
 * that all calls share (fork, faults, initialisation, sticky errors, context, capture). */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

#include "internal.h"

#ifdef FAKECUDA_STUB
enum { IS_STUB = 1 };
#else
enum { IS_STUB = 0 };
#endif

struct settings settings = {
    .devices = 1,
    .version = 13000,
    .late_us_default = 300,
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static bool configured;
static bool forked;
static uint64_t sequence;
static unsigned random_state = 1;

static uint64_t environment_number(const char *name, uint64_t fallback) {
    const char *text = getenv(name);
    if (!text || !*text) {
        return fallback;
    }
    char *end;
    uint64_t value = strtoull(text, &end, 0);
    switch (*end) {
    case 'k':
    case 'K':
        return value << 10;
    case 'm':
    case 'M':
        return value << 20;
    case 'g':
    case 'G':
        return value << 30;
    default:
        return value;
    }
}

/* Read at the first use and not at load, so that a test can set its environment before. */
static void configure(void) {
    configured = true;
    uint64_t devices = environment_number("FAKECUDA_DEVICES", 1);
    settings.devices = devices > MAX_DEVICES ? MAX_DEVICES : (int)devices;
    settings.version = (int)environment_number("FAKECUDA_VERSION", 13000);
    settings.init_code = (int)environment_number("FAKECUDA_INIT", 0);
    settings.late_us_default = (unsigned)environment_number("FAKECUDA_LATE_US", 300);
    settings.late_us = environment_number("FAKECUDA_LATE", 0) ? settings.late_us_default : 0;
    settings.host_unreadable = environment_number("FAKECUDA_HOST_UNREADABLE", 0) != 0;
    for (int device = 0; device < MAX_DEVICES; device++) {
        settings.memory[device] = environment_number("FAKECUDA_MEMORY", (uint64_t)4 << 30);
        contexts[device].device = device;
    }
    fault_add_from_environment(getenv("FAKECUDA_FAIL"));
}

static void before_fork(void) {
    pthread_mutex_lock(&lock);
}

static void after_fork_in_parent(void) {
    pthread_mutex_unlock(&lock);
}

/* The workers do not exist in the child, so the condition may be left in any state: start anew. */
static void after_fork_in_child(void) {
    forked = settings.initialised;
    pthread_mutex_init(&lock, NULL);
    pthread_cond_init(&changed, NULL);
}

__attribute__((constructor)) static void watch_forks(void) {
    pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
}

void state_lock(void) {
    pthread_mutex_lock(&lock);
    if (!configured) {
        configure();
    }
}

void state_unlock(void) {
    pthread_mutex_unlock(&lock);
}

void state_wait(void) {
    pthread_cond_wait(&changed, &lock);
}

void state_wait_for(unsigned microseconds) {
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_nsec += (long)microseconds * 1000;
    until.tv_sec += until.tv_nsec / 1000000000;
    until.tv_nsec %= 1000000000;
    pthread_cond_timedwait(&changed, &lock, &until);
}

void state_wake(void) {
    pthread_cond_broadcast(&changed);
}

static int health(void) {
    struct fc_context *context = context_current();
    if (fault_poison()) {
        return fault_poison();
    }
    return context ? context->sticky : 0;
}

static int needs_met(int needs) {
    if ((needs & NEEDS_INIT) && !settings.initialised) {
        return CUDA_ERROR_NOT_INITIALIZED;
    }
    if ((needs & NEEDS_CONTEXT) == NEEDS_CONTEXT) {
        struct fc_context *context = context_current();
        if (!context) {
            return CUDA_ERROR_INVALID_CONTEXT;
        }
        if (context->refs == 0) {
            return CUDA_ERROR_CONTEXT_IS_DESTROYED;
        }
    }
    if ((needs & NEEDS_HEALTH) == NEEDS_HEALTH && health()) {
        return health();
    }
    return (needs & UNSAFE_IN_CAPTURE) ? capture_check_unsafe() : 0;
}

bool call_begin(struct call_site *site, int needs, int *rc) {
    state_lock();
    if (IS_STUB) {
        *rc = CUDA_ERROR_STUB_LIBRARY;
    } else if (forked) {
        *rc = CUDA_ERROR_NOT_INITIALIZED;
    } else if (!fault_check(site, rc)) {
        /* A host function or a kernel model may not call back into the driver. */
        *rc = in_callback ? CUDA_ERROR_NOT_PERMITTED : needs_met(needs);
        if (*rc == 0) {
            return true;
        }
    }
    state_unlock();
    return false;
}

int call_end(int rc) {
    state_unlock();
    return rc;
}

bool device_valid(int device) {
    return device >= 0 && device < settings.devices;
}

uint64_t device_free_bytes(int device) {
    uint64_t taken = settings.used[device] + settings.external[device];
    return taken < settings.memory[device] ? settings.memory[device] - taken : 0;
}

unsigned random_below(unsigned limit) {
    return limit ? (unsigned)rand_r(&random_state) % limit : 0;
}

uint64_t next_sequence(void) {
    return ++sequence;
}
