/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What leaves: known flows are translated, the node's own packets guarded, new flows mapped.
 * Fail closed: past line 9 every path ends in a translation or in a drop, but for the named
 * exceptions: what is no masquerade device, unknown-protocols=pass, and what was translated already.
 */
#pragma once

#include "claim.h"
#include "fragment.h"
#include "inbound.h"
#include "quote.h"

/* A translated packet may meet a program of ours again: on a device below this one, or while the
 * hook changes. The mark says so. It decides about packets with the node's own address only, so
 * a forged one gains nothing. The IP layer clears these words of an arriving packet; the control
 * block itself is lost where a qdisc queues the packet in between. */
#define MARK_2 0x42617574
#define MARK_3 0x61204e41

static __always_inline void egress_mark(struct __sk_buff *skb)
{
	skb->cb[2] = MARK_2;
	skb->cb[3] = MARK_3;
}

static __always_inline bool egress_is_marked(const struct __sk_buff *skb)
{
	return skb->cb[2] == MARK_2 && skb->cb[3] == MARK_3;
}

/* Writes the external socket into the packet. */
static __always_inline enum outcome egress_translate(struct __sk_buff *skb, struct scratch *s,
						     enum outcome out)
{
	if (port_is_fixed(&s->packet) && s->to.port != s->packet.sport)
		return OUT_DROP_FRAGMENT;
	egress_mark(skb);
	if (s->packet.first_fragment)
		fragment_note(s, EGRESS, &s->to.addr, OUT_MASQ_FRAGMENT);
	return rewrite(skb, s, SOURCE) ? OUT_DROP_REWRITE : out;
}

/* The same, as a call: its frame must not lie below the search for a port. */
static __noinline enum outcome egress_translate_first(struct __sk_buff *skb, struct scratch *s,
						      enum outcome out)
{
	return egress_translate(skb, s, out);
}

/* An ICMP error about a mapped flow: the quote must be the remote's view. The outer source is
 * translated too, unless it is the node that complains. Neither refreshes the mapping (RFC 5508
 * REQ-6). Without a mapping, the flow becomes the quoted packet's, if it has one. A pod is no
 * router of the remote's: its redirects are dropped. */
static __noinline enum outcome egress_error(struct __sk_buff *skb, struct scratch *s)
{
	struct packet *pkt = &s->packet;
	struct rule r = {};
	__u32 generation = 0;

	if (!quote_parse(skb, pkt, &s->quote)) {
		pkt->unkeyed = 1;
		return OUT_CONTINUE;
	}
	tuple_arriving(&s->flow, &s->quote); /* the quote came towards us */
	if (!flow_find(FORWARD, &s->flow, &s->to))
		return OUT_CONTINUE;
	if (policy_settings(&generation))
		r = policy_lookup(generation, TRIE_SOURCE, &pkt->src);
	if (is_redirect(pkt) && r.outcome != OUT_PASS_HOST)
		return OUT_DROP_PROTOCOL;
	if (quote_rewrite(skb, pkt, &s->quote, DESTINATION, &s->to))
		return OUT_DROP_REWRITE;
	if (r.outcome == OUT_PASS_HOST)
		return endpoint_is(&s->to, &s->quote.dst, s->quote.dport) ? OUT_PASS_HOST
									  : OUT_MASQ_ERROR;
	if (pkt->first_fragment)
		fragment_note(s, EGRESS, &s->to.addr, OUT_MASQ_FRAGMENT);
	if (!is_ipv4(pkt) &&
	    rewrite_pseudo_header(skb, pkt, pkt->l4 + 2, addr_diff(pkt, &pkt->src, &s->to.addr)))
		return OUT_DROP_REWRITE;
	return rewrite_addr(skb, s, SOURCE, &s->to.addr, 0) ? OUT_DROP_REWRITE : OUT_MASQ_ERROR;
}

/* The reverse half of the flow at hand, if there is one; its content goes to s->owner. */
static __always_inline struct flow *egress_reverse(struct scratch *s)
{
	s->reverse = s->flow;
	s->reverse.local = s->to.addr;
	s->reverse.lport = s->to.port;
	return flow_find(REVERSE, &s->reverse, &s->owner);
}

