"""Reading the formats people have, tokenizing, packing, and checkpointable iterators."""
