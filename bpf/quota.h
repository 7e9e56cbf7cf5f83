/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What one pod may take of what all share: mappings, ports, and the time for new flows.
 *
 * A pod is a source address. Its mappings are counted where they are made and ended, with plain
 * additions; the agent's walk recounts them. Bounds apply to new flows only: nobody loses a
 * mapping to make room for another.
 */
#pragma once

#include "decide.h"
#include "flow.h"

static __always_inline void stat_add(__u32 which)
{
	__u64 *n = bpf_map_lookup_elem(&stats, &which);

	if (n)
		*n += 1;
}

/* Takes one drop out of a bucket that fills at one an interval and holds a burst of them. The
 * bucket is the time at which it is full again: one word and no lock. CPUs that meet here may lose
 * a drop, then a little more than the rate passes. */
static __always_inline bool bucket_takes(__u64 *due, __u64 now, __u64 interval, __u64 burst)
{
	__u64 full = *due > now ? *due : now;

	if (full - now >= burst * interval)
		return false;
	*due = full + interval;
	return true;
}

static __always_inline struct pod *quota_pod(const struct addr *a, __u32 *family_pods)
{
	struct pod new = {}, *pod = bpf_map_lookup_elem(&pods, a);

	if (pod)
		return pod;
	if (!bpf_map_update_elem(&pods, a, &new, BPF_NOEXIST))
		__sync_fetch_and_add(family_pods, 1);
	return bpf_map_lookup_elem(&pods, a);
}

/* A mapping of this pod has ended. */
static __noinline void quota_return(const struct addr *a)
{
	struct pod *pod = bpf_map_lookup_elem(&pods, a);

	if (pod)
		__sync_fetch_and_add(&pod->flows, -1);
}

static __always_inline void quota_refusal_key(struct refused *k, const struct tuple *t)
{
	*k = (struct refused){
		.pod = t->local,
		.remote = t->remote,
		.rport = t->rport,
		.proto = t->proto,
		.privileged = bpf_ntohs(t->lport) < 1024,
	};
}

/* What was this pod told when it last asked for a port towards this remote? */
static __always_inline enum outcome quota_recall(const struct tuple *t, const struct setting *set,
						 __u64 now)
{
	struct refusal *r;
	struct refused k;

	quota_refusal_key(&k, t);
	r = bpf_map_lookup_elem(&refusals, &k);
	if (!r || r->at < set->since || now - r->at >= REFUSAL_NS)
		return OUT_CONTINUE;
	stat_add(STAT_REMEMBERED);
	return r->outcome;
}

/* A count may be off for a moment, even below zero. */
static __always_inline bool quota_exceeded(const struct pod *pod, __u32 bound)
{
	return bound && (__s32)pod->flows > 0 && pod->flows >= bound;
}

/* How much of the pool is open to this pod: not the upper part for one that holds more than its
 * fair share. One that is alone leaves a little to whoever comes next. */
static __always_inline __u8 quota_percent(const struct pod *pod, const struct setting *set,
					  __u32 family_pods)
{
	bool alone = family_pods < 2;
	__u32 share = set->ports / (alone ? 2 : family_pods);

	if (set->ports <= (alone ? MAX_COMPLETE : FAIR_POOL) ||
	    !quota_exceeded(pod, share > FAIR_LEAST ? share : FAIR_LEAST))
		return 100;
	return alone ? ALONE_PERCENT : FAIR_PERCENT;
}

static __always_inline enum outcome quota_bounds(struct scratch *s, const struct setting *set,
						 struct pod *pod, const struct share *share,
						 __u64 now)
{
	__u32 family = s->packet.family & 1;
	enum outcome out;

	if (quota_exceeded(pod, set->max_flows) || quota_exceeded(pod, share->flows[family]))
		return OUT_DROP_QUOTA;
	s->claim.percent = quota_percent(pod, set, share->pods[family]);
	out = quota_recall(&s->flow, set, now);
	if (out)
		return out;
	if (set->flow_interval && !bucket_takes(&pod->flows_due, now, set->flow_interval,
						1000000000ULL / set->flow_interval))
		return OUT_DROP_RATE;
	return OUT_CONTINUE;
}

/* May the pod of the flow at hand have one more mapping? It is counted at once; quota_refuse()
 * or quota_return() take that back. Global: the verifier checks it once. */
__noinline int quota_admit(struct __sk_buff *skb)
{
	__u32 zero = 0, generation = 0;
	struct scratch *s = bpf_map_lookup_elem(&scratch, &zero);
	struct setting *set = policy_settings(&generation);
	struct share *share = bpf_map_lookup_elem(&shares, &zero);
	enum outcome out;
	struct pod *pod;

	if (!skb || !s || !set || !share)
		return OUT_DROP_NO_POLICY;
	pod = quota_pod(&s->flow.local, &share->pods[s->packet.family & 1]);
	if (!pod) {
		stat_add(STAT_UNCOUNTED);
		return quota_recall(&s->flow, set, bpf_ktime_get_ns());
	}
	out = quota_bounds(s, set, pod, share, bpf_ktime_get_ns());
	__sync_fetch_and_add(out ? &pod->refused : &pod->flows, 1);
	return out;
}

/* An admitted flow got no mapping. A search that failed is remembered. */
__noinline int quota_refuse(struct __sk_buff *skb, __u32 out)
{
	struct refusal r = { .at = bpf_ktime_get_ns(), .outcome = out };
	__u32 zero = 0;
	struct scratch *s = bpf_map_lookup_elem(&scratch, &zero);
	struct refused k;
	struct pod *pod;

	if (!skb || !s)
		return 0;
	pod = bpf_map_lookup_elem(&pods, &s->flow.local);
	if (pod) {
		__sync_fetch_and_add(&pod->flows, -1);
		__sync_fetch_and_add(&pod->refused, 1);
	}
	if (s->claim.pool >= POOL_OWN || (out != OUT_DROP_NO_PORT && out != OUT_DROP_QUOTA))
		return 0;
	quota_refusal_key(&k, &s->flow);
	bpf_map_update_elem(&refusals, &k, &r, BPF_ANY);
	return 0;
}