/* Once a second and flow: the reverse half must still be there and ours. It heals if it was
 * lost; false if another flow has the port now, then this one needs a new mapping. */
static __noinline bool egress_confirm(struct __sk_buff *skb, struct scratch *s, __u8 bits,
				      __u32 now)
{
	struct flow *r = egress_reverse(s);

	bits &= FLOW_HOST;
	if (!bits && s->packet.kind == KIND_BARE &&
	    claim_node_tunnels(&s->flow.remote, 0, s->flow.proto)) {
		/* A tunnel of the node that came later. */
		if (r && endpoint_is(&s->owner, &s->flow.local, s->flow.lport))
			flow_delete(REVERSE, &s->reverse);
		return false;
	}
	if (r)
		return endpoint_is(&s->owner, &s->flow.local, s->flow.lport);
	if (!bits && claim_node_owns(skb, s, &s->reverse))
		return false;
	s->entry.flow =
		(struct flow){ .seen = now, .created = now, .port = s->flow.lport, .bits = bits };
	return flow_add(REVERSE, &s->reverse, &s->entry, &s->flow.local) == 0 || claim_revive(s);
}

/* A SYN on a mapping that has seen more than SYNs opens a new connection on it: both halves
 * start again, so that it does not run on the old one's timer. */
static __noinline void egress_reopen(struct scratch *s)
{
	struct flow *r = egress_reverse(s);

	if (r) {
		r->bits &= FLOW_HOST;
		r->packets = 0;
	}
}

/* A packet of a known flow; OUT_CONTINUE if its mapping had to be given up. */
static __always_inline enum outcome egress_known(struct __sk_buff *skb, struct scratch *s,
						 struct flow *f)
{
	__u32 now = now_seconds();

	if (f->seen != now && !egress_confirm(skb, s, f->bits, now)) {
		bool host = f->bits & FLOW_HOST;

		if (!flow_delete(FORWARD, &s->flow) && !host)
			quota_return(&s->flow.local);
		return OUT_CONTINUE;
	}
	if (is_opening(&s->packet) && f->bits & (FLOW_DATA | FLOW_FIN | FLOW_RST)) {
		egress_reopen(s);
		f->bits &= FLOW_HOST;
		f->created = now;
	}
	flow_touch(f, &s->packet, now);
	if (!(f->bits & FLOW_HOST))
		return egress_translate(skb, s, OUT_MASQ_KNOWN);
	if (endpoint_is(&s->to, &s->packet.src, s->packet.sport))
		return OUT_PASS_HOST;
	return egress_translate(skb, s, OUT_MASQ_HOST);
}

/* Which ports a new mapping may get. own: none but the packet's. */
static __always_inline enum pool egress_pool(const struct packet *pkt, bool own)
{
	if (pkt->kind == KIND_BARE)
		return POOL_NONE;
	if (own || port_is_fixed(pkt))
		return POOL_OWN;
	return pkt->kind == KIND_QUERY ? POOL_IDENTIFIERS : POOL_PORTS;
}

