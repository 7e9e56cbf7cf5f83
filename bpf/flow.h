/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The flow tables: look up, insert, delete and refresh, for both families alike. The family
 * ends here: a table of IPv4 flows has short keys and values, nothing else differs.
 */
#pragma once

#include "scratch.h"

enum table { FORWARD, REVERSE };

/* The second of the monotonic clock: a step of the wall clock ends no flow. The clock is read once
 * a tick and CPU. Two CPUs may differ by a tick, so compare seconds as signed numbers. */
static __always_inline __u32 now_seconds(void)
{
	__u32 zero = 0;
	__u64 tick = bpf_jiffies64();
	struct scratch *s = bpf_map_lookup_elem(&scratch, &zero);

	if (!s)
		return 0; /* impossible */
	if (s->tick != tick) {
		s->second = bpf_ktime_get_ns() / 1000000000ULL;
		s->tick = tick;
	}
	return s->second;
}

static __always_inline bool tuple_is_ipv4(const struct tuple *t)
{
	return addr_is_v4_mapped(&t->local);
}

static __always_inline void tuple_shorten(const struct tuple *t, struct tuple4 *k)
{
	*k = (struct tuple4){
		.local = t->local.w[3],
		.remote = t->remote.w[3],
		.lport = t->lport,
		.rport = t->rport,
		.proto = t->proto,
	};
}

/* The tuple of a packet that leaves: its source is the local side. */
static __always_inline void tuple_leaving(struct tuple *t, const struct packet *pkt)
{
	*t = (struct tuple){
		.local = pkt->src,
		.remote = pkt->dst,
		.lport = pkt->sport,
		.rport = pkt->dport,
		.proto = pkt->proto,
	};
}

/* The tuple of a packet that arrives. */
static __always_inline void tuple_arriving(struct tuple *t, const struct packet *pkt)
{
	*t = (struct tuple){
		.local = pkt->dst,
		.remote = pkt->src,
		.lport = pkt->dport,
		.rport = pkt->sport,
		.proto = pkt->proto,
	};
}

/* Some bits of the key, kept in the value. A preallocated element may be recycled for another
 * flow while we still read it; then the tag differs, and the look-up counts as a miss. */
static __always_inline __u8 flow_tag(const struct tuple *t)
{
	__u32 h = t->local.w[3] ^ (t->remote.w[3] * 0x9e3779b1) ^ (t->remote.w[1] * 0x85ebca6b) ^
		  t->local.w[2] ^ ((__u32)t->lport << 16 | t->rport) ^ t->proto;

	return (h * 0xc2b2ae35) >> 24;
}

/* Reads the element of t, whatever its tag says: see flow_find() and flow_is_dead(). */
static __always_inline struct flow *flow_read(enum table table, const struct tuple *t,
					      struct endpoint *to)
{
	struct flow *f;

	if (tuple_is_ipv4(t)) {
		struct tuple4 k;
		struct flow4 *v;

		tuple_shorten(t, &k);
		v = table == FORWARD ? bpf_map_lookup_elem(&forward4, &k)
				     : bpf_map_lookup_elem(&reverse4, &k);
		if (!v)
			return NULL;
		addr_from_ipv4(&to->addr, v->addr);
		f = &v->flow;
	} else {
		struct flow6 *v = table == FORWARD ? bpf_map_lookup_elem(&forward6, t)
						   : bpf_map_lookup_elem(&reverse6, t);

		if (!v)
			return NULL;
		to->addr = v->addr;
		f = &v->flow;
	}
	to->port = f->port;
	asm volatile("" ::: "memory"); /* the tag is read last */
	return f;
}

/* Finds the entry of t and copies the translated address and port out. */
static __always_inline struct flow *flow_find(enum table table, const struct tuple *t,
					      struct endpoint *to)
{
	struct flow *f = flow_read(table, t, to);

	return f && f->tag == flow_tag(t) ? f : NULL;
}

/* Is this the reverse half of a mapping that has ended? It keeps the port for its last owner. Its
 * tag is turned over: every look-up misses it, and no insertion takes its place. */
static __always_inline bool flow_is_dead(const struct flow *f, const struct tuple *t)
{
	return f->tag == (__u8)~flow_tag(t);
}

