package agent

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"bauta.dev/bauta/internal/conntrack"
	"bauta.dev/bauta/internal/datapath"
	"bauta.dev/bauta/internal/devices"
	"bauta.dev/bauta/internal/iptables"
	"bauta.dev/bauta/internal/policy"
)

// fakeRules are rules that somebody may change.
type fakeRules struct {
	mu              sync.Mutex
	applies, checks int
	changed         string
	applyErr        error
	checkErr        error
	held            bool   // by an earlier agent
	healed          string // by the last Apply
}

func (r *fakeRules) set(change func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	change()
}

func (r *fakeRules) Apply(context.Context, *policy.Policy) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.applies++
	r.healed = r.changed
	if r.applyErr == nil {
		r.changed, r.checkErr = "", nil
	}
	return r.applyErr
}

func (r *fakeRules) Check(context.Context) (string, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.checks++
	return r.changed, r.checkErr
}

func (r *fakeRules) Drain(context.Context) error { return nil }

func (r *fakeRules) Warnings() []string { return []string{"no ipset: plain rules"} }

func (r *fakeRules) Held(context.Context, *policy.Policy) (bool, error) { return r.held, nil }

func (r *fakeRules) Changed() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.healed
}

type closer struct{}

func (closer) Close() error { return nil }

// newRuleBench is a loop in iptables mode.
func newRuleBench(t *testing.T, options ...string) (*bench, *fakeRules, *netfilter) {
	t.Helper()
	b := newBench(t, append(options, "enable-bpf-masquerade=false")...)
	r := &fakeRules{}
	n := &netfilter{
		rules: r, lock: closer{}, log: quiet, unrest: unrest{log: quiet}, had: make(map[netip.Addr]bool),
		flows: func(context.Context, conntrack.Filter) ([]conntrack.Flow, error) { return nil, nil },
		end:   func(context.Context, []conntrack.Flow) (int, error) { return 0, nil },
		leave: func([]netip.Addr) (map[netip.Addr]int, error) { return nil, nil },
	}
	b.loop.kernel, b.loop.flows = n, nil
	return b, r, n
}

func (b *bench) state(t *testing.T) Status {
	t.Helper()
	s, err := b.published.Load().status(time.Now(), fakeRuleInspector{attached: b.attachedByRules()})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// fakeRuleInspector is what a kernel with rules would tell.
type fakeRuleInspector struct {
	attached []datapath.Attachment
	used     ConntrackUsage
}

func (k fakeRuleInspector) Exclusions() ([]netip.Prefix, error) {
	return []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}, nil
}
func (k fakeRuleInspector) Attachments() ([]datapath.Attachment, error) { return k.attached, nil }
func (k fakeRuleInspector) Applied() bool                               { return true }
func (k fakeRuleInspector) Tier() string                                { return "iptables-nft" }
func (k fakeRuleInspector) Conntrack() (ConntrackUsage, error)          { return k.used, nil }
func (k fakeRuleInspector) Drops() (map[string]uint64, error) {
	return map[string]uint64{"drop-stray": 2, "drop-protocol": 0}, nil
}
func (k fakeRuleInspector) Close() error { return nil }

// Rules that others change are applied again: looked at every two seconds, no more.
func TestRulesAreHealed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, r, _ := newRuleBench(t)
		b.run(t, func() {
			after(10 * time.Second)
			r.set(func() {
				if r.applies != 1 || r.checks < 4 || r.checks > 5 {
					t.Errorf("%d applies, %d checks in 10 s", r.applies, r.checks)
				}
			})
			r.set(func() { r.changed = "jump is not the first rule" })
			after(2600 * time.Millisecond)
			r.set(func() {
				if r.applies != 2 || r.changed != "" {
					t.Errorf("%d applies, %q after a change", r.applies, r.changed)
				}
			})
			// What can't be compared is applied; the error of that shows, and is retried.
			held := errors.New("xtables lock: held by another program")
			r.set(func() { r.checkErr, r.applyErr = held, held })
			after(2600 * time.Millisecond)
			if s := b.state(t); s.Agent.Error != held.Error() || len(s.Degraded()) == 0 {
				t.Errorf("%+v", s.Agent)
			}
			r.set(func() { r.applyErr = nil })
			after(10 * time.Second)
			if s := b.state(t); s.Agent.Error != "" || len(s.Degraded()) != 0 {
				t.Errorf("%+v %v", s.Agent, s.Degraded())
			}
		})
	})
}

