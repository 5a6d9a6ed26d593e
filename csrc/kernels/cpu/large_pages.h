// Memory for a large result that has just been allocated.
#pragma once

#include <cstdint>

namespace dtm_fast {

// Fills the pages of a result that is about to be written, large ones (2 MiB) where Linux has them: with
// small ones, the faults of a result of 100 MB take longer than most of what is computed into it. Does
// nothing for results that malloc may have had in use before, and nothing where the system cannot.
void populate_large_pages(void* data, int64_t bytes, int num_threads);

}  // namespace dtm_fast
