/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Lines 1 to 8 of the decision for the first packet of a connection: the mirror of
 * policy.Decide. It needs the addresses only. Returns OUT_CONTINUE when lines 9 and 10 are left.
 */
#pragma once

#include "maps.h"

/* The policy generation in force. A packet asks once, so it never mixes two. */
static __always_inline struct setting *policy_settings(__u32 *generation)
{
	__u32 zero = 0;
	struct state *c = bpf_map_lookup_elem(&control, &zero);

	if (!c)
		return NULL;
	*generation = c->active;
	return bpf_map_lookup_elem(&settings, generation);
}

/* What the longest prefix of a says: OUT_CONTINUE if no prefix holds it, or if it decides nothing. */
static __always_inline struct rule *policy_lookup(__u32 generation, enum trie which,
						  const struct addr *a)
{
	struct prefix key = { .length = 128, .addr = *a };
	__u32 slot = generation * TRIES + which;
	void *trie = bpf_map_lookup_elem(&policies, &slot);

	return trie ? bpf_map_lookup_elem(trie, &key) : NULL;
}

/* ND and MLD to a link-local address; to multicast addresses they need no rule of their own. */
static __always_inline bool is_neighbour_discovery(const struct packet *pkt)
{
	__u8 t = pkt->icmp_type;

	return pkt->kind == KIND_CONTROL && pkt->family == FAMILY_IPV6 &&
	       (pkt->dst.w[0] & bpf_htonl(0xffc00000)) == bpf_htonl(0xfe800000) &&
	       ((t >= 130 && t <= 137) || t == 143);
}

static __noinline enum outcome decide(const struct packet *pkt, __u32 generation,
				      const struct setting *set)
{
	struct rule *r;

	if (!set->enabled[pkt->family & 1])
		return OUT_PASS_DISABLED;
	r = policy_lookup(generation, TRIE_SOURCE, &pkt->src);
	if (!r)
		return OUT_PASS_SOURCE;
	if (r->outcome)
		return r->outcome;
	if (is_neighbour_discovery(pkt))
		return OUT_PASS_MULTICAST;
	r = policy_lookup(generation, TRIE_DESTINATION, &pkt->dst);
	return r ? r->outcome : OUT_CONTINUE;
}
