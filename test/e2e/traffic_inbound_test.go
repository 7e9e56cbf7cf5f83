package e2e_test

import (
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
)

// entry is a line of `bpf nat list -o json`.
type entry struct {
	Proto, Dir, Src, Dst, Xlate, State, Kind string
	SrcPort, DstPort, XlatePort              uint16
	CreatedSeconds                           int64
	Packets, Bytes                           uint64
}

func (n *node) natList(args ...string) (list []entry) {
	n.t.Helper()
	n.cliJSON(&list, append([]string{"bpf", "nat", "list"}, args...)...)
	return list
}

// What the world opens towards a pod is answered untranslated, agent or not, and
// what the pod then opens itself is masqueraded.
func TestInbound(t *testing.T) {
	t.Parallel()
	eachHook(t, lab.Options{WorldKnowsPods: true}, func(t *testing.T, n *node) {
		n.forgetsResets()
		var open []*inbound
		for _, client := range n.Excluded.All() {
			open = append(open, openInbound(t, n, client))
		}
		check := func(when string) {
			t.Helper()
			for _, in := range open {
				in.check(t, when)
			}
		}
		check("opened")
		n.kill()
		check("agent down")
		n.start(n.agent.args...)
		check("agent back")
		n.restart("--snat-port-range=40000-41000")
		check("other options")

		all := n.natList("--all")
		for _, proto := range []string{"TCP", "UDP", "ICMP"} {
			found := false
			for _, e := range all {
				found = found || e.Kind == "inbound" && strings.HasPrefix(e.Proto, proto)
			}
			if !found {
				t.Errorf("bpf nat list --all shows no inbound %s entry: %+v", proto, all)
			}
		}
		if list := n.natList(); len(list) > 0 {
			t.Errorf("bpf nat list shows %+v, but nothing is masqueraded", list)
		}
		for _, in := range open {
			in.turn(t)
		}
		n.wantCounts(func(c map[string]uint64) bool { return c["pass-inbound"] > 0 && c["masq-new"] > 0 })
	})
}

// inbound is a client in the world with connections to a pod.
type inbound struct {
	n           *node
	client, pod netip.Addr
	server      *lab.Server // TCP, in the pod
	udpServer   netip.AddrPort
	tcp         *net.TCPConn
	udp         *net.UDPConn
}

const inboundPort = 20001 // of the client; no ephemeral one

func openInbound(t *testing.T, n *node, client netip.Addr) *inbound {
	t.Helper()
	in := &inbound{n: n, client: client, pod: n.PodAddrs[0].Of(client)}
	var err error
	if in.server, err = lab.EchoTCP(n.Pods[0], netip.AddrPortFrom(in.pod, 8080)); err != nil {
		t.Fatal(err)
	}
	labtest.Close(t, in.server.Close)
	in.udpServer = server(t, lab.EchoUDP, n.Pods[0], netip.AddrPortFrom(in.pod, 8081))
	local := netip.AddrPortFrom(client, inboundPort)
	seen, c, err := lab.AskTCP(within(t, 10*time.Second), n.World, local, in.server.Addr)
	if err != nil || seen != local {
		t.Fatalf("tcp from %s to the pod: seen as %s: %v", local, seen, err)
	}
	in.tcp = c
	t.Cleanup(func() { c.Close() })
	if in.udp, err = lab.DialUDP(t.Context(), n.World, local, in.udpServer); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.udp.Close() })
	return in
}

func (in *inbound) check(t *testing.T, when string) {
	t.Helper()
	if err := exchange(in.tcp); err != nil {
		t.Errorf("%s: tcp from %s: %v", when, in.client, err)
	}
	for _, size := range []int{10, 4000} {
		if _, err := lab.AskUDPOn(within(t, 10*time.Second), in.udp, bytes.Repeat([]byte("x"), size)); err != nil {
			t.Errorf("%s: %d bytes of udp from %s: %v", when, size, in.client, err)
		}
	}
	for _, size := range []int{56, 4000} {
		from, err := lab.Echo{Src: in.client, Dst: in.pod, ID: 900, Seq: 1, Payload: size}.Send(within(t, 10*time.Second), in.n.World)
		if err != nil || from != in.pod {
			t.Errorf("%s: ping of %d bytes from %s: answer from %s, %v", when, size, in.client, from, err)
		}
	}
}

// turn ends the connection from outside, and opens one from the pod with the same
// addresses and ports.
func (in *inbound) turn(t *testing.T) {
	t.Helper()
	in.tcp.SetLinger(0) // by a RST, so that the client's socket is gone at once
	in.tcp.Close()
	if err := in.server.Close(); err != nil {
		t.Fatal(err)
	}
	var world netip.AddrPort
	labtest.Eventually(t, 10*time.Second, func() error { // at once is not always at once
		s, err := lab.EchoTCP(in.n.World, netip.AddrPortFrom(in.client, inboundPort))
		if err == nil {
			world = s.Addr
			labtest.Close(t, s.Close)
		}
		return err
	})
	local := netip.AddrPortFrom(in.pod, 8080)
	var c net.Conn
	var seen netip.AddrPort
	labtest.Eventually(t, 10*time.Second, func() error { // until the old socket is gone
		conn, err := net.Conn(nil), error(nil)
		if seen, conn, err = askTCP(t, in.n.Pods[0], local, world); err == nil {
			c = conn
		}
		return err
	})
	defer c.Close()
	if seen.Addr() != in.n.NodeAddr.Of(in.pod) || seen.Port() < 40000 || seen.Port() > 41000 {
		t.Errorf("the pod's own connection from %s was seen as %s", local, seen)
	}
	if err := exchange(c); err != nil {
		t.Error(err)
	}
	if _, err := (lab.Echo{Dst: in.client, ID: 900, Seq: 2, Payload: 10}).Send(within(t, 10*time.Second), in.n.Pods[0]); err != nil {
		t.Errorf("the pod's own ping with the identifier of one from outside: %v", err)
	}
}

