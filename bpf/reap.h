/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Expiry. The agent walks the tables and names candidates; this program, run by
 * BPF_PROG_TEST_RUN, decides with the kernel's clock and both halves of the flow in hand, so a
 * flow that spoke meanwhile survives. There is no compare-and-delete from user space.
 */
#pragma once

#include "inbound.h"
#include "quota.h"

enum reap_table {
	REAP_FORWARD = 0,
	REAP_REVERSE = 1,
	REAP_INBOUND = 2,
	REAP_POD = 3,
	REAP_MARK = 4
};

struct reap_record {
	struct tuple key;
	__u8 table; /* enum reap_table */
	__u8 force; /* delete whatever the timer says */
	__u8 pad[2];
	__u32 percent; /* of the timers; established TCP always has 100. REAP_POD: what to add.
		      * REAP_MARK: FLOW_AWAY, FLOW_HELD or 0 */
};

_Static_assert(sizeof(struct reap_record) == 48, "records follow each other without gaps");

/* Behind what BPF_PROG_TEST_RUN takes for an Ethernet header, aligned. */
#define REAP_START 16

static __always_inline bool reap_due(const struct setting *set, __u32 timer, __u32 percent,
				     __u32 idle)
{
	__u64 limit;

	if (timer >= TIMERS || (__s32)idle < 0)
		return false;
	limit = set->timeout[timer];
	if (timer != TIMER_TCP_ESTABLISHED)
		limit = limit * percent / 100;
	return idle > limit;
}

/* Does the port of a mapping that ends wait for its last owner? Not one of TCP that was closed: its
 * last timer was the wait. Nor under pressure: room for others is worth more. */
static __always_inline bool reap_quarantines(const struct reap_record *rec, __u32 timer, __u8 bits)
{
	__u8 proto = rec->key.proto;

	if (rec->force || rec->percent < 100 || bits & FLOW_HOST || timer == TIMER_TCP_CLOSING)
		return false;
	return proto == IPPROTO_TCP || proto == IPPROTO_UDP || proto == IPPROTO_UDPLITE ||
	       proto == IPPROTO_SCTP;
}

static __always_inline int reap_forward(const struct reap_record *rec, const struct setting *set,
					__u32 now)
{
	const struct tuple *t = &rec->key;
	struct tuple rev = *t;
	struct endpoint external, owner;
	struct flow *f, *r;
	__u32 seen, timer;
	__u8 bits;

	f = flow_find(FORWARD, t, &external);
	if (!f) {
		/* Gone, or an entry that no look-up accepts any more: by key it can still be removed. */
		if (rec->force)
			flow_delete(FORWARD, t);
		return 0;
	}
	rev.local = external.addr;
	rev.lport = external.port;
	seen = f->seen;
	bits = f->bits;
	r = flow_find(REVERSE, &rev, &owner);
	if (r && !endpoint_is(&owner, &t->local, t->lport))
		r = NULL;
	if (r && (__s32)(r->seen - seen) > 0)
		seen = r->seen;
	timer = flow_timer(t, bits, r ? r->bits : 0, r && r->packets);
	if (!rec->force && !reap_due(set, timer, rec->percent, now - seen))
		return 0;
	/* Reverse first. A packet that meets the forward half alone confirms it and heals; the other
	 * way round a new forward half could be added to a reverse half that is about to go, and
	 * another flow could get its port. Dead is gone, to all but the flow's own next packet, which
	 * revives it. */
	if (r && reap_quarantines(rec, timer, bits))
		flow_bury(r, &rev, now);
	else if (r)
		flow_delete(REVERSE, &rev);
	if (flow_delete(FORWARD, t))
		return 0; /* another walk was faster, and has counted it */
	if (!(bits & FLOW_HOST))
		quota_return(&t->local);
	return 1;
}

/* A dead entry goes when its time is over, or the port is wanted. */
static __always_inline int reap_dead(const struct reap_record *rec, struct flow *r, __u32 now)
{
	if (!rec->force && rec->percent >= 100 && (__s32)(now - r->seen) <= QUARANTINE_SECONDS) {
		r->bits |= FLOW_DEAD; /* a last packet may have cleared it */
		return 0;
	}
	return flow_delete(REVERSE, &rec->key) == 0;
}

/* Reverse entries end with their forward half; alone they are a crash's, or an eviction's. */
static __always_inline int reap_reverse(const struct reap_record *rec, __u32 now)
{
	const struct tuple *t = &rec->key;
	struct tuple fwd = *t;
	struct endpoint inner, external;
	struct flow *r;

	r = flow_read(REVERSE, t, &inner);
	if (r && flow_is_dead(r, t))
		return reap_dead(rec, r, now);
	if (!r || r->tag != flow_tag(t))
		return 0;
	fwd.local = inner.addr;
	fwd.lport = inner.port;
	if (!rec->force) {
		if ((__s32)(now - r->created) <= ORPHAN_SECONDS)
			return 0;
		if (flow_find(FORWARD, &fwd, &external) &&
		    endpoint_is(&external, &t->local, t->lport))
			return 0;
	}
	return flow_delete(REVERSE, t) == 0;
}

static __always_inline int reap_inbound(const struct reap_record *rec, const struct setting *set,
					__u32 now)
{
	struct inbound *in = inbound_find(&rec->key);

	if (!in)
		return 0;
	if (!rec->force &&
	    !reap_due(set, inbound_timer(&rec->key, in->bits), rec->percent, now - in->seen))
		return 0;
	return inbound_delete(&rec->key) == 0;
}

/* Corrects the count of a pod's mappings; what packets add meanwhile is not lost. */
static __always_inline int reap_pod(const struct reap_record *rec)
{
	struct pod *pod = bpf_map_lookup_elem(&pods, &rec->key.local);

	if (pod)
		__sync_fetch_and_add(&pod->flows, rec->percent);
	return 0;
}

/* Says whose answers a mapping's are: see ingress_away(). Returns the number of entries marked. */
static __always_inline int reap_mark(const struct reap_record *rec)
{
	struct endpoint inner;
	struct flow *r = flow_find(REVERSE, &rec->key, &inner);

	if (!r || r->bits & FLOW_HOST)
		return 0;
	/* Bits that a packet of the flow sets just now may be lost, or this one: the agent looks again. */
	r->bits = (r->bits & ~(FLOW_AWAY | FLOW_HELD)) | (rec->percent & (FLOW_AWAY | FLOW_HELD));
	return 1;
}

/* Global, so that the verifier checks it once and not once a record. */
__noinline int reap_record_at(struct __sk_buff *skb, __u32 offset)
{
	struct reap_record rec;
	struct setting *set;
	__u32 generation = 0;

	if (bpf_skb_load_bytes(skb, offset, &rec, sizeof(rec)))
		return -1;
	set = policy_settings(&generation);
	if (!set)
		return -1;
	switch (rec.table) {
	case REAP_FORWARD:
		return reap_forward(&rec, set, now_seconds());
	case REAP_REVERSE:
		return reap_reverse(&rec, now_seconds());
	case REAP_INBOUND:
		return reap_inbound(&rec, set, now_seconds());
	case REAP_POD:
		return reap_pod(&rec);
	case REAP_MARK:
		return reap_mark(&rec);
	}
	return -1;
}

static __always_inline int reap_records(struct __sk_buff *skb)
{
	int removed = 0;

	for (int i = 0; i < REAP_BATCH; i++) {
		int n = reap_record_at(skb, REAP_START + i * sizeof(struct reap_record));

		if (n < 0)
			break;
		removed += n;
	}
	return removed;
}