/* Maps a new flow to a port of the address in s->reverse. OUT_CONTINUE: the mapping is in s->to. */
static __always_inline enum outcome egress_claim(struct __sk_buff *skb, struct scratch *s,
						 __u8 bits)
{
	struct packet *pkt = &s->packet;
	enum outcome out;
	__u32 now;
	long err;

	out = claim_port(skb, s, egress_pool(pkt, s->claim.own), bits);
	if (out)
		return out;
	s->to.port = s->reverse.lport;
	now = now_seconds();
	s->entry.flow = (struct flow){
		.seen = now,
		.created = now,
		.packets = pkt->segments,
		.port = s->to.port,
		.bits = flow_bits(bits, pkt),
		.bytes = pkt->bytes,
	};
	err = flow_add(FORWARD, &s->flow, &s->entry, &s->to.addr);
	if (err == -EEXIST) {
		/* Another CPU was faster with this flow: its mapping is the flow's, and counted. */
		struct flow *f = flow_find(FORWARD, &s->flow, &s->to);

		if (!s->claim.reused && (!f || s->to.port != s->reverse.lport))
			flow_delete(REVERSE, &s->reverse);
		if (!f)
			return OUT_DROP_MAP_ERROR;
		flow_touch(f, pkt, now);
		if (!(bits & FLOW_HOST))
			quota_return(&s->flow.local);
	} else if (err) {
		if (!s->claim.reused)
			flow_delete(REVERSE, &s->reverse);
		return err == -E2BIG ? OUT_DROP_TABLE_FULL : OUT_DROP_MAP_ERROR;
	} else if (s->claim.reused && !egress_confirm(skb, s, bits, now)) {
		/* The reaper took the reverse half for an orphan meanwhile, and another flow its port. */
		flow_delete(FORWARD, &s->flow);
		return OUT_DROP_MAP_ERROR;
	}
	return OUT_CONTINUE;
}

/* Maps a new flow to a port of s->to's address and translates its first packet. bits: FLOW_HOST
 * for the node's own, which no quota bounds. */
static __noinline enum outcome egress_map(struct __sk_buff *skb, struct scratch *s, __u8 bits)
{
	bool host = bits & FLOW_HOST;
	enum outcome out = OUT_CONTINUE;

	s->claim.percent = 100;
	if (!host)
		out = quota_admit(skb);
	if (out)
		return out;
	s->reverse = s->flow;
	s->reverse.local = s->to.addr;
	out = egress_claim(skb, s, bits);
	if (out && !host)
		quota_refuse(skb, out);
	if (out)
		return out;
	if (host && s->to.port == s->packet.sport)
		return OUT_PASS_HOST;
	return egress_translate_first(skb, s, host ? OUT_MASQ_HOST : OUT_MASQ_NEW);
}

/* A packet of the node meets the reverse entry r of a mapping, whose inner socket is in s->owner.
 * OUT_CONTINUE: it needs a mapping, and with it another port. */
static __always_inline enum outcome egress_meets(struct __sk_buff *skb, struct scratch *s,
						 const struct flow *r, const struct setting *set,
						 enum outcome pass)
{
	const struct packet *pkt = &s->packet;

	if (egress_is_marked(skb))
		return OUT_PASS_TRANSLATED;
	if (set->handover && r->bits & (FLOW_AWAY | FLOW_HELD))
		return pass; /* netfilter has this very flow, with its port */
	if (pkt->proto == IPPROTO_UDP && claim_node_tunnels(&pkt->dst, pkt->dport, IPPROTO_UDP))
		return pass; /* nobody answers to the source port of a tunnel's packet */
	if (pkt->kind == KIND_BARE && !(r->bits & FLOW_HOST)) {
		/* There is no other port, and the node comes before any pod. */
		s->reverse = s->flow;
		s->reverse.local = s->owner.addr;
		s->reverse.lport = s->owner.port;
		if (!flow_delete(FORWARD, &s->reverse))
			quota_return(&s->reverse.local);
		flow_delete(REVERSE, &s->flow);
	}
	return OUT_CONTINUE;
}

/* Does the node's stack refuse a segment that it has no socket for? At an address and port that
 * pods share, the segment may be one of a pod's connection whose mapping was lost: a reset would
 * end what the pod's next packet heals (kubernetes issue 74839 is the same with conntrack). A reset
 * with ACK answers a SYN, or is a socket's own. */
static __noinline bool egress_resets_stray(struct __sk_buff *skb, struct scratch *s)
{
	const struct packet *pkt = &s->packet;
	__u32 ifindex = skb->ifindex;
	struct device *dev;

	if (pkt->proto != IPPROTO_TCP ||
	    (pkt->tcp_flags & (TCP_SYN | TCP_FIN | TCP_RST | TCP_ACK)) != TCP_RST)
		return false;
	dev = bpf_map_lookup_elem(&devices, &ifindex);
	return dev && addr_equal(&dev->addr[pkt->family & 1], &pkt->src) &&
	       !claim_node_owns(skb, s, &s->flow);
}