static __always_inline void flow_bury(struct flow *f, const struct tuple *t, __u32 now)
{
	f->seen = now; /* when that was */
	f->bits |= FLOW_DEAD;
	f->tag = ~flow_tag(t);
}

/* Inserts an entry for t unless there is one: 0, or -EEXIST, -E2BIG (full), another errno. The
 * caller has filled entry->flow. */
static __noinline long flow_add(enum table table, const struct tuple *t, union flow_entry *entry,
				const struct addr *addr)
{
	struct tuple4 k;

	entry->flow.tag = flow_tag(t);
	if (tuple_is_ipv4(t)) {
		tuple_shorten(t, &k);
		entry->v4.addr = addr->w[3];
		entry->v4.pad = 0;
		return table == FORWARD
			       ? bpf_map_update_elem(&forward4, &k, &entry->v4, BPF_NOEXIST)
			       : bpf_map_update_elem(&reverse4, &k, &entry->v4, BPF_NOEXIST);
	}
	entry->v6.addr = *addr;
	return table == FORWARD ? bpf_map_update_elem(&forward6, t, &entry->v6, BPF_NOEXIST)
				: bpf_map_update_elem(&reverse6, t, &entry->v6, BPF_NOEXIST);
}

/* Deletes the entry of t, whatever its tag says: 0, or -ENOENT (another was faster), another errno. */
static __always_inline long flow_delete(enum table table, const struct tuple *t)
{
	if (tuple_is_ipv4(t)) {
		struct tuple4 k;

		tuple_shorten(t, &k);
		return table == FORWARD ? bpf_map_delete_elem(&forward4, &k)
					: bpf_map_delete_elem(&reverse4, &k);
	}
	return table == FORWARD ? bpf_map_delete_elem(&forward6, t)
				: bpf_map_delete_elem(&reverse6, t);
}

/* The TCP flags of a packet as FLOW_* bits, over what was seen before. A RST that the
 * connection survives is forgotten at the next packet of its direction (RFC 6146 3.5.2.2). */
static __always_inline __u8 flow_bits(__u8 bits, const struct packet *pkt)
{
	if (pkt->proto != IPPROTO_TCP)
		return bits;
	bits &= ~FLOW_RST;
	if (pkt->tcp_flags & TCP_RST)
		return bits | FLOW_RST;
	if (pkt->tcp_flags & TCP_FIN)
		bits |= FLOW_FIN;
	return bits | (pkt->tcp_flags & TCP_SYN ? FLOW_SYN : FLOW_DATA);
}

/* Notes a packet of this direction. Plain additions: one flow's packets of one direction
 * arrive on one CPU; if they do not, a count may be lost, nothing else. Of RSTs in a row only the
 * first, which starts the closing timer, keeps the mapping (RFC 7857 section 7). */
static __always_inline void flow_touch(struct flow *f, const struct packet *pkt, __u32 now)
{
	__u8 bits = flow_bits(f->bits, pkt);

	if (f->seen != now && !(f->bits & bits & FLOW_RST))
		f->seen = now;
	if (f->bits != bits)
		f->bits = bits;
	f->packets += pkt->segments;
	f->bytes += pkt->bytes;
}

/* Which timer a mapping runs on, from what both directions have seen. Half-closed TCP keeps the
 * long timer; a RST or both FINs start the short one (RFC 7857 section 2). */
static __always_inline __u32 flow_timer(const struct tuple *t, __u8 forward, __u8 reverse,
					bool answered)
{
	switch (t->proto) {
	case IPPROTO_TCP:
		if ((forward | reverse) & FLOW_RST || (forward & reverse) & FLOW_FIN)
			return TIMER_TCP_CLOSING;
		return answered && (forward & FLOW_DATA) ? TIMER_TCP_ESTABLISHED : TIMER_TCP_SYN;
	case IPPROTO_UDP:
	case IPPROTO_UDPLITE:
		return answered ? TIMER_UDP_STREAM : TIMER_UDP;
	case IPPROTO_ICMP:
	case PROTO_ICMPV6:
		return TIMER_ICMP;
	}
	return TIMER_OTHER;
}
