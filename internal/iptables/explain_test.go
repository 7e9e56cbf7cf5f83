package iptables

import (
	"context"
	"net/netip"
	"slices"
	"testing"

	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/policy"
	"bauta.dev/bauta/internal/policy/policytest"
)

// explainable tells whether a case is about a packet that Explain can be asked about: the
// first of a connection, in a protocol of connections.
func explainable(c policytest.Case) bool {
	switch c.Packet.Proto {
	case policy.ProtoTCP:
		return c.Packet.Opening() && !c.Packet.Inbound
	case policy.ProtoUDP, policy.ProtoUDPLite, policy.ProtoSCTP:
		return !c.Packet.Inbound
	case policy.ProtoICMP:
		return c.Packet.ICMPType == 8 && c.Packet.Src.Is4()
	case policy.ProtoICMPv6:
		return c.Packet.ICMPType == 128 && c.Packet.Src.Is6()
	}
	return false
}

// Every such case of the table that all renderings of a policy share, by the rules in the kernel.
func TestExplain(t *testing.T) {
	eachBackend(t, func(t *testing.T, o Options) {
		groups, err := policytest.Load()
		if err != nil {
			t.Fatal(err)
		}
		n := tables(t, labtest.NewNS(t), o)
		cases := 0
		for _, g := range groups {
			p, err := policy.Build(g.Input)
			if err != nil {
				t.Fatal(err)
			}
			n.apply(p)
			n.do(func() error {
				i, err := Inspect(context.Background(), o)
				if err != nil {
					return ignoreNone(err)
				}
				for _, c := range g.Cases {
					if reason, _ := differs(g.Input, c); !explainable(c) || reason == familyOff {
						continue
					}
					cases++
					v, err := i.Explain(Packet{Src: c.Packet.Src, Dst: c.Packet.Dst, Proto: c.Packet.Proto, Device: c.Device})
					if err != nil {
						return err
					}
					if v.Outcome == policy.PassSource && c.Want.Outcome == policy.PassHost {
						v.Outcome = policy.PassHost // no rule for an address in no range
					}
					if v.Outcome == policy.PassDevice && c.Want.Outcome.Verdict() == policy.Pass {
						v.Outcome = c.Want.Outcome // rules are for masquerade devices
					}
					if v.Outcome != c.Want.Outcome || v.Address != c.Want.Address || v.Unreached {
						t.Errorf("%s: cases.txt:%d: %s: got %+v", g.Name, c.Line, c.Text, v)
					}
					if byDestination := v.Outcome >= policy.PassMulticast && v.Outcome <= policy.PassNode; byDestination && c.Want.Match.IsValid() && v.Match != c.Want.Match {
						t.Errorf("%s: cases.txt:%d: %s: match %s", g.Name, c.Line, c.Text, v.Match)
					}
				}
				return nil
			})
		}
		if cases < 100 {
			t.Errorf("only %d cases", cases)
		}
		t.Logf("%d cases", cases)
	})
}

// ignoreNone is for policies of which there is no rule.
func ignoreNone(err error) error {
	if slices.Contains([]error{nil, ErrNone}, err) {
		return nil
	}
	return err
}

// The argument of SNAT in all its forms.
func TestExplainTranslation(t *testing.T) {
	for _, c := range []struct {
		family Family
		to     string
		addr   string
		ports  string
	}{
		{IPv4, "192.0.2.1", "192.0.2.1", ""},
		{IPv4, "192.0.2.1:32768-65535", "192.0.2.1", "32768-65535"},
		{IPv4, "192.0.2.1:40000", "192.0.2.1", "40000"},
		{IPv6, "2001:db8::1", "2001:db8::1", ""},
		{IPv6, "[2001:db8::1]:32768-65535", "2001:db8::1", "32768-65535"},
	} {
		w := walk{family: c.family}
		if err := w.translate(c.to, false); err != nil || w.verdict.Address != netip.MustParseAddr(c.addr) || w.verdict.Ports != c.ports {
			t.Errorf("%s: %v, %+v", c.to, err, w.verdict)
		}
	}
	w := walk{family: IPv4}
	if err := w.translate("nonsense", false); err == nil {
		t.Errorf("nonsense: %+v", w.verdict)
	}
}

// Rules that drain, and rules that no packet comes to.
func TestExplainWithoutEffect(t *testing.T) {
	eachBackend(t, func(t *testing.T, o Options) {
		n := tables(t, labtest.NewNS(t), o)
		n.apply(build(t, listed))
		about := Packet{Src: netip.MustParseAddr("10.0.1.2"), Dst: netip.MustParseAddr("1.1.1.1"), Proto: policy.ProtoTCP, Device: "eth0"}
		ask := func() (v Verdict) {
			n.do(func() error {
				i, err := Inspect(context.Background(), o)
				if err == nil {
					v, err = i.Explain(about)
				}
				return err
			})
			return v
		}
		if v := ask(); v.Outcome == policy.Continue || v.Unreached || v.Draining {
			t.Errorf("in force: %+v", v)
		}
		n.run(n.ipt(IPv4, ""), "-t", "nat", "-D", "POSTROUTING", "-j", "BAUTA-POSTROUTING")
		if v := ask(); !v.Unreached {
			t.Errorf("without the jump: %+v", v)
		}
	})
}
