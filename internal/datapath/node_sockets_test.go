package datapath

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
)

// listen opens a socket of either protocol, bound to a device if dev is not empty.
func listen(t *testing.T, ns *lab.NS, network, address, dev string) {
	t.Helper()
	lc := net.ListenConfig{Control: control(func(fd int) error {
		if dev == "" {
			return nil
		}
		return unix.BindToDevice(fd, dev)
	})}
	err := ns.Do(func() error {
		var c io.Closer
		var err error
		if network[0] == 't' {
			c, err = lc.Listen(context.Background(), network, address)
		} else {
			c, err = lc.ListenPacket(context.Background(), network, address)
		}
		if err == nil {
			labtest.Close(t, c.Close)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// A new mapping avoids a port that a socket of the node has, whatever kind of
// socket it is; one that could not receive its answers is no reason to avoid it.
func TestNodeSockets(t *testing.T) {
	t.Parallel()
	topo := labtest.NewNode(t, lab.Options{Pods: 2})
	b := newBench(t, topo.Node, Options{})
	in := nodePolicy(t, topo)
	next := uint16(40000) // each case has ports of its own, and so no TIME_WAIT of another
	type site struct {
		node, server netip.AddrPort // node: the port at stake
	}
	const other = 9 // a port where the world has no server
	for _, c := range []struct {
		name   string
		proto  string // "tcp", "udp", or "" for both
		avoids bool
		open   func(*testing.T, string, site)
	}{
		{"one address", "", true, func(t *testing.T, proto string, s site) { listen(t, topo.Node, proto, s.node.String(), "") }},
		{"any address, dual-stack", "", true, func(t *testing.T, proto string, s site) {
			listen(t, topo.Node, proto, fmt.Sprintf("[::]:%d", s.node.Port()), "")
		}},
		{"any address, of the family", "", true, func(t *testing.T, proto string, s site) {
			if s.node.Addr().Is4() {
				listen(t, topo.Node, proto+"4", fmt.Sprintf("0.0.0.0:%d", s.node.Port()), "")
			} else {
				listen(t, topo.Node, proto+"6", fmt.Sprintf("[::]:%d", s.node.Port()), "")
			}
		}},
		{"bound to the device", "", true, func(t *testing.T, proto string, s site) {
			listen(t, topo.Node, proto, fmt.Sprintf("[::]:%d", s.node.Port()), "eth0")
		}},
		{"bound to another device", "", false, func(t *testing.T, proto string, s site) {
			listen(t, topo.Node, proto, fmt.Sprintf("[::]:%d", s.node.Port()), "pod0")
		}},
		{"another address", "", false, func(t *testing.T, proto string, s site) {
			listen(t, topo.Node, proto, netip.AddrPortFrom(topo.PodGateway.Of(s.node.Addr()), s.node.Port()).String(), "")
		}},
		{"another network namespace", "", false, func(t *testing.T, proto string, s site) {
			listen(t, topo.Pods[1], proto, fmt.Sprintf("[::]:%d", s.node.Port()), "")
		}},
		{"connected to the remote", "udp", true, func(t *testing.T, _ string, s site) { dialUDP(t, topo.Node, s.node, s.server) }},
		{"connected elsewhere", "udp", false, func(t *testing.T, _ string, s site) {
			dialUDP(t, topo.Node, s.node, netip.AddrPortFrom(s.server.Addr(), other))
		}},
		{"connection", "tcp", true, func(t *testing.T, _ string, s site) { labtest.Close(t, connect(t, topo.Node, s.node, s.server).Close) }},
		{"TIME_WAIT", "tcp", true, func(t *testing.T, _ string, s site) {
			c := connect(t, topo.Node, s.node, s.server)
			c.CloseWrite()
			if _, err := io.Copy(io.Discard, c); err != nil { // until the server has closed as well
				t.Fatal(err)
			}
			if err := c.Close(); err != nil {
				t.Fatal(err)
			}
		}},
		{"VXLAN in the kernel", "udp", true, func(t *testing.T, _ string, s site) {
			err := topo.Node.Do(func() error {
				vx := &netlink.Vxlan{LinkAttrs: netlink.LinkAttrs{Name: "vx0", Flags: net.FlagUp}, VxlanId: 7, Port: int(s.node.Port()),
					SrcAddr: s.node.Addr().AsSlice(), Group: s.server.Addr().AsSlice()}
				return netlink.LinkAdd(vx)
			})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if err := topo.Node.DeleteLink("vx0"); err != nil {
					t.Error(err)
				}
			})
		}},
	} {
		for _, proto := range []string{"tcp", "udp"} {
			for _, world := range topo.WorldAddr.All() {
				if c.proto != "" && c.proto != proto {
					continue
				}
				t.Run(c.name+" "+proto+" "+world.String(), func(t *testing.T) {
					in.Ports, next = []uint16{next, next + 1}, next+2
					b.apply(in)
					server, ask := echoServer(t, topo, proto, netip.AddrPortFrom(world, 0))
					s := site{node: netip.AddrPortFrom(topo.NodeAddr.Of(world), in.Ports[0]), server: server}
					c.open(t, proto, s)
					seen := ask(netip.AddrPortFrom(topo.PodAddrs[0].Of(world), in.Ports[0]))
					want := in.Ports[0]
					if c.avoids {
						want++
					}
					if seen != netip.AddrPortFrom(s.node.Addr(), want) {
						t.Errorf("the world saw %s, want port %d", seen, want)
					}
				})
			}
		}
	}
}

// echoServer starts a server in the world; ask asks it from the first pod.
func echoServer(t *testing.T, topo *lab.Topology, proto string, at netip.AddrPort) (server netip.AddrPort, ask func(local netip.AddrPort) netip.AddrPort) {
	t.Helper()
	start := lab.EchoUDP
	if proto == "tcp" {
		start = lab.EchoTCP
	}
	s, err := start(topo.World, at)
	if err != nil {
		t.Fatal(err)
	}
	labtest.Close(t, s.Close)
	return s.Addr, func(local netip.AddrPort) (seen netip.AddrPort) {
		t.Helper()
		var err error
		if proto == "udp" {
			seen, err = lab.AskUDP(within(t, 5*time.Second), topo.Pods[0], local, s.Addr, []byte("hello"))
		} else {
			var c *net.TCPConn
			if seen, c, err = lab.AskTCP(within(t, 5*time.Second), topo.Pods[0], local, s.Addr); err == nil {
				c.Close()
			}
		}
		if err != nil {
			t.Fatal(err)
		}
		return seen
	}
}

func dialUDP(t *testing.T, ns *lab.NS, local, remote netip.AddrPort) {
	t.Helper()
	c, err := lab.DialUDP(t.Context(), ns, local, remote)
	if err != nil {
		t.Fatal(err)
	}
	labtest.Close(t, c.Close)
}

func connect(t *testing.T, ns *lab.NS, local, remote netip.AddrPort) *net.TCPConn {
	t.Helper()
	_, c, err := lab.AskTCP(within(t, 5*time.Second), ns, local, remote)
	if err != nil {
		t.Fatal(err)
	}
	return c
}
