/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Every map and its keys and values (but what one CPU needs for a packet is in scratch.h, and the
 * sentinel's own in sentinel.h). Names have at most 15 characters: the kernel cuts them.
 *
 * A flow has two entries, one a direction, and each direction writes only its own: no packet
 * needs more than one look-up, and no cache line is shared between the directions. All tables
 * of flows are preallocated and never LRU: a live flow is not evicted to make room.
 */
#pragma once

#include "config.h"
#include "packet.h"

/* Bump when a key or value of a pinned map changes its meaning: the agent refuses or migrates. */
#define MAP_LAYOUT 2

/* Local is the node's side: the inner socket in the forward table, the external one in the
 * reverse table. */
struct tuple {
	struct addr local, remote;
	__be16 lport, rport;
	__u8 proto;
	__u8 pad[3];
};

struct tuple4 {
	__be32 local, remote;
	__be16 lport, rport;
	__u8 proto;
	__u8 pad[3];
};

/* TCP flags seen in this direction, and what the mapping is. */
#define FLOW_SYN 0x01
#define FLOW_FIN 0x02
#define FLOW_RST 0x04
#define FLOW_DATA 0x08 /* anything but a SYN */
#define FLOW_HOST 0x10 /* the inner socket is the node's own */
#define FLOW_OUT 0x20 /* inbound table only: answered by the pod */
#define FLOW_OUT_FIN 0x40 /* inbound table only: closed by the pod */
#define FLOW_AWAY 0x20 /* reverse table only: netfilter translates the answers, see ingress.h */
#define FLOW_HELD 0x40 /* reverse table only: they wait until it is clear who does */
#define FLOW_DEAD 0x80 /* reverse table only: for readers; what counts is flow_is_dead() */

struct flow {
	__u32 seen; /* second of the monotonic clock of this direction's last packet */
	__u32 created;
	__u32 packets;
	__be16 port; /* translated port: external in the forward table, inner in the reverse table */
	__u8 bits; /* FLOW_* */
	__u8 tag; /* of the key, see flow_tag() */
	__u64 bytes;
};

struct flow4 {
	struct flow flow;
	__be32 addr; /* translated address */
	__u32 pad;
};

struct flow6 {
	struct flow flow;
	struct addr addr;
};

/* A value of either family, to be filled without knowing which. */
union flow_entry {
	struct flow flow;
	struct flow4 v4;
	struct flow6 v6;
};

_Static_assert(sizeof(struct tuple) == 40 && sizeof(struct tuple4) == 16,
	       "keys have no hidden padding");
_Static_assert(sizeof(struct flow4) == 32 && sizeof(struct flow6) == 40,
	       "bytes per flow: 224 and 288");

#define FLOW_TABLE(name, key_type, value_type)                                                     \
	struct {                                                                                   \
		__uint(type, BPF_MAP_TYPE_HASH);                                                   \
		__uint(max_entries, DEFAULT_FLOWS);                                                \
		__type(key, key_type);                                                             \
		__type(value, value_type);                                                         \
		__uint(pinning, LIBBPF_PIN_BY_NAME);                                               \
	} name SEC(".maps")

/* Inner socket and remote -> external socket. Written at egress; swept by the agent. Full: new
 * flows are refused with OUT_DROP_TABLE_FULL. */
FLOW_TABLE(forward4, struct tuple4, struct flow4);
FLOW_TABLE(forward6, struct tuple, struct flow6);
/* External socket and remote -> inner socket. Inserting here, if absent, is what reserves a
 * port: two flows can never share an external tuple. */
FLOW_TABLE(reverse4, struct tuple4, struct flow4);
FLOW_TABLE(reverse6, struct tuple, struct flow6);

struct inbound {
	__u32 seen;
	__u32 created;
	__u32 packets;
	__u8 bits; /* FLOW_* */
	__u8 pad[3];
};

/* Connections opened from outside, keyed like forward. Tables of their own (a quarter of the
 * flows), so that outsiders can't exhaust mappings. Full: OUT_PASS_INBOUND_FULL. */
FLOW_TABLE(inbound4, struct tuple4, struct inbound);
FLOW_TABLE(inbound6, struct tuple, struct inbound);

/* A fragmented datagram, by direction: what its first fragment was told. */
struct datagram {
	struct addr src, dst;
	__be32 id;
	__u8 proto;
	__u8 ingress;
	__u8 pad[2];
};

struct fragment {
	struct addr addr; /* translated source (egress) or destination (ingress) */
	__u32 seen;
	__u32 outcome; /* OUT_MASQ_FRAGMENT, or the pass that the first fragment got */
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, FRAGMENT_ENTRIES);
	__type(key, struct datagram);
	__type(value, struct fragment);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} fragments SEC(".maps");

