/* The headers, each twice and in one order here, in the other order in header_twice_b.c: built as
 * C and as C++ in every standard we promise, with every warning an error. */
#include "memcache.h"
#include "tms.h"

#include "tms.h"

#include "memcache.h"

#ifdef __cplusplus
extern "C"
#endif
    const char *
    other_file_version(void);

int main(void)
{
    const char *here = tms_version();
    const char *there = other_file_version();
    return here == there && tms_abi_version() == TMS_ABI_VERSION && TMS_OK == MEMCACHE_OK ? 0 : 1;
}