/* Does an error of the node's own stack quote a later fragment that we translated on its way in? It has
 * no ports, so it cannot be told from what mapping it is, and it would show the pod's address to
 * the remote. Only IPv6 sends such errors; the one about the first fragment says the same. */
static __noinline bool egress_quotes_fragment(struct scratch *s, __u32 generation)
{
	const struct fragment *v;

	if (s->packet.kind != KIND_ERROR || is_ipv4(&s->packet) || s->quote.kind != KIND_LATER ||
	    policy_lookup(generation, TRIE_SOURCE, &s->quote.dst).outcome)
		return false;
	fragment_key(&s->datagram, &s->quote, INGRESS);
	v = bpf_map_lookup_elem(&fragments, &s->datagram);
	return !v ||
	       v->outcome == OUT_MASQ_FRAGMENT; /* else the datagram came to the pod as it was */
}

/* A packet of the node. Whoever came first keeps a tuple: if a mapping has it, the node's flow
 * gets a mapping and with it another port. Sockets can be looked up, so what one of them sends
 * needs no entry. Everything else is claimed as it is used: ICMP queries, protocols without ports,
 * SCTP and UDP-Lite, and what was forwarded, because then the node's address comes from another
 * translator (netfilter's MASQUERADE or the way back of its DNAT). OUT_CONTINUE: it needs an
 * entry. */
static __noinline enum outcome egress_host(struct __sk_buff *skb, struct scratch *s,
					   const struct setting *set, __u32 generation,
					   enum outcome pass)
{
	const struct packet *pkt = &s->packet;
	struct flow *r;

	if (pass == OUT_PASS_HOST && pkt->unkeyed && egress_quotes_fragment(s, generation))
		return OUT_DROP_FRAGMENT;
	if (pkt->defect ||
	    (pkt->kind != KIND_PORTS && pkt->kind != KIND_QUERY && pkt->kind != KIND_BARE))
		return pass;
	if (pkt->kind == KIND_PORTS && !port_in(set->guarded, pkt->sport))
		return pass;
	r = flow_find(REVERSE, &s->flow, &s->owner);
	if (r)
		return egress_meets(skb, s, r, set, pass);
	if (pass != OUT_PASS_HOST || is_multicast(&pkt->dst))
		return pass;
	/* Towards an excluded destination no mapping can be in the way. */
	if (inbound_exempt(generation, &pkt->dst))
		return pass;
	if (claim_can_ask(pkt->proto) && !skb->ingress_ifindex)
		return egress_resets_stray(skb, s) ? OUT_DROP_STRAY : pass;
	s->claim.own = set->handover; /* what netfilter translated keeps its port */
	return OUT_CONTINUE;
}

/* An answer to a mapped flow, or an error about it, that leaves by another masquerade device, towards
 * the inner host: not a new connection. */
static __always_inline bool egress_answers(struct scratch *s)
{
	if (s->packet.kind == KIND_ERROR)
		tuple_leaving(&s->reverse, &s->quote);
	else if (s->packet.kind == KIND_PORTS || s->packet.kind == KIND_REPLY)
		tuple_arriving(&s->reverse, &s->packet);
	else
		return false;
	return flow_find(FORWARD, &s->reverse, &s->to);
}

/* The address a new mapping gets: the source of the longest route towards the destination, else
 * the device's. */
static __always_inline void egress_address(struct scratch *s, const struct device *dev,
					   const struct setting *set, __u32 generation)
{
	struct rule r = {};

	s->to.addr = dev->addr[s->packet.family & 1];
	if (set->routes)
		r = policy_lookup(generation, TRIE_ROUTE, &s->packet.dst);
	if (r.source)
		s->to.addr = set->source[r.source & (ROUTE_SOURCES - 1)];
}

