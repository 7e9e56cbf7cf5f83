/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* From bytes to struct packet: Ethernet, VLAN tags, IPv4 and IPv6 with extension headers, and
 * as much of the transport header as a flow's key needs.
 *
 * Headers are copied: from the linear data if they are there, which costs nothing, else with the
 * helper, which also reads paged data. Nothing is read in place, so there is one path behind.
 * An outcome is returned when the addresses are unreadable. A broken transport header is only
 * noted in pkt->defect: it matters to packets that would be masqueraded, and to nobody else.
 */
#pragma once

#include "packet.h"

struct ipv4_header {
	__u8 version_ihl;
	__u8 tos;
	__be16 length;
	__be16 id;
	__be16 fragment;
	__u8 ttl;
	__u8 proto;
	__be16 checksum;
	__be32 src, dst;
};

struct ipv6_header {
	__u8 version_class;
	__u8 flow_label[3];
	__be16 length;
	__u8 next;
	__u8 hop_limit;
	struct addr src, dst;
};

/* The first 14 bytes of TCP; the first 8 serve UDP, UDP-Lite and ICMP. In SCTP the type of the
 * first chunk stands where TCP has the data offset. */
struct transport_header {
	union {
		struct {
			__be16 sport, dport;
		};
		struct {
			__u8 type, code;
			__be16 checksum;
		};
	};
	__be16 id; /* ICMP query */
	__be16 sequence;
	__u8 ack[4];
	__u8 chunk;
	__u8 flags;
} __attribute__((packed));

#define IPV4_FRAGMENT_OFFSET 0x1fff
#define IPV4_MORE_FRAGMENTS 0x2000

/* The ends of the linear data. By assembler, as 64-bit values: from C, clang 19 at -mcpu=v3 may
 * use one load for two comparisons and cut it to 32 bits; the verifier accepts that, and every
 * packet fails the comparison. */
#define SKB_POINTER(pointer, skb, field)                                                           \
	asm volatile("%0 = *(u32 *)(%1 + %2)"                                                      \
		     : "=r"(pointer)                                                               \
		     : "r"(skb), "i"(__builtin_offsetof(struct __sk_buff, field)))

/* Copies size bytes of a header at an offset from the start of the data. */
static __always_inline long load_header(struct __sk_buff *skb, __u32 offset, void *to, __u32 size)
{
	void *data, *end;

	SKB_POINTER(data, skb, data);
	SKB_POINTER(end, skb, data_end);
	data += offset & 0x3fff; /* for the verifier */
	if (offset > 0x3fff || data + size > end)
		return bpf_skb_load_bytes(skb, offset, to, size);
	/* Aligned to 4 for clang alone: it would copy byte by byte. */
	__builtin_memcpy(to, __builtin_assume_aligned(data, 4), size);
	return 0;
}

static __always_inline __u8 icmp_kind(const struct packet *pkt)
{
	__u8 t = pkt->icmp_type;

	if (is_ipv4(pkt)) {
		switch (t) {
		case 8: /* echo */
		case 13: /* timestamp */
			return KIND_QUERY;
		case 0:
		case 14:
			return KIND_REPLY;
		case 3: /* destination unreachable */
		case 4: /* source quench */
		case 5: /* redirect */
		case 11: /* time exceeded */
		case 12: /* parameter problem */
			return KIND_ERROR;
		}
		return KIND_CONTROL;
	}
	if (t < 128) /* errors have the high bit clear (RFC 4443 section 2.1) */
		return KIND_ERROR;
	return t == 128 ? KIND_QUERY : t == 129 ? KIND_REPLY : KIND_CONTROL;
}

static __always_inline bool is_icmp(const struct packet *pkt)
{
	return pkt->proto == (is_ipv4(pkt) ? IPPROTO_ICMP : PROTO_ICMPV6);
}

/* Reads ports, ICMP identifier and TCP flags. quoted: the header is inside an ICMP error, which
 * need not hold more than its first 8 bytes (RFC 792). */
static __always_inline void parse_transport(struct __sk_buff *skb, struct packet *pkt, bool quoted)
{
	struct transport_header h = {};
	__u32 need = 8;
	long err;

	if (pkt->kind == KIND_LATER)
		return;
	switch (pkt->proto) {
	case IPPROTO_TCP:
		need = 20;
		break;
	case IPPROTO_UDP:
	case IPPROTO_UDPLITE:
		break;
	case IPPROTO_SCTP:
		need = 16; /* the common header and the one of a chunk */
		break;
	default:
		if (!is_icmp(pkt)) {
			pkt->kind = KIND_BARE;
			return;
		}
	}
	if ((pkt->proto == IPPROTO_TCP || pkt->proto == IPPROTO_SCTP) && !quoted)
		err = load_header(skb, pkt->l4, &h, 14);
	else
		err = load_header(skb, pkt->l4, &h, 8);
	if (err || (!quoted && skb->len < pkt->l4 + need)) {
		/* A first fragment too short for its ports is the tiny-fragment attack (RFC 1858). */
		pkt->defect = pkt->first_fragment ? OUT_DROP_FRAGMENT : OUT_DROP_BAD_HEADER;
		return;
	}
	if (is_icmp(pkt)) {
		pkt->icmp_type = h.type;
		pkt->kind = icmp_kind(pkt);
		if (pkt->kind == KIND_QUERY)
			pkt->sport = h.id;
		else if (pkt->kind == KIND_REPLY)
			pkt->dport = h.id;
		return;
	}
	pkt->kind = KIND_PORTS;
	pkt->sport = h.sport;
	pkt->dport = h.dport;
	if (pkt->proto == IPPROTO_TCP)
		pkt->tcp_flags = h.flags;
	pkt->no_checksum = pkt->proto == IPPROTO_UDP &&
			   !h.sequence; /* where UDP has its checksum */
	pkt->chunk = h.chunk;
}

