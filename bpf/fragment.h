/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Fragments: the first one has the ports and is told what to do; it leaves a note for the later
 * ones, which have none. One that comes before its first is dropped at egress (fail closed; what
 * leaves was cut to pieces by a kernel just now, in order) and held at ingress; see hold.h.
 */
#pragma once

#include "flow.h"
#include "rewrite.h"

static __always_inline void fragment_key(struct datagram *k, const struct packet *pkt,
					 enum direction direction)
{
	*k = (struct datagram){
		.src = pkt->src,
		.dst = pkt->dst,
		.id = pkt->fragment_id,
		/* IPv6 has one number space for all protocols (RFC 8200 section 4.5), and what a
		 * fragment header names as next may be a further extension header. */
		.proto = is_ipv4(pkt) ? pkt->proto : 0,
		.ingress = direction == INGRESS,
	};
}

/* After the first fragment's verdict; its src and dst are still those of the wire before us. */
static __noinline void fragment_note(struct scratch *s, enum direction direction,
				     const struct addr *addr, enum outcome out)
{
	struct fragment v = { .addr = *addr, .seen = now_seconds(), .outcome = out };

	fragment_key(&s->datagram, &s->packet, direction);
	bpf_map_update_elem(&fragments, &s->datagram, &v, BPF_ANY);
}

/* Does to a later fragment what was done to its first; OUT_CONTINUE if there is no note. */
static __noinline enum outcome fragment_follow(struct __sk_buff *skb, struct scratch *s,
					       enum direction direction)
{
	enum side side = direction == INGRESS ? DESTINATION : SOURCE;
	struct fragment *v;
	struct datagram k;
	struct addr addr;

	fragment_key(&k, &s->packet, direction);
	v = bpf_map_lookup_elem(&fragments, &k);
	if (!v || (__s32)(now_seconds() - v->seen) > FRAGMENT_SECONDS)
		return OUT_CONTINUE;
	if (v->outcome != OUT_MASQ_FRAGMENT)
		return v->outcome;
	addr = v->addr;
	return rewrite_addr(skb, s, side, &addr, BPF_F_RECOMPUTE_CSUM) ? OUT_DROP_REWRITE
								       : OUT_MASQ_FRAGMENT;
}