/* A place for a later fragment that came before its first; see hold.h. */
struct held {
	struct bpf_spin_lock lock;
	__u32 called; /* second in which a datagram whose window begins here was last waited for */
	__u32 since; /* second in which the place was taken; 0: free */
	__u32 bytes; /* from the IP header on; 0: being written or read */
	struct datagram datagram;
	__u8 data[HELD_BYTES];
};

/* 1 MB, both families. Written and read at ingress. Full, for HELD_SECONDS at most:
 * OUT_PASS_FRAGMENT. Not pinned: a new program begins with an empty one. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, HELD_ENTRIES);
	__type(key, __u32);
	__type(value, struct held);
} held SEC(".maps");

/* The first fragment itself, or its beginning, while its packet carries the held ones. */
struct carried {
	__u32 bytes;
	__u8 data[HELD_BYTES];
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct carried);
} carried SEC(".maps");

struct prefix {
	__u32 length; /* bits, of the v4-mapped address */
	struct addr addr;
};

struct rule {
	__u8 outcome; /* enum outcome that an address gets whose longest prefix this is */
	__u8 listed; /* lists that hold exactly this prefix; for readers only */
	__u16 source; /* TRIE_ROUTE: index into setting.source, 0 for the device's own address */
};

struct policy_trie {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, POLICY_ENTRIES);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	/* Sizes, not types: clang leaves types behind two pointers out of the BTF. */
	__uint(key_size, sizeof(struct prefix));
	__uint(value_size, sizeof(struct rule));
};

enum trie {
	TRIE_SOURCE = 0,
	TRIE_DESTINATION,
	TRIE_ROUTE,
	TRIE_REMOVED, /* destinations that lately were exclusions; asked of arriving packets only */
	TRIES,
};

/* Two sets of the policy's tables, for even and odd generations. The agent fills the idle one and
 * then writes the next number to control.active: a packet reads it once, so it never sees a mixture. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 2 * TRIES);
	__type(key, __u32);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__array(values, struct policy_trie);
} policies SEC(".maps");

/* What a table of the policy said of an address. */
struct answer {
	struct addr addr;
	__u32 generation; /* never comes again, so a new policy makes every answer void at once */
	__u8 trie; /* enum trie */
	__u8 valid;
	__u8 pad[2];
	struct rule rule;
};

/* Answers by a hash of the address: a look-up in a table of thousands of prefixes takes 60 ns. Per
 * CPU, so nobody waits for anybody; a collision replaces the older answer. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1 << ANSWER_BITS);
	__type(key, __u32);
	__type(value, struct answer);
} answers SEC(".maps");

enum timer {
	TIMER_TCP_SYN = 0,
	TIMER_TCP_ESTABLISHED,
	TIMER_TCP_CLOSING,
	TIMER_UDP,
	TIMER_UDP_STREAM,
	TIMER_ICMP,
	TIMER_OTHER,
	TIMERS,
};

enum unknown_protocols { UNKNOWN_MASQUERADE = 0, UNKNOWN_DROP, UNKNOWN_PASS };

/* The part of the policy that is no prefix; for even and odd generations. */
struct setting {
	__u32 enabled[2]; /* by enum family */
	__u32 unknown_protocols; /* enum unknown_protocols */
	__u32 timeout[TIMERS]; /* seconds */
	__u32 ports; /* in the pool */
	__u32 privileged; /* of them, the first ones: those below 1024 */
	__u32 max_flows; /* of one pod; 0: any number */
	__u32 flow_interval; /* ns between new flows of one pod, on average; 0: any rate */
	__u32 removed_until; /* second until which TRIE_REMOVED is asked */
	__u32 handover; /* netfilter has some of the flows, or gets them */
	__u64 since; /* ns of the monotonic clock: what was refused earlier may be granted now */
	__u32 routes; /* in the table of routes with a source; 0: it is not asked */
	struct addr source[ROUTE_SOURCES]; /* of routes; the first is not used */
	/* Steps through the ports from 1024 on, and through those below, that visit each; see claim.h. */
	__u32 stride[2][STRIDES];
	__u64 in_pool[1024]; /* bit set of the pool */
	__u64 guarded[1024]; /* of every pool there was: mappings outlive a change */
	__u16 port[65536]; /* the pool, ascending */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 2);
	__type(key, __u32);
	__type(value, struct setting);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} settings SEC(".maps");

