/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What arrives: packets of a mapping go back to their inner socket, connections opened from
 * outside are remembered. Nothing is ever dropped here but a packet that could not be rewritten
 * and a fragment that waited in vain: whatever belongs to no mapping is the node's affair.
 */
#pragma once

#include "hold.h"
#include "inbound.h"
#include "quote.h"

/* While the masquerade mode changes, a flow may be netfilter's as well. Only one of both may translate
 * its answers: what comes to netfilter with a pod's address is no answer to an entry that
 * translates, but a new connection, and gets another port. So an entry says whose they are; for
 * the moment in which that changes they are held back by being dropped, and sent again. */
static __noinline enum outcome ingress_away(__u8 bits)
{
	__u32 generation = 0;
	struct setting *set = policy_settings(&generation);

	if (!set || !set->handover)
		return OUT_CONTINUE; /* the change is over, and what is left is ours */
	return bits & FLOW_HELD ? OUT_DROP_HANDOVER : OUT_PASS_HANDOVER;
}

static __always_inline enum outcome ingress_whose(const struct flow *f)
{
	return f->bits & (FLOW_AWAY | FLOW_HELD) ? ingress_away(f->bits) : OUT_CONTINUE;
}

/* An ICMP error about a mapped flow: the inner host must see its own packet in the quote. A
 * redirect is about the node's next hop. */
static __noinline enum outcome ingress_error(struct __sk_buff *skb, struct scratch *s)
{
	struct packet *pkt = &s->packet;
	enum outcome out;
	struct flow *f;

	if (is_redirect(pkt) || !quote_parse(skb, pkt, &s->quote))
		return OUT_PASS_NO_MAPPING;
	tuple_leaving(&s->flow, &s->quote); /* the quote is what we sent */
	f = flow_find(REVERSE, &s->flow, &s->to);
	if (!f)
		return OUT_PASS_NO_MAPPING;
	out = ingress_whose(f);
	if (out)
		return out;
	if (endpoint_is(&s->to, &s->quote.src, s->quote.sport))
		return OUT_PASS_HOST; /* the node's own, under its own port */
	if (quote_rewrite(skb, pkt, &s->quote, SOURCE, &s->to))
		return OUT_DROP_REWRITE;
	if (!is_ipv4(pkt) &&
	    rewrite_pseudo_header(skb, pkt, pkt->l4 + 2, addr_diff(pkt, &pkt->dst, &s->to.addr)))
		return OUT_DROP_REWRITE;
	return rewrite_addr(skb, s, DESTINATION, &s->to.addr, 0) ? OUT_DROP_REWRITE
								 : OUT_MASQ_ERROR;
}

static __always_inline enum outcome ingress_known(struct __sk_buff *skb, struct scratch *s,
						  struct flow *f)
{
	struct packet *pkt = &s->packet;
	bool host = f->bits & FLOW_HOST;
	enum outcome out = ingress_whose(f);

	flow_touch(f, pkt, now_seconds());
	if (out)
		return out;
	if (host && endpoint_is(&s->to, &pkt->dst, pkt->dport))
		return OUT_PASS_HOST;
	/* The node would answer it with an ABORT. */
	if (port_is_fixed(pkt) && s->to.port != pkt->dport)
		return OUT_DROP_FRAGMENT;
	if (rewrite(skb, s, DESTINATION))
		return OUT_DROP_REWRITE;
	return host ? OUT_MASQ_HOST : OUT_MASQ_KNOWN;
}

static __always_inline enum outcome ingress_whole(struct __sk_buff *skb, struct scratch *s)
{
	struct packet *pkt = &s->packet;
	struct flow *f;

	if (pkt->defect || pkt->kind == KIND_CONTROL)
		return OUT_PASS_NO_MAPPING;
	if (pkt->kind == KIND_ERROR)
		return ingress_error(skb, s);
	tuple_arriving(&s->flow, pkt);
	/* A query never answers: with identifier 0 it would look like a reply. */
	f = pkt->kind == KIND_QUERY ? NULL : flow_find(REVERSE, &s->flow, &s->to);
	if (f)
		return ingress_known(skb, s, f);
	return inbound_arrives(&s->flow, pkt);
}

static __always_inline enum outcome ingress(struct __sk_buff *skb, struct scratch *s)
{
	struct packet *pkt = &s->packet;
	enum outcome out;

	if (pkt->kind == KIND_LATER)
		return fragment_follow(skb, s, INGRESS) ?: hold_later(skb, s);
	out = ingress_whole(skb, s);
	return pkt->first_fragment ? hold_first(skb, s, out) : out;
}
