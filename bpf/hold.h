/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* A later fragment that arrives before its first has no ports, so nobody knows yet whose it is. If
 * it is for an address of the node, and so may be a pod's, it is held: copied, and taken out of the
 * way. When the first has got its verdict, whatever that is, the held ones arrive once more, and
 * find its note. If it does not come they are gone after HELD_SECONDS, as their datagram is. What
 * can't be held is left to the node.
 *
 * A datagram's fragments are held in a window of places that begins where its hash says. A place is
 * claimed and taken under its lock; between those steps it belongs to one CPU. First and later
 * fragment may be at work on two CPUs: the first writes its note and then looks into the places,
 * the later one fills a place and then looks for the note; so at least one sees the other.
 */
#pragma once

#include "count.h"
#include "decide.h"
#include "fragment.h"

static __always_inline bool datagram_equal(const struct datagram *a, const struct datagram *b)
{
	return a->id == b->id && a->proto == b->proto && a->ingress == b->ingress &&
	       addr_equal(&a->src, &b->src) && addr_equal(&a->dst, &b->dst);
}

/* The place where the window of a datagram begins. */
static __always_inline __u32 hold_home(const struct datagram *d)
{
	__u32 h = d->id ^ d->src.w[3] ^ d->src.w[1] ^ d->dst.w[3] * 0x85ebca6b;

	h = (h ^ h >> 16) * 0x9e3779b1; /* in memory order, an ID that counts moves the high bits */
	return h ^ h >> 15;
}

static __always_inline struct held *hold_place(__u32 n)
{
	__u32 slot = n & (HELD_ENTRIES - 1);

	return bpf_map_lookup_elem(&held, &slot);
}

static __always_inline bool hold_stale(const struct held *h, __u32 now)
{
	return (__s32)(now - h->since) > HELD_SECONDS;
}

/* Calls for a datagram's first fragment, so that it need not look in vain. */
static __always_inline void hold_call(__u32 home, __u32 now)
{
	struct held *h = hold_place(home);

	if (!h)
		return;
	bpf_spin_lock(&h->lock);
	h->called = now;
	bpf_spin_unlock(&h->lock);
}

static __always_inline bool hold_called(__u32 home, __u32 now)
{
	struct held *h = hold_place(home);
	__u32 called;

	if (!h)
		return false;
	bpf_spin_lock(&h->lock);
	called = h->called;
	bpf_spin_unlock(&h->lock);
	return called && (__s32)(now - called) <= HELD_SECONDS;
}

/* Claims a place for a fragment; a fragment that was held there for too long is lost now. */
static __always_inline bool hold_claim(struct held *h, const struct datagram *d, __u32 now)
{
	__u32 lost = 0;
	__u8 family = addr_is_v4_mapped(&h->datagram.dst) ? FAMILY_IPV4 : FAMILY_IPV6;
	bool ours;

	if (h->since && !hold_stale(h, now))
		return false;
	bpf_spin_lock(&h->lock);
	ours = !h->since || hold_stale(h, now);
	if (ours) {
		lost = h->bytes;
		h->since = now;
		h->bytes = 0;
		h->datagram = *d;
	}
	bpf_spin_unlock(&h->lock);
	if (lost)
		count(family, INGRESS, OUT_DROP_FRAGMENT, 1, lost);
	return ours;
}

/* Takes a held fragment of d out of its place, which stays claimed: its size, or 0. */
static __always_inline __u32 hold_take(struct held *h, const struct datagram *d, __u32 now)
{
	__u32 bytes = 0;

	bpf_spin_lock(&h->lock);
	if (h->since && !hold_stale(h, now) && datagram_equal(&h->datagram, d)) {
		bytes = h->bytes;
		h->bytes = 0;
		h->since = now; /* nobody may think it stale while we read */
	}
	bpf_spin_unlock(&h->lock);
	return bytes;
}

static __always_inline void hold_fill(struct held *h, __u32 bytes)
{
	bpf_spin_lock(&h->lock);
	h->bytes = bytes;
	bpf_spin_unlock(&h->lock);
}

static __always_inline void hold_free(struct held *h)
{
	bpf_spin_lock(&h->lock);
	h->since = 0;
	h->bytes = 0;
	bpf_spin_unlock(&h->lock);
}

/* A size between 1 and HELD_BYTES, in a form in which every verifier sees it: 5.10 learns nothing
 * from a comparison with zero. */
static __always_inline __u32 hold_size(__u32 bytes)
{
	bytes = (bytes - 1) & (HELD_BYTES - 1);
	barrier_var(bytes);
	return bytes + 1;
}

/* Copies the IP packet, of this size, out of skb. */
static __always_inline long hold_load(struct __sk_buff *skb, __u32 l3, void *data, __u32 bytes)
{
	return bpf_skb_load_bytes(skb, l3, data, hold_size(bytes));
}

/* Makes skb another packet of the same link: the IP header and what follows are replaced. What
 * stands behind it is cut off, unless asked not to; there it is padding (RFC 894). */
static __always_inline long hold_store(struct __sk_buff *skb, __u32 l3, const void *data,
				       __u32 bytes, bool cut)
{
	bytes = hold_size(bytes);
	if (cut && bpf_skb_change_tail(skb, l3 + bytes, 0))
		return -1;
	return bpf_skb_store_bytes(skb, l3, data, bytes, BPF_F_RECOMPUTE_CSUM);
}

