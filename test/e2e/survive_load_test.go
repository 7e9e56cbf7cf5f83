package e2e_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
)

// talk is a set of connections to echo servers that are never silent for long.
type talk struct {
	conns  []net.Conn
	seen   []netip.AddrPort
	ctx    context.Context
	cancel context.CancelFunc
	group  sync.WaitGroup
	every  time.Duration // between two exchanges of a connection
	rounds atomic.Int64
	worst  atomic.Int64 // longest time from a question to its answer, ns

	mu   sync.Mutex
	lost []error
}

// pause between two exchanges of a connection.
const pause = 50 * time.Millisecond

// converse opens connections from a namespace to the servers in turn and keeps
// them busy until the test ends.
func converse(t *testing.T, ns *lab.NS, count int, servers ...netip.AddrPort) *talk {
	t.Helper()
	k := newTalk(t)
	for i := range count {
		k.open(t, ns, netip.AddrPort{}, servers[i%len(servers)])
	}
	return k
}

func newTalk(t *testing.T) *talk {
	k := &talk{every: pause}
	k.ctx, k.cancel = context.WithCancel(context.Background())
	t.Cleanup(k.end)
	return k
}

// open adds a connection.
func (k *talk) open(t *testing.T, ns *lab.NS, local, server netip.AddrPort) {
	t.Helper()
	seen, c, err := lab.AskTCP(within(t, 30*time.Second), ns, local, server)
	if err != nil {
		t.Fatalf("connection %d: %v", len(k.conns), err)
	}
	k.conns, k.seen = append(k.conns, c), append(k.seen, seen)
	k.group.Go(func() { k.keep(k.ctx, c) })
}

