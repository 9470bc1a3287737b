/* Every name that the package and its hosts look up is on the library's handle; the names by which
 * they recognise another kind of device are not. */
#include "preload.h"

int main(int argc, char **argv) {
    static const char *const wanted[] = {
        "tms_set_current_tag", "tms_get_current_tag", "tms_set_interesting_region",
        "tms_get_interesting_region", "tms_set_enable_cpu_backup", "tms_get_enable_cpu_backup",
        "tms_set_cpu_backup_backend", "tms_get_cpu_backup_backend", "tms_set_enable_disk_backup",
        "tms_get_enable_disk_backup", "tms_set_disk_backup_dir", "set_memory_margin_bytes",
        "tms_set_retain_cpu_backup", "tms_get_retain_cpu_backup", "tms_pause", "tms_resume",
        "tms_get_cpu_backup_pointer", "tms_torch_malloc", "tms_torch_free", "cudaMalloc",
        "cudaFree", "cudaHostGetFlags", "cudaGetLastError", "tms_set_storage_backend_type",
        "tms_get_storage_backend_type", "tms_set_mooncake_config",
    };
    static const char *const unwanted[] = {
        "tms_xpu_prewarm_devices", "tms_xpu_device_free_bytes", "tms_xpu_committed_bytes",
        "tms_xpu_leaked_bytes", "tms_xpu_tracked_bytes", "tms_xpu_free",
        "tms_xpu_affected_devices",
    };
    CHECK(argc == 2);
    void *handle = open_library(argv[1]);
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
        void *found = symbol(handle, wanted[i]);
        Dl_info info;
        CHECK(dladdr(found, &info));
        CHECK(strstr(info.dli_fname, "preload"));
    }
    for (size_t i = 0; i < sizeof unwanted / sizeof *unwanted; i++)
        CHECK(!dlsym(handle, unwanted[i]));
    return 0;
}
