"""RMSNorm of queries and keys, three-axis rotary positions, and keys and values written where the cache wants them."""
