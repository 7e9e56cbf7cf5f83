package iptables

import (
	"context"
	"errors"
	"strings"
	"testing"

	"bauta.dev/bauta/internal/lab/labtest"
)

// addNative adds a rule that iptables can't show.
func (n *inNS) addNative(verb, family, table, chain string) {
	n.t.Helper()
	n.run("nft", verb, "rule", family, table, chain, "meta", "mark", "set", "jhash", family, "saddr", "mod", "7")
}

// With a native rule in the table iptables-save lists nothing of it: ours are seen nonetheless.
func TestNativeRulesInOurTable(t *testing.T) {
	labtest.Tool(t, "nft")
	n := tables(t, labtest.NewNS(t), Options{Backend: NFT})
	p := build(t, listed)
	n.apply(p)
	native := func(verb, family, table, chain string) func() {
		return func() { n.addNative(verb, family, table, chain) }
	}
	run := func(args ...string) func() { return func() { n.run(args[0], args[1:]...) } }
	n.addNative("add", "ip", "nat", "POSTROUTING")
	n.addNative("add", "ip6", "mangle", "POSTROUTING")
	n.right()
	for _, c := range []struct {
		name, want string
		damage     func()
	}{
		{"a rule before ours", "IPv4: table nat: a rule stands before ours in POSTROUTING", native("insert", "ip", "nat", "POSTROUTING")},
		{"a rule in ours", "IPv4: table nat: chain BAUTA-SOURCE was changed", native("add", "ip", "nat", "BAUTA-SOURCE")},
		{"a rule in the guard", "IPv6: table mangle: chain BAUTA-GUARD was changed", native("insert", "ip6", "mangle", "BAUTA-GUARD")},
		{"a chain of ours flushed", "IPv4: table nat: chain BAUTA-DESTINATION was changed", run("iptables-nft", "-t", "nat", "-F", "BAUTA-DESTINATION")},
		{"a chain added", "IPv4: table nat: chain BAUTA-MORE was added", run("iptables-nft", "-t", "nat", "-N", "BAUTA-MORE")},
		{"no jump", "IPv4: table nat: POSTROUTING does not lead to BAUTA-POSTROUTING", run("iptables-nft", "-t", "nat", "-D", "POSTROUTING", "-j", "BAUTA-POSTROUTING")},
		{"a second jump", "IPv4: table nat: another rule leads to our chains", run("iptables-nft", "-t", "nat", "-A", "POSTROUTING", "-j", "BAUTA-POSTROUTING")},
	} {
		c.damage()
		if got := n.check(); got != c.want {
			t.Errorf("%s: check says %q, want %q", c.name, got, c.want)
		}
		n.apply(p)
		if got := n.check(); got != "" {
			t.Errorf("%s: not healed: %s", c.name, got)
		}
	}
	if out := n.run("nft", "list table ip nat"); strings.Count(out, "jhash") != 2 {
		t.Errorf("a rule of another was touched:\n%s", out)
	}
	n.do(func() error {
		i, err := Inspect(context.Background(), n.o)
		if err != nil {
			return err
		}
		if devices, err := i.Devices(); err != nil || strings.Join(devices, " ") != "eth0" {
			t.Errorf("inspect: %v, %v", devices, err)
		}
		_, err = Remove(context.Background(), n.o)
		return err
	})
	out := n.run("nft", "list ruleset")
	if len(ours(out)) > 0 || strings.Count(out, "jhash") != 3 {
		t.Errorf("after the removal:\n%s", out)
	}
}

// Without the program that lists a chain nobody can tell what is in the table.
func TestNativeRulesThatCantBeRead(t *testing.T) {
	labtest.Tool(t, "nft")
	o := Options{Backend: NFT, dirs: []string{binDir(t, append(append(family4(NFT), family6(NFT)...), "nft")...)}}
	n := tables(t, labtest.NewNS(t), o)
	n.apply(build(t, nil))
	n.addNative("add", "ip6", "nat", "POSTROUTING")
	err := n.applyError(build(t, listed))
	if !errors.Is(err, errHidden) || !errors.Is(err, ErrPartly) || !strings.Contains(err.Error(), "IPv6: table nat: ") || !strings.Contains(hints(err), "nft list table ip6 nat") {
		t.Errorf("apply: %v, hints %q", err, hints(err))
	}
	n.do(func() error {
		if _, err := n.tables.Check(context.Background()); !errors.Is(err, errHidden) {
			t.Errorf("check: %v", err)
		}
		if _, err := Inspect(context.Background(), n.o); err != nil { // IPv4 is readable
			t.Errorf("inspect: %v", err)
		}
		if _, err := Remove(context.Background(), n.o); !errors.Is(err, errHidden) {
			t.Errorf("remove: %v", err)
		}
		return nil
	})
}
