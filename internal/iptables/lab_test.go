package iptables

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/policy"
)

// eachBackend runs a test for both, side by side.
func eachBackend(t *testing.T, f func(t *testing.T, o Options)) {
	labtest.Root(t)
	for _, b := range []Backend{NFT, Legacy} {
		labtest.Tool(t, "iptables-"+string(b))
		t.Run(string(b), func(t *testing.T) {
			t.Parallel()
			f(t, Options{Backend: b, env: ownLock(t)})
		})
	}
}

// ownLock keeps tests from waiting for each other, and for others on the machine.
func ownLock(t testing.TB) []string {
	return []string{"XTABLES_LOCKFILE=" + t.TempDir() + "/lock"}
}

// tables opens the rules of a namespace.
func tables(t testing.TB, ns *lab.NS, o Options) *inNS {
	t.Helper()
	n := &inNS{t: t, ns: ns, o: o}
	n.do(func() (err error) {
		n.tables, err = Open(context.Background(), o)
		return err
	})
	return n
}

// inNS calls the package inside a namespace.
type inNS struct {
	t      testing.TB
	ns     *lab.NS
	o      Options
	tables *Tables
}

func (n *inNS) do(f func() error) {
	n.t.Helper()
	if err := n.ns.Do(f); err != nil {
		n.t.Fatal(err)
	}
}

func (n *inNS) apply(p *policy.Policy) {
	n.t.Helper()
	n.do(func() error { return n.tables.Apply(context.Background(), p) })
}

func (n *inNS) applyError(p *policy.Policy) (err error) {
	n.ns.Do(func() error {
		err = n.tables.Apply(context.Background(), p)
		return nil
	})
	return err
}

func (n *inNS) check() (changed string) {
	n.t.Helper()
	n.do(func() (err error) {
		changed, err = n.tables.Check(context.Background())
		return err
	})
	return changed
}

func (n *inNS) right() {
	n.t.Helper()
	if changed := n.check(); changed != "" {
		n.t.Errorf("check: %s", changed)
	}
}

// run runs a program in the namespace.
func (n *inNS) run(name string, args ...string) string {
	n.t.Helper()
	out, err := n.try(name, args...)
	if err != nil {
		n.t.Fatalf("%v\n%s", err, out)
	}
	return out
}

func (n *inNS) try(name string, args ...string) (out string, err error) {
	err = n.ns.Do(func() (err error) {
		path := n.o.find(name)
		out, err = n.o.run(context.Background(), path, "", args...)
		return err
	})
	return out, err
}

// feed gives a program a text to read.
func (n *inNS) feed(text, name string, args ...string) {
	n.t.Helper()
	n.do(func() error {
		_, err := n.o.run(context.Background(), n.o.find(name), text, args...)
		return err
	})
}

// ipt is the binary of the backend in use.
func (n *inNS) ipt(f Family, suffix string) string {
	return f.binary() + "-" + string(n.tables.backend) + suffix
}

// build makes a policy of the lab's node.
func build(t testing.TB, change func(in *policy.Input)) *policy.Policy {
	t.Helper()
	in := policy.Input{
		IPv4: true, IPv6: true,
		Sources: rules("10.0.1.0/24", "fd00:1::/64"),
		HostAddrs: []netip.Addr{
			netip.MustParseAddr("10.0.1.1"), netip.MustParseAddr("192.0.2.1"),
			netip.MustParseAddr("fd00:1::1"), netip.MustParseAddr("2001:db8:2::1"),
		},
		Devices: []policy.Device{{
			Name: "eth0", Index: 100, Ethernet: true,
			IPv4: netip.MustParseAddr("192.0.2.1"), IPv6: netip.MustParseAddr("2001:db8:2::1"),
			Broadcasts: []netip.Addr{netip.MustParseAddr("192.0.2.255")},
		}},
		Ports: ports(32768, 65535),
	}
	if change != nil {
		change(&in)
	}
	p, err := policy.Build(in)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func rules(prefixes ...string) []policy.Rule {
	var list []policy.Rule
	for _, s := range prefixes {
		list = append(list, policy.Rule{Prefix: netip.MustParsePrefix(s), Origin: "test"})
	}
	return list
}

func ports(first, last int) []uint16 {
	var list []uint16
	for p := first; p <= last; p++ {
		list = append(list, uint16(p))
	}
	return list
}

// ours are the lines of a listing that name something of ours.
func ours(listing string) []string {
	return slices.DeleteFunc(strings.Split(listing, "\n"), func(s string) bool { return !strings.Contains(s, chainPrefix) })
}

// dropped returns an error until a rule with this reason has dropped something.
func (n *inNS) dropped(reason string) error {
	n.t.Helper()
	for _, f := range families {
		for line := range strings.Lines(n.counters(f, "mangle")) {
			if strings.Contains(line, "--comment "+reason+" ") && !strings.HasPrefix(line, "[0:0]") {
				return nil
			}
		}
	}
	return errors.New("nothing dropped: " + reason)
}
