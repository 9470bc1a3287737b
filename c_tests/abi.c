/* Versions agree between header and library; every status has words of its own. */
#include "check.h"
#include "memcache.h"

/* In the order of their values: 0, -1, -2 and so on. */
static const int32_t STATUSES[] = {
    TMS_OK,
    TMS_ERR_INVALID_ARGUMENT,
    TMS_ERR_NULL_POINTER,
    TMS_ERR_NOT_FOUND,
    TMS_ERR_OUT_OF_DEVICE_MEMORY,
    TMS_ERR_OUT_OF_HOST_MEMORY,
    TMS_ERR_UNSUPPORTED,
    TMS_ERR_NO_DEVICE,
    TMS_ERR_DEVICE,
    TMS_ERR_DEVICE_LOST,
    TMS_ERR_BUSY,
    TMS_ERR_TIMEOUT,
    TMS_ERR_IO,
    TMS_ERR_NO_SPACE,
    TMS_ERR_CORRUPT,
    TMS_ERR_EXPORTED,
    TMS_ERR_CAPTURE,
    TMS_ERR_FORKED,
    TMS_ERR_SHUTDOWN,
    TMS_ERR_ABI,
    TMS_ERR_PARTIAL,
    TMS_ERR_CANCELLED,
    TMS_ERR_INTERNAL,
};

#define COUNT (sizeof STATUSES / sizeof STATUSES[0])

int main(void)
{
    check_begin();

    char version[64];
    snprintf(version, sizeof version, "%d.%d.%d", (int)TMS_VERSION_MAJOR, (int)TMS_VERSION_MINOR,
             (int)TMS_VERSION_PATCH);
    CHECK(strcmp(tms_version(), version) == 0);
    CHECK(strcmp(memcache_version(), version) == 0);
    uint32_t number = (uint32_t)TMS_VERSION_MAJOR << 16 | (uint32_t)TMS_VERSION_MINOR << 8 |
                      (uint32_t)TMS_VERSION_PATCH;
    CHECK(tms_version_number() == number);
    CHECK(memcache_version_number() == number);
    CHECK(tms_abi_version() == TMS_ABI_VERSION);
    CHECK(memcache_abi_version() == MEMCACHE_ABI_VERSION);

    for (size_t i = 0; i < COUNT; i++) {
        CHECK(STATUSES[i] == -(int32_t)i);
        const char *words = tms_status_str(STATUSES[i]);
        CHECK(words != NULL && words[0] != '\0');
        CHECK(strcmp(words, memcache_status_str(STATUSES[i])) == 0);
        for (size_t j = 0; j < i; j++) {
            CHECK(strcmp(words, tms_status_str(STATUSES[j])) != 0);
        }
    }

    CHECK(MEMCACHE_OK == TMS_OK);
    CHECK(MEMCACHE_ERR_INVALID_ARGUMENT == TMS_ERR_INVALID_ARGUMENT);
    CHECK(MEMCACHE_ERR_NULL_POINTER == TMS_ERR_NULL_POINTER);
    CHECK(MEMCACHE_ERR_TIMEOUT == TMS_ERR_TIMEOUT);
    CHECK(MEMCACHE_ERR_ABI == TMS_ERR_ABI);
    CHECK(MEMCACHE_ERR_INTERNAL == TMS_ERR_INTERNAL);

    static const int32_t unknown[] = {1, 1000, -23, -1000, INT32_MAX, INT32_MIN};
    for (size_t i = 0; i < sizeof unknown / sizeof unknown[0]; i++) {
        const char *words = tms_status_str(unknown[i]);
        CHECK(words != NULL && words[0] != '\0');
        for (size_t j = 0; j < COUNT; j++) {
            CHECK(strcmp(words, tms_status_str(STATUSES[j])) != 0);
        }
    }

    CHECK(strcmp(tms_last_error_message(), "") == 0);
    CHECK(strcmp(memcache_last_error_message(), "") == 0);
    return 0;
}
