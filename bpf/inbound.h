/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Connections opened from outside towards a pod: their replies leave untranslated (line 9).
 *
 * Only arriving packets create an entry, and reverse-translated packets never get here, so a
 * late packet of a dead mapping cannot make one (Cilium issue 47425). A pod's SYN or ICMP query
 * always opens a connection of its own, whatever stands here.
 */
#pragma once

#include "decide.h"
#include "flow.h"

static __always_inline struct inbound *inbound_find(const struct tuple *t)
{
	struct tuple4 k;

	if (!tuple_is_ipv4(t))
		return bpf_map_lookup_elem(&inbound6, t);
	tuple_shorten(t, &k);
	return bpf_map_lookup_elem(&inbound4, &k);
}

static __noinline long inbound_delete(const struct tuple *t)
{
	struct tuple4 k;

	if (!tuple_is_ipv4(t))
		return bpf_map_delete_elem(&inbound6, t);
	tuple_shorten(t, &k);
	return bpf_map_delete_elem(&inbound4, &k);
}

static __always_inline __u32 inbound_timer(const struct tuple *t, __u8 bits)
{
	if (t->proto != IPPROTO_TCP)
		return flow_timer(t, 0, 0, false);
	if (bits & FLOW_RST || (bits & FLOW_FIN && bits & FLOW_OUT_FIN))
		return TIMER_TCP_CLOSING;
	return bits & FLOW_DATA && bits & FLOW_OUT ? TIMER_TCP_ESTABLISHED : TIMER_TCP_SYN;
}

static __always_inline bool inbound_expired(const struct tuple *t, const struct inbound *in,
					    const struct setting *set, __u32 now)
{
	__u32 timer = inbound_timer(t, in->bits);

	return timer >= TIMERS || (__s32)(now - in->seen) > (__s32)set->timeout[timer];
}

/* Does this leaving packet answer a connection opened from outside? Only TCP refreshes the
 * entry from here: a pod that talks UDP must not keep it alive by itself. */
static __noinline bool inbound_answers(const struct tuple *t, const struct packet *pkt,
				       const struct setting *set)
{
	struct inbound *in = inbound_find(t);
	__u32 now;

	if (!in)
		return false;
	now = now_seconds();
	if (inbound_expired(t, in, set, now))
		return false;
	if (pkt->kind == KIND_PORTS && pkt->proto == IPPROTO_TCP) {
		__u8 bits = in->bits | FLOW_OUT;

		if (pkt->tcp_flags & TCP_FIN)
			bits |= FLOW_OUT_FIN;
		if (pkt->tcp_flags & TCP_RST)
			bits |= FLOW_RST;
		if (in->bits != bits)
			in->bits = bits;
		if (in->seen != now)
			in->seen = now;
	}
	return true;
}

/* For some minutes after the first attach any arriving TCP packet counts as one of a connection
 * opened from outside: such connections were there before us. A SYN+ACK answers a pod's own. */
static __always_inline bool inbound_learns(const struct packet *pkt, __u32 now)
{
	__u32 zero = 0;
	struct state *st = bpf_map_lookup_elem(&control, &zero);

	return st && (__s32)(st->learn_until - now) > 0 && !(pkt->tcp_flags & TCP_RST) &&
	       (pkt->tcp_flags & (TCP_SYN | TCP_ACK)) != (TCP_SYN | TCP_ACK);
}

/* Does a flow of a pod to this remote leave untranslated for a reason of lines 4 to 8? */
static __always_inline bool inbound_exempt(__u32 generation, const struct addr *remote)
{
	return policy_lookup(generation, TRIE_DESTINATION, remote).outcome;
}

/* Did it until some minutes ago? */
static __always_inline bool inbound_was_exempt(__u32 generation, const struct setting *set,
					       const struct addr *remote, __u32 now)
{
	return (__s32)(set->removed_until - now) > 0 &&
	       policy_lookup(generation, TRIE_REMOVED, remote).outcome;
}

/* May an arriving packet open a connection to a pod? A SYN and an ICMP query say so themselves.
 * Others (UDP) may as well be answers to a pod's own flow. While that leaves untranslated no
 * entry is needed, and when the reason is gone there must be none: answers go on coming, and would
 * make the flow, which is new by then, look opened from outside. */
static __always_inline bool inbound_opens(const struct packet *pkt, const struct setting *set,
					  __u32 generation, __u32 now)
{
	if (is_opening(pkt))
		return true;
	if (pkt->kind != KIND_PORTS && pkt->kind != KIND_BARE)
		return false;
	if (pkt->proto == IPPROTO_TCP && !inbound_learns(pkt, now))
		return false;
	return set->enabled[pkt->family & 1] && !inbound_exempt(generation, &pkt->src) &&
	       !inbound_was_exempt(generation, set, &pkt->src, now);
}

/* Notes an arriving packet that is no mapping's. */
static __noinline enum outcome inbound_arrives(const struct tuple *t, const struct packet *pkt)
{
	struct inbound new = { .packets = pkt->segments };
	struct inbound *in;
	struct setting *set;
	struct endpoint external;
	struct tuple4 k;
	__u32 generation = 0, now;
	bool live;
	long err;

	set = policy_settings(&generation);
	if (!set)
		return OUT_PASS_NO_MAPPING;
	if (policy_lookup(generation, TRIE_SOURCE, &pkt->dst).outcome)
		return OUT_PASS_NO_MAPPING; /* for the node, or none of ours */
	now = now_seconds();
	in = inbound_find(t);
	live = in && !inbound_expired(t, in, set, now);
	/* A live mapping wins: its owner spoke first. A query can't belong to one. */
	if (!live && (!inbound_opens(pkt, set, generation, now) ||
		      (pkt->kind != KIND_QUERY && flow_find(FORWARD, t, &external))))
		return OUT_PASS_NO_MAPPING;
	if (in) {
		if (!live || (is_opening(pkt) && pkt->proto == IPPROTO_TCP)) {
			in->bits = 0;
			in->created = now;
			in->packets = 0;
		}
		in->bits = flow_bits(in->bits, pkt);
		in->seen = now;
		in->packets += pkt->segments;
		return OUT_PASS_INBOUND;
	}
	new.seen = now;
	new.created = now;
	new.bits = flow_bits(0, pkt);
	if (tuple_is_ipv4(t)) {
		tuple_shorten(t, &k);
		err = bpf_map_update_elem(&inbound4, &k, &new, BPF_NOEXIST);
	} else {
		err = bpf_map_update_elem(&inbound6, t, &new, BPF_NOEXIST);
	}
	return err && err != -EEXIST ? OUT_PASS_INBOUND_FULL : OUT_PASS_INBOUND;
}
