package e2e_test

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"bauta.dev/bauta/internal/agent"
	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
)

// A restart with the other option moves the connections there are: each goes on with its
// address and port, in both directions of the change, and nothing of the old mode stays.
func TestModeChange(t *testing.T) {
	inEachBackend(t, lab.Options{}, func(t *testing.T, n *node, _ string) {
		before := n.ownThings()
		file := n.writeList("198.51.100.0/24")
		args := []string{podCIDRs, "--enable-ip-masq-agent", "--ip-masq-agent-config-path=" + file}
		n.start(args...)
		w, wire := n.tapWorld(), n.watchWire(netip.MustParseAddr("198.51.100.1"))
		servers := []netip.AddrPort{
			server(t, lab.EchoTCP, n.World, anyPort(n.WorldAddr.V4)), server(t, lab.EchoTCP, n.World, anyPort(n.WorldAddr.V6)),
		}
		var conns []*net.TCPConn
		open := func(count int) {
			t.Helper()
			for i := range count {
				// Some have no port of the pool: their external one is another.
				conn, _ := n.talk(0, servers[i%2], uint16(map[bool]int{true: 40000, false: 10000}[i%4 < 2]+len(conns)))
				conns = append(conns, conn)
			}
		}
		allAnswer := func(when string) {
			t.Helper()
			for i, c := range conns {
				if !answers(c) {
					t.Errorf("%s: connection %d of %d does not answer", when, i, len(conns))
				}
			}
		}
		open(8)
		n.restart(iptablesMode)
		allAnswer("in iptables mode")
		n.masqueraded(w)
		n.awaitNothingOf(agent.ModeBPF)
		if _, err := os.Stat(n.bpfRoot); !os.IsNotExist(err) {
			t.Errorf("%s is still there: %v", n.bpfRoot, err)
		}
		n.wantList("169.254.0.0/16 198.51.100.0/24 fe80::/10")
		w.want(netip.MustParseAddr("198.51.100.1"), n.PodAddrs[0].V4)
		allAnswer("without eBPF mode")
		open(8)

		n.restart("--enable-bpf-masquerade=true")
		allAnswer("in eBPF mode")
		n.masqueraded(w)
		n.awaitNothingOf(agent.ModeIPTables)
		if diff := cmp.Diff(before, n.ownThings()); diff != "" {
			t.Errorf("what is left of iptables mode (-before +after):\n%s", diff)
		}
		n.wantList("169.254.0.0/16 198.51.100.0/24 fe80::/10")
		w.want(netip.MustParseAddr("198.51.100.1"), n.PodAddrs[0].V4)
		allAnswer("without iptables mode")
		if line := n.statusLine(); !strings.HasPrefix(line, "Masquerading:   BPF (ip-masq-agent)   [eth0]") {
			t.Error(line)
		}
		wire.check(t)
	})
}

// awaitNothingOf waits until nothing of a mode drains any more.
func (n *node) awaitNothingOf(mode string) {
	n.t.Helper()
	n.await("nothing of "+mode+" mode", func(st agent.Status) bool {
		return st.Agent.Ready && st.Draining == nil && st.Masquerading.Mode != mode
	})
}

// A connection that can't be moved drains, and the status says so, also with the agent down.
func TestModeChangeDrains(t *testing.T) {
	setsModes(t)
	t.Parallel()
	n := newNode(t, lab.Options{})
	n.start(podCIDRs, iptablesMode)
	echo := server(t, lab.EchoTCP, n.World, anyPort(n.WorldAddr.V4))
	// A connection of another zone is of another table: no program could know it.
	n.tables("iptables-nft", "-t", "raw", "-A", "PREROUTING", "-p", "tcp", "--sport", "40001", "-j", "CT", "--zone-orig", "7")
	conn, _ := n.talk(0, echo, 40001)
	n.restart("--enable-bpf-masquerade=true")
	if !answers(conn) {
		t.Error("the connection does not answer")
	}
	draining := func() error {
		st := n.status()
		if st.Draining == nil || st.Draining.Mode != agent.ModeIPTables || st.Draining.Connections != 1 {
			return fmt.Errorf("draining: %+v", st.Draining)
		}
		if out := n.try("status").stdout; !strings.Contains(out, "draining 1 ") {
			return errors.New(out)
		}
		return nil
	}
	labtest.Eventually(t, patience, draining)
	n.kill()
	if err := draining(); err != nil {
		t.Error(err)
	}
	if out := n.cli("bpf", "nat", "list", "--proto=tcp"); !strings.Contains(out, ":40001 -> ") {
		t.Errorf("bpf nat list without the connection that drains:\n%s", out)
	}
	n.wantDraining(0, 40001, echo, agent.ModeIPTables, 40001)
	n.start(n.agent.args...)
	if !answers(conn) {
		t.Error("the connection does not answer after a crash")
	}
	labtest.Eventually(t, patience, draining)
	conn.SetLinger(0)
	conn.Close()
	n.tables("conntrack", "-D", "-p", "tcp")
	n.awaitNothingOf(agent.ModeIPTables)
	if things := n.ownThings(); strings.Contains(things, "BAUTA") {
		t.Errorf("left:\n%s", things)
	}

	// What does not end by itself is ended in time.
	n.restart(iptablesMode)
	again, _ := n.talk(0, echo, 40001)
	defer again.Close()
	n.restart("--enable-bpf-masquerade=true", "--drain-timeout=8s")
	labtest.Eventually(t, patience, draining)
	n.awaitNothingOf(agent.ModeIPTables)
}

// With both data planes there the agent's mode is the one of the option, and cleanup takes both.
func TestModeChangeCleanup(t *testing.T) {
	inEachBackend(t, lab.Options{}, func(t *testing.T, n *node, _ string) {
		before, footprint := n.ownThings(), n.footprint()
		n.start(podCIDRs)
		n.kill()
		runDir := n.runDir
		must(t, os.Rename(n.bpfRoot, n.bpfRoot+"2")) // out of sight of the next agent
		n.start(podCIDRs, iptablesMode)
		n.kill()
		must(t, os.Rename(n.bpfRoot+"2", n.bpfRoot))
		out := n.cli("cleanup")
		for _, text := range []string{n.bpfRoot, "BAUTA-POSTROUTING", runDir} {
			if !strings.Contains(out, text) {
				t.Errorf("cleanup does not name %s:\n%s", text, out)
			}
		}
		if diff := cmp.Diff(strings.Split(before, "\n"), strings.Split(n.ownThings(), "\n")); diff != "" {
			t.Errorf("rules that cleanup left, or took (-before +after):\n%s", diff)
		}
		if diff := cmp.Diff(slices.Collect(strings.Lines(footprint)), slices.Collect(strings.Lines(n.footprint()))); diff != "" {
			t.Errorf("what cleanup left, or took (-before +after):\n%s", diff)
		}
	})
}
