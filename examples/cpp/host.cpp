// A C++17 program over the C header, with handles that free themselves:
//
//     c++ -std=c++17 host.cpp $(pkg-config --cflags --libs tms-memcache) -o host
//
// A rollout engine's view: weights with a backup and a cache without one make room for somebody
// else, and come back.

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include <tms.h>

namespace tms {

/// A failed call: its status code and the library's message.
class error : public std::runtime_error {
public:
    error(std::int32_t status, const char *what)
        : std::runtime_error(std::string(what) + ": " + tms_status_str(status) + ": " +
                             tms_last_error_message()),
          status_(status)
    {
    }

    [[nodiscard]] std::int32_t status() const noexcept { return status_; }

private:
    std::int32_t status_;
};

inline void check(std::int32_t status, const char *what)
{
    if (status != TMS_OK) {
        throw error(status, what);
    }
}

/// A struct of the header, zero-filled and with its size set.
template <typename T> T sized()
{
    T value{};
    value.struct_size = sizeof(T);
    return value;
}

/// Allocations of the calling thread follow the region while this object lives.
class region {
public:
    explicit region(const char *tag, const char *backup = "pinned")
    {
        auto options = sized<tms_region_options_t>();
        options.tag = tag;
        options.backup = backup;
        check(tms_region_push(&options), "entering a region");
    }

    ~region() { tms_region_pop(); }

    region(const region &) = delete;
    region &operator=(const region &) = delete;
};

/// An operation under way. Destroying it does not stop the operation.
class operation {
public:
    explicit operation(tms_op_t *op) : op_(op) {}

    void wait() const { check(tms_op_wait(op_.get(), TMS_WAIT_FOREVER), "waiting"); }

    [[nodiscard]] tms_result_t result() const
    {
        auto result = sized<tms_result_t>();
        check(tms_op_result(op_.get(), &result), "asking for the result");
        return result;
    }

private:
    struct free_op {
        void operator()(tms_op_t *op) const noexcept { tms_op_free(op); }
    };
    std::unique_ptr<tms_op_t, free_op> op_;
};

/// Owns device memory; frees it all when destroyed.
class saver {
public:
    saver()
    {
        tms_saver_t *handle = nullptr;
        check(tms_saver_create(nullptr, &handle), "creating a saver");
        handle_.reset(handle);
    }

    /// Freed by the returned pointer, which must not outlive the saver.
    auto malloc(std::size_t bytes)
    {
        void *memory = nullptr;
        check(tms_saver_malloc(handle_.get(), bytes, -1, nullptr, &memory), "allocating");
        auto free = [saver = handle_.get()](std::uint8_t *pointer) {
            tms_saver_free_memory(saver, pointer);
        };
        return std::unique_ptr<std::uint8_t[], decltype(free)>(static_cast<std::uint8_t *>(memory),
                                                               free);
    }

    [[nodiscard]] operation pause(const std::vector<const char *> &tags)
    {
        auto options = sized<tms_pause_options_t>();
        options.tags = tags.data();
        options.tag_count = tags.size();
        tms_op_t *op = nullptr;
        check(tms_saver_pause_async(handle_.get(), &options, &op), "pausing");
        return operation(op);
    }

    [[nodiscard]] operation resume(const std::vector<const char *> &tags)
    {
        auto options = sized<tms_resume_options_t>();
        options.tags = tags.data();
        options.tag_count = tags.size();
        tms_op_t *op = nullptr;
        check(tms_saver_resume_async(handle_.get(), &options, &op), "resuming");
        return operation(op);
    }

    [[nodiscard]] std::vector<tms_stats_t> stats() const
    {
        std::size_t count = 0;
        check(tms_saver_stats(handle_.get(), nullptr, 0, &count), "counting");
        std::vector<tms_stats_t> entries(count, sized<tms_stats_t>());
        check(tms_saver_stats(handle_.get(), entries.data(), entries.size(), &count),
              "statistics");
        return entries;
    }

private:
    struct free_saver {
        void operator()(tms_saver_t *handle) const noexcept { tms_saver_free(handle); }
    };
    std::unique_ptr<tms_saver_t, free_saver> handle_;
};

} // namespace tms

namespace {

constexpr std::size_t weight_bytes = 48U << 20;
constexpr std::size_t cache_bytes = 32U << 20;

void show(const tms::saver &saver, std::string_view when)
{
    for (const auto &entry : saver.stats()) {
        std::printf("%-8.*s %-8s %3llu MiB active %3llu MiB paused\n",
                    static_cast<int>(when.size()), when.data(), entry.tag,
                    static_cast<unsigned long long>(entry.active_bytes >> 20),
                    static_cast<unsigned long long>(entry.paused_bytes >> 20));
    }
}

int run()
{
    auto device = tms::sized<tms_device_info_t>();
    tms::check(tms_device_info(-1, &device), "describing the device");
    std::printf("tms-memcache %s on %s\n", tms_version(), device.name);
    // Plain C++ reaches device memory only where it is host memory.
    const bool writable = device.kind == TMS_DEVICE_HOST;

    tms::saver saver;
    auto weights = [&] {
        tms::region region("weights", "pinned");
        return saver.malloc(weight_bytes);
    }();
    auto cache = [&] {
        tms::region region("cache", "none");
        return saver.malloc(cache_bytes);
    }();
    if (writable) {
        std::memset(weights.get(), 0x33, weight_bytes);
        std::memset(cache.get(), 0x44, cache_bytes);
    }
    show(saver, "loaded");

    auto pause = saver.pause({"weights", "cache"});
    pause.wait();
    std::printf("paused %llu allocations\n",
                static_cast<unsigned long long>(pause.result().done_count));
    show(saver, "paused");

    // Weights first: the cache is only needed once requests come again.
    saver.resume({"weights"}).wait();
    saver.resume({"cache"}).wait();
    show(saver, "resumed");

    for (std::size_t i = 0; writable && i < weight_bytes; i++) {
        if (weights[i] != 0x33) {
            std::fprintf(stderr, "byte %zu of the weights came back as %#x\n", i, weights[i]);
            return 1;
        }
    }
    for (std::size_t i = 0; writable && i < cache_bytes; i++) {
        if (cache[i] == 0x44) {
            std::fprintf(stderr, "byte %zu of the cache was not kept and yet is there\n", i);
            return 1;
        }
    }

    try {
        tms::region region("weights", "tape");
        return 1;
    } catch (const tms::error &refused) {
        std::printf("refused, as it should be: %s\n", refused.what());
        return refused.status() == TMS_ERR_INVALID_ARGUMENT ? 0 : 1;
    }
}

} // namespace

int main()
{
    try {
        return run();
    } catch (const std::exception &failure) {
        std::fprintf(stderr, "%s\n", failure.what());
        return 1;
    }
}
