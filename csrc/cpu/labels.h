// Labels are any int64; kernels want small numbers.
#pragma once
#include <cstdint>

namespace miue {

inline int64_t label_slots(int64_t B) {
    int64_t slots = 16;
    while (slots < 2 * B) slots *= 2;
    return slots;
}

// classes[i] = number of labels[i]'s class in order of first appearance; `table` has label_slots(B)
// entries. Returns the class count.
inline int64_t number_classes(const int64_t* labels, int64_t B, int64_t* classes, int64_t* table) {
    const int64_t slots = label_slots(B);
    // else: the first row with the label found there
    for (int64_t s = 0; s < slots; s++) table[s] = -1;
    int64_t count = 0;
    for (int64_t i = 0; i < B; i++) {
        uint64_t hash = uint64_t(labels[i]) * 0x9e3779b97f4a7c15u;
        int64_t s = int64_t((hash ^ hash >> 32) & uint64_t(slots - 1));
        while (table[s] >= 0 && labels[table[s]] != labels[i]) s = (s + 1) & (slots - 1);
        if (table[s] < 0) {
            table[s] = i;
            classes[i] = count++;
        } else {
            classes[i] = classes[table[s]];
        }
    }
    return count;
}

}  // namespace miue
