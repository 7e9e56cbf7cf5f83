// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* Bauta's data plane: source NAT in tc programs at egress and ingress of a device.
 *
 * One translation unit; the headers are the stages, in the order a packet meets them.
 * docs/packet-walk.md follows some packets through.
 */
#include <stdbool.h>
#include <linux/bpf.h>
#include <linux/errno.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/in6.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>

#include "config.h"
#include "outcome.h"
#include "packet.h"
#include "maps.h"
#include "scratch.h"
#include "parse.h"
#include "decide.h"
#include "flow.h"
#include "count.h"
#include "inbound.h"
#include "quota.h"
#include "claim.h"
#include "rewrite.h"
#include "quote.h"
#include "fragment.h"
#include "hold.h"
#include "egress.h"
#include "refuse.h"
#include "ingress.h"
#include "sentinel.h"
#include "reap.h"
#include "reclaim.h"

/* The only way out: counts the outcome and turns it into a verdict (a refused packet may go back as
 * an ICMP error after that; see refuse.h). A packet that goes on is
 * handed to the next program of the chain (TC_ACT_UNSPEC is TCX_NEXT), so we end nobody's. */
static __always_inline int finish(const struct packet *pkt, enum direction direction,
				  enum outcome out)
{
	count(pkt->family, direction, out, pkt->segments, pkt->bytes);
	return out < FIRST_HOLD ? TC_ACT_UNSPEC : TC_ACT_SHOT;
}

static __always_inline struct scratch *begin(struct __sk_buff *skb)
{
	__u32 zero = 0;
	struct scratch *s = bpf_map_lookup_elem(&scratch, &zero);

	if (s)
		s->packet = (struct packet){ .segments = 1, .bytes = skb->len };
	return s;
}

static __always_inline int run_egress(struct __sk_buff *skb, __u32 link_header)
{
	struct scratch *s = begin(skb);
	enum outcome out;
	int verdict;

	if (!s)
		return TC_ACT_SHOT; /* impossible: an array always has its element */
	out = parse_packet(skb, &s->packet, link_header) ?: egress(skb, s);
	verdict = finish(&s->packet, EGRESS, out);
	return refuse_is_told(out) ? refuse_tell(skb) : verdict;
}

/* At ingress nothing unreadable is dropped: it may be the node's. */
static __always_inline int run_ingress(struct __sk_buff *skb, __u32 link_header)
{
	struct scratch *s = begin(skb);
	enum outcome out;

	if (!s)
		return TC_ACT_UNSPEC;
	out = parse_packet(skb, &s->packet, link_header);
	if (out >= FIRST_DROP)
		out = OUT_PASS_NO_MAPPING;
	return finish(&s->packet, INGRESS, out ?: ingress(skb, s));
}

/* One program a direction and kind of device: with an Ethernet header, or without any. */
SEC("tc")
int egress_ether(struct __sk_buff *skb)
{
	return run_egress(skb, ETH_HLEN);
}

SEC("tc")
int ingress_ether(struct __sk_buff *skb)
{
	return run_ingress(skb, ETH_HLEN);
}

SEC("tc")
int egress_raw(struct __sk_buff *skb)
{
	return run_egress(skb, 0);
}

SEC("tc")
int ingress_raw(struct __sk_buff *skb)
{
	return run_ingress(skb, 0);
}

static __always_inline int run_sentinel(struct __sk_buff *skb, __u32 link_header)
{
	struct scratch *s = begin(skb);

	/* What can't be read our egress program has dropped. */
	if (s && !parse_packet(skb, &s->packet, link_header))
		sentinel(skb, s);
	return TC_ACT_UNSPEC;
}

SEC("tc")
int sentinel_ether(struct __sk_buff *skb)
{
	return run_sentinel(skb, ETH_HLEN);
}

SEC("tc")
int sentinel_raw(struct __sk_buff *skb)
{
	return run_sentinel(skb, 0);
}

/* Run by the agent through BPF_PROG_TEST_RUN: see reap.h. Returns the number of entries removed. */
SEC("tc")
int reap(struct __sk_buff *skb)
{
	return reap_records(skb);
}

/* Run once by the agent: see reclaim.h. */
SEC("tc")
int reclaim_timer(UNUSED struct __sk_buff *skb)
{
	return reclaim_arm(false);
}

SEC("tc")
int reclaim_work(UNUSED struct __sk_buff *skb)
{
	return reclaim_arm(true);
}

/* clang keeps a type in the BTF only if a map, a function or a variable has it: these are for
 * the Go side alone. The section is no data section, so it makes no map. */
struct go_types {
	enum outcome outcome;
	struct prefix prefix;
	struct rule rule;
	struct reap_record reap_record;
	enum stat stat;
} go_types SEC("go") = {};

char _license[] SEC("license") = "Dual BSD/GPL";
