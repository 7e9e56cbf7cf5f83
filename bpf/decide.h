/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Lines 1 to 8 of the decision for the first packet of a connection: the mirror of
 * policy.Decide. It needs the addresses only. Returns OUT_CONTINUE when lines 9 and 10 are left.
 */
#pragma once

#include "scratch.h"

/* The policy generation in force. A packet asks once, so it never mixes two. */
static __always_inline struct setting *policy_settings(__u32 *generation)
{
	__u32 zero = 0;
	struct state *c = bpf_map_lookup_elem(&control, &zero);
	__u32 slot;

	if (!c)
		return NULL;
	if (c->active == ~0U)
		return NULL;
	*generation = c->active;
	slot = c->active & 1;
	return bpf_map_lookup_elem(&settings, &slot);
}

/* Asks the table itself. */
static __noinline void policy_ask(struct answer *to, __u32 generation, enum trie which,
				  const struct addr *a)
{
	struct prefix key = { .length = 128, .addr = *a };
	__u32 slot = (generation & 1) * TRIES + which;
	void *trie = bpf_map_lookup_elem(&policies, &slot);
	struct rule *r = trie ? bpf_map_lookup_elem(trie, &key) : NULL;

	*to = (struct answer){
		.addr = *a,
		.generation = generation,
		.trie = which,
		.valid = 1,
	};
	if (r)
		to->rule = *r;
	else if (which == TRIE_SOURCE)
		to->rule.outcome = OUT_PASS_SOURCE;
}

/* What the longest prefix of a says. OUT_CONTINUE: it decides nothing. */
static __always_inline struct rule policy_lookup(__u32 generation, enum trie which,
						 const struct addr *a)
{
	__u32 hash = a->w[3] ^ a->w[2] * 0x85ebca6b ^ a->w[1] * 0x9e3779b1 ^ a->w[0] ^ which;
	__u32 slot = hash * 0xc2b2ae35 >> (32 - ANSWER_BITS);
	struct answer *known = bpf_map_lookup_elem(&answers, &slot);

	if (!known)
		return (struct rule){ .outcome = OUT_DROP_MAP_ERROR }; /* impossible */
	if (known->generation != generation || known->trie != which || !known->valid ||
	    !addr_equal(&known->addr, a))
		policy_ask(known, generation, which, a);
	return known->rule;
}

/* ND and MLD to a link-local address; to multicast addresses they need no rule of their own. */
static __always_inline bool is_neighbour_discovery(const struct packet *pkt)
{
	__u8 t = pkt->icmp_type;

	return pkt->kind == KIND_CONTROL && pkt->family == FAMILY_IPV6 &&
	       (pkt->dst.w[0] & bpf_htonl(0xffc00000)) == bpf_htonl(0xfe800000) &&
	       ((t >= 130 && t <= 137) || t == 143);
}

static __always_inline enum outcome decide(const struct packet *pkt, __u32 generation,
					   const struct setting *set)
{
	struct rule r;

	if (!set->enabled[pkt->family & 1])
		return OUT_PASS_DISABLED;
	r = policy_lookup(generation, TRIE_SOURCE, &pkt->src);
	if (r.outcome)
		return r.outcome;
	if (is_neighbour_discovery(pkt))
		return OUT_PASS_MULTICAST;
	return policy_lookup(generation, TRIE_DESTINATION, &pkt->dst).outcome;
}
