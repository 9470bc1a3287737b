/* Tags and other texts: limits, characters, and what is refused. */
#include "check.h"

static tms_saver_t *saver;

static void tag_is(int32_t expected, const char *tag)
{
    tms_region_options_t region = check_region(tag, "pinned");
    void *memory = NULL;
    CHECK_STATUS(expected, tms_saver_malloc(saver, 4096, -1, &region, &memory));
    CHECK_STATUS(expected, tms_region_push(&region));
    if (expected != TMS_OK) {
        CHECK(memory == NULL);
        return;
    }
    CHECK(strcmp(tms_get_current_tag(), tag) == 0);
    CHECK_OK(tms_region_pop());
    check_fill(memory, 4096, 1);
    CHECK(strcmp(check_query(saver, memory).tag, tag) == 0);
    CHECK(check_pause(saver, tag).done_count == 1);
    CHECK(check_resume(saver, tag).done_count == 1);
    CHECK_KEPT(memory, 4096, 1);
    tms_stats_t entry;
    memset(&entry, 0, sizeof entry);
    entry.struct_size = (uint32_t)sizeof entry;
    size_t count = 0;
    CHECK_OK(tms_saver_stats(saver, &entry, 1, &count));
    CHECK(count == 1 && strcmp(entry.tag, tag) == 0);
    CHECK_OK(tms_saver_free_memory(saver, memory));
}

/* Tags in the list of a pause follow the rules of tags. */
static void listed_tag_is_refused(const char *tag)
{
    tms_pause_options_t pause = check_pause_options(&tag, 1);
    CHECK_STATUS(TMS_ERR_INVALID_ARGUMENT, tms_saver_pause(saver, &pause, NULL));
    tms_resume_options_t resume = check_resume_options(&tag, 1);
    CHECK_STATUS(TMS_ERR_INVALID_ARGUMENT, tms_saver_resume(saver, &resume, NULL));
}

int main(void)
{
    check_begin();
    saver = check_saver();
    tag_is(TMS_OK, "default");
    tag_is(TMS_OK, "x");
    tag_is(TMS_OK, " with spaces, and \t tab / slash %s %n \\ \"quotes\"");
    tag_is(TMS_OK, "\xC3\xBC\xE6\xA8\xA1\xE5\x9E\x8B\xF0\x9F\x90\x8D");

    char longest[258];
    memset(longest, 'l', sizeof longest);
    longest[255] = '\0';
    tag_is(TMS_OK, longest);
    longest[255] = 'l';
    longest[256] = '\0';
    tag_is(TMS_ERR_INVALID_ARGUMENT, longest);
    listed_tag_is_refused(longest);
    CHECK(strstr(tms_last_error_message(), "255") != NULL);
    tag_is(TMS_ERR_INVALID_ARGUMENT, "");
    tag_is(TMS_ERR_INVALID_ARGUMENT, "not UTF-8: \xFF");
    listed_tag_is_refused("not UTF-8: \xFF");
    listed_tag_is_refused("");

    tms_saver_options_t options;
    memset(&options, 0, sizeof options);
    options.struct_size = (uint32_t)sizeof options;
    tms_saver_t *other = NULL;
    static const char *const refused[] = {"host ", "gpu", "\xFF"};
    for (size_t i = 0; i < 3; i++) {
        options.device = refused[i];
        CHECK_STATUS(TMS_ERR_INVALID_ARGUMENT, tms_saver_create(&options, &other));
    }
    /* An empty name means what TMS_DEVICE says, as an empty variable does. */
    static const char *const taken[] = {"", "HOST", "host"};
    for (size_t i = 0; i < 3; i++) {
        options.device = taken[i];
        CHECK_OK(tms_saver_create(&options, &other));
        CHECK_OK(tms_saver_free(other));
        other = NULL;
    }
    options.flags = 1;
    CHECK_STATUS(TMS_ERR_INVALID_ARGUMENT, tms_saver_create(&options, &other));
    options.flags = 0;
    options.struct_size = 3;
    CHECK_STATUS(TMS_ERR_INVALID_ARGUMENT, tms_saver_create(&options, &other));

    /* A newer program's longer struct: fine while the new fields are zero. */
    struct {
        tms_saver_options_t known;
        uint64_t newer;
    } grown;
    memset(&grown, 0, sizeof grown);
    grown.known.struct_size = (uint32_t)sizeof grown;
    grown.known.device = "host";
    CHECK_OK(tms_saver_create(&grown.known, &other));
    CHECK_OK(tms_saver_free(other));
    grown.newer = 1;
    CHECK_STATUS(TMS_ERR_UNSUPPORTED, tms_saver_create(&grown.known, &other));

    CHECK_OK(tms_saver_free(saver));
    return 0;
}
