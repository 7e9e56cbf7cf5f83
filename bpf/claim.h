/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* New mappings: choosing an external port and reserving it.
 *
 * The candidates are a function of the inner socket alone: first its own port, then a walk
 * through the pool with a keyed start and a keyed step that has no divisor in common with the
 * pool's size, so that it visits each port once. No destination goes in, so a socket gets the
 * same external port towards everybody while it is free there (RFC 4787 REQ-1), and the same
 * again after a loss of state. Ports below 1024 are for sources below 1024 (RFC 4787 REQ-3 a), if
 * the pool has any. A pod beyond its fair share leaves the upper part of the pool to the others.
 *
 * A port of a mapping that has ended goes to nobody else for a while (RFC 6888 REQ-8): the reaper
 * leaves the reverse entry, dead, and only its last owner revives it.
 *
 * Reserving is inserting the reverse entry if absent; the bucket lock makes that atomic.
 * Order: reverse, forward, then the packet leaves, so no reply can miss. A crash in between
 * leaves an orphan that the reaper takes.
 */
#pragma once

#include "quota.h"

static __always_inline bool port_in(const __u64 *set, __be16 port)
{
	__u32 p = bpf_ntohs(port);

	return set[(p >> 6) & 1023] >> (p & 63) & 1;
}

/* Does the kernel itself exchange packets of this protocol, to this port, with the remote? */
static __noinline bool claim_node_tunnels(const struct addr *remote, __be16 port, __u8 proto)
{
	struct tunnel k = { .remote = *remote, .port = port, .proto = proto };

	if (bpf_map_lookup_elem(&tunnels, &k))
		return true;
	if (!addr_is_v4_mapped(remote))
		k.remote.w[0] = k.remote.w[1] = k.remote.w[2] = 0;
	k.remote.w[3] = 0;
	return bpf_map_lookup_elem(&tunnels, &k);
}

/* There are look-ups for the sockets of these protocols only. */
static __always_inline bool claim_can_ask(__u8 proto)
{
	return proto == IPPROTO_TCP || proto == IPPROTO_UDP;
}

/* Does a socket of the node hold the candidate: connected to this remote, bound or listening? */
static __noinline bool claim_node_owns(struct __sk_buff *skb, struct scratch *s,
				       const struct tuple *t)
{
	struct bpf_sock_tuple *k = &s->socket;
	struct bpf_sock *sk;
	__u32 size;

	if (!claim_can_ask(t->proto))
		return false;
	if (tuple_is_ipv4(t)) {
		k->ipv4.saddr = t->remote.w[3];
		k->ipv4.daddr = t->local.w[3];
		k->ipv4.sport = t->rport;
		k->ipv4.dport = t->lport;
		size = sizeof(k->ipv4);
	} else {
		__builtin_memcpy(k->ipv6.saddr, &t->remote, 16);
		__builtin_memcpy(k->ipv6.daddr, &t->local, 16);
		k->ipv6.sport = t->rport;
		k->ipv6.dport = t->lport;
		size = sizeof(k->ipv6);
	}
	if (t->proto == IPPROTO_TCP)
		sk = bpf_skc_lookup_tcp(skb, k, size, BPF_F_CURRENT_NETNS, 0);
	else
		sk = bpf_sk_lookup_udp(skb, k, size, BPF_F_CURRENT_NETNS, 0);
	if (!sk)
		return false;
	bpf_sk_release(sk);
	return true;
}

/* Candidate number i; false if there is none. */
static __always_inline bool claim_candidate(const struct scratch *s, const struct setting *set,
					    __u32 i, __be16 *port)
{
	const struct claim *c = &s->claim;
	__u32 slot;

	if (i == 0) {
		*port = s->flow.lport;
		/* The node's own may be of an older pool. */
		if (c->pool != POOL_IDENTIFIERS && c->pool != POOL_NONE && !(c->bits & FLOW_HOST) &&
		    !port_in(set->in_pool, *port))
			return false;
	} else {
		if (c->pool >= POOL_OWN || i > c->size)
			return false;
		slot = (c->start + (__u64)i * c->stride) % c->size;
		if (c->pool == POOL_PORTS)
			slot = set->port[(c->base + slot) & 0xffff];
		*port = bpf_htons(slot);
		/* The pool may have changed since the search began. */
		if (c->pool == POOL_PORTS && !port_in(set->in_pool, *port))
			return false;
	}
	return bpf_ntohs(*port) < c->limit;
}

/* Makes the dead entry of s->reverse what s->entry would have been, if it is the flow's own. The
 * reaper may delete it at the same time; egress_confirm() looks after the forward half is there. */
static __noinline bool claim_revive(struct scratch *s)
{
	struct flow *f = flow_read(REVERSE, &s->reverse, &s->owner);

	if (!f || !flow_is_dead(f, &s->reverse) ||
	    !endpoint_is(&s->owner, &s->flow.local, s->flow.lport))
		return false;
	f->seen = s->entry.flow.seen;
	f->created = s->entry.flow.created;
	f->packets = 0;
	f->bytes = 0;
	f->bits = s->entry.flow.bits;
	asm volatile("" ::: "memory"); /* the tag is written last */
	f->tag = flow_tag(&s->reverse);
	return true;
}

