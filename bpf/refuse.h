/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Tells a pod at once that its new connection was refused, with an ICMP error (RFC 6888 REQ-11):
 * instead of timeouts it sees "no route to host".
 *
 * The dropped packet itself becomes the error: what it was is moved behind new headers and quoted
 * untranslated. It goes back to where it came from, and never on: whatever fails ends in a drop.
 */
#pragma once

#include "parse.h"
#include "quota.h"
#include "rewrite.h"

/* How much an error may hold (RFC 1812 section 4.3.2.3, RFC 4443 section 2.4 c). */
#define ANSWER_IPV4 576
#define ANSWER_IPV6 1280

struct answer4 {
	struct ipv4_header ip;
	__u8 type, code;
	__be16 checksum;
	__be32 unused;
};

struct answer6 {
	struct ipv6_header ip;
	__u8 type, code;
	__be16 checksum;
	__be32 unused;
};

_Static_assert(sizeof(struct answer4) == 28 && sizeof(struct answer6) == 48, "as on the wire");

static __always_inline bool refuse_is_told(enum outcome out)
{
	return out == OUT_DROP_NO_PORT || out == OUT_DROP_TABLE_FULL || out == OUT_DROP_QUOTA ||
	       out == OUT_DROP_RATE;
}

static __always_inline __u64 refuse_sum(const void *data, __u32 size)
{
	return (__u32)bpf_csum_diff(NULL, 0, (__be32 *)data, size, 0);
}

/* The sum of the packet's IP header and what follows, size bytes; -1 if they can't be read. */
static __always_inline long refuse_quote_sum(struct __sk_buff *skb, struct scratch *s, __u32 size)
{
	__u32 at = s->packet.l3;
	__u64 sum = 0;

	for (int i = 0; i < (ANSWER_IPV6 + ANSWER_CHUNK - 1) / ANSWER_CHUNK && size; i++) {
		__u32 last = (size < ANSWER_CHUNK ? size : ANSWER_CHUNK) - 1, n;

		asm volatile("" : "+r"(last)); /* the verifier must see this very bound */
		if (last >= ANSWER_CHUNK)
			return -1;
		n = last + 1;
		if (bpf_skb_load_bytes(skb, at, s->quoted, n))
			return -1;
		s->quoted[n] = s->quoted[n + 1] = s->quoted[n + 2] = 0;
		sum += refuse_sum(s->quoted, (n + 3) & ~3U);
		at += n;
		size -= n;
	}
	return sum;
}

/* Puts size bytes of headers before the IP header and cuts the packet behind its quote. */
static __always_inline long refuse_make_room(struct __sk_buff *skb, __u32 end, __u32 size)
{
	if (bpf_skb_change_tail(skb, end, 0))
		return -1;
	return bpf_skb_adjust_room(skb, size, BPF_ADJ_ROOM_MAC, 0);
}

static __always_inline long refuse_ipv4(struct __sk_buff *skb, struct scratch *s,
					const struct addr *from, __u32 size)
{
	struct answer4 h = {
		.ip = {
			.version_ihl = 0x45,
			.tos = 0xc0, /* internetwork control (RFC 1812 section 4.3.2.5) */
			.ttl = 64,
			.proto = IPPROTO_ICMP,
			.src = from->w[3],
			.dst = s->packet.src.w[3],
		},
		.type = 3, /* destination unreachable: */
		.code = 13, /* administratively prohibited */
	};
	long sum;

	if (size > ANSWER_IPV4 - sizeof(h))
		size = ANSWER_IPV4 - sizeof(h);
	sum = refuse_quote_sum(skb, s, size);
	if (sum < 0 || refuse_make_room(skb, s->packet.l3 + size, sizeof(h)))
		return -1;
	h.ip.length = bpf_htons(sizeof(h) + size);
	h.ip.checksum = ~csum_fold(refuse_sum(&h.ip, sizeof(h.ip)));
	h.checksum = ~csum_fold(sum + refuse_sum(&h.type, sizeof(h) - sizeof(h.ip)));
	return bpf_skb_store_bytes(skb, s->packet.l3, &h, sizeof(h), 0);
}

static __always_inline long refuse_ipv6(struct __sk_buff *skb, struct scratch *s,
					const struct addr *from, __u32 size)
{
	struct answer6 h = {
		.ip = {
			.version_class = 0x60,
			.next = PROTO_ICMPV6,
			.hop_limit = 64,
			.src = *from,
			.dst = s->packet.src,
		},
		.type = 1, /* destination unreachable: */
		.code = 1, /* administratively prohibited */
	};
	__u32 length;
	long sum;

	if (size > ANSWER_IPV6 - sizeof(h))
		size = ANSWER_IPV6 - sizeof(h);
	sum = refuse_quote_sum(skb, s, size);
	if (sum < 0 || refuse_make_room(skb, s->packet.l3 + size, sizeof(h)))
		return -1;
	length = sizeof(h) - sizeof(h.ip) + size;
	h.ip.length = bpf_htons(length);
	/* Addresses, length and protocol are the pseudo-header. */
	h.checksum = ~csum_fold(sum + refuse_sum(&h.ip.src, sizeof(h) - 8) + bpf_htonl(length) +
				bpf_htonl(PROTO_ICMPV6));
	return bpf_skb_store_bytes(skb, s->packet.l3, &h, sizeof(h), 0);
}

/* Not to fragments and super-packets, which do not fit into one error; not through a VLAN tag,
 * nor from a device without link-layer headers. One of the node's own has nowhere to go back to. */
static __always_inline bool refuse_can_tell(const struct __sk_buff *skb, const struct packet *pkt)
{
	return skb->ingress_ifindex && pkt->l3 == ETH_HLEN && !skb->vlan_present &&
	       pkt->segments == 1 && !pkt->first_fragment && pkt->end >= pkt->l4 + 8 &&
	       pkt->end <= skb->len;
}

/* The verdict for a packet that was refused: it goes back as an ICMP error, or is dropped. Global:
 * the verifier checks it once. */
__noinline int refuse_tell(struct __sk_buff *skb)
{
	__u32 zero = 0, ifindex = skb->ifindex;
	struct scratch *s = bpf_map_lookup_elem(&scratch, &zero);
	struct device *dev = bpf_map_lookup_elem(&devices, &ifindex);
	const struct addr *from;
	struct pod *pod;
	long err;

	if (!s || !dev || !refuse_can_tell(skb, &s->packet))
		goto silent;
	from = &dev->addr[s->packet.family & 1];
	pod = bpf_map_lookup_elem(&pods, &s->packet.src);
	if (addr_is_zero(from) || !pod ||
	    !bucket_takes(&pod->answers_due, bpf_ktime_get_ns(), ANSWER_NS, ANSWER_BURST))
		goto silent;
	if (is_ipv4(&s->packet))
		err = refuse_ipv4(skb, s, from, s->packet.end - s->packet.l3);
	else
		err = refuse_ipv6(skb, s, from, s->packet.end - s->packet.l3);
	if (err)
		goto silent;
	stat_add(STAT_ANSWERED);
	return bpf_redirect_neigh(skb->ingress_ifindex, NULL, 0, 0);
silent:
	stat_add(STAT_UNANSWERED);
	return TC_ACT_SHOT;
}
