/* A program that is linked with a runtime whose symbols carry versions, as NVIDIA's do: the
 * preloaded hooks catch its calls and reach the runtime behind them. */
#include "preload.h"

extern int cudaMalloc(void **, size_t);
extern int cudaFree(void *);
extern int fakecudart_calls(const char *);

int main(void) {
    hooks_t hooks = hooks_of(RTLD_DEFAULT);
    void *memory = NULL;
    CHECK_EQ(cudaMalloc(&memory, 64), 0);
    CHECK_EQ(fakecudart_calls("cudaMalloc"), 1);
    CHECK_EQ(cudaFree(memory), 0);
    CHECK_EQ(fakecudart_calls("cudaFree"), 1);
    hooks.set_region(true);
    CHECK_EQ(cudaMalloc(&memory, 64), 0);
    CHECK_EQ(fakecudart_calls("cudaMalloc"), 1);
    CHECK_EQ(cudaFree(memory), 0);
    CHECK_EQ(fakecudart_calls("cudaFree"), 1);
    return 0;
}
