/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The leak sentinel: an optional program behind all others, that watches what leaves. A packet that
 * line 10 applies to must not come this far with its own source address, whoever sent it here: a
 * program that ran between, one that redirected, or a chain without our egress program. It counts
 * such packets and keeps samples, and never touches any.
 */
#pragma once

#include "fragment.h"
#include "inbound.h"
#include "quote.h"

/* A packet that should not have left. */
struct leak {
	struct addr src, dst;
	__u32 device; /* ifindex */
	__u8 proto;
	__u8 pad[3];
};

struct leak_count {
	__u64 packets;
	__u32 first, last; /* seconds of the monotonic clock */
};

/* Samples of leaks. Written by the sentinel, read and cleared from user space. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, LEAK_ENTRIES);
	__type(key, struct leak);
	__type(value, struct leak_count);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} leaks SEC(".maps");

/* All leaks of a device, by ifindex. Full: the samples still tell. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(max_entries, DEVICE_ENTRIES);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, struct leak_count);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} leaked SEC(".maps");

/* Does the packet belong to a connection opened from outside (line 9)? Unlike inbound_answers() it
 * leaves the entry as it is. */
static __noinline bool sentinel_inbound(struct __sk_buff *skb, struct scratch *s,
					const struct setting *set)
{
	const struct packet *pkt = &s->packet;
	struct inbound *in;

	if (pkt->defect || pkt->kind == KIND_CONTROL || is_opening(pkt))
		return false;
	tuple_leaving(&s->flow, pkt);
	if (pkt->kind == KIND_ERROR) {
		if (!quote_parse(skb, pkt, &s->quote) || !quote_is_answered(s))
			return false;
		tuple_arriving(&s->flow, &s->quote);
	}
	in = inbound_find(&s->flow);
	return in && !inbound_expired(&s->flow, in, set, now_seconds());
}

/* May a later fragment pass, as its first one did? */
static __noinline bool sentinel_fragment(const struct packet *pkt)
{
	struct fragment *v;
	struct datagram k;

	fragment_key(&k, pkt, EGRESS);
	v = bpf_map_lookup_elem(&fragments, &k);
	return v && (__s32)(now_seconds() - v->seen) <= FRAGMENT_SECONDS &&
	       v->outcome != OUT_MASQ_FRAGMENT;
}

/* Is the source the external socket of a mapping? The address of a device or route may lie in a
 * source range. Or is this an answer to a mapped flow, on its way inside? */
static __noinline bool sentinel_translated(struct scratch *s)
{
	const struct packet *pkt = &s->packet;

	tuple_leaving(&s->flow, pkt);
	if (pkt->kind != KIND_ERROR && pkt->kind != KIND_CONTROL && !pkt->defect &&
	    flow_find(REVERSE, &s->flow, &s->to))
		return true;
	return egress_answers(s);
}

/* May the packet leave as it is, by one generation of the policy? */
static __noinline bool sentinel_allows(struct __sk_buff *skb, struct scratch *s, __u32 generation)
{
	const struct packet *pkt = &s->packet;
	__u32 slot = generation & 1;
	struct setting *set = bpf_map_lookup_elem(&settings, &slot);

	if (!set || decide(pkt, generation, set))
		return true;
	if (pkt->kind == KIND_LATER)
		return sentinel_fragment(pkt);
	if (pkt->kind == KIND_BARE && set->unknown_protocols == UNKNOWN_PASS)
		return true;
	return sentinel_inbound(skb, s, set) || sentinel_translated(s);
}

/* Notes a leak. Two CPUs with the same sample may lose a count of it; the device's does not. */
static __noinline void sentinel_note(const struct packet *pkt, __u32 ifindex)
{
	struct leak k = {
		.src = pkt->src, .dst = pkt->dst, .device = ifindex, .proto = pkt->proto
	};
	struct leak_count new = { .packets = pkt->segments, .first = now_seconds() };
	struct leak_count *l;

	new.last = new.first;
	l = bpf_map_lookup_elem(&leaked, &ifindex);
	if (l) {
		l->packets += pkt->segments;
		l->last = new.last;
	} else {
		bpf_map_update_elem(&leaked, &ifindex, &new, BPF_NOEXIST);
	}
	l = bpf_map_lookup_elem(&leaks, &k);
	if (l) {
		l->packets += pkt->segments;
		l->last = new.last;
	} else {
		bpf_map_update_elem(&leaks, &k, &new, BPF_NOEXIST);
	}
}

static __always_inline void sentinel(struct __sk_buff *skb, struct scratch *s)
{
	__u32 ifindex = skb->ifindex, generation = 0, decided = s->decided;
	const struct packet *pkt = &s->packet;
	struct setting *set;
	struct device *dev;

	s->decided = 0;
	set = policy_settings(&generation);
	if (!set || sentinel_allows(skb, s, generation))
		return;
	/* The policy may have changed since our egress program saw the packet, a moment ago. */
	if (decided && decided == generation && sentinel_allows(skb, s, generation - 1))
		return;
	dev = bpf_map_lookup_elem(&devices, &ifindex);
	/* Without an entry the device is draining, and maps nothing new. */
	if (!dev || addr_equal(&pkt->src, &dev->addr[pkt->family & 1]))
		return;
	/* Nor is it a leak with the source of the route towards its destination: sentinel_translated()
	 * can't tell of a later fragment and of an error. */
	egress_address(s, dev, set, generation);
	if (!addr_equal(&pkt->src, &s->to.addr))
		sentinel_note(pkt, ifindex);
}
