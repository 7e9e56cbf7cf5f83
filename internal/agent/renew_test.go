package agent

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"bauta.dev/bauta/internal/conntrack"
	"bauta.dev/bauta/internal/devices"
)

func tracked(proto uint8, src, dst string) conntrack.Flow {
	f := conntrack.Flow{Proto: proto, Src: netip.MustParseAddrPort(src), Dst: netip.MustParseAddrPort(dst)}
	f.Xlate, f.Remote = f.Src, f.Dst
	return f
}

// untranslated are connections of which the rules would have translated those that are named
// "leak".
func untranslated() []conntrack.Flow {
	leak := func(f conntrack.Flow) conntrack.Flow { f.Mark = 1; return f }
	shifted := tracked(17, "10.1.0.2:1001", "203.0.113.9:53")
	shifted.Xlate = netip.MustParseAddrPort("10.1.0.2:1024") // without a rule, to avoid a clash
	service := tracked(6, "10.1.0.2:1002", "10.96.0.1:443")
	service.Remote, service.DNAT = netip.MustParseAddrPort("203.0.113.10:6443"), true
	translated := tracked(6, "10.1.0.2:1003", "203.0.113.9:443")
	translated.Xlate, translated.SNAT = netip.MustParseAddrPort("192.0.2.1:1003"), true
	zone := tracked(6, "10.1.0.2:1004", "203.0.113.9:443")
	zone.Zone = 7
	return []conntrack.Flow{
		leak(tracked(6, "10.1.0.2:1000", "203.0.113.9:443")),
		leak(tracked(1, "10.1.0.2:77", "203.0.113.9:0")),
		leak(shifted), leak(service), translated, zone,
		leak(tracked(17, "10.1.0.2:1005", "203.0.113.99:53")), // no route: nobody knows
		tracked(6, "203.0.113.9:50000", "10.1.0.2:80"),        // opened from outside
		tracked(6, "192.0.2.1:1006", "203.0.113.9:443"),       // the node's
		tracked(6, "10.1.0.2:1007", "10.0.3.4:80"),            // excluded
		tracked(6, "10.1.0.2:1008", "203.0.113.20:80"),        // leaves by another device
		tracked(6, "10.1.0.2:1009", "203.0.113.9:80"),         // drains with the programs
	}
}

// renewals is a loop in iptables mode whose netfilter has connections that are not translated.
type renewals struct {
	*bench
	rules *fakeRules
	n     *netfilter
	ended []conntrack.Flow
	err   error
}

func newRenewals(t *testing.T) *renewals {
	b, r, n := newRuleBench(t, "enable-ip-masq-agent=true")
	write(t, b.list, goodList)
	x := &renewals{bench: b, rules: r, n: n}
	n.flows = func(_ context.Context, f conntrack.Filter) ([]conntrack.Flow, error) {
		list := slices.DeleteFunc(untranslated(), func(c conntrack.Flow) bool { return f.Translated || !within(f.Sources, c.Src.Addr()) })
		return list, x.err
	}
	n.end = func(_ context.Context, list []conntrack.Flow) (int, error) {
		x.set(func() { x.ended = append(x.ended, list...) })
		return len(list), nil
	}
	n.leave = func(list []netip.Addr) (map[netip.Addr]int, error) {
		by := make(map[netip.Addr]int)
		for _, a := range list {
			switch {
			case by[a] != 0:
				t.Errorf("%s is looked up twice", a)
			case a == netip.MustParseAddr("203.0.113.20"):
				by[a] = 9
			case a != netip.MustParseAddr("203.0.113.99"):
				by[a] = 2
			}
		}
		return by, nil
	}
	n.spare = func(context.Context) (map[flowKey]bool, error) {
		return map[flowKey]bool{keyOfTracked(tracked(6, "10.1.0.2:1009", "203.0.113.9:80")): true}, nil
	}
	return x
}

// want checks what has ended since the last call.
func (x *renewals) want(t *testing.T, all bool) {
	t.Helper()
	x.set(func() {
		var want []conntrack.Flow
		if all {
			want = slices.DeleteFunc(untranslated(), func(f conntrack.Flow) bool { return f.Mark == 0 })
		}
		if !slices.Equal(x.ended, want) {
			t.Errorf("ended %v, want %v", x.ended, want)
		}
		x.ended = nil
	})
}

// What began without rules ends when they are there, and at no other time.
func TestConnectionsWithoutRulesEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := newRenewals(t)
		x.run(t, func() {
			after(10 * time.Second)
			x.want(t, true) // a fresh start

			write(t, x.list, strings.Replace(goodList, "10.0.0.0/8", "10.0.0.0/9", 1))
			x.signals.ipMasq.put()
			after(40 * time.Second) // and a resync
			x.want(t, false)

			x.rules.set(func() { x.rules.changed = "chain is gone" })
			after(2600 * time.Millisecond)
			x.want(t, true)
			x.rules.set(func() { x.rules.changed = "chain is gone" }) // found by an apply, before a look
			x.reload <- struct{}{}
			after(100 * time.Millisecond)
			x.want(t, true)

			x.set(func() { x.network = device(devices.Snapshot{}, 2, "wan0", "192.0.2.1/24") })
			x.signals.network.put()
			after(time.Second)
			x.want(t, true)

			// What can't be read is an error that shows, and is tried again.
			x.set(func() { x.err = errors.New("no buffer space") })
			x.rules.set(func() { x.rules.changed = "chain is gone" })
			after(2600 * time.Millisecond)
			x.want(t, false)
			if s := x.state(t); !strings.Contains(s.Agent.AttachError, "no buffer space") {
				t.Errorf("%+v", s.Agent)
			}
			x.set(func() { x.err = nil })
			after(20 * time.Second)
			x.want(t, true)
			if s := x.state(t); s.Agent.AttachError != "" {
				t.Errorf("%+v", s.Agent)
			}
		})
	})
}

// A restart ends nothing if the rules stand as the last agent wrote them.
func TestRestartRenews(t *testing.T) {
	for _, held := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			x := newRenewals(t)
			x.rules.held = held
			x.n.expect(PolicyFile{Mode: ModeIPTables, State4: SourcesUsed, Ports: "32768-65535"})
			if x.n.before == nil {
				t.Fatal("policy.json holds no policy")
			}
			x.run(t, func() {
				after(10 * time.Second)
				x.want(t, !held)
			})
		})
	}
}

// After a change to rules what the programs no longer have ends.
func TestChangeoverRenews(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := newRenewals(t)
		old := &fakeOld{left: 1}
		c := &changeover{backend: x.n, old: old, moving: &modeSwitch{}, timeout: time.Hour, log: quiet, renew: x.n.renew}
		c.move = func(ctx context.Context) (switched, error) {
			err := x.n.write(ctx, c.policy)
			x.want(t, false) // not while connections are moved
			return switched{Left: 1}, err
		}
		x.loop.changeover, x.loop.kernel, x.loop.flows = c, c, c
		x.run(t, func() {
			after(10 * time.Second)
			x.want(t, true)
		})
	})
}
