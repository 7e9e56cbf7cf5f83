/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Writes an address and a port and keeps every checksum true.
 *
 * Only incremental changes: right for CHECKSUM_PARTIAL (the helpers know, rewrite_at_once() is told),
 * for GSO packets (segmentation copies the header) and for truncated ones. On an error the packet
 * may be half written: the caller must drop it.
 */
#pragma once

#include "crc32c.h"
#include "scratch.h"
#include "parse.h"

/* Missing in older UAPI headers; kernel 6.16. */
#define CSUM_IPV6 (1ULL << 7)

enum side { SOURCE = 0, DESTINATION = 1 };

/* Offset of the checksum in the transport header; 0 if there is none, or in SCTP, whose CRC covers
 * no address. */
static __always_inline __u32 checksum_offset(const struct packet *pkt)
{
	switch (pkt->proto) {
	case IPPROTO_TCP:
		return 16;
	case IPPROTO_UDP:
	case IPPROTO_UDPLITE:
		return 6;
	case IPPROTO_ICMP:
		return is_ipv4(pkt) ? 2 : 0;
	case PROTO_ICMPV6:
		return is_ipv4(pkt) ? 0 : 2;
	}
	return 0;
}

/* All but ICMPv4 sum a pseudo-header of the addresses. */
static __always_inline bool has_pseudo_header(const struct packet *pkt)
{
	return pkt->proto != IPPROTO_ICMP;
}

/* Does a transport checksum of zero have a meaning of its own? In UDP it says that there is none
 * (RFC 768), in UDP-Lite it is invalid (RFC 3828): a sum that comes out as zero is sent as 0xffff. */
static __always_inline bool zero_checksum_is_special(const struct packet *pkt)
{
	return pkt->proto == IPPROTO_UDP || pkt->proto == IPPROTO_UDPLITE;
}

/* Offset of the port, or of the ICMP identifier, on one side. */
static __always_inline __u32 port_offset(const struct packet *pkt, enum side side)
{
	if (pkt->kind != KIND_PORTS)
		return 4;
	return side == SOURCE ? 0 : 2;
}

static __always_inline struct addr *packet_addr(struct packet *pkt, enum side side)
{
	return side == SOURCE ? &pkt->src : &pkt->dst;
}

static __always_inline __be16 packet_port(const struct packet *pkt, enum side side)
{
	return side == SOURCE ? pkt->sport : pkt->dport;
}

static __always_inline __u16 csum_fold(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return (sum & 0xffff) + (sum >> 16);
}

/* The bits of both ports, as they stand in memory, that change with one of them. */
static __always_inline __u32 ports_diff(const struct packet *pkt, enum side side, __be16 port)
{
	__u32 diff = packet_port(pkt, side) ^ port;

	return side == SOURCE ? diff : diff << 16;
}

/* One's complement difference of a 16-bit word. */
static __always_inline __u32 word_diff(__be16 from, __be16 to)
{
	return (__u16)~from + (__u32)to;
}

static __always_inline __be16 csum_apply(__be16 sum, __u64 diff)
{
	return (__u16)~csum_fold((__u16)~sum + diff);
}

/* One's complement difference between two addresses of the packet's family. In place: the helper
 * for it takes longer than the additions. */
static __always_inline __u32 addr_diff(const struct packet *pkt, const struct addr *from,
				       const struct addr *to)
{
	__u64 sum = (__u64)(__u32)~from->w[3] + to->w[3];

	if (!is_ipv4(pkt)) {
		sum += (__u64)(__u32)~from->w[2] + to->w[2];
		sum += (__u64)(__u32)~from->w[1] + to->w[1];
		sum += (__u64)(__u32)~from->w[0] + to->w[0];
	}
	sum = (sum & 0xffffffff) + (sum >> 32);
	return (sum & 0xffffffff) + (sum >> 32);
}

/* Moves the transport checksum by the difference of an address. */
static __always_inline long rewrite_pseudo_header(struct __sk_buff *skb, const struct packet *pkt,
						  __u32 offset, __u32 diff)
{
	__u64 flags = BPF_F_PSEUDO_HDR;
	long err;

	if (zero_checksum_is_special(pkt))
		flags |=
			BPF_F_MARK_MANGLED_0; /* a zero checksum stays zero, a new zero becomes 0xffff */
	if (!is_ipv4(pkt) && have_csum_ipv6)
		flags |= CSUM_IPV6;
	err = bpf_l4_csum_replace(skb, offset, 0, diff, flags);
	/* Before CSUM_IPV6 the helper also moved skb->csum, although an IPv6 address and the checksum
	 * over it cancel out: put it back. An error here only says that there was none. */
	if (!is_ipv4(pkt) && !have_csum_ipv6)
		bpf_csum_update(skb, diff);
	return err;
}

/* Writes both addresses, one of them new, and so many bytes of s->headers.transport. One store, because each
 * takes 27 ns. In IPv4 it begins with the checksum, so that the sum of the packet (skb->csum) stays.
 * In IPv6 it stays if a transport checksum took the difference up; else the flag must be
 * BPF_F_RECOMPUTE_CSUM. */
static __always_inline long rewrite_headers(struct __sk_buff *skb, struct scratch *s,
					    enum side side, const struct addr *to, __u32 transport,
					    __u64 flag)
{
	const struct packet *pkt = &s->packet;
	struct headers *h = &s->headers;

	if (!is_ipv4(pkt)) {
		h->v6[SOURCE] = pkt->src;
		h->v6[DESTINATION] = pkt->dst;
		h->v6[side] = *to;
		return bpf_skb_store_bytes(skb, pkt->l3 + 8, h->v6, 32 + transport, flag);
	}
	h->checksum = csum_apply(pkt->ip_checksum,
				 addr_diff(pkt, side == SOURCE ? &pkt->src : &pkt->dst, to));
	h->v4[SOURCE] = pkt->src.w[3];
	h->v4[DESTINATION] = pkt->dst.w[3];
	h->v4[side] = to->w[3];
	return bpf_skb_store_bytes(skb, pkt->l3 + 10, &h->checksum, 10 + transport, 0);
}

