package e2e_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/lab/packet"
)

// table opens a pinned table of flows.
func (n *node) table(name string) *ebpf.Map {
	n.t.Helper()
	m, err := ebpf.LoadPinnedMap(filepath.Join(n.bpfRoot, name), nil)
	must(n.t, err)
	labtest.Close(n.t, m.Close)
	return m
}

// wipe deletes all entries behind the data plane's back, and says how many.
func wipe(m *ebpf.Map) (deleted int, err error) {
	var keys [][]byte
	key, err := m.NextKeyBytes(nil)
	for ; err == nil && key != nil; key, err = m.NextKeyBytes(key) {
		keys = append(keys, key)
	}
	for _, key := range keys {
		if m.Delete(key) == nil {
			deleted++
		}
	}
	return deleted, err
}

// A running transfer survives the loss of its mapping, of either half or of both,
// with the port it had (Cilium issue 37747); what the world sends meanwhile is not
// answered by the node's own stack.
func TestLostState(t *testing.T) {
	t.Parallel()
	n := startNode(t, lab.Options{})
	wire := n.watchWire()
	for _, dst := range n.WorldAddr.All() {
		echo := server(t, lab.EchoTCP, n.World, anyPort(dst))
		v := family(dst)[1:]
		forward, reverse := n.table("forward"+v), n.table("reverse"+v)
		for name, lost := range map[string][]*ebpf.Map{"forward": {forward}, "reverse": {reverse}, "both": {reverse, forward}} {
			t.Run(name+" "+family(dst), func(t *testing.T) { testLostState(t, n, echo, lost) })
		}
	}
	wire.check(t)
	if c := n.counts(); c["drop-stray"] > 0 {
		t.Logf("%d resets of the node were kept", c["drop-stray"])
	}
}

func testLostState(t *testing.T, n *node, echo netip.AddrPort, lost []*ebpf.Map) {
	const size = 128 << 20
	done := make(chan error, 1)
	go func() {
		_, err := transfer(within(t, time.Minute), n.Pods[0], echo, size)
		done <- err
	}()
	running := func(e entry) bool { return e.Dir == "OUT" && e.Bytes > 1<<20 && e.State == "established" }
	var before entry
	labtest.Eventually(t, 30*time.Second, func() error {
		list := n.natList("--remote", echo.String())
		if i := slices.IndexFunc(list, running); i >= 0 {
			before = list[i]
			return nil
		}
		return fmt.Errorf("no transfer: %+v", list)
	})
	for _, m := range lost {
		if deleted, err := wipe(m); err != nil || deleted == 0 {
			t.Fatalf("%d entries deleted: %v", deleted, err)
		}
	}
	select {
	case err := <-done:
		t.Fatalf("the transfer had ended before: %v", err)
	default:
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	var after []uint16
	for _, e := range n.natList("--remote", echo.String()) {
		if e.Dir == "OUT" && e.SrcPort == before.SrcPort {
			after = append(after, e.XlatePort)
		}
	}
	if len(after) != 1 || after[0] != before.XlatePort {
		t.Errorf("external port %d, afterwards %v", before.XlatePort, after)
	}
}

// Both sides connect at the same time (RFC 5382 REQ-2a), with real sockets: the
// world does not hear the pod's SYN, and its own meets a pod that is connecting.
func TestSimultaneousOpen(t *testing.T) {
	t.Parallel()
	n := startNode(t, lab.Options{})
	wire := n.watchWire()
	for i, bits := range []int{24, 64} {
		dst := secondWorld.All()[i]
		t.Run(family(dst), func(t *testing.T) {
			at := netip.PrefixFrom(dst, bits)
			must(t, n.World.AddAddr("eth0", at))
			// The node has to know where the address is when it is gone.
			if _, err := (lab.Echo{Dst: dst, ID: 1, Seq: 1}).Send(within(t, 10*time.Second), n.Node); err != nil {
				t.Fatal(err)
			}
			must(t, n.World.DelAddr("eth0", at))
			local, remote := netip.AddrPortFrom(n.PodAddrs[0].Of(dst), 40000), netip.AddrPortFrom(dst, 40500)
			syns := wire.capture.Count(func(p lab.Packet) bool {
				f, ok := lab.ParseFrame(p.Data)
				return ok && p.Outgoing && f.Dst == dst && f.Proto == packet.TCP
			})
			type dialed struct {
				c   *net.TCPConn
				err error
			}
			pod := make(chan dialed, 1)
			go func() {
				c, err := lab.DialTCP(within(t, 20*time.Second), n.Pods[0], local, remote)
				pod <- dialed{c, err}
			}()
			labtest.Eventually(t, 10*time.Second, func() error {
				if syns.N() == 0 {
					return errors.New("no SYN of the pod")
				}
				return nil
			})
			must(t, n.World.AddAddr("eth0", at))
			world, err := lab.DialTCP(within(t, 10*time.Second), n.World, remote, netip.AddrPortFrom(n.NodeAddr.Of(dst), 40000))
			if err != nil {
				t.Fatalf("the world: %v", err)
			}
			defer world.Close()
			d := <-pod
			if d.err != nil {
				t.Fatalf("the pod: %v", d.err)
			}
			defer d.c.Close()
			go io.Copy(world, world)
			if err := exchange(d.c); err != nil {
				t.Error(err)
			}
		})
	}
	wire.check(t)
}