// askTCP is lab.AskTCP for two seconds.
func askTCP(t *testing.T, ns *lab.NS, local, server netip.AddrPort) (netip.AddrPort, net.Conn, error) {
	seen, c, err := lab.AskTCP(within(t, 2*time.Second), ns, local, server)
	if err != nil {
		return seen, nil, err
	}
	return seen, c, nil
}

// flow is a connection or socket with an echo server, and how the server sees it.
type flow struct {
	name  string
	seen  netip.AddrPort
	again func() (netip.AddrPort, error)
}

// open opens a TCP connection or a UDP socket from a given port.
func open(t *testing.T, proto string, ns *lab.NS, local, server netip.AddrPort) *flow {
	t.Helper()
	f := &flow{name: fmt.Sprintf("%s %s->%s", proto, local, server)}
	if proto == "tcp" {
		seen, c, err := lab.AskTCP(within(t, 10*time.Second), ns, local, server)
		if err != nil {
			t.Fatalf("%s: %v", f.name, err)
		}
		t.Cleanup(func() { c.Close() })
		f.seen, f.again = seen, func() (netip.AddrPort, error) { return seen, exchange(c) }
		return f
	}
	c, err := lab.DialUDP(t.Context(), ns, local, server)
	if err != nil {
		t.Fatalf("%s: %v", f.name, err)
	}
	t.Cleanup(func() { c.Close() })
	f.again = func() (netip.AddrPort, error) { return lab.AskUDPOn(within(t, 10*time.Second), c, []byte("hello")) }
	if f.seen, err = f.again(); err != nil {
		t.Fatalf("%s: %v", f.name, err)
	}
	return f
}

// works checks that the flow still works and looks the same.
func (f *flow) works(t *testing.T) {
	t.Helper()
	if seen, err := f.again(); err != nil || seen != f.seen {
		t.Errorf("%s: was seen as %s, now as %s: %v", f.name, f.seen, seen, err)
	}
}

// The node's own connections use ports of the pool too: whoever came first keeps
// the port, and both work.
func TestNodeSharesPorts(t *testing.T) {
	t.Parallel()
	eachHook(t, lab.Options{}, func(t *testing.T, n *node) {
		for _, dst := range n.WorldAddr.All() {
			starts := map[string]func(*lab.NS, netip.AddrPort) (*lab.Server, error){"tcp": lab.EchoTCP, "udp": lab.EchoUDP}
			for _, proto := range []string{"tcp", "udp"} {
				t.Run(proto+" "+family(dst), func(t *testing.T) {
					testNodeSharesPorts(t, n, proto, server(t, starts[proto], n.World, anyPort(dst)))
				})
			}
		}
		n.wantCounts(func(c map[string]uint64) bool { return c["masq-host"] > 0 })
		st := n.status()
		if len(st.Drops) > 0 {
			t.Errorf("drops: %v", st.Drops)
		}
	})
}

func testNodeSharesPorts(t *testing.T, n *node, proto string, world netip.AddrPort) {
	node, pod := n.NodeAddr.Of(world.Addr()), n.PodAddrs[0].Of(world.Addr())
	at := netip.AddrPortFrom

	alone := open(t, proto, n.Node, at(node, 40000), world)
	if alone.seen != at(node, 40000) {
		t.Errorf("the node's own flow was seen as %s", alone.seen)
	}
	// The pod is first.
	first := open(t, proto, n.Pods[0], at(pod, 40100), world)
	second := open(t, proto, n.Node, at(node, 40100), world)
	if first.seen != at(node, 40100) || second.seen.Addr() != node || second.seen == first.seen {
		t.Errorf("pod first: seen as %s, the node as %s", first.seen, second.seen)
	}
	// The node is first.
	third := open(t, proto, n.Node, at(node, 40200), world)
	fourth := open(t, proto, n.Pods[0], at(pod, 40200), world)
	if third.seen != at(node, 40200) || fourth.seen.Addr() != node || fourth.seen == third.seen {
		t.Errorf("node first: seen as %s, the pod as %s", third.seen, fourth.seen)
	}
	// The node listens: on all addresses of both families, on all of one, on one.
	unspecified := netip.IPv4Unspecified()
	if node.Is6() {
		unspecified = netip.IPv6Unspecified()
	}
	listening := []netip.Addr{netip.IPv6Unspecified(), unspecified, node}
	if n.backend != "" {
		listening = nil // netfilter knows connections, no sockets
	}
	for i, addr := range listening {
		port := uint16(40300 + i)
		if proto == "tcp" {
			l, err := lab.ListenTCP(n.Node, at(addr, port))
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
		} else {
			l, err := lab.ListenUDP(n.Node, at(addr, port))
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
		}
		f := open(t, proto, n.Pods[0], at(pod, port), world)
		if f.seen.Addr() != node || f.seen.Port() == port {
			t.Errorf("the node listens on %s: the pod's flow was seen as %s", at(addr, port), f.seen)
		}
		f.works(t)
	}
	for _, f := range []*flow{alone, first, second, third, fourth} {
		f.works(t)
	}
}
