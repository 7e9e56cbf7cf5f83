package datapath

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/lab/packet"
	"bauta.dev/bauta/internal/policy"
)

var errStopped = errors.New("stopped by the test")

// prefixes are n networks of eight addresses of the same /16.
func prefixes(second, n int) []policy.Rule {
	rules := make([]policy.Rule, n)
	for i := range rules {
		a := netip.AddrFrom4([4]byte{172, byte(second), byte(i * 8 >> 8), byte(i * 8)})
		rules[i].Prefix = netip.PrefixFrom(a, 29)
	}
	return rules
}

// judge counts what happens to a packet towards each of some prefixes.
func (b *bench) judge(rules []policy.Rule) map[policy.Outcome]int {
	b.t.Helper()
	seen := make(map[policy.Outcome]int)
	progs := b.programs()
	err := b.ns.Do(func() error {
		for i := 0; i < len(rules); i += 37 {
			p := tcpFlow(0)
			p.Proto, p.Dst = packet.UDP, rules[i].Prefix.Addr().Next()
			out, ok, err := progs.send(p)
			switch src, _ := netip.AddrFromSlice(out[26:30]); {
			case err != nil:
				return err
			case !ok:
				seen[policy.DropNoPort]++
			case src == p.Src:
				seen[policy.PassNonMasq]++
			default:
				seen[policy.MasqNew]++
			}
		}
		return nil
	})
	if err != nil {
		b.t.Fatal(err)
	}
	b.forgetFlows()
	return seen
}

// An update of 1000 prefixes is stopped at each step, as by a crash. Whatever
// packet comes at whatever step meets the old list, entirely; the list that the
// next, complete update brings is the new one, entirely.
func TestApplyStoppedHalfWay(t *testing.T) {
	t.Parallel()
	b := newBench(t, labtest.NewNS(t), Options{})
	lists := [2][]policy.Rule{prefixes(16, 1000), prefixes(17, 1000)}
	in := loopPolicy(ports(40000, 1000))
	in.NonMasq = lists[0]
	b.apply(in)
	force := 0 // the list in force
	check := func(when string) {
		t.Helper()
		old, other := b.judge(lists[force]), b.judge(lists[1-force])
		if len(old) != 1 || len(other) != 1 || old[policy.PassNonMasq] != 28 || other[policy.MasqNew] != 28 {
			t.Errorf("%s: a mixture: %v of the list in force, %v of the other one", when, old, other)
		}
		b.inspect(func(in *Inspector) error {
			got, err := in.Exclusions()
			if len(got) != 1000 || got[0] != lists[force][0].Prefix {
				t.Errorf("%s: a reader sees %d prefixes", when, len(got))
			}
			return err
		})
	}
	check("first")
	steps := b.steps(in)
	if len(steps) < 6 {
		t.Fatalf("only the steps %v", steps)
	}
	for _, stop := range append(steps, "") {
		in.NonMasq = lists[1-force]
		b.interrupt = func(step string) error {
			check("at " + step)
			if step == stop {
				return errStopped
			}
			return nil
		}
		if err := b.tryApply(in); stop != "" && !errors.Is(err, errStopped) {
			t.Fatalf("stopped at %s: %v", stop, err)
		}
		b.interrupt = nil
		if stop != "" {
			check("stopped at " + stop)
			b.apply(in)
		}
		force = 1 - force
		check("after " + stop)
	}
	// The same with a crash: another agent takes over what the stopped one left.
	in.NonMasq = lists[1-force]
	b.interrupt = func(step string) error {
		if step == "flip" {
			return errStopped
		}
		return nil
	}
	if err := b.tryApply(in); !errors.Is(err, errStopped) {
		t.Fatal(err)
	}
	b.close()
	b.open()
	check("taken over")
	b.apply(in)
	force = 1 - force
	check("taken over and applied")
}

// steps lists the steps of an update of all tables.
func (b *bench) steps(in policy.Input) (steps []string) {
	b.t.Helper()
	b.interrupt = func(step string) error {
		steps = append(steps, step)
		return nil
	}
	changed := in
	changed.Sources = append(changed.Sources[:2:2], policy.Rule{Prefix: netip.MustParsePrefix("192.168.0.0/16")})
	b.apply(changed)
	b.apply(in)
	b.interrupt = nil
	return steps[:len(steps)/2]
}

// Policies follow each other as fast as they can be written while packets are
// under way. One passes the packet because of its destination, the other because
// of its source; a mixture of their tables would masquerade it.
func TestApplyUnderTraffic(t *testing.T) {
	t.Parallel()
	b := newBench(t, labtest.NewNS(t), Options{})
	byDestination, bySource := loopPolicy(ports(40000, 1000)), loopPolicy(ports(40000, 1000))
	byDestination.NonMasq = []policy.Rule{{Prefix: netip.MustParsePrefix("198.51.100.0/24")}}
	bySource.Sources = []policy.Rule{{Prefix: netip.MustParsePrefix("172.16.0.0/12")}}
	b.apply(byDestination)
	progs := b.programs()
	var done atomic.Bool
	parallel(t, b, 3, func(thread int) error {
		if thread == 0 {
			defer done.Store(true)
			for i := range 30 {
				p, err := policy.Build([]policy.Input{bySource, byDestination}[i%2])
				if err != nil {
					return err
				}
				if err := b.Apply(context.Background(), p); err != nil {
					return err
				}
			}
			return nil
		}
		for i := 0; !done.Load(); i++ {
			p := tcpFlow(i)
			if out, ok, err := progs.send(p); err != nil || !ok || [4]byte(out[26:30]) != p.Src.As4() {
				return fmt.Errorf("packet %d: %v, left %t: % x", i, err, ok, out)
			}
		}
		return nil
	})
	if b.count(policy.PassNonMasq) == 0 || b.count(policy.PassSource) == 0 || b.count(policy.MasqNew) != 0 {
		t.Errorf("%d by destination, %d by source, %d masqueraded",
			b.count(policy.PassNonMasq), b.count(policy.PassSource), b.count(policy.MasqNew))
	}
}

// The largest lists of the contract, both families.
func TestApplyLargestLists(t *testing.T) {
	t.Parallel()
	b := newBench(t, labtest.NewNS(t), Options{})
	in := loopPolicy(ports(40000, 10))
	for i := range 65536 {
		in.NonMasq = append(in.NonMasq,
			policy.Rule{Prefix: netip.PrefixFrom(netip.AddrFrom4([4]byte{100, byte(i >> 8), byte(i), 0}), 24)},
			policy.Rule{Prefix: netip.PrefixFrom(netip.AddrFrom16([16]byte{0x20, 0x01, 0x0d, 0xb8, byte(i >> 8), byte(i)}), 48)})
	}
	p, err := policy.Build(in)
	if err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	if err := b.ns.Do(func() error { return b.Apply(context.Background(), p) }); err != nil {
		t.Fatal(err)
	}
	t.Logf("applied within %v", time.Since(start))
	b.inspect(func(in *Inspector) error {
		got, err := in.Exclusions()
		if len(got) != 2*65536 {
			t.Errorf("%d prefixes", len(got))
		}
		return err
	})
}
