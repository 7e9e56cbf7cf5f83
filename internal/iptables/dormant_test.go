package iptables

import (
	"context"
	"strings"
	"testing"

	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/policy"
)

// A dormant table lists all its rules, and no packet comes to them.
func TestDormantTableIsWoken(t *testing.T) {
	labtest.Tool(t, "nft")
	for _, c := range []struct{ family, table, want string }{
		{"ip", "nat", "IPv4: table nat: dormant: no packet comes to its rules"},
		{"ip", "mangle", "IPv4: table mangle: dormant: no packet comes to its rules"},
		{"ip6", "nat", "IPv6: table nat: dormant: no packet comes to its rules"},
	} {
		t.Run(c.family+" "+c.table, func(t *testing.T) {
			t.Parallel()
			n := tables(t, labtest.NewNS(t), Options{Backend: NFT})
			p := build(t, listed)
			n.apply(p)
			n.right()
			devices := func() (names []string) {
				n.do(func() error {
					i, err := Inspect(context.Background(), n.o)
					if err == nil {
						names, err = i.Devices()
					}
					return err
				})
				return names
			}
			sleep := func() { n.run("nft", "add table "+c.family+" "+c.table+" { flags dormant; }") }
			sleep()
			if got := n.check(); got != c.want {
				t.Errorf("check says %q, want %q", got, c.want)
			}
			if got := devices(); len(got) > 0 {
				t.Errorf("said to be masqueraded: %s", got)
			}
			for _, heal := range []func() error{
				func() error { return n.tables.Apply(context.Background(), p) },
				func() error {
					return n.tables.Apply(context.Background(), build(t, func(in *policy.Input) { in.NonMasq = rules("10.0.0.0/8") }))
				},
				func() error { return n.tables.Drain(context.Background()) },
			} {
				sleep()
				n.do(heal)
				if got := n.check(); got != "" && c.table == "nat" { // draining needs no guard
					t.Errorf("not healed: %s", got)
				}
			}
			if out := n.run("nft", "list table "+c.family+" nat"); strings.Contains(out, "dormant") {
				t.Errorf("still dormant:\n%s", out)
			}
		})
	}
}

// What is not ours to need stays as it is.
func TestDormantTableOfOthers(t *testing.T) {
	labtest.Tool(t, "nft")
	n := tables(t, labtest.NewNS(t), Options{Backend: NFT})
	n.run("nft", "add table ip filter { flags dormant; }")
	n.run("nft", "add table ip6 nat { flags dormant; }")
	n.apply(build(t, func(in *policy.Input) { in.IPv6 = false }))
	n.right()
	if out := n.run("nft", "list ruleset"); strings.Count(out, "dormant") != 2 {
		t.Errorf("woken:\n%s", out)
	}
}
