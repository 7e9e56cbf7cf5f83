package datapath

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
)

// A connection of which the node's listener has seen no more than the SYN is a request, which is a
// socket of its own kind (SYN_RECV): it has come first too, and is found without its listener, which
// here can't be reached by the device any more. TCP_DEFER_ACCEPT leaves it a request until there is data.
func TestNodeRequest(t *testing.T) {
	t.Parallel()
	topo := labtest.NewNode(t, lab.Options{})
	b := newBench(t, topo.Node, Options{})
	in := nodePolicy(t, topo)
	for i, world := range topo.WorldAddr.All() {
		t.Run(world.String(), func(t *testing.T) {
			first := uint16(41000 + 10*i)
			in.Ports = []uint16{first, first + 1}
			b.apply(in)
			node := netip.AddrPortFrom(topo.NodeAddr.Of(world), first)
			l := deferring(t, topo.Node, node)
			var client net.Conn
			err := topo.World.Do(func() (err error) { // from a port where a server can listen as well
				d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(world, 0)), Control: control(func(fd int) error {
					return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
				})}
				client, err = d.DialContext(within(t, 5*time.Second), "tcp", node.String())
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
			labtest.Close(t, client.Close)
			at := client.LocalAddr().(*net.TCPAddr).AddrPort()
			raw, err := l.SyscallConn()
			if err != nil {
				t.Fatal(err)
			}
			if err := control(func(fd int) error { return unix.BindToDevice(fd, "pod0") })("", "", raw); err != nil {
				t.Fatal(err)
			}
			const synReceived = "03" // TCP_SYN_RECV
			if states := tcpStates(t, topo.Node, first, at.Port()); !slices.Equal(states, []string{synReceived}) {
				t.Fatalf("sockets of the node from port %d to %d: states %q, want one request", first, at.Port(), states)
			}
			local := netip.AddrPortFrom(topo.PodAddrs[0].Of(world), first)
			for _, c := range []struct {
				server netip.AddrPort
				want   uint16
			}{
				{at, first + 1},
				{netip.AddrPortFrom(world, 0), first}, // to another remote the port is free, so the listener was not found
			} {
				server, _ := echoServer(t, topo, "tcp", c.server)
				seen, conn, err := lab.AskTCP(within(t, 5*time.Second), topo.Pods[0], local, server)
				if err != nil {
					t.Fatal(err)
				}
				conn.SetLinger(0) // the next one has the same port
				conn.Close()
				if seen != netip.AddrPortFrom(node.Addr(), c.want) {
					t.Errorf("server %s saw %s, want port %d", server, seen, c.want)
				}
			}
			// The node's connection becomes one.
			if _, err := client.Write([]byte("hello")); err != nil {
				t.Fatal(err)
			}
			l.SetDeadline(time.Now().Add(labtest.Patience(5 * time.Second)))
			c, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(labtest.Patience(5 * time.Second)))
			buf := make([]byte, 5)
			if _, err := c.Read(buf); err != nil || string(buf) != "hello" {
				t.Errorf("the node's connection: %q, %v", buf, err)
			}
		})
	}
}

// control makes a function of a file descriptor one for net.Dialer and net.ListenConfig.
func control(f func(fd int) error) func(network, address string, c syscall.RawConn) error {
	return func(_, _ string, c syscall.RawConn) (err error) {
		if failed := c.Control(func(fd uintptr) { err = f(int(fd)) }); failed != nil {
			return failed
		}
		return err
	}
}

// deferring listens with TCP_DEFER_ACCEPT.
func deferring(t *testing.T, ns *lab.NS, at netip.AddrPort) (l *net.TCPListener) {
	t.Helper()
	err := ns.Do(func() error {
		lc := net.ListenConfig{Control: control(func(fd int) error {
			return unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_DEFER_ACCEPT, 60)
		})}
		any, err := lc.Listen(context.Background(), "tcp", at.String())
		if err == nil {
			l = any.(*net.TCPListener)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	labtest.Close(t, l.Close)
	return l
}

// tcpStates returns the states of the sockets of a namespace with these ports, as /proc/net/tcp has them.
func tcpStates(t *testing.T, ns *lab.NS, local, remote uint16) (states []string) {
	t.Helper()
	for _, file := range []string{"tcp", "tcp6"} {
		var table []byte
		err := ns.Do(func() (err error) {
			table, err = os.ReadFile("/proc/thread-self/net/" + file)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(table)) {
			if f := strings.Fields(line); strings.HasSuffix(f[1], fmt.Sprintf(":%04X", local)) && strings.HasSuffix(f[2], fmt.Sprintf(":%04X", remote)) {
				states = append(states, f[3])
			}
		}
	}
	return states
}
