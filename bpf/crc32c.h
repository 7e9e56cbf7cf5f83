/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* SCTP's checksum, a CRC32c of the whole packet, corrected for a port without reading the packet.
 *
 * A CRC is linear: that of the new packet is that of the old one, xor that of the difference at
 * its place with zeros before and behind it, computed from 0. Zeros before it leave 0; a byte of
 * zeros behind it multiplies by x^8 modulo the polynomial, so n bytes are a multiplication by
 * x^(8n), done digit by digit of n. Decision 13.
 */
#pragma once

#include "packet.h"

/* Castagnoli's polynomial. Reflected, as all numbers here: bit 31 is the coefficient of x^0. */
#define CRC32C_POLYNOMIAL 0x82f63b78

/* Offset of the checksum in the SCTP header. */
#define SCTP_CRC 8

/* x^(8 * 16^i * j) modulo the polynomial: a row for each hexadecimal digit of a length. A test
 * computes them anew. */
static const __u32 crc32c_powers[4][16] = {
	{ 0x80000000, 0x00800000, 0x00008000, 0x00000080, 0x82f63b78, 0xfbc3faf9, 0x8b277743,
	  0x52a0c93f, 0x6ea2d55c, 0x1c08b7d6, 0xf56e0ef4, 0x34019664, 0xa66805eb, 0x7a1f6b24,
	  0xe75d06aa, 0xc94ec098 },
	{ 0x80000000, 0x18b8ea18, 0x510ac59a, 0xb2dea967, 0xb82be955, 0x36c41f1c, 0x19b29a35,
	  0xc9e90b9e, 0xb8fdb1e7, 0xe55ef1f3, 0x1fe0b5c3, 0xe0553f1e, 0x18e4a304, 0x2b830011,
	  0x56993a31, 0x0246e2e6 },
	{ 0x80000000, 0x88e56f72, 0x74c360a4, 0x631bb273, 0xe4172b16, 0x71892b1b, 0x835305c9,
	  0x196b1eae, 0x0d65762a, 0xafc81338, 0xb5a50ab7, 0xf373c3ac, 0x5f60970f, 0xd46d3063,
	  0x3a5275ea, 0x02331c01 },
	{ 0x80000000, 0x35d73a62, 0x28461564, 0x43eefc9f, 0xbf455269, 0x5edcdeb9, 0x65059450,
	  0x4e6f41a4, 0xe2ea32dc, 0xf5b95b32, 0x695a4c87, 0xf204502c, 0x9a4f01b6, 0x941a0916,
	  0x4303cb97, 0x4c3d3d65 },
};

static __always_inline __u32 crc32c_multiply(__u32 a, __u32 b)
{
	__u32 product = 0;

	for (int i = 0; i < 32; i++) {
		product ^= b & -(a >> 31);
		a <<= 1;
		b = b >> 1 ^ (CRC32C_POLYNOMIAL & -(b & 1));
	}
	return product;
}

/* Corrects the CRC of an SCTP header at offset l4, of a packet of n bytes, whose ports, taken
 * together as they stand in memory, change by diff. 0, or -1 if it can't be written.
 *
 * A field of 0 is not filled yet: the device computes the CRC, also of the segments of a GSO
 * packet (CHECKSUM_PARTIAL, which not every kernel lets us read). One packet in 2^32 has that CRC
 * and is lost; SCTP repeats it.
 *
 * flags of bpf_skb_store_bytes: BPF_F_RECOMPUTE_CSUM unless another sum in the packet makes up
 * for the change. A global function, so the verifier checks it once. */
__noinline int crc32c_correct(struct __sk_buff *skb, __u32 l4, __u32 n, __u32 diff, __u32 flags)
{
	__u32 crc;

	if (bpf_skb_load_bytes(skb, l4 + SCTP_CRC, &crc, sizeof(crc)))
		return -1;
	if (!crc)
		return 0;
	for (int i = 0; i < 4; i++)
		diff = crc32c_multiply(crc32c_powers[i][n >> i * 4 & 15], diff);
	crc ^= diff;
	return bpf_skb_store_bytes(skb, l4 + SCTP_CRC, &crc, sizeof(crc), flags);
}
