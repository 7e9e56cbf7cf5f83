/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What the stages know of a packet. Addresses are 16 bytes in both families, IPv4 ones
 * v4-mapped (::ffff:a.b.c.d), so that a family matters only where headers are read or written.
 */
#pragma once

#include "outcome.h"

struct addr {
	__be32 w[4];
};

/* One side of a flow. */
struct endpoint {
	struct addr addr;
	__be16 port; /* or ICMP identifier; 0 where a protocol has none */
	__u16 pad;
};

enum family { FAMILY_IPV4 = 0, FAMILY_IPV6 = 1 };

/* What the transport header gives for a flow's key. */
enum kind {
	KIND_BARE = 0, /* no ports: addresses and protocol only */
	KIND_PORTS, /* TCP, UDP, UDP-Lite, SCTP */
	KIND_QUERY, /* ICMP echo or timestamp request: identifier as source port */
	KIND_REPLY, /* its answer: identifier as destination port */
	KIND_ERROR, /* ICMP error: the flow is the quoted packet's */
	KIND_CONTROL, /* any other ICMP */
	KIND_LATER, /* fragment without a transport header */
};

struct packet {
	struct addr src, dst;
	__be16 sport, dport;
	__u8 family; /* enum family */
	__u8 proto; /* IP protocol number of the transport header */
	__u8 kind; /* enum kind */
	__u8 defect; /* enum outcome: why the transport header is unusable, matters in line 10 only */
	__u8 tcp_flags;
	__u8 icmp_type;
	__u8 first_fragment; /* more fragments follow */
	__u8 unkeyed; /* an ICMP error whose quote names no flow */
	__be32 fragment_id;
	__be16 ip_checksum; /* IPv4 */
	__u8 chunk; /* SCTP: type of the first one */
	__u8 no_checksum; /* UDP: the field is zero */
	__u32 l3, l4; /* offsets of the headers from the start of the data */
	__u32 end; /* offset behind the packet, by the IP header */
	__u32 segments, bytes; /* what counters add: GSO segments, bytes from the IP header on */
};

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

/* Types of SCTP chunks (RFC 9260 section 3.2). */
#define SCTP_INIT 1
#define SCTP_INIT_ACK 2
#define SCTP_ABORT 6
#define SCTP_SHUTDOWN 7
#define SCTP_SHUTDOWN_ACK 8
#define SCTP_SHUTDOWN_COMPLETE 14

#ifndef IPPROTO_UDPLITE
#define IPPROTO_UDPLITE 136
#endif
#define PROTO_ICMPV6 58

static __always_inline void addr_from_ipv4(struct addr *a, __be32 v4)
{
	a->w[0] = 0;
	a->w[1] = 0;
	a->w[2] = bpf_htonl(0xffff);
	a->w[3] = v4;
}

static __always_inline bool addr_equal(const struct addr *a, const struct addr *b)
{
	return a->w[3] == b->w[3] && a->w[2] == b->w[2] && a->w[1] == b->w[1] && a->w[0] == b->w[0];
}

static __always_inline bool addr_is_zero(const struct addr *a)
{
	return !(a->w[0] | a->w[1] | a->w[2] | a->w[3]);
}

static __always_inline bool addr_is_v4_mapped(const struct addr *a)
{
	return !(a->w[0] | a->w[1]) && a->w[2] == bpf_htonl(0xffff);
}

static __always_inline bool is_multicast(const struct addr *a)
{
	if (addr_is_v4_mapped(a))
		return (a->w[3] & bpf_htonl(0xf0000000)) == bpf_htonl(0xe0000000);
	return (a->w[0] & bpf_htonl(0xff000000)) == bpf_htonl(0xff000000);
}

static __always_inline bool endpoint_is(const struct endpoint *e, const struct addr *addr,
					__be16 port)
{
	return e->port == port && addr_equal(&e->addr, addr);
}

static __always_inline bool is_ipv4(const struct packet *pkt)
{
	return pkt->family == FAMILY_IPV4;
}

/* A redirect tells a host about its own next hop: never of use behind a translation. In IPv6 it is
 * neighbor discovery. */
static __always_inline bool is_redirect(const struct packet *pkt)
{
	return is_ipv4(pkt) && pkt->kind == KIND_ERROR && pkt->icmp_type == 5;
}

/* A packet that can only be the first of a connection. */
static __always_inline bool is_opening(const struct packet *pkt)
{
	if (pkt->proto == IPPROTO_TCP)
		return (pkt->tcp_flags & (TCP_SYN | TCP_ACK | TCP_RST | TCP_FIN)) == TCP_SYN;
	if (pkt->proto == IPPROTO_SCTP)
		return pkt->chunk == SCTP_INIT;
	return pkt->kind == KIND_QUERY;
}

/* A packet that only makes sense in a connection that exists. */
static __always_inline bool is_stray(const struct packet *pkt)
{
	if (pkt->proto == IPPROTO_TCP)
		return (pkt->tcp_flags & (TCP_RST | TCP_FIN)) ||
		       (pkt->tcp_flags & (TCP_SYN | TCP_ACK)) == (TCP_SYN | TCP_ACK);
	if (pkt->proto == IPPROTO_SCTP) /* the same: the end of an association, or an answer */
		return pkt->chunk == SCTP_INIT_ACK || pkt->chunk == SCTP_ABORT ||
		       pkt->chunk == SCTP_SHUTDOWN || pkt->chunk == SCTP_SHUTDOWN_ACK ||
		       pkt->chunk == SCTP_SHUTDOWN_COMPLETE;
	return pkt->kind == KIND_REPLY || pkt->kind == KIND_ERROR;
}