struct state {
	__u32 active; /* generation in force, counted up by each apply; ~0 before the first */
	__u32 layout; /* MAP_LAYOUT of the writer */
	__u32 learn_until; /* second until which any arriving TCP packet opens an inbound connection */
	__u32 heartbeat; /* second of the agent's last sweep */
	__u64 seed; /* of the port sequence; drawn once, so a flow finds its port again after state loss */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct state);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} control SEC(".maps");

/* Masquerade devices by ifindex. An attached device without an entry makes no new mappings. */
struct device {
	struct addr addr[2]; /* masquerade address by enum family; zero: none */
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, DEVICE_ENTRIES);
	__type(key, __u32);
	__type(value, struct device);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} devices SEC(".maps");

/* What the node's own tunnels and xfrm states send: written by the agent, asked for protocols
 * without ports, and when a packet of the node meets a mapping. The agent merges long lists, so
 * that it is never full. */
struct tunnel {
	struct addr remote; /* 0.0.0.0 or ::, any of the family */
	__be16 port; /* at the remote; 0 for a protocol without ports */
	__u8 proto;
	__u8 pad;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, TUNNEL_ENTRIES);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct tunnel);
	__type(value, __u32); /* no meaning */
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} tunnels SEC(".maps");

/* A source address that has mappings, or asked for one. */
struct pod {
	__u32 flows; /* signed: mappings. Counted where they are made and ended; the agent's walk recounts */
	__u32 refused; /* new flows */
	/* ns at which the bucket of new flows, and of ICMP errors, is full again */
	__u64 flows_due, answers_due;
};

/* Written by the programs; the agent removes idle ones. Full: not counted (STAT_UNCOUNTED). */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, POD_ENTRIES);
	__type(key, struct addr);
	__type(value, struct pod);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} pods SEC(".maps");

/* By enum family: addresses in pods, and how many mappings one may hold before it is refused any
 * (0: no bound now). */
struct share {
	__u32 pods[2], flows[2];
};

/* Written by the agent's walk; without the agent its last word holds. A new pod counts at once. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct share);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} shares SEC(".maps");

/* What a pod was refused: a port towards a remote. */
struct refused {
	struct addr pod, remote;
	__be16 rport;
	__u8 proto;
	__u8 privileged; /* the source port is below 1024 */
};

struct refusal {
	__u64 at; /* ns */
	__u32 outcome; /* enum outcome */
	__u32 pad;
};

/* A cache, for REFUSAL_NS: evicted means searched again. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, REFUSAL_ENTRIES);
	__type(key, struct refused);
	__type(value, struct refusal);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} refusals SEC(".maps");

enum stat {
	STAT_TRIES = 0, /* searches that ended within 1, 2, 4 ... 2048 and more candidates */
	STAT_FAILED = 12, /* searches without a port */
	STAT_REMEMBERED, /* refused without a search */
	STAT_UNCOUNTED, /* new flows of pods that found no room in pods */
	STAT_ANSWERED, /* ICMP errors to pods */
	STAT_UNANSWERED, /* not sent for their rate, or because they could not be */
	STATS,
};

/* By enum stat. Per CPU, never reset. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, STATS);
	__type(key, __u32);
	__type(value, __u64);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} stats SEC(".maps");

enum direction { EGRESS = 0, INGRESS = 1 };

struct counter {
	__u64 packets, bytes;
};

/* Index: (outcome * 2 + direction) * 2 + family. Per CPU, never reset. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, OUT_SLOTS * 4);
	__type(key, __u32);
	__type(value, struct counter);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} counters SEC(".maps");
