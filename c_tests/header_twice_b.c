/* See header_twice_a.c. */
#include "tms.h"
#include "tms.h"

#include "memcache.h"
#include "memcache.h"

#ifdef __cplusplus
extern "C"
#endif
    const char *
    other_file_version(void);

const char *other_file_version(void)
{
    return tms_version();
}
