/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Counts outcomes: finish() those of packets, hold.h those of fragments that it let go. */
#pragma once

#include "maps.h"

static __always_inline void count(__u8 family, enum direction direction, enum outcome out,
				  __u32 packets, __u32 bytes)
{
	__u32 slot = (out * 2 + direction) * 2 + (family & 1);
	struct counter *c = bpf_map_lookup_elem(&counters, &slot);

	if (c) {
		c->packets += packets;
		c->bytes += bytes;
	}
}