func TestStatusOfIPTablesMode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, _, _ := newRuleBench(t, "enable-ip-masq-agent=true", "nat-timeout-udp=10s", "devices=eth0", "egress-masquerade-interfaces=eth+")
		write(t, b.list, goodList)
		b.network = device(b.network, 3, "eth1", "198.51.100.1/24")
		b.run(t, func() {
			s := b.state(t)
			if want := "IPTables (ip-masq-agent) [IPv4: Enabled, IPv6: Enabled]"; s.Line() != want || s.Masquerading.Mode != "iptables" {
				t.Errorf("%s, want %s; mode %s", s.Line(), want, s.Masquerading.Mode)
			}
			if d := s.Degraded(); len(d) > 0 || s.Datapath.Tier != "iptables-nft" || s.Flows.Conntrack == nil || s.Drops["drop-stray"] != 2 {
				t.Errorf("%v %+v %+v", d, s.Datapath, s.Flows)
			}
			if len(s.Devices) != 2 || s.Devices[0].Hook != HookIPTables || s.Devices[1].State != DeviceAttached {
				t.Errorf("%+v", s.Devices)
			}
			for _, part := range []string{`nat-timeout-udp "10s"`, `devices "eth0"`, "no ipset: plain rules"} {
				if !slices.ContainsFunc(s.Warnings, func(w string) bool { return strings.Contains(w, part) }) {
					t.Errorf("no warning with %s: %q", part, s.Warnings)
				}
			}
			if f, err := ReadPolicyFile(b.runDir); err != nil || f.Mode != ModeIPTables {
				t.Errorf("policy.json: %s %v", f.Mode, err)
			}
			full, _ := b.published.Load().status(time.Now(), fakeRuleInspector{b.attachedByRules(), ConntrackUsage{95, 100}})
			if d := strings.Join(full.Degraded(), "; "); d != "conntrack table: 95 of 100 connections, more than 90 % full" {
				t.Errorf("degraded: %s", d)
			}
		})
	})
}

// attachedByRules are the devices of the policy in force.
func (b *bench) attachedByRules() (list []datapath.Attachment) {
	for _, d := range b.published.Load().file.Devices {
		list = append(list, datapath.Attachment{Device: d.Name, Index: d.Index, Hook: HookIPTables})
	}
	return list
}

// Flows of an address that left end with the apply that follows: those of our sources,
// and no others.
func TestFlowsOfAVanishedAddressEnd(t *testing.T) {
	snat := func(src, xlate string) conntrack.Flow {
		f := conntrack.Flow{Proto: 6, Src: netip.MustParseAddrPort(src), Dst: netip.MustParseAddrPort("203.0.113.9:443"), Xlate: netip.MustParseAddrPort(xlate)}
		f.SNAT = f.Src != f.Xlate
		return f
	}
	flows := []conntrack.Flow{
		snat("10.1.0.2:1000", "192.0.2.1:1000"),
		snat("10.1.0.2:1001", "192.0.2.7:1001"),
		snat("10.99.0.2:1002", "192.0.2.1:1002"),
		snat("192.0.2.1:1003", "192.0.2.1:1003"),
		snat("10.1.0.2:1004", "192.0.2.200:1004"), // an earlier agent's
	}
	synctest.Test(t, func(t *testing.T) {
		b, _, n := newRuleBench(t)
		var ended []string
		lists := 0
		n.flows = func(_ context.Context, f conntrack.Filter) ([]conntrack.Flow, error) {
			if !f.Translated {
				return nil, nil
			}
			lists++
			return slices.Clone(flows), nil
		}
		n.end = func(_ context.Context, list []conntrack.Flow) (int, error) {
			for _, f := range list {
				ended = append(ended, f.Xlate.String())
			}
			return len(list), nil
		}
		n.expect(PolicyFile{HostAddrs: []netip.Addr{netip.MustParseAddr("192.0.2.200"), netip.MustParseAddr("192.0.2.1")}})
		b.earlier.applied = true
		b.run(t, func() {
			after(10 * time.Second)
			if want := []string{"192.0.2.200:1004"}; !slices.Equal(ended, want) || lists != 1 {
				t.Errorf("ended %v, want %v; %d lists", ended, want, lists)
			}
			b.set(func() { b.network = device(devices.Snapshot{}, 2, "eth0", "192.0.2.7/24") })
			b.signals.network.put()
			after(time.Second)
			if want := []string{"192.0.2.200:1004", "192.0.2.1:1000"}; !slices.Equal(ended, want) {
				t.Errorf("ended %v, want %v", ended, want)
			}
		})
	})
}