static __always_inline long rewrite_addr(struct __sk_buff *skb, struct scratch *s, enum side side,
					 const struct addr *to, __u64 flag)
{
	return rewrite_headers(skb, s, side, to, 0, flag);
}

/* A fragment of an SCTP packet: how long the packet is we can't know, and so we can't correct its
 * CRC for another port. */
static __always_inline bool port_is_fixed(const struct packet *pkt)
{
	return pkt->proto == IPPROTO_SCTP && pkt->first_fragment;
}

/* Do the ports stand right behind the addresses? */
static __always_inline bool ports_follow(const struct packet *pkt)
{
	return pkt->kind == KIND_PORTS && pkt->l4 == pkt->l3 + (is_ipv4(pkt) ? 20 : 40);
}

/* skb->ip_summed: what the kernel knows of the transport checksum (include/linux/skbuff.h). */
enum ip_summed {
	SUMMED_NONE = 0,
	SUMMED_UNNECESSARY,
	SUMMED_COMPLETE, /* skb->csum is the sum of the packet */
	SUMMED_PARTIAL, /* the field has the sum of the pseudo-header; the rest is added later */
};

extern void *bpf_cast_to_kern_ctx(void *ctx) __ksym __weak;

static __always_inline enum ip_summed ip_summed(struct __sk_buff *skb)
{
	const __u8 *kernel = bpf_cast_to_kern_ctx(skb);
	__u32 bit = ip_summed_bit;

	return kernel[bit / 8] >> (bit & 7) & 3;
}

/* Can the helpers be spared? In TCP and UDP right behind the IP header, with a checksum. */
static __always_inline bool rewrite_is_plain(const struct packet *pkt)
{
	return ports_follow(pkt) && !pkt->no_checksum &&
	       (pkt->proto == IPPROTO_TCP || pkt->proto == IPPROTO_UDP);
}

/* Translates one side of such a packet with one store in place of three helpers. Not with
 * SUMMED_COMPLETE: in IPv4 skb->csum would have to move. */
static __always_inline long rewrite_at_once(struct __sk_buff *skb, struct scratch *s,
					    enum side side, enum ip_summed summed)
{
	const struct packet *pkt = &s->packet;
	const struct endpoint *to = &s->to;
	bool tcp = pkt->proto == IPPROTO_TCP;
	__u64 diff = addr_diff(pkt, side == SOURCE ? &pkt->src : &pkt->dst, &to->addr);
	__be16 *ports = s->headers.transport, *sum = ports + (tcp ? 8 : 3);

	if (tcp ? load_header(skb, pkt->l4, ports, 18) : load_header(skb, pkt->l4, ports, 8))
		return -1;
	ports[side] = to->port;
	if (summed == SUMMED_PARTIAL)
		*sum = csum_fold(diff + *sum);
	else
		*sum = csum_apply(*sum, diff + word_diff(packet_port(pkt, side), to->port));
	if (!*sum && !tcp)
		*sum = 0xffff;
	return rewrite_headers(skb, s, side, &to->addr, tcp ? 18 : 8, 0);
}

/* Translates one side of the packet to s->to. */
static __always_inline long rewrite(struct __sk_buff *skb, struct scratch *s, enum side side)
{
	struct packet *pkt = &s->packet;
	struct endpoint *to = &s->to;
	__u32 sum = pkt->no_checksum ? 0 : checksum_offset(pkt);
	__u64 recompute = sum ? 0 : BPF_F_RECOMPUTE_CSUM;
	__be16 old_port = packet_port(pkt, side);
	struct addr *from = packet_addr(pkt, side);
	bool together = false;

	if (have_ip_summed && rewrite_is_plain(pkt)) {
		enum ip_summed summed = ip_summed(skb);

		if (summed != SUMMED_COMPLETE)
			return rewrite_at_once(skb, s, side, summed);
	}
	if (sum && has_pseudo_header(pkt) && !addr_equal(from, &to->addr)) {
		if (rewrite_pseudo_header(skb, pkt, pkt->l4 + sum, addr_diff(pkt, from, &to->addr)))
			return -1;
	}
	if (pkt->kind != KIND_BARE && to->port != old_port) {
		__u64 flags = 2 | (zero_checksum_is_special(pkt) ? BPF_F_MARK_MANGLED_0 : 0);

		if (sum && bpf_l4_csum_replace(skb, pkt->l4 + sum, old_port, to->port, flags))
			return -1;
		if (pkt->proto == IPPROTO_SCTP &&
		    crc32c_correct(skb, pkt->l4, pkt->end - pkt->l4,
				   ports_diff(pkt, side, to->port), BPF_F_RECOMPUTE_CSUM))
			return -1;
		together = sum && ports_follow(pkt);
		if (!together && bpf_skb_store_bytes(skb, pkt->l4 + port_offset(pkt, side),
						     &to->port, 2, recompute))
			return -1;
	}
	s->headers.transport[SOURCE] = pkt->sport;
	s->headers.transport[DESTINATION] = pkt->dport;
	s->headers.transport[side] = to->port;
	return rewrite_headers(skb, s, side, &to->addr, together ? 4 : 0, recompute);
}
