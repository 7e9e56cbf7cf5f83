/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Every knob and every limit, with unit and reason.
 *
 * The volatile constants are set before the load, from probes of the running kernel
 * (never from its version); the verifier then removes the branches not taken.
 */
#pragma once

/* BPF_F_IPV6 of bpf_l4_csum_replace, kernel 6.16 and stable trees: an IPv6 address and the
 * checksum that covers it cancel out, so skb->csum (CHECKSUM_COMPLETE) must not move. */
volatile const __u8 have_csum_ipv6 = 0;
/* The kernel's own view of a packet can be had (bpf_cast_to_kern_ctx, kernel 6.2), and with it whether
 * the transport checksum is complete; see rewrite_at_once(). The bit in struct sk_buff at which
 * that stands comes from the kernel's types. */
volatile const __u8 have_ip_summed = 0;
volatile const __u32 ip_summed_bit = 0;

/* Flows a family; the loader sets the real size of the tables from memory or configuration. */
#define DEFAULT_FLOWS 32768
/* Fragmented datagrams remembered at once, both families. LRU: a fragment train is short. */
#define FRAGMENT_ENTRIES 8192
/* Seconds the first fragment speaks for the later ones. An IPv4 ID wraps in 6.5 s at 10,000
 * fragmented datagrams a second to one peer. */
#define FRAGMENT_SECONDS 5
/* Later fragments held at once until their first comes, the place a datagram has among them (65,535
 * bytes are 54 fragments at IPv6's least MTU), the largest that is held, and for how many seconds. */
#define HELD_ENTRIES 512
#define HELD_WINDOW 64
#define HELD_BYTES 2048
#define HELD_SECONDS 2
/* Prefixes in one policy table: 65536 a family of the ip-masq-agent list, nodes and the rest. */
#define POLICY_ENTRIES 262144
#define DEVICE_ENTRIES 1024
/* Answers of the policy's tables remembered on each CPU, as a power of two; 32 KB. */
#define ANSWER_BITS 10
/* IPv6 extension headers walked before the chain is refused. */
#define MAX_EXTENSIONS 6
/* Ports tried for a new mapping: all of a pool of this size, and of a larger one a number that at
 * 97 % occupancy fails once in 10^13 searches, but bounds what an exhausted remote costs. */
#define MAX_COMPLETE 2048
#define MAX_CANDIDATES 1024
/* Different steps through the pool. */
#define STRIDES 64
/* Candidates tried in one call of a function that the verifier checks by itself. */
#define CLAIM_CHUNK 16
/* What the node's own tunnels and xfrm states exchange with whom; the agent merges long lists. */
#define TUNNEL_ENTRIES 16384
/* Samples of the leak sentinel. LRU: the newest matter. */
#define LEAK_ENTRIES 256
/* Distinct source addresses of routes. */
#define ROUTE_SOURCES 256
/* Records of one run of the reaper. */
#define REAP_BATCH 64
/* Pods whose flows are counted. One that finds no room is neither counted nor bounded. */
#define POD_ENTRIES 16384
/* Refused searches remembered at once, and for how long: while one is, a pod's new flows to that
 * remote cost a look-up and not a search. */
#define REFUSAL_ENTRIES 4096
#define REFUSAL_NS 1000000000ULL
/* Of a pool, the part that a pod beyond its fair share may take ports from. */
#define FAIR_PERCENT 70
/* The same for one that is alone and holds as many mappings as half the pool has ports. */
#define ALONE_PERCENT 96
/* Mappings that nobody is called to account for, however many pods there are. */
#define FAIR_LEAST 128
/* Pools up to this size are not shared out: whoever wants a port gets one while there is any. */
#define FAIR_POOL 256
/* ICMP errors that tell a pod why it was refused: one in this time, and so many at once. */
#define ANSWER_NS 100000000ULL
#define ANSWER_BURST 10
/* Bytes of a quoted packet that are summed at once: what bpf_csum_diff takes. */
#define ANSWER_CHUNK 512
/* Seconds in which a port of an ended mapping goes to nobody but its last owner (RFC 6888 REQ-8). */
#define QUARANTINE_SECONDS 120
/* Seconds an external port may be held by a half-made mapping (a crash between two inserts). */
#define ORPHAN_SECONDS 5
/* Seconds without a sweep of the agent after which the kernel reclaims by itself, and ns between its
 * walks, each of one table. */
volatile const __u32 reclaim_after = 60;
volatile const __u64 reclaim_period = 15000000000ULL;
/* Reverse entries of a family, dead ones with them, above which dead ones are not kept; set by the
 * loader from the size of the tables. */
volatile const __u32 reclaim_room = DEFAULT_FLOWS;
/* Candidates that a walk looks at, 0.5 us each: packets wait for a timer, threads for a work. */
#define RECLAIM_BATCH_TIMER 16384
#define RECLAIM_BATCH_WORK 65536