static __always_inline enum outcome parse_ipv4(struct __sk_buff *skb, struct packet *pkt)
{
	struct ipv4_header h;
	__u32 ihl;

	if (load_header(skb, pkt->l3, &h, sizeof(h)))
		return OUT_DROP_BAD_HEADER;
	ihl = (h.version_ihl & 0x0f) * 4;
	if (h.version_ihl >> 4 != 4 || ihl < sizeof(h))
		return OUT_DROP_BAD_HEADER;
	addr_from_ipv4(&pkt->src, h.src);
	addr_from_ipv4(&pkt->dst, h.dst);
	pkt->proto = h.proto;
	pkt->l4 = pkt->l3 + ihl;
	pkt->end = pkt->l3 + bpf_ntohs(h.length);
	pkt->fragment_id = h.id;
	pkt->ip_checksum = h.checksum;
	if (h.fragment & bpf_htons(IPV4_FRAGMENT_OFFSET)) {
		pkt->kind = KIND_LATER;
		pkt->defect = OUT_DROP_FRAGMENT;
	} else if (h.fragment & bpf_htons(IPV4_MORE_FRAGMENTS)) {
		pkt->first_fragment = 1;
	}
	return OUT_CONTINUE;
}

/* Walks the extension headers (RFC 8200 section 4) up to the transport header. */
static __always_inline void walk_extensions(struct __sk_buff *skb, struct packet *pkt)
{
	struct {
		__u8 next, length;
		__be16 fragment;
		__be32 id;
	} h;

	for (int i = 0; i <= MAX_EXTENSIONS; i++) {
		__u32 size;

		switch (pkt->proto) {
		case IPPROTO_HOPOPTS:
		case IPPROTO_ROUTING:
		case IPPROTO_DSTOPTS:
		case IPPROTO_FRAGMENT:
		case IPPROTO_AH:
			break;
		default:
			return;
		}
		if (i == MAX_EXTENSIONS || bpf_skb_load_bytes(skb, pkt->l4, &h, sizeof(h)))
			break;
		size = (h.length + 1) * 8;
		if (pkt->proto == IPPROTO_AH)
			size = (h.length + 2) * 4; /* RFC 4302 section 2.2 */
		if (pkt->proto == IPPROTO_FRAGMENT) {
			size = sizeof(h);
			pkt->fragment_id = h.id;
			if (h.fragment & bpf_htons(0xfff8)) {
				pkt->kind = KIND_LATER;
				pkt->defect = OUT_DROP_FRAGMENT;
			} else if (h.fragment & bpf_htons(1)) {
				pkt->first_fragment = 1;
			}
		}
		pkt->proto = h.next;
		pkt->l4 += size;
		if (pkt->kind == KIND_LATER)
			return; /* what follows is payload */
	}
	pkt->defect = OUT_DROP_EXTENSION;
}

static __always_inline enum outcome parse_ipv6(struct __sk_buff *skb, struct packet *pkt)
{
	struct ipv6_header h;

	if (load_header(skb, pkt->l3, &h, sizeof(h)) || h.version_class >> 4 != 6)
		return OUT_DROP_BAD_HEADER;
	/* Never on the wire (RFC 6890), and inside they would pass for IPv4 addresses. */
	if (addr_is_v4_mapped(&h.src) || addr_is_v4_mapped(&h.dst))
		return OUT_DROP_BAD_HEADER;
	pkt->src = h.src;
	pkt->dst = h.dst;
	pkt->proto = h.next;
	pkt->l4 = pkt->l3 + sizeof(h);
	pkt->end = pkt->l4 + bpf_ntohs(h.length);
	walk_extensions(skb, pkt);
	return OUT_CONTINUE;
}

/* Reads the IP packet of pkt->family at pkt->l3. */
static __always_inline enum outcome parse_ip(struct __sk_buff *skb, struct packet *pkt, bool quoted)
{
	enum outcome out = is_ipv4(pkt) ? parse_ipv4(skb, pkt) : parse_ipv6(skb, pkt);

	if (out)
		return out;
	if (!pkt->defect)
		parse_transport(skb, pkt, quoted);
	return OUT_CONTINUE;
}

/* Finds the IP header behind up to two VLAN tags that stand in the data; tags that the
 * kernel keeps in metadata are not there. link_header: bytes of the device's link header. */
static __always_inline enum outcome parse_packet(struct __sk_buff *skb, struct packet *pkt,
						 __u32 link_header)
{
	__be16 protocol = skb->protocol;

	pkt->l3 = link_header;
	for (int i = 0; i < 2 && link_header; i++) {
		if (protocol != bpf_htons(ETH_P_8021Q) && protocol != bpf_htons(ETH_P_8021AD))
			break;
		if (bpf_skb_load_bytes(skb, pkt->l3 + 2, &protocol, sizeof(protocol)))
			return OUT_DROP_BAD_HEADER;
		pkt->l3 += 4;
	}
	switch (protocol) {
	case bpf_htons(ETH_P_IP):
		pkt->family = FAMILY_IPV4;
		break;
	case bpf_htons(ETH_P_IPV6):
		pkt->family = FAMILY_IPV6;
		break;
	case bpf_htons(ETH_P_8021Q):
	case bpf_htons(ETH_P_8021AD):
		return OUT_DROP_BAD_HEADER; /* a third tag may hide anything */
	default:
		return OUT_PASS_NOT_IP;
	}
	pkt->segments = skb->gso_segs ?: 1;
	pkt->bytes = skb->len - pkt->l3;
	return parse_ip(skb, pkt, false);
}
