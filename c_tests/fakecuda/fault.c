/* Fault injection, the count of calls and their trace. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

enum { MAX_FAULTS = 128, MAX_NAME = 64, TRACE_LENGTH = 1 << 20 };

struct fault {
    char function[MAX_NAME]; /* "" = any */
    uint64_t nth;
    uint64_t seen;
    int code;
    int repeat;
    bool poisons;
};

static struct fault faults[MAX_FAULTS];
static int fault_count;
static int poison;

static struct call_site *sites;
static uint64_t total;
static const char **trace;
static uint64_t trace_capacity;
static char *excluded;

static bool name_listed(const char *list, const char *name) {
    size_t length = strlen(name);
    for (const char *at = list; at && *at;) {
        size_t item = strcspn(at, ", ");
        if (item == length && memcmp(at, name, length) == 0) {
            return true;
        }
        at += item;
        at += strspn(at, ", ");
    }
    return false;
}

static void fault_add(const char *function, uint64_t nth, int code, int repeat, bool poisons) {
    if (fault_count == MAX_FAULTS) {
        fprintf(stderr, "fakecuda: more than %d faults\n", MAX_FAULTS);
        return;
    }
    struct fault *fault = &faults[fault_count++];
    *fault = (struct fault){.nth = nth ? nth : 1, .code = code, .repeat = repeat ? repeat : 1, .poisons = poisons};
    snprintf(fault->function, sizeof fault->function, "%s", function);
}

/* "function:nth:code[:repeat]", several separated by commas; "*" means any function. */
void fault_add_from_environment(const char *text) {
    while (text && *text) {
        char function[MAX_NAME];
        unsigned long long nth;
        int code, repeat = 1;
        if (sscanf(text, "%63[^:, ]:%llu:%d:%d", function, &nth, &code, &repeat) >= 3) {
            fault_add(strcmp(function, "*") == 0 ? "" : function, nth, code, repeat, false);
        } else {
            fprintf(stderr, "fakecuda: FAKECUDA_FAIL is not function:nth:code[:repeat]: %s\n", text);
        }
        text += strcspn(text, ", ");
        text += strspn(text, ", ");
    }
}

static void site_learn(struct call_site *site) {
    if (!site->known) {
        site->known = true;
        site->excluded = name_listed(excluded, site->name);
        site->next = sites;
        sites = site;
    }
}

static void trace_add(const char *name) {
    if (total > TRACE_LENGTH) {
        return;
    }
    if (total > trace_capacity) {
        uint64_t capacity = trace_capacity ? trace_capacity * 2 : 1024;
        const char **grown = realloc(trace, capacity * sizeof *trace);
        if (!grown) {
            return;
        }
        trace = grown;
        trace_capacity = capacity;
    }
    trace[total - 1] = name;
}

static bool fault_applies(const struct fault *fault, const struct call_site *site) {
    return fault->function[0] ? strcmp(fault->function, site->name) == 0 : !site->excluded;
}

static bool fault_fires(const struct fault *fault) {
    return fault->seen >= fault->nth && (fault->repeat < 0 || fault->seen - fault->nth < (uint64_t)fault->repeat);
}

bool fault_check(struct call_site *site, int *rc) {
    site_learn(site);
    site->calls++;
    if (!site->excluded) {
        total++;
        trace_add(site->name);
    }
    const struct fault *hit = NULL;
    for (int i = 0; i < fault_count; i++) {
        if (fault_applies(&faults[i], site)) {
            faults[i].seen++;
            if (!hit && fault_fires(&faults[i])) {
                hit = &faults[i];
            }
        }
    }
    if (!hit) {
        return false;
    }
    *rc = hit->code;
    if (hit->poisons) {
        poison = hit->code;
        for (int device = 0; device < MAX_DEVICES; device++) {
            contexts[device].sticky = hit->code;
        }
    }
    return true;
}

int fault_poison(void) {
    return poison;
}

void fakecuda_reset_faults(void) {
    state_lock();
    fault_count = 0;
    poison = 0;
    for (int device = 0; device < MAX_DEVICES; device++) {
        contexts[device].sticky = 0;
    }
    state_unlock();
}

void fakecuda_fail(const char *function, uint64_t nth, int code, int repeat) {
    state_lock();
    fault_add(function, nth, code, repeat, false);
    state_unlock();
}

void fakecuda_fail_any(uint64_t nth, int code, int repeat) {
    state_lock();
    fault_add("", nth, code, repeat, false);
    state_unlock();
}

void fakecuda_fail_any_effect(uint64_t nth, int code) {
    state_lock();
    fault_add("", nth, code, 1, true);
    state_unlock();
}

void fakecuda_exclude(const char *comma_list) {
    state_lock();
    free(excluded);
    excluded = comma_list && *comma_list ? strdup(comma_list) : NULL;
    for (struct call_site *site = sites; site; site = site->next) {
        site->excluded = name_listed(excluded, site->name);
    }
    state_unlock();
}

uint64_t fakecuda_count(void) {
    state_lock();
    uint64_t count = total;
    state_unlock();
    return count;
}

void fakecuda_reset_count(void) {
    state_lock();
    total = 0;
    for (struct call_site *site = sites; site; site = site->next) {
        site->calls = 0;
    }
    state_unlock();
}

uint64_t fakecuda_count_of(const char *function) {
    state_lock();
    uint64_t count = 0;
    for (struct call_site *site = sites; site; site = site->next) {
        if (strcmp(site->name, function) == 0) {
            count = site->calls;
        }
    }
    state_unlock();
    return count;
}

const char *fakecuda_call_name(uint64_t nth) {
    state_lock();
    const char *name = nth >= 1 && nth <= total && nth <= trace_capacity && nth <= TRACE_LENGTH ? trace[nth - 1] : NULL;
    state_unlock();
    return name;
}
