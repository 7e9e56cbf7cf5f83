package e2e_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"bauta.dev/bauta/internal/agent"
	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
)

var ages = regexp.MustCompile(`Created=\d+sec ago`)

func withoutAge(text string) string { return ages.ReplaceAllString(text, "Created=Nsec ago") }

// talk opens a connection to an echo server and says which source it saw.
func (n *node) talk(pod int, server netip.AddrPort, local uint16) (conn *net.TCPConn, seen netip.AddrPort) {
	n.t.Helper()
	seen, conn, err := lab.AskTCP(within(n.t, patience), n.Pods[pod], netip.AddrPortFrom(n.PodAddrs[pod].Of(server.Addr()), local), server)
	must(n.t, err)
	n.t.Cleanup(func() { conn.Close() })
	return conn, seen
}

// answers tells whether the connection still echoes; it waits shortly only.
func answers(c *net.TCPConn) bool {
	c.SetDeadline(time.Now().Add(500 * time.Millisecond))
	if _, err := io.WriteString(c, "hello\n"); err != nil {
		return false
	}
	line, err := bufio.NewReader(c).ReadString('\n')
	return err == nil && line == "hello\n"
}

// The mappings of each protocol and family: form, order, filters, and flush.
func TestNATList(t *testing.T) {
	t.Parallel()
	n := startNode(t, lab.Options{Pods: 2})
	n.accounts()
	server4 := server(t, lab.EchoTCP, n.World, netip.AddrPortFrom(n.WorldAddr.V4, 8080))
	server6 := server(t, lab.EchoTCP, n.World, netip.AddrPortFrom(n.WorldAddr.V6, 8080))
	udp4 := server(t, lab.EchoUDP, n.World, netip.AddrPortFrom(n.WorldAddr.V4, 5353))
	c4, _ := n.talk(0, server4, 40001)
	c6, _ := n.talk(0, server6, 40002)
	other, _ := n.talk(1, server4, 40003)
	_, err := lab.AskUDP(within(t, patience), n.Pods[0], netip.AddrPortFrom(n.PodAddrs[0].V4, 40004), udp4, []byte("x"))
	must(t, err)
	_, err = lab.Ping(within(t, patience), n.Pods[0], n.WorldAddr.V4, 4242, 1, 32)
	must(t, err)

	const want = `ICMP OUT 10.0.1.2:4242 -> 192.0.2.2:0 XLATE_SRC 192.0.2.1:4242 Created=Nsec ago State=query
ICMP IN 192.0.2.2:0 -> 192.0.2.1:4242 XLATE_DST 10.0.1.2:4242 Created=Nsec ago State=query
TCP OUT 10.0.1.2:40001 -> 192.0.2.2:8080 XLATE_SRC 192.0.2.1:40001 Created=Nsec ago State=established
TCP IN 192.0.2.2:8080 -> 192.0.2.1:40001 XLATE_DST 10.0.1.2:40001 Created=Nsec ago State=established
TCP OUT 10.0.1.3:40003 -> 192.0.2.2:8080 XLATE_SRC 192.0.2.1:40003 Created=Nsec ago State=established
TCP IN 192.0.2.2:8080 -> 192.0.2.1:40003 XLATE_DST 10.0.1.3:40003 Created=Nsec ago State=established
TCP OUT [fd00:1::2]:40002 -> [2001:db8:2::2]:8080 XLATE_SRC [2001:db8:2::1]:40002 Created=Nsec ago State=established
TCP IN [2001:db8:2::2]:8080 -> [2001:db8:2::1]:40002 XLATE_DST [fd00:1::2]:40002 Created=Nsec ago State=established
UDP OUT 10.0.1.2:40004 -> 192.0.2.2:5353 XLATE_SRC 192.0.2.1:40004 Created=Nsec ago State=two-way
UDP IN 192.0.2.2:5353 -> 192.0.2.1:40004 XLATE_DST 10.0.1.2:40004 Created=Nsec ago State=two-way
`
	all := withoutAge(n.cli("bpf", "nat", "list"))
	if all != want {
		t.Errorf("bpf nat list:\n%swant:\n%s", all, want)
	}
	lines := strings.SplitAfter(want, "\n")
	for _, f := range []struct {
		args []string
		keep string // of the lines above
	}{
		{[]string{"--pod=10.0.1.3"}, `10\.0\.1\.3`},
		{[]string{"--pod=fd00:1::2"}, `fd00:1::2`},
		{[]string{"--remote=2001:db8:2::2"}, `2001:db8:2::2`},
		{[]string{"--remote=[2001:db8:2::2]:8080"}, `2001:db8:2::2`},
		{[]string{"--remote=192.0.2.2:5353"}, `^UDP`},
		{[]string{"--remote=192.0.2.2:1"}, `^$`},
		{[]string{"--proto=udp"}, `^UDP`},
		{[]string{"--proto=icmp"}, `^ICMP`},
		{[]string{"--proto=6", "--pod=10.0.1.2"}, `^TCP.*10\.0\.1\.2`},
	} {
		keep := regexp.MustCompile(f.keep)
		want := strings.Join(slices.DeleteFunc(slices.Clone(lines), func(l string) bool { return l == "" || !keep.MatchString(l) }), "")
		r := n.try(append([]string{"bpf", "nat", "list"}, f.args...)...)
		if got := withoutAge(r.stdout); r.code != 0 || got != want {
			t.Errorf("bpf nat list %q: exit %d\n%swant:\n%s", f.args, r.code, got, want)
		}
	}
	var entries []map[string]any
	n.cliJSON(&entries, "bpf", "nat", "list", "--proto=udp")
	wantKeys := []string{"bytes", "createdSeconds", "dir", "dst", "dstPort", "packets", "proto", "src", "srcPort", "state", "xlate", "xlatePort"}
	if len(entries) != 2 {
		t.Fatalf("JSON: %v", entries)
	}
	for _, e := range entries {
		var keys []string
		for k := range e {
			keys = append(keys, k)
		}
		slices.Sort(keys)
		if !slices.Equal(keys, wantKeys) {
			t.Errorf("JSON has keys %q, want %q", keys, wantKeys)
		}
	}
	if e := entries[0]; e["srcPort"] != 40004.0 || e["xlate"] != "192.0.2.1" || e["dir"] != "OUT" || e["state"] != "two-way" || e["packets"] != 1.0 || e["proto"] != "UDP" {
		t.Errorf("JSON: %v", e)
	}

	// flush ends the mappings that its filter selects, and no others.
	for _, c := range []*net.TCPConn{c4, c6, other} {
		if !answers(c) {
			t.Fatal("a connection does not answer")
		}
	}
	n.kill() // flush needs no agent
	if out := n.cli("bpf", "nat", "flush", "--pod=10.0.1.2", "--proto=tcp"); out != "Flushed 1 mapping\n" {
		t.Errorf("flush: %q", out)
	}
	if out := n.cli("bpf", "nat", "list"); strings.Contains(out, "40001") || !strings.Contains(out, "40003") || !strings.Contains(out, "40004") {
		t.Errorf("after flush:\n%s", out)
	}
	w := n.watchWire()
	// What a connection sends then begins a new mapping, with its port if that is free.
	for _, c := range []*net.TCPConn{c4, c6, other} {
		if !answers(c) {
			t.Error("a connection does not answer")
		}
	}
	n.start(n.agent.args...)
	if n.cli("bpf", "nat", "flush"); n.mapped() != 0 {
		t.Errorf("after flushing all:\n%s", n.cli("bpf", "nat", "list"))
	}
	if r := n.try("bpf", "nat", "list"); r.code != 0 || r.stdout != "" || r.stderr != "No entries found.\n" {
		t.Errorf("empty list: %+v", r)
	}
	must(t, other.CloseWrite()) // an end begins nothing
	n.await("strays", func(st agent.Status) bool { return st.Drops["drop-stray"] > 0 })
	w.check(t)
	n.talk(0, server4, 0)
}

// Inbound connections and those of the node itself are shown with --all only.
func TestNATListAll(t *testing.T) {
	t.Parallel()
	n := startNode(t, lab.Options{WorldKnowsPods: true})
	inside := server(t, lab.EchoTCP, n.Pods[0], netip.AddrPortFrom(n.PodAddrs[0].V4, 8080))
	conn, err := lab.DialTCP(within(t, patience), n.World, netip.AddrPortFrom(n.Excluded.V4, 0), inside)
	must(t, err)
	defer conn.Close()
	if r := n.try("bpf", "nat", "list"); r.stdout != "" {
		t.Errorf("bpf nat list:\n%s", r.stdout)
	}
	labtest.Eventually(t, patience, func() error {
		out := n.cli("bpf", "nat", "list", "--all")
		if !strings.Contains(out, "TCP IN "+conn.LocalAddr().String()+" -> 10.0.1.2:8080") || !strings.Contains(out, "inbound") {
			return fmt.Errorf("bpf nat list --all:\n%s", out)
		}
		return nil
	})
}