/* Line 10: may this packet be masqueraded, and with which address? OUT_CONTINUE: do it. */
static __always_inline enum outcome egress_admit(struct __sk_buff *skb, struct scratch *s,
						 const struct setting *set, __u32 generation)
{
	const struct packet *pkt = &s->packet;
	__u32 ifindex = skb->ifindex;
	struct device *dev = bpf_map_lookup_elem(&devices, &ifindex);

	if (!dev)
		return OUT_PASS_DEVICE;
	if (pkt->defect)
		return pkt->defect;
	if (is_stray(pkt))
		return OUT_DROP_STRAY;
	if (pkt->kind == KIND_BARE && set->unknown_protocols == UNKNOWN_PASS)
		return OUT_PASS_PROTOCOL;
	if (pkt->kind == KIND_BARE && set->unknown_protocols == UNKNOWN_DROP)
		return OUT_DROP_PROTOCOL;
	if (pkt->kind == KIND_CONTROL)
		return OUT_DROP_PROTOCOL;
	if (pkt->kind == KIND_BARE && claim_node_tunnels(&pkt->dst, 0, pkt->proto))
		return OUT_DROP_PROTOCOL;
	egress_address(s, dev, set, generation);
	return addr_is_zero(&s->to.addr) ? OUT_DROP_NO_ADDRESS : OUT_CONTINUE;
}

/* A packet of no known flow. */
static __noinline enum outcome egress_unknown(struct __sk_buff *skb, struct scratch *s)
{
	struct packet *pkt = &s->packet;
	bool keyed = !pkt->defect && !pkt->unkeyed && pkt->kind != KIND_CONTROL &&
		     (pkt->kind != KIND_ERROR || quote_is_answered(s));
	struct setting *set;
	__u32 generation = 0;
	__u8 bits = 0;
	enum outcome out, pass = OUT_CONTINUE, mapped;

	set = policy_settings(&generation);
	if (!set)
		return OUT_DROP_NO_POLICY;
	s->decided = generation + 1;
	s->claim.own = 0;
	out = decide(pkt, generation, set);
	if (out == OUT_PASS_HOST || out == OUT_PASS_DISABLED) {
		pass = out;
		out = egress_host(skb, s, set, generation, pass);
		if (out)
			return out;
		s->to.addr = pkt->src;
		bits = FLOW_HOST;
	} else if (out) {
		return out;
	} else if (keyed && is_opening(pkt)) {
		/* A query has no tuple in common with an inbound one, unless by an identifier of 0. */
		if (pkt->kind != KIND_QUERY)
			inbound_delete(&s->flow);
	} else if (keyed && inbound_answers(&s->flow, pkt, set)) {
		out = OUT_PASS_INBOUND;
	} else if (keyed && egress_answers(s)) {
		out = OUT_PASS_TRANSLATED;
	}
	if (!bits && !out)
		out = egress_admit(skb, s, set, generation);
	if (out) {
		/* What passes by more than its addresses says so for its later fragments. */
		if (pkt->first_fragment && (out == OUT_PASS_INBOUND || out == OUT_PASS_PROTOCOL))
			fragment_note(s, EGRESS, &pkt->src, out);
		return out;
	}
	mapped = egress_map(skb, s, bits);
	/* The node's packet is not dropped because no mapping was to be had. */
	return bits && mapped >= FIRST_DROP && mapped != OUT_DROP_REWRITE ? pass : mapped;
}

static __always_inline enum outcome egress(struct __sk_buff *skb, struct scratch *s)
{
	struct packet *pkt = &s->packet;
	struct flow *f;
	enum outcome out = OUT_CONTINUE;

	tuple_leaving(&s->flow, pkt);
	if (pkt->kind == KIND_LATER)
		out = fragment_follow(skb, s, EGRESS);
	else if (pkt->defect || pkt->kind == KIND_CONTROL)
		out = OUT_CONTINUE;
	else if (pkt->kind == KIND_ERROR)
		out = egress_error(skb, s);
	else if (pkt->kind == KIND_REPLY)
		out = OUT_CONTINUE; /* mappings begin with a query; identifier 0 would look like one */
	else if ((f = flow_find(FORWARD, &s->flow, &s->to)))
		out = egress_known(skb, s, f);
	return out ?: egress_unknown(skb, s);
}
