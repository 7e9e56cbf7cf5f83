package datapath

import (
	"net/netip"
	"slices"
	"testing"

	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/lab/packet"
	"bauta.dev/bauta/internal/policy"
)

// Another agent knows what was excluded before it, and what an earlier one removed.
func TestRemovalsSurviveRestart(t *testing.T) {
	t.Parallel()
	b := newBench(t, labtest.NewNS(t), Options{})
	p := tcpFlow(0)
	p.Proto = packet.UDP
	host := netip.PrefixFrom(p.Dst, 32)
	other := netip.MustParsePrefix("203.0.113.0/24")
	in := loopPolicy(ports(40000, 10))
	excluding := func(prefixes ...netip.Prefix) policy.Input {
		out := in
		out.NonMasq = nil
		for _, q := range prefixes {
			out.NonMasq = append(out.NonMasq, policy.Rule{Prefix: q})
		}
		return out
	}
	check := func(when string, want ...netip.Prefix) {
		t.Helper()
		var got []netip.Prefix
		if b.applied != nil {
			for _, r := range b.applied.removed {
				got = append(got, r.prefix)
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: removed %v, want %v", when, got, want)
		}
		err := b.ns.Do(func() error { _, _, err := run(b.programs().ingress, p.Reply()); return err })
		if err != nil {
			t.Fatal(err)
		}
		entries := 0
		for _, err := range b.sweeper.tables[0].allInbound() {
			if err != nil {
				t.Fatal(err)
			}
			entries++
		}
		if entries != 0 {
			t.Errorf("%s: an answer opened a connection", when)
		}
	}
	b.apply(excluding(host, other))
	check("excluded")
	restart := func() {
		b.close()
		b.open()
	}
	restart()
	b.apply(excluding(other))
	check("removed while the agent was down", host)
	until := b.applied.removed[0].until
	for range 2 {
		b.apply(excluding(other))
		restart()
		check("before the first Apply")
	}
	b.apply(excluding())
	check("removed by the agent before", host, other)
	if now := b.applied.removed[0].until; now != until {
		t.Errorf("until %d, was %d: restarts prolong it", now, until)
	}
	b.apply(excluding(host))
	check("excluded again", other)
}

// More removals than a table holds: the earliest are forgotten, and the policy gets
// into the kernel.
func TestRemovalsOverflow(t *testing.T) {
	t.Parallel()
	b := newBench(t, labtest.NewNS(t), Options{})
	b.trie = b.trie.Copy()
	b.trie.MaxEntries = 64
	in := loopPolicy(ports(40000, 10))
	for i := range 4 {
		in.NonMasq = prefixes(16+i, 30)
		b.apply(in)
	}
	if n := len(b.applied.removed); n != 63 {
		t.Errorf("%d removals", n)
	}
	if last := b.applied.removed[62].prefix; last != prefixes(18, 30)[29].Prefix {
		t.Errorf("the latest one is %v", last)
	}
	rows, entries := 0, b.applied.tries[trieRemoved].Iterate() // 5.10 has no batches of tries
	for entries.Next(new(masqPrefix), new(masqRule)) {
		rows++
	}
	if err := entries.Err(); err != nil || rows != 64 {
		t.Errorf("%d rows: %v", rows, err)
	}
}