/* Tries candidate i; true ends the search. */
static __always_inline bool claim_one(struct __sk_buff *skb, struct scratch *s,
				      const struct setting *set, __u32 i)
{
	__be16 port;
	long err;

	if (!claim_candidate(s, set, i, &port))
		return false;
	s->claim.tried++;
	s->reverse.lport = port;
	if (flow_find(REVERSE, &s->reverse, &s->owner)) {
		if (!endpoint_is(&s->owner, &s->flow.local, s->flow.lport))
			return false;
		/* Ours: another CPU is ahead with this flow, or its forward half was lost. */
		s->claim.reused = 1;
		s->claim.outcome = OUT_CONTINUE;
		return true;
	}
	s->claim.asks = !(s->claim.bits & FLOW_HOST && i == 0);
	if (s->claim.asks && claim_node_owns(skb, s, &s->reverse))
		return false;
	s->entry.flow = (struct flow){ .port = s->flow.lport, .bits = s->claim.bits };
	s->entry.flow.seen = s->entry.flow.created = now_seconds();
	err = flow_add(REVERSE, &s->reverse, &s->entry, &s->flow.local);
	if (err == -EEXIST && !claim_revive(s))
		return false;
	/* A socket that was made meanwhile may have sent already; a later one's packet finds the entry. */
	if (!err && s->claim.asks && claim_node_owns(skb, s, &s->reverse)) {
		flow_delete(REVERSE, &s->reverse);
		return false;
	}
	s->claim.reused = err == -EEXIST;
	s->claim.outcome = OUT_CONTINUE;
	if (err && err != -EEXIST)
		s->claim.outcome = err == -E2BIG ? OUT_DROP_TABLE_FULL : OUT_DROP_MAP_ERROR;
	return true;
}

/* Tries CLAIM_CHUNK candidates from first on; 1 ends the search.
 *
 * A global function: the verifier checks it once and not at each call. Such a function takes only
 * the context and numbers (before kernel 5.12), so it looks the rest up itself. */
__noinline int claim_try(struct __sk_buff *skb, __u32 first)
{
	__u32 zero = 0, generation = 0;
	struct scratch *s = bpf_map_lookup_elem(&scratch, &zero);
	struct setting *set = policy_settings(&generation);

	if (!s || !set)
		return 1;
	for (__u32 n = 0; n < CLAIM_CHUNK; n++) {
		if (claim_one(skb, s, set, first + n))
			return 1;
	}
	return 0;
}

/* Mixes the inner socket with the node's seed. */
static __always_inline __u64 claim_hash(const struct tuple *t, __u64 seed)
{
	const struct addr *a = &t->local;
	__u64 h = seed ^ ((__u64)t->lport << 8 | t->proto);

	h = (h ^ ((__u64)a->w[0] << 32 | a->w[1])) * 0x9e3779b97f4a7c15ULL;
	h = (h ^ h >> 32 ^ ((__u64)a->w[2] << 32 | a->w[3])) * 0xbf58476d1ce4e5b9ULL;
	h = (h ^ h >> 29) * 0x94d049bb133111ebULL;
	return h ^ h >> 32;
}

static __always_inline void claim_aim(struct claim *c, const struct tuple *flow,
				      const struct setting *set)
{
	__u32 zero = 0;
	struct state *st = bpf_map_lookup_elem(&control, &zero);
	__u64 h = claim_hash(flow, st ? st->seed : 0);

	c->start = h;
	c->reused = 0;
	c->tried = 0;
	if (c->pool == POOL_PORTS) {
		bool low = bpf_ntohs(flow->lport) < 1024 && set->privileged;

		c->base = low ? 0 : set->privileged;
		c->size = low ? set->privileged : set->ports - set->privileged;
		c->stride = set->stride[low][h >> 32 & (STRIDES - 1)];
	} else {
		c->size = 65536;
		c->stride = h >> 32 | 1;
	}
	c->limit = 65536;
	if (c->percent < 100 && c->pool < POOL_OWN) {
		c->limit = (__u64)c->size * c->percent / 100;
		if (c->pool == POOL_PORTS)
			c->limit = set->port[(c->base + c->limit) & 0xffff];
	}
}

/* Counts a search in its power of two of candidates. */
static __always_inline void claim_count(const struct claim *c)
{
	__u32 slot = STAT_TRIES;

	for (__u32 i = 0; i < STAT_FAILED - STAT_TRIES - 1; i++) {
		if (c->tried > 1U << i)
			slot = STAT_TRIES + i + 1;
	}
	stat_add(c->outcome ? STAT_FAILED : slot);
}

/* Finds and reserves an external port for s->flow at the address in s->reverse. bits: FLOW_* of
 * the mapping. OUT_CONTINUE: s->reverse is ours. */
static __noinline enum outcome claim_port(struct __sk_buff *skb, struct scratch *s, enum pool pool,
					  __u8 bits)
{
	__u32 generation = 0, limit = MAX_CANDIDATES;
	struct setting *set = policy_settings(&generation);

	if (!set)
		return OUT_DROP_NO_POLICY;
	s->claim.pool = pool;
	s->claim.bits = bits;
	s->claim.outcome = OUT_DROP_NO_PORT;
	if (pool == POOL_NONE)
		s->claim.outcome = OUT_DROP_PROTOCOL;
	else if (pool == POOL_OWN)
		s->claim.outcome = OUT_DROP_FRAGMENT;
	claim_aim(&s->claim, &s->flow, set);
	if (s->claim.size <= MAX_COMPLETE)
		limit = s->claim.size;
	/* The own port, and then the walk. */
	for (__u32 i = 0; i <= MAX_COMPLETE; i += CLAIM_CHUNK) {
		if (i > limit || claim_try(skb, i) || pool >= POOL_OWN)
			break;
	}
	if (s->claim.outcome == OUT_DROP_NO_PORT && s->claim.percent == FAIR_PERCENT)
		s->claim.outcome = OUT_DROP_QUOTA;
	claim_count(&s->claim);
	return s->claim.outcome;
}
