/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* ICMP errors: the packet they quote is what belongs to a flow, and it has to be rewritten too.
 *
 * A quote may be cut behind the first 8 bytes of its transport header (RFC 792), so every field
 * is changed only if it is there. All changes lie inside the outer ICMP checksum's coverage: one
 * summed difference corrects it. A wrong one stays wrong, and the host that gets it drops it: we
 * do not read the whole message to verify it first (RFC 5508 REQ-3). Transport checksums in the
 * quote are not to be verified (REQ-3 c).
 *
 * All types of errors are translated alike. That includes source quench, which hosts ignore
 * (RFC 6633), and types that ICMPv6 may get yet (RFC 4443 section 2.4 b).
 */
#pragma once

#include "parse.h"
#include "rewrite.h"

#define ICMP_HEADER 8

/* Is the checksum of the quoted IPv4 header right? Otherwise its addresses may not be those that were
 * sent (RFC 5508 REQ-3 a). Global: the verifier checks it once. */
__noinline int quote_intact(struct __sk_buff *skb, __u32 offset)
{
	__u32 zero = 0, size;
	struct scratch *s = bpf_map_lookup_elem(&scratch, &zero);
	__u8 version_ihl;

	if (!s || bpf_skb_load_bytes(skb, offset, &version_ihl, 1))
		return 0;
	size = (version_ihl & 0x0f) * 4;
	if (size < sizeof(struct ipv4_header) || bpf_skb_load_bytes(skb, offset, s->header, size))
		return 0;
	return csum_fold(bpf_csum_diff(NULL, 0, (__be32 *)s->header, size, 0)) == 0xffff;
}

/* Reads the quoted packet. A quoted later fragment has no ports, so it names no flow. */
static __noinline bool quote_parse(struct __sk_buff *skb, const struct packet *pkt,
				   struct packet *quote)
{
	*quote = (struct packet){ .family = pkt->family, .l3 = pkt->l4 + ICMP_HEADER };
	if (parse_ip(skb, quote, true) || quote->defect)
		return false;
	if (is_ipv4(quote) && !quote_intact(skb, quote->l3))
		return false;
	return quote->kind == KIND_PORTS || quote->kind == KIND_QUERY ||
	       quote->kind == KIND_REPLY || quote->kind == KIND_BARE;
}

/* An error is for whoever sent the packet that it quotes: to others it belongs to no flow. */
static __always_inline bool quote_is_answered(const struct scratch *s)
{
	return addr_equal(&s->packet.dst, &s->quote.src);
}

/* Changes a checksum inside the quote by diff; adds what that does to the outer checksum. */
static __always_inline long quote_fix_checksum(struct __sk_buff *skb, __u32 offset, __u64 diff,
					       bool mangle_zero, __u64 *total)
{
	__be16 old, new;

	if (bpf_skb_load_bytes(skb, offset, &old, 2))
		return -1;
	if (mangle_zero && !old)
		return 0;
	new = csum_apply(old, diff);
	if (mangle_zero && !new)
		new = 0xffff;
	*total += word_diff(old, new);
	return bpf_skb_store_bytes(skb, offset, &new, 2, 0);
}

/* The same for SCTP's CRC, so that the host inside sees in the quote what it sent. A fragment does
 * not tell how much the CRC covers; it has its own port, though. */
static __always_inline long quote_fix_crc(struct __sk_buff *skb, const struct packet *quote,
					  __u32 diff, __u64 *total)
{
	__u32 at = quote->l4 + SCTP_CRC, old, new;

	if (quote->first_fragment)
		return 0;
	if (bpf_skb_load_bytes(skb, at, &old, sizeof(old)) ||
	    crc32c_correct(skb, quote->l4, quote->end - quote->l4, diff, 0) ||
	    bpf_skb_load_bytes(skb, at, &new, sizeof(new)))
		return -1;
	*total += (__u64)(__u32)~old + new;
	return 0;
}

/* Does the message, by its IP header and in the data, go up to an offset? */
static __always_inline bool quote_reaches(struct __sk_buff *skb, const struct packet *pkt,
					  __u32 end)
{
	return end <= pkt->end && end <= skb->len;
}

/* Translates one side of the quoted packet, and the outer ICMP checksum with it. */
static __noinline long quote_rewrite(struct __sk_buff *skb, const struct packet *pkt,
				     struct packet *quote, enum side side, struct endpoint *to)
{
	struct addr *from = packet_addr(quote, side);
	__be16 old_port = packet_port(quote, side);
	__u64 addr = addr_diff(quote, from, &to->addr);
	__u64 total = addr, inner = has_pseudo_header(quote) ? addr : 0;
	__u32 sum = checksum_offset(quote);

	if (quote->kind != KIND_BARE) {
		inner += word_diff(old_port, to->port);
		total += word_diff(old_port, to->port);
		if (bpf_skb_store_bytes(skb, quote->l4 + port_offset(quote, side), &to->port, 2, 0))
			return -1;
		if (sum && quote_reaches(skb, pkt, quote->l4 + sum + 2) &&
		    quote_fix_checksum(skb, quote->l4 + sum, inner, zero_checksum_is_special(quote),
				       &total))
			return -1;
		if (quote->proto == IPPROTO_SCTP && old_port != to->port &&
		    quote_reaches(skb, pkt, quote->l4 + SCTP_CRC + 4) &&
		    quote_fix_crc(skb, quote, ports_diff(quote, side, to->port), &total))
			return -1;
	}
	if (is_ipv4(quote)) {
		if (quote_fix_checksum(skb, quote->l3 + 10, addr, false, &total) ||
		    bpf_skb_store_bytes(skb, quote->l3 + (side == SOURCE ? 12 : 16), &to->addr.w[3],
					4, 0))
			return -1;
	} else if (bpf_skb_store_bytes(skb, quote->l3 + (side == SOURCE ? 8 : 24), &to->addr, 16,
				       0)) {
		return -1;
	}
	return bpf_l4_csum_replace(skb, pkt->l4 + 2, 0, csum_fold(total), 0);
}