/* Global functions: see claim_try(). Kernel 5.10 takes 600,000 instructions to check the loops with
 * these steps in them. */

/* Claims place n for the later fragment of scratch.packet; 1: done. */
__noinline int hold_claim_at(__u32 n)
{
	__u32 zero = 0;
	struct scratch *s = bpf_map_lookup_elem(&scratch, &zero);
	struct held *h = hold_place(n);

	return s && h && hold_claim(h, &s->datagram, now_seconds());
}

/* Lets the fragment of scratch.datagram in place n arrive again, if there is one; skb carries it. */
__noinline int hold_release_at(struct __sk_buff *skb, __u32 n, __u32 cut)
{
	__u32 zero = 0, bytes;
	struct scratch *s = bpf_map_lookup_elem(&scratch, &zero);
	struct held *h = hold_place(n);

	if (!s || !h)
		return 0;
	bytes = hold_take(h, &s->datagram, now_seconds());
	if (!bytes)
		return 0;
	if (hold_store(skb, s->packet.l3, h->data, bytes, cut) ||
	    bpf_clone_redirect(skb, skb->ifindex, BPF_F_INGRESS))
		count(s->packet.family, INGRESS, OUT_DROP_FRAGMENT, 1, bytes);
	hold_free(h);
	return 0;
}

/* Holds the later fragment in skb, described in scratch.packet and scratch.datagram: an outcome. */
__noinline int hold_fragment(struct __sk_buff *skb)
{
	__u32 zero = 0, i = 0, home, bytes;
	struct scratch *s = bpf_map_lookup_elem(&scratch, &zero);
	struct fragment *note;
	struct held *h;

	if (!s)
		return OUT_PASS_FRAGMENT;
	bytes = s->packet.end - s->packet.l3;
	if (s->packet.end <= s->packet.l4 || s->packet.end > skb->len || bytes > HELD_BYTES)
		return OUT_PASS_FRAGMENT;
	home = hold_home(&s->datagram);
	hold_call(home, now_seconds());
	while (i < HELD_WINDOW && !hold_claim_at(home + i))
		i++;
	h = i < HELD_WINDOW ? hold_place(home + i) : NULL;
	if (!h)
		return OUT_PASS_FRAGMENT;
	if (hold_load(skb, s->packet.l3, h->data, bytes)) {
		hold_free(h);
		return OUT_PASS_FRAGMENT;
	}
	hold_fill(h, bytes);
	note = bpf_map_lookup_elem(&fragments, &s->datagram);
	if (!note || (__s32)(now_seconds() - note->seen) > FRAGMENT_SECONDS ||
	    !hold_take(h, &s->datagram, now_seconds()))
		return OUT_HOLD_FRAGMENT;
	hold_free(h);
	return OUT_CONTINUE; /* the first came meanwhile */
}

/* Lets the held fragments of scratch.datagram arrive again behind the first one, which is in skb
 * with its verdict and lends its packet to them; it is itself again in the end. */
__noinline int hold_release(struct __sk_buff *skb)
{
	__u32 zero = 0, home, cut;
	struct scratch *s = bpf_map_lookup_elem(&scratch, &zero);
	struct carried *c = bpf_map_lookup_elem(&carried, &zero);

	if (!s || !c)
		return 0;
	c->bytes = s->packet.end - s->packet.l3;
	cut = c->bytes <= HELD_BYTES;
	if (!cut)
		c->bytes = HELD_BYTES; /* no held one is longer: the rest is never written over */
	if (s->packet.end <= s->packet.l4 || s->packet.end > skb->len ||
	    hold_load(skb, s->packet.l3, c->data, c->bytes))
		return 0; /* nobody will want this first one */
	home = hold_home(&s->datagram);
	for (__u32 i = 0; i < HELD_WINDOW; i++)
		hold_release_at(skb, home + i, cut);
	return hold_store(skb, s->packet.l3, c->data, c->bytes, cut);
}

/* A later fragment without a note. */
static __always_inline enum outcome hold_later(struct __sk_buff *skb, struct scratch *s)
{
	__u32 generation = 0;
	enum outcome out;

	if (!policy_settings(&generation) ||
	    policy_lookup(generation, TRIE_SOURCE, &s->packet.dst).outcome != OUT_PASS_HOST)
		return OUT_PASS_NO_MAPPING; /* an address that nobody is masqueraded with */
	fragment_key(&s->datagram, &s->packet, INGRESS);
	out = hold_fragment(skb);
	return out ?: fragment_follow(skb, s, INGRESS) ?: OUT_PASS_FRAGMENT;
}

/* After the first fragment's verdict: leaves a note, and sends on what waited for it. */
static __always_inline enum outcome hold_first(struct __sk_buff *skb, struct scratch *s,
					       enum outcome out)
{
	bool translated = out >= FIRST_MASQ && out < FIRST_HOLD;

	fragment_note(s, INGRESS, &s->to.addr, translated ? OUT_MASQ_FRAGMENT : out);
	if (!hold_called(hold_home(&s->datagram), now_seconds()))
		return out;
	return hold_release(skb) ? OUT_DROP_REWRITE : out;
}
