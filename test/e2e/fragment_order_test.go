package e2e_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/lab/packet"
)

// orders are the ways in which the fragments of a datagram arrive.
var orders = []struct {
	name string
	of   func(*rand.Rand, [][]byte)
}{
	{"in order", func(*rand.Rand, [][]byte) {}},
	{"reversed", func(_ *rand.Rand, b [][]byte) { slices.Reverse(b) }},
	{"first one late", func(_ *rand.Rand, b [][]byte) { b[0], b[1] = b[1], b[0] }},
	{"shuffled", func(rng *rand.Rand, b [][]byte) { rng.Shuffle(len(b), func(i, j int) { b[i], b[j] = b[j], b[i] }) }},
}

// Fragments that overtake their first one reach the pod all the same: the reply is
// sent by hand, fragment by fragment, and read from the pod's socket. So do those for
// the node itself. Cilium's translator drops what comes before its first fragment.
func TestFragmentOrder(t *testing.T) {
	t.Parallel()
	rng := labtest.Rand(t)
	eachHook(t, lab.Options{}, func(t *testing.T, n *node) {
		n.reassembles()
		for _, dst := range n.WorldAddr.All() {
			for i, from := range []*lab.NS{n.Pods[0], n.Node} {
				c := n.correspond(t, from, dst)
				c.id = uint32(i) * 1000 // for 5 seconds an ID belongs to the flow that had it last
				for _, size := range []int{3000, 8000, 65507} {
					for _, order := range orders {
						c.exchange(t, rng, size, order.name, order.of)
					}
				}
				c.interleaved(t, rng)
				c.race(t, rng)
			}
		}
		n.wantCounts(func(c map[string]uint64) bool {
			return c["hold-fragment"] > 0 && c["drop-fragment"]+c["pass-fragment"] == 0
		})
	})
}

// exchange sends datagrams of a size whose fragments are in some order, one by one.
func (c *correspondence) exchange(t *testing.T, rng *rand.Rand, size int, name string, order func(*rand.Rand, [][]byte)) {
	t.Helper()
	rounds, lost := 200_000/size, 0
	for range rounds {
		p := c.datagram(rng, size)
		pieces := p.Fragments(1400)
		order(rng, pieces)
		c.send(t, pieces...)
		if err := c.receive(p.Payload); err != nil {
			lost++
			t.Logf("%s, %d bytes, %s: %v", family(c.remote.Addr()), size, name, err)
		}
	}
	if lost > 0 {
		t.Errorf("%s, %d bytes, %s: lost %d of %d", family(c.remote.Addr()), size, name, lost, rounds)
	}
}

// interleaved sends all later fragments of many datagrams before any first one.
func (c *correspondence) interleaved(t *testing.T, rng *rand.Rand) {
	t.Helper()
	var firsts, later [][]byte
	var want [][]byte
	for range 30 {
		p := c.datagram(rng, 8000)
		pieces := p.Fragments(1400)
		firsts, later, want = append(firsts, pieces[0]), append(later, pieces[1:]...), append(want, p.Payload)
	}
	rng.Shuffle(len(later), func(i, j int) { later[i], later[j] = later[j], later[i] })
	c.send(t, later...)
	for i, first := range firsts {
		c.send(t, first)
		if err := c.receive(want[i]); err != nil {
			t.Errorf("%s, 30 datagrams at a time, number %d: %v", family(c.remote.Addr()), i, err)
			return // the next ones have waited too long by now
		}
	}
}

// race sends the first fragment and the later ones at the same time on two CPUs.
func (c *correspondence) race(t *testing.T, rng *rand.Rand) {
	t.Helper()
	const rounds = 500
	lost := 0
	for range rounds {
		p := c.datagram(rng, 4000)
		pieces := p.Fragments(1400)
		later := make(chan error)
		go func() { later <- errors.Join(c.raw.send(pieces[1]), c.raw.send(pieces[2])) }()
		must(t, errors.Join(c.raw.send(pieces[0]), <-later))
		if c.receive(p.Payload) != nil {
			lost++
		}
	}
	if lost > 0 {
		t.Errorf("%s: first and later at once: lost %d of %d", family(c.remote.Addr()), lost, rounds)
	}
}

// correspondence is a masqueraded UDP flow whose remote end sends packets built by
// the test.
type correspondence struct {
	conn             *net.UDPConn
	raw              *rawSender
	remote, external netip.AddrPort
	id               uint32
}

// correspond opens a flow from a namespace to an address of the world.
func (n *node) correspond(t *testing.T, from *lab.NS, dst netip.Addr) *correspondence {
	t.Helper()
	srv, err := lab.ListenUDP(n.World, anyPort(dst))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { srv.Close() })
	c := &correspondence{raw: newRawSender(t, n.World), remote: srv.LocalAddr().(*net.UDPAddr).AddrPort()}
	if c.conn, err = lab.DialUDP(t.Context(), from, netip.AddrPort{}, c.remote); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.conn.Close() })
	if _, err := c.conn.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	srv.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, c.external, err = srv.ReadFromUDPAddrPort(make([]byte, 16)); err != nil {
		t.Fatal(err)
	}
	if c.external.Addr() != n.NodeAddr.Of(dst) {
		t.Fatalf("seen as %s", c.external)
	}
	return c
}

// datagram is one with random content to the flow's external socket.
func (c *correspondence) datagram(rng *rand.Rand, size int) packet.Packet {
	c.id++
	p := packet.Packet{Link: packet.Raw, Src: c.remote.Addr(), Dst: c.external.Addr(), Proto: packet.UDP, ID: c.id,
		SrcPort: c.remote.Port(), DstPort: c.external.Port(), Payload: make([]byte, size)}
	io.ReadFull(lab.Content(rng.Uint64(), int64(size)), p.Payload)
	return p
}

func (c *correspondence) send(t *testing.T, packets ...[]byte) {
	t.Helper()
	for _, b := range packets {
		if err := c.raw.send(b); err != nil {
			t.Fatal(err)
		}
	}
}

// receive reads a datagram in the pod.
func (c *correspondence) receive(want []byte) error {
	buf := make([]byte, 1<<16)
	c.conn.SetReadDeadline(time.Now().Add(time.Second))
	got, err := c.conn.Read(buf)
	if err == nil && !bytes.Equal(buf[:got], want) {
		err = fmt.Errorf("%d bytes that were not sent", got)
	}
	return err
}