func (k *talk) keep(ctx context.Context, c net.Conn) {
	tick := time.NewTicker(k.every)
	defer tick.Stop()
	for {
		start := time.Now()
		err := exchange(c)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			k.mu.Lock()
			k.lost = append(k.lost, fmt.Errorf("%s -> %s: %w", c.LocalAddr(), c.RemoteAddr(), err))
			k.mu.Unlock()
			return
		}
		k.rounds.Add(1)
		for took := int64(time.Since(start)); ; {
			worst := k.worst.Load()
			if took <= worst || k.worst.CompareAndSwap(worst, took) {
				break
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func (k *talk) end() {
	k.cancel()
	for _, c := range k.conns {
		c.SetDeadline(time.Unix(1, 0))
	}
	k.group.Wait()
	for _, c := range k.conns {
		c.Close()
	}
}

// goesOn waits until every connection has had the chance of some more exchanges,
// and fails the test if one was lost.
func (k *talk) goesOn(t *testing.T, when string) {
	t.Helper()
	const each = 3
	want := k.rounds.Load() + each*int64(len(k.conns))
	labtest.Eventually(t, 30*time.Second, func() error {
		k.mu.Lock()
		defer k.mu.Unlock()
		if len(k.lost) > 0 {
			t.Fatalf("%s: %d of %d connections lost: %v", when, len(k.lost), len(k.conns), errors.Join(k.lost[:min(3, len(k.lost))]...))
		}
		if got := k.rounds.Load(); got < want {
			return fmt.Errorf("%s: %d exchanges missing", when, want-got)
		}
		return nil
	})
}

// longest is the longest wait for an answer since it was asked last.
func (k *talk) longest() time.Duration { return time.Duration(k.worst.Swap(0)) }

// mappings are the leaving halves of the mappings that the kernel has, by inner
// socket and remote, with the time of their creation.
func (n *node) mappings() map[string]entry {
	n.t.Helper()
	m := make(map[string]entry)
	for _, e := range n.natList("--proto", "tcp") {
		if e.Dir == "OUT" {
			m[fmt.Sprintf("%s:%d->%s:%d", e.Src, e.SrcPort, e.Dst, e.DstPort)] = e
		}
	}
	return m
}

// sameMappings checks that no mapping of before was made anew.
func sameMappings(t *testing.T, when string, before, after map[string]entry) {
	t.Helper()
	bad := 0
	for k, b := range before {
		a, ok := after[k]
		if !ok || a.Xlate != b.Xlate || a.XlatePort != b.XlatePort || a.CreatedSeconds < b.CreatedSeconds || a.Packets < b.Packets {
			if bad++; bad <= 3 {
				t.Errorf("%s: mapping %s was %+v, is %+v", when, k, b, a)
			}
		}
	}
	if bad > 3 {
		t.Errorf("%s: %d of %d mappings are others", when, bad, len(before))
	}
}

// Nothing that happens to the agent is noticed by a running connection: a crash,
// the time without an agent, a start, other options, an upgrade, another hook.
func TestConnectionsSurviveTheAgent(t *testing.T) {
	t.Parallel()
	const connections = 200
	n := newNode(t, lab.Options{Pods: 2})
	n.noTCX = true
	n.start(podCIDRs)
	wire := n.watchWire()
	worlds := []netip.AddrPort{
		server(t, lab.EchoTCP, n.World, anyPort(n.WorldAddr.V4)),
		server(t, lab.EchoTCP, n.World, anyPort(n.WorldAddr.V6)),
	}
	k := converse(t, n.Pods[0], connections, worlds...)
	for _, seen := range k.seen {
		if seen.Addr() != n.NodeAddr.Of(seen.Addr()) {
			t.Fatalf("seen as %s", seen)
		}
	}
	// What this machine makes everybody wait: connections that never leave the node.
	control := converse(t, n.Pods[1], 20, server(t, lab.EchoTCP, n.Node, anyPort(n.PodGateway.V4)))
	k.goesOn(t, "before")
	before := n.mappings()
	if len(before) != connections {
		t.Fatalf("%d mappings, want %d", len(before), connections)
	}
	steps := []struct {
		when string
		do   func()
	}{
		{"agent killed", n.kill},
		{"agent back", func() { n.start(n.agent.args...) }},
		{"other options", func() {
			n.restart("--snat-port-range=20000-29999", "--enable-ip-masq-agent", "--ip-masq-agent-config-path="+n.writeList("10.0.0.0/8"))
		}},
		{"upgraded", func() { n.bin = upgradeBin; n.restart() }},
		{"larger tables", func() { n.restart("--bpf-nat-global-max=131072"); n.expectTables(131072) }},
		{"on tcx", func() { n.noTCX = false; n.restart(); n.expectHook("tcx") }},
		{"smaller tables", func() { n.restart("--bpf-nat-global-max=32768"); n.expectTables(32768) }},
		{"crashed and back", func() { n.kill(); n.start(n.agent.args...) }},
		{"back on clsact", func() { n.noTCX = true; n.restart(); n.expectHook("tc") }},
	}
	for _, s := range steps {
		k.longest()
		control.longest()
		s.do()
		k.goesOn(t, s.when)
		stall, noise := k.longest(), control.longest()
		t.Logf("%s: longest wait %v, on the node %v", s.when, stall, noise)
		if stall > time.Second+noise {
			t.Errorf("%s: a connection waited %v; the longest that never left the node %v", s.when, stall, noise)
		}
		after := n.mappings()
		sameMappings(t, s.when, before, after)
		wire.check(t)
		before = after
	}
	// A new connection follows the options of the agent that runs now.
	seen, c, err := lab.AskTCP(within(t, 10*time.Second), n.Pods[0], netip.AddrPort{}, worlds[0])
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	if seen.Port() < 20000 || seen.Port() > 29999 {
		t.Errorf("a new connection was seen as %s, want a port of the new range", seen)
	}
	n.wantCounts(func(c map[string]uint64) bool {
		return c["masq-new"] <= connections+10 && c["masq-known"] >= connections
	})
}

// expectTables checks the size of the tables. Rules have none.
func (n *node) expectTables(flows int) {
	n.t.Helper()
	if n.backend != "" {
		return
	}
	if f := n.status().Flows; f.IPv4.Limit != flows || f.IPv6.Limit != flows {
		n.t.Fatalf("flows: %+v, want a limit of %d", f, flows)
	}
}

// A new exclusion changes nothing for masqueraded connections, and everything for
// new ones, at the same time.
func TestReloadUnderLoad(t *testing.T) {
	t.Parallel()
	const connections = 60
	n := newNode(t, lab.Options{WorldKnowsPods: true})
	all := []string{"10.0.0.0/8"}
	list := n.writeList(all...)
	n.start(podCIDRs, "--enable-ip-masq-agent", "--ip-masq-agent-config-path="+list)
	worlds := make(map[netip.Addr]netip.AddrPort)
	var talks []*talk
	for _, dst := range n.Excluded.All() {
		worlds[dst] = server(t, lab.EchoTCP, n.World, anyPort(dst))
		talks = append(talks, converse(t, n.Pods[0], connections/2, worlds[dst]))
	}
	before := n.mappings()
	if len(before) != connections {
		t.Fatalf("%d mappings, want %d", len(before), connections)
	}
	for round := range 4 {
		excluded := round%2 == 0
		if excluded {
			n.writeList(append(all, n.Excluded.V4.String()+"/32", "2001:db8:99::/64")...)
		} else {
			n.writeList(all...)
		}
		start := time.Now()
		for dst, at := range worlds {
			want := n.NodeAddr.Of(dst)
			if excluded {
				want = n.PodAddrs[0].Of(dst)
			}
			labtest.Eventually(t, 10*time.Second, func() error {
				seen, c, err := lab.AskTCP(within(t, 3*time.Second), n.Pods[0], netip.AddrPort{}, at)
				if err != nil && excluded {
					t.Fatalf("round %d: a new connection: %v", round, err)
				}
				if err != nil {
					return err // it was not masqueraded, and then the exclusion vanished
				}
				defer c.Close()
				if seen.Addr() != want {
					return fmt.Errorf("round %d: a new connection to %s was seen as %s, want %s", round, dst, seen, want)
				}
				return exchange(c)
			})
		}
		t.Logf("round %d: in force after %v", round, time.Since(start))
		for _, k := range talks {
			k.goesOn(t, fmt.Sprintf("round %d", round))
		}
	}
	sameMappings(t, "after all reloads", before, n.mappings())
	if drops := n.status().Drops; drops["drop-map-error"]+drops["drop-no-policy"]+drops["drop-rewrite"] > 0 {
		t.Errorf("drops: %v", drops)
	}
}
