/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What the stages hand to each other about the packet at hand: one place a CPU, never pinned. */
#pragma once

#include "maps.h"

enum pool {
	POOL_PORTS, /* settings.port */
	POOL_IDENTIFIERS, /* 0-65535 (ICMP) */
	POOL_OWN, /* the packet's own port, if settings.port has it */
	POOL_NONE, /* protocols without ports */
};

/* A search for an external port; see claim.h. */
struct claim {
	__u32 start, stride, size;
	__u32 base; /* of the pool's part, in settings.port */
	__u32 limit; /* only ports below it */
	__u32 tried; /* candidates */
	__u32 outcome; /* enum outcome */
	__u8 pool; /* enum pool */
	__u8 bits; /* FLOW_* of the reverse entry */
	__u8 reused; /* the reverse entry was ours already */
	__u8 percent; /* of the pool that is open to this pod; see quota.h */
	__u8 asks; /* for sockets: the own port of a node's flow is held by the very one that sends */
	__u8 own; /* only the packet's own port */
	__u8 pad[2];
};

/* The headers that change, without a gap: the end of an IP header, whatever its family, and the
 * beginning of the transport header that follows. */
struct headers {
	union {
		struct addr v6[2]; /* source, destination */
		struct {
			__u8 before[22];
			__be16 checksum;
			__be32 v4[2];
		};
	};
	__be16 transport[10]; /* the ports; TCP's checksum is the ninth word */
};

_Static_assert(__builtin_offsetof(struct headers, transport) == 32, "no gap");

/* What the stages hand to each other. In a map and not on the stack, because the verifier tracks
 * every byte of a stack: each combination of header kinds would be a state of its own in all
 * that follows (more than a million instructions). Map memory it takes as unknown. Programs of
 * the tc hooks run with soft interrupts disabled, so one slot a CPU is enough.
 *
 * It also keeps frames small: kernels 5.10 and 6.1 round each frame of a call chain up to 32 bytes
 * (6.18 to 16), and refuse more than 512 ("combined stack size of 6 calls is 544"). */
struct scratch {
	struct packet packet;
	struct packet quote; /* the packet that an ICMP error quotes */
	struct tuple flow; /* the forward key at egress, the reverse key at ingress */
	struct tuple reverse; /* egress: the reverse key that belongs to it, or a candidate */
	struct endpoint to; /* the translation */
	struct endpoint owner; /* what a reverse entry says */
	struct claim claim;
	struct bpf_sock_tuple socket; /* to ask for */
	union flow_entry entry; /* what flow_add() inserts */
	struct headers headers; /* what rewrite_headers() writes */
	struct datagram datagram; /* of the fragment at hand, at ingress */
	__u8 header[60]; /* a quoted IPv4 header */
	__u8 quoted[ANSWER_CHUNK + 4]; /* a piece of what an ICMP error of ours quotes */
	__u32 decided; /* at egress, one above the generation that was asked; the sentinel takes it back */
	__u64 tick; /* outlive the packet: see now_seconds() */
	__u32 second;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct scratch);
} scratch SEC(".maps");