// Rules of others are warned of in both modes, looked for each half minute, and one that
// can't be read is no end of it.
func TestForeignRulesAreWarnedOf(t *testing.T) {
	for _, mode := range []string{"enable-bpf-masquerade=true", "enable-bpf-masquerade=false"} {
		synctest.Test(t, func(t *testing.T) {
			b := newBench(t, mode)
			looks := 0
			var found []iptables.ForeignRule
			var failure error
			b.readForeign = func(_ context.Context, sources []netip.Prefix) ([]iptables.ForeignRule, error) {
				b.mu.Lock()
				defer b.mu.Unlock()
				if looks++; len(sources) != 1 || sources[0].String() != "10.1.0.0/16" {
					t.Errorf("sources %v", sources)
				}
				return found, failure
			}
			warned := func() bool {
				s, _ := b.published.Load().status(time.Now(), nil)
				return slices.Contains(s.Warnings, "another masquerade rule matches our sources too: IPv4, table nat, chain POSTROUTING: -s 10.0.0.0/8 -j MASQUERADE")
			}
			b.run(t, func() {
				if warned() {
					t.Error("a warning of nothing")
				}
				b.set(func() {
					found = []iptables.ForeignRule{{Family: "IPv4", Table: "nat", Chain: "POSTROUTING", Rule: "-s 10.0.0.0/8 -j MASQUERADE"}}
				})
				after(31 * time.Second)
				if !warned() {
					t.Error("no warning")
				}
				b.set(func() { found, failure = nil, errors.New("not read") })
				after(30 * time.Second)
				if !warned() {
					t.Error("an error took the warning away")
				}
				b.set(func() { failure = nil })
				after(30 * time.Second)
				if warned() || looks != 4 {
					t.Errorf("still warned, or %d looks", looks)
				}
			})
		})
	}
}

func TestManyForeignRulesAreCut(t *testing.T) {
	if got := foreignWarnings(make([]iptables.ForeignRule, 25)); len(got) != maxForeign+1 || !strings.Contains(got[maxForeign], "15 more") {
		t.Errorf("%q", got)
	}
}

// A device that rules can't name is not masqueraded on, and nobody says that it is.
func TestOddDeviceIsNotAttached(t *testing.T) {
	_, r, n := newRuleBench(t)
	p, err := policy.Build(policy.Input{IPv4: true, Ports: []uint16{40000}, Devices: []policy.Device{{Name: "odd+", Index: 3}, {Name: "eth0", Index: 2}}})
	if err != nil {
		t.Fatal(err)
	}
	r.applyErr = iptables.ErrPartly
	if err := n.Apply(t.Context(), p); !errors.Is(err, iptables.ErrPartly) {
		t.Errorf("apply: %v", err)
	}
	if got := n.Attached(); len(got) != 1 || got[0].Device != "eth0" {
		t.Errorf("attached: %+v", got)
	}
}
